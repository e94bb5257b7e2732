"""The likelihood of a decoding rule: normalised, equal to the plain version, in the engine's own order."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from illada.errors import IlladaError
from illada.generation.engine import generate
from illada.generation.settings import GenerationSettings
from illada.scoring import layout
from illada.scoring.confidence import confidence_scores
from illada.scoring.likelihood import likelihood_scores
from illada.scoring.path import path_log_likelihoods, walk
from reference import log_p_of, reference_path

RULES = {
    "one a step": {},
    "margin": {"remasking": "margin"},
    "entropy": {"entropy_bound": 0.0},
    "two steps": {"steps_per_block": 2},
    "two steps, margin": {"steps_per_block": 2, "remasking": "margin"},
    "all at once": {"steps_per_block": 1},
    "threshold": {"threshold": 0.6},
    "entropy bound": {"entropy_bound": 0.7},
    "blocks of two": {"block_length": 2},
    "blocks of two, margin": {"block_length": 2, "remasking": "margin"},
    "blocks of three, two steps": {"block_length": 3, "steps_per_block": 2},
    "blocks of two, later masks": {"block_length": 2, "later_masks": True},
    "left to right": {"block_length": 1},
}


def rule(**changes):
    return GenerationSettings(eos_token_id=None, **changes)


@pytest.fixture(scope="module")
def four(build_model):
    """A vocabulary of three tokens and MASK."""
    special = {"mask_token_id": 3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return {causal: build_model(True, 4, vocab_size=4, causal=causal, **special) for causal in (False, True)}


def every_text(context, length):
    return [(context, list(text)) for text in itertools.product(range(3), repeat=length)]


@pytest.mark.parametrize("right", [(), (2,)], ids=["", "right context"])
@pytest.mark.parametrize("name", RULES)
def test_the_probabilities_of_all_texts_sum_to_1(four, name, right):
    for length in (1, 2, 5):
        nats = path_log_likelihoods(four[False], every_text([1, 0], length), rule(**RULES[name]), right)
        assert math.fsum(map(math.exp, nats)) == pytest.approx(1, abs=1e-6), length


def test_so_do_those_of_a_causal_model(four):
    texts = every_text([1, 0], 5)
    nats = path_log_likelihoods(four[True], texts, rule())
    assert math.fsum(map(math.exp, nats)) == pytest.approx(1, abs=1e-6)
    assert nats == likelihood_scores(four[True], texts)


def test_the_confidence_score_is_no_likelihood(four):
    """Eq. 2 looks at the true token to choose the position, so its sums have no reason to be 1, and are not."""
    for length in (2, 5):
        assert abs(math.fsum(map(math.exp, confidence_scores(four[False], every_text([1, 0], length)))) - 1) > 0.05


tokens = st.integers(0, 62).filter(lambda i: i != 5)  # neither model's mask
# Without any visible token all masks look the same, and rounding decides between them.
some_tokens = st.lists(tokens, min_size=1, max_size=6)
some_pairs = st.lists(st.tuples(some_tokens, some_tokens), min_size=1, max_size=4)


@examples(deadline=None, max_examples=40, derandomize=True)
@given(
    st.booleans(),
    some_pairs,
    st.sampled_from(sorted(RULES)),
    st.sampled_from([(), (2,), (5, 9)]),
    st.sampled_from([1, 20, 16_384]),
    st.sampled_from([1, 200, 2**24]),
)
def test_it_is_the_plain_one(tied, untied, tie, pairs, name, right, max_batch_tokens, held):
    model, settings = tied if tie else untied, rule(**RULES[name])
    saved, layout.LOGITS_HELD = layout.LOGITS_HELD, held
    try:
        got = walk(model, pairs, settings, right, max_batch_tokens)
    finally:
        layout.LOGITS_HELD = saved
    for path, pair in zip(got, pairs, strict=True):
        nats, steps = reference_path(model, *pair, settings, right)
        assert path.steps == steps
        assert path.log_likelihood == pytest.approx(nats, abs=1e-4)
    assert path_log_likelihoods(model, pairs, settings, right) == pytest.approx(
        [path.log_likelihood for path in got], abs=1e-4
    )


@pytest.mark.parametrize("name", RULES)
def test_the_order_is_the_engines(untied, name):
    """Of a text that the engine wrote greedily, the path has the engine's steps and its probabilities."""
    settings = rule(**{"block_length": 6, "max_new_tokens": 6, **RULES[name]})
    prompt, events = [7, 8, 9], []
    (answer,) = generate(untied, [prompt], settings, on_step=events.append)
    (path,) = walk(untied, [(prompt, answer.ids)], settings)
    known, steps = set(), []
    for event in events:
        now = {i for i, committed in enumerate(event.committed) if committed}
        steps.append(sorted(now - known))
        known = now
    assert path.steps == steps
    # The engine's confidences have MASK in the sum, which these random weights think likely at times.
    seen, want = [63] * len(answer.ids), 0.0
    for step in steps:
        end = settings.block_length * (step[0] // settings.block_length + 1)
        view = seen if settings.later_masks else seen[:end]
        log_p = log_p_of(untied, [*prompt, *view])[len(prompt) :]
        for i in step:
            assert int(log_p[i].argmax()) == answer.ids[i]
            want += float(log_p[i, answer.ids[i]])
        for i in step:
            seen[i] = answer.ids[i]
    assert path.log_likelihood == pytest.approx(want, abs=1e-4)


def test_the_choice_does_not_look_at_the_truth(untied):
    """All texts begin with the same step, which ordering by the true token's probability would not give."""
    pairs = [([1, 2], [i, i + 1, i + 2, i + 3]) for i in range(10, 40)]
    assert len({tuple(path.steps[0]) for path in walk(untied, pairs, rule())}) == 1


def test_all_scorers_agree_on_one_token(untied, build_model):
    pairs = [([1, 2], [10]), ([3], [11])]
    path = path_log_likelihoods(untied, pairs, rule(), (2,))
    assert confidence_scores(untied, pairs, (2,)) == pytest.approx(path, abs=1e-6)
    assert likelihood_scores(untied, pairs, 3, right_context=(2,)) == pytest.approx(path, abs=1e-6)
    log_p = [log_p_of(untied, [*context, 63, 2])[len(context)] for context, _ in pairs]
    assert path == pytest.approx([float(log_p[0][10]), float(log_p[1][11])], abs=1e-5)
    causal = build_model(tie=True, seed=3, causal=True)
    exact = [float(log_p_of(causal, context)[-1, answer[0]]) for context, answer in pairs]
    assert path_log_likelihoods(causal, pairs, rule(), (2,)) == pytest.approx(exact, abs=1e-5)
    assert likelihood_scores(causal, pairs) == pytest.approx(exact, abs=1e-5)


def test_left_to_right_is_the_chain_rule(untied):
    """Blocks of one token: each token given those before it, with nothing behind."""
    context, text = [1, 2], [20, 30, 40]
    want = sum(float(log_p_of(untied, [*context, *text[:i], 63])[-1, text[i]]) for i in range(3))
    assert path_log_likelihoods(untied, [(context, text)], rule(block_length=1)) == [pytest.approx(want, abs=1e-5)]


def test_paths_do_not_depend_on_company(untied):
    pairs = [([1, 2], [3, 4, 6]), ([5], [7]), ([9] * 20, [3, 4, 6, 8]), ([1, 2], [3, 4, 7])]
    for changes in ({"block_length": 2}, {"threshold": 0.3}):
        together = path_log_likelihoods(untied, pairs, rule(**changes))
        alone = [path_log_likelihoods(untied, [pair], rule(**changes))[0] for pair in pairs]
        assert together == pytest.approx(alone, abs=1e-5)
        assert path_log_likelihoods(untied, pairs[::-1], rule(**changes)) == pytest.approx(alone[::-1], abs=1e-5)
    assert path_log_likelihoods(untied, [], rule()) == []


def test_pairs_advance_together_and_equal_inputs_share_a_pass(untied, monkeypatch):
    seen = []
    packed = untied.model.packed
    monkeypatch.setattr(untied.model, "packed", lambda *a, **k: seen.append(a[1].lengths) or packed(*a, **k))
    path_log_likelihoods(untied, [([1], [3, 4, 6]), ([1], [7]), ([1], [13, 14, 15])], rule(block_length=2))
    assert [sorted(lengths) for lengths in seen[:2]] == [[2, 3], [3, 3]]
    assert len(seen) == 3


def test_the_training_flag_is_restored(build_model):
    model = build_model(tie=True, seed=3).train()
    path_log_likelihoods(model, [([1], [2])], rule())
    assert model.training


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"temperature": 0.5}, "without chance: leave out temperature"),
        ({"remasking": "random"}, "without chance: leave out remasking random"),
        ({"guidance_scale": 1.0}, "leave out guidance_scale"),
        ({"repetition_penalty": 1.2, "think_boost": 9.0}, "leave out repetition_penalty and think_boost"),
        ({"presence_penalty": 1.2, "logit_bias": {1: 2.0}}, "leave out presence_penalty and logit_bias"),
        ({"frequency_penalty": -0.1}, "leave out frequency_penalty"),
        ({"cache": "frozen", "block_length": 1}, "leave out cache"),
        ({"cache": "adaptive"}, "leave out cache"),
    ],
)
def test_other_rules_are_refused(untied, changes, says):
    with pytest.raises(IlladaError, match=says):
        path_log_likelihoods(untied, [([1], [2])], rule(**changes))


def test_bad_pairs_and_a_causal_models_masks_are_refused(untied, four):
    for pair, says in (([1], []), "no tokens"), (([1], [63]), "mask token"), (([1] * 96, [2]), "too long"):
        with pytest.raises(IlladaError, match=says):
            path_log_likelihoods(untied, [pair], rule())
    with pytest.raises(IlladaError, match="leave out threshold"):
        path_log_likelihoods(four[True], [([1], [2])], rule(threshold=0.9))
    with pytest.raises(IlladaError, match="needs a token before"):
        path_log_likelihoods(four[True], [([], [2])], rule())
    assert path_log_likelihoods(four[True], [([1], [2])], rule(cache="frozen", block_length=1)) == likelihood_scores(
        four[True], [([1], [2])]
    )


def test_unused_settings_change_nothing(untied):
    pairs = [([1, 2], [3, 4, 6])]
    plain = path_log_likelihoods(untied, pairs, rule())
    others = GenerationSettings(max_new_tokens=1, eos_token_id=3, stop=("x",), seed=3, speculate=2)
    assert path_log_likelihoods(untied, pairs, others) == plain
    assert torch.is_grad_enabled()
