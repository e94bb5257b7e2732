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
        anchor: weight of the chosen answer's own bound, a token, in the loss, which keeps it probable: pairs alone may
            take probability from both answers (1 in arXiv 2404.19733); 0 for none, as in VRPO.
        reference: "kept": the start's bounds are computed once, under masks that stay the same in every epoch; "live":
            a copy of the start computes them in every step, under new masks in every epoch (beside an adapter the
            frozen weights do so, without a copy).
    """

    beta: float = 0.1
    samples: int = 8
    complementary: bool = False
    normalise: bool = False
    anchor: float = 0.0
    reference: Literal["kept", "live"] = "kept"

    def check(self) -> None:
        """Check the section; raises IlladaError as `Recipe.check` does."""
        if not 0 < self.beta < float("inf"):
            raise IlladaError(f"dpo.beta is {self.beta:g}: it must be above 0")
        if not 1 <= self.samples <= 1024:
            raise IlladaError(f"dpo.samples is {self.samples}: it must be between 1 and 1024")
        if not 0 <= self.anchor < float("inf"):
            raise IlladaError(f"dpo.anchor is {self.anchor:g}: it must be at least 0")


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
        check_own_noise(self, "dpo")
        super().check()
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
class ProblemFiles(DataRecipe):
    """Where problems come from, if not from tasks that draw them.

    Args:
        train: jsonl file of problems, {"prompt" or "messages", ...} a line; none with tasks.
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
        if self.window < 2:
            raise IlladaError(f"data.window is {self.window}: it must be at least 2")


@dataclass
class ProblemsSection:
    """What runs on problems share.

    Args:
        tasks: problems that are drawn; none with data.train.
        reward: how answers are judged.
        exclude: jsonl files of problems that must never be trained on.
        settings: decoding of the answers.
        reward_seconds: most seconds of one reward of one answer.
    """

    tasks: list[str] | None = None
    reward: dict[str, float] | str | None = None  # in this order, or the command line takes a dictionary for a name
    exclude: list[str] | None = None
    settings: dict[str, Any] | None = None
    reward_seconds: float = 10.0

    def check_ranges(self, command: str, ranges: dict[str, tuple[float, float]]) -> None:
        """Check that numbers lie between bounds, both included; raises IlladaError as `Recipe.check` does."""
        for name, (least, most) in {**ranges, "reward_seconds": (0.001, 1e6)}.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise IlladaError(f"{command}.{name} is {value:g}: it must be between {least:g} and {most:g}")


def check_problems(recipe: Recipe, section: ProblemsSection, command: str) -> None:
    """Check that a run on problems has one source of them.

    Raises:
        IlladaError: when it has none or two, or is to go back to other data.
    """
    if bool(recipe.data.train) == bool(section.tasks):
        raise IlladaError(
            f"give exactly one of {command}.tasks (problems that are drawn) and data.train (a file of them)"
        )
    training = recipe.training
    if training.on_spike == "rollback":
        raise IlladaError("training.on_spike rollback needs other data to go on with: take none or skip")
    if training.average or training.decay_when == "plateau":
        name = "average" if training.average else "decay_when plateau"
        raise IlladaError(f"training.{name} needs a validation loss, {command} measures answers: leave it out")


@dataclass
class RlSection(ProblemsSection):
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
    answers: int = 6
    inner_steps: int = 8
    samples: int = 2
    complementary: bool = True
    epsilon: float = 0.2
    beta: float = 0.001
    psi: float = 10.0
    hide_prompt: float = 0.15
    keep_every: int = 20

    def check(self) -> None:
        """Check the section; raises IlladaError as `Recipe.check` does."""
        self.check_ranges(
            "rl",
            {
                "answers": (2, 1024),
                "inner_steps": (1, 1024),
                "samples": (1, 1024),
                "epsilon": (1e-9, 100),
                "beta": (0, 1e6),
                "psi": (1e-9, 1e6),
                "hide_prompt": (0, 0.999),
                "keep_every": (1, 10**9),
            },
        )


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

    data: ProblemFiles = field(default_factory=ProblemFiles)
    rl: RlSection = field(default_factory=RlSection)

    def check(self) -> None:
        """Check what can be checked without opening anything; raises IlladaError as `Recipe.check` does."""
        check_own_noise(self, "rl")
        super().check()
        check_problems(self, self.rl, "rl")
        self.rl.check()
        training, section = self.training, self.rl
        if self.data.train and section.reward is None:
            raise IlladaError("rl.reward is missing: say how answers to the problems of data.train are judged")
        if training.samples_per_step % section.answers:
            raise IlladaError(
                f"training.samples_per_step is {training.samples_per_step}: it must be a multiple of rl.answers "
                f"{section.answers}"
            )
        if training.steps is None:
            raise IlladaError("training.steps is missing: problems have no epochs")


