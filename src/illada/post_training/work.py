"""What the samples of dpo, rl and distill cost, for `illada estimate`: at most, if every answer fills its window."""

from pathlib import Path

from illada.data.shards import Shards
from illada.generation.settings import GenerationSettings
from illada.post_training.answering import decoding_of
from illada.post_training.options import DistillRecipe, DpoRecipe, RlRecipe
from illada.post_training.problems import read_problems
from illada.training.optional.options import Work
from illada.training.recipe import Recipe


def work_of(recipe: Recipe) -> Work:
    """Return what a sample of a recipe costs: a pair of dpo, an answer of rl or distill, a window of the others.

    Raises:
        IlladaError: when data that is there, or a setting, cannot be used.
    """
    copy = not recipe.lora.rank
    times = recipe.training.epochs or 1
    if isinstance(recipe, DpoRecipe):
        windows = 2 * recipe.dpo.samples * (1 + recipe.dpo.complementary)
        live = recipe.dpo.reference == "live"
        return Work(windows, windows if live else windows / times, live and copy, _pairs(recipe), whole=True)
    window = recipe.data.window
    if isinstance(recipe, RlRecipe):
        rl = recipe.rl
        recipe.data.check()
        rl.check()
        windows = rl.samples * (1 + (rl.complementary and rl.method != "diffu-grpo"))
        beside = bool(rl.beta) and rl.method != "gdsd"
        answering = _answering(decoding_of(rl, "rl", 1.0), window) / rl.inner_steps
        forward = windows * (1 + beside) + answering
        return Work(windows, forward, beside and copy, whole=True, problems=True)
    if isinstance(recipe, DistillRecipe):
        recipe.data.check()
        recipe.distill.check()
        samples = _answers(recipe)
        if recipe.training.steps is not None and samples:
            times = recipe.training.steps * recipe.training.samples_per_step / samples
        answering = _answering(decoding_of(recipe.distill, "distill", 0.0), window) / times
        return Work(1 + recipe.distill.complementary, answering, samples=samples, whole=True, problems=True)
    return Work()


def _answering(settings: GenerationSettings, window: int) -> float:
    """Return the windows of an answer of most tokens, one token a pass if nothing else is sure."""
    tokens = min(settings.max_new_tokens, window)
    passes = tokens / settings.block_length * min(settings.steps_per_block or window, settings.block_length)
    return passes * (1 - tokens / window / 2)


def _pairs(recipe: DpoRecipe) -> int | None:
    places = recipe.data.train
    if isinstance(places, str) and places and ("://" in places or Path(places).is_dir()):
        return Shards.open(places).documents // 2
    return None


def _answers(recipe: DistillRecipe) -> int | None:
    file, most = str(recipe.data.train), recipe.distill.problems
    if not Path(file).is_file():
        return most
    return min(len(read_problems(file)), most or 10**9)
