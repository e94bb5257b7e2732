"""One denoising step for a packed set of rows: a forward pass, then proposals and confidences (spec §5).

Nothing a row gets depends on the rows beside it. Shape letters: P prompt tokens · G answer budget · T packed tokens ·
M masked positions of the active blocks of all rows · C of them in one chunk · D width · V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from illada import keyed
from illada.generation.settings import GenerationSettings
from illada.model import IlladaForMaskedLM, Packing, Past

GUMBEL = 16
"""Stream of sampling; the streams of training lie below 16."""

LOGITS_HELD = 2**24
"""Most logits held at once; the head runs over this many divided by V positions at a time."""


@dataclass
class Row:
    """One request under way: its own ids, mask state, settings and counters.

    Mask state lies beside the ids, so a prompt or an answer may hold the mask id. Where `masked_G` is true, `ids_G` and
    `log_prob_G` hold the last proposal, not a decision.
    """

    index: int
    prompt_P: NDArray[np.int64]
    budget: int
    settings: GenerationSettings
    think: tuple[int, ...] = ()
    """Ids of `</think>` when it is boosted."""
    block: int = 0
    """Where in the answer the active block begins."""
    block_step: int = 0
    answer_step: int = 0
    forwards: int = 0
    positions: int = 0
    past: Past | None = None
    ids_G: NDArray[np.int64] = field(init=False)
    masked_G: NDArray[np.bool_] = field(init=False)
    log_prob_G: NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        """Mask the whole answer."""
        self.ids_G = np.zeros(self.budget, dtype=np.int64)
        self.masked_G = np.ones(self.budget, dtype=np.bool_)
        self.log_prob_G = np.full(self.budget, np.nan, dtype=np.float32)

    @property
    def block_end(self) -> int:
        """Where in the answer the active block ends."""
        return self.block + self.settings.block_length

    @property
    def view(self) -> int:
        """How many positions of the answer the model sees: no later mask exists unless asked for."""
        return self.budget if self.settings.later_masks else self.block_end

    @property
    def passes(self) -> int:
        """Forward passes of one step: two under guidance."""
        return 2 if self.settings.guidance_scale else 1

    def open_positions(self) -> NDArray[np.int64]:
        """Return the still-masked positions of the active block, as answer positions [M]."""
        return self.block + np.flatnonzero(self.masked_G[self.block : self.block_end])

    @property
    def first(self) -> int:
        """Where in prompt and answer the positions begin that this step computes: those before come from the past."""
        cache, done = self.settings.cache, len(self.prompt_P) + self.block
        if cache == "none" or self.answer_step == 0:
            return 0
        if self.block_step:
            return done
        # A new block: the one before it has its last tokens only now.
        return 0 if cache == "prefix" else done - self.settings.block_length

    @property
    def size(self) -> int:
        """How many positions this step computes."""
        return self.passes * (len(self.prompt_P) + self.view - self.first)

    def inputs(self, mask_id: int) -> list[NDArray[np.int64]]:
        """Return the row as this step computes it; under guidance also with its prompt masked."""
        answer = np.where(self.masked_G, mask_id, self.ids_G)[: self.view]
        seen = np.concatenate((self.prompt_P, answer))[self.first :]
        if self.passes == 1:
            return [seen]
        return [seen, np.concatenate((np.full_like(self.prompt_P, mask_id), answer))]

    def visible_ids(self) -> NDArray[np.int64]:
        """Return the distinct ids of the prompt and of the committed answer, never those of proposals."""
        return np.unique(np.concatenate((self.prompt_P, self.ids_G[~self.masked_G])))

    def boost(self) -> tuple[int, float] | None:
        """Return the id of `</think>` to favour at the left-most open position, and the logit to add (spec §5).

        Only committed answer tokens count, for the sequence as for its prefix (ours).
        """
        if not self.think:
            return None
        committed = np.where(self.masked_G, -1, self.ids_G)[: self.block_end]
        size = len(self.think)
        if len(committed) >= size and (sliding_window_view(committed, size) == self.think).all(1).any():
            return None
        position = int(self.open_positions()[0])
        done = min(size - 1, position)
        while tuple(committed[position - done : position]) != self.think[:done]:
            done -= 1
        rise = min(1.0, (position + 1) / self.budget) ** self.settings.think_boost_power
        return self.think[done], self.settings.think_boost * rise


def denoise(
    model: IlladaForMaskedLM, rows: Sequence[Row]
) -> list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]]:
    """Run one forward pass over all rows; return (answer positions, proposals, log confidences, scores) [M] per row.

    Guidance, the repetition penalty and the boost, in this order, make the logits; the penalty sees guided ones as in
    transformers, and the boost keeps its full size (ours). The proposal is the best id but MASK; at a temperature above
    0 it is drawn: logits over the temperature, then top-k, then top-p, then Gumbel noise in float64.

    The confidence is the proposal's softmax probability under the logits, over the full vocabulary: what changes the
    logits counts, what only changes the draw (temperature, top-k, top-p, noise) does not. The score is what the row's
    unmasking rule looks at: the confidence; under "margin" the probability of the best id but MASK less that of the
    second; under an entropy bound the entropy in nats of the distribution over all ids but MASK (ours: a model certain
    of MASK is not certain of any proposal).
    """
    mask_id = model.config.mask_token_id
    inputs: list[NDArray[np.int64]] = []
    selected: list[NDArray[np.int64]] = []
    start = 0
    pasts: list[Past | None] = []
    for row in rows:
        if row.settings.cache != "none":
            row.past = row.past or Past(len(row.prompt_P) + row.budget)
            row.past.start = row.first
        selected.append(start + len(row.prompt_P) - row.first + row.open_positions())
        for sequence in row.inputs(mask_id):
            inputs.append(sequence)
            pasts.append(row.past)
            start += len(sequence)
    extras = _Extras(rows, [len(positions) for positions in selected])
    ids_T = torch.from_numpy(np.concatenate(inputs)).to(model.device)
    hidden_TD = model.model.packed(ids_T, Packing(tuple(map(len, inputs)), tuple(pasts)))

    def head(at_C: NDArray[np.int64]) -> Tensor:
        return model.lm_head(hidden_TD[_on(at_C, hidden_TD)]).float()

    at_M = np.concatenate(selected)
    chunk = max(1, LOGITS_HELD // model.config.vocab_size)
    proposals: list[Tensor] = []
    log_probs: list[Tensor] = []
    scores: list[Tensor] = []
    for first in range(0, len(at_M), chunk):
        at_C = at_M[first : first + chunk]
        logits_CV = head(at_C)
        extras.guide(logits_CV, head, at_C, first)
        extras.penalise(logits_CV, first)
        extras.favour(logits_CV, first)
        log_sum_C = logits_CV.logsumexp(-1)
        # Only the choice excludes MASK; the probabilities above are the model's own.
        logits_CV[:, mask_id] = -torch.inf
        proposal_C = extras.sample(logits_CV, first)
        proposals.append(proposal_C)
        log_prob_C = logits_CV.gather(1, proposal_C[:, None])[:, 0] - log_sum_C
        log_probs.append(log_prob_C)
        scores.append(extras.score(logits_CV, log_sum_C, log_prob_C, first))
    # Float bits as integers, so that one copy brings everything to the host.
    columns = torch.cat(proposals).int(), *(torch.cat(x).view(torch.int32) for x in (log_probs, scores))
    ids_M, *floats = torch.stack(columns).cpu().numpy()
    proposal_M, (log_prob_M, score_M) = ids_M.astype(np.int64), (x_M.view(np.float32) for x_M in floats)
    ends = extras.ends
    return [
        (row.open_positions(), proposal_M[a:b], log_prob_M[a:b], score_M[a:b])
        for row, a, b in zip(rows, [0, *ends[:-1]], ends, strict=True)
    ]


def _on(values: NDArray[Any], like: Tensor) -> Tensor:
    """Move host values to where `like` is."""
    return torch.from_numpy(values).to(like.device)


class _Extras:
    """What each of the M selected positions asks for beyond its plain logits; greedy rows ask for nothing."""

    def __init__(self, rows: Sequence[Row], counts: Sequence[int]):
        self.ends = np.cumsum(counts).tolist()

        def spread(values: Sequence[int] | Sequence[float]) -> NDArray[Any]:
            return np.repeat(np.array(values), counts)

        self.scale_M = spread([row.settings.guidance_scale for row in rows])
        self.masked_prompt_M = spread([len(row.prompt_P) + row.view for row in rows])
        self.temperature_M = spread([row.settings.temperature for row in rows])
        self.seed_M = spread([row.settings.seed for row in rows])
        self.step_M = spread([row.answer_step for row in rows])
        self.position_M = np.concatenate([row.open_positions() for row in rows])
        self.top_k_M = spread([row.settings.top_k or 1 << 62 for row in rows])
        # No rounded sum of probabilities reaches infinity, so 1 keeps every id.
        self.top_p_M = spread([row.settings.top_p if row.settings.top_p < 1 else np.inf for row in rows])
        self.margin_M = spread([row.settings.remasking == "margin" for row in rows])
        self.entropy_M = spread([row.settings.entropy_bound is not None for row in rows])
        self.penalties = [
            (end - count, end, row.visible_ids(), row.settings.repetition_penalty)
            for row, count, end in zip(rows, counts, self.ends, strict=True)
            if row.settings.repetition_penalty != 1
        ]
        # A row's left-most open position is the first of its own.
        boosts = [(end - count, row.boost()) for row, count, end in zip(rows, counts, self.ends, strict=True)]
        self.boosts = [(at, *boost) for at, boost in boosts if boost is not None]

    def guide(
        self, logits_CV: Tensor, head: Callable[[NDArray[np.int64]], Tensor], at_C: NDArray[np.int64], first: int
    ) -> None:
        """Turn logits c into u + (w + 1)(c - u), in place, where u are those of the branch with a masked prompt."""
        scale_C = self.scale_M[first : first + len(at_C)]
        guided = np.flatnonzero(scale_C)
        if guided.size:
            rows = _on(guided, logits_CV)
            free = head(at_C[guided] + self.masked_prompt_M[first + guided])
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
            noise_CV = keyed.uniform(seed, GUMBEL, step, position, ids_V, dtype=torch.float64)
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
