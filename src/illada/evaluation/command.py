"""What `illada eval` does with its options."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from illada.errors import IlladaError
from illada.evaluation.results import Row
from illada.evaluation.run import Evaluation, Variant, ablation, chosen, evaluate_models, paper_rows, task_manager
from illada.weights.runs import checkpoints

OF_MODEL = ("scoring", "samples", "seed", "dtype", "device", "quantize", "max_batch_tokens")


def evaluate(arguments: dict[str, Any]) -> str:
    """Evaluate as the arguments of `illada eval` say; return the table.

    Raises:
        IlladaError: when they contradict each other or name what does not exist.
    """
    paper, folder, tasks, ablate = (arguments[name] for name in ("paper", "task_files", "tasks", "ablate"))
    if paper is not None and folder is not None:
        raise IlladaError("--paper and --task_files exclude each other: the paper's rows are tasks of their own")
    if paper is None and folder is None and not tasks:
        raise IlladaError("what to evaluate? Give --paper base or instruct, --task_files FOLDER, or --tasks NAME ...")
    if paper is None and (arguments["decode"] != "exact" or arguments["lengths"] != "3-4"):
        raise IlladaError("--decode and --lengths are about the paper's rows: give --paper, or --settings for others")
    if paper is not None and (arguments["shots"] is not None or arguments["chat"]):
        raise IlladaError("--shots and --chat are for tasks other than the paper's, whose rows say it themselves")
    if arguments["values"] and not ablate:
        raise IlladaError("--values are those of an ablation: give --ablate too")
    if ablate and arguments["run"]:
        raise IlladaError("--ablate and --run exclude each other: choose --model, a checkpoint, for an ablation")
    models = _models(arguments["model"], arguments["run"])
    variants = ablation(ablate, arguments["values"]) if ablate else [Variant()]
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    manager = task_manager(folder)
    if paper is not None:
        rows = chosen(paper_rows(paper, arguments["decode"], arguments["lengths"]), tasks)
    else:
        known = manager.all_groups + manager.all_subtasks
        rows = [Row(name, name, shots=arguments["shots"], chat=arguments["chat"]) for name in known]
        rows = chosen(rows, tasks) if folder is None or tasks else rows
    settings = arguments["settings"] or {}
    variants = [replace(variant, generation={**settings, **variant.generation}) for variant in variants]
    evaluation = Evaluation(
        manager,
        Path(arguments["output"]),
        limit=arguments["limit"],
        seed=arguments["seed"],
        allow_code=arguments["allow_code"],
        folder=folder,
        download=arguments["download"],
    )
    options = {name: arguments[name] for name in OF_MODEL}
    return evaluate_models(models, rows, variants, evaluation, options, arguments, paper or "")


def _models(model: str | None, run: str | None) -> dict[str, str]:
    """Return the model by the empty label, or every checkpoint of a run by its step."""
    if (model is None) == (run is None):
        raise IlladaError("give --model, or --run to evaluate every checkpoint of a training run")
    if model is not None:
        return {"": model}
    found: Sequence[Path] = checkpoints(Path(str(run)))
    if not found:
        raise IlladaError(f"no checkpoints in {run}: give a run folder of `illada pretrain` or `illada sft`")
    return {path.name: str(path) for path in found}
