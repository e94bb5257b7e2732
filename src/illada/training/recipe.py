"""The recipe of a training run: one schema for recipe files, command line and help.

Values that the paper does not state are marked "ours", values of LLaDA's report "LLaDA".
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from illada.errors import IlladaError

INFINITY = float("inf")


def _check_range(section: object, prefix: str, names: str, low: float, high: float = INFINITY) -> None:
    """Check that fields of a section that are set lie between low and high, both included; `names` lists the fields.

    Raises:
        IlladaError: naming the key and its limits.
    """
    for name in names.split():
        value = getattr(section, name)
        if value is not None and not low <= value <= high:
            limit = f"at least {low:g}" if high == INFINITY else f"between {low:g} and {high:g}"
            raise IlladaError(f"{prefix}.{name} is {value:g}: it must be {limit}")


@dataclass
class ModelRecipe:
    """The network to train: a preset with changes, or a checkpoint to continue from.

    Args:
        preset: name of a shape (1m, 5m, 15m, 50m, illada-8b, llada-8b); the vocabulary is the tokenizer's.
        start: model or run folder whose weights (and shape) to begin with; excludes preset and all keys below.
        hidden_size: width, instead of the preset's.
        intermediate_size: SwiGLU width, instead of the preset's.
        num_hidden_layers: blocks, instead of the preset's.
        num_attention_heads: query heads, instead of the preset's.
        num_key_value_heads: key/value heads, instead of the preset's.
        max_position_embeddings: context length, instead of the preset's.
        causal: left to right, each token predicting the next: the autoregressive baseline, on the same data with the
            same settings (ours). Under training.rule "llada" it learns the answers alone.
    """

    preset: str | None = None
    start: str | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    max_position_embeddings: int | None = None
    causal: bool | None = None

    def changes(self) -> dict[str, int]:
        """Return the values that replace the preset's."""
        names = [field.name for field in fields(self) if field.name not in ("preset", "start")]
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def check(self) -> None:
        """Check the section; raises IlladaError as `Recipe.check` does."""
        if (self.preset is None) == (self.start is None):
            raise IlladaError("give exactly one of model.preset (a new network) and model.start (a checkpoint)")
        if self.start is not None and self.changes():
            raise IlladaError(f"model.{next(iter(self.changes()))} cannot be changed when model.start is given")


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a block, which can have an adapter."""


@dataclass
class LoraRecipe:
    """Train low-rank adapters beside frozen weights (LoRA, arXiv 2106.09685) instead of the weights; needs model.start.

    The paper trains all weights; everything here is ours. Adapters want a higher training.learning_rate than weights:
    begin with ten times as much. Under training.dtype bf16 the frozen weights keep the checkpoint's own type.

    Args:
        rank: inner width of an adapter, e.g. 16; none or 0 trains all weights.
        alpha: an adapter's product is scaled by alpha / rank; none for twice the rank.
        dropout: chance that an input of an adapter is zeroed; a function of seed, step and micro-batch.
        targets: linear layers of each block that get an adapter, such as q_proj and up_proj; none for all seven.
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    targets: list[str] | None = None

    def check(self, start: str | None) -> None:
        """Check the section, given model.start; raises IlladaError as `Recipe.check` does."""
        if self.rank is None:
            if self != LoraRecipe():
                raise IlladaError("lora.rank is missing: give it, e.g. --lora.rank 16, or leave lora out")
            return
        if self.rank < 0:
            raise IlladaError(f"lora.rank is {self.rank}: it must be at least 1, or 0 to train all weights")
        if self.rank and start is None:
            raise IlladaError("lora.rank needs model.start: an adapter is trained beside the weights of a checkpoint")
        if self.alpha is not None and not 0 < self.alpha < INFINITY:
            raise IlladaError(f"lora.alpha is {self.alpha:g}: it must be above 0")
        if not 0 <= self.dropout < 1:
            raise IlladaError(f"lora.dropout is {self.dropout:g}: it must be at least 0 and below 1")
        unknown = [name for name in self.targets or () if name not in LORA_TARGETS]
        if unknown or self.targets == []:
            problem = f"has no {unknown[0]!r}" if unknown else "is empty"
            raise IlladaError(f"lora.targets {problem}: choose from {', '.join(LORA_TARGETS)}")


