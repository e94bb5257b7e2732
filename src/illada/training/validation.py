"""The bound on the likelihood of held-out text (paper Eq. 1), with fixed noise."""

import math
from collections.abc import Iterator

import torch

from illada.data.batches import Segment
from illada.data.collate import Batch, noisy_batches
from illada.data.shards import Shards
from illada.diffusion.causal import causal_loss
from illada.diffusion.loss import masked_loss
from illada.model.transformer import IlladaForMaskedLM

VALIDATION_SEED = 20_260_625
"""Seed of validation noise, the same for every run, step and model, so that numbers compare."""


def bits_per_byte(nats_per_token: float, tokens: int, text_bytes: int) -> float:
    """Convert nats per token to bits per byte of text, which do not depend on the tokenizer."""
    return nats_per_token * tokens / max(1, text_bytes) / math.log(2)


def validation_batches(
    shards: Shards,
    window: int,
    samples: int | None,
    samples_per_batch: int,
    rank: int = 0,
    ranks: int = 1,
    causal: bool = False,
) -> Iterator[Batch]:
    """Yield the share of one of `ranks` processes of `samples` windows (None for all), unsplit, with fixed noise.

    The windows are spread evenly over the data, and t is stratified over them. The masked losses of all batches add up
    to the bound in nats per token. Causal losses add up to the negative log-likelihood itself, of every token given the
    earlier ones in its window (the first token of a window counts as much as the mean of the others).
    """
    whole = max(1, shards.tokens // window)
    count = whole if samples is None else min(samples, whole)
    length = min(window, shards.tokens)
    plan = [[Segment(i, 0, 0, i * whole // count * window, length, 0)] for i in range(count)]
    return noisy_batches(plan, samples_per_batch, shards, VALIDATION_SEED, 0, rank=rank, ranks=ranks, causal=causal)


@torch.no_grad()
def validation_bound(
    model: IlladaForMaskedLM, shards: Shards, window: int, samples: int | None, samples_per_batch: int
) -> float:
    """Return the bound (see `validation_batches`), on the model's device and under the caller's autocast."""
    causal = model.config.causal
    batches = validation_batches(shards, window, samples, samples_per_batch, causal=causal)
    loss = causal_loss if causal else masked_loss
    return sum(float(loss(model, *batch.on(model.device), batch.packing)) for batch in batches)
