"""One denoising step for a packed set of rows: a forward pass, then proposals and confidences (spec §5).

Nothing a row gets depends on the rows beside it. Shape letters: M masked positions of the active blocks of some rows.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from illada.generation.request import Proposals, Request
from illada.generation.sampling import is_plain, most_probable, propose
from illada.model import IlladaForMaskedLM, KVCache, Packing, PagePool


def denoise(model: IlladaForMaskedLM, rows: Sequence[Request], pool: PagePool, logits_held: int) -> list[Proposals]:
    """Run one forward pass over all rows and return what it proposes for each.

    Args:
        model: the network, in inference mode.
        rows: in any order.
        pool: memory of their caches.
        logits_held: most logits held at once.
    """
    # Rows that want the most probable token come first: they need no whole row of logits. Equal lengths side by side
    # share attention calls, those that see about as much above all.
    plain = [is_plain(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (not plain[i], rows[i].size // rows[i].passes, rows[i].first))
    rows = [rows[i] for i in order]
    opened = [row.open_positions() for row in rows]
    inputs: list[NDArray[np.int64]] = []
    pasts: list[KVCache | None] = []
    wanted: list[NDArray[np.int64]] = []
    for row, position_M in zip(rows, opened, strict=True):
        inputs += row.branches(model.config.mask_token_id)
        pasts += row.continued(pool)
        wanted += [len(row.prompt_P) - row.first - row.causal + position_M] * row.passes
    ids_T = torch.from_numpy(np.concatenate(inputs)).to(model.device)
    hidden_MD = model.model.packed(ids_T, Packing(tuple(map(len, inputs)), tuple(pasts)), wanted=wanted)

    count = sum(plain)
    middle = sum(map(len, opened[:count]))
    parts = []
    if count:
        parts.append(most_probable(model, hidden_MD[:middle], logits_held))
    if count < len(rows):
        parts.append(propose(model, rows[count:], opened[count:], hidden_MD[middle:], logits_held))
    # Float bits as integers, so that one copy brings everything to the host.
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    table = torch.stack([columns[0].int(), *(x.view(torch.int32) for x in columns[1:])]).cpu().numpy()
    ends = np.cumsum([len(position_M) for position_M in opened])[:-1]
    results = {
        i: Proposals(position_M, part[0].astype(np.int64), *(x.view(np.float32) for x in part[1:]))
        for i, position_M, part in zip(order, opened, np.split(table, ends, axis=1), strict=True)
    }
    return [results[i] for i in range(len(rows))]
