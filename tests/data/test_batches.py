import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from illada import rng
from illada.data.batches import Batches, Segment, read_segments
from illada.data.collate import noisy_batches
from illada.data.shards import Shards
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
def twice(shards):
    """A mixture of `shards` and the same once more."""
    return Shards.open({str(shards.path): 1, f"{shards.path}/": 2})


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
    """30 % of windows (paper §2.1), the point uniform."""
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


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    st.integers(2, 300),
    st.integers(1, 9),
    st.integers(0, 2**40),
    st.floats(0, 1),
    st.sampled_from(["window", "document"]),
    st.integers(0, 3),
    st.booleans(),
)
def test_shifted_windows_are_disjoint_pieces_of_the_ring(
    shards, twice, window, per_step, seed, split, boundaries, epoch, two
):
    """An epoch: as many windows as without the shift, one behind another on the ring from the epoch's first token."""
    sources = twice if two else shards
    batches = Batches(sources, window, per_step, seed, split, boundaries, shift_windows=True)
    assert batches.samples == Batches(sources, window, per_step, seed).samples
    everything, count = shards.read(0, shards.tokens), shards.tokens // window
    ends = {shards.document_span(i)[1] for i in range(shards.documents)}
    for number, source in enumerate(sources.sources):
        begin = int(rng.uniform_int(seed, rng.SHIFT, number, epoch) * shards.tokens)
        seen = []
        for place in range(count):
            segments = batches._window(number * count + place, epoch)
            ring = np.roll(everything, -begin - place * window)[:window]
            assert read_segments(segments, sources).tolist() == ring.tolist()
            assert segments[0].start == source.first_token + (begin + place * window) % shards.tokens
            assert [s.offset for s in segments] == [sum(s.length for s in segments[:i]) for i in range(len(segments))]
            assert [s.part for s in segments] == list(range(len(segments)))
            assert all(s.length >= 1 and s.sample == number * count + place for s in segments)
            seen += [token - source.first_token for s in segments for token in range(s.start, s.start + s.length)]
            cuts = {s.start - source.first_token for s in segments[1:]}
            inside = {token % shards.tokens for token in (ends if boundaries == "document" else {shards.tokens})}
            inside &= set(seen[1 - window :])
            assert inside <= cuts  # nobody attends across the end of the source
            assert len(cuts - inside) <= 1
        assert len(seen) == count * window == len(set(seen))
        assert set(seen) <= set(range(shards.tokens))


def test_shifted_over_the_epochs_each_token_stands_everywhere(shards):
    window, epochs = 11, 3000
    batches = Batches(shards, window, 1, seed=6, split_probability=0, shift_windows=True)
    places = np.zeros((shards.tokens, window), dtype=int)
    for epoch in range(epochs):
        begin = batches._window(0, epoch)[0].start
        places[
            (begin + np.arange(batches.samples * window)) % shards.tokens, np.arange(batches.samples * window) % window
        ] += 1
    expected = epochs * batches.samples / shards.tokens
    assert chi_square(places[0], [expected] * window) < 31  # 0.1 %, 11 degrees: a token may also be left over
    assert places.min() > expected / 2
    fixed = Batches(shards, window, 1, seed=6, split_probability=0)
    assert {fixed._window(0, epoch)[0].start for epoch in range(9)} == {0}


@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_shifted_windows_depend_on_seed_and_step_alone(shards, steps):
    """So a run that is resumed in the middle of an epoch goes on as it would have gone."""
    used = Batches(shards, 12, 5, seed=7, shift_windows=True)
    for step in steps:
        assert used.plan(step) == Batches(shards, 12, 5, seed=7, shift_windows=True).plan(step)
    flat = [s for step in range(2 * max(steps), 2 * max(steps) + 2) for s in used.plan(step)]
    assert flat == Batches(shards, 12, 10, seed=7, shift_windows=True).plan(max(steps))
    assert used.plan(0) != Batches(shards, 12, 5, seed=8, shift_windows=True).plan(0)


def test_one_process_and_two_see_the_same_shifted_windows(shards):
    batches, step = Batches(shards, 12, 6, seed=7, shift_windows=True), 20
    plan = batches.plan(step)
    assert {segments[0].epoch for segments in plan} == {1}

    def seen(ranks, size):
        made = [b for r in range(ranks) for b in noisy_batches(plan, size, shards, 7, step, rank=r, ranks=ranks)]
        parts = [[x.split(b.packing.lengths) for x in (b.clean_T, b.masked_T, b.weight_T)] for b in made]
        return sorted([x.tolist() for x in row] for columns in parts for row in zip(*columns, strict=True))

    assert seen(1, 6) == seen(2, 3) == seen(2, 1) == seen(3, 2)


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


def test_the_older_rule_pads_alike_however_a_step_is_divided(chats):
    """To the longest of the step, not of a pass as the authors do: padding counts in the loss."""
    plan = Batches(chats, window=9, samples_per_step=6, seed=2, rule="llada", eos_token_id=2).plan(0)
    longest = max(segments[0].length for segments in plan)
    assert min(segments[0].length for segments in plan) < longest
    for size in (1, 2, 6):
        for ranks in (1, 2, 3):
            for rank in range(ranks):
                made = noisy_batches(plan, size, chats, 2, 0, "llada", 2, rank=rank, ranks=ranks)
                assert {length for batch in made for length in batch.packing.lengths} == {longest}


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