@dataclass
class ParallelRecipe:
    """How processes, memory and compiler are used. It changes only the order of floating-point sums, so a run may be
    continued with other values, as on another number of processes.

    Args:
        replicate: copies of the weights, each in shards over an equal part of the processes (HSDP); best one copy per
            node where nodes are connected more slowly than the GPUs inside them.
        tensor: neighbouring processes that share the heads and SwiGLU of every block and compute the same windows; for
            blocks too wide for one GPU, within one node only.
        gather: when weights are gathered and gradients summed: "block": a block at a time in every pass; "step": once
            in a step, during which every process keeps all weights and the sums of all gradients; faster where passes
            are many or connections slow; "auto": step on CPUs, block on GPUs.
        recompute: what the backward pass computes again instead of keeping it: "full": each block, a third more time;
            "selective": all but matrix products and attention.
        compile: fuse the operations around attention in every block (torch.compile); the first step takes a minute.
        attention: "varlen": torch's flash attention for packed segments (CUDA, bf16); "sdpa": one call for every run of
            equal segments; "auto": varlen where it works.
        kernels: "liger": norms, rotations and SwiGLU by Liger's kernels; excludes compile, which fuses the same;
            "plain": ours; "auto": liger on CUDA where it is installed. Needs `pip install 'illada[fused]'`.
    """

    replicate: int = 1
    tensor: int = 1
    gather: Literal["auto", "block", "step"] = "auto"
    recompute: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    attention: Literal["auto", "sdpa", "varlen"] = "auto"
    kernels: Literal["auto", "plain", "liger"] = "auto"

    def check(self) -> None:
        """Check the section; raises IlladaError as `Recipe.check` does."""
        _check_range(self, "parallel", "replicate tensor", 1)
        if self.kernels == "liger" and self.compile:
            raise IlladaError("parallel.kernels liger and parallel.compile fuse the same operations: choose one")
        if self.compile and self.tensor > 1:
            raise IlladaError("parallel.compile and parallel.tensor do not go together: take one of them")


@dataclass
class DataRecipe:
    """The prepared tokens to train on.

    Args:
        train: folder written by `illada prepare`, or its URL (s3://, gs://, hf://, ...); {folder: weight} mixes several
            folders, where the weights are their shares of the windows in any unit.
        validation: folder of held-out tokens, prepared with the same tokenizer; none for no validation.
        window: tokens of one training window (paper: 8192).
        split_probability: chance that a window is split into two segments without attention between them (paper: 0.3).
        boundaries: "window": documents in one segment see each other (as inherited); "document": they do not. For SFT
            keep "window": a segment that ends with its answer gives the answer's length away.
        shift_windows: cut the windows of every epoch at other places, drawn from the seed, so that each token comes to
            stand at every position and no tail is left out for good; false: at the same places (both ours).
    """

    train: str | dict[str, float] = ""
    validation: str | None = None
    window: int = 8192
    split_probability: float = 0.3
    boundaries: Literal["window", "document"] = "window"
    shift_windows: bool = False

    def check(self) -> None:
        """Check the section; raises IlladaError as `Recipe.check` does."""
        if not self.train:
            raise IlladaError("data.train is missing: name a folder written by `illada prepare`")
        _check_range(self, "data", "window", 2)
        _check_range(self, "data", "split_probability", 0, 1)


