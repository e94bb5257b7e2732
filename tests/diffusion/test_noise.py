import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from illada import rng
from illada.data.batches import Batches
from illada.data.collate import noisy_batches
from illada.diffusion.loss import masked_loss
from illada.diffusion.noise import EPSILON, Noise, masked_positions, masking_probability, stratified_times
from reference import reference_bell, reference_time, reference_training_loss, reference_uniform

PAIRED = (EPSILON, 1 - EPSILON)
OTHER_NOISE = [
    Noise(bell=True),
    Noise(bell=True, weight="bound"),
    Noise(bell=True, weight="none"),
    Noise(weight="none"),
    Noise(band=(0.3, 0.8)),
    Noise(bell=True, band=(0.2, 0.6), weight="none"),
    Noise(band=PAIRED, complementary=True),
    Noise(bell=True, band=PAIRED, weight="bound", complementary=True),
    Noise(band=(0.3, 0.8), weight="none", complementary=True),
]


@pytest.fixture(scope="module")
def shards(make_data, tmp_path_factory):
    documents = [[(7 * n + i) % 58 + 6 for i in range(n % 13 + 4)] for n in range(60)]
    return make_data(tmp_path_factory.mktemp("text"), documents)


def test_probability_rises_from_epsilon_to_one():
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    assert masking_probability(t).tolist() == pytest.approx([1e-3, 0.999 * 0.25 + 1e-3, 1.0])
    assert masking_probability(t, 0.2).tolist() == pytest.approx([0.2, 0.4, 1.0])


def test_masks_are_keyed_by_sample_epoch_and_position():
    sample, epoch, position = torch.tensor([4, 4, 9]), torch.tensor([0, 1, 0]), torch.tensor([2, 2, 5])
    numbers = [reference_uniform(11, rng.MASK, s, e, i) for s, e, i in [(4, 0, 2), (4, 1, 2), (9, 0, 5)]]
    for shift, expected in ((1e-12, True), (-1e-12, False)):
        p = torch.tensor(numbers, dtype=torch.float64) + shift
        assert masked_positions(11, sample, epoch, position, p).tolist() == [expected] * 3


@pytest.mark.parametrize("p", [EPSILON, 0.1, 0.5, 0.93, 1.0])
def test_the_masked_fraction_is_p(p):
    count = 200_000
    position = torch.arange(count) % 500
    sample = torch.arange(count) // 500
    masked = masked_positions(1, sample, sample * 0, position, torch.full((count,), p, dtype=torch.float64))
    assert abs(float(masked.double().mean()) - p) <= 4 * math.sqrt(p * (1 - p) / count)


