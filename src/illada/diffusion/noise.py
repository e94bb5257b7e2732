"""The forward process (paper Eq. 1; spec §2): at time t each token is MASK with probability p = (1 - eps) t + eps.

Everything here is a pure function of keys (seed, sample, epoch, ...), so micro-batches, ranks and restarts change
nothing. `Noise` holds what training may do otherwise. Shape letters: S segments · T packed tokens.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from illada import rng

EPSILON = 1e-3
"""Smallest masking probability (LLaDA's public code); it bounds the weight 1/p by 1000."""

BELL = 0.2  # standard deviation of the bell of times (ours)
_BELOW = 0.5 * math.erfc(0.5 / BELL / math.sqrt(2))  # part of the uncut bell below 0


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


def masking_probability(time: Tensor, low: float = EPSILON, high: float = 1.0) -> Tensor:
    """Return p = (high - low) t + low, the chance that a token is masked at time t (paper: (1 - eps) t + eps)."""
    return (high - low) * time + low


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


@dataclass(frozen=True)
class Noise:
    """What training may change about t, p and the weights of losses; as it stands, the paper's.

    With q the density of t, and CE the mean cross-entropy of a token masked with chance p(t), the expected loss is

        "1/p"    ∫ q CE dt              the paper's bound where q = 1 and p covers eps to 1
        "bound"  ∫ CE dt                the same bound, whatever q
        "none"   ∫ q p CE dt / ∫ q p dt the mean of all masked tokens: no bound

    Args:
        bell: t is normal around 1/2 with deviation `BELL`, cut at 0 and 1 (idea: arXiv 2605.13026; the shape is ours:
            its density is nowhere below 0.08, so no weight 1/q is large); else uniform.
        band: p at time 0 and at time 1.
        weight: of a masked token's cross-entropy, as above.
        complementary: there are complements, in which a token is masked with chance 1 - p (LLaDA2.0).
    """

    bell: bool = False
    band: tuple[float, float] = (EPSILON, 1.0)
    weight: Literal["1/p", "bound", "none"] = "1/p"
    complementary: bool = False

    def times(self, uniform: Tensor) -> Tensor:
        """Map uniform numbers to t by the inverse distribution function; strata stay strata."""
        return 0.5 + BELL * torch.special.ndtri(_BELOW + (1 - 2 * _BELOW) * uniform) if self.bell else uniform

    def divisor(self, time: Tensor, probability: Tensor) -> Tensor:
        """Return what a masked token's cross-entropy is divided by: p, p q(t), or the mean of all p."""
        if self.weight == "none":
            return torch.full_like(probability, 0.5 if self.complementary else sum(self.band) / 2)
        if self.weight == "1/p" or not self.bell:
            return probability
        scale = BELL * math.sqrt(2 * math.pi) * (1 - 2 * _BELOW)
        return probability * (-0.5 * ((time - 0.5) / BELL) ** 2).exp() / scale  # q(t) = q(1 - t): right for complements


PAPER = Noise()  # what validation measures, whatever training does
