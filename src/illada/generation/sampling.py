"""From final hidden states to proposals: the head, what changes its logits, and how a token is chosen (spec §5).

Shape letters: M masked positions of the active blocks of some rows · C of them in one chunk, or ids in one piece of the
vocabulary · D width · V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from illada import rng
from illada.generation.request import Request
from illada.model import IlladaForMaskedLM

GUMBEL = 16
"""Stream of sampling; the streams of training lie below 16."""

IN_CACHE = 2**19
"""Logits that the caches of a CPU hold: larger pieces of the vocabulary are slower there (docs/log.md)."""

NARROWEST = 1024
"""Fewest ids of a piece of the vocabulary, unless the limit on logits or the vocabulary is smaller."""

LEAST = torch.finfo(torch.float32).min

Columns = tuple[Tensor, Tensor, Tensor]
"""Proposed ids, log confidences and scores [M]."""


def is_plain(row: Request) -> bool:
    """Return whether this step of a row wants the most probable token, its probability and nothing else."""
    s = row.settings
    changed = s.temperature or s.guidance_scale or s.repetition_penalty != 1 or row.boost() is not None
    return not changed and s.remasking != "margin" and s.entropy_bound is None


def most_probable(model: IlladaForMaskedLM, hidden_MD: Tensor, logits_held: int) -> Columns:
    """Propose the best id but MASK; its softmax probability is the score.

    The vocabulary passes by in pieces; of each only the best logit and the sum of exponentials stay, so no row of
    logits ever exists as a whole.
    """
    mask_id, vocabulary = model.config.mask_token_id, model.config.vocab_size
    narrowest = min(vocabulary, NARROWEST) if model.head_is_divisible else vocabulary
    if len(hidden_MD) > (at_once := max(1, logits_held // narrowest)):
        return _joined([most_probable(model, part_CD, logits_held) for part_CD in hidden_MD.split(at_once)])
    held = logits_held if hidden_MD.is_cuda else min(logits_held, max(IN_CACHE, narrowest * len(hidden_MD)))
    pieces = -(-vocabulary // max(1, held // len(hidden_MD)))
    bests, ids, sums = [], [], []
    mask_logit_M = hidden_MD.new_full((len(hidden_MD),), -torch.inf, dtype=torch.float32)
    for first, logits_MC in model.head_pieces(hidden_MD, pieces):
        if first <= mask_id < first + logits_MC.shape[-1]:
            mask_logit_M = logits_MC[:, mask_id - first].clone()
            # Only the choice excludes MASK; the probabilities are the model's own.
            logits_MC[:, mask_id - first] = -torch.inf
        best_M, id_M = logits_MC.max(-1)
        bests.append(best_M)
        ids.append(id_M + first)
        # Of a piece that holds MASK alone the best is -inf, which must not be taken from itself.
        sums.append(logits_MC.sub_(best_M[:, None].clamp_min(LEAST)).exp_().sum(-1))
    best_M, piece_M = torch.stack(bests).max(0)
    id_M = torch.stack(ids).gather(0, piece_M[None])[0]
    most_M = torch.maximum(best_M, mask_logit_M)
    total_M = (torch.stack(sums) * (torch.stack(bests) - most_M).exp()).sum(0) + (mask_logit_M - most_M).exp()
    log_prob_M = best_M - most_M - total_M.log()
    return id_M, log_prob_M, log_prob_M.exp()


def propose(
    model: IlladaForMaskedLM,
    rows: Sequence[Request],
    open_positions: Sequence[NDArray[np.int64]],
    hidden_MD: Tensor,
    logits_held: int,
) -> Columns:
    """Propose under everything the settings ask for; `hidden_MD` holds each row's states, then its second branch's.

    Guidance, the repetition penalty and the boost, in this order, make the logits; the penalty sees guided ones as in
    transformers, and the boost keeps its full size (ours). The proposal is the best id but MASK; at a temperature above
    0 it is drawn: logits over the temperature, then top-k, then top-p, then Gumbel noise in float64.

    The confidence is the proposal's softmax probability under the logits, over the full vocabulary: what changes the
    logits counts, what only changes the draw (temperature, top-k, top-p, noise) does not. The score is what the row's
    unmasking rule looks at: the confidence; under "margin" the probability of the best id but MASK less that of the
    second; under an entropy bound the entropy in nats of the distribution over all ids but MASK (ours: a model certain
    of MASK is not certain of any proposal).
    """
    extras = _Extras(rows, open_positions)

    def head(at_C: NDArray[np.int64]) -> Tensor:
        return model.lm_head(hidden_MD[_on(at_C, hidden_MD)]).float()

    mask_id = model.config.mask_token_id
    chunk = max(1, logits_held // model.config.vocab_size)
    parts: list[Columns] = []
    for first in range(0, len(extras.at_M), chunk):
        at_C = extras.at_M[first : first + chunk]
        logits_CV = head(at_C)
        extras.guide(logits_CV, head, at_C, first)
        extras.penalise(logits_CV, first)
        extras.favour(logits_CV, first)
        log_sum_C = logits_CV.logsumexp(-1)
        logits_CV[:, mask_id] = -torch.inf  # only for the choice, as above
        proposal_C = extras.sample(logits_CV, first)
        log_prob_C = logits_CV.gather(1, proposal_C[:, None])[:, 0] - log_sum_C
        parts.append((proposal_C, log_prob_C, extras.score(logits_CV, log_sum_C, log_prob_C, first)))
    return _joined(parts)


def _joined(parts: Sequence[Columns]) -> Columns:
    ids, log_probs, scores = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(log_probs), torch.cat(scores)


def _on(values: NDArray[Any], like: Tensor) -> Tensor:
    """Move host values to where `like` is."""
    return torch.from_numpy(values).to(like.device)


class _Extras:
    """What each of the M positions asks for beyond its plain logits."""

    def __init__(self, rows: Sequence[Request], open_positions: Sequence[NDArray[np.int64]]):
        counts = [len(position_M) for position_M in open_positions]
        ends = np.cumsum(counts).tolist()

        def spread(values: Sequence[int] | Sequence[float]) -> NDArray[Any]:
            return np.repeat(np.array(values), counts)

        self.scale_M = spread([row.settings.guidance_scale for row in rows])
        starts = np.cumsum([0, *(row.passes * count for row, count in zip(rows, counts, strict=True))])[:-1]
        self.at_M = np.concatenate([start + np.arange(count) for start, count in zip(starts, counts, strict=True)])
        self.to_second_M = spread(counts)
        self.temperature_M = spread([row.settings.temperature for row in rows])
        self.seed_M = spread([row.settings.seed for row in rows])
        self.step_M = spread([row.answer_step for row in rows])
        self.position_M = np.concatenate(open_positions)
        self.top_k_M = spread([row.settings.top_k or 1 << 62 for row in rows])
        # No rounded sum of probabilities reaches infinity, so 1 keeps every id.
        self.top_p_M = spread([row.settings.top_p if row.settings.top_p < 1 else np.inf for row in rows])
        self.margin_M = spread([row.settings.remasking == "margin" for row in rows])
        self.entropy_M = spread([row.settings.entropy_bound is not None for row in rows])
        self.penalties = [
            (end - count, end, row.visible_ids(), row.settings.repetition_penalty)
            for row, count, end in zip(rows, counts, ends, strict=True)
            if row.settings.repetition_penalty != 1
        ]
        # A row's left-most open position is the first of its own.
        boosts = [(end - count, row.boost()) for row, count, end in zip(rows, counts, ends, strict=True)]
        self.boosts = [(at, *boost) for at, boost in boosts if boost is not None]

    def guide(
        self, logits_CV: Tensor, head: Callable[[NDArray[np.int64]], Tensor], at_C: NDArray[np.int64], first: int
    ) -> None:
        """Turn logits c into u + (w + 1)(c - u), in place, where u are those of the second branch."""
        scale_C = self.scale_M[first : first + len(at_C)]
        guided = np.flatnonzero(scale_C)
        if guided.size:
            rows = _on(guided, logits_CV)
            free = head(at_C[guided] + self.to_second_M[first + guided])
            scale = _on(scale_C[guided], logits_CV).float()[:, None]
            logits_CV[rows] = free + (scale + 1) * (logits_CV[rows] - free)

    def penalise(self, logits_CV: Tensor, first: int) -> None:
        """Divide positive logits of ids the row shows by its penalty and multiply negative ones, in place."""
        for start, end, ids, penalty in self.penalties:
            own_CV = logits_CV[max(0, start - first) : max(0, end - first)]
            if len(own_CV):
                seen_V = _on(ids, logits_CV)
                x = own_CV[:, seen_V]
                own_CV[:, seen_V] = torch.where(x < 0, x * penalty, x / penalty)

    def favour(self, logits_CV: Tensor, first: int) -> None:
        """Add the boosts of `</think>`, in place."""
        here = [(at - first, i, amount) for at, i, amount in self.boosts if first <= at < first + len(logits_CV)]
        if here:
            at, ids, amounts = (torch.tensor(column, device=logits_CV.device) for column in zip(*here, strict=True))
            logits_CV[at, ids] += amounts.to(logits_CV)

    def sample(self, logits_CV: Tensor, first: int) -> Tensor:
        """Return the proposals [C]: argmax, of logit - T log(-log u) over the ids kept where T is above 0."""
        proposal_C = logits_CV.argmax(-1)
        chunk = slice(first, first + len(logits_CV))
        warm = np.flatnonzero(self.temperature_M[chunk])
        if warm.size:
            per_row = (self.temperature_M, self.seed_M, self.step_M, self.position_M)
            temperature, seed, step, position = (_on(x_M[chunk][warm, None], logits_CV) for x_M in per_row)
            ids_V = torch.arange(logits_CV.shape[-1], device=logits_CV.device)
            # In place: in float64 these are the largest tensors of a step.
            noise_CV = rng.uniform(seed, GUMBEL, step, position, ids_V, dtype=torch.float64)
            noise_CV.log_().neg_().log_().mul_(temperature)
            rows = _on(warm, logits_CV)
            choice_CV = logits_CV[rows].double()
            least_C = self.least(choice_CV, temperature, first + warm)
            if least_C is not None:
                choice_CV.masked_fill_(choice_CV < least_C, -torch.inf)
            proposal_C[rows] = choice_CV.sub_(noise_CV).argmax(-1)
        return proposal_C

    def least(self, logits_CV: Tensor, temperature_C: Tensor, at_C: NDArray[np.intp]) -> Tensor | None:
        """Return the least logit [C, 1] that top-k and top-p keep at each of M's positions at_C; None: all keep all."""
        top_k, top_p = np.minimum(self.top_k_M[at_C], logits_CV.shape[-1]), self.top_p_M[at_C]
        if (top_k == logits_CV.shape[-1]).all() and np.isinf(top_p).all():
            return None
        best_CK = logits_CV.topk(int(top_k.max())).values
        kept_CK = torch.arange(best_CK.shape[-1], device=best_CK.device) < _on(top_k[:, None], best_CK)
        # From the largest down, so that no quotient overflows at a low temperature.
        weight_CK = ((best_CK - best_CK[:, :1]) / temperature_C).exp() * kept_CK
        above_CK = weight_CK.cumsum(-1) - weight_CK
        kept_CK &= above_CK < _on(top_p[:, None], best_CK) * weight_CK.sum(-1, keepdim=True)
        return best_CK.masked_fill(~kept_CK, torch.inf).amin(-1, keepdim=True)

    def score(self, logits_CV: Tensor, log_sum_C: Tensor, log_prob_C: Tensor, first: int) -> Tensor:
        """Return what unmasking looks at [C]: the confidence, or the margin or entropy where a row asks for it."""
        score_C = log_prob_C.exp()
        chunk = slice(first, first + len(logits_CV))
        if (margin := np.flatnonzero(self.margin_M[chunk])).size:
            rows = _on(margin, logits_CV)
            best_C2 = (logits_CV[rows].topk(2).values - log_sum_C[rows, None]).exp()
            score_C[rows] = best_C2[:, 0] - best_C2[:, 1]
        if (entropy := np.flatnonzero(self.entropy_M[chunk])).size:
            rows = _on(entropy, logits_CV)
            score_C[rows] = torch.special.entr(logits_CV[rows].softmax(-1)).sum(-1)
        return score_C
