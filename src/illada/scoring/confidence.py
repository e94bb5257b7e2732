"""Confidence scores (paper Eq. 2; spec §6): the candidate is unmasked in the order the model is surest of the truth.

Shape letters: L candidate tokens · M still masked ones.
"""

from collections.abc import Sequence

import numpy as np

from illada.model import IlladaForMaskedLM
from illada.scoring.layout import Pair, checked_pairs, target_log_probs


def confidence_scores(
    model: IlladaForMaskedLM, pairs: Sequence[Pair], right_context: Sequence[int] = (), max_batch_tokens: int = 16_384
) -> list[float]:
    """Return S of each pair in nats: the higher, the better the candidate; deterministic (paper Eq. 2).

    The candidate starts fully masked. Again and again the position whose true token has the highest probability is
    revealed (ties: the left-most), and S is the sum of the log-probabilities at which they were. Not a likelihood, and
    not normalised by length. With a one-token candidate it equals `likelihood_scores`. All candidates advance together;
    a candidate of L tokens takes L forward passes.

    Args:
        model: the network.
        pairs: (context ids, candidate ids) each.
        right_context: visible ids after every candidate (authors' evaluation code: one EOS, see `score_layout`).
        max_batch_tokens: most positions of one forward pass; a single pair may exceed it.

    Raises:
        IlladaError: when a candidate is empty, a pair is longer than the context, an id is outside the vocabulary, or
            the model is causal.
    """
    model.config.refuse_causal("confidence scores are", "take the likelihood, which is exact there")
    scored = checked_pairs(model, pairs, right_context)
    masked = [np.ones(item.length, dtype=np.bool_) for item in scored]
    sums = [0.0] * len(scored)
    # By length, so that equal lengths share attention calls, and then by content, so that equal inputs share a pass.
    active = sorted(range(len(scored)), key=lambda i: (len(scored[i].ids), scored[i].start, scored[i].ids.tolist()))
    while active:
        queries = (scored[i].query(masked[i], model.config.mask_token_id) for i in active)
        for i, log_p_M in zip(active, target_log_probs(model, queries, max_batch_tokens), strict=True):
            best = int(np.argmax(log_p_M))
            sums[i] += float(log_p_M[best])
            masked[i][np.flatnonzero(masked[i])[best]] = False
        active = [i for i in active if masked[i].any()]
    return sums
