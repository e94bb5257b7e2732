"""`illada pretrain`, `sft`, `estimate` and `report`."""

import dataclasses
import json as json_format
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from illada.commands import heavy
from illada.commands.next import next_commands
from illada.errors import IlladaError
from illada.post_training.options import DistillRecipe, DpoRecipe, RlRecipe
from illada.training.optional.options import EstimateOptions
from illada.training.recipe import Recipe

if TYPE_CHECKING:
    from illada.training.trainer import Trainer


def pretrain(recipe: Recipe) -> None:
    """Pre-train a model from a recipe."""
    _train(recipe, "pretrain")


def sft(recipe: Recipe) -> None:
    """Fine-tune a model from a recipe."""
    _train(recipe, "sft")


def dpo(recipe: DpoRecipe) -> None:
    """Tune a model on pairs of answers, one preferred to the other, from a recipe."""
    _train(recipe, "dpo")


def rl(recipe: RlRecipe) -> None:
    """Tune a model on rewards of its own answers, from a recipe."""
    _train(recipe, "rl")


def distill(recipe: DistillRecipe) -> None:
    """Tune a model to give its own answers in fewer passes, from a recipe."""
    _train(recipe, "distill")


def _train(recipe: Recipe, title: str) -> None:
    """Train, and name the commands that go on from there."""
    recipe.check()  # at once, before torch is loaded
    trainer: type[Trainer] | None = None
    if isinstance(recipe, DpoRecipe):
        trainer = heavy.preferences.PreferenceTrainer
    if isinstance(recipe, RlRecipe):
        trainer = heavy.reinforcement.RlTrainer
    if isinstance(recipe, DistillRecipe):
        trainer = heavy.distillation.DistillTrainer
    result = heavy.training.train(recipe, title, trainer)
    if result.interrupted:
        sys.exit(128 + signal.Signals(result.interrupted))
    if os.environ.get("RANK", "0") == "0":  # one of the processes that torchrun started speaks
        print(f"{'adapter' if recipe.lora.rank else 'model'} written to {result.model}")
        use = f"illada chat --model {result.model}"
        if title == "pretrain":
            use = f"illada generate --model {result.model} --prompt 'Once upon a time'"
            use += f"\nillada sft tiny-cpu-sft --model.start {result.model} --data.train CHATS --output RUN"
        next_commands(use, f"illada report {recipe.output}")


def estimate(
    recipe: Recipe,
    options: EstimateOptions,
    json: bool = False,
    command: Literal["pretrain", "sft", "dpo", "rl", "distill"] = "pretrain",  # noqa: ARG001 (the parser reads it)
) -> None:
    """Say what a recipe will need: memory by kind, speed, days and cost.

    Args:
        recipe: the run; its data need not exist yet.
        options: the machine and what the recipe does not say.
        json: print a JSON object instead.
        command: what the recipe is for, as keys and defaults differ.
    """
    result = heavy.estimation.estimate(recipe, options, heavy.work.work_of(recipe))
    print(json_format.dumps(dataclasses.asdict(result), indent=1) if json else heavy.estimation.table(result))


def report(runs: list[str], output: str | None = None, windows: int = 0, beside: str | None = None) -> None:
    """Draw the curves of one training run or several: loss, speed and more; on request, an exact likelihood.

    Of a run on rewards it also prints the best and the worst of the latest answers, as what is rewarded is learnt.

    Args:
        runs: folders of runs, finished or not; several in one picture.
        output: picture to write (.png, .svg, .pdf); null for report.png in the first folder.
        windows: measure so many windows of held-out text by path likelihood, beside the bound (and write
            RUN/likelihood.json); as many passes as a window has tokens. 0 for none.
        beside: another model or run to measure on the same windows, such as a causal one.
    """
    if windows < 0:
        raise IlladaError(f"windows must be at least 0, got {windows}")
    if beside is not None and not windows:
        raise IlladaError("beside is measured on windows of held-out text: give --windows, e.g. 16")
    if windows and len(runs) > 1:
        raise IlladaError("--windows measures one run: give one, and another with --beside")
    if windows:
        print(heavy.likelihood.likelihood_table(heavy.likelihood.run_likelihood(runs[0], windows, beside)))
    picture = heavy.plots.draw_runs(runs, output)
    for line in [line for run in runs for line in heavy.rollouts.samples(Path(run))]:
        print(line)
    print(f"written to {picture}")
