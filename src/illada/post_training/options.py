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


Method = Literal["espo", "gdsd", "diffu-grpo"]

RL_DEFAULTS: dict[str, Any] = {
    "steps": 1000,
    "samples_per_step": 64,
    "samples_per_batch": 16,
    "learning_rate": 3e-6,
    "final_learning_rate": 3e-6,
    "warmup_steps": 10,
    "decay": "linear",
    "decay_steps": 0,
    "validate_every": 100,
    "validation_samples": 200,
}
"""What `illada rl` changes in TrainingRecipe (the rate is ESPO's for adapters; the rest is ours)."""


@dataclass
class RlData(DataRecipe):
    """Where problems come from, if not from rl.tasks.

    Args:
        train: jsonl file of problems, {"prompt" or "messages", "answer", ...} a line; none with rl.tasks.
        validation: jsonl file of held-out problems, answered at validations without sampling; none for no validation.
        window: most tokens of a prompt with its answer.
        split_probability: of pretrain.
        boundaries: of pretrain.
        shift_windows: of pretrain.
    """

    window: int = 1024

    def check(self) -> None:
        """Check the section; raises IlladaError as `Recipe.check` does."""
        if not isinstance(self.train, str):
            raise IlladaError("data.train is one file of problems here, not a mixture")


@dataclass
class RlSection:
    """Reinforcement learning from rewards that can be computed.

    Args:
        method: "espo": sequence-level policy optimisation on bounds (arXiv 2512.03759); "gdsd": regression of the
            change of an answer's log-probability on its advantage (arXiv 2605.29398); "diffu-grpo": GRPO on the
            log-probabilities of one pass over a wholly masked answer (d1, arXiv 2504.12216).
        tasks: problems that are drawn without end: sudoku, countdown, or tasks of the demo (addition, sorting, ...);
            none with data.train.
        reward: name of a reward (exact, number, formula, program, sudoku, countdown), one's own function as
            my_module:my_function, or several with weights as {exact: 1, number: 0.5}; none for the tasks' own.
        exclude: jsonl files of problems that must never be trained on.
        answers: answers to one problem, which are compared with each other (ESPO: 6).
        inner_steps: optimiser steps on the same answers (ESPO: 8).
        samples: noise levels of each answer in a step (ESPO: 2).
        complementary: see each of them under the complement of its mask as well (ESPO); not with diffu-grpo.
        epsilon: clip of the change of an answer's probability, a token (ESPO: 0.2).
        beta: weight of the distance to the start (ESPO: 0.001); 0 keeps no copy of it; not with gdsd.
        psi: how much an advantage moves an answer under gdsd (theirs: 10).
        hide_prompt: chance that a token of the prompt is hidden under diffu-grpo (d1: 0.15).
        settings: decoding of the answers, as --rl.settings.block_length 16; temperature 1 where it is not said.
        reward_seconds: most seconds of one reward of one answer.
        keep_every: rollouts whose answers stay in the run folder: every so manyth.
    """

    method: Method = "espo"
    tasks: list[str] | None = None
    reward: dict[str, float] | str | None = None  # in this order, or the command line takes a dictionary for a name
    exclude: list[str] | None = None
    answers: int = 6
    inner_steps: int = 8
    samples: int = 2
    complementary: bool = True
    epsilon: float = 0.2
    beta: float = 0.001
    psi: float = 10.0
    hide_prompt: float = 0.15
    settings: dict[str, Any] | None = None
    reward_seconds: float = 10.0
    keep_every: int = 20

    def check(self) -> None:
        """Check the section; raises IlladaError as `Recipe.check` does."""
        for name, least, most in (
            ("answers", 2, 1024),
            ("inner_steps", 1, 1024),
            ("samples", 1, 1024),
            ("epsilon", 1e-9, 100),
            ("beta", 0, 1e6),
            ("psi", 1e-9, 1e6),
            ("hide_prompt", 0, 0.999),
            ("reward_seconds", 0.001, 1e6),
            ("keep_every", 1, 10**9),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise IlladaError(f"rl.{name} is {value:g}: it must be between {least:g} and {most:g}")


@dataclass
class RlRecipe(Recipe):
    """One run of reinforcement learning.

    Args:
        output: run folder; the same command continues an interrupted run in it.
        model: the network; start is the tuned model.
        lora: adapters instead of all weights.
        data: files of problems.
        training: how to train; samples are answers.
        parallel: processes, memory, compiler.
        log: TensorBoard, Weights & Biases, evaluation of checkpoints.
        rl: problems, rewards, answers and the loss.
    """

    data: RlData = field(default_factory=RlData)
    rl: RlSection = field(default_factory=RlSection)

    def check(self) -> None:
        """Check what can be checked without opening anything; raises IlladaError as `Recipe.check` does."""
        super().check()
        check_own_noise(self, "rl")
        self.rl.check()
        training, section = self.training, self.rl
        if bool(self.data.train) == bool(section.tasks):
            raise IlladaError("give exactly one of rl.tasks (problems that are drawn) and data.train (a file of them)")
        if self.data.train and section.reward is None:
            raise IlladaError("rl.reward is missing: say how answers to the problems of data.train are judged")
        if training.samples_per_step % section.answers:
            raise IlladaError(
                f"training.samples_per_step is {training.samples_per_step}: it must be a multiple of rl.answers "
                f"{section.answers}"
            )
        if training.on_spike == "rollback":
            raise IlladaError("training.on_spike rollback needs other data to go on with: take none or skip")
        if training.steps is None:
            raise IlladaError("training.steps is missing: problems have no epochs")
