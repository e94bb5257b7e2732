import math

import pytest
import torch

from illada import rng
from illada.diffusion.noise import stratified_times
from illada.training import validation
from illada.training.optional import ngrams
from illada.training.optional.ngrams import ngram_baselines
from illada.training.validation import bits_per_byte, validation_bound
from reference import reference_loss, reference_uniform


@pytest.fixture(scope="module")
def shards(make_data, tmp_path_factory):
    documents = [[(5 * n + i * i) % 58 + 6 for i in range(n % 9 + 4)] for n in range(30)]
    return make_data(tmp_path_factory.mktemp("text"), documents, per_shard=50)


@pytest.mark.parametrize(("window", "samples"), [(16, None), (16, 5), (16, 10_000), (1000, None)])
def test_the_bound_is_eq_1_over_windows_spread_evenly(tied, shards, window, samples):
    got = validation_bound(tied, shards, window, samples, samples_per_batch=3)
    whole = max(1, shards.tokens // window)
    count = min(whole, samples or whole)
    size = min(window, shards.tokens)
    seed, n = validation.VALIDATION_SEED, torch.arange(count)
    t = stratified_times(seed, 0, n, n * 0, n * 0).tolist()
    u = [reference_uniform(seed, rng.MASK, w, 0, i) for w in range(count) for i in range(size)]
    ids = [i for w in range(count) for i in shards.read(w * whole // count * size, size).tolist()]
    assert got == pytest.approx(reference_loss(tied, ids, [size] * count, t, u), rel=1e-5)


def test_the_bound_is_fixed(tied, shards):
    first = validation_bound(tied, shards, 16, None, 4)
    torch.manual_seed(99)
    torch.rand(7)
    assert validation_bound(tied, shards, 16, None, 4) == first
    assert validation_bound(tied, shards, 16, None, 1) == pytest.approx(first, rel=1e-6)
    assert torch.is_grad_enabled()


def test_bits_per_byte():
    assert bits_per_byte(2 * math.log(2), tokens=30, text_bytes=120) == pytest.approx(0.5)


@pytest.mark.parametrize("per_shard", [2, 1000])
def test_baselines_by_hand(make_data, tmp_path, per_shard):
    """Training stream a b a b c, validation stream a b c a, three symbols."""
    a, b, c = 0, 1, 2
    train = make_data(tmp_path / "train", [[a, b, a], [b, c]], vocab_size=3, per_shard=per_shard)
    held_out = make_data(tmp_path / "held_out", [[a, b], [c, a]], vocab_size=3, per_shard=per_shard)
    got = ngram_baselines(train, held_out)
    p = {a: 3 / 8, b: 3 / 8, c: 2 / 8}
    assert got.unigram == pytest.approx(-(2 * math.log(p[a]) + math.log(p[b]) + math.log(p[c])) / 4)
    # Pairs: ab twice, ba once, bc once. Witten-Bell: (count + kinds p) / (followed + kinds).
    ab = (2 + 1 * p[b]) / (2 + 1)
    bc = (1 + 2 * p[c]) / (2 + 2)
    ca = p[a]  # c was never followed by anything
    assert got.bigram == pytest.approx(-(math.log(p[a]) + math.log(ab) + math.log(bc) + math.log(ca)) / 4)


def test_baselines_do_not_depend_on_how_the_stream_is_read(shards, monkeypatch):
    whole = ngram_baselines(shards, shards)
    pieces = ngrams._pieces
    monkeypatch.setattr(ngrams, "_pieces", lambda data: pieces(data, 50))
    parts = ngram_baselines(shards, shards)
    assert parts.unigram == pytest.approx(whole.unigram)
    assert parts.bigram == pytest.approx(whole.bigram, rel=0.1)  # one pair is lost at every join
    assert whole.bigram < whole.unigram < math.log(64) + 0.1
