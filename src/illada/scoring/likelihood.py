"""The bound on a likelihood by samples (LLaDA Eq. 6; spec §6): a score of candidates, and what post-training rests on.

Shape letters: L candidate tokens · N samples, or views where every sample has two · O orders of the tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from illada import rng
from illada.errors import IlladaError
from illada.model.transformer import IlladaForMaskedLM
from illada.scoring.layout import Pair, check_pairs, target_log_probs

LEVEL, ORDER = 18, 19
"""Random streams: how much each sample masks, and in which order; the streams of training lie below 16."""
POWER = 4 / 3
"""Where the levels of n samples part, (i/n)^POWER: low ones, whose few tokens weigh most, are sampled more densely."""


def masked_tokens(
    length: int, samples: int, seed: int, complementary: bool = False
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return what each view of an answer masks [N, L], and its share in the mean over all noise levels [N].

    Sample i draws t between (i/n)^POWER and ((i+1)/n)^POWER and masks l = 1 + floor(L t) tokens; its share is the
    width of this stratum, so l is uniform on 1..L. From the largest l down, each takes the next l tokens of a random
    order, round and round, so that every token is masked about equally often (ours: a third of the noise of even levels
    and independent tokens, benchmarks/RESULTS.md); 8 samples, from all levels, share an order. One sample is LLaDA's.
    With complements the strata are even, and a sample's l and L - l are two views with half its share each; where l = L
    there is no other view (ESPO, arXiv 2512.03759, draws l from 0..L and halves these too, which adds noise).
    """
    edge = (np.arange(samples + 1) / samples) ** (1 if complementary else POWER)
    u_N = rng.uniform(seed, LEVEL, torch.arange(samples), dtype=torch.float64).numpy()
    count_N = np.minimum(length, 1 + (length * (edge[:-1] + np.diff(edge) * u_N)).astype(int))
    if complementary:
        count_N = np.sort(np.where(count_N < length, np.minimum(count_N, length - count_N), length))
    share_N, count_N = np.diff(edge)[::-1], count_N[::-1]
    orders = -(-samples // 8)  # an order has few subsets: with one for all, noise would stop falling
    order_O1, position_L = torch.arange(orders)[:, None], torch.arange(length)
    place_OL = rng.uniform(seed, ORDER, order_O1, position_L, dtype=torch.float64).argsort(1).argsort(1).numpy()
    taken_N = np.array([count_N[i % orders : i : orders].sum() for i in range(samples)])
    masked_NL = (place_OL[np.arange(samples) % orders] - taken_N[:, None]) % length < count_N[:, None]
    if complementary:
        share_N = np.where(count_N < length, share_N / 2, share_N).repeat(2)
        masked_NL = np.stack([masked_NL, ~masked_NL], axis=1).reshape(2 * samples, length)
        share_N, masked_NL = share_N[masked_NL.any(1)], masked_NL[masked_NL.any(1)]
    return masked_NL, share_N


def views(
    length: int, samples: int, seed: int, complementary: bool = False
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return what each view of an answer masks [N, L], and the weight of its log-probabilities in the bound [N]."""
    if length == 1:  # nothing to choose
        return np.ones((1, 1), dtype=np.bool_), np.ones(1)
    masked_NL, share_N = masked_tokens(length, samples, seed, complementary)
    return masked_NL, share_N * length / masked_NL.sum(1)


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
    log-probabilities, by its share (see `masked_tokens`). A one-token candidate needs one sample only, whatever
    `samples` says, and its score equals `confidence_scores`. A pair's score does not depend on its company. For a
    causal model the score is log p itself, from one pass: samples, seed and right context do not matter.

    Args:
        model: the network.
        pairs: (context ids, candidate ids).
        samples: forward passes per pair (LLaDA: 128).
        seed: of the masks.
        right_context: visible ids after every candidate (authors' evaluation code: one EOS, see `score_layout`).
        max_batch_tokens: most positions of one forward pass; a single pair may exceed it.
        complementary: see every sample twice, under its mask and under the complement.

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
    seen = {length: views(length, samples, seed, complementary) for length in {each.length for each in candidates}}
    queries = (
        candidates[i].query(masked_L, model.config.mask_id) for i in order for masked_L in seen[candidates[i].length][0]
    )
    log_probs = target_log_probs(model, queries, max_batch_tokens)
    for i in order:
        weight_N = seen[candidates[i].length][1]
        scores[i] = sum(w * float(log_p_M.sum()) for w, log_p_M in zip(weight_N, log_probs, strict=False))
    return scores
