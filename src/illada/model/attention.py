"""Attention over packed segments: every token sees its whole segment and nothing else; if causal, what is not after it.

Shape letters: T tokens of all segments, one after another · M of them ask (all, or those of the last layer that are
wanted) · S segments · N segments of one run · L length · H query heads · G key/value heads · D head width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from illada.errors import IlladaError
from illada.model.kv_cache import CacheView, KVCache


class SegmentGroup(NamedTuple):
    """Neighbouring segments that one batched kernel call serves."""

    segments: int
    queries: int
    """Of each segment, how many positions ask."""
    length: int
    pasts: tuple[KVCache, ...] = ()
    """One for each segment, or none."""

    @property
    def seen(self) -> list[int]:
        """How many positions each segment sees."""
        return [past.start + self.length for past in self.pasts] or [self.length] * self.segments

    def takes(self, queries: int, length: int, past: KVCache | None) -> bool:
        """Return whether a segment may join: alike, and at most half of what the run then sees is padding."""
        if (queries, length, past is None) != (self.queries, self.length, not self.pasts):
            return False
        seen = [*self.seen, length + (past.start if past else 0)]
        return len(seen) * max(seen) <= 2 * sum(seen)

    def joined(self, past: KVCache | None) -> "SegmentGroup":
        """Return the run with one more segment."""
        return self._replace(segments=self.segments + 1, pasts=self.pasts if past is None else (*self.pasts, past))


@dataclass(frozen=True)
class Packing:
    """How T tokens divide into segments. Lengths live on the host: no device synchronisation is needed to use them."""

    lengths: tuple[int, ...]
    pasts: tuple[KVCache | None, ...] = ()
    """What each segment continues; empty when none of them continues anything."""
    queries: tuple[int, ...] = ()
    """How many positions of each segment ask; empty when all do."""
    _on_device: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

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
    def runs(self) -> tuple[SegmentGroup, ...]:
        """Neighbouring segments that are alike: one batched kernel call each."""
        runs: list[SegmentGroup] = []
        pasts = self.pasts or (None,) * len(self.lengths)
        for queries, length, past in zip(self.queries or self.lengths, self.lengths, pasts, strict=True):
            if length == 0:
                continue
            if runs and runs[-1].takes(queries, length, past):
                runs[-1] = runs[-1].joined(past)
            else:
                runs.append(SegmentGroup(1, queries, length, () if past is None else (past,)))
        return tuple(runs)

    def places(self, device: torch.device, causal: bool) -> list[CacheView | None]:
        """Return for each run where in the pool it writes and reads; None for one without pasts."""
        if ("places", device) not in self._on_device:
            places = [CacheView.of(run.pasts, run.length, device, causal) if run.pasts else None for run in self.runs]
            self._on_device["places", device] = places
        return self._on_device["places", device]

    def ends(self, device: torch.device) -> tuple[tuple[Tensor, int], tuple[Tensor, int]]:
        """Return cumulative lengths, int32 from 0 on, and the greatest length: of what asks, and of what it sees."""
        if ("ends", device) not in self._on_device:
            asking = [run.queries for run in self.runs for _ in range(run.segments)]
            seen = [length for run in self.runs for length in run.seen]
            self._on_device["ends", device] = tuple(
                (torch.tensor([0, *accumulate(each)], dtype=torch.int32, device=device), max(each))
                for each in (asking, seen)
            )
        return self._on_device["ends", device]

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """Positions that restart at 0 in every segment, or go on where its past ends, int64 [T]."""
        if not self.lengths:
            return torch.zeros(0, dtype=torch.int64, device=device)
        starts = [0 if past is None else past.start for past in self.pasts] or [0] * len(self.lengths)
        pairs = zip(starts, self.lengths, strict=True)
        # Counted on the host, so that one copy brings all of them.
        return torch.cat([torch.arange(start, start + length) for start, length in pairs]).to(device)


def eager_attention(
    query_NHMD: Tensor,
    key_NGLD: Tensor,
    value_NGLD: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend as written in textbooks, softmax in fp32: every score is held at once. Returns [N, H, M, D]."""
    if enable_gqa:
        shared = query_NHMD.shape[1] // key_NGLD.shape[1]
        key_NGLD, value_NGLD = (x.repeat_interleave(shared, dim=1) for x in (key_NGLD, value_NGLD))
    scores_NHML = query_NHMD @ key_NGLD.transpose(-1, -2) * query_NHMD.shape[-1] ** -0.5
    if is_causal:
        attn_mask = torch.ones_like(scores_NHML, dtype=torch.bool).tril()
    if attn_mask is not None:
        scores_NHML = scores_NHML.masked_fill(~attn_mask, -torch.inf)
    return scores_NHML.softmax(-1, dtype=torch.float32).to(query_NHMD.dtype) @ value_NGLD


