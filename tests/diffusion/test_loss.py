import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import illada
from illada import rng
from illada.diffusion import loss as module
from illada.diffusion.loss import chunked_cross_entropy, diffusion_loss, masked_loss
from illada.diffusion.noise import EPSILON, Noise, masking_probability, stratified_times
from illada.model.attention import Packing
from reference import reference_bell, reference_loss, reference_uniform


def full_loss(model, clean, masked, weight, packing):
    """The same loss through all logits and plain autograd."""
    noisy = torch.where(masked, model.config.mask_token_id, clean)
    logits = model.lm_head(model.model.packed(noisy, packing))
    each = torch.nn.functional.cross_entropy(logits, clean, reduction="none")
    return (each * weight * masked).sum()


@pytest.mark.parametrize("which", ["tied", "untied"])
@pytest.mark.parametrize("rows", [1, 64, 70, 1000])
def test_chunks_change_neither_value_nor_gradient(build_model, monkeypatch, which, rows):
    tie = which == "tied"
    model = build_model(tie, seed=4)
    monkeypatch.setattr(module, "LOGITS_BYTES", rows * 4 * 64)
    largest = max(64, rows)
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 64, (300,), generator=generator)
    masked = torch.rand(300, generator=generator) < 0.7
    weight = torch.rand(300, generator=generator) * 3
    packing = Packing((100, 120, 80))
    sizes = []
    logsumexp = torch.Tensor.logsumexp
    monkeypatch.setattr(torch.Tensor, "logsumexp", lambda x, *a, **k: (sizes.append(len(x)), logsumexp(x, *a, **k))[1])
    results = []
    for function in (masked_loss, full_loss):
        model.zero_grad()
        loss = function(model, clean, masked, weight, packing)
        (loss * 0.7).backward()  # a scaled loss scales the gradient
        results.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    assert max(sizes) <= largest
    assert sum(sizes) == int(masked.sum())
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    for name, gradient in results[1][1].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(results[0][1][name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)


@pytest.mark.slow
@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.data())
def test_masked_loss_is_the_equation(tied, lengths, data):
    count = sum(lengths)
    ids = data.draw(st.lists(st.integers(0, 63), min_size=count, max_size=count))
    times = data.draw(st.lists(st.floats(0, 1), min_size=len(lengths), max_size=len(lengths)))
    uniforms = data.draw(st.lists(st.floats(0, 0.999), min_size=count, max_size=count))
    p = masking_probability(torch.tensor(times, dtype=torch.float64)).repeat_interleave(torch.tensor(lengths))
    masked = torch.tensor(uniforms, dtype=torch.float64) < p
    with torch.no_grad():
        got = masked_loss(tied, torch.tensor(ids), masked, 1 / (p * count), Packing(tuple(lengths)))
    assert float(got) == pytest.approx(reference_loss(tied, ids, lengths, times, uniforms), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("cu_seqlens", [None, [0, 3, 10, 11, 24], torch.tensor([0, 24])])
@pytest.mark.parametrize("key", [(0, 0, 0), (5, 17, 2)])
def test_diffusion_loss_is_the_reference(untied, cu_seqlens, key):
    ids = torch.arange(24).view(3, 8) * 5 % 64
    ends = [0, 8, 16, 24] if cu_seqlens is None else [int(end) for end in cu_seqlens]
    lengths = [b - a for a, b in itertools.pairwise(ends)]
    seed, first, epoch = key
    samples = torch.arange(len(lengths)) + first
    t = stratified_times(seed, first, samples, samples * 0, samples * 0 + epoch).tolist()
    u = [reference_uniform(seed, rng.MASK, first + n, epoch, i) for n, size in enumerate(lengths) for i in range(size)]
    with torch.no_grad():
        got = float(illada.diffusion_loss(untied, ids, cu_seqlens=cu_seqlens, key=key))
    assert got == pytest.approx(reference_loss(untied, ids.flatten().tolist(), lengths, t, u), rel=1e-5)
    for changed in range(4):  # 3 changes no word
        other = tuple(word + (n == changed) for n, word in enumerate(key))
        with torch.no_grad():
            again = float(diffusion_loss(untied, ids, cu_seqlens=cu_seqlens, key=other))
        assert (again == got) == (changed == 3)


def test_a_token_weighs_one_over_p(tied, monkeypatch):
    seen = {}
    monkeypatch.setattr(module, "masked_loss", lambda m, clean, masked, weight, packing: seen.update(weight=weight))
    diffusion_loss(tied, torch.zeros(6, 5, dtype=torch.int64), key=(1, 2, 3), epsilon=0.25)
    samples = torch.arange(6) + 2
    t = stratified_times(1, 2, samples, samples * 0, samples * 0 + 3)
    torch.testing.assert_close(seen["weight"], (1 / (0.75 * t + 0.25) / 30).repeat_interleave(5))


def test_nothing_masked_and_nothing_at_all_give_zero_loss_and_gradient(tied, build_model):
    model = build_model(True, 0)
    no = torch.zeros(4, dtype=torch.bool)
    loss = masked_loss(model, torch.arange(4), no, torch.ones(4), Packing((4,)))
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())
    for shape in ((0, 8), (3, 0)):
        assert diffusion_loss(tied, torch.zeros(shape, dtype=torch.int64)).item() == 0


