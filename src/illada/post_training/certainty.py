"""Certainty training: answers as they stand while a block is written, and the loss that makes the model surer of them.

    loss of a view = mean over asked of -log p(y_i) + w · mean over asked that are predicted right of H_i

with H_i the entropy at temperature T (dParallel, arXiv 2509.26488; d3LLM, arXiv 2601.07568). An answer's loss is the
sum over its view and the complement. Each view is normalised by itself (dParallel: a batch together), so that the loss
does not depend on how a step is divided.

Shape letters: A answers · N = views of a batch · M tokens asked for · G tokens written · B those of a block · D width ·
V vocabulary · C rows of one chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from illada import rng
from illada.diffusion.loss import LOGITS_BYTES
from illada.post_training.bounds import AnswersObjective, View, Views
from illada.post_training.options import DistillSection
from illada.post_training.shared import Loss

BLOCK, HIDDEN = 23, 24
"""Random streams: which block of an answer is seen, and what is hidden of it."""


@dataclass(frozen=True)
class Written:
    """An answer and the order in which it was written."""

    ids: NDArray[np.int64]
    """Prompt and answer, up to the end of its last block."""
    prompt: int
    """Tokens of the prompt."""
    order_G: NDArray[np.int64]
    """The step that decided each token of the answer; -1 where the answer ended before one did."""
    tail: int
    """Masks behind a block that is being written, at most up to here, counted from the answer's beginning; 0 if there
    are none (`later_masks`)."""

    def block(self, length: int, key: Sequence[int]) -> slice:
        """Return which block of the answer is seen, as places in the answer: one with a token that was decided."""
        starts = range(0, len(self.order_G), length)
        blocks = [
            slice(at, min(at + length, len(self.order_G))) for at in starts if self.order_G[at : at + length].max() >= 0
        ]
        return blocks[int(rng.uniform_int(key[0], BLOCK, *key[1:]) * len(blocks))]

    def views(self, section: DistillSection, block: slice, ratio: float, key: Sequence[int]) -> list[View]:
        """Return the answer while a block is written: a share of it hidden, then the rest, if complements are wanted.

        Earlier blocks are seen, later ones are not there, or masks, as in decoding. What was never decided is hidden
        and not asked for.

        Args:
            section: how to hide.
            block: of the answer.
            ratio: share of its decided tokens that is hidden, of which at least one is.
            key: of the random numbers.
        """
        order_B = self.order_G[block]
        decided_B = order_B >= 0
        draws_B = rng.uniform(key[0], HIDDEN, *key[1:], torch.arange(len(order_B))).numpy()
        # Ties of the order, as tokens decided in one step, fall by chance.
        first_to_last = np.lexsort((draws_B, order_B if section.masks == "order" else np.zeros_like(order_B)))
        decided = first_to_last[decided_B[first_to_last]]
        count = max(1, round(ratio * len(decided)))
        ends = decided[len(decided) - count :], decided[: len(decided) - count]
        found: list[View] = []
        end = self.prompt + max(block.stop, self.tail)
        ids = np.zeros(end, dtype=np.int64)
        ids[: min(end, len(self.ids))] = self.ids[:end]
        for asked in ends if section.complementary else ends[:1]:
            if len(asked):
                asked_S = np.zeros(end, dtype=np.bool_)
                asked_S[self.prompt + block.start + asked] = True
                hidden_S = asked_S.copy()
                hidden_S[self.prompt : self.prompt + block.stop] |= self.order_G[: block.stop] < 0
                hidden_S[self.prompt + block.stop :] = True
                found.append(View(ids, hidden_S, asked_S, 1.0, len(found)))
        return found


class Certainty(NamedTuple):
    """What the model says of the tokens that are asked for."""

    log_p_M: Tensor
    """Log-probabilities in nats, with gradient, fp32."""
    entropy_M: Tensor
    """Entropies in nats, with gradient, fp32."""
    right_M: Tensor
    """Whether no token is more probable, fp32."""


class CertaintyObjective(AnswersObjective):
    """Gives log-probabilities, entropies and what is predicted right."""

    temperature = 0.5
    """Of the entropies."""

    def ask(self, hidden_MD: Tensor, target_M: Tensor) -> Any:
        """Return a `Certainty`; logits exist for a chunk of rows at a time, and once more in the backward pass."""
        head_VD, mask_id = self.model.lm_head.weight, self.model.config.mask_id
        rows = max(64, LOGITS_BYTES // (4 * head_VD.shape[0]))

        def of(hidden_CD: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits_CV = (hidden_CD @ head_VD.T).float()
            if mask_id is not None:  # MASK is no token of a text; not -inf, of which the entropy has no gradient
                logits_CV = logits_CV.index_fill(1, torch.tensor([mask_id], device=logits_CV.device), -1e9)
            log_p_C = logits_CV.log_softmax(-1).gather(1, target_C[:, None])[:, 0]
            log_q_CV = (logits_CV / self.temperature).log_softmax(-1)
            entropy_C = -(log_q_CV.exp() * log_q_CV).sum(-1)
            return log_p_C, entropy_C, (logits_CV.argmax(-1) == target_C).float()

        parts = [
            checkpoint(of, hidden_CD, target_C, use_reentrant=False)
            for hidden_CD, target_C in zip(hidden_MD.split(rows), target_M.split(rows), strict=True)
        ]
        return Certainty(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def certainty_loss(batch: Views, said: Certainty, entropy_weight: float, weight_N: Tensor, share_N: Tensor) -> Loss:
    """Return the loss of a batch of views; its figures are means over views.

    They are cross_entropy and entropy (of what is predicted right), in nats, and right (a share of what is asked for).

    Args:
        batch: the views, each an answer of its own in `Views`.
        said: what the model says of them.
        entropy_weight: w.
        weight_N: weights of the views in the loss of the step.
        share_N: their weights in the figures.
    """
    at_M = batch.asked_T.nonzero()[:, 0]
    device = said.log_p_M.device
    view_M, weight_N = batch.answer_T[at_M].to(device), weight_N.to(device)

    def mean(values_M: Tensor, counted_M: Tensor) -> Tensor:
        zeros_N = values_M.new_zeros(len(weight_N))
        sums_N = zeros_N.index_add(0, view_M, values_M * counted_M)
        return sums_N / zeros_N.index_add(0, view_M, counted_M).clamp_min(1)

    every_M = torch.ones_like(said.right_M)
    means = {
        "cross_entropy": mean(-said.log_p_M, every_M),
        "entropy": mean(said.entropy_M, said.right_M),
        "right": mean(said.right_M, every_M),
    }
    loss = (weight_N * (means["cross_entropy"] + entropy_weight * means["entropy"])).sum()
    shares_N = share_N.to(device)
    return Loss(loss, {name: (shares_N * value_N.detach()).sum() for name, value_N in means.items()})
