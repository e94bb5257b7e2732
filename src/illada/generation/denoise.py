"""One denoising step of many rows: a forward pass over all of them, then what it proposes for each (spec §5).

A row is a request or one of its drafts, and what it gets does not depend on the rows beside it.

Shape letters: M masked positions of the active blocks of some rows · D width.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from illada.generation.request import Proposals, Request
from illada.generation.sampling import is_plain, most_probable, propose
from illada.model.attention import Packing
from illada.model.kv_cache import KVCache, PagePool
from illada.model.transformer import IlladaForMaskedLM


def denoise(model: IlladaForMaskedLM, rows: Sequence[Request], pool: PagePool, logits_held: int) -> list[Proposals]:
    """Run one forward pass over all rows and return what it proposes for each.

    Args:
        model: the network, in inference mode.
        rows: in any order.
        pool: memory of their caches.
        logits_held: most logits held at once.
    """
    # Rows that want the most probable token come first: their logits need not exist as a whole. Rows of equal length
    # lie side by side and share attention calls, those that begin to compute at the same position above all. Rows with
    # a form come last, as `propose` wants them.
    plain = [is_plain(row) for row in rows]
    keys = [(not plain[i], row.form is not None, row.size // row.passes, row.first) for i, row in enumerate(rows)]
    order = sorted(range(len(rows)), key=keys.__getitem__)
    rows = [rows[i] for i in order]
    open_positions = [row.open_positions() for row in rows]
    inputs: list[NDArray[np.int64]] = []
    pasts: list[KVCache | None] = []
    wanted: list[NDArray[np.int64]] = []
    for row, position_M in zip(rows, open_positions, strict=True):
        inputs += row.branches(model.config.mask_token_id)
        pasts += row.prepare_caches(pool)
        wanted += [len(row.prompt_P) - row.first - row.causal + position_M] * row.passes
    ids_T = torch.from_numpy(np.concatenate(inputs)).to(model.device)
    hidden_MD = model.model.packed(ids_T, Packing(tuple(map(len, inputs)), tuple(pasts)), wanted=wanted)

    count = sum(plain)
    first = sum(map(len, open_positions[:count]))
    parts: list[tuple[torch.Tensor, ...]] = []
    kept = min(model.config.vocab_size, max(row.alternatives for row in rows))
    if count:
        no_best_M2K = torch.zeros(first, 2, kept, dtype=torch.int32, device=hidden_MD.device)
        parts.append((*most_probable(model, hidden_MD[:first], logits_held), no_best_M2K))
    if count < len(rows):
        parts.append(propose(model, rows[count:], open_positions[count:], hidden_MD[first:], logits_held))
    id_M, log_prob_M, score_M, best_M2K = (torch.cat(column) for column in zip(*parts, strict=True))
    # Float bits as integers, so that one copy brings everything to the host.
    columns = torch.stack((id_M.int(), log_prob_M.view(torch.int32), score_M.view(torch.int32)))
    table = torch.cat((columns, best_M2K.flatten(1).T)).cpu().numpy()
    ends = np.cumsum([len(position_M) for position_M in open_positions])[:-1]
    proposals = [
        Proposals(position_M, part[0].astype(np.int64), part[1].view(np.float32), part[2].view(np.float32), part[3:])
        for position_M, part in zip(open_positions, np.split(table, ends, axis=1), strict=True)
    ]
    return [proposals[place] for place in np.argsort(order)]
