"""From final hidden states to proposals: the head, what changes its logits, and how a token is chosen (spec §5).

Rows that want the most probable token go through `most_probable`, all others through `propose`.

Shape letters: M masked positions of the active blocks of some rows · C of them in one chunk, or ids in one piece of the
vocabulary · K best ids · D width · V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from illada import rng
from illada.generation.request import Request
from illada.generation.settings import GenerationSettings
from illada.model.transformer import IlladaForMaskedLM

GUMBEL = 16
"""Stream of sampling; the streams of training lie below 16."""

IN_CACHE = 2**19
"""Logits that fit into the caches of a CPU: larger pieces of the vocabulary are slower there (docs/log.md)."""

NARROWEST = 1024
"""Fewest ids of a piece of the vocabulary, unless the limit on logits or the vocabulary is smaller."""

FAR = 1e6
"""How far below the others, at the temperature, lies what top-k, top-p and min-p cut where a form has the last word."""

LEAST = torch.finfo(torch.float32).min

Columns = tuple[Tensor, Tensor, Tensor]
"""Proposed ids, log confidences and scores [M]."""


def is_plain(row: Request) -> bool:
    """Return whether this step of a row wants the most probable token, its probability and nothing else."""
    s = row.settings
    changed = s.temperature or s.guidance_scale or is_shifted(s) or row.alternatives or row.boost() is not None
    return not changed and row.form is None and s.repetition_penalty == 1 and statistic_of(s) is None


def is_shifted(settings: GenerationSettings) -> bool:
    """Return whether something is added to logits of ids, wherever they may come."""
    return bool(settings.presence_penalty or settings.frequency_penalty or settings.logit_bias)


def margin(logits_CV: Tensor, log_sum_C: Tensor) -> Tensor:
    """Return by how much the probability of the best id leads that of the second [C]; the logit of MASK is -inf."""
    best_C2 = (logits_CV.topk(2).values - log_sum_C[:, None]).exp()
    return best_C2[:, 0] - best_C2[:, 1]


def entropy(logits_CV: Tensor, _: Tensor) -> Tensor:
    """Return the entropy in nats of the distribution over all ids but MASK [C], whose logit is -inf."""
    return torch.special.entr(logits_CV.softmax(-1)).sum(-1)


def statistic_of(settings: GenerationSettings) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return what unmasking looks at, as a function of logits and the log of their sum; None for the confidence."""
    if settings.remasking == "margin":
        return margin
    return None if settings.entropy_bound is None else entropy


