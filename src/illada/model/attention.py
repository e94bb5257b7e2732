"""Bidirectional attention over packed segments: every token sees its whole segment and nothing else.

Shape letters: T tokens of all segments, one after another · M of them ask (all, or those of the last layer that are
wanted) · S segments · N segments of one run · L length · H query heads · G key/value heads · D head width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from illada.errors import IlladaError


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

    def extend(self, layer: int, key_NLGD: Tensor, value_NLGD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all positions before `start` and the given ones behind them.

        One segment (N = 1) writes its own and gets a view, good until the past is written to again. Several that share
        a past are different continuations: none is written.
        """
        if layer == len(self.layers):
            self.layers.append(key_NLGD.new_empty(2, self.capacity, *key_NLGD.shape[2:]))
        store, count, end = self.layers[layer], len(key_NLGD), self.start + key_NLGD.shape[1]
        if count == 1:
            store[0, self.start : end] = key_NLGD[0]
            store[1, self.start : end] = value_NLGD[0]
            return store[0, None, :end], store[1, None, :end]
        before = store[:, None, : self.start].expand(-1, count, -1, -1, -1)
        return torch.cat((before[0], key_NLGD), 1), torch.cat((before[1], value_NLGD), 1)


class Run(NamedTuple):
    """Neighbouring segments that one batched kernel call serves."""

    segments: int
    queries: int
    """Of each segment, how many positions ask."""
    length: int
    past: Past | None


