"""The bound on an answer's likelihood with a gradient: the quantity that every loss of post-training is made of.

    B(y | x) = sum over views of weight · sum over masked i of log p(y_i | view, x)

`elbo` estimates the same without a gradient.

Shape letters: T packed tokens · M those asked for · A answers · N views of one answer · S its tokens, the prompt's
included · L its own · D width · V vocabulary · C rows of one chunk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from illada import rng
from illada.diffusion.loss import LOGITS_BYTES
from illada.model.attention import Packing
from illada.model.transformer import IlladaForMaskedLM
from illada.scoring.layout import Pair
from illada.scoring.likelihood import likelihood_scores, views
from illada.training.parallel import Objective

ANSWER, PROMPT = 20, 21
"""Random streams: the masks of every answer, and what is hidden of its prompt; scoring's lie below."""

Masks = Callable[[int, int, int, bool], tuple[NDArray[np.bool_], NDArray[np.float64]]]
"""`views` or a function that takes and returns the same."""


def noise_seed(seed: int, number: int, epoch: int) -> int:
    """Return the seed of the masks of one answer, or of all answers that are compared, in an epoch."""
    return int(rng.bits(seed, ANSWER, number, epoch))


def elbo(
    model: IlladaForMaskedLM,
    pairs: Sequence[Pair],
    samples: int = 8,
    seed: int = 0,
    complementary: bool = False,
    max_batch_tokens: int = 16_384,
) -> list[float]:
    """Return an estimate of the bound B(answer | context) in nats for each (context ids, answer ids).

    Masks are a function of seed, sample and place in the answer alone: two models, or two answers of one length, are
    compared under the same ones (`scoring.likelihood.masked_tokens`). The estimate is without bias, and
    `likelihood_scores` is the same.

    Args:
        model: the network; of a causal one the bound is the likelihood itself.
        pairs: contexts and answers; an answer may end with its EOS.
        samples: noise levels, with one mask each.
        seed: of the masks.
        complementary: also see each answer under the complement of every mask: twice the passes and less noise, but not
            less than as many samples without.
        max_batch_tokens: most positions of one forward pass.

    Raises:
        IlladaError: as `likelihood_scores` does.
    """
    return likelihood_scores(model, pairs, samples, seed, (), max_batch_tokens, complementary)


@dataclass(frozen=True)
class Answer:
    """A prompt with an answer, and the noise under which the answer is seen."""

    ids: NDArray[np.int64]
    """Prompt and answer."""
    prompt: int
    """Tokens of the prompt."""
    seed: int
    """Of its masks (`noise_seed`)."""

    @property
    def length(self) -> int:
        """L, the answer's tokens."""
        return len(self.ids) - self.prompt


class View(NamedTuple):
    """An answer behind its prompt, as the model sees it."""

    ids: NDArray[np.int64]
    hidden: NDArray[np.bool_]
    """What it does not see."""
    asked: NDArray[np.bool_]
    """What it is asked for."""
    weight: float
    """Of each log-probability in the answer's sum."""
    answer: int
    """Number of the answer."""


@dataclass(frozen=True)
class Views:
    """Answers under noise, packed for one forward pass, on the host."""

    clean_T: Tensor
    """Token ids, int64."""
    hidden_T: Tensor
    """What the model does not see, bool."""
    asked_T: Tensor
    """What it is asked for: the hidden tokens of the answers, bool."""
    weight_T: Tensor
    """Weight of each log-probability in its answer's sum, fp32; meaningful where asked for."""
    answer_T: Tensor
    """Number of the answer, int64."""
    packing: Packing
    lengths_A: Tensor
    """Tokens of each answer, fp32."""

    @classmethod
    def of(
        cls, answers: Sequence[Answer], samples: int, complementary: bool, masks: Masks = views, hide: float = 0.0
    ) -> "Views":
        """Mask and pack answers; all views of one lie beside each other.

        Args:
            answers: the answers.
            samples: noise levels of each.
            complementary: with complements.
            masks: what the views of an answer mask, and their weights.
            hide: chance that a token of the prompt is hidden too.
        """
        rows = []
        for place, answer in enumerate(answers):
            masked_NL, weight_N = masks(answer.length, samples, answer.seed, complementary)
            asked_NS = np.zeros((len(masked_NL), len(answer.ids)), dtype=np.bool_)
            asked_NS[:, answer.prompt :] = masked_NL
            hidden_NS = asked_NS.copy()
            if hide:
                draws = rng.uniform(
                    answer.seed, PROMPT, torch.arange(len(masked_NL))[:, None], torch.arange(answer.prompt)
                )
                hidden_NS[:, : answer.prompt] = (draws < hide).numpy()
            rows += [
                View(answer.ids, hidden_S, asked_S, weight, place)
                for hidden_S, asked_S, weight in zip(hidden_NS, asked_NS, weight_N.tolist(), strict=True)
            ]
        return cls.pack(rows, [answer.length for answer in answers])

    @classmethod
    def pack(cls, rows: Sequence[View], lengths: Sequence[int]) -> "Views":
        """Pack views for one pass.

        Args:
            rows: the views.
            lengths: tokens of each answer.
        """
        sizes = [len(row.ids) for row in rows]
        clean_T, hidden_T, asked_T = (
            torch.from_numpy(np.concatenate([getattr(row, name) for row in rows]))
            for name in ("ids", "hidden", "asked")
        )
        repeats = torch.tensor(sizes)
        weight_T = torch.tensor([row.weight for row in rows], dtype=torch.float32).repeat_interleave(repeats)
        answer_T = torch.tensor([row.answer for row in rows]).repeat_interleave(repeats)
        lengths_A = torch.tensor(lengths, dtype=torch.float32)
        return cls(clean_T, hidden_T, asked_T, weight_T, answer_T, Packing(tuple(sizes)), lengths_A)

    def sums(self, log_p_M: Tensor) -> Tensor:
        """Return the weighted sum of the log-probabilities of each answer [A]: its bound, under `views`."""
        at_M = self.asked_T.nonzero()[:, 0]
        weight_M, answer_M = (column[at_M].to(log_p_M.device) for column in (self.weight_T, self.answer_T))
        return log_p_M.new_zeros(len(self.lengths_A)).index_add(0, answer_M, weight_M * log_p_M)


