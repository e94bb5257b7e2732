"""Which masked positions of a block to commit after one step (spec §5).

Shape letters: M masked positions of the active block, left to right · K positions committed.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from illada import rng
from illada.generation.settings import GenerationSettings

REMASK = 17
"""Stream of random remasking; the streams of training lie below 16."""


def quota(slots: int, steps: int, step: int) -> int:
    """Return how many positions step `step` of `steps` commits: an even share, and the first steps the remainder."""
    return slots // steps + (step < slots % steps)


def positions_to_commit(
    settings: GenerationSettings,
    score_M: NDArray[np.float32],
    position_M: NDArray[np.int64],
    slots: int,
    block_step: int,
    answer_step: int,
) -> NDArray[np.intp]:
    """Return indices [K] of the masked positions to commit, K >= 1; of equal scores the left-most counts.

    Args:
        settings: of the request.
        score_M: what its rule looks at: the probability of each position's proposal, or its margin, or its entropy in
            nats.
        position_M: positions in the answer, a key of random remasking.
        slots: how many positions of the block were masked at its start.
        block_step: how many steps the block has had.
        answer_step: how many steps the answer has had, a key of random remasking.
    """
    if settings.threshold is not None:
        above_K = np.flatnonzero(score_M >= settings.threshold)
        return above_K if above_K.size else np.argmax(score_M, keepdims=True)
    if settings.entropy_bound is not None:
        # In ascending order the largest entropy is the last, so the bound holds for the sum of all before it.
        order_M = np.argsort(score_M, kind="stable")
        before_M = np.concatenate(([0.0], score_M[order_M][:-1].cumsum(dtype=np.float64)))
        return order_M[: np.count_nonzero(before_M <= settings.entropy_bound)]
    count = quota(slots, min(settings.steps_per_block or slots, slots), block_step)
    priority_M: NDArray[np.floating] = score_M
    if settings.remasking == "random":
        key = (settings.seed, REMASK, answer_step, torch.from_numpy(position_M))
        priority_M = rng.uniform(*key, dtype=torch.float64).numpy()
    return np.argsort(-priority_M, kind="stable")[:count]
