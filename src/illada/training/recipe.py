"""A training run, written down: the one schema of recipe files and of the command line.

Values the paper does not state are marked "ours"; those of LLaDA's report "LLaDA".
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from illada.errors import IlladaError


@dataclass
class ModelRecipe:
    """The network to train: a preset with changes, or a checkpoint to go on from.

    Args:
        preset: name of a shape (1m, 5m, 15m, 50m, illada-8b, llada-8b); the vocabulary is the tokenizer's.
        start: model or run folder whose weights (and shape) to begin with; excludes preset and all below.
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
        """Return what was given instead of the preset's."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in given.items() if name not in ("preset", "start") and value is not None}


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a block, which an adapter may lie beside."""


@dataclass
class LoraRecipe:
    """Train low-rank adapters beside frozen weights (LoRA, arXiv 2106.09685) instead of the weights; needs model.start.

    The paper trains all weights; everything here is ours. Adapters want a higher training.learning_rate than weights:
    begin with ten times as much. Under training.dtype bf16 the frozen weights keep the checkpoint's own type.

    Args:
        rank: inner width of an adapter, e.g. 16; none or 0 trains all weights.
        alpha: an adapter's product is scaled by alpha / rank; none for twice the rank.
        dropout: chance that an input of an adapter is zeroed; a function of seed, step and micro-batch.
        targets: which linear layers of each block get one; none for all (q_proj, k_proj, v_proj, o_proj, gate_proj,
            up_proj, down_proj).
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    targets: list[str] | None = None

    def check(self, start: str | None) -> None:
        """Check the section, given model.start.

        Raises:
            IlladaError: naming the key and the remedy.
        """
        if self.rank is None:
            if self != LoraRecipe():
                raise IlladaError("lora.rank is missing: give it, e.g. --lora.rank 16, or leave lora out")
            return
        if self.rank < 0:
            raise IlladaError(f"lora.rank is {self.rank}: it must be at least 1, or 0 to train all weights")
        if self.rank and start is None:
            raise IlladaError("lora.rank needs model.start: an adapter is trained beside the weights of a checkpoint")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise IlladaError(f"lora.alpha is {self.alpha:g}: it must be above 0")
        if not 0 <= self.dropout < 1:
            raise IlladaError(f"lora.dropout is {self.dropout:g}: it must be at least 0 and below 1")
        unknown = [name for name in self.targets or () if name not in LORA_TARGETS]
        if unknown or self.targets == []:
            what = f"has no {unknown[0]!r}" if unknown else "is empty"
            raise IlladaError(f"lora.targets {what}: choose from {', '.join(LORA_TARGETS)}")


@dataclass
class ParallelRecipe:
    """How processes, memory and compiler are used. It changes only the order of floating-point sums, so a run may be
    continued with other values, as on another number of processes.

    Args:
        replicate: copies of the weights, each in shards over an equal part of the processes (HSDP); best one copy per
            node where nodes are connected more slowly than the GPUs inside them.
        tensor: neighbouring processes that share the heads and SwiGLU of every block and compute the same windows; for
            blocks too wide for one GPU, within one node only.
        gather: when weights are brought together and gradients added up: "block": a block at a time in every pass;
            "step": once in a step, which keeps all weights and the sums of all gradients in every process meanwhile,
            and wins where passes are many or connections slow; "auto": step on CPUs, block on GPUs.
        recompute: what is computed again in the backward pass instead of kept: "full": each block, a third more time;
            "selective": all but matrix products and attention.
        compile: fuse what lies around attention in every block (torch.compile); the first step takes a minute.
        attention: "varlen": torch's flash attention for packed segments (CUDA, bf16); "sdpa": one call for every run of
            equal segments; "auto": varlen where it works.
        kernels: "liger": norms, rotations and SwiGLU by Liger's kernels, excludes compile, which fuses the same;
            "plain": ours; "auto": liger on CUDA where it is installed. Needs `pip install 'illada[fused]'`.
    """

    replicate: int = 1
    tensor: int = 1
    gather: Literal["auto", "block", "step"] = "auto"
    recompute: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    attention: Literal["auto", "sdpa", "varlen"] = "auto"
    kernels: Literal["auto", "plain", "liger"] = "auto"


@dataclass
class DataRecipe:
    """The prepared tokens to train on.

    Args:
        train: folder written by `illada prepare`, or its URL (s3://, gs://, hf://, ...); several are mixed if given as
            {folder: weight}, where the weights are their shares of the windows in any unit.
        validation: folder of held-out tokens, prepared with the same tokenizer; none for no validation.
        window: tokens of one training window (paper: 8192).
        split_probability: chance that a window is split into two segments without attention between them (paper: 0.3).
        boundaries: "window": documents in one segment see each other (as inherited); "document": they do not. For SFT
            keep "window": a segment that ends with its answer gives the answer's length away.
    """

    train: str | dict[str, float] = ""
    validation: str | None = None
    window: int = 8192
    split_probability: float = 0.3
    boundaries: Literal["window", "document"] = "window"


@dataclass
class TrainingRecipe:
    """How to train. Defaults are the paper's for pre-training where it states them; `illada sft` has its own.

    Args:
        steps: optimiser steps; none to use epochs.
        epochs: passes over the data, when steps is none (paper, SFT: 12).
        samples_per_step: windows in a global batch (LLaDA: 1280).
        samples_per_batch: windows in one forward pass of a process; the rest of its share of the step follows, the
            gradients adding up. It changes only the order of floating-point sums.
        learning_rate: peak (paper: 2e-4 pre-training, 5e-6 SFT).
        final_learning_rate: after the decay (paper: 5e-6 pre-training, 5e-7 SFT).
        warmup_steps: linear warm-up (LLaDA: 2000).
        decay: shape of the decay (paper: cosine for pre-training, linear for SFT).
        decay_steps: its length; none for the last tenth of the run (paper, SFT; ours for pre-training).
        decay_when: "end": the decay ends the run; "plateau": it also begins once the validation loss has stopped
            falling. In both cases a file named DECAY put into the run folder begins it at the next step. The run ends
            when the decay does.
        plateau_patience: validations without improvement that count as a plateau.
        plateau_delta: relative fall of the validation loss that counts as an improvement.
        optimizer: adamw (paper), or muon for the matrices of the blocks with adamw for the rest (ours).
        weight_decay: on matrices (paper: 0.1).
        beta1: of AdamW (ours).
        beta2: of AdamW (ours).
        gradient_clip: largest gradient norm (ours); 0 for no clipping.
        on_spike: what to do with a step whose loss or gradient is not finite, or whose loss lies far above the mean:
            "none": end the run when it is not finite; "skip": leave the step out; "rollback": go back to the newest
            checkpoint and take the following data in another order (all ours).
        spike_deviations: how many standard deviations above the mean of the last hundred steps are a spike (ours).
        rule: "illada": everything may be masked (paper); "llada": prompt visible, EOS-padded, response-normalised.
        dtype: of the computation; the weights that are trained and the optimiser stay fp32. "fp8": bf16 but for the
            products of the blocks' linear layers; wants parallel.compile (ours; needs `pip install 'illada[fused]'`).
        cross_entropy: "chunked": ours; "cut": head and cross-entropy without logits (cut cross-entropy, CUDA), coarser
            as it adds up gradients in bf16: see docs/training.md (needs `pip install 'illada[fused]'`).
        device: cpu, cuda, ...; auto takes the fastest there is.
        seed: of weights, order and noise.
        validate_every: steps between validations.
        validation_samples: windows of validation data to use, spread evenly; none for all.
        checkpoint_every: steps between checkpoints, which are written while the training goes on.
        keep_checkpoints: newest checkpoints to keep.
        keep_every: keep those of every so many steps as well; none for no others.
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
    beta1: float = 0.9
    beta2: float = 0.95
    gradient_clip: float = 1.0
    on_spike: Literal["none", "skip", "rollback"] = "none"
    spike_deviations: float = 6.0
    rule: Literal["illada", "llada"] = "illada"
    dtype: Literal["bf16", "fp32", "fp8"] = "bf16"
    cross_entropy: Literal["chunked", "cut"] = "chunked"
    device: str = "auto"
    seed: int = 0
    validate_every: int = 500
    validation_samples: int | None = 256
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    keep_every: int | None = None

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
"""What `illada sft` changes in TrainingRecipe (paper §2.3; batch and warm-up are ours)."""


@dataclass
class LogRecipe:
    """Where the numbers of a run go besides the terminal and metrics.jsonl, and what looks at its checkpoints.

    Args:
        tensorboard: write them into the folder tensorboard of the run; needs `pip install 'illada[track]'`, like wandb.
        wandb: send them to this project of Weights & Biases, over the network.
        evaluate: a command to run on every checkpoint, in a process of its own that the training never waits for, with
            {run}, {checkpoint} and {step} filled in; a checkpoint that comes while it still runs is passed over.
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
        lora: adapters instead of new weights.
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
        model, data, training = self.model, self.data, self.training
        if not self.output:
            raise IlladaError("output is missing: name the run folder, e.g. --output runs/first")
        if not data.train:
            raise IlladaError("data.train is missing: name a folder written by `illada prepare`")
        if (model.preset is None) == (model.start is None):
            raise IlladaError("give exactly one of model.preset (a new network) and model.start (a checkpoint)")
        if model.start is not None and model.changes():
            raise IlladaError(f"model.{next(iter(model.changes()))} cannot be changed when model.start is given")
        self.lora.check(model.start)
        if training.steps is None and training.epochs is None:
            raise IlladaError("how long to train is missing: set training.steps or training.epochs")
        bounds: list[tuple[str, float, float, float]] = [
            ("data.window", data.window, 2, float("inf")),
            ("data.split_probability", data.split_probability, 0, 1),
            ("training.samples_per_step", training.samples_per_step, 1, float("inf")),
            ("training.samples_per_batch", training.samples_per_batch, 1, float("inf")),
            ("training.warmup_steps", training.warmup_steps, 0, float("inf")),
            ("training.learning_rate", training.learning_rate, 0, float("inf")),
            ("training.final_learning_rate", training.final_learning_rate, 0, float("inf")),
            ("training.weight_decay", training.weight_decay, 0, float("inf")),
            ("training.beta1", training.beta1, 0, 0.99999),
            ("training.beta2", training.beta2, 0, 0.99999),
            ("training.gradient_clip", training.gradient_clip, 0, float("inf")),
            ("training.spike_deviations", training.spike_deviations, 1, float("inf")),
            ("training.validate_every", training.validate_every, 1, float("inf")),
            ("training.checkpoint_every", training.checkpoint_every, 1, float("inf")),
            ("training.keep_checkpoints", training.keep_checkpoints, 1, float("inf")),
            ("training.plateau_patience", training.plateau_patience, 1, float("inf")),
            ("training.plateau_delta", training.plateau_delta, 0, 1),
            ("parallel.replicate", self.parallel.replicate, 1, float("inf")),
            ("parallel.tensor", self.parallel.tensor, 1, float("inf")),
            ("training.seed", training.seed, 0, 2**63 - 1),
        ]
        if training.steps is not None:
            bounds.append(("training.steps", training.steps, 1, float("inf")))
        elif training.epochs is not None and not 0 < training.epochs < float("inf"):
            raise IlladaError(f"training.epochs is {training.epochs:g}: it must be above 0")
        if training.decay_steps is not None:
            bounds.append(("training.decay_steps", training.decay_steps, 0, float("inf")))
        if training.keep_every is not None:
            bounds.append(("training.keep_every", training.keep_every, 1, float("inf")))
        if training.validation_samples is not None:
            bounds.append(("training.validation_samples", training.validation_samples, 1, float("inf")))
        for name, value, low, high in bounds:
            if not low <= value <= high:
                limit = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
                raise IlladaError(f"{name} is {value:g}: it must be {limit}")
        if training.optimizer == "muon" and self.lora.rank:
            raise IlladaError("training.optimizer muon wants whole matrices: take adamw to train an adapter")
        if training.dtype == "fp8" and self.lora.rank:
            raise IlladaError("training.dtype fp8 trains whole matrices: take bf16 to train an adapter")
        if self.parallel.kernels == "liger" and self.parallel.compile:
            raise IlladaError("parallel.kernels liger and parallel.compile fuse the same operations: choose one")
        halves = {
            "parallel.attention varlen": self.parallel.attention == "varlen",
            "training.cross_entropy cut": training.cross_entropy == "cut",
        }
        if training.dtype == "fp32" and (wrong := [name for name, chosen in halves.items() if chosen]):
            raise IlladaError(f"{wrong[0]} computes in half precision: set training.dtype bf16")
        whole = {
            "training.optimizer muon": training.optimizer == "muon",
            "training.dtype fp8": training.dtype == "fp8",
            "lora": bool(self.lora.rank),
        }
        for what, wanted in whole.items():
            if wanted and self.parallel.tensor > 1:
                raise IlladaError(f"{what} wants whole matrices: take parallel.tensor 1")
        if self.parallel.compile and self.parallel.tensor > 1:
            raise IlladaError("parallel.compile and parallel.tensor do not go together: take one of them")
        if training.decay_when == "plateau" and data.validation is None:
            raise IlladaError("training.decay_when plateau needs data.validation")
