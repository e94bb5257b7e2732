"""Confidence scores (paper Eq. 2; spec §6): the true tokens are revealed in the order in which the model is surest.

Shape letters: L candidate tokens · M still masked ones.
"""

from collections.abc import Sequence

import numpy as np

from illada.model.transformer import IlladaForMaskedLM
from illada.scoring.layout import Pair, check_pairs, target_log_probs


def confidence_scores(
    model: IlladaForMaskedLM, pairs: Sequence[Pair], right_context: Sequence[int] = (), max_batch_tokens: int = 16_384
) -> list[float]:
    """Return S of each pair in nats: the higher, the better the candidate; deterministic (paper Eq. 2).

    The candidate starts fully masked. Again and again the position whose true token has the highest probability is
    revealed (ties: the left-most), and S is the sum of the log-probabilities which the tokens had then. S is not a
    likelihood, and not normalised by length. For a one-token candidate it equals `likelihood_scores`. All candidates
    advance together; a candidate of L tokens takes L forward passes.

    Args:
        model: the network.
        pairs: (context ids, candidate ids).
        right_context: visible ids after every candidate (authors' evaluation code: one EOS, see `score_layout`).
        max_batch_tokens: most positions of one forward pass; a single pair may exceed it.

    Raises:
        IlladaError: when a candidate is empty, a pair is longer than the context, an id is outside the vocabulary, or
            the model is causal.
    """
    model.config.refuse_causal("confidence scores are", "take the likelihood, which is exact there")
    candidates = check_pairs(model, pairs, right_context)
    masked = [np.ones(candidate.length, dtype=np.bool_) for candidate in candidates]
    sums = [0.0] * len(candidates)
    # By length, so that equal lengths share attention calls, and then by content, so that equal inputs share a pass.
    active = sorted(
        range(len(candidates)), key=lambda i: (len(candidates[i].ids), candidates[i].start, candidates[i].ids.tolist())
    )
    while active:
        queries = (candidates[i].query(masked[i], model.config.mask_id) for i in active)
        for i, log_p_M in zip(active, target_log_probs(model, queries, max_batch_tokens), strict=True):
            best = int(np.argmax(log_p_M))
            sums[i] += float(log_p_M[best])
            masked[i][np.flatnonzero(masked[i])[best]] = False
        active = [i for i in active if masked[i].any()]
    return sums
