"""The sections that post-training adds to a recipe, and what its commands change in the others."""

from dataclasses import dataclass, field
from typing import Any, Literal

from illada.errors import IlladaError
from illada.training.recipe import DataRecipe, Recipe, TrainingRecipe

DPO_DEFAULTS: dict[str, Any] = {
    "epochs": 1.0,
    "samples_per_step": 64,
    "samples_per_batch": 4,
    "learning_rate": 5e-7,
    "final_learning_rate": 5e-8,
    "warmup_steps": 15,
    "decay": "linear",
}
"""What `illada dpo` changes in TrainingRecipe (rate, batch and warm-up after LLaDA 1.5; the rest is ours)."""

_OF_WINDOWS = {
    "training": (TrainingRecipe, "rule noise mask_range loss_weight complementary dropout"),
    "data": (DataRecipe, "split_probability boundaries shift_windows"),
}
"""Keys that say how windows are cut and noised, which post-training does in its own way."""


def check_own_noise(recipe: Recipe, command: str) -> None:
    """Check that a recipe has a start and says nothing about windows, which `illada COMMAND` has not.

    Raises:
        IlladaError: naming the key.
    """
    if recipe.model.start is None:
        raise IlladaError(f"model.start is missing: {command} goes on from a tuned model, name its folder")
    for section, (kind, names) in _OF_WINDOWS.items():
        default = kind()
        for name in names.split():
            if getattr(getattr(recipe, section), name) != getattr(default, name):
                raise IlladaError(
                    f"{section}.{name} is for pretrain and sft: {command} has no such choice, leave it out"
                )


@dataclass
class DpoSection:
    """Preference optimisation: VRPO (LLaDA 1.5, arXiv 2505.19223), DPO on bounds in place of likelihoods.

    Args:
        beta: how much a difference to the start counts: the higher, the closer the model stays to it (DPO: 0.1).
        samples: noise levels under which an answer is seen, with one mask each (LLaDA 1.5: 8).
        complementary: see each of them under the complement of its mask as well, at twice the passes (ESPO).
        normalise: divide each answer's bound by its tokens, so that long answers do not count for more (ours).
        reference: "kept": the start's bounds are computed once, under masks that stay the same in every epoch; "live":
            a copy of the start computes them in every step, under new masks in every epoch (beside an adapter the
            frozen weights do so, without a copy).
    """

    beta: float = 0.1
    samples: int = 8
    complementary: bool = False
    normalise: bool = False
    reference: Literal["kept", "live"] = "kept"

    def check(self) -> None:
        """Check the section; raises IlladaError as `Recipe.check` does."""
        if not 0 < self.beta < float("inf"):
            raise IlladaError(f"dpo.beta is {self.beta:g}: it must be above 0")
        if not 1 <= self.samples <= 1024:
            raise IlladaError(f"dpo.samples is {self.samples}: it must be between 1 and 1024")


@dataclass
class DpoRecipe(Recipe):
    """One run of preference optimisation.

    Args:
        output: run folder; the same command continues an interrupted run in it.
        model: the network; start is the tuned model.
        lora: adapters instead of all weights.
        data: the pairs, prepared with --kind preference; window is the longest conversation, in tokens.
        training: how to train; samples are pairs.
        parallel: processes, memory, compiler.
        log: TensorBoard, Weights & Biases, evaluation of checkpoints.
        dpo: the loss.
    """

    dpo: DpoSection = field(default_factory=DpoSection)

    def check(self) -> None:
        """Check what can be checked without opening anything; raises IlladaError as `Recipe.check` does."""
        super().check()
        check_own_noise(self, "dpo")
        self.dpo.check()