DISTILL_DEFAULTS: dict[str, Any] = {
    "epochs": 6.0,
    "samples_per_step": 64,
    "samples_per_batch": 16,
    "learning_rate": 2e-5,
    "final_learning_rate": 2e-6,
    "warmup_steps": 20,
    "decay": "linear",
    "validate_every": 200,
    "validation_samples": 200,
}
"""What `illada distill` changes in TrainingRecipe (epochs and rate are dParallel's for adapters; the rest is ours)."""


@dataclass
class DistillSection(ProblemsSection):
    """Certainty training on the start's own careful answers, so that it needs fewer passes (dParallel, 2509.26488).

    Args:
        tasks: problems that are drawn: sudoku, countdown, or tasks of the demo (addition, sorting, ...); none with
            data.train.
        problems: how many problems the start answers; none for all of data.train.
        reward: how answers are judged, as in rl: only those with the full reward of 1 are learnt from, and held-out
            ones are counted by it; none for the tasks' own, and with data.train to learn from all answers that ended
            by themselves, and to count held-out ones that are the same as the start's.
        exclude: jsonl files of problems that must never be trained on.
        settings: how the start answers; one token a pass where nothing else is said.
        reward_seconds: most seconds of one reward of one answer.
        masks: what is hidden of a block: "random" tokens (dParallel), or those that the start wrote last ("order", so
            that the model sees what it will see in decoding; d3LLM, 2601.07568).
        mask_ratio: share of a block that is hidden, in the first and in the last step (dParallel: 0.5 and 0.5; d3LLM:
            0 and 0.8).
        complementary: also learn from the rest of the block, behind the other mask (both papers).
        block_length: tokens of a block; none for that of the settings (dParallel: 32).
        entropy_weight: of the entropy of what is predicted right, beside the cross-entropy (dParallel: 2; 0 leaves
            plain tuning on the answers).
        entropy_temperature: at which that entropy is taken (dParallel: 0.5).
        thresholds: at validations held-out problems are answered with these, for accuracy against passes.
    """

    problems: int | None = None
    masks: Literal["random", "order"] = "random"
    mask_ratio: list[float] = field(default_factory=lambda: [0.5, 0.5])
    complementary: bool = True
    block_length: int | None = None
    entropy_weight: float = 2.0
    entropy_temperature: float = 0.5
    thresholds: list[float] = field(default_factory=lambda: [0.6, 0.8, 0.9, 0.95])

    def check(self) -> None:
        """Check the section; raises IlladaError as `Recipe.check` does."""
        self.check_ranges(
            "distill",
            {
                "problems": (1, 10**9),
                "block_length": (1, 10**6),
                "entropy_weight": (0, 1e6),
                "entropy_temperature": (0.01, 100),
            },
        )
        if len(self.mask_ratio) != 2 or not all(0 <= ratio <= 1 for ratio in self.mask_ratio):
            raise IlladaError(f"distill.mask_ratio is {self.mask_ratio}: it must be two shares between 0 and 1")
        if not self.thresholds or not all(0 < threshold <= 1 for threshold in self.thresholds):
            raise IlladaError(f"distill.thresholds is {self.thresholds}: it must be probabilities above 0, at most 1")


@dataclass
class DistillRecipe(Recipe):
    """One run of certainty training.

    Args:
        output: run folder; the same command continues an interrupted run in it.
        model: the network; start is the tuned model, whose answers are learnt.
        lora: adapters instead of all weights.
        data: files of problems.
        training: how to train; samples are answers, an epoch is all of them.
        parallel: processes, memory, compiler.
        log: TensorBoard, Weights & Biases, evaluation of checkpoints.
        distill: problems, answers, masks and the loss.
    """

    data: ProblemFiles = field(default_factory=ProblemFiles)
    distill: DistillSection = field(default_factory=DistillSection)

    def check(self) -> None:
        """Check what can be checked without opening anything; raises IlladaError as `Recipe.check` does."""
        check_own_noise(self, "distill")
        super().check()
        check_problems(self, self.distill, "distill")
        self.distill.check()
        if self.distill.tasks and self.distill.problems is None:
            raise IlladaError("distill.problems is missing: tasks draw without end, say how many the start answers")