def test_segments_that_do_not_fit_are_refused(tied):
    with pytest.raises(ValueError, match="segments hold"):
        diffusion_loss(tied, torch.arange(6), cu_seqlens=[0, 5])


def test_half_precision_keeps_softmax_and_sum_in_fp32(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 16, generator=generator, requires_grad=True) for n in (200, 50))
    target, weight = torch.randint(0, 50, (200,), generator=generator), torch.rand(200, generator=generator)
    exact = chunked_cross_entropy(hidden, head, target, weight)
    with torch.autocast("cpu", torch.bfloat16):
        half = chunked_cross_entropy(hidden, head, target, weight)
    assert half.dtype == torch.float32
    assert 0 < abs(float((half - exact).detach())) < 5e-3 * float(exact.detach())
    half.backward()
    assert hidden.grad.dtype == head.grad.dtype == torch.float32


# The bound, on a language whose entropy is known

SYMBOLS, LENGTH, MASK = 3, 4, 3
START = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
NEXT = torch.tensor([[0.8, 0.15, 0.05], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]], dtype=torch.float64)
WORDS = torch.tensor(list(itertools.product(range(SYMBOLS), repeat=LENGTH)))


def word_probabilities():
    p = START[WORDS[:, 0]]
    for a, b in itertools.pairwise(range(LENGTH)):
        p = p * NEXT[WORDS[:, a], WORDS[:, b]]
    return p


def true_conditionals():
    """log p(x_i | what is visible) for every noisy word, by enumeration: {noisy word: [LENGTH, SYMBOLS + 1]}."""
    p, table = word_probabilities(), {}
    for noisy in itertools.product(range(SYMBOLS + 1), repeat=LENGTH):
        fits = torch.ones(len(WORDS), dtype=torch.bool)
        for i, x in enumerate(noisy):
            if x != MASK:
                fits &= WORDS[:, i] == x
        each = [[float(p[fits & (WORDS[:, i] == x)].sum()) for x in range(SYMBOLS)] for i in range(LENGTH)]
        table[noisy] = (torch.tensor(each, dtype=torch.float64) / p[fits].sum()).clamp(min=1e-300).log()
    return table


def language_model(table):
    """What `masked_loss` asks of a model, with the table as the trunk and the identity as the head."""
    rows = torch.full((4**LENGTH, LENGTH, SYMBOLS + 1), -1e4)
    for noisy, log_p in table.items():
        rows[sum(x * 4**i for i, x in enumerate(noisy)), :, :SYMBOLS] = log_p.float().clamp(min=-1e4)
    powers = 4 ** torch.arange(LENGTH)
    return SimpleNamespace(
        config=SimpleNamespace(mask_id=MASK, refuse_causal=lambda *_: None),
        model=SimpleNamespace(packed=lambda ids, _: rows[(ids.view(-1, LENGTH) * powers).sum(1)].flatten(0, 1)),
        lm_head=SimpleNamespace(weight=torch.eye(SYMBOLS + 1)),
    )


def mean_loss(model, runs=20, count=5000):
    """Mean and standard error of the loss in nats per word; words in their exact proportions."""
    place = torch.searchsorted(word_probabilities().cumsum(0), (torch.arange(count) + 0.5) / count)
    words = WORDS[place.clamp(max=len(WORDS) - 1)]
    losses = [float(diffusion_loss(model, words, key=(seed, 0, 0))) * LENGTH for seed in range(runs)]
    losses = torch.tensor(losses, dtype=torch.float64)
    return float(losses.mean()), float(losses.std()) / math.sqrt(runs)


@pytest.fixture(scope="module")
def conditionals():
    return true_conditionals()


