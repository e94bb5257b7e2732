"""Keys and values kept from earlier passes: pages of one pool, shared by all sequences of a model.

Shape letters: T tokens of one pass · N sequences · L length · G key/value heads · D head width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PAGE = 32
"""Positions in a page."""


class PagePool:
    """Memory for the keys and values of many sequences, in pages; it grows to what is in use at once."""

    def __init__(self) -> None:
        self.layers: list[Tensor] = []
        self.free: list[int] = []
        self.pages = 0

    def take(self, count: int) -> list[int]:
        """Return the numbers of `count` free pages; the pool grows where it has too few."""
        if (missing := count - len(self.free)) > 0:
            grown = self.pages + max(missing, self.pages)
            self.free += range(self.pages, grown)
            self.pages = grown
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def layer(self, number: int, like_TGD: Tensor) -> Tensor:
        """Return the keys and values of a layer, [2, pages x PAGE, G, D]."""
        slots = self.pages * PAGE
        if number == len(self.layers):
            # Zeros: attention masks the slots that nobody wrote, but a masked NaN would still spoil its sums.
            self.layers.append(like_TGD.new_zeros(2, slots, *like_TGD.shape[1:]))
        elif self.layers[number].shape[1] < slots:
            old = self.layers[number]
            self.layers[number] = old.new_zeros(2, slots, *old.shape[2:])
            self.layers[number][:, : old.shape[1]] = old
        return self.layers[number]


class KVCache:
    """Where one sequence has its keys and values.

    A pass over the positions from `start` on writes their keys and values, and attends to the earlier positions as they
    were last computed. In a causal model that equals a fresh pass; in a bidirectional one it does not, as every
    position depends on all others.
    """

    def __init__(self, pool: PagePool, slots: NDArray[np.int64] | None = None):
        self.pool = pool
        self.start = 0
        """Where the positions of the next pass begin."""
        self.slots = np.zeros(0, dtype=np.int64) if slots is None else slots
        """For each position, its slot in the pool."""
        self.pages: list[int] = []

    def begin(self, start: int, length: int) -> None:
        """Prepare for a pass over `length` positions from `start` on."""
        self.start = start
        if (missing := start + length - len(self.slots)) > 0:
            pages = self.pool.take(-(-missing // PAGE))
            self.pages += pages
            fresh = np.array(pages, dtype=np.int64)[:, None] * PAGE + np.arange(PAGE)
            self.slots = np.concatenate((self.slots, fresh.ravel()))

    def fork(self, start: int) -> "KVCache":
        """Return a cache that shares the positions before `start` and writes elsewhere."""
        return KVCache(self.pool, self.slots[:start])

    def release(self) -> None:
        """Give the pages back."""
        self.pool.free += self.pages
        self.pages, self.slots = [], self.slots[:0]


class CacheView(NamedTuple):
    """Where the sequences of a batch write and read in their pool."""

    pool: PagePool
    write: Tensor | slice
    """Slots of the positions of the pass, int64 [N x L]."""
    read: Tensor | slice
    """Slots of all that the sequences see, int64, one sequence after another."""
    padded: Tensor | slice
    """The same with every sequence filled up to the longest, [N x longest]."""
    mask: Tensor | None
    """What is seen, bool [N, 1, 1 or L, longest]: no padding and, if causal, nothing after a position; None for all."""

    @classmethod
    def of(cls, caches: Sequence[KVCache], length: int, device: torch.device, causal: bool = False) -> "CacheView":
        """Look up the slots for a pass over `length` positions of each sequence."""
        slots = [cache.slots[: cache.start + length] for cache in caches]
        flat, write = np.concatenate(slots), np.concatenate([row[-length:] for row in slots])
        seen = np.array([len(row) for row in slots])
        filled = np.arange(seen.max()) < seen[:, None]
        visible = filled[:, None]
        # Where nothing lies before the pass, the kernel's own causal mask serves.
        if causal and seen.max() > length:
            position = (seen - length)[:, None] + np.arange(length)
            visible = np.arange(seen.max()) <= position[:, :, None]
        mask = None if visible.all() else torch.from_numpy(visible[:, None]).to(device)
        read = padded = _indices(flat, device)
        if not filled.all():
            rectangle = np.zeros(filled.shape, dtype=np.int64)
            rectangle[filled] = flat
            padded = _indices(rectangle.ravel(), device)
        return cls(caches[0].pool, _indices(write, device), read, padded, mask)

    def extend(self, layer: int, key_TGD: Tensor, value_TGD: Tensor, padded: bool) -> tuple[Tensor, Tensor]:
        """Write the keys and values of a pass, and return all that its sequences see."""
        store = self.pool.layer(layer, key_TGD)
        store[0, self.write] = key_TGD
        store[1, self.write] = value_TGD
        key, value = store[:, self.padded if padded else self.read]
        return key, value


def _indices(slots: NDArray[np.int64], device: torch.device) -> Tensor | slice:
    """Return the slots as a tensor; as a slice, which needs no copy, where they are one stretch."""
    first, last = int(slots[0]), int(slots[-1])
    if last - first == len(slots) - 1 and (slots[1:] > slots[:-1]).all():
        return slice(first, last + 1)
    return torch.from_numpy(slots).to(device)