@dataclass
class TrainingRecipe:
    """How to train. Defaults are the paper's for pre-training where it states them; `illada sft` has its own.

    Args:
        steps: optimiser steps; none to use epochs.
        epochs: passes over the data, when steps is none (paper, SFT: 12).
        samples_per_step: windows in a global batch (LLaDA: 1280).
        samples_per_batch: windows in one forward pass of a process; the rest of its share of the step follows, and the
            gradients add up. It changes only the order of floating-point sums.
        learning_rate: peak (paper: 2e-4 pre-training, 5e-6 SFT).
        final_learning_rate: after the decay (paper: 5e-6 pre-training, 5e-7 SFT).
        warmup_steps: linear warm-up (LLaDA: 2000); the run warns when it is more than a quarter of its steps.
        decay: shape of the decay (paper: cosine for pre-training, linear for SFT).
        decay_steps: length of the decay; none for the last tenth of the run (paper, SFT; ours for pre-training).
        decay_when: "end": the decay ends the run; "plateau": it also begins once the validation loss has stopped
            falling. In both cases a file named DECAY in the run folder begins the decay at the next step. The run ends
            when the decay does.
        plateau_patience: validations without improvement that count as a plateau.
        plateau_delta: relative fall of the validation loss that counts as an improvement.
        optimizer: adamw (paper), or muon for the matrices of the blocks with adamw for the rest (ours).
        weight_decay: on matrices (paper: 0.1).
        dropout: chance that a number is zeroed where attention and SwiGLU join the residual stream, e.g. 0.1 (Vaswani
            et al., arXiv 1706.03762), against overfitting on data seen many times (arXiv 2510.04071); 0 for none.
        beta1: of AdamW (ours).
        beta2: of AdamW (ours).
        gradient_clip: largest gradient norm (ours); 0 for no clipping.
        average: decay of an exponential average of the weights, e.g. 0.9999 (MDLM, arXiv 2406.07524), which evens out
            the noise of the last steps; it is validated and becomes the model; 0 for none.
        on_spike: what to do with a step whose loss or gradient is not finite, or whose loss lies far above the mean:
            "none": end the run when it is not finite; "skip": leave the step out; "rollback": go back to the newest
            checkpoint and take the following data in another order (all ours).
        spike_deviations: how many standard deviations above the mean of the last hundred steps are a spike (ours).
        rule: "illada": everything may be masked (paper); "llada": prompt visible, EOS-padded, response-normalised.
        noise: distribution of t: "uniform" (paper); "bell": mostly near 1/2, to learn sooner (after arXiv 2605.13026).
        mask_range: least and greatest masking probability, e.g. [0.3, 0.8], to spare windows that are nearly all or
            nearly no mask (LLaDA2.0, post-training); none for all of 0.001 to 1 (paper).
        loss_weight: of a masked token: "1/p" (paper: a bound, if noise is uniform and mask_range none); "bound": that
            bound under any noise, 1/(p q) with q the density of t; "none": all alike, without rare large weights (as
            in arXiv 2602.15014). Validation measures the paper's bound in any case.
        complementary: a step holds half as many windows, each under a mask and under its complement, so that every
            token is predicted once (LLaDA2.0). Each view counts in samples_per_step; two epochs are one pass.
        dtype: of the computation; trained weights and the optimiser stay fp32. "fp8": bf16 except for the products of
            the blocks' linear layers; wants parallel.compile (ours; needs `pip install 'illada[fused]'`).
        cross_entropy: "chunked": ours; "cut": head and cross-entropy without logits (cut cross-entropy, CUDA); coarser,
            because it adds up gradients in bf16: see docs/training.md (needs `pip install 'illada[fused]'`).
        device: cpu, cuda, ...; auto takes the fastest there is.
        seed: of weights, order and noise.
        validate_every: steps between validations.
        validation_samples: windows of validation data to use, spread evenly; none for all.
        checkpoint_every: steps between checkpoints, which are written while the training goes on.
        keep_checkpoints: newest checkpoints to keep.
        keep_every: also keep the checkpoints of every so many steps; none for no others.
    """

    steps: int | None = None
    epochs: float | None = None
    samples_per_step: int = 1280
    samples_per_batch: int = 8
    learning_rate: float = 2e-4
    final_learning_rate: float = 5e-6
    warmup_steps: int = 2000
    decay: Literal["cosine", "linear"] = "cosine"
    decay_steps: int | None = None
    decay_when: Literal["end", "plateau"] = "end"
    plateau_patience: int = 5
    plateau_delta: float = 0.002
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.1
    dropout: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    gradient_clip: float = 1.0
    average: float = 0.0
    on_spike: Literal["none", "skip", "rollback"] = "none"
    spike_deviations: float = 6.0
    rule: Literal["illada", "llada"] = "illada"
    noise: Literal["uniform", "bell"] = "uniform"
    mask_range: list[float] | None = None
    loss_weight: Literal["1/p", "bound", "none"] = "1/p"
    complementary: bool = False
    dtype: Literal["bf16", "fp32", "fp8"] = "bf16"
    cross_entropy: Literal["chunked", "cut"] = "chunked"
    device: str = "auto"
    seed: int = 0
    validate_every: int = 500
    validation_samples: int | None = 256
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    keep_every: int | None = None

    def check(self) -> None:
        """Check the section; raises IlladaError as `Recipe.check` does."""
        if self.steps is None and self.epochs is None:
            raise IlladaError("how long to train is missing: set training.steps or training.epochs")
        if self.steps is None and self.epochs is not None and not 0 < self.epochs < INFINITY:
            raise IlladaError(f"training.epochs is {self.epochs:g}: it must be above 0")
        counts = "steps samples_per_step samples_per_batch validate_every validation_samples checkpoint_every "
        _check_range(self, "training", counts + "keep_checkpoints keep_every plateau_patience spike_deviations", 1)
        rates = "learning_rate final_learning_rate weight_decay gradient_clip "
        _check_range(self, "training", rates + "warmup_steps decay_steps", 0)
        _check_range(self, "training", "beta1 beta2 average dropout", 0, 0.99999)
        _check_range(self, "training", "plateau_delta", 0, 1)
        _check_range(self, "training", "seed", 0, 2**63 - 1)

    def check_masks(self, causal: bool) -> None:
        """Check the options about masks, which a causal model has not; raises IlladaError as `Recipe.check` does."""
        for name in ("noise", "mask_range", "loss_weight", "complementary"):
            if causal and getattr(self, name) != (usual := getattr(TrainingRecipe, name)):
                usual = {None: "null", False: "false"}.get(usual, usual)
                raise IlladaError(f"training.{name} is about masks, a causal model has none: set it to {usual}")
        band, most = self.mask_range, 0.999 if self.complementary else 1  # a complement's p is 1 - p
        if band is not None and not (len(band) == 2 and 0.001 <= band[0] <= band[1] <= most):
            raise IlladaError(f"training.mask_range is {band}: it must be low and high, 0.001 <= low <= high <= {most}")
        if band is not None and self.loss_weight == "bound":
            raise IlladaError("training.loss_weight bound needs every masking probability: leave out mask_range")
        if self.complementary and self.samples_per_step % 2:
            raise IlladaError("training.complementary shows windows twice: take an even training.samples_per_step")

    def count_steps(self, samples: int) -> int:
        """Return the steps of a run on data of so many samples."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * samples / self.samples_per_step))


SFT_DEFAULTS: dict[str, Any] = {
    "epochs": 12.0,
    "samples_per_step": 256,
    "learning_rate": 5e-6,
    "final_learning_rate": 5e-7,
    "warmup_steps": 50,
    "decay": "linear",
}
"""What `illada sft` changes in TrainingRecipe (paper §2.2; batch and warm-up are ours)."""


@dataclass
class LogRecipe:
    """Where the numbers of a run go besides the terminal and metrics.jsonl, and what runs on its checkpoints.

    Args:
        tensorboard: write them into the folder tensorboard of the run; needs `pip install 'illada[track]'`, like wandb.
        wandb: send them to this project of Weights & Biases, over the network.
        evaluate: a command to run on each checkpoint in a separate process, with {run}, {checkpoint} and {step} filled
            in; training never waits for it, and a checkpoint that comes while it still runs is passed over.
    """

    tensorboard: bool = False
    wandb: str | None = None
    evaluate: str | None = None


@dataclass
class Recipe:
    """One training run.

    Args:
        output: run folder; the same command continues an interrupted run in it.
        model: the network.
        lora: adapters instead of all weights.
        data: the tokens.
        training: how to train.
        parallel: processes, memory, compiler.
        log: TensorBoard, Weights & Biases, evaluation of checkpoints.
    """

    output: str = ""
    model: ModelRecipe = field(default_factory=ModelRecipe)
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    parallel: ParallelRecipe = field(default_factory=ParallelRecipe)
    log: LogRecipe = field(default_factory=LogRecipe)

    def check(self) -> None:
        """Check what can be checked without opening anything.

        Raises:
            IlladaError: naming the key and the remedy.
        """
        if not self.output:
            raise IlladaError("output is missing: name the run folder, e.g. --output runs/first")
        self.data.check()
        self.model.check()
        self.lora.check(self.model.start)
        self.training.check()
        self.parallel.check()
        training, adapter = self.training, bool(self.lora.rank)
        training.check_masks(bool(self.model.causal))
        if self.data.shift_windows and training.rule == "llada":
            raise IlladaError("data.shift_windows moves windows, training.rule llada has none: leave one of them out")
        if training.dropout and self.parallel.compile:
            raise IlladaError("training.dropout and parallel.compile do not go together: take one of them")
        if training.optimizer == "muon" and adapter:
            raise IlladaError("training.optimizer muon wants whole matrices: for an adapter take adamw")
        if training.dtype == "fp8" and adapter:
            raise IlladaError("training.dtype fp8 trains whole matrices: take bf16 to train an adapter")
        in_half_precision = {
            "parallel.attention varlen": self.parallel.attention == "varlen",
            "training.cross_entropy cut": training.cross_entropy == "cut",
        }
        on_whole_matrices = {
            "training.optimizer muon": training.optimizer == "muon",
            "training.dtype fp8": training.dtype == "fp8",
            "lora": adapter,
        }
        for name, chosen in in_half_precision.items():
            if chosen and training.dtype == "fp32":
                raise IlladaError(f"{name} computes in half precision: set training.dtype bf16")
        for name, chosen in on_whole_matrices.items():
            if chosen and self.parallel.tensor > 1:
                raise IlladaError(f"{name} wants whole matrices: take parallel.tensor 1")
        if training.decay_when == "plateau" and self.data.validation is None:
            raise IlladaError("training.decay_when plateau needs data.validation")
