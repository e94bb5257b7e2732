"""Bidirectional attention over packed segments: every token sees its whole segment and nothing else.

Shape letters: T tokens of all segments, one after another · S segments · N segments of one run · L length ·
H query heads · G key/value heads · D head width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(eq=False)
class Past:
    """Keys and values of one sequence, kept from earlier forward passes; every layer has its own.

    A pass over the positions from `start` on writes theirs and attends to those before it as they were last computed:
    not what a fresh pass would give, as every position of a bidirectional model depends on all others.
    """

    capacity: int
    """The most positions it will hold."""
    start: int = 0
    """Where the positions of the next pass begin."""
    layers: list[Tensor] = field(default_factory=list)
    """[2, capacity, G, D] for each layer, made when first written."""

    def extend(self, layer: int, key_LGD: Tensor, value_LGD: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values of positions start…, and return those of all positions up to them."""
        if layer == len(self.layers):
            self.layers.append(key_LGD.new_empty(2, self.capacity, *key_LGD.shape[1:]))
        end = self.start + len(key_LGD)
        store = self.layers[layer]
        store[0, self.start : end] = key_LGD
        store[1, self.start : end] = value_LGD
        return store[0, :end], store[1, :end]


@dataclass(frozen=True)
class Packing:
    """How T tokens divide into segments. Lengths live on the host: no device synchronisation is needed to use them."""

    lengths: tuple[int, ...]
    pasts: tuple[Past | None, ...] = ()
    """What each segment continues; empty when none of them continues anything."""

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor | Sequence[int]) -> "Packing":
        """Read cumulative lengths [S + 1], beginning with 0 (the convention of variable-length attention kernels)."""
        ends = [int(end) for end in cu_seqlens]
        if not ends or ends[0] != 0 or any(b < a for a, b in pairwise(ends)):
            raise ValueError(f"cu_seqlens must begin with 0 and never fall, got {ends[:8]}")
        return cls(tuple(b - a for a, b in pairwise(ends)))

    @property
    def tokens(self) -> int:
        """The number T of tokens in all segments."""
        return sum(self.lengths)

    @cached_property
    def runs(self) -> tuple[tuple[int, int, Past | None], ...]:
        """Neighbouring segments of equal length as (segments, length, past): one batched kernel call each.

        A segment with a past is a run of its own.
        """
        runs: list[tuple[int, int, Past | None]] = []
        for length, past in zip(self.lengths, self.pasts or (None,) * len(self.lengths), strict=True):
            if length == 0:
                continue
            if past is None and runs and runs[-1][1:] == (length, None):
                runs[-1] = (runs[-1][0] + 1, length, None)
            else:
                runs.append((1, length, past))
        return tuple(runs)

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """Positions that restart at 0 in every segment, or go on where its past ends, int64 [T]."""
        if not self.lengths:
            return torch.zeros(0, dtype=torch.int64, device=device)
        starts = [0 if past is None else past.start for past in self.pasts] or [0] * len(self.lengths)
        pairs = zip(starts, self.lengths, strict=True)
        return torch.cat([torch.arange(start, start + length, device=device) for start, length in pairs])


def eager_attention(query_NHLD: Tensor, key_NGLD: Tensor, value_NGLD: Tensor, enable_gqa: bool = False) -> Tensor:
    """Attend as written in textbooks, softmax in fp32: every score is held at once. Returns [N, H, L, D]."""
    if enable_gqa:
        shared = query_NHLD.shape[1] // key_NGLD.shape[1]
        key_NGLD, value_NGLD = (x.repeat_interleave(shared, dim=1) for x in (key_NGLD, value_NGLD))
    scores_NHLL = query_NHLD @ key_NGLD.transpose(-1, -2) * query_NHLD.shape[-1] ** -0.5
    return scores_NHLL.softmax(-1, dtype=torch.float32).to(query_NHLD.dtype) @ value_NGLD


KERNELS: dict[str, Callable[..., Tensor]] = {"sdpa": F.scaled_dot_product_attention, "eager": eager_attention}
"""Kernels by transformers' names for them (`attn_implementation`)."""


def packed_attention(
    query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, packing: Packing, kernel: str = "sdpa", layer: int = 0
) -> Tensor:
    """Attend within each segment and its past, fully bidirectionally; returns [T, H, D]. `layer` is that of the past.

    Segments of equal length that lie side by side go through one call of a kernel (see `KERNELS`) on a view,
    so a batch whose segments are sorted by length needs few calls and no copy (`bench/attention.py` compares this with
    nested tensors). Heads of one group share their key and value.
    """
    heads, groups = query_THD.shape[1], key_TGD.shape[1]
    # split, not slices: the backward pass of a slice would fill a tensor of all T tokens for every run.
    sizes = [count * length for count, length, _ in packing.runs]
    outputs = []
    for (count, _, past), query, key, value in zip(
        packing.runs, query_THD.split(sizes), key_TGD.split(sizes), value_TGD.split(sizes), strict=True
    ):
        seen = (key, value) if past is None else past.extend(layer, key, value)
        query_NHLD, key_NGLD, value_NGLD = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (query, *seen))
        out_NHLD = KERNELS[kernel](query_NHLD, key_NGLD, value_NGLD, enable_gqa=heads != groups)
        outputs.append(out_NHLD.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs) if len(outputs) != 1 else outputs[0]
