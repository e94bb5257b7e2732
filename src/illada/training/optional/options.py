"""The options of an estimate, for Python and the command line. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Literal

GpuName = Literal["a100", "h100", "h200", "b200", "l40s", "rtx4090", "cpu"]


@dataclass(frozen=True)
class Work:
    """What one sample of a training costs, in windows of its recipe."""

    windows: float = 1
    """Windows that are learnt from: passes forwards and backwards."""
    forward: float = 0
    """Windows that only pass forwards, in the step or once for all steps that use them."""
    copy: bool = False
    """Whether a copy of the start lies beside the model."""
    samples: int | None = None
    """Samples of the data; None to count windows."""
    whole: bool = False
    """Whether no window is split, and any share of it may be predicted."""
    problems: bool = False
    """Whether data.train is a file of problems, and no prepared tokens. Answers are then written by a whole copy of the
    network in each process, where the trained one is divided or compiled."""


@dataclass(frozen=True)
class EstimateOptions:
    """The machine, and what the recipe does not say.

    Args:
        gpus: processes, one GPU each; weights and optimiser are sharded over all of them, or over those of one of
            parallel.replicate copies; parallel.tensor of them compute the same windows.
        gpu: kind of GPU; "cpu" for one process on this machine, memory only.
        mfu: model FLOPs utilisation: FLOPs the model needs, without recomputation, over the peak (performance of
            others at 8B: 0.33 to 0.4 on H100).
        price: price of one GPU for one hour.
        vocab_size: size of the tokenizer's vocabulary; without it the prepared data's, else the preset's.
        data_tokens: tokens of the training data, for recipes that count epochs; without it the prepared data's.
    """

    gpus: int = 1
    gpu: GpuName = "h100"
    mfu: float = 0.4
    price: float | None = None
    vocab_size: int | None = None
    data_tokens: int | None = None
