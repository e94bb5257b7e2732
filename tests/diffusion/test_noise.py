import math
from collections import Counter

import pytest
import torch

from illada import rng
from illada.data.batches import Batches
from illada.data.collate import noisy_batches
from illada.diffusion.loss import masked_loss
from illada.diffusion.noise import EPSILON, masked_positions, masking_probability, stratified_times
from reference import reference_uniform


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
