"""Residual dropout (training.dropout): numbers of a branch are zeroed where it joins the residual stream.

That is after attention's output projection and after the SwiGLU, as in Vaswani et al. (arXiv 1706.03762 §5.4). Number d
of a token's branch b (2·layer for attention, 2·layer + 1 for the SwiGLU) goes if 16 random bits, as a signed integer,
lie below (p - 1/2)·2^16; the others are divided by 1 - p, with p rounded to 1/2^16. One hash gives the bits of four
numbers. Its key is (seed, sample, epoch, position in the sample, complement or not, branch, d): neither processes,
passes, packing, recomputation nor a restart change what is dropped.

The model knows nothing of it: hooks on its modules act while it trains, never in validation, and no file holds them.

Shape letters: T packed tokens · D width.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from illada import rng
from illada.model.transformer import IlladaForMaskedLM

_LEVELS = 1 << 16


def dropped(token_T: Tensor, branch: int, width: int, level: int) -> Tensor:
    """Return which numbers of a branch go, bool [T, D], each with a chance of level / 2^16.

    Args:
        token_T: 64 random bits of each token.
        branch: number of the branch in the network.
        width: D.
        level: from 0 to below 2^16.
    """
    fours = torch.arange(-(-width // 4), device=token_T.device)
    bits = rng.bits(token_T[:, None], branch, fours).view(torch.int16)  # four of 16 bits, the lowest first
    return bits[:, :width] < level - _LEVELS // 2


class Dropout:
    """Drops numbers in the branches of a network in training; to be made when its weights lie in their shards.

    Args:
        model: gets hooks; none when the rate is 0.
        rate: p, from 0 to 0.99999.
        seed: of the run.
    """

    def __init__(self, model: IlladaForMaskedLM, rate: float, seed: int):
        self.level, self.seed = round(rate * _LEVELS), seed
        self.token_T = torch.zeros(0, dtype=torch.int64)
        # The hooks come after those that sum the parts of processes which share a branch (parallel.tensor).
        blocks: Any = model.model.layers if self.level else ()
        for layer, block in enumerate(blocks):
            for number, module in enumerate((block.self_attn.o_proj, block.mlp)):
                module.register_forward_hook(partial(self._drop, 2 * layer + number))

    def begin(self, places: Sequence[Tensor], device: torch.device) -> None:
        """Prepare for a pass over tokens at these places (see `Batch.places`)."""
        if self.level:
            self.token_T = rng.bits(self.seed, rng.DROPOUT, *(place_T.to(device) for place_T in places))

    def _drop(self, branch: int, module: nn.Module, _: Any, branch_TD: Tensor) -> Tensor:
        if not module.training:
            return branch_TD
        dropped_TD = dropped(self.token_T, branch, branch_TD.shape[-1], self.level)
        return branch_TD.masked_fill(dropped_TD, 0) * (_LEVELS / (_LEVELS - self.level))
