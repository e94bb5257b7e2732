"""The learning rate: linear warm-up, constant, then a decay that may be called early (paper §2.2, §2.3)."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Warm-up, plateau, decay.

    Args:
        peak: learning rate of the constant part.
        final: learning rate at the end of the decay.
        warmup_steps: steps of linear warm-up.
        decay: shape of the decay.
        decay_steps: steps of the decay.
        decay_start: step at which the decay begins; the run ends decay_steps later.
    """

    peak: float
    final: float
    warmup_steps: int
    decay: Literal["cosine", "linear"]
    decay_steps: int
    decay_start: int

    @property
    def steps(self) -> int:
        """Number of steps of the run."""
        return self.decay_start + self.decay_steps

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of `step`, counted from 0; the last step of the run has the final rate."""
        if step >= self.decay_start and self.decay_steps:
            done = min(1.0, (step - self.decay_start + 1) / self.decay_steps)
            left = 0.5 * (1 + math.cos(math.pi * done)) if self.decay == "cosine" else 1 - done
            return self.final + (self.peak - self.final) * left * min(1.0, (self.decay_start + 1) / self._warmup)
        return self.peak * min(1.0, (step + 1) / self._warmup)

    @property
    def _warmup(self) -> int:
        return max(1, self.warmup_steps)


def on_plateau(losses: list[float], patience: int, delta: float) -> bool:
    """Tell whether none of the last `patience` losses is lower than the best before them by the fraction `delta`."""
    if len(losses) <= patience:
        return False
    return min(losses[-patience:]) > min(losses[:-patience]) * (1 - delta)
