"""The demo's held-out problems as task files of lm-evaluation-harness, evaluated by what `illada eval` runs."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from illada.errors import needs
from illada.toy_tasks import Choice, Example

CHOICES = "library-choices"


def write_tasks(
    folder: Path,
    problems: Mapping[str, Sequence[Example]],
    choices: Sequence[Choice],
    generation: dict[str, int],
) -> list[str]:
    """Write an exact-match task for each kind of problem and a multiple-choice task; return their names."""
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
            # The cache lies here too, so that the demo writes nothing outside its folder.
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


def evaluate_in_harness(
    output: Path,
    problems: Mapping[str, Sequence[Example]],
    choices: Sequence[Choice],
    generation: dict[str, int],
    seed: int,
) -> list[dict[str, Any]] | None:
    """Evaluate output/model into output/evaluation, choices by confidence; return None where lm-eval is missing.

    Args:
        output: folder of the demo; an interrupted evaluation in it is continued.
        problems: problems to answer, by task.
        choices: multiple-choice questions.
        generation: max_new_tokens and block_length.
        seed: seed of the evaluation.

    Returns:
        for each task its name, metric, value, standard_error, documents, forwards and seconds.
    """
    if find_spec("lm_eval") is None:
        return None
    with needs("eval", "evaluation"):
        import datasets

        from illada.evaluation.options import EvalOptions
        from illada.evaluation.rows import Row, Variant
        from illada.evaluation.run import Evaluation
        from illada.evaluation.task_files import task_manager

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    folder, model = str(output / "tasks"), str(output / "model")
    names = write_tasks(Path(folder), problems, choices, generation)
    options = EvalOptions(str(output / "evaluation"), model, task_files=folder, shots=0, chat=True, seed=seed)
    rows = [Row(name, name, shots=0, chat=True) for name in names]
    evaluation = Evaluation(options, task_manager(folder), rows)
    evaluation.run({"": model}, [Variant()])
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
