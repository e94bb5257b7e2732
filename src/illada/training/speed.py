"""How fast and how large: model FLOPs utilisation and peak memory, for the log."""

import resource
import sys
from collections.abc import Sequence

import torch

from illada.model import IlladaForMaskedLM

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}
"""Dense bf16 FLOPs a second by a part of the device's name (vendor's data sheets)."""


def flops_per_token(model: IlladaForMaskedLM, lengths: Sequence[int]) -> float:
    """Return the FLOPs that a step needs for one token of segments of the given lengths; recomputation is not counted.

    Forward: 2 for each weight of a block's matrices; 4 L d for attention in each block, L the mean length of the
    segment a token is in and d the width of all heads; 2 V D for the head on masked tokens, which are half of all on
    average. The backward pass takes twice as much; once as much for frozen weights under an adapter, whose gradients
    nobody needs.
    """
    config = model.config
    matrices = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    trained = sum(2 * p.numel() for p in matrices if p.requires_grad)
    frozen = sum(2 * p.numel() for p in matrices if not p.requires_grad)
    seen = sum(length**2 for length in lengths) / max(1, sum(lengths))
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seen
    head = 2 * config.vocab_size * config.hidden_size / 2
    return 3 * (trained + attention) + 2 * frozen + (2 if frozen else 3) * head


def peak_flops(device: torch.device) -> float | None:
    """Return the bf16 FLOPs a second of a GPU that is in `PEAKS`, else None."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes in use so far: allocated on a GPU, resident in this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
