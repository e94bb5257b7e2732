"""The n-gram baselines that a model should beat on held-out text.

Shape letters: V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from illada.data.shards import Shards


@dataclass(frozen=True)
class NgramBaselines:
    """Cross-entropy of n-gram models of the training tokens on validation tokens, in nats per token."""

    unigram: float
    bigram: float


def ngram_baselines(train: Shards, validation: Shards) -> NgramBaselines:
    """Fit and evaluate the baselines.

    The unigram adds 1 to every count. The bigram interpolates bigram counts with this unigram (Witten-Bell), a standard
    smoothing without a parameter to tune.
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
    count = 0
    for tokens in _pieces(validation):
        previous, current = tokens[:-1], tokens[1:]
        place = np.clip(np.searchsorted(codes, previous * vocabulary + current), 0, len(codes) - 1)
        hits = np.where(codes[place] == previous * vocabulary + current, counts[place], 0.0)
        base = unigram_V[current]
        weight = followed_V[previous] + kinds_V[previous]
        mixed = np.where(weight > 0, (hits + kinds_V[previous] * base) / np.maximum(weight, 1), base)
        unigram -= np.log(unigram_V[tokens]).sum()
        bigram -= np.log(unigram_V[tokens[:1]]).sum() + np.log(mixed).sum()
        count += len(tokens)
    return NgramBaselines(float(unigram) / max(1, count), float(bigram) / max(1, count))


def _pieces(shards: Shards, size: int = 2**22) -> Iterable[np.ndarray]:
    for start in range(0, shards.tokens, size):
        yield shards.read(start, min(size, shards.tokens - start))
