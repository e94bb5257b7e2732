"""Bidirectional attention over packed segments: every token sees its whole segment and nothing else.

Shape letters: T tokens of all segments, one after another · S segments · N segments of one run · L length ·
H query heads · G key/value heads · D head width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """How T tokens divide into segments. Lengths live on the host: no device synchronisation is needed to use them."""

    lengths: tuple[int, ...]

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
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Neighbouring segments of equal length as (first token, segments, length): one batched kernel call each."""
        runs: list[tuple[int, int, int]] = []
        start = 0
        for length in self.lengths:
            if length == 0:
                continue
            if runs and runs[-1][2] == length:
                first, count, _ = runs[-1]
                runs[-1] = (first, count + 1, length)
            else:
                runs.append((start, 1, length))
            start += length
        return tuple(runs)

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """Positions that restart at 0 in every segment, int64 [T]."""
        if not self.lengths:
            return torch.zeros(0, dtype=torch.int64, device=device)
        return torch.cat([torch.arange(length, device=device) for length in self.lengths])


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
    query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, packing: Packing, kernel: str = "sdpa"
) -> Tensor:
    """Attend within each segment, fully bidirectionally; returns [T, H, D].

    Segments of equal length that lie side by side go through one call of a kernel (see `KERNELS`) on a view,
    so a batch whose segments are sorted by length needs few calls and no copy (`bench/attention.py` compares this with
    nested tensors). Heads of one group share their key and value.
    """
    heads, groups = query_THD.shape[1], key_TGD.shape[1]
    # split, not slices: the backward pass of a slice would fill a tensor of all T tokens for every run.
    sizes = [count * length for _, count, length in packing.runs]
    outputs = []
    for (_, count, length), *parts in zip(
        packing.runs, query_THD.split(sizes), key_TGD.split(sizes), value_TGD.split(sizes), strict=True
    ):
        query_NHLD, key_NGLD, value_NGLD = (x.unflatten(0, (count, length)).transpose(1, 2) for x in parts)
        out_NHLD = KERNELS[kernel](query_NHLD, key_NGLD, value_NGLD, enable_gqa=heads != groups)
        outputs.append(out_NHLD.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs) if len(outputs) != 1 else outputs[0]
