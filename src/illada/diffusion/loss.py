"""The training objective (paper Eq. 1; spec §2), computed on masked rows only and never positions x vocabulary at once.

Shape letters: B rows · L length · T packed tokens · M masked tokens · D width · V vocabulary · C rows of one chunk.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from illada.diffusion.noise import EPSILON, masked_positions, masking_probability, stratified_times
from illada.model.attention import Packing
from illada.model.transformer import IlladaForMaskedLM

LOGITS_BYTES = 32 * 2**20
"""Size of the largest block of logits in memory at once, in bytes of fp32."""

CrossEntropy = Callable[..., Tensor]
"""`chunked_cross_entropy` or a function that takes and returns the same."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted sum of cross-entropies through a linear head, one chunk of rows at a time.

    The gradient of a chunk is computed while its logits exist, so the backward pass recomputes nothing and at most one
    chunk of logits is ever in memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        head_VD: Tensor,
        target_M: Tensor,
        weight_M: Tensor,
        dtype: torch.dtype,
        entropy_M: Tensor | None,
    ) -> Tensor:
        chunk = max(64, LOGITS_BYTES // (4 * head_VD.shape[0]))
        head = head_VD.to(dtype)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        grad_hidden_MD = torch.empty_like(hidden_MD) if needs_hidden else None
        grad_head_VD = torch.zeros_like(head_VD) if needs_head else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_MD.device)
        for start in range(0, hidden_MD.shape[0], chunk):
            rows = slice(start, start + chunk)
            hidden_CD, target_C1, weight_C = hidden_MD[rows].to(dtype), target_M[rows, None], weight_M[rows].float()
            logits_CV = (hidden_CD @ head.T).float()
            log_sum_C1 = logits_CV.logsumexp(-1, keepdim=True)
            loss_C = (log_sum_C1 - logits_CV.gather(1, target_C1))[:, 0]
            total += (loss_C * weight_C).sum()
            if entropy_M is not None:
                entropy_M[rows] = loss_C
            if needs_hidden or needs_head:
                # d(cross-entropy)/d(logits) = softmax - one-hot, formed in place of the logits.
                slope_CV = logits_CV.sub_(log_sum_C1).exp_()
                slope_CV.scatter_add_(1, target_C1, torch.full_like(target_C1, -1, dtype=slope_CV.dtype))
                slope_CV = slope_CV.mul_(weight_C[:, None]).to(dtype)
                if grad_hidden_MD is not None:
                    grad_hidden_MD[rows] = (slope_CV @ head).to(hidden_MD.dtype)
                if grad_head_VD is not None:
                    grad_head_VD += slope_CV.T @ hidden_CD
        ctx.save_for_backward(grad_hidden_MD, grad_head_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        gradients = (None if gradient is None else gradient * grad_outputs[0] for gradient in ctx.saved_tensors)
        return (*gradients, None, None, None, None)


def chunked_cross_entropy(
    hidden_MD: Tensor, head_VD: Tensor, target_M: Tensor, weight_M: Tensor, entropy_M: Tensor | None = None
) -> Tensor:
    """Return sum over rows of weight * cross-entropy(head(hidden), target), in nats, fp32 scalar.

    The cross-entropies themselves are written into `entropy_M` when it is given. Under autocast the products run in the
    autocast dtype; softmax and sums are always fp32.
    """
    device = hidden_MD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_MD.dtype
    with torch.autocast(device, enabled=False):
        return _ChunkedCrossEntropy.apply(hidden_MD, head_VD, target_M, weight_M, dtype, entropy_M)


def masked_loss(
    model: IlladaForMaskedLM,
    clean_T: Tensor,
    masked_T: Tensor,
    weight_T: Tensor,
    packing: Packing,
    entropy_T: Tensor | None = None,
    cross_entropy: CrossEntropy = chunked_cross_entropy,
) -> Tensor:
    """Return sum over masked tokens of weight * cross-entropy(clean token | noisy segment), in nats.

    Args:
        model: the network; its configuration carries the mask id.
        clean_T: token ids, int64 [T].
        masked_T: which of them the model does not see, bool [T].
        weight_T: weight of each token's loss, usually 1/(p * tokens of the batch); ignored where not masked.
        packing: how the T tokens divide into segments.
        entropy_T: receives the cross-entropy of every masked token, fp32 [T]; None to compute only the loss.
        cross_entropy: computes the loss from hidden states and head.
    """
    noisy_T = clean_T.masked_fill(masked_T, model.config.mask_id)
    hidden_TD = model.model.packed(noisy_T, packing)
    at_M = masked_T.nonzero()[:, 0]
    entropy_M = None if entropy_T is None else entropy_T.new_empty(at_M.numel())
    loss = cross_entropy(hidden_TD[at_M], model.lm_head.weight, clean_T[at_M], weight_T[at_M], entropy_M)
    if entropy_T is not None and entropy_M is not None:
        entropy_T[at_M] = entropy_M
    return loss


def diffusion_loss(
    model: IlladaForMaskedLM,
    input_ids: Tensor,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    key: tuple[int, int, int] = (0, 0, 0),
    epsilon: float = EPSILON,
) -> Tensor:
    """Return one noisy estimate of the paper's Eq. 1 in nats per token; its expectation is an upper bound on the NLL.

    Args:
        model: the network.
        input_ids: clean ids [B, L] (every row a segment), or any shape with `cu_seqlens`.
        cu_seqlens: cumulative lengths [S + 1] of the segments of the flattened ids.
        key: (seed, index of the first segment, epoch); segment i takes sample index + i. The same key gives the same t
            (stratified over the segments of this call) and the same masks, on any device.
        epsilon: smallest masking probability.

    Returns:
        scalar with gradient, averaged over all tokens, masked or not.

    Raises:
        IlladaError: when the model is causal.
        ValueError: when segments and tokens disagree.
    """
    model.config.refuse_causal("diffusion_loss is", "take illada.diffusion.causal_loss")
    clean_T = input_ids.reshape(-1)
    if cu_seqlens is None:
        packing = Packing((input_ids.shape[-1],) * (clean_T.numel() // max(1, input_ids.shape[-1])))
    else:
        packing = Packing.from_cu_seqlens(cu_seqlens)
    if packing.tokens != clean_T.numel():
        raise ValueError(f"the segments hold {packing.tokens} tokens but {clean_T.numel()} were given")
    seed, first, epoch = key
    length_S = torch.tensor(packing.lengths, dtype=torch.int64, device=clean_T.device)
    sample_S = first + torch.arange(len(packing.lengths), device=clean_T.device)
    epoch_S = torch.full_like(sample_S, epoch)
    time_S = stratified_times(seed, first, sample_S, torch.zeros_like(sample_S), epoch_S)
    probability_T = masking_probability(time_S, epsilon).repeat_interleave(length_S)
    sample_T, epoch_T = sample_S.repeat_interleave(length_S), epoch_S.repeat_interleave(length_S)
    masked_T = masked_positions(seed, sample_T, epoch_T, packing.positions(clean_T.device), probability_T)
    return masked_loss(model, clean_T, masked_T, 1 / (probability_T * max(1, clean_T.numel())), packing)
