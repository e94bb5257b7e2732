"""Both scores against the oracle, alone and in company; the layout of questions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import illada
from illada.errors import IlladaError
from illada.scoring import layout
from illada.scoring.confidence import confidence_scores
from illada.scoring.layout import score_layout
from illada.scoring.likelihood import likelihood_scores, masked_tokens
from illada.text.chat import encode_prompt
from reference import reference_confidence_score, reference_likelihood_score, reference_views

ids = st.integers(0, 63)
tokens = st.integers(0, 62).filter(lambda i: i != 5)  # neither model's mask
some_pairs = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 3, 9]).flatmap(lambda n: st.lists(ids, min_size=n, max_size=n)),
        st.lists(tokens, min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=4,
)
few = settings(deadline=None, max_examples=25, derandomize=True)
budgets = st.sampled_from([1, 20, 16_384])


def close(got, want):
    assert got == pytest.approx(want, abs=1e-4)


@few
@given(st.booleans(), some_pairs, st.sampled_from([(), (2,), (5, 9)]), budgets, st.sampled_from([1, 200, 2**24]))
def test_confidence_is_equation_2(tied, untied, tie, pairs, right, max_batch_tokens, held):
    model = tied if tie else untied
    saved, layout.LOGITS_HELD = layout.LOGITS_HELD, held
    try:
        got = confidence_scores(model, pairs, right, max_batch_tokens)
    finally:
        layout.LOGITS_HELD = saved
    close(got, [reference_confidence_score(model, *pair, right) for pair in pairs])


@few
@given(st.booleans(), some_pairs, st.integers(1, 7), st.integers(0, 2**40), st.sampled_from([(), (2,)]), budgets)
def test_likelihood_is_llada_equation_6(tied, untied, tie, pairs, samples, seed, right, max_batch_tokens):
    model = tied if tie else untied
    got = likelihood_scores(model, pairs, samples, seed, right, max_batch_tokens)
    want = [
        reference_likelihood_score(model, *pair, reference_views(len(pair[1]), samples, seed), right) for pair in pairs
    ]
    close(got, want)


def test_scores_do_not_depend_on_company(untied):
    pairs = [([1, 2], [3, 4, 5]), ([], [7]), ([9] * 20, [3, 4, 5]), ([1, 2], [3, 4, 6])]
    for score in (confidence_scores, likelihood_scores):
        together = score(untied, pairs)
        close(together, [score(untied, [pair])[0] for pair in pairs])
        close(together[::-1], score(untied, pairs[::-1]))
        assert score(untied, []) == []


def test_both_scores_agree_on_one_token_and_take_one_pass(untied, monkeypatch):
    pairs = [([1, 2], [letter]) for letter in (10, 11, 12, 13)]
    with torch.no_grad():
        log_p = untied(torch.tensor([[1, 2, 63, 2]])).logits[0, 2, :63].log_softmax(-1)  # without MASK
    want = [float(log_p[i]) for i in (10, 11, 12, 13)]
    seen = []
    packed = untied.model.packed
    monkeypatch.setattr(untied.model, "packed", lambda *a, **k: seen.append(a[0].numel()) or packed(*a, **k))
    rows = []
    hook = untied.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    # One sequence takes the room of one.
    close(confidence_scores(untied, pairs, (2,), max_batch_tokens=4), want)
    close(likelihood_scores(untied, pairs, samples=128, right_context=(2,), max_batch_tokens=4), want)
    hook.remove()
    assert seen == [4, 4]  # four candidates, one sequence of four tokens
    assert rows == [1, 1]  # at one position


def test_the_first_step_is_shared_and_finished_candidates_drop_out(untied, monkeypatch):
    seen = []
    packed = untied.model.packed
    monkeypatch.setattr(untied.model, "packed", lambda *a, **k: seen.append(a[1].lengths) or packed(*a, **k))
    confidence_scores(untied, [([1], [3, 4, 5]), ([1], [7]), ([1], [13, 14, 15])])
    assert [sorted(lengths) for lengths in seen] == [[2, 4], [4, 4], [4, 4]]


def test_forward_passes_hold_no_more_positions_than_allowed(untied, monkeypatch):
    seen = []
    packed = untied.model.packed
    monkeypatch.setattr(untied.model, "packed", lambda *a, **k: seen.append(a[1].lengths) or packed(*a, **k))
    confidence_scores(untied, [([1], [7]), ([2], [7]), ([3], [7]), ([4] * 8, [7])], max_batch_tokens=5)
    assert seen == [(2, 2), (2,), (9,)]
    monkeypatch.setattr(layout, "ON_CPU", 4)
    confidence_scores(untied, [([1], [7]), ([2], [7]), ([3], [7])])
    assert seen[3:] == [(2, 2), (2,)]


def test_confidence_reveals_the_surest_truth_first(untied):
    """The order matters: revealing left to right gives another sum."""
    pair = ([1, 2, 3], [20, 30, 40, 50])
    left_to_right = 0.0
    for i in range(4):
        seen = torch.tensor([[*pair[0], *pair[1][:i], *[63] * (4 - i)]])
        with torch.no_grad():
            left_to_right += float(untied(seen).logits[0, 3 + i, :63].log_softmax(-1)[pair[1][i]])
    assert abs(confidence_scores(untied, [pair])[0] - left_to_right) > 1e-2


def test_likelihood_estimates_the_any_order_bound(untied):
    """With every mask of every size, weighted as drawn, the mean is exact; many samples come near it."""
    pair = ([1, 2], [20, 30, 40])
    sets = [[[i] for i in range(3)], [[0, 1], [0, 2], [1, 2]], [[0, 1, 2]]]
    views = [(masked, 1 / 3 / len(masks)) for masks in sets for masked in masks]
    exact = reference_likelihood_score(untied, *pair, views)
    (estimate,) = likelihood_scores(untied, [pair], samples=3000, seed=1)
    assert estimate == pytest.approx(exact, abs=0.15)
    assert len({round(likelihood_scores(untied, [pair], samples=4, seed=seed)[0], 6) for seed in range(5)}) > 1


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(2, 40), st.integers(1, 130), st.integers(0, 2**62), st.booleans())
def test_views_are_the_plain_ones(length, samples, seed, complementary):
    masked_NL, share_N = masked_tokens(length, samples, seed, complementary)
    plain = reference_views(length, samples, seed, complementary)
    assert [np.flatnonzero(masked_L).tolist() for masked_L in masked_NL] == [masked for masked, _ in plain]
    assert share_N.tolist() == pytest.approx([share for _, share in plain])
    assert share_N.sum() == pytest.approx(1)
    often = masked_NL.sum(0)
    assert often.max() - often.min() <= (0 if complementary else -(-samples // 8))


@pytest.mark.slow
@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("samples", [1, 3, 8])
def test_every_number_of_tokens_is_as_likely(samples, complementary):
    """By their shares the numbers of masked tokens are uniform on 1..L, and so is where they lie."""
    length, seeds = 5, 4000
    counts, places = np.zeros(length + 1), np.zeros(length)
    for seed in range(seeds):
        masked_NL, share_N = masked_tokens(length, samples, seed, complementary)
        np.add.at(counts, masked_NL.sum(1), share_N / seeds)
        alone = masked_NL[masked_NL.sum(1) == 1].sum(0)
        places += alone
    assert counts[0] == 0
    assert counts[1:] == pytest.approx(np.full(length, 1 / length), abs=0.03)
    assert places / places.sum() == pytest.approx(np.full(length, 1 / length), abs=0.04)


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("length", [6, 12])
def test_many_samples_see_many_subsets(length, complementary):
    """Three of six have 20 subsets, and the noise of an estimate must go on falling until it has seen all."""
    half = length // 2
    masked_NL, _ = masked_tokens(length, 256, 5, complementary)
    found = {tuple(np.flatnonzero(masked_L)) for masked_L in masked_NL if masked_L.sum() == half}
    assert len(found) > min(15, 256 // length // 2)


def test_views_leave_less_noise(untied):
    """Beside as many samples that are drawn on their own; on a trained network far less than here."""
    pair = ([1, 2, 3], [*range(5, 17)])
    plain = [np.mean([likelihood_scores(untied, [pair], 1, 8 * seed + i)[0] for i in range(8)]) for seed in range(60)]
    ours = [likelihood_scores(untied, [pair], 8, seed)[0] for seed in range(60)]
    assert np.var(ours) < 0.75 * np.var(plain)
    assert np.mean(ours) == pytest.approx(np.mean(plain), abs=3 * np.std(plain) / 60**0.5)


def test_right_context_is_seen(untied):
    pairs = [([1, 2], [3, 4])]
    for score in (confidence_scores, likelihood_scores):
        assert abs(score(untied, pairs)[0] - score(untied, pairs, right_context=(2,))[0]) > 1e-3


def test_the_training_flag_is_restored(build_model):
    model = build_model(tie=True, seed=3).train()
    meanwhile = []
    model.lm_head.register_forward_hook(lambda *_: meanwhile.append(model.training))
    confidence_scores(model, [([1], [2])])
    assert model.training
    assert meanwhile == [False]


@pytest.mark.parametrize("score", [confidence_scores, likelihood_scores])
@pytest.mark.parametrize(
    ("pairs", "right", "says"),
    [
        ([([1], [2]), ([1], [])], (), "candidate 1 has no tokens"),
        ([([1] * 90, [2] * 6)], (2,), "context 90 . candidate 6 . right context 1 = 97 tokens"),
        ([([1], [64])], (), "outside the vocabulary of 64"),
        ([([-1], [4])], (), "outside the vocabulary of 64"),
        ([([1], [4, 5])], (), "candidate 0 holds the mask token 5"),
    ],
)
def test_bad_pairs_are_refused(tied, score, pairs, right, says):
    with pytest.raises(IlladaError, match=says):
        score(tied, pairs, right_context=right)


def test_bad_numbers_are_refused(tied):
    with pytest.raises(IlladaError, match="samples"):
        likelihood_scores(tied, [([1], [2])], samples=0)
    with pytest.raises(IlladaError, match="max_batch_tokens"):
        confidence_scores(tied, [([1], [2])], max_batch_tokens=0)


class Greedy:
    """One id per letter, except that some strings are single tokens."""

    bos_token_id: int | None = 0
    eos_token_id: int | None = 2

    def encode(self, text, add_special_tokens=True):
        found = []
        while text:
            piece = next((p for p in (" B", "xy") if text.startswith(p)), text[0])
            found.append({" B": 1000, "xy": 1001}.get(piece, ord(piece[0])))
            text = text[len(piece) :]
        return [7] * add_special_tokens + found


def letters(text):
    return [ord(c) for c in text]


def test_layout_puts_bos_before_eos_behind_and_moves_white_space():
    pairs, right = score_layout(Greedy(), "A: ", ["B", "C"])
    assert right == (2,)
    assert pairs == [([0, *letters("A:")], [1000]), ([0, *letters("A:")], letters(" C"))]
    assert score_layout(Greedy(), "A:", [" B"])[0] == pairs[:1]
    assert score_layout(Greedy(), "", ["C"])[0] == [([0], letters("C"))]


def test_layout_slices_as_the_authors_do_when_the_context_would_change():
    # "ax" and "yb" together are "a", "xy", "b": what follows two ids is "b" alone.
    assert score_layout(Greedy(), "ax", ["yb"])[0] == [([0, *letters("ax")], letters("b"))]
    # Nothing follows in "a", "xy".
    assert score_layout(Greedy(), "ax", ["y"])[0] == [([0, *letters("ax")], letters("y"))]
    assert score_layout(Greedy(), "ax", ["yb"], begins=False)[0] == [(letters("ax"), letters("b"))]


def test_layout_without_special_ids():
    tokenizer = Greedy()
    tokenizer.bos_token_id = tokenizer.eos_token_id = None
    assert score_layout(tokenizer, "A", ["C"]) == ([(letters("A"), letters("C"))], ())


def test_pairs_that_look_the_same_may_ask_for_different_tokens(tied):
    """The context of the first holds MASK (id 5) where the second has its candidate's first token masked."""
    pairs = [([9, 5], [7]), *(([9], [i, 7]) for i in range(10, 20))]
    wanted = [reference_confidence_score(tied, *pair) for pair in pairs]
    assert confidence_scores(tied, pairs) == pytest.approx(wanted, abs=1e-4)


