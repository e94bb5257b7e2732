"""Random numbers as a pure function of a key: same key, same number, on any device, in any batch, on any rank.

A key is a tuple of integers (or integer tensors, broadcast together), e.g. (seed, stream, sample index, epoch,
position). Each word is folded into a 64-bit state with the SplitMix64 finaliser, a bijection of the word for a fixed
state, so keys that differ in one word give unrelated numbers. Integer arithmetic only: bit-equal on CPU and GPU.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import accumulate

import torch
from torch import Tensor

Word = int | Tensor

# One stream per purpose: under the same seed, the random numbers of two purposes are unrelated.
TIME, MASK, STRATUM, SPLIT, ORDER, DROPOUT, REORDER, TURN, SHIFT = range(9)


def _signed(word: int) -> int:
    """Map a Python integer to the int64 with the same low 64 bits."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >= 1 << 63 else word


_ALL = (1 << 64) - 1
_CONSTANTS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_GOLDEN, _MULTIPLY_1, _MULTIPLY_2 = map(_signed, _CONSTANTS)


def _shift(state: Tensor, bits: int) -> Tensor:
    """Logical (zero-filling) right shift; torch's >> on int64 copies the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _mix(state: Tensor) -> Tensor:
    state = (state ^ _shift(state, 30)) * _MULTIPLY_1
    state = (state ^ _shift(state, 27)) * _MULTIPLY_2
    return state ^ _shift(state, 31)


def bits(*key: Word, device: torch.device | str | None = None) -> Tensor:
    """Return 64 random bits per key, int64, shaped as the key's tensors broadcast together."""
    if device is None:
        device = next((word.device for word in key if isinstance(word, Tensor)), torch.device("cpu"))
    state = torch.zeros((), dtype=torch.int64, device=device)
    for word in key:
        word_64 = word.to(torch.int64) if isinstance(word, Tensor) else _signed(word)
        state = _mix((state ^ word_64) + _GOLDEN)
    return state


def uniform(*key: Word, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """Return one uniform number in the open interval (0, 1) per key.

    float32 numbers are (k + 1/2)/2^23 and float64 numbers (k + 1/2)/2^52, so neither 0 nor 1 is ever returned and
    `log` is always finite.
    """
    digits = 23 if dtype == torch.float32 else 52
    whole = _shift(bits(*key, device=device), 64 - digits)
    return (whole.to(dtype) + 0.5) * (1.0 / (1 << digits))


@contextmanager
def seeded(device: torch.device, *key: int) -> Iterator[None]:
    """Seed torch's own generators by a key, for code that takes none; afterwards they go on as if nothing was drawn."""
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(int(bits(*key)))
        yield


def permutation(count: int, *key: Word, device: torch.device | str | None = None) -> Tensor:
    """Return a random permutation of 0..count-1 as int64 [count]."""
    return torch.argsort(bits(*key, torch.arange(count, device=device)), stable=True)


def shuffled_index(index: int, count: int, *key: int) -> int:
    """Return where position `index` of 0..count-1 goes under a keyed permutation, without holding the permutation.

    The permutation is a four-round Feistel network over the smallest even number of bits that holds `count`. A value
    that falls outside goes through the network again (cycle walking), which ends because the network is a bijection.
    """
    if not 0 <= index < count:
        raise IndexError(f"index {index} is outside 0..{count - 1}")
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = index
    while True:
        left, right = value >> half, value & mask
        for round_number in range(4):
            left, right = right, left ^ (_mix_int(_fold_int((*key, round_number, right))) & mask)
        value = (left << half) | right
        if value < count:
            return value


def pick_source(number: int, shares: Sequence[Fraction], *key: int) -> tuple[int, int]:
    """Return the source of item `number` of an endless mixed sequence, and the item's index within that source.

    Sources are picked in rounds, in a keyed order inside each round. After every round each source has had its exact
    share of all items so far, to the item (two at most for a middle one); its items are 0, 1, 2, … without a gap.

    Args:
        number: from 0.
        shares: of the sources, exact, above 0, with the sum 1.
        key: of the order inside the rounds.
    """
    if len(shares) == 1:
        return 0, number
    # Long enough that rounding never takes an item from a source between two rounds.
    length = max(64, math.ceil(2 / min(shares)))
    round_number, place = divmod(number, length)
    place = shuffled_index(place, length, *key, round_number)
    before, after = (
        [math.floor(end * bound) for bound in accumulate(shares, initial=Fraction(0))]
        for end in (round_number * length, (round_number + 1) * length)
    )
    for source in range(len(shares)):
        done = before[source + 1] - before[source]
        in_round = after[source + 1] - after[source] - done
        if place < in_round:
            return source, done + place
        place -= in_round
    raise ValueError(f"the shares add up to {sum(shares)}, not 1")


def _fold_int(key: Sequence[int]) -> int:
    state = 0
    for word in key:
        state = _mix_int(((state ^ (word & _ALL)) + _CONSTANTS[0]) & _ALL)
    return state


def _mix_int(state: int) -> int:
    state = ((state ^ (state >> 30)) * _CONSTANTS[1]) & _ALL
    state = ((state ^ (state >> 27)) * _CONSTANTS[2]) & _ALL
    return state ^ (state >> 31)


def uniform_int(*key: int) -> float:
    """Return the same float64 number as `uniform(*key, dtype=torch.float64)`, for one key and without tensors."""
    return ((_fold_int(key) >> 12) + 0.5) * (1.0 / (1 << 52))
