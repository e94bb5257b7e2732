"""Attention over packed segments: each token sees its own segment and nothing else; if causal, nothing after itself.

Shape letters: T tokens of all segments, one after another · M asking positions (all, or the wanted ones in the last
layer) · S segments · N segments of one group · L length · H query heads · G key/value heads · D head width.
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

from illada.errors import IlladaError
from illada.hub import importing_quietly
from illada.model.kv_cache import CacheView, KVCache

with importing_quietly():
    from transformers import AttentionInterface


class SegmentGroup(NamedTuple):
    """Neighbouring segments that one batched kernel call serves."""

    segments: int
    queries: int
    """How many positions of each segment ask."""
    length: int
    caches: tuple[KVCache, ...] = ()
    """One for each segment, or none."""

    @property
    def seen(self) -> list[int]:
        """How many positions each segment sees."""
        return [cache.seen for cache in self.caches] or [self.length] * self.segments

    def takes(self, queries: int, length: int, cache: KVCache | None) -> bool:
        """Return whether a segment may join: it is alike, and at most half of what the group then sees is padding."""
        if (queries, length, cache is None) != (self.queries, self.length, not self.caches):
            return False
        seen = [*self.seen, cache.seen if cache else length]
        return len(seen) * max(seen) <= 2 * sum(seen)

    def plus(self, cache: KVCache | None) -> "SegmentGroup":
        """Return the group with one more segment."""
        caches = self.caches if cache is None else (*self.caches, cache)
        return self._replace(segments=self.segments + 1, caches=caches)


@dataclass(frozen=True)
class Packing:
    """How T tokens divide into segments. Lengths live on the host, so using them needs no device synchronisation."""

    lengths: tuple[int, ...]
    caches: tuple[KVCache | None, ...] = ()
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
    def groups(self) -> tuple[SegmentGroup, ...]:
        """Neighbouring segments that are alike, empty ones left out: one batched kernel call for each group."""
        groups: list[SegmentGroup] = []
        caches = self.caches or (None,) * len(self.lengths)
        for queries, length, cache in zip(self.queries or self.lengths, self.lengths, caches, strict=True):
            if length == 0:
                continue
            if groups and groups[-1].takes(queries, length, cache):
                groups[-1] = groups[-1].plus(cache)
            else:
                groups.append(SegmentGroup(1, queries, length, () if cache is None else (cache,)))
        return tuple(groups)

    def views(self, device: torch.device, causal: bool) -> list[CacheView | None]:
        """Return for each group where in the pool it writes and reads; None for a group without caches."""
        if ("views", device) not in self._on_device:
            self._on_device["views", device] = [
                CacheView.of(group.caches, group.length, device, causal) if group.caches else None
                for group in self.groups
            ]
        return self._on_device["views", device]

    def ends(self, device: torch.device) -> tuple[tuple[Tensor, int], tuple[Tensor, int]]:
        """Return cumulative lengths, int32 from 0 on, and the greatest length: of what asks, and of what it sees."""
        if ("ends", device) not in self._on_device:
            queries = [group.queries for group in self.groups for _ in range(group.segments)]
            seen = [length for group in self.groups for length in group.seen]
            self._on_device["ends", device] = tuple(
                (torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device), max(lengths))
                for lengths in (queries, seen)
            )
        return self._on_device["ends", device]

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """Positions that restart at 0 in every segment, or continue where its cache ends, int64 [T]."""
        if not self.lengths:
            return torch.zeros(0, dtype=torch.int64, device=device)
        starts = [0 if cache is None else cache.start for cache in self.caches] or [0] * len(self.lengths)
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
    """Attend within each segment and its cache: to all of it or, if causal, to nothing after the asking position.

    Returns [M, H, D]. `layer` is the layer's place in the cache. In causal attention all positions ask.

    Neighbouring segments of equal length go through one call of a kernel (see `KERNELS`) on a view, so a batch whose
    segments are sorted by length needs few calls and no copy (`benchmarks/attention.py` compares this with nested
    tensors). Kernel "varlen" takes all segments at once, of any lengths: torch's flash attention for packed sequences,
    on CUDA in half precision. Heads of one group share their key and value.

    Raises:
        IlladaError: when "varlen" is asked for elsewhere.
    """
    groups, views = packing.groups, packing.views(query_MHD.device, causal)
    # split, not slices: the backward pass of a slice would fill a tensor of all T tokens for every group.
    sizes = [group.segments * group.length for group in groups]
    pairs = [
        pair if view is None else view.extend(layer, *pair, padded=kernel != "varlen")
        for view, pair in zip(views, zip(key_TGD.split(sizes), value_TGD.split(sizes), strict=True), strict=True)
    ]
    if kernel == "varlen":
        if packing.caches:
            key_TGD, value_TGD = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        return _varlen_attention(query_MHD, key_TGD, value_TGD, packing, causal)
    gqa = query_MHD.shape[1] != key_TGD.shape[1]
    outputs = []
    queries = query_MHD.split([group.segments * group.queries for group in groups])
    for group, view, query, pair in zip(groups, views, queries, pairs, strict=True):
        query_NMHD = query.unflatten(0, (group.segments, group.queries))
        key_NLGD, value_NLGD = (x.unflatten(0, (group.segments, -1)) for x in pair)
        query_NHMD, key_NGLD, value_NGLD = (x.transpose(1, 2) for x in (query_NMHD, key_NLGD, value_NLGD))
        mask = None if view is None else view.mask
        is_causal = causal and max(group.seen) == group.length  # with cached positions the view's mask is causal
        out_NHMD = KERNELS[kernel](
            query_NHMD, key_NGLD, value_NGLD, attn_mask=mask, is_causal=is_causal, enable_gqa=gqa
        )
        outputs.append(out_NHMD.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs) if len(outputs) != 1 else outputs[0]


def _varlen_attention(query_MHD: Tensor, key_TGD: Tensor, value_TGD: Tensor, packing: Packing, causal: bool) -> Tensor:
    """Attend with torch's flash attention for packed sequences; keys and values are all that the segments see."""
    (ends_q, most_q), (ends_k, most_k) = packing.ends(query_MHD.device)
    window = (-1, 0 if causal else -1)  # counted from the ends, so it holds for cached positions too
    gqa = query_MHD.shape[1] != key_TGD.shape[1]
    try:
        attended = varlen_attn(
            query_MHD, key_TGD, value_TGD, ends_q, ends_k, most_q, most_k, window_size=window, enable_gqa=gqa
        )
    except RuntimeError as error:
        where, dtype = query_MHD.device.type, query_MHD.dtype
        if where == "cuda" and dtype in (torch.bfloat16, torch.float16):
            raise
        raise IlladaError(
            f"attn_implementation varlen needs CUDA and bf16 or fp16, not {where} and {str(dtype)[6:]}: take sdpa"
        ) from error
    return cast(Tensor, attended)  # a pair only when asked for
