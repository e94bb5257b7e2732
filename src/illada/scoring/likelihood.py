"""The bound on a likelihood by samples (LLaDA Eq. 6; spec §6): a score of candidates, and what post-training rests on.

Shape letters: L candidate tokens · N samples, or views where every sample has two.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from illada import rng
from illada.errors import IlladaError
from illada.model.transformer import IlladaForMaskedLM
from illada.scoring.layout import Pair, check_pairs, target_log_probs

COUNT, CHOICE = 18, 19
"""Random streams: how many tokens to mask, and which ones; the streams of training lie below 16."""


def masked_counts(length: int, samples: int, seed: int) -> list[int]:
    """Return how many of `length` tokens each sample masks, l_i = 1 + floor(L frac(i/n + u)) [N].

    One u for all: each l_i is uniform on 1..L, and together they cover it evenly (ours; LLaDA's code does alike).
    """
    shift = rng.uniform_int(seed, COUNT)
    return [min(length, 1 + int(length * ((i / samples + shift) % 1.0))) for i in range(samples)]


def masked_tokens(length: int, samples: int, seed: int) -> NDArray[np.bool_]:
    """Return which tokens each sample masks, [N, L]: the l_i with the smallest keyed numbers.

    Sample and position are the whole key, so candidates of equal length are compared under the same masks.
    """
    sample_N1, position_L = torch.arange(samples)[:, None], torch.arange(length)
    rank_NL = rng.uniform(seed, CHOICE, sample_N1, position_L, dtype=torch.float64).argsort(1).argsort(1)
    return (rank_NL < torch.tensor(masked_counts(length, samples, seed))[:, None]).numpy()


def views(
    length: int, samples: int, seed: int, complementary: bool = False
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return what each view of an answer masks [N, L], and the weight of its log-probabilities in the bound [N].

    Every view masks something. With complements a sample that masks l of the L tokens is seen a second time with the
    other L - l masked, and the two count half; where l = L there is no other view (ours: ESPO, arXiv 2512.03759, draws
    l from 0..L and halves these too, which adds the noise of how often they are drawn).
    """
    if length == 1:  # nothing to choose
        return np.ones((1, 1), dtype=np.bool_), np.ones(1)
    masked_NL = masked_tokens(length, samples, seed)
    share_N = np.ones(samples)
    if complementary:
        whole_N = masked_NL.all(1).repeat(2)
        masked_NL = np.stack([masked_NL, ~masked_NL], axis=1).reshape(2 * samples, length)
        share_N = np.where(whole_N, 1.0, 0.5)[masked_NL.any(1)]
        masked_NL = masked_NL[masked_NL.any(1)]
    return masked_NL, share_N * length / (masked_NL.sum(1) * samples)


def likelihood_scores(
    model: IlladaForMaskedLM,
    pairs: Sequence[Pair],
    samples: int = 128,
    seed: int = 0,
    right_context: Sequence[int] = (),
    max_batch_tokens: int = 16_384,
    complementary: bool = False,
) -> list[float]:
    """Return an estimate of a lower bound on log p(candidate | context) in nats, for each pair (LLaDA Eq. 6).

    Each sample masks l of the L tokens, l uniform on 1..L, and contributes (L/l) times the sum of their
    log-probabilities; the score is the mean. A one-token candidate needs one sample only, whatever `samples` says, and
    its score equals `confidence_scores`. A pair's score does not depend on its company. For a causal model the score is
    log p itself, from one pass: samples, seed and right context do not matter.

    Args:
        model: the network.
        pairs: (context ids, candidate ids).
        samples: forward passes per pair (LLaDA: 128).
        seed: of the masks.
        right_context: visible ids after every candidate (authors' evaluation code: one EOS, see `score_layout`).
        max_batch_tokens: most positions of one forward pass; a single pair may exceed it.
        complementary: see every sample twice, under its mask and under the complement (see `views`).

    Raises:
        IlladaError: when `samples` is below 1, a candidate is empty, a pair is longer than the context, or an id is
            outside the vocabulary; when the model is causal and a context is empty.
    """
    if samples < 1:
        raise IlladaError(f"samples must be at least 1, got {samples}")
    candidates = check_pairs(model, pairs, right_context)
    order = sorted(range(len(candidates)), key=lambda i: len(candidates[i].ids))
    scores = [0.0] * len(candidates)
    if model.config.causal:
        exact = target_log_probs(model, (candidates[i].causal_query() for i in order), max_batch_tokens)
        for i, log_p_M in zip(order, exact, strict=True):
            scores[i] = float(log_p_M.sum())
        return scores
    lengths = {candidate.length for candidate in candidates}
    seen = {length: views(length, samples, seed, complementary) for length in lengths}
    queries = (
        candidates[i].query(masked_L, model.config.mask_id) for i in order for masked_L in seen[candidates[i].length][0]
    )
    log_probs = target_log_probs(model, queries, max_batch_tokens)
    for i in order:
        weight_N = seen[candidates[i].length][1]
        scores[i] = sum(w * float(log_p_M.sum()) for w, log_p_M in zip(weight_N, log_probs, strict=False))
    return scores
