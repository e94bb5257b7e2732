"""The demo's held-out problems as task files of lm-evaluation-harness, evaluated by what `illada eval` runs."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from illada.toy_tasks import Choice, Example

CHOICES = "library-choices"


def write_tasks(
    folder: Path,
    problems: Mapping[str, Sequence[Example]],
    choices: Sequence[Choice],
    generation: dict[str, int],
) -> list[str]:
    """Write a task of exact match for each kind of problem and one of multiple choice; return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {"output_type": "generate_until", "generation_kwargs": {"until": [], **generation}}
    chosen = {"output_type": "multiple_choice", "doc_to_choice": "{{candidates}}"}
    tasks: dict[str, tuple[dict[str, Any], str, Sequence[Example | Choice]]]
    tasks = {name: (written, "exact_match", examples) for name, examples in problems.items()}
    tasks[CHOICES] = (chosen, "acc", choices)
    for name, (kind, metric, records) in tasks.items():
        task = {
            "task": name,
            "dataset_path": "json",
            # A cache of its own: nothing of the demo lies outside its folder.
            "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}, "cache_dir": ".cache"},
            "test_split": "test",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "",  # the chat template ends where the answer begins
            **kind,
            "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
        lines = (json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return list(tasks)


def evaluate(
    output: Path,
    problems: Mapping[str, Sequence[Example]],
    choices: Sequence[Choice],
    generation: dict[str, int],
    seed: int,
) -> list[dict[str, Any]] | None:
    """Evaluate the model in `output` into output/evaluation, choices by confidence; None where lm-eval is missing.

    Args:
        output: folder of the demo; what an interrupted evaluation has found is used.
        problems: to answer, by task.
        choices: to choose from.
        generation: max_new_tokens and block_length.
        seed: of the evaluation.

    Returns:
        for each task its name, metric, value, standard_error, documents, forwards and seconds.
    """
    if find_spec("lm_eval") is None:
        return None
    import datasets

    from illada.evaluation.results import Row
    from illada.evaluation.run import Evaluation, Variant, evaluate_models, task_manager

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    folder = output / "tasks"
    rows = [Row(name, name, shots=0, chat=True) for name in write_tasks(folder, problems, choices, generation)]
    evaluation = Evaluation(task_manager(str(folder)), output / "evaluation", seed=seed, folder=str(folder))
    model = str(output / "model")
    arguments = {"model": model, "task_files": str(folder), "chat": True, "seed": seed}
    evaluate_models({"": model}, rows, [Variant()], evaluation, {"seed": seed}, arguments, "")
    return [
        {
            "task": result.row,
            "metric": metric.removesuffix(",none"),
            "value": round(value, 4),
            "standard_error": None if error is None else round(error, 4),
            "documents": result.documents,
            "forwards": result.forwards,
            "seconds": round(result.seconds, 2),
        }
        for result in evaluation.results
        for metric, (value, error) in result.metrics.items()
    ]
