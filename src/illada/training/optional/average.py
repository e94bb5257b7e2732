"""An exponential average of the weights, beside which a run trains (training.average).

After update n (from 1) a ← β_n·a + (1 - β_n)·w, with β_n = min(β, (1 + n) / (10 + n)), so that the weights at the start
soon count for nothing. The formula and β = 0.9999 are those of MDLM's code (arXiv 2406.07524, models/ema.py). Every
number is averaged by itself, so the average lies in the same shards as the weights and does not depend on the number of
processes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from illada.weights.runs import AVERAGE


def fading(decay: float, updates: int) -> float:
    """Return β_n, the share of the old average that stays at update n = `updates`, which is at least 1."""
    return min(decay, (1 + updates) / (10 + updates))


class Average:
    """The average of a run's trained weights; of nothing when `decay` is 0.

    Args:
        weights: the trained weights by name, fp32, in shards when there are several processes; only their values may
            change.
        decay: β.

    Attributes:
        tensors: the average as "weight/average", fp32, in the weights' shards; part of every checkpoint.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float):
        self.decay = decay
        chosen = weights if decay else {}
        self.tensors = {name + AVERAGE: weight.detach().clone() for name, weight in chosen.items()}
        # What this process holds of them, because operations on many tensors know no shards.
        self._weights, self._averages = ([_own(t) for t in part.values()] for part in (chosen, self.tensors))

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the weights after update number `updates`."""
        if self.decay:
            torch._foreach_lerp_(self._averages, self._weights, 1 - fading(self.decay, updates))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and average, bit for bit and one tensor at a time; a second call undoes it."""
        for weight, average in zip(self._weights, self._averages, strict=True):
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)

    def measure(self, figure: Callable[[], float], wait: Callable[[], None]) -> tuple[float, float]:
        """Return a figure of the network with the average and with its own weights; one and the same without average.

        `wait` returns when nothing copies the weights any more.
        """
        own = figure()
        if not self.decay:
            return own, own
        wait()
        with self.in_place():
            return figure(), own

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the network compute with the average; all processes, while no weights are gathered or copied."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


def _own(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
