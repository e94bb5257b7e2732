"""What to do when a step goes wrong (`training.on_spike`): leave it out, or go back and see other data first.

All numbers are ours. Every process judges by the same sums, so all decide alike; what is decided is a function of the
seed and of the state that checkpoints keep, so a killed run decides alike when it is continued.
"""

import math
from collections.abc import Sequence

from illada import rng
from illada.training.checkpoint import RunState

MEMORY = 100
"""Updates over which mean and deviation of the loss are taken, the latest counting most."""
FIRST_JUDGED = 50
"""Updates before a loss can be called a spike: until then it falls fast."""
REORDERED = 1000
"""Steps whose data is put into another order after going back."""
SKIPS_IN_A_ROW, RETURNS_TO_ONE_STEP = 20, 3
"""More than these, and the run has diverged."""


def trouble(state: RunState, loss: float, norm: float, deviations: float | None) -> str | None:
    """Say what is wrong with a step, or return None.

    Args:
        state: with mean and variance of the losses so far.
        loss: of the step.
        norm: of its gradient.
        deviations: how many standard deviations above the mean are a spike; None to ask only for finite numbers.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return f"loss {loss} and gradient norm {norm}"
    if deviations is None or state.updates < FIRST_JUDGED:
        return None
    limit = state.loss_mean + deviations * math.sqrt(state.loss_variance)
    return f"loss {loss:.4g}, {deviations:g} deviations above the mean {state.loss_mean:.4g}" if loss > limit else None


def remember(state: RunState, loss: float) -> None:
    """Count an update, and take its loss into mean and variance."""
    state.updates, state.skipped = state.updates + 1, 0
    share = 1 / min(state.updates, MEMORY)
    difference = loss - state.loss_mean
    state.loss_mean += share * difference
    state.loss_variance = (1 - share) * (state.loss_variance + share * difference**2)


def data_step(step: int, seed: int, returns: Sequence[int]) -> int:
    """Return which step's data step `step` takes, after the run went back to the steps `returns`, in this order.

    Each return shuffles the data of the REORDERED steps that follow, so every window still comes once an epoch.
    """
    for number in reversed(range(len(returns))):
        place = step - returns[number]
        if 0 <= place < REORDERED:
            step = returns[number] + rng.shuffled_index(place, REORDERED, seed, rng.REORDER, number)
    return step
