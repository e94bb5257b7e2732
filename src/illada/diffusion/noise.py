"""The forward process (paper Eq. 1; spec §2): at time t each token is MASK with probability p = (1 - eps) t + eps.

Everything here is a pure function of keys (seed, sample, epoch, ...), so micro-batches, ranks and restarts change
nothing. Shape letters: S segments · T packed tokens.
"""

import torch
from torch import Tensor

from illada import rng

EPSILON = 1e-3
"""Smallest masking probability (LLaDA's public code); it bounds the weight 1/p by 1000."""


def stratified_times(seed: int, step: int, sample_S: Tensor, part_S: Tensor, epoch_S: Tensor) -> Tensor:
    """Draw one t per segment of a whole optimiser step, t_i = (pi(i) + u_i)/S; ours (spec §2).

    Each t_i alone is uniform on (0, 1), because pi(i) is uniform on 0..S-1; together they cover the interval evenly,
    which lowers the variance of the step's loss. The arguments describe every segment of the step in order, whichever
    part of the step this process computes.

    Args:
        seed: of the run.
        step: optimiser step; picks the permutation pi.
        sample_S: sample (window) index of each segment, int64 [S].
        part_S: number of the segment inside its sample, int64 [S].
        epoch_S: epoch in which the sample is seen, int64 [S].

    Returns:
        float64 [S].
    """
    count = sample_S.numel()
    within_S = rng.uniform(seed, rng.TIME, sample_S, part_S, epoch_S, dtype=torch.float64)
    return (rng.permutation(count, seed, rng.STRATUM, step, device=sample_S.device) + within_S) / count


def masking_probability(time: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Return p = (1 - eps) t + eps, the chance that a token is masked at time t."""
    return (1 - epsilon) * time + epsilon


def masked_positions(seed: int, sample_T: Tensor, epoch_T: Tensor, position_T: Tensor, probability_T: Tensor) -> Tensor:
    """Return which tokens become MASK, bool [T], each independently with its own probability.

    Args:
        seed: of the run.
        sample_T: sample index of each token.
        epoch_T: epoch of each token's sample.
        position_T: position of the token inside its sample (not inside its segment).
        probability_T: p of each token.
    """
    return rng.uniform(seed, rng.MASK, sample_T, epoch_T, position_T, dtype=torch.float64) < probability_T
