"""One request under way: what is decided, what its next step computes, and its drafts, which run ahead of it.

A row of a forward pass is a request or one of its drafts. A draft is a `Request` as well: a copy that has already taken
the steps which the request will probably take.

Shape letters: L ids of a prompt or template · P prompt tokens · G answer budget · B block length · M masked positions
of the active block · K committed · S ids seen.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import NamedTuple, Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from illada.errors import IlladaError
from illada.generation.settings import GenerationSettings
from illada.generation.unmask import positions_to_commit
from illada.model.config import IlladaConfig
from illada.model.kv_cache import KVCache, PagePool


class Proposals(NamedTuple):
    """What a forward pass says about the masked positions of a row's active block."""

    position_M: NDArray[np.int64]
    """In the answer, left to right."""
    id_M: NDArray[np.int64]
    log_prob_M: NDArray[np.float32]
    score_M: NDArray[np.float32]
    """What the unmasking rule looks at."""
    best_EM: NDArray[np.int32]
    """The most probable ids, then the bits of their log-probabilities, where a row of the pass wants alternatives."""

    def where(self, mask_M: NDArray[np.bool_]) -> "Proposals":
        """Return the proposals for the positions where the mask is true."""
        position_M, id_M, log_prob_M, score_M, best_EM = self
        return Proposals(position_M[mask_M], id_M[mask_M], log_prob_M[mask_M], score_M[mask_M], best_EM[:, mask_M])


class Form(Protocol):
    """What an answer must match (`illada.generation.optional.forms`)."""

    def choose(self, row: "Request", weight_MV: Tensor, choice_MV: Tensor, temperature: float) -> Tensor:
        """Return the ids at the open positions of a row [M] that match it together."""

    def settle(self, row: "Request") -> None:
        """Decide what it leaves no choice in the active block."""

    def leave_block(self, row: "Request") -> None:
        """Bring the row's state to the end of the active block, in which all that matters is decided."""