@dataclass(frozen=True)
class Packing:
    """How T tokens divide into segments. Lengths live on the host: no device synchronisation is needed to use them."""

    lengths: tuple[int, ...]
    pasts: tuple[Past | None, ...] = ()
    """What each segment continues; empty when none of them continues anything."""
    queries: tuple[int, ...] = ()
    """How many positions of each segment ask; empty when all do."""
    _ends: dict[torch.device, tuple[tuple[Tensor, int], tuple[Tensor, int]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

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
    def runs(self) -> tuple[Run, ...]:
        """Neighbouring segments of equal lengths with the same past, or with none: one batched kernel call each."""
        runs: list[Run] = []
        pasts = self.pasts or (None,) * len(self.lengths)
        for segment in zip(self.queries or self.lengths, self.lengths, pasts, strict=True):
            if segment[1] == 0:
                continue
            if runs and runs[-1][1:] == segment:
                runs[-1] = runs[-1]._replace(segments=runs[-1].segments + 1)
            else:
                runs.append(Run(1, *segment))
        return tuple(runs)

    def ends(self, device: torch.device) -> tuple[tuple[Tensor, int], tuple[Tensor, int]]:
        """Return cumulative lengths, int32 from 0 on, and the greatest length: of what asks, and of what it sees."""
        if device not in self._ends:
            both = []
            for lengths in (
                [r.queries for r in self.runs],
                [r.length + (r.past.start if r.past else 0) for r in self.runs],
            ):
                each = [n for n, run in zip(lengths, self.runs, strict=True) for _ in range(run.segments)]
                both.append((torch.tensor([0, *accumulate(each)], dtype=torch.int32, device=device), max(each)))
            self._ends[device] = (both[0], both[1])
        return self._ends[device]

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """Positions that restart at 0 in every segment, or go on where its past ends, int64 [T]."""
        if not self.lengths:
            return torch.zeros(0, dtype=torch.int64, device=device)
        starts = [0 if past is None else past.start for past in self.pasts] or [0] * len(self.lengths)
        pairs = zip(starts, self.lengths, strict=True)
        # Counted on the host, so that one copy brings all of them.
        return torch.cat([torch.arange(start, start + length) for start, length in pairs]).to(device)


def eager_attention(query_NHMD: Tensor, key_NGLD: Tensor, value_NGLD: Tensor, enable_gqa: bool = False) -> Tensor:
    """Attend as written in textbooks, softmax in fp32: every score is held at once. Returns [N, H, M, D]."""
    if enable_gqa:
        shared = query_NHMD.shape[1] // key_NGLD.shape[1]
        key_NGLD, value_NGLD = (x.repeat_interleave(shared, dim=1) for x in (key_NGLD, value_NGLD))
    scores_NHML = query_NHMD @ key_NGLD.transpose(-1, -2) * query_NHMD.shape[-1] ** -0.5
    return scores_NHML.softmax(-1, dtype=torch.float32).to(query_NHMD.dtype) @ value_NGLD


KERNELS: dict[str, Callable[..., Tensor]] = {"sdpa": F.scaled_dot_product_attention, "eager": eager_attention}
"""Kernels by transformers' names for them (`attn_implementation`)."""

AttentionInterface.register("varlen", varlen_attn)  # else transformers would refuse the name


def packed_attention(
    query_MHD: Tensor, key_TGD: Tensor, value_TGD: Tensor, packing: Packing, kernel: str = "sdpa", layer: int = 0
) -> Tensor:
    """Attend within each segment and its past, fully bidirectionally; returns [M, H, D]. `layer` is that of the past.

    Segments of equal length that lie side by side go through one call of a kernel (see `KERNELS`) on a view,
    so a batch whose segments are sorted by length needs few calls and no copy (`bench/attention.py` compares this with
    nested tensors). Kernel "varlen" takes all segments at once, of any lengths: torch's flash attention for packed
    sequences, on CUDA in half precision. Heads of one group share their key and value.

    Raises:
        IlladaError: when "varlen" is asked for elsewhere.
    """
    heads, groups = query_MHD.shape[1], key_TGD.shape[1]
    if kernel == "varlen":
        return _varlen_attention(query_MHD, key_TGD, value_TGD, packing, layer)
    runs = packing.runs
    # split, not slices: the backward pass of a slice would fill a tensor of all T tokens for every run.
    sizes = [run.segments * run.length for run in runs]
    queries = query_MHD.split([run.segments * run.queries for run in runs])
    outputs = []
    for run, query, key, value in zip(runs, queries, key_TGD.split(sizes), value_TGD.split(sizes), strict=True):
        query_NMHD = query.unflatten(0, (run.segments, run.queries))
        seen = (x.unflatten(0, (run.segments, run.length)) for x in (key, value))
        key_NLGD, value_NLGD = seen if run.past is None else run.past.extend(layer, *seen)
        query_NHMD, key_NGLD, value_NGLD = (x.transpose(1, 2) for x in (query_NMHD, key_NLGD, value_NLGD))
        out_NHMD = KERNELS[kernel](query_NHMD, key_NGLD, value_NGLD, enable_gqa=heads != groups)
        outputs.append(out_NHMD.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs) if len(outputs) != 1 else outputs[0]


def _varlen_attention(query_MHD: Tensor, key_TGD: Tensor, value_TGD: Tensor, packing: Packing, layer: int) -> Tensor:
    if any(packing.pasts):
        sizes = [run.segments * run.length for run in packing.runs]
        seen = []
        for run, *both in zip(packing.runs, key_TGD.split(sizes), value_TGD.split(sizes), strict=True):
            key_NLGD, value_NLGD = (x.unflatten(0, (run.segments, run.length)) for x in both)
            if run.past is not None:
                # Copied, as all are joined last and a later run may write to the same past: under guidance a row's
                # second branch lies between its first and its draft's.
                key_NLGD, value_NLGD = (x.clone() for x in run.past.extend(layer, key_NLGD, value_NLGD))
            seen.append((key_NLGD.flatten(0, 1), value_NLGD.flatten(0, 1)))
        key_TGD, value_TGD = (torch.cat(parts) for parts in zip(*seen, strict=True))
    (ends_q, most_q), (ends_k, most_k) = packing.ends(query_MHD.device)
    heads, groups = query_MHD.shape[1], key_TGD.shape[1]
    gqa = heads != groups
    try:
        attended = varlen_attn(query_MHD, key_TGD, value_TGD, ends_q, ends_k, most_q, most_k, enable_gqa=gqa)
    except RuntimeError as error:
        where, dtype = query_MHD.device.type, query_MHD.dtype
        if where == "cuda" and dtype in (torch.bfloat16, torch.float16):
            raise
        what = f"attn_implementation varlen needs CUDA and bf16 or fp16, not {where} and {str(dtype)[6:]}: take sdpa"
        raise IlladaError(what) from error
    return cast(Tensor, attended)  # a pair only when asked for