class AnswersObjective(Objective):
    """Gives the log-probabilities of answers under noise, of which a loss is made."""

    def forward(self, batch: Views) -> Any:  # type: ignore[override]
        """Return log p of each token that is asked for, in nats, fp32 [M], or what else `ask` returns."""
        half = self.dtype != "fp32"
        clean_T, hidden_T, asked_T = (
            tensor.to(self.device, non_blocking=True) for tensor in (batch.clean_T, batch.hidden_T, batch.asked_T)
        )
        at_M = asked_T.nonzero()[:, 0]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            noisy_T = clean_T.masked_fill(hidden_T, self.model.config.mask_id)
            hidden_TD = self.model.model.packed(noisy_T, batch.packing)
            return self.ask(hidden_TD[at_M], clean_T[at_M])

    def ask(self, hidden_MD: Tensor, target_M: Tensor) -> Any:
        """Return what the head says of the tokens that are asked for."""
        return log_probabilities(hidden_MD, self.model.lm_head.weight, target_M, self.model.config.mask_id)


def log_probabilities(hidden_MD: Tensor, head_VD: Tensor, target_M: Tensor, mask_id: int | None) -> Tensor:
    """Return log p(target) through a linear head, fp32 [M], without ever holding positions x vocabulary.

    The softmax leaves out MASK, which is no token of a text, as scoring does; `mask_id` None leaves it in, as the
    authors of post-training methods do. Under autocast the products run in its dtype, as in `chunked_cross_entropy`.
    """
    device = hidden_MD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_MD.dtype
    with torch.autocast(device, enabled=False):
        return _LogProbabilities.apply(hidden_MD, head_VD, target_M, mask_id, dtype)


class _LogProbabilities(torch.autograd.Function):
    """Computes the logits of a chunk of rows twice, forwards and backwards, and keeps none."""

    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, head_VD: Tensor, target_M: Tensor, mask_id: int | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(hidden_MD, head_VD, target_M)
        ctx.mask_id, ctx.dtype = mask_id, dtype
        head = head_VD.to(dtype)
        log_p = [
            _logits(hidden_CD, head, mask_id).log_softmax(-1).gather(1, target_C[:, None])[:, 0]
            for hidden_CD, target_C in zip(hidden_MD.split(_rows(head)), target_M.split(_rows(head)), strict=True)
        ]
        return torch.cat(log_p) if log_p else hidden_MD.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        hidden_MD, head_VD, target_M = ctx.saved_tensors
        head = head_VD.to(ctx.dtype)
        grad_hidden_MD, grad_head_VD = torch.empty_like(hidden_MD), torch.zeros_like(head_VD)
        for start in range(0, hidden_MD.shape[0], _rows(head)):
            rows = slice(start, start + _rows(head))
            slope_CV = _logits(hidden_MD[rows], head, ctx.mask_id).softmax(-1).neg_()  # d log p(y) / d logits
            ones_C1 = torch.ones_like(target_M[rows, None], dtype=slope_CV.dtype)
            slope_CV.scatter_add_(1, target_M[rows, None], ones_C1).mul_(grad_outputs[0][rows, None])
            slope_CV = slope_CV.to(ctx.dtype)
            grad_hidden_MD[rows] = (slope_CV @ head).to(hidden_MD.dtype)
            grad_head_VD += slope_CV.T @ hidden_MD[rows].to(ctx.dtype)
        return grad_hidden_MD, grad_head_VD, None, None, None


def _rows(head_VD: Tensor) -> int:
    return max(64, LOGITS_BYTES // (4 * head_VD.shape[0]))


def _logits(hidden_CD: Tensor, head_VD: Tensor, mask_id: int | None) -> Tensor:
    logits_CV = (hidden_CD.to(head_VD.dtype) @ head_VD.T).float()
    if mask_id is not None:
        logits_CV[:, mask_id] = -torch.inf
    return logits_CV
