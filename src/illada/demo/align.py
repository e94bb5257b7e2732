"""`illada demo --align`: the demo's model goes on, from rewards of its own answers to answers in fewer passes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from illada.files import write_text
from illada.post_training.distillation import DistillTrainer, read_frontier
from illada.post_training.options import DistillRecipe, DistillSection, ProblemFiles, RlRecipe, RlSection
from illada.post_training.reinforcement import RlTrainer
from illada.toy_tasks import Example
from illada.training.optional.plots import frontier_of
from illada.training.recipe import ModelRecipe, Recipe, TrainingRecipe
from illada.training.trainer import Trainer
from illada.weights.runs import read_metrics

REWARDS, FEWER_PASSES = "rewards", "fewer-passes"
"""The folders of both runs, and the names of their pictures."""


@dataclass(frozen=True)
class Alignment:
    """The size of both runs."""

    rl_steps: int
    answered: int
    """Problems whose answers are learnt again."""


FULL = Alignment(120, 2000)
QUICK = Alignment(24, 400)
SHARED: dict[str, Any] = {
    "decay": "linear",
    "beta2": 0.98,
    "dtype": "fp32",
    "keep_checkpoints": 1,
    "validation_samples": None,
}
"""What both say of their training."""


def rewarded(accuracies: Mapping[str, float]) -> list[str]:
    """Return the tasks from whose answers something can be learnt, as some are right and some wrong."""
    found = [task for task, share in accuracies.items() if 0.2 <= share <= 0.98]
    return found or [max(accuracies, key=lambda task: accuracies[task])]


def recipes(
    output: Path,
    scale: Alignment,
    seed: int,
    tasks: tuple[Sequence[str], Sequence[str]],
    problems: Mapping[str, Sequence[Example]],
    decoding: dict[str, Any],
) -> list[tuple[Recipe, str, type[Trainer]]]:
    """Return both runs with their titles and trainers, and write the held-out problems that they are measured by.

    Args:
        output: folder of the demo.
        scale: how much.
        seed: of the demo.
        tasks: to reward, and to answer in fewer passes.
        problems: held-out ones of each task.
        decoding: settings of the answers.
    """
    files = []
    for name, some in zip((REWARDS, FEWER_PASSES), tasks, strict=True):
        file = output / "data" / f"{name}.jsonl"
        lines = [{"prompt": one.prompt, "answer": one.answer} for task in some for one in problems[task]]
        write_text(file, "".join(json.dumps(line) + "\n" for line in lines))
        files.append(ProblemFiles(validation=str(file), window=128))
    rl, distill = _rewards(output, scale, seed, files[0]), _fewer_passes(output, scale, seed, files[1])
    for section, some in ((rl.rl, tasks[0]), (distill.distill, tasks[1])):
        section.tasks, section.settings = list(some), decoding
    return [(rl, "rewards", RlTrainer), (distill, "fewer passes", DistillTrainer)]


def _rewards(output: Path, scale: Alignment, seed: int, data: ProblemFiles) -> RlRecipe:
    training = TrainingRecipe(
        steps=scale.rl_steps,
        samples_per_step=96,
        samples_per_batch=48,
        learning_rate=2e-5,  # a higher one ruins the model (docs/log.md)
        final_learning_rate=1e-5,
        decay_steps=scale.rl_steps // 4,
        validate_every=max(8, scale.rl_steps // 4),
        checkpoint_every=max(8, scale.rl_steps // 4),
        warmup_steps=scale.rl_steps // 12,
        seed=seed,
        **SHARED,
    )
    start = ModelRecipe(start=str(output / "model"))
    return RlRecipe(
        output=str(output / REWARDS),
        model=start,
        data=data,
        training=training,
        rl=RlSection(reward="exact", inner_steps=4),
    )


def _fewer_passes(output: Path, scale: Alignment, seed: int, data: ProblemFiles) -> DistillRecipe:
    training = TrainingRecipe(
        epochs=6.0,
        samples_per_step=64,
        samples_per_batch=64,
        learning_rate=1e-4,
        final_learning_rate=1e-5,
        validate_every=10**9,  # in the end
        checkpoint_every=100,
        warmup_steps=scale.rl_steps // 12,
        seed=seed,
        **SHARED,
    )
    return DistillRecipe(
        output=str(output / FEWER_PASSES),
        model=ModelRecipe(start=str(output / REWARDS / "model")),
        data=data,
        training=training,
        distill=DistillSection(reward="exact", problems=scale.answered, masks="order"),
    )


def figures(output: Path, tasks: tuple[Sequence[str], Sequence[str]], before: float) -> dict[str, Any]:
    """Return what both runs have reached, for the report.

    Args:
        output: folder of the demo.
        tasks: as in `recipes`.
        before: share of the rewarded tasks' problems that the demo's model solves.
    """
    rewards = read_metrics(output / REWARDS / "metrics.jsonl")
    return {
        "rewarded": list(tasks[0]),
        "distilled": list(tasks[1]),
        "before": before,
        "after": rewards[-1]["validation_reward"],
        "start": read_frontier(output / FEWER_PASSES),
        "end": frontier_of(read_metrics(output / FEWER_PASSES / "metrics.jsonl")[-1]),
    }
