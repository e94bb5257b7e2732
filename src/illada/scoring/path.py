"""The exact log-likelihood of a text under a deterministic decoding rule (DUEL, arXiv:2603.01367).

A rule that looks only at what is visible decides in which order the positions of *any* text are filled in. Walking that
order over a given text x, with S_k the positions of step k,

    log p(x) = sum over steps k, sum over i in S_k, of log p(x_i | what was visible before step k)

is the log-probability of x where each token is drawn from the model's distribution at its step: over all texts of a
length p sums to 1. Eq. 2 of the paper chooses by the probability of the *true* token, and is no likelihood.

Shape letters: L candidate tokens · M masked positions of the active block · K of them revealed in one step ·
C positions in one chunk · V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from illada.errors import IlladaError
from illada.generation.sampling import statistic_of
from illada.generation.settings import GenerationSettings
from illada.generation.unmask import positions_to_commit
from illada.model.transformer import IlladaForMaskedLM
from illada.scoring.layout import Answer, Candidate, Pair, Query, answers, check_pairs
from illada.scoring.likelihood import likelihood_scores


def path_log_likelihoods(
    model: IlladaForMaskedLM,
    pairs: Sequence[Pair],
    settings: GenerationSettings,
    right_context: Sequence[int] = (),
    max_batch_tokens: int = 16_384,
) -> list[float]:
    """Return log p(candidate | context) of each pair in nats: exact, under the decoding rule of the settings.

    The candidate is filled in block by block as the engine would fill it in, its last block as long as what remains,
    but with its own tokens. Which positions a step reveals is chosen from the model's distribution at the masked
    positions, by the code that generation uses and never by the true tokens. MASK is no token of a text: its
    probability is renormalised away, as in the other scores, with which one-token candidates agree.

    Of a block the model sees the finished blocks before it and no later one, as in variable-length generation. A right
    context, however, says where the candidate ends: then the masks of all later blocks are in view from the start, and
    the right context behind them (as with `later_masks`).

    Scores that differ by rounding alone may fall either way, as in generation: with only masks in view all are equal.

    All pairs advance together; a candidate takes as many forward passes as its rule has steps, by default L. For a
    causal model this is `likelihood_scores`, in one pass.

    Args:
        model: the network.
        pairs: (context ids, candidate ids).
        settings: the rule: block_length, steps_per_block, remasking, threshold, entropy_bound and later_masks. The
            candidate says how much there is, so max_new_tokens, eos_token_id and stop are not used, nor are seed and
            speculate, which change nothing here.
        right_context: visible ids after every candidate (authors' evaluation code: one EOS, see `score_layout`).
        max_batch_tokens: most positions of one forward pass; a single pair may exceed it.

    Raises:
        IlladaError: when the rule draws at random, changes the model's probabilities or approximates them by a cache;
            when a candidate is empty or holds the mask token, a pair is longer than the context, or an id is outside
            the vocabulary; when the model is causal and the settings are about masks or a context is empty.
    """
    if model.config.causal:
        refuse_rule(settings, causal=True)
        return likelihood_scores(model, pairs, 1, 0, right_context, max_batch_tokens)
    return [path.log_likelihood for path in walk(model, pairs, settings, right_context, max_batch_tokens)]


def refuse_rule(settings: GenerationSettings, causal: bool = False) -> None:
    """Refuse settings under which a text has no exact likelihood, or that of another model (guidance, caches; ours).

    Raises:
        IlladaError: when they are such.
    """
    if settings.temperature or settings.remasking == "random":
        chance = "temperature" if settings.temperature else "remasking random"
        raise IlladaError(f"the path likelihood needs a rule without chance: leave out {chance}")
    if causal:
        settings.left_to_right()  # refuses what is about masks; its cache is exact
    names: tuple[str, ...] = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")
    names += ("guidance_scale", "think_boost", *(() if causal else ("cache",)))
    changed = [name for name in names if getattr(settings, name) != getattr(GenerationSettings, name)]
    if changed:
        raise IlladaError(
            "the path likelihood is that of the model's own probabilities, computed afresh in every pass: leave out "
            + " and ".join(changed)
        )


@dataclass
class Path:
    """A candidate on its way from masks to its text."""

    candidate: Candidate
    settings: GenerationSettings
    sees_all: bool
    """Whether later blocks and the right context are in view."""
    log_likelihood: float = 0.0
    """Of what is revealed, in nats."""
    steps: list[list[int]] = field(default_factory=list)
    """Positions in the candidate that each step revealed."""
    block: int = 0
    """Where in the candidate the active block begins."""
    block_step: int = 0
    masked_L: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        """Mask all of it."""
        self.masked_L = np.ones(self.candidate.length, dtype=np.bool_)

    @property
    def block_end(self) -> int:
        """Where in the candidate the active block ends."""
        return min(self.block + self.settings.block_length, self.candidate.length)

    def open_positions(self) -> NDArray[np.int64]:
        """Return the masked positions of the active block in the candidate [M]."""
        return self.block + np.flatnonzero(self.masked_L[self.block : self.block_end])

    def query(self, mask_id: int) -> Query:
        """Ask for the true tokens at the open positions."""
        query = self.candidate.query(self.masked_L, mask_id)
        start = self.candidate.start
        at_M = start + self.open_positions()
        seen = query.seen if self.sees_all else query.seen[: start + self.block_end]
        return Query(seen, at_M, self.candidate.ids[at_M])

    def reveal(self, answer: Answer) -> None:
        """Take one step of the rule; of the answer the scores decide, the log-probabilities only count."""
        position_M, slots = self.open_positions(), self.block_end - self.block
        chosen_K = positions_to_commit(
            self.settings, answer.score_M, position_M, slots, self.block_step, answer_step=len(self.steps)
        )
        self.log_likelihood += float(answer.log_p_M[chosen_K].sum())
        self.steps.append(sorted(position_M[chosen_K].tolist()))
        self.masked_L[position_M[chosen_K]] = False
        self.block_step += 1
        if not self.masked_L[self.block : self.block_end].any():
            self.block, self.block_step = self.block_end, 0


def walk(
    model: IlladaForMaskedLM,
    pairs: Sequence[Pair],
    settings: GenerationSettings,
    right_context: Sequence[int] = (),
    max_batch_tokens: int = 16_384,
) -> list[Path]:
    """Return the finished path of each pair; arguments and errors as in `path_log_likelihoods`, but not causal."""
    model.config.refuse_causal("paths are", "take path_log_likelihoods, which is exact there")
    refuse_rule(settings)
    sees_all = settings.later_masks or len(right_context) > 0
    paths = [Path(candidate, settings, sees_all) for candidate in check_pairs(model, pairs, right_context)]
    statistic = statistic_of(settings) or _confidence
    active = paths
    while active:
        asked = [(path, path.query(model.config.mask_id)) for path in active]
        # By length, so that equal lengths share attention calls, and by content, so that equal inputs share a pass.
        asked.sort(key=lambda pair: (len(pair[1].seen), pair[1].seen.tobytes()))
        said = answers(model, (query for _, query in asked), max_batch_tokens, statistic)
        for (path, _), answer in zip(asked, said, strict=True):
            path.reveal(answer)
        active = [path for path in active if path.masked_L.any()]
    return paths


def _confidence(logits_CV: Tensor, log_sum_C: Tensor) -> Tensor:
    """Return the probability of the best id [C], MASK in the sum, as `most_probable` does."""
    return (logits_CV.amax(-1) - log_sum_C).exp()