def test_masks_of_neighbours_are_independent():
    position = torch.arange(100_000)
    zero = position * 0
    half = torch.full((100_000,), 0.5, dtype=torch.float64)
    rows = [masked_positions(1, zero + s, zero + e, position, half) for s, e in ((0, 0), (1, 0), (0, 1))]
    for a, b in ((rows[0], rows[1]), (rows[0], rows[2]), (rows[0][1:], rows[0][:-1])):
        assert abs(float((a == b).double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(len(a))


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_each_step_visits_every_stratum_once(count):
    samples = torch.arange(count) * 5 + 3
    for step in range(20):
        t = stratified_times(0, step, samples, samples * 0, samples * 0)
        assert t.dtype == torch.float64
        assert sorted((t * count).long().tolist()) == list(range(count))
        assert ((t > 0) & (t < 1)).all()


@pytest.mark.slow
def test_each_time_is_uniform_over_the_steps():
    """Kolmogorov–Smirnov for one segment of a step, over many steps; its sample changes or stays."""
    steps, count = 4000, 5
    for moving in (0, 1):
        columns = []
        for step in range(steps):
            samples = torch.arange(count) + step * count * moving
            epochs = torch.full((count,), step * (1 - moving))
            columns.append(stratified_times(9, step, samples, samples * 0, epochs))
        for t in torch.stack(columns).T:
            ordered = t.sort().values
            grid = torch.arange(1, steps + 1) / steps
            distance = torch.maximum((grid - ordered).abs(), (grid - 1 / steps - ordered).abs()).max()
            assert float(distance) < 1.95 / math.sqrt(steps)  # 0.1 %


def test_the_bell_is_the_distribution_that_it_says():
    """Kolmogorov–Smirnov against the error function; the inverse and the density against the plain ones."""
    noise, count = Noise(bell=True, weight="bound"), 4000
    t = noise.times(rng.uniform(3, rng.TIME, torch.arange(count), dtype=torch.float64)).sort().values
    expected = torch.tensor([reference_bell(x)[1] for x in t.tolist()])
    grid = torch.arange(1, count + 1) / count
    assert float(torch.maximum((grid - expected).abs(), (grid - 1 / count - expected).abs()).max()) < 0.031  # 0.1 %
    u = torch.tensor([2.0**-53, 1e-6, 0.01, 0.3, 0.5, 0.77, 0.999, 1 - 2.0**-53], dtype=torch.float64)
    assert noise.times(u).tolist() == pytest.approx([reference_time(x, bell=True) for x in u.tolist()], abs=1e-12)
    assert ((noise.times(u) >= 0) & (noise.times(u) <= 1)).all()
    q = noise.divisor(t, torch.ones_like(t))
    assert q.tolist() == pytest.approx([reference_bell(x)[0] for x in t.tolist()])
    assert q.tolist() == pytest.approx(noise.divisor(1 - t, torch.ones_like(t)).tolist())  # complements rely on it
    assert float(q.min()) > 0.08


@pytest.mark.parametrize("count", [1, 7, 64])
def test_a_bell_visits_every_stratum_once(count):
    samples = torch.arange(count) * 5 + 3
    for step in range(5):
        t = Noise(bell=True).times(stratified_times(0, step, samples, samples * 0, samples * 0))
        assert sorted(int(reference_bell(x)[1] * count) for x in t.tolist()) == list(range(count))


@pytest.mark.parametrize("noise", OTHER_NOISE, ids=str)
def test_training_with_other_noise_is_the_plain_equation(tied, shards, noise):
    """In batches of any size; the segments of a step in the order of the plan."""
    batches = Batches(shards, 16, 6, seed=4, split_probability=0.5, noise=noise)
    plan = batches.plan(1)
    segments = [s for sample in plan for s in sample if not s.complement]
    columns = [torch.tensor([getattr(s, n) for s in segments]) for n in ("sample", "part", "epoch")]
    ids = [x for s in segments for x in shards.read(s.start, s.length).tolist()]
    places = [(s.sample, s.epoch, s.offset + i) for s in segments for i in range(s.length)]
    uniforms = [reference_uniform(4, rng.MASK, *place) for place in places]
    lengths, strata = [s.length for s in segments], stratified_times(4, 1, *columns).tolist()
    expected = reference_training_loss(tied, ids, lengths, strata, uniforms, noise)
    for size, ranks in ((1, 1), (4, 1), (6, 1), (2, 2)):
        parts = [noisy_batches(plan, size, shards, 4, 1, rank=r, ranks=ranks, noise=noise) for r in range(ranks)]
        with torch.no_grad():
            losses = [float(masked_loss(tied, *b.on(b.clean_T.device), b.packing)) for part in parts for b in part]
        assert sum(losses) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("noise", OTHER_NOISE, ids=str)
@pytest.mark.parametrize(("rule", "kind"), [("illada", "text"), ("llada", "chat")])
def test_a_token_that_costs_one_nat_costs_one_nat_under_any_noise(make_data, tmp_path, noise, rule, kind):
    """The expected sum of weights is 1 under both rules; p stays in its band."""
    data = make_data(tmp_path, [([9] * (n % 7 + 20), n % 5) for n in range(50)], kind=kind)
    batches = Batches(data, 20, 8, seed=1, rule=rule, eos_token_id=2, noise=noise)
    sums, low, high = [], *noise.band
    for step in range(100):
        (batch,) = noisy_batches(batches.plan(step), 8, data, 1, step, rule, 2, noise=noise)
        sums.append((batch.weight_T * batch.masked_T).sum().double())
        if noise.complementary:
            low, high = min(noise.band[0], 1 - noise.band[1]), max(noise.band[1], 1 - noise.band[0])
        assert low - 1e-6 <= float(batch.probability_T.min()) <= float(batch.probability_T.max()) <= high + 1e-6
    mean, error = float(torch.stack(sums).mean()), float(torch.stack(sums).std()) / math.sqrt(len(sums))
    if noise.weight == "none" and noise.complementary:
        assert sums == [pytest.approx(1)] * len(sums)  # each token is predicted once, and all weigh the same
    else:
        assert 0 < error < 0.1
        assert abs(mean - 1) < 4 * error


@pytest.mark.parametrize(("rule", "kind"), [("illada", "text"), ("llada", "chat")])
def test_complements_mask_what_their_windows_show(make_data, tmp_path, rule, kind):
    documents = [(list(range(100 * n, 100 * n + 12 + n)), 3 + n % 4) for n in range(9)]
    data = make_data(tmp_path, documents, vocab_size=2000, kind=kind)
    noise = Noise(band=PAIRED, complementary=True)
    batches = Batches(data, 13, 6, 4, 0.5, rule=rule, eos_token_id=1999, noise=noise)
    half = Batches(data, 13, 3, 4, 0.5, rule=rule, eos_token_id=1999)
    for step in range(6):
        plan = batches.plan(step)
        assert plan[::2] == half.plan(step)  # half as many windows, in the same order
        assert plan[1::2] == [[replace(part, complement=True) for part in sample] for sample in plan[::2]]
        views = [[], []]
        for batch in noisy_batches(plan, 1, data, 4, step, rule, 1999, noise=noise):
            views[sum(map(len, views)) % 2].append(batch)
        for a, b in zip(*views, strict=True):
            may = torch.ones_like(a.masked_T)
            if rule == "llada":
                may[: documents[int(a.clean_T[0]) // 100][1]] = False
            assert torch.equal(a.clean_T, b.clean_T)
            assert torch.equal(a.masked_T ^ b.masked_T, may)
            torch.testing.assert_close(a.probability_T + b.probability_T, torch.ones_like(a.probability_T))
            inside = [1 / (x.probability_T * x.weight_T) for x in (a, b)]
            torch.testing.assert_close(inside[0], inside[1])


def test_stratified_times_lower_the_variance_of_a_step():
    stratified = torch.stack(
        [stratified_times(0, n, torch.arange(16) + n * 16, *[torch.zeros(16)] * 2).mean() for n in range(300)]
    )
    assert float(stratified.var()) < 1 / 12 / 16 / 50


def by_token(batch):
    """Which tokens of a batch are masked and what they weigh, by (sample, position): read off ids that tell both."""
    return dict(
        zip(batch.clean_T.tolist(), zip(batch.masked_T.tolist(), batch.weight_T.tolist(), strict=True), strict=True)
    )


@pytest.mark.parametrize(("rule", "kind"), [("illada", "text"), ("llada", "chat")])
def test_noise_does_not_depend_on_the_company_of_a_sample(make_data, tmp_path, rule, kind):
    # Every token is its own number, so that it can be found again in any batch.
    documents = [(list(range(100 * n, 100 * n + 12 + n)), 3 + n % 4) for n in range(9)]
    data = make_data(tmp_path, documents, vocab_size=2000, kind=kind)
    batches = Batches(data, 13, 6, seed=4, split_probability=0.5, rule=rule, eos_token_id=1999)
    for step in (0, 3):
        plan = batches.plan(step)
        views = []
        for size in (1, 2, 4, 6, 100):
            made = list(noisy_batches(plan, size, data, 4, step, rule, 1999))
            assert len(made) == math.ceil(6 / size)
            assert sum(b.packing.tokens for b in made) == sum(s.size for sample in plan for s in sample)
            view = {}
            for batch in made:
                assert list(batch.packing.lengths) == sorted(batch.packing.lengths, reverse=True)
                view |= by_token(batch)
            view.pop(1999, None)
            views.append(view)
        assert all(view == views[0] for view in views)
        assert 0 < sum(m for m, _ in views[0].values()) < len(views[0])


def test_masks_follow_their_sample_into_another_step(shards):
    """In another order of a step only t may change: the uniform number of a token stays with (sample, position)."""
    plan = Batches(shards, 16, 4, seed=4, split_probability=1.0).plan(1)
    (batch,) = noisy_batches(plan, 4, shards, 4, 1)
    (turned,) = noisy_batches(plan[::-1], 4, shards, 4, 1)
    for made, order in ((batch, plan), (turned, plan[::-1])):
        segments = [s for sample in order for s in sample]
        columns = [torch.tensor([getattr(s, n) for s in segments]) for n in ("sample", "part", "epoch")]
        p_S = masking_probability(stratified_times(4, 1, *columns)).tolist()
        pairs = sorted(zip(segments, p_S, strict=True), key=lambda pair: -pair[0].size)
        place = 0
        for segment, p in pairs:
            for i in range(segment.length):
                u = reference_uniform(4, rng.MASK, segment.sample, segment.epoch, segment.offset + i)
                assert bool(made.masked_T[place]) == (u < p)
                assert float(made.weight_T[place]) == pytest.approx(1 / (p * 64))
                place += 1


def test_micro_batches_add_up_to_the_same_loss_and_gradient(build_model, shards):
    model = build_model(tie=True, seed=8)
    plan = Batches(shards, 24, 6, seed=0, split_probability=0.6).plan(2)
    results = []
    for size in (1, 2, 5, 6):
        model.zero_grad()
        total = 0.0
        for batch in noisy_batches(plan, size, shards, 0, 2):
            loss = masked_loss(model, batch.clean_T, batch.masked_T, batch.weight_T, batch.packing)
            loss.backward()
            total += float(loss.detach())
        results.append((total, [p.grad.clone() for p in model.parameters()]))
    for total, gradients in results[1:]:
        assert total == pytest.approx(results[0][0], rel=1e-5)
        for a, b in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_older_rule_never_masks_a_prompt_and_counts_padding_as_answer(make_data, tmp_path):
    documents = [([20 + n] * (n + 5), n % 4) for n in range(8)]
    data = make_data(tmp_path, documents, kind="chat")
    batches = Batches(data, 30, 4, seed=1, rule="llada", eos_token_id=2)
    padding_masked = Counter()
    for step in range(30):
        plan = batches.plan(step)
        for batch in noisy_batches(plan, 2, data, 1, step, "llada", 2):
            for ids, masked, weight in zip(
                *(x.split(batch.packing.lengths) for x in (batch.clean_T, batch.masked_T, batch.weight_T)), strict=True
            ):
                number = int(ids[0]) - 20
                prompt = documents[number][1]
                assert not masked[:prompt].any()
                answer = len(ids) - prompt
                p = 1 / (weight[0].double() * answer * 4)  # weight = 1/(p * answer * examples of the step)
                assert EPSILON <= p <= 1
                assert (weight == weight[0]).all()
                padding_masked[bool(masked[len(documents[number][0]) :].any())] += 1
    assert padding_masked[True] > 10