@dataclass(eq=False)
class Request:
    """A prompt or a template with its settings, the state of its answer, and counters.

    The mask state lies beside the ids, so a prompt or an answer may hold the mask id. Where `masked_G` is true, `ids_G`
    and `log_prob_G` hold the last proposal, not a decision.
    """

    prompt_P: NDArray[np.int64]
    budget: int
    """Tokens of the whole answer, a multiple of the block length."""
    settings: GenerationSettings
    think: tuple[int, ...] = ()
    """Ids of `</think>` when it is boosted."""
    template: bool = False
    """Whether this is a text with slots: its result is the whole text."""
    index: int = -1
    """The engine sets it when the request enters."""
    watched: bool = True
    """Whether the engine calls `on_step` for it."""
    alternatives: int = 0
    """How many of the most probable ids are kept at each position, beside the id itself."""
    form: "Form | None" = None
    """What the answer, or what fills each slot, must match."""
    state: int = 0
    """Of the form, at the beginning of the active block."""
    forced_G: NDArray[np.bool_] = field(init=False)
    """Tokens that the form left no choice, decided without a pass."""
    causal: bool = False
    """Whether the model is causal: the token before a position proposes it, no mask is seen, a block is one token."""
    block: int = 0
    """Where in the answer the active block begins."""
    begun: int = 0
    """Where the block of the last pass begins."""
    block_step: int = 0
    answer_step: int = 0
    forwards: int = 0
    positions: int = 0
    pasts: list[KVCache] = field(default_factory=list)
    """One for each branch, once there is a cache."""
    doubt: bool = False
    """Whether an adaptive cache has to be renewed."""
    latest: Proposals | None = None
    """Proposals of the last pass."""
    drafts: list["Request"] = field(default_factory=list)
    """States expected after the coming steps, computed together with this one."""
    ids_G: NDArray[np.int64] = field(init=False)
    masked_G: NDArray[np.bool_] = field(init=False)
    slot_G: NDArray[np.bool_] = field(init=False)
    """What is to be generated: all of an answer, the slots of a template."""
    log_prob_G: NDArray[np.float32] = field(init=False)
    best_2KG: NDArray[np.int32] | None = None
    """The alternatives and the bits of their log-probabilities, best first; a draft may share it with its request."""

    def __post_init__(self) -> None:
        """Mask the whole answer."""
        self.ids_G = np.zeros(self.budget, dtype=np.int64)
        self.masked_G = np.ones(self.budget, dtype=np.bool_)
        self.slot_G = self.masked_G.copy()
        self.forced_G = ~self.masked_G
        self.log_prob_G = np.full(self.budget, np.nan, dtype=np.float32)

    @classmethod
    def of_prompt(
        cls, config: IlladaConfig, prompt: Sequence[int], settings: GenerationSettings, name: str
    ) -> "Request":
        """Check a prompt, called `name` in errors, and mask its answer; errors as in `generate`."""
        prompt_P = _check_ids(config, prompt, name)
        _check_biases(config, settings)
        if config.causal:
            settings = settings.left_to_right()
            if not prompt_P.size:
                raise IlladaError(f"{name} is empty: a causal model goes on from a token, so begin with BOS")
        context = config.max_position_embeddings
        block = settings.block_length
        room = min(settings.max_new_tokens, context - len(prompt_P))
        if room < block:
            raise IlladaError(
                f"{name}: budget below one block: max_new_tokens {settings.max_new_tokens} and context {context} - "
                f"prompt {len(prompt_P)} leave {room} tokens for block_length {block}: "
                "lower block_length or shorten the prompt"
            )
        return cls(prompt_P, room // block * block, settings, causal=config.causal)

    @classmethod
    def of_template(
        cls, config: IlladaConfig, template: Sequence[int | None], settings: GenerationSettings, name: str
    ) -> "Request":
        """Check a template, called `name` in errors, and mask its slots; errors as in `infill`.

        The ids before the first slot are the prompt; all that follows is one block.
        """
        config.refuse_causal("infilling is", "it can only go on from a prompt")
        if settings.think_boost:
            raise IlladaError("think_boost cannot be used to fill slots: leave it out")
        slot_L = np.array([token is None for token in template], dtype=np.bool_)
        if not slot_L.any():
            raise IlladaError(f"{name} has no slot to fill: put None where a token is wanted")
        ids_L = _check_ids(config, [0 if token is None else token for token in template], name)
        _check_biases(config, settings)
        first = int(slot_L.argmax())
        budget = len(ids_L) - first
        settings = replace(
            settings,
            max_new_tokens=budget,
            block_length=budget,
            steps_per_block=settings.steps_per_block and min(settings.steps_per_block, budget),
            eos_token_id=None,
            stop=(),
        )
        request = cls(ids_L[:first], budget, settings, template=True)
        request.ids_G[:] = ids_L[first:]
        request.masked_G[:] = request.slot_G[:] = slot_L[first:]
        return request

    @property
    def rows(self) -> tuple["Request", ...]:
        """The rows it has in the next pass: itself, then its drafts."""
        return self, *self.drafts

    @property
    def block_end(self) -> int:
        """Where in the answer the active block ends."""
        return self.block + self.settings.block_length

    @property
    def view(self) -> int:
        """How many positions of the answer the model sees: later blocks only with `later_masks`; if causal, no mask."""
        return self.budget if self.settings.later_masks else self.block_end - self.causal

    @property
    def passes(self) -> int:
        """Forward passes of one step: two under guidance."""
        return 2 if self.settings.guidance_scale else 1

    def open_positions(self) -> NDArray[np.int64]:
        """Return the masked positions of the active block, as answer positions [M]."""
        return self.block + np.flatnonzero(self.masked_G[self.block : self.block_end])

    @property
    def first(self) -> int:
        """Where in prompt and answer this step begins to compute; what lies before comes from the cache."""
        cache, done = self.settings.cache, len(self.prompt_P) + self.block
        if cache == "none" or self.answer_step == 0 or self.doubt:
            return 0
        if self.block_step:
            return done
        # In the first step of a block the last tokens of the block before it are new.
        return 0 if cache in ("prefix", "dual") else len(self.prompt_P) + self.begun

    @property
    def computed(self) -> int:
        """Where in the answer this step ends to compute; what the model sees behind it comes from a dual cache."""
        return self.block_end if self.settings.cache == "dual" and self.block_step else self.view

    @property
    def size(self) -> int:
        """How many positions this step computes, without its drafts."""
        return self.passes * (len(self.prompt_P) + self.computed - self.first)

    @property
    def cache_size(self) -> int:
        """How many positions a cache holds for this request and its drafts, at most."""
        if self.settings.cache == "none":
            return 0
        return self.passes * (len(self.prompt_P) + self.budget + self.settings.speculate * self.settings.block_length)

    def branches(self, mask_id: int | None) -> list[NDArray[np.int64]]:
        """Return the ids [S] that this step computes; under guidance a second time, with all that is fixed masked."""
        mask_id = mask_id or 0  # a causal model without a mask sees no open position
        answer = np.where(self.masked_G, mask_id, self.ids_G)[: self.computed]
        seen = [np.concatenate((self.prompt_P, answer))[self.first :]]
        if self.passes == 2:
            generated = np.where(self.slot_G[: self.computed], answer, mask_id)
            seen.append(np.concatenate((np.full_like(self.prompt_P, mask_id), generated))[self.first :])
        return seen

    def prepare_caches(self, pool: PagePool) -> list[KVCache | None]:
        """Return the cache of each branch, ready for this step's pass; None where every pass sees all tokens afresh."""
        if self.settings.cache == "none":
            return [None] * self.passes
        while len(self.pasts) < self.passes:
            self.pasts.append(KVCache(pool))
        for past in self.pasts:
            past.begin(self.first, len(self.prompt_P) + self.view)
        return [*self.pasts]

    def release(self) -> None:
        """Give back the memory of the caches, those of the drafts included."""
        for row in self.rows:
            for past in row.pasts:
                past.release()
            row.pasts = []
        self.drafts = []

    def visible_ids(self) -> NDArray[np.int64]:
        """Return the distinct ids of the prompt and of the committed answer; proposals do not count."""
        return np.unique(np.concatenate((self.prompt_P, self.ids_G[~self.masked_G])))

    def shift(self, vocabulary: int) -> NDArray[np.float32]:
        """Return what is added to the logits of all ids [V]: biases, less penalties for the committed answer."""
        s = self.settings
        count_V = np.bincount(self.ids_G[self.slot_G & ~self.masked_G], minlength=vocabulary)
        shift_V = -s.frequency_penalty * count_V - s.presence_penalty * (count_V > 0)
        shift_V[[*(s.logit_bias or {})]] += [*(s.logit_bias or {}).values()]
        return shift_V.astype(np.float32)

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
        prefix = min(size - 1, position)
        while tuple(committed[position - prefix : position]) != self.think[:prefix]:
            prefix -= 1
        rise = min(1.0, (position + 1) / self.budget) ** self.settings.think_boost_power
        return self.think[prefix], self.settings.think_boost * rise

    def commit(self, proposals: Proposals) -> bool:
        """Take one step; return whether the block is finished, as far as the answer depends on it.

        Once an end-of-sequence token has nothing masked before it, nothing behind it can change the answer.
        """
        self.latest = proposals
        position_M, id_M, log_prob_M, score_M, best_EM = proposals
        self.ids_G[position_M] = id_M
        self.log_prob_G[position_M] = log_prob_M
        if self.alternatives:
            best_2KM = best_EM.reshape(2, -1, len(position_M))[:, : self.alternatives]
            if self.best_2KG is None:
                self.best_2KG = np.zeros((*best_2KM.shape[:2], self.budget), dtype=np.int32)
            self.best_2KG[..., position_M] = best_2KM
        slots = int(np.count_nonzero(self.slot_G[self.block : self.block_end]))
        chosen_K = positions_to_commit(self.settings, score_M, position_M, slots, self.block_step, self.answer_step)
        self.masked_G[position_M[chosen_K]] = False
        if self.settings.cache == "adaptive":
            self.doubt = bool(log_prob_M[chosen_K].min() < math.log(self.settings.refresh_below))
        self.answer_step += 1
        self.block_step += 1
        self.begun = self.block
        if self.form is not None:
            self.form.settle(self)
        return self.block_is_done

    @property
    def block_is_done(self) -> bool:
        """Whether nothing is masked in the active block, up to the first end-of-sequence token."""
        masked_B, ids_B = (x_G[self.block : self.block_end] for x_G in (self.masked_G, self.ids_G))
        ends = np.flatnonzero(~masked_B & np.isin(ids_B, self.settings.eos_ids))
        return not masked_B[: ends[0] if ends.size else None].any()

    def open_next_block(self) -> bool:
        """Go on to the next block; return whether that is finished already, because its form leaves no choice."""
        if self.form is not None:
            self.form.leave_block(self)
        self.block, self.block_step = self.block_end, 0
        if self.form is not None:
            self.form.settle(self)
        return self.block_is_done


def _check_biases(config: IlladaConfig, settings: GenerationSettings) -> None:
    if any(token >= config.vocab_size for token in settings.logit_bias or ()):
        raise IlladaError(f"logit_bias names ids outside the vocabulary of {config.vocab_size}: check the tokenizer")


def _check_ids(config: IlladaConfig, ids: Sequence[int], name: str) -> NDArray[np.int64]:
    if not isinstance(ids, Iterable) or not all(isinstance(i, Integral) for i in ids):
        raise IlladaError(f"{name} is not a list of token ids: give one list of integers per prompt")
    ids_L = np.array(ids, dtype=np.int64)
    if ids_L.size and not 0 <= ids_L.min() <= ids_L.max() < config.vocab_size:
        raise IlladaError(f"{name} holds ids outside the vocabulary of {config.vocab_size}: check the tokenizer")
    context = config.max_position_embeddings
    if len(ids_L) > context:
        raise IlladaError(f"{name} has {len(ids_L)} tokens but the context is {context}: shorten it")
    return ids_L
