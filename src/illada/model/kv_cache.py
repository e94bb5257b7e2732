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
"""Positions of a page."""


class PagePool:
    """Memory for the keys and values of many sequences, in pages; it grows to what is used at once."""

    def __init__(self) -> None:
        self.layers: list[Tensor] = []
        self.free: list[int] = []
        self.pages = 0

    def take(self, count: int) -> list[int]:
        """Return the numbers of so many pages."""
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
            # Zeros: what nobody wrote is masked in attention, and zero times rubbish might be no number.
            self.layers.append(like_TGD.new_zeros(2, slots, *like_TGD.shape[1:]))
        elif self.layers[number].shape[1] < slots:
            old = self.layers[number]
            self.layers[number] = old.new_zeros(2, slots, *old.shape[2:])
            self.layers[number][:, : old.shape[1]] = old
        return self.layers[number]


class KVCache:
    """Where one sequence has its keys and values.

    A pass over the positions from `start` on writes theirs and attends to those before it as they were last computed:
    what a fresh pass gives in a causal model, but not in a bidirectional one, whose positions depend on all others.
    """

    def __init__(self, pool: PagePool, shared: NDArray[np.int64] | None = None):
        self.pool = pool
        self.start = 0
        """Where the positions of the next pass begin."""
        self.slots = np.zeros(0, dtype=np.int64) if shared is None else shared
        """Of each position, where in the pool it is."""
        self.pages: list[int] = []

    def begin(self, start: int, length: int) -> None:
        """Prepare for a pass over so many positions from `start` on."""
        self.start = start
        if (missing := start + length - len(self.slots)) > 0:
            pages = self.pool.take(-(-missing // PAGE))
            self.pages += pages
            fresh = np.array(pages, dtype=np.int64)[:, None] * PAGE + np.arange(PAGE)
            self.slots = np.concatenate((self.slots, fresh.ravel()))

    def fork(self, start: int) -> "KVCache":
        """Return a past that shares the positions before `start` and writes elsewhere."""
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
    def of(cls, pasts: Sequence[KVCache], length: int, device: torch.device, causal: bool = False) -> "CacheView":
        """Look them up for a pass over `length` positions of each."""
        slots = [past.slots[: past.start + length] for past in pasts]
        flat = np.concatenate(slots)
        write = np.concatenate([one[-length:] for one in slots])
        seen = np.array([len(one) for one in slots])
        filled = np.arange(seen.max()) < seen[:, None]
        read = _indices(flat, device)
        visible = filled[:, None]
        # Without any past, causal attention needs no mask of ours.
        if causal and seen.max() > length:
            position = (seen - length)[:, None] + np.arange(length)
            visible = np.arange(seen.max()) <= position[:, :, None]
        mask = None if visible.all() else torch.from_numpy(visible[:, None]).to(device)
        if filled.all():
            return cls(pasts[0].pool, _indices(write, device), read, read, mask)
        padded = np.zeros(filled.shape, dtype=np.int64)
        padded[filled] = flat
        return cls(pasts[0].pool, _indices(write, device), read, _indices(padded.ravel(), device), mask)

    def extend(self, layer: int, key_TGD: Tensor, value_TGD: Tensor, padded: bool) -> tuple[Tensor, Tensor]:
        """Write the keys and values of a pass, and return all that its sequences see."""
        store = self.pool.layer(layer, key_TGD)
        store[0, self.write] = key_TGD
        store[1, self.write] = value_TGD
        key, value = store[:, self.padded if padded else self.read]
        return key, value


def _indices(slots: NDArray[np.int64], device: torch.device) -> Tensor | slice:
    """Return a slice where the slots are one stretch, as those of a single sequence often are: it needs no copy."""
    first, last = int(slots[0]), int(slots[-1])
    if last - first == len(slots) - 1 and (slots[1:] > slots[:-1]).all():
        return slice(first, last + 1)
    return torch.from_numpy(slots).to(device)
