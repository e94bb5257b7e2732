"""Spikes of the loss: when a step counts as one, and which data follows when the run goes back (`training.on_spike`).

All numbers are ours. Every process judges by the same sums, so all decide alike. A decision is a function of the seed
and of the state in checkpoints, so a killed run decides alike when it is continued.
"""

import math
from collections.abc import Sequence

from illada import rng
from illada.weights.runs import RunState

MEMORY = 100
"""Updates over which mean and deviation of the loss are taken; the latest count most."""
FIRST_JUDGED = 50
"""Updates before a loss can count as a spike, because it falls fast until then."""
REORDERED = 1000
"""Steps whose data is reordered after the run went back."""
SKIPS_IN_A_ROW, RETURNS_TO_ONE_STEP = 20, 3
"""More than these, and the run has diverged."""


def trouble(state: RunState, loss: float, norm: float, deviations: float | None) -> str | None:
    """Return what is wrong with a step, or None.

    Args:
        state: holds mean and variance of the losses so far.
        loss: of the step.
        norm: of the step's gradient.
        deviations: how many standard deviations above the mean are a spike; None to check only for finite numbers.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return f"loss {loss} and gradient norm {norm}"
    if deviations is None or state.updates < FIRST_JUDGED:
        return None
    limit = state.loss_mean + deviations * math.sqrt(state.loss_variance)
    return f"loss {loss:.4g}, {deviations:g} deviations above the mean {state.loss_mean:.4g}" if loss > limit else None


def remember(state: RunState, loss: float) -> None:
    """Count an update, and include its loss in mean and variance."""
    state.updates, state.skipped = state.updates + 1, 0
    share = 1 / min(state.updates, MEMORY)
    difference = loss - state.loss_mean
    state.loss_mean += share * difference
    state.loss_variance = (1 - share) * (state.loss_variance + share * difference**2)


def data_step(step: int, seed: int, returns: Sequence[int]) -> int:
    """Return the step whose data step `step` uses, after the run went back to the steps `returns` in this order.

    Each return shuffles the data of the following REORDERED steps, so every window still comes once an epoch.
    """
    for number in reversed(range(len(returns))):
        place = step - returns[number]
        if 0 <= place < REORDERED:
            step = returns[number] + rng.shuffled_index(place, REORDERED, seed, rng.REORDER, number)
    return step
