"""The loss of the autoregressive baseline (ours): every token of a segment predicts its successor, without noise.

Shape letters: T packed tokens · M predicted tokens.
"""

from torch import Tensor

from illada.diffusion.loss import CrossEntropy, chunked_cross_entropy
from illada.model.attention import Packing
from illada.model.transformer import IlladaForMaskedLM


def causal_loss(
    model: IlladaForMaskedLM,
    clean_T: Tensor,
    predicted_T: Tensor,
    weight_T: Tensor,
    packing: Packing,
    cross_entropy: CrossEntropy = chunked_cross_entropy,
) -> Tensor:
    """Return sum over predicted tokens of weight * cross-entropy(token | earlier tokens of its segment), in nats.

    Args:
        model: a causal network.
        clean_T: token ids, int64 [T].
        predicted_T: which tokens count, bool [T]; never the first of a segment, which nothing predicts.
        weight_T: weight of each token's loss; ignored where the token does not count.
        packing: how the T tokens divide into segments.
        cross_entropy: computes the loss from hidden states and head.
    """
    hidden_TD = model.model.packed(clean_T, packing)
    at_M = predicted_T.nonzero()[:, 0]
    return cross_entropy(hidden_TD[at_M - 1], model.lm_head.weight, clean_T[at_M], weight_T[at_M])
