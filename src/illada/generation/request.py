"""One request under way: what is decided, what the next pass computes, and what it may look like some steps later.

Shape letters: P prompt tokens · G answer budget · B block length · M masked positions of the active block ·
K committed · S ids seen.
"""

import copy
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from illada.generation.settings import GenerationSettings
from illada.generation.unmask import positions_to_commit
from illada.model import KVCache, PagePool


class Proposals(NamedTuple):
    """What a forward pass says about the masked positions of a row's active block."""

    position_M: NDArray[np.int64]
    """In the answer, left to right."""
    id_M: NDArray[np.int64]
    log_prob_M: NDArray[np.float32]
    score_M: NDArray[np.float32]
    """What the unmasking rule looks at."""

    def of(self, kept_M: NDArray[np.bool_]) -> "Proposals":
        """Return those of some positions."""
        return Proposals(self.position_M[kept_M], self.id_M[kept_M], self.log_prob_M[kept_M], self.score_M[kept_M])


@dataclass(eq=False)
class Request:
    """One request: its own ids, mask state, settings and counters.

    Mask state lies beside the ids, so a prompt or an answer may hold the mask id. Where `masked_G` is true, `ids_G` and
    `log_prob_G` hold the last proposal, not a decision.
    """

    prompt_P: NDArray[np.int64]
    budget: int
    settings: GenerationSettings
    think: tuple[int, ...] = ()
    """Ids of `</think>` when it is boosted."""
    template: bool = False
    """Whether this is a text with slots: its result is the whole of it."""
    index: int = -1
    """Given by the engine when it enters."""
    watched: bool = True
    """Whether its steps are to be told."""
    causal: bool = False
    """Whether the model is: the token before a position proposes it, and no mask is seen. Blocks are of one token."""
    block: int = 0
    """Where in the answer the active block begins."""
    block_step: int = 0
    answer_step: int = 0
    forwards: int = 0
    positions: int = 0
    pasts: list[KVCache] = field(default_factory=list)
    """One for each branch, once there is a cache."""
    doubt: bool = False
    """Whether an adaptive cache has to be renewed."""
    latest: Proposals | None = None
    """Those of the last pass."""
    drafts: list["Request"] = field(default_factory=list)
    """States expected after the coming steps, computed together with this one."""
    ids_G: NDArray[np.int64] = field(init=False)
    masked_G: NDArray[np.bool_] = field(init=False)
    slot_G: NDArray[np.bool_] = field(init=False)
    """What is to be generated: all of an answer, the slots of a template."""
    log_prob_G: NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        """Mask the whole answer."""
        self.ids_G = np.zeros(self.budget, dtype=np.int64)
        self.masked_G = np.ones(self.budget, dtype=np.bool_)
        self.slot_G = self.masked_G.copy()
        self.log_prob_G = np.full(self.budget, np.nan, dtype=np.float32)

    @property
    def block_end(self) -> int:
        """Where in the answer the active block ends."""
        return self.block + self.settings.block_length

    @property
    def view(self) -> int:
        """How many positions of the answer the model sees: no later mask exists unless asked for, if causal none."""
        return self.budget if self.settings.later_masks else self.block_end - self.causal

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
        if cache == "none" or self.answer_step == 0 or self.doubt:
            return 0
        if self.block_step:
            return done
        # A new block: the one before it has its last tokens only now.
        return 0 if cache == "prefix" else done - self.settings.block_length

    @property
    def size(self) -> int:
        """How many positions this step computes, drafts left out."""
        return self.passes * (len(self.prompt_P) + self.view - self.first)

    @property
    def kept(self) -> int:
        """How many positions a cache keeps for this row, at most."""
        if self.settings.cache == "none":
            return 0
        return self.passes * (len(self.prompt_P) + self.budget + self.settings.speculate * self.settings.block_length)

    def branches(self, mask_id: int) -> list[NDArray[np.int64]]:
        """Return the ids [S] from `first` on as this step computes them; under guidance also without what was given."""
        answer = np.where(self.masked_G, mask_id, self.ids_G)[: self.view]
        seen = [np.concatenate((self.prompt_P, answer))[self.first :]]
        if self.passes == 2:
            generated = np.where(self.slot_G[: self.view], answer, mask_id)
            seen.append(np.concatenate((np.full_like(self.prompt_P, mask_id), generated))[self.first :])
        return seen

    def continued(self, pool: PagePool) -> list[KVCache | None]:
        """Return what each branch of this step continues, ready for its pass."""
        if self.settings.cache == "none":
            return [None] * self.passes
        while len(self.pasts) < self.passes:
            self.pasts.append(KVCache(pool))
        for past in self.pasts:
            past.begin(self.first, len(self.prompt_P) + self.view - self.first)
        return [*self.pasts]

    def release(self) -> None:
        """Give back the memory of the caches, the drafts' included."""
        for state in (self, *self.drafts):
            for past in state.pasts:
                past.release()
            state.pasts = []
        self.drafts = []

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

    def commit(self, proposals: Proposals) -> bool:
        """Take one step; return whether the block is finished, as far as the answer depends on it.

        Behind an end-of-sequence token with nothing masked before it, nothing can change the answer any more.
        """
        self.latest = proposals
        position_M, id_M, log_prob_M, score_M = proposals
        self.ids_G[position_M] = id_M
        self.log_prob_G[position_M] = log_prob_M
        slots = int(np.count_nonzero(self.slot_G[self.block : self.block_end]))
        chosen_K = positions_to_commit(self.settings, score_M, position_M, slots, self.block_step, self.answer_step)
        self.masked_G[position_M[chosen_K]] = False
        if self.settings.cache == "adaptive":
            self.doubt = bool(log_prob_M[chosen_K].min() < math.log(self.settings.refresh_below))
        self.answer_step += 1
        self.block_step += 1
        masked_B, ids_B = (x_G[self.block : self.block_end] for x_G in (self.masked_G, self.ids_G))
        ends = np.flatnonzero(~masked_B & np.isin(ids_B, self.settings.eos_ids))
        return not masked_B[: ends[0] if ends.size else None].any()

    def open_next_block(self) -> None:
        """Go on to the next block."""
        self.block, self.block_step = self.block_end, 0

    def expect(self, room: int) -> int:
        """Draft the states after the coming steps as the last pass foretells them; return the positions they take.

        A draft is the row's own rule applied to old probabilities. It is used only if the row really gets there.
        """
        for old in self.drafts:
            old.release()
        self.drafts = []
        taken = 0
        state = self
        # A pass that renews a past computes the true state only: drafts continue from where it begins.
        while not state.doubt and state.latest is not None and len(self.drafts) < self.settings.speculate:
            still = state.masked_G[state.latest.position_M]
            if not still.any():  # nothing is foretold about a block that no pass has seen
                break
            draft = copy.copy(state)
            draft.drafts = []
            draft.ids_G, draft.masked_G = state.ids_G.copy(), state.masked_G.copy()
            draft.log_prob_G = state.log_prob_G.copy()
            if draft.commit(state.latest.of(still)):
                ended = np.isin(draft.ids_G[draft.block : draft.block_end], draft.settings.eos_ids).any()
                if ended or draft.block_end == draft.budget or draft.settings.cache != "none":
                    break
                draft.open_next_block()
            if draft.doubt or taken + draft.size > room:
                break
            draft.pasts = [past.fork(draft.first) for past in self.pasts]
            self.drafts.append(draft)
            taken += draft.size
            state = draft
        return taken

    def is_at(self, draft: "Request") -> bool:
        """Return whether a draft is the state this row has come to: then its pass was this row's next one."""
        same = self.doubt == draft.doubt and np.array_equal(self.masked_G, draft.masked_G)
        return same and np.array_equal(self.ids_G[~self.masked_G], draft.ids_G[~self.masked_G])
