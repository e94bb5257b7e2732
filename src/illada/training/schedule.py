"""The learning rate: linear warm-up, constant, then a decay that may begin early (paper §2.1, §2.2)."""

import math
from dataclasses import dataclass
from typing import Literal

from illada.training.recipe import TrainingRecipe


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


def make_schedule(training: TrainingRecipe, samples: int, decay_start: int | None) -> Schedule:
    """Return the schedule of a recipe on data of so many samples; `decay_start` is the step of an early decay."""
    steps = training.count_steps(samples)
    decay_steps = steps // 10 if training.decay_steps is None else min(training.decay_steps, steps)
    start = steps - decay_steps if decay_start is None else min(decay_start, steps - decay_steps)
    rates = (training.learning_rate, training.final_learning_rate)
    return Schedule(*rates, training.warmup_steps, training.decay, decay_steps, start)


def on_plateau(losses: list[float], patience: int, delta: float) -> bool:
    """Say whether none of the last `patience` losses is below the best of the earlier ones by the fraction `delta`."""
    if len(losses) <= patience:
        return False
    return min(losses[-patience:]) > min(losses[:-patience]) * (1 - delta)
