"""Drafts: rows that run ahead of a request, by the steps that it will probably take (`speculate`)."""

import copy

import numpy as np

from illada.generation.request import Request


def draft_ahead(request: Request, room: int) -> int:
    """Draft the states after the coming steps as the last pass foretells them; return the positions they take.

    A draft takes steps by the request's own rule, with old probabilities. It counts only if the request really
    comes to the same state.
    """
    for draft in request.drafts:
        draft.release()
    request.drafts = []
    taken = 0
    state = request
    # A pass that renews a cache computes the true state only: drafts continue from where it begins.
    while not state.doubt and state.latest is not None and len(request.drafts) < request.settings.speculate:
        open_M = state.masked_G[state.latest.position_M]
        if not open_M.any():  # the last pass said nothing about the next block
            break
        # What a form decided by itself may be written in other tokens than the last pass proposed.
        if state.form is not None and (state.ids_G[state.latest.position_M] != state.latest.id_M).any():
            break
        draft = copy.copy(state)
        draft.drafts = []
        draft.ids_G, draft.masked_G = state.ids_G.copy(), state.masked_G.copy()
        draft.log_prob_G, draft.forced_G = state.log_prob_G.copy(), state.forced_G.copy()
        if draft.commit(state.latest.where(open_M)):
            ended = np.isin(draft.ids_G[draft.block : draft.block_end], draft.settings.eos_ids).any()
            if ended or draft.block_end == draft.budget or draft.settings.cache != "none":
                break
            if draft.open_next_block():  # nothing is open there
                break
        if draft.doubt or taken + draft.size > room:
            break
        draft.pasts = [past.fork(draft.first, len(draft.prompt_P) + draft.computed) for past in request.pasts]
        request.drafts.append(draft)
        taken += draft.size
        state = draft
    return taken


def has_come_true(request: Request, draft: Request) -> bool:
    """Return whether the request has come to the state of a draft, whose pass then was the request's next one."""
    same = request.doubt == draft.doubt and np.array_equal(request.masked_G, draft.masked_G)
    return same and np.array_equal(request.ids_G[~request.masked_G], draft.ids_G[~draft.masked_G])