def test_candidates_as_texts_after_any_context(build_model, tiny_tokenizer):
    """A text by the authors' layout; a chat, its ids and what `apply_chat_template` returns alike."""
    model = build_model(tie=True, seed=3, vocab_size=len(tiny_tokenizer))
    texts = ["two", "three four"]
    pairs, right = score_layout(tiny_tokenizer, "one ", texts)
    assert illada.score(model, "one ", texts, tiny_tokenizer) == confidence_scores(model, pairs, right)
    assert illada.score(model, "one ", texts, tiny_tokenizer, "likelihood", 4) == likelihood_scores(
        model, pairs, 4, 0, right
    )
    chat = [{"role": "user", "content": "one"}]
    encoded = tiny_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    ids = encode_prompt(tiny_tokenizer, chat)
    want = confidence_scores(model, [(ids, tiny_tokenizer.encode(t, add_special_tokens=False)) for t in texts], (2,))
    assert [illada.score(model, context, texts, tiny_tokenizer) for context in (chat, ids, encoded)] == [want] * 3
    assert illada.score(model, "one ", texts, tiny_tokenizer, "path") != want
    for words, says in ((("one", "two"), "a list of texts"), (("one", ["two"], tiny_tokenizer, "best"), "not 'best'")):
        with pytest.raises(IlladaError, match=says):
            illada.score(model, *words[:2], tiny_tokenizer, *words[3:])
