"""The bound on held-out text (paper Eq. 1) with fixed noise, and the n-gram baselines it should beat.

Shape letters: V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from illada.data.batches import Segment
from illada.data.collate import Batch, noisy_batches
from illada.data.shards import Shards
from illada.diffusion.causal import causal_loss
from illada.diffusion.loss import masked_loss
from illada.model import IlladaForMaskedLM

VALIDATION_SEED = 20_260_625
"""Seed of validation noise: the same for every run, step and model, so that numbers compare."""


def bits_per_byte(nats_per_token: float, tokens: int, text_bytes: int) -> float:
    """Turn nats per token into bits per byte of text, which do not depend on the tokenizer."""
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
    """Yield the part of one of `ranks` processes of `samples` windows (all for None), unsplit, with fixed noise.

    The windows are spread evenly over the data; t is stratified over them. The sum of the masked losses of all batches
    is the bound in nats per token; of the causal losses, the negative log-likelihood itself, of every token given those
    before it in its window (the first of a window counts as much as the mean of the others).
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


@dataclass(frozen=True)
class NgramBaselines:
    """Cross-entropy of n-gram models of the training tokens on validation tokens, in nats per token."""

    unigram: float
    bigram: float


def ngram_baselines(train: Shards, validation: Shards) -> NgramBaselines:
    """Fit and evaluate the baselines.

    Unigram: counts + 1. Bigram: Witten-Bell interpolation of bigram counts with that unigram, a standard smoothing
    without a parameter to tune.
    """
    vocabulary = train.vocab_size
    unigram_V = np.ones(vocabulary)
    pairs: dict[int, int] = {}
    for tokens in _pieces(train):
        unigram_V += np.bincount(tokens, minlength=vocabulary)
        codes, counts = np.unique(tokens[:-1] * vocabulary + tokens[1:], return_counts=True)
        for code, count in zip(codes.tolist(), counts.tolist(), strict=True):
            pairs[code] = pairs.get(code, 0) + count
    unigram_V /= unigram_V.sum()
    codes = np.fromiter(sorted(pairs), dtype=np.int64, count=len(pairs))
    counts = np.array([pairs[code] for code in codes.tolist()], dtype=np.float64)
    firsts = codes // vocabulary
    followed_V = np.bincount(firsts, weights=counts, minlength=vocabulary)
    kinds_V = np.bincount(firsts, minlength=vocabulary)
    unigram = bigram = 0.0
    seen = 0
    for tokens in _pieces(validation):
        previous, current = tokens[:-1], tokens[1:]
        place = np.clip(np.searchsorted(codes, previous * vocabulary + current), 0, len(codes) - 1)
        hits = np.where(codes[place] == previous * vocabulary + current, counts[place], 0.0)
        base = unigram_V[current]
        weight = followed_V[previous] + kinds_V[previous]
        mixed = np.where(weight > 0, (hits + kinds_V[previous] * base) / np.maximum(weight, 1), base)
        unigram -= np.log(unigram_V[tokens]).sum()
        bigram -= np.log(unigram_V[tokens[:1]]).sum() + np.log(mixed).sum()
        seen += len(tokens)
    return NgramBaselines(float(unigram) / max(1, seen), float(bigram) / max(1, seen))


def _pieces(shards: Shards, size: int = 2**22) -> Iterable[np.ndarray]:
    for start in range(0, shards.tokens, size):
        yield shards.read(start, min(size, shards.tokens - start))