KERNELS: dict[str, Callable[..., Tensor]] = {"sdpa": F.scaled_dot_product_attention, "eager": eager_attention}
"""Kernels by transformers' names for them (`attn_implementation`)."""

AttentionInterface.register("varlen", varlen_attn)  # else transformers would refuse the name


def packed_attention(
    query_MHD: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    packing: Packing,
    kernel: str = "sdpa",
    layer: int = 0,
    causal: bool = False,
) -> Tensor:
    """Attend within each segment and its past, to all of it or, if causal, to what is not after the position that asks.

    Returns [M, H, D]. `layer` is that of the past. In causal attention all positions ask.

    Segments of equal length that lie side by side go through one call of a kernel (see `KERNELS`) on a view,
    so a batch whose segments are sorted by length needs few calls and no copy (`benchmarks/attention.py` compares this with
    nested tensors). Kernel "varlen" takes all segments at once, of any lengths: torch's flash attention for packed
    sequences, on CUDA in half precision. Heads of one group share their key and value.

    Raises:
        IlladaError: when "varlen" is asked for elsewhere.
    """
    gqa = query_MHD.shape[1] != key_TGD.shape[1]
    runs = packing.runs
    # split, not slices: the backward pass of a slice would fill a tensor of all T tokens for every run.
    sizes = [run.segments * run.length for run in runs]
    pairs = list(zip(key_TGD.split(sizes), value_TGD.split(sizes), strict=True))
    places: list[CacheView | None] = [None] * len(runs)
    if packing.pasts:
        places = packing.places(query_MHD.device, causal)
        pairs = [
            pair if place is None else place.extend(layer, *pair, padded=kernel != "varlen")
            for place, pair in zip(places, pairs, strict=True)
        ]
    if kernel == "varlen":
        if packing.pasts:
            key_TGD, value_TGD = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        (ends_q, most_q), (ends_k, most_k) = packing.ends(query_MHD.device)
        window = (-1, 0 if causal else -1)  # counted from the ends, so behind a past too
        try:
            attended = varlen_attn(
                query_MHD, key_TGD, value_TGD, ends_q, ends_k, most_q, most_k, window_size=window, enable_gqa=gqa
            )
        except RuntimeError as error:
            where, dtype = query_MHD.device.type, query_MHD.dtype
            if where == "cuda" and dtype in (torch.bfloat16, torch.float16):
                raise
            what = (
                f"attn_implementation varlen needs CUDA and bf16 or fp16, not {where} and {str(dtype)[6:]}: take sdpa"
            )
            raise IlladaError(what) from error
        return cast(Tensor, attended)  # a pair only when asked for
    outputs = []
    queries = query_MHD.split([run.segments * run.queries for run in runs])
    for run, place, query, pair in zip(runs, places, queries, pairs, strict=True):
        query_NMHD = query.unflatten(0, (run.segments, run.queries))
        key_NLGD, value_NLGD = (x.unflatten(0, (run.segments, -1)) for x in pair)
        query_NHMD, key_NGLD, value_NGLD = (x.transpose(1, 2) for x in (query_NMHD, key_NLGD, value_NLGD))
        mask = None if place is None else place.mask
        begins = causal and max(run.seen) == run.length  # behind a past the mask says what is not after a position
        out_NHMD = KERNELS[kernel](query_NHMD, key_NGLD, value_NGLD, attn_mask=mask, is_causal=begins, enable_gqa=gqa)
        outputs.append(out_NHMD.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs) if len(outputs) != 1 else outputs[0]
