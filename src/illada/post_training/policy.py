"""Losses of reinforcement learning: what an answer's reward does to its log-probabilities.

An answer's advantage A is its reward minus the mean of the other answers to the same problem, not divided by their
deviation. ℓ is the weighted sum of its log-probabilities under noise, L its tokens, ℓ_old the same sum under the same
masks before the answers of this rollout changed the model, ℓ_ref at the start of the run.

    espo         -min(ρ A, clip(ρ, 1 - ε, 1 + ε) A) + β (ℓ - ℓ_ref)² / 2L,  ρ = exp((ℓ - ℓ_old) / L), ℓ the bound
                 (arXiv 2512.03759)
    gdsd         (clip(ℓ - ℓ_old, -εL, εL) / L - ψ A)², ℓ without weights (arXiv 2605.29398; how far their clip lets
                 a token go is not known here, ours is ε)
    diffu-grpo   the same as espo for each token by itself, a mean over tokens, from one pass with the whole answer
                 masked and some of the prompt hidden, and exp(r) - r - 1 with r = ℓ_ref - ℓ for the last term
                 (arXiv 2504.12216)

Shape letters: A answers · G answers to one problem · M tokens asked for · L tokens of one answer · N views.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from illada.post_training.bounds import Masks, Views
from illada.post_training.options import Method, RlSection
from illada.post_training.shared import Loss
from illada.scoring.likelihood import masked_tokens, views


def advantages(rewards_A: Tensor, answers: int) -> Tensor:
    """Return each reward minus the mean of the others of its problem [A], exactly 0 where all are equal.

    A problem's answers lie beside each other.
    """
    rewards_PG = rewards_A.view(-1, answers)
    differences_PGG = rewards_PG[:, :, None] - rewards_PG[:, None, :]
    return (differences_PGG.sum(2) / (answers - 1)).flatten()


def whole(length: int, samples: int, seed: int, complementary: bool) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:  # noqa: ARG001
    """Mask all of an answer, in as many views as there are samples; each counts its share."""
    return np.ones((samples, length), dtype=np.bool_), np.full(samples, 1 / samples)


def unweighted(
    length: int, samples: int, seed: int, complementary: bool
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Mask as `views` does, and weigh all tokens alike: the mean over noise levels of the sum over what is masked.

    Where a sample has a complement, both count whole.
    """
    masked_NL, share_N = masked_tokens(length, samples, seed, complementary)
    return masked_NL, np.where(masked_NL.all(1), 1, 1 + complementary) * share_N


MASKS: dict[Method, Masks] = {"espo": views, "gdsd": unweighted, "diffu-grpo": whole}
"""What the views of an answer mask under each method, and the weights of their log-probabilities."""


def objective(
    section: RlSection,
    batch: Views,
    log_p_M: Tensor,
    old: Tensor,
    reference: Tensor | None,
    advantage_A: Tensor,
    weight_A: Tensor,
) -> Loss:
    """Return the loss of a batch of answers under the recipe's method.

    Its figures are kl (to the start, nats a token) and clipped (share of answers, or tokens, whose gradient the clip
    took away).

    Args:
        section: method and its numbers.
        batch: the answers as the model saw them.
        log_p_M: what it said, with gradient.
        old: the same sums [A] before (diffu-grpo: log-probabilities [M]).
        reference: the same at the start of the run; None where beta is 0.
        advantage_A: of the answers.
        weight_A: of the answers in the loss (diffu-grpo: spread over their tokens).
    """
    device = log_p_M.device
    lengths_A = batch.lengths_A.to(device)
    if section.method == "diffu-grpo":
        at_M = batch.asked_T.nonzero()[:, 0]
        answer_M, share_M = batch.answer_T[at_M].to(device), batch.weight_T[at_M].to(device)
        weight_M = (weight_A / lengths_A)[answer_M] * share_M
        return _clipped(section, log_p_M - old, advantage_A[answer_M], weight_M, reference, log_p_M)
    sums_A = batch.sums(log_p_M)
    change_A = (sums_A - old) / lengths_A
    if section.method == "gdsd":
        limited_A = change_A.clamp(-section.epsilon, section.epsilon)
        loss_A = (limited_A - section.psi * advantage_A).square()
        clipped_A = (change_A.detach() != limited_A.detach()).float()
        return Loss((weight_A * loss_A).sum(), {"clipped": (weight_A * clipped_A).sum()})
    found = _clipped(section, change_A, advantage_A, weight_A)
    if reference is None:
        return found
    kl_A = (sums_A - reference).square() / (2 * lengths_A)
    kl = (weight_A * kl_A).sum()
    return Loss(found.loss + section.beta * kl, {**found.figures, "kl": kl.detach()})


def _clipped(
    section: RlSection,
    change: Tensor,
    advantage: Tensor,
    weight: Tensor,
    reference: Tensor | None = None,
    log_p: Tensor | None = None,
) -> Loss:
    """Return the clipped surrogate of answers or tokens; of tokens with the distance to the start."""
    ratio = change.exp()
    limited = ratio.clamp(1 - section.epsilon, 1 + section.epsilon)
    loss = (weight * -torch.minimum(ratio * advantage, limited * advantage)).sum()
    with torch.no_grad():
        clipped = (weight * (limited * advantage < ratio * advantage).float()).sum()
    figures = {"clipped": clipped}
    if reference is not None and log_p is not None:
        distance = reference - log_p
        kl = (weight * (distance.exp() - distance - 1)).sum()
        loss, figures["kl"] = loss + section.beta * kl, kl.detach()
    return Loss(loss, figures)