@pytest.mark.slow
def test_the_loss_of_the_true_conditionals_is_the_entropy(conditionals):
    """Tight, up to the epsilon of the masking probability.

    With p = (1 - eps) t + eps the expectation is the integral of g(p) over eps..1, divided by 1 - eps, where g
    integrates to the entropy H over 0..1 and g(0) <= H is the cost of every symbol given all others: H + eps(H - g(0))
    to first order, here below 0.002 nats.
    """
    p = word_probabilities()
    entropy = -float((p * p.log()).sum())
    given_others = 0.0
    for word, probability in zip(WORDS.tolist(), p.tolist(), strict=True):
        for i, x in enumerate(word):
            noisy = tuple(MASK if i == j else y for j, y in enumerate(word))
            given_others -= probability * float(conditionals[noisy][i, x])
    expected = entropy + EPSILON * (entropy - given_others)
    mean, error = mean_loss(language_model(conditionals))
    assert error < 0.01 * entropy
    assert abs(mean - expected) < 4 * error


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["independent", "perturbed", "uniform"])
def test_the_loss_of_any_other_model_is_above_the_entropy(conditionals, kind):
    p = word_probabilities()
    entropy = -float((p * p.log()).sum())
    generator = torch.Generator().manual_seed(1)
    if kind == "independent":
        table = dict.fromkeys(conditionals, conditionals[(MASK,) * LENGTH])
    elif kind == "perturbed":
        noise = (torch.randn(LENGTH, SYMBOLS, generator=generator, dtype=torch.float64) for _ in conditionals)
        table = {k: (v + n).log_softmax(-1) for (k, v), n in zip(conditionals.items(), noise, strict=True)}
    else:
        table = {k: torch.full_like(v, -math.log(SYMBOLS)) for k, v in conditionals.items()}
    mean, error = mean_loss(language_model(table), runs=8)
    assert mean > entropy + 4 * error
    if kind == "uniform":
        assert abs(mean - LENGTH * math.log(SYMBOLS)) < 4 * error


def cost_by_masks(table):
    """Expected sum of cross-entropies of masked positions, as {how many are masked: sum over all such masks}."""
    costs = dict.fromkeys(range(LENGTH + 1), 0.0)
    for word, probability in zip(WORDS.tolist(), word_probabilities().tolist(), strict=True):
        for masked in itertools.product((False, True), repeat=LENGTH):
            noisy = tuple(MASK if m else x for m, x in zip(masked, word, strict=True))
            terms = [float(table[noisy][i, word[i]]) for i in range(LENGTH) if masked[i]]
            costs[sum(masked)] -= probability * sum(terms)
    return costs


@pytest.mark.slow
def test_which_noise_and_weights_keep_the_bound(conditionals):
    """The expected loss without drawing anything: over all masks by enumeration, over t by a fine grid."""
    costs = cost_by_masks(conditionals)
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000

    def masked_cost(p):  # expected cross-entropy of all masked tokens of a word: p times LENGTH times CE
        return sum(p**count * (1 - p) ** (LENGTH - count) * cost for count, cost in costs.items())

    def expected(noise):
        t = noise.times(grid)
        p = masking_probability(t, *noise.band)
        chances = [p, 1 - p] if noise.complementary else [p]
        return sum(float((masked_cost(p) / noise.divisor(t, p)).mean()) for p in chances) / len(chances)

    probabilities = word_probabilities()
    entropy = -float((probabilities * probabilities.log()).sum())
    paper = expected(Noise())
    assert paper == pytest.approx(entropy, rel=2 * EPSILON)
    assert expected(Noise(weight="bound")) == paper
    assert expected(Noise(bell=True, weight="bound")) == pytest.approx(paper, rel=1e-5)
    paired = (EPSILON, 1 - EPSILON)
    for bell, weight in ((False, "1/p"), (True, "bound")):
        found = expected(Noise(bell, paired, weight, complementary=True))
        assert found == pytest.approx(entropy, rel=2 * EPSILON), (bell, weight)
    # The formulas of the others, which are no bound.
    q = torch.tensor([reference_bell(t)[0] for t in grid[::20].tolist()])
    p = masking_probability(grid[::20])
    bell = float((q * masked_cost(p) / p).mean())
    assert expected(Noise(bell=True)) == pytest.approx(bell, rel=1e-3)
    mean = float((q * masked_cost(p)).mean() / (q * p).mean())
    assert expected(Noise(bell=True, weight="none")) == pytest.approx(mean, rel=1e-3)
    p = masking_probability(grid, 0.3, 0.8)
    assert expected(Noise(band=(0.3, 0.8))) == pytest.approx(float((masked_cost(p) / p).mean()))
    for noise in (Noise(bell=True), Noise(weight="none"), Noise(band=(0.5, 0.8))):
        assert abs(expected(noise) - entropy) > 0.005 * entropy, noise
