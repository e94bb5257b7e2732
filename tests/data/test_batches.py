import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from illada.data.batches import Batches, Segment, read_segments
from illada.errors import IlladaError


@pytest.fixture(scope="module")
def shards(make_data, tmp_path_factory):
    """100 documents of 1 to 19 tokens in several shards."""
    documents, first = [], 0
    for n in range(100):
        length = n * 7 % 19 + 1
        documents.append([i % 64 for i in range(first, first + length)])
        first += length
    return make_data(tmp_path_factory.mktemp("text"), documents, per_shard=100)


@pytest.fixture(scope="module")
def chats(make_data, tmp_path_factory):
    documents = [([n % 60] * (n % 11 + 2), n % 3) for n in range(23)]
    return make_data(tmp_path_factory.mktemp("chat"), documents, kind="chat", per_shard=40)


def chi_square(counts, expected):
    return sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.integers(2, 200),
    st.integers(1, 9),
    st.integers(0, 2**40),
    st.floats(0, 1),
    st.sampled_from(["window", "document"]),
    st.integers(0, 50),
)
def test_segments_tile_their_window(shards, window, per_step, seed, split, boundaries, step):
    plan = Batches(shards, window, per_step, seed, split, boundaries).plan(step)
    assert len(plan) == per_step
    ends = {shards.document_span(i)[1] for i in range(shards.documents)}
    for segments in plan:
        start, sample = segments[0].start, segments[0].sample
        assert start == sample * window
        assert sum(s.length for s in segments) == window
        assert all(a.start + a.length == b.start for a, b in pairwise(segments))
        for part, segment in enumerate(segments):
            assert segment.length >= 1
            assert (segment.sample, segment.part, segment.epoch) == (sample, part, segments[0].epoch)
            assert segment.offset == segment.start - start
            assert (segment.visible, segment.padding, segment.size) == (0, 0, segment.length)
        cuts = {s.start for s in segments[1:]}
        if boundaries == "window":
            assert len(cuts) <= 1
        else:
            inside = {e for e in ends if start < e < start + window}
            assert inside <= cuts
            assert len(cuts - inside) <= 1
        if split in (0.0, 1.0) and boundaries == "window":
            assert len(cuts) == split


def test_a_window_is_split_with_the_probability_asked_for(shards):
    """30 % of windows (paper §2.2), the point uniform."""
    window, windows = 21, 20_000
    batches = Batches(shards, window, 1, seed=3, split_probability=0.3)
    plans = [batches._window(number % batches.samples, number // batches.samples) for number in range(windows)]
    cuts = [segments[1].offset for segments in plans if len(segments) == 2]
    assert chi_square([len(cuts), windows - len(cuts)], [0.3 * windows, 0.7 * windows]) < 10.8  # 0.1 %, 1 degree
    counts = np.bincount(cuts, minlength=window)
    assert counts[0] == 0
    assert chi_square(counts[1:], [len(cuts) / 20] * 20) < 43.8  # 0.1 %, 19 degrees


def test_every_epoch_is_another_permutation(shards):
    batches = Batches(shards, 10, samples_per_step=7, seed=1)
    assert batches.samples == shards.tokens // 10
    seen = [(s[0].epoch, s[0].sample) for step in range(60) for s in batches.plan(step)]
    orders = []
    for epoch in range(3):
        order = [sample for e, sample in seen if e == epoch]
        assert sorted(order) == list(range(batches.samples))
        orders.append(order)
    same = [sum(a == b for a, b in zip(orders[0], other, strict=True)) for other in (*orders[1:], sorted(orders[0]))]
    assert max(same) < batches.samples / 5
    assert [e for e, _ in seen] == sorted(e for e, _ in seen)
    other_seed = [s[0].sample for step in range(13) for s in Batches(shards, 10, 7, seed=2).plan(step)]
    assert other_seed != orders[0][: len(other_seed)]


def test_an_epoch_splits_the_same_window_anew(shards):
    batches = Batches(shards, 50, 1, seed=1, split_probability=1.0)
    assert len({batches._window(3, epoch)[0].length for epoch in range(10)}) > 5


@settings(deadline=None, max_examples=10, derandomize=True)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_a_plan_depends_on_seed_and_step_alone(shards, steps):
    used = Batches(shards, 12, 5, seed=7, boundaries="document")
    for step in steps:
        assert used.plan(step) == Batches(shards, 12, 5, seed=7, boundaries="document").plan(step)


def test_samples_per_step_only_regroups_the_samples(shards):
    flat = [s for step in range(6) for s in Batches(shards, 12, 4, seed=7).plan(step)]
    assert flat == [s for step in range(3) for s in Batches(shards, 12, 8, seed=7).plan(step)]


def test_what_is_read_is_what_is_stored(shards):
    everything = shards.read(0, shards.tokens)
    for segments in Batches(shards, 37, 4, seed=0, split_probability=0.5).plan(2):
        ids = read_segments(segments, shards)
        assert ids.dtype == torch.int64
        start = segments[0].start
        assert ids.tolist() == everything[start : start + 37].tolist()


def test_the_older_rule_shows_prompts_and_pads_to_the_longest_of_the_step(chats):
    batches = Batches(chats, window=9, samples_per_step=5, seed=2, rule="llada", eos_token_id=2)
    assert batches.samples == chats.documents
    padded = 0
    for step in range(9):
        plan = batches.plan(step)
        longest = max(segments[0].length for segments in plan)
        for (segment,) in plan:
            start, end, prompt = chats.document_span(segment.sample)
            assert segment.start == start
            assert segment.length == min(9, end - start)
            assert segment.visible == min(prompt, segment.length - 1)
            assert segment.size == longest
            assert segment.offset == 0
            ids = read_segments([segment], chats, eos_token_id=2).tolist()
            assert ids == chats.read(start, segment.length).tolist() + [2] * segment.padding
            padded += segment.padding
    assert padded


def test_a_prompt_that_fills_the_window_keeps_one_token_to_learn(make_data, tmp_path):
    data = make_data(tmp_path, [([7] * 20, 18)], kind="chat")
    ((segment,),) = Batches(data, window=10, samples_per_step=1, seed=0, rule="llada", eos_token_id=2).plan(0)
    assert (segment.length, segment.visible) == (10, 9)


def test_what_cannot_be_batched_is_refused(shards, chats):
    with pytest.raises(IlladaError, match="less than one window of 5000: prepare more text or set a smaller"):
        Batches(shards, 5000, 1, seed=0)
    with pytest.raises(IlladaError, match="--kind chat"):
        Batches(shards, 10, 1, seed=0, rule="llada", eos_token_id=2)
    with pytest.raises(IlladaError, match="llada rule"):
        Batches(chats, 10, 1, seed=0, rule="llada", eos_token_id=None)


def test_size_counts_padding():
    segment = Segment(0, 0, 0, 0, 5, 0)
    assert (segment.size, replace(segment, padding=3).size) == (5, 8)
    assert math.isclose(chi_square([3, 5], [4, 4]), 0.5)
