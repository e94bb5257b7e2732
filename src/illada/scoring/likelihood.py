"""Monte-Carlo likelihood (LLaDA Eq. 6; spec §6), the baseline of confidence scores; exact for causal models.

Shape letters: L candidate tokens · N samples.
"""

from collections.abc import Sequence
from itertools import islice

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


def likelihood_scores(
    model: IlladaForMaskedLM,
    pairs: Sequence[Pair],
    samples: int = 128,
    seed: int = 0,
    right_context: Sequence[int] = (),
    max_batch_tokens: int = 16_384,
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
    masks = {length: masked_tokens(length, samples if length > 1 else 1, seed) for length in lengths}
    queries = (
        candidates[i].query(masked_L, model.config.mask_id) for i in order for masked_L in masks[candidates[i].length]
    )
    log_probs = target_log_probs(model, queries, max_batch_tokens)
    for i in order:
        length = candidates[i].length
        own = islice(log_probs, len(masks[length]))
        terms = [length / len(log_p_M) * float(log_p_M.sum()) for log_p_M in own]
        scores[i] = sum(terms) / len(terms)
    return scores
