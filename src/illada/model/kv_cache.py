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

    A pass over some positions writes their keys and values, and attends to the positions before and behind them as they
    were last computed. In a causal model, with nothing behind, that equals a fresh pass; in a bidirectional one it does
    not, as every position depends on all others.
    """

    def __init__(self, pool: PagePool):
        self.pool = pool
        self.start = 0
        """Where the positions of the next pass begin."""
        self.seen = 0
        """How many positions the next pass sees, its own included."""
        self.slots = np.zeros(0, dtype=np.int64)
        """For each position, its slot in the pool."""
        self.pages: list[int] = []

    def begin(self, start: int, seen: int) -> None:
        """Prepare for a pass over positions from `start` on that sees `seen` positions, all others computed before."""
        self.start, self.seen = start, seen
        self.slots = np.concatenate((self.slots, self._fresh(seen - len(self.slots))))

    def fork(self, start: int, stop: int) -> "KVCache":
        """Return a cache that writes the positions from `start` to `stop` elsewhere and shares all others."""
        fork = KVCache(self.pool)
        fork.slots = np.concatenate((self.slots[:start], fork._fresh(stop - start)[: stop - start], self.slots[stop:]))
        return fork

    def _fresh(self, count: int) -> NDArray[np.int64]:
        """Return the slots of as many new pages as hold `count` positions."""
        pages = self.pool.take(max(0, -(-count // PAGE)))
        self.pages += pages
        return (np.array(pages, dtype=np.int64)[:, None] * PAGE + np.arange(PAGE)).ravel()

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
        slots = [cache.slots[: cache.seen] for cache in caches]
        flat = np.concatenate(slots)
        write = np.concatenate([cache.slots[cache.start : cache.start + length] for cache in caches])
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
