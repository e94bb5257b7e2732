"""The bound with a gradient is the plain one; without bias whatever the noise, and less noisy with complements."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import illada
from illada.post_training.bounds import Answer, AnswersObjective, Views, elbo, log_probabilities
from illada.scoring.likelihood import views
from reference import reference_bound

PAIRS = [([1, 2, 3], [4, 6, 9, 7]), ([9], [8, 8]), ([3, 4], [11])]


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_elbo_is_the_plain_one(name, complementary, request):
    model = request.getfixturevalue(name)
    found = illada.elbo(model, PAIRS, 5, 7, complementary)
    plain = [reference_bound(model, *pair, 5, 7, complementary) for pair in PAIRS]
    assert found == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("complementary", [False, True])
def test_training_sees_the_same_bounds(untied, complementary):
    answers = [Answer(np.array([*context, *answer]), len(context), 7) for context, answer in PAIRS]
    objective = AnswersObjective(untied, torch.device("cpu"), "fp32")

    def bounds(some):
        batch = Views.of(some, 5, complementary)
        return batch.sums(objective(batch))

    found = bounds(answers)
    assert found.tolist() == pytest.approx(elbo(untied, PAIRS, 5, 7, complementary), rel=1e-5)
    alone = [bounds([answer]).item() for answer in answers]
    assert alone == pytest.approx(found.tolist(), rel=1e-6)


@given(length=st.integers(1, 40), samples=st.integers(1, 40), seed=st.integers(0, 2**62), complementary=st.booleans())
def test_views_mask_something_and_weigh_it(length, samples, seed, complementary):
    masked_NL, weight_N = views(length, samples, seed, complementary)
    assert masked_NL.any(1).all()
    assert len(weight_N) == len(masked_NL) <= samples * (1 + complementary)
    # Exact where every token costs the same.
    assert masked_NL.sum(1) @ weight_N == pytest.approx(length)


@pytest.mark.parametrize("complementary", [False, True])
def test_weights_are_unbiased(complementary):
    """Over many seeds each token's weights add up to 1 on average."""
    length, seeds = 4, 3000
    total = np.zeros(length)
    for seed in range(seeds):
        masked_NL, weight_N = views(length, 2, seed, complementary)
        total += weight_N @ masked_NL
    assert total / seeds == pytest.approx(np.ones(length), abs=0.06)


def test_the_bound_lies_below_the_likelihood(untied):
    """Two tokens: the mean over all masks is the mean over both orders of writing, below the log of their mean."""
    context, answer = [1, 2], [5, 9]
    mask = untied.config.mask_token_id

    def log_p(seen, place):
        with torch.no_grad():
            logits = untied(torch.tensor([[*context, *seen]])).logits[0, len(context) + place]
        logits[mask] = -torch.inf
        return logits.log_softmax(-1)[answer[place]].item()

    first = log_p([mask, mask], 0) + log_p([answer[0], mask], 1)
    exact = (first + log_p([mask, mask], 1) + log_p([mask, answer[1]], 0)) / 2
    for complementary in (False, True):
        estimates = [elbo(untied, [(context, answer)], 8, seed, complementary)[0] for seed in range(60)]
        assert np.mean(estimates) == pytest.approx(exact, abs=4 * np.std(estimates) / 60**0.5 + 1e-6)


@pytest.mark.parametrize("mask_id", [None, 3])
@pytest.mark.parametrize("rows", [1, 200])
def test_log_probabilities_and_their_gradients(monkeypatch, mask_id, rows):
    from illada.post_training import bounds

    monkeypatch.setattr(bounds, "LOGITS_BYTES", 64 * 4 * 11)  # chunks of 64 rows
    torch.manual_seed(0)
    hidden, head = torch.randn(rows, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    target, weight = torch.randint(4, 11, (rows,)), torch.randn(rows)
    (log_probabilities(hidden, head, target, mask_id).square() * weight).sum().backward()
    found = hidden.grad.clone(), head.grad.clone()
    hidden.grad = head.grad = None
    logits = hidden @ head.T
    if mask_id is not None:
        logits = logits.masked_fill(torch.arange(11) == mask_id, -torch.inf)
    plain = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
    (plain.square() * weight).sum().backward()
    torch.testing.assert_close(found, (hidden.grad, head.grad), rtol=1e-4, atol=1e-5)


def test_bad_answers_are_one_line(tied):
    for pairs, words in (
        ([([1], [])], "no tokens"),
        ([([1], [tied.config.mask_token_id])], "mask token"),
        ([([1], [2] * 200)], "too long"),
    ):
        with pytest.raises(illada.IlladaError, match=words):
            elbo(tied, pairs)
    assert list(itertools.islice(elbo(tied, []), 1)) == []