def most_probable(model: IlladaForMaskedLM, hidden_MD: Tensor, logits_held: int) -> Columns:
    """Propose at each position the most probable id other than MASK; its softmax probability is the score.

    The head runs over the vocabulary in pieces. Only the best logit and the sum of exponentials of each piece stay, so
    the logits of a position never exist as a whole.
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
        if mask_id is not None and first <= mask_id < first + logits_MC.shape[-1]:
            mask_logit_M = logits_MC[:, mask_id - first].clone()
            # Only the choice excludes MASK; the probabilities are the model's own.
            logits_MC[:, mask_id - first] = -torch.inf
        best_M, id_M = logits_MC.max(-1)
        bests.append(best_M)
        ids.append(id_M + first)
        # The best logit of a piece that holds MASK alone is -inf, and -inf less -inf is no number.
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
) -> tuple[Tensor, ...]:
    """Propose under everything the settings ask for; `hidden_MD` holds each row's states, then its second branch's.

    Guidance, the repetition penalty, what is added (the other penalties and biases) and the boost, in this order, make
    the logits; the repetition penalty sees guided ones as in transformers, and what follows keeps its full size (ours).
    The proposal is the best id other than MASK; at a temperature above 0 it is drawn: logits over the temperature, then
    top-k, then top-p, then min-p, then Gumbel noise in float64. After the columns come the best ids and the bits of
    their log-probabilities [M, 2, K], int32: as many as the row that wants most alternatives.

    The confidence is the proposal's softmax probability under the logits, over the full vocabulary: what changes the
    logits counts, what only changes the draw (temperature, top-k, top-p, noise) does not. The score is what the row's
    unmasking rule looks at: the confidence; under "margin" the probability of the best id other than MASK less the
    probability of the second; under an entropy bound the entropy in nats of the distribution over all ids other than
    MASK (ours: a model certain of MASK is not certain of any proposal).
    """
    counts = np.array([len(position_M) for position_M in open_positions])
    row_M = np.repeat(np.arange(len(rows)), counts)
    position_M = np.concatenate(open_positions)
    index_M = np.concatenate([np.arange(count) for count in counts])
    starts = np.cumsum([0, *(row.passes * count for row, count in zip(rows, counts, strict=True))])
    mask_id = model.config.mask_token_id
    size = max(1, logits_held // model.config.vocab_size)
    parts: list[tuple[Tensor, ...]] = []
    kept = min(model.config.vocab_size, max(row.alternatives for row in rows))
    # A row with a form stands last and is looked at as a whole.
    free = int(counts[[row.form is None for row in rows]].sum())
    edges = sorted({*range(0, free, size), *np.cumsum([0, *counts]).tolist()[int(np.sum(counts.cumsum() <= free)) :]})
    for first, last in pairwise(edges):
        row_C, position_C, index_C = (x_M[first:last] for x_M in (row_M, position_M, index_M))
        state_C = starts[row_C] + index_C
        second_C = state_C + counts[row_C]
        own_rows = rows[row_C[0] : row_C[-1] + 1]
        chunk = _Chunk(own_rows, row_C - row_C[0], position_C, index_C == 0, state_C, second_C)
        logits_CV = chunk.logits(model, hidden_MD)
        chunk.penalise(logits_CV)
        chunk.boost(logits_CV)
        log_sum_C = logits_CV.logsumexp(-1)
        if mask_id is not None:
            logits_CV[:, mask_id] = -torch.inf  # only for the choice, as above
        proposal_C = chunk.sample(logits_CV)
        log_prob_C = logits_CV.gather(1, proposal_C[:, None])[:, 0] - log_sum_C
        best, best_ids = logits_CV.topk(kept)
        best_C2K = torch.stack((best_ids.int(), (best - log_sum_C[:, None]).view(torch.int32)), 1)
        parts.append((proposal_C, log_prob_C, chunk.score(logits_CV, log_sum_C, log_prob_C), best_C2K))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _joined(parts: Sequence[Columns]) -> Columns:
    ids, log_probs, scores = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(log_probs), torch.cat(scores)


def _on(values: NDArray[Any], like: Tensor) -> Tensor:
    """Move host values to the device of `like`."""
    return torch.from_numpy(values).to(like.device)


@dataclass(frozen=True)
class _Chunk:
    """Masked positions whose logits exist at the same time, and what their rows ask for."""

    rows: Sequence[Request]
    row_C: NDArray[np.int64]
    """Index of each position's row."""
    position_C: NDArray[np.int64]
    """In the answer."""
    leftmost_C: NDArray[np.bool_]
    """Whether it is the left-most open position of its row."""
    state_C: NDArray[np.int64]
    """Where among the hidden states the position's own is."""
    second_C: NDArray[np.int64]
    """Where the state of the second branch is, under guidance."""

    def spread(self, value: Callable[[Request], float]) -> NDArray[Any]:
        """Return a value of each position's row [C]."""
        return np.array([value(row) for row in self.rows])[self.row_C]

    def logits(self, model: IlladaForMaskedLM, hidden_MD: Tensor) -> Tensor:
        """Return the logits c [C, V], or u + (w + 1)(c - u) under guidance, where u are those of the second branch."""

        def head(state_C: NDArray[np.int64]) -> Tensor:
            return model.lm_head(hidden_MD[_on(state_C, hidden_MD)]).float()

        logits_CV = head(self.state_C)
        scale_C = self.spread(lambda row: row.settings.guidance_scale)
        guided = np.flatnonzero(scale_C)
        if guided.size:
            at = _on(guided, logits_CV)
            free = head(self.second_C[guided])
            scale = _on(scale_C[guided, None], logits_CV).float()
            logits_CV[at] = free + (scale + 1) * (logits_CV[at] - free)
        return logits_CV

    def penalise(self, logits_CV: Tensor) -> None:
        """Apply each row's repetition penalty, then subtract its other penalties and add its biases, in place."""
        for r, row in enumerate(self.rows):
            own_CV = logits_CV[slice(*np.searchsorted(self.row_C, (r, r + 1)))]
            if (penalty := row.settings.repetition_penalty) != 1:
                seen_V = _on(row.visible_ids(), logits_CV)
                x = own_CV[:, seen_V]
                own_CV[:, seen_V] = torch.where(x < 0, x * penalty, x / penalty)
            if is_shifted(row.settings):
                own_CV += _on(row.shift(logits_CV.shape[-1]), logits_CV)

    def boost(self, logits_CV: Tensor) -> None:
        """Add the boosts of `</think>` to the left-most open positions, in place."""
        leftmost = np.flatnonzero(self.leftmost_C).tolist()
        boosts = [(at, *boost) for at in leftmost if (boost := self.rows[self.row_C[at]].boost()) is not None]
        if boosts:
            at, ids, amounts = (torch.tensor(column, device=logits_CV.device) for column in zip(*boosts, strict=True))
            logits_CV[at, ids] += amounts.to(logits_CV)

    def sample(self, logits_CV: Tensor) -> Tensor:
        """Return the proposals [C]: argmax, of logit - T log(-log u) over the ids kept where T is above 0.

        Those of a row with a form are the best that match it together.
        """
        form = self.rows[0].form
        temperature_C = self.spread(lambda row: row.settings.temperature)
        warm = np.flatnonzero(temperature_C)
        if form is not None and not warm.size:
            return form.choose(self.rows[0], logits_CV, logits_CV, 0.0)
        all_warm = len(warm) == len(logits_CV)
        proposal_C = torch.zeros_like(logits_CV[:, 0], dtype=torch.int64) if all_warm else logits_CV.argmax(-1)
        if warm.size:
            seed_C, step_C = self.spread(lambda row: row.settings.seed), self.spread(lambda row: row.answer_step)
            columns = (temperature_C, seed_C, step_C, self.position_C)
            temperature, seed, step, position = (_on(x_C[warm, None], logits_CV) for x_C in columns)
            ids_V = torch.arange(logits_CV.shape[-1], device=logits_CV.device)
            # In place: in float64 these are the largest tensors of a step.
            noise_CV = rng.uniform(seed, GUMBEL, step, position, ids_V, dtype=torch.float64)
            noise_CV.log_().neg_().log_().mul_(temperature)
            at = _on(warm, logits_CV)
            choice_CV = logits_CV[at].double()

            def cut(least_C1: Tensor) -> None:
                if form is None:
                    choice_CV.masked_fill_(choice_CV < least_C1, -torch.inf)
                else:  # what is cut may be all that the form allows
                    choice_CV.sub_((choice_CV < least_C1) * FAR * temperature)

            if (least_C1 := self.least_kept(choice_CV, temperature, warm)) is not None:
                cut(least_C1)
            min_p_C = self.spread(lambda row: row.settings.min_p)[warm]
            if min_p_C.any():
                cut(choice_CV.amax(-1, True) + temperature * _on(min_p_C[:, None], choice_CV).log())
            if form is not None:
                weight_CV = choice_CV.float().div_(temperature_C[0])
                return form.choose(self.rows[0], weight_CV, choice_CV.sub_(noise_CV), float(temperature_C[0]))
            proposal_C[at] = choice_CV.sub_(noise_CV).argmax(-1)
        return proposal_C

    def least_kept(self, logits_CV: Tensor, temperature_C1: Tensor, at_C: NDArray[np.intp]) -> Tensor | None:
        """Return the least logit [C, 1] that top-k and top-p keep at some positions at_C; None where they keep all."""
        vocabulary = logits_CV.shape[-1]
        top_k_C1 = self.spread(lambda row: min(row.settings.top_k or vocabulary, vocabulary))[at_C, None]
        # No rounded sum of probabilities reaches infinity, so a top_p of 1 keeps every id.
        top_p_C1 = self.spread(lambda row: row.settings.top_p if row.settings.top_p < 1 else np.inf)[at_C, None]
        if (top_k_C1 == vocabulary).all() and np.isinf(top_p_C1).all():
            return None
        best_CK = logits_CV.topk(int(top_k_C1.max())).values
        kept_CK = torch.arange(best_CK.shape[-1], device=best_CK.device) < _on(top_k_C1, best_CK)
        # From the largest down, so that no quotient overflows at a low temperature.
        weight_CK = ((best_CK - best_CK[:, :1]) / temperature_C1).exp() * kept_CK
        above_CK = weight_CK.cumsum(-1) - weight_CK
        kept_CK &= above_CK < _on(top_p_C1, best_CK) * weight_CK.sum(-1, keepdim=True)
        return best_CK.masked_fill(~kept_CK, torch.inf).amin(-1, keepdim=True)

    def score(self, logits_CV: Tensor, log_sum_C: Tensor, log_prob_C: Tensor) -> Tensor:
        """Return what unmasking looks at [C]: the confidence, or the margin or entropy where a row asks for it."""
        score_C = log_prob_C.exp()
        for statistic in (margin, entropy):
            wanting = np.array([statistic_of(row.settings) is statistic for row in self.rows])
            found = np.flatnonzero(wanting[self.row_C])
            if found.size:
                at = _on(found, logits_CV)
                score_C[at] = statistic(logits_CV[at], log_sum_C[at])
        return score_C
