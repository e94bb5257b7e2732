from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from illada import rng
from reference import reference_bits, reference_uniform

words = st.one_of(st.integers(-(2**63), 2**64 - 1), st.integers(-3, 300))
few = settings(deadline=None, max_examples=60, derandomize=True)


@few
@given(st.lists(words, min_size=1, max_size=4), st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5))
def test_bits_are_those_of_plain_integers(scalars, column):
    vector = rng.bits(*scalars, torch.tensor(column), 7)
    assert [int(x) & (2**64 - 1) for x in vector] == [reference_bits(*scalars, x, 7) for x in column]
    assert int(rng.bits(*scalars)) & (2**64 - 1) == reference_bits(*scalars)


@few
@given(st.lists(words, min_size=1, max_size=5))
def test_uniform_int_is_the_float64_uniform_and_open(key):
    number = rng.uniform_int(*key)
    assert number == reference_uniform(*key) == float(rng.uniform(*key, dtype=torch.float64))
    assert 0.0 < number < 1.0
    assert 0.0 < float(rng.uniform(*key)) < 1.0


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float32, 23), (torch.float64, 52)])
@pytest.mark.parametrize("word", [0, -1])
def test_the_interval_is_open_even_for_extreme_bits(monkeypatch, dtype, digits, word):
    monkeypatch.setattr(rng, "bits", lambda *key, device=None: torch.tensor([word]))
    number = rng.uniform(0, dtype=dtype)
    assert number.dtype == dtype
    assert float(number) == (0.5 / 2**digits if word == 0 else 1 - 0.5 / 2**digits)


def test_keys_broadcast():
    grid = rng.uniform(1, torch.arange(3)[:, None], torch.arange(4), dtype=torch.float64)
    assert grid.shape == (3, 4)
    assert float(grid[2, 3]) == rng.uniform_int(1, 2, 3)
    assert len(set(grid.flatten().tolist())) == 12


@few
@given(st.integers(1, 300), st.lists(st.integers(0, 2**63), max_size=3))
def test_shuffled_index_is_a_bijection(count, key):
    assert sorted(rng.shuffled_index(i, count, *key) for i in range(count)) == list(range(count))


def test_shuffled_index_depends_on_the_key_and_refuses_outsiders():
    orders = {tuple(rng.shuffled_index(i, 50, seed) for i in range(50)) for seed in range(20)}
    assert len(orders) == 20
    for index in (-1, 5):
        with pytest.raises(IndexError):
            rng.shuffled_index(index, 5, 0)


@few
@given(st.integers(0, 200), st.integers(0, 2**40))
def test_permutation_is_one(count, seed):
    assert sorted(rng.permutation(count, seed).tolist()) == list(range(count))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_numbers_along_any_word_look_uniform(axis):
    count, cells = 20_000, 50
    key = [3, 1, 4]
    key[axis] = torch.arange(count)
    numbers = rng.uniform(*key, dtype=torch.float64)
    expected = count / cells
    chi_square = ((torch.histc(numbers, cells, 0, 1) - expected) ** 2 / expected).sum()
    assert 20 < chi_square < 95  # 49 degrees of freedom: four standard deviations and more on either side
    lagged = torch.corrcoef(torch.stack((numbers[:-1], numbers[1:])))[0, 1]
    assert abs(lagged) < 0.03


@few
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(0, 2**40), st.integers(0, 3))
def test_dealing_is_gapless_and_keeps_the_shares(weights, seed, start):
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    length = max(64, -(-2 * sum(weights) // min(weights)))
    pick_source = [rng.pick_source(n, shares, seed) for n in range(length * (start + 1))]
    for source, share in enumerate(shares):
        turns = [turn for found, turn in pick_source if found == source]
        assert sorted(turns) == list(range(len(turns)))
        assert abs(len(turns) - share * len(pick_source)) < 1
        # No stretch of rounds is far from the share either.
        some = [found for found, _ in pick_source[start * length :]].count(source)
        assert abs(some - share * length) < 2


def test_dealing_depends_on_the_key_and_on_nothing_else():
    shares = [Fraction(1, 3), Fraction(2, 3)]
    orders = {tuple(rng.pick_source(n, shares, seed)[0] for n in range(64)) for seed in range(10)}
    assert len(orders) == 10
    assert rng.pick_source(10**15, shares, 3) == rng.pick_source(10**15, shares, 3)
    assert rng.pick_source(7, [Fraction(1)], 3) == (0, 7)


@pytest.mark.parametrize("count", [1000, 1024, 1500])
def test_a_shuffled_order_looks_uniform(count):
    """Where the first places land, and whether neighbours stay neighbours, over many keys."""
    cells, keys = 20, 4000
    landed = [rng.shuffled_index(5, count, seed) * cells // count for seed in range(keys)]
    expected = keys / cells
    assert sum((landed.count(cell) - expected) ** 2 / expected for cell in range(cells)) < 43.8  # 0.1 %, 19 degrees
    near = sum(abs(rng.shuffled_index(5, count, s) - rng.shuffled_index(6, count, s)) < 50 for s in range(keys))
    assert abs(near / keys - 100 / count) < 0.02
