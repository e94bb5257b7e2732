"""`generate` against the oracle: same tokens, same forwards, same reason to end, in any company."""

import dataclasses
import itertools
import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import reference
from illada.errors import IlladaError
from illada.generation import sampling
from illada.generation.engine import Engine, generate, infill
from illada.generation.optional.drafts import draft_ahead, has_come_true
from illada.generation.request import Proposals, Request
from illada.generation.settings import GenerationSettings
from illada.generation.unmask import positions_to_commit, quota
from illada.model import attention
from illada.model.attention import Packing, eager_attention
from reference import reference_generate, reference_infill


class Pieces:
    """A tokenizer with a piece of text per id; ids without one are their number in brackets."""

    # 5 is left out: one of the models has it for MASK.
    pieces: ClassVar = dict(
        enumerate(["<", "/", "th", "ink", ">", "[5]", "a", "b", "ab", "ST", "OP", "xS", "Py", "</"])
    )

    def encode(self, text, add_special_tokens=True):
        ids = []
        while text:
            i = max((i for i, p in self.pieces.items() if text.startswith(p)), key=lambda i: len(self.pieces[i]))
            ids.append(i)
            text = text[len(self.pieces[i]) :]
        return [0] * add_special_tokens + ids

    def decode(self, ids, skip_special_tokens=False):
        return "".join(self.pieces.get(i, f"[{i}]") for i in ids)


THINK = (13, 2, 3, 4)


@st.composite
def requests(draw):
    rule = draw(st.sampled_from(["low_confidence", "margin", "random", "threshold", "entropy"]))
    # Where all is MASK all positions are alike, and rounding alone would rank them; random ranks do not care.
    sizes = [0, 1, 2, 5, 12, 12, 87] if rule == "random" else [1, 2, 5, 12, 12, 87]
    prompt = draw(st.sampled_from(sizes).flatmap(lambda n: st.lists(st.integers(0, 63), min_size=n, max_size=n)))
    assume(rule == "random" or not {*prompt} <= {5, 63})
    block = draw(st.integers(1, 8))
    temperature = draw(st.sampled_from([0.0, 0.0, 0.5, 1.5]))
    cache = draw(st.sampled_from(["none", "none", "prefix", "dual", "frozen", "adaptive"]))
    if cache != "none":  # the oracle rounds otherwise, which masks alone would show
        prompt = [9, *prompt]
    return prompt, GenerationSettings(
        max_new_tokens=draw(st.integers(block, 17)),
        block_length=block,
        steps_per_block=None if rule in ("threshold", "entropy") else draw(st.none() | st.integers(1, block)),
        threshold=draw(st.sampled_from([0.05, 0.3, 0.6, 1.0])) if rule == "threshold" else None,
        entropy_bound=draw(st.sampled_from([0.05, 0.2, 1.5, 6.0])) if rule == "entropy" else None,
        remasking=rule if rule in ("margin", "random") else "low_confidence",
        temperature=temperature,
        top_k=draw(st.none() | st.sampled_from([1, 3, 10, 100])) if temperature else None,
        top_p=draw(st.sampled_from([1e-6, 0.5, 0.9, 1.0, 1.0])) if temperature else 1.0,
        min_p=draw(st.sampled_from([0.0, 0.0, 0.05, 0.7])) if temperature else 0.0,
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 0.7, 1.4, 30.0])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 0.7, -2.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.4, -0.5])),
        logit_bias=draw(st.sampled_from([None, None, {7: 3.0, 2: -100.0}])),
        seed=draw(st.integers(0, 2**63 - 1)),
        eos_token_id=draw(st.sampled_from([None, 2, tuple(range(12)), (7, 63)])),
        guidance_scale=draw(st.sampled_from([0.0, 0.0, 0.7, 2.0])),
        later_masks=cache == "dual" or draw(st.booleans()),
        cache=cache,
        refresh_below=draw(st.sampled_from([1e-9, 0.1, 0.2, 1.0])) if cache == "adaptive" else 0.5,
        speculate=draw(st.sampled_from([0, 0, 1, 3, 50])),
        think_boost=draw(st.sampled_from([0.0, 0.0, 3.0, 100.0])),
        think_boost_power=draw(st.sampled_from([0.0, 1.0, 3.0])),
    )


def expected(model, prompt, settings):
    return reference_generate(model, prompt, settings, THINK)[:3]


def plain(generation):
    return generation.ids, generation.finish_reason, generation.forwards


def agree(answers, wanted, settings):
    """Whether all is as wanted; speculation may save passes."""
    for answer, (ids, reason, forwards), one in zip(answers, wanted, settings, strict=True):
        assert (answer.ids, answer.finish_reason) == (ids, reason)
        assert answer.forwards <= forwards if one.speculate else answer.forwards == forwards


@pytest.mark.slow
@hypothesis_settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.booleans(),
    st.lists(requests(), min_size=1, max_size=4),
    st.sampled_from([1, 60, 16_384]),
    st.sampled_from([1, 200, 2**24]),
)
def test_generate_is_the_reference_alone_and_in_any_batch(tied, untied, tie, batch, max_batch_tokens, held):
    model = tied if tie else untied
    prompts, settings = zip(*batch, strict=True)
    answers = [reference_generate(model, *request, THINK) for request in batch]
    want = [answer[:3] for answer in answers]
    engine = Engine(model, Pieces(), max_batch_tokens=max_batch_tokens, max_logits=held)
    for request in batch:
        engine.submit(*request)
    together = engine.run()
    agree(together, want, settings)
    for generation, (*_, log_probs) in zip(together, answers, strict=True):
        assert generation.log_probs == pytest.approx(log_probs, abs=2e-4)
    agree(generate(model, prompts[::-1], settings[::-1], Pieces())[::-1], want, settings)
    agree(generate(model, prompts[:1], settings[0], Pieces()), want[:1], settings[:1])


MANY_MODES = [
    GenerationSettings(12, 4, eos_token_id=(7, 63), **change)
    for change in (
        {},
        {"speculate": 3},
        {"cache": "frozen", "speculate": 3},
        {"cache": "prefix", "guidance_scale": 1.0, "speculate": 3},
        {"cache": "adaptive", "refresh_below": 0.2, "threshold": 0.1},
        {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.3, "later_masks": True},
        {"cache": "dual", "later_masks": True, "threshold": 0.1},
        {"cache": "dual", "later_masks": True, "speculate": 3, "guidance_scale": 1.0},
    )
]


@pytest.mark.slow
def test_the_compiled_form_is_the_reference(build_model):
    model = build_model(tie=True, seed=3)
    prompts = [[9, *range(n)] for n in (3, 1, 7, 2, 30, 4, 5, 8)]
    wanted = [expected(model, *request) for request in zip(prompts, MANY_MODES, strict=True)]
    torch.compiler.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    model.model.compile_blocks(backend)
    agree(generate(model, prompts, MANY_MODES), wanted, MANY_MODES)
    # Before and behind; before in the last layer, which takes positions; of none there is one for each layer or length.
    assert 0 < len(graphs) <= 6


def varlen_by_the_book(query, key, value, ends_q, ends_k, most_q, most_k, *, window_size, enable_gqa):
    """What torch's kernel is documented to do, segment by segment."""
    assert (ends_q.dtype, ends_k.dtype) == (torch.int32, torch.int32)
    lengths = [ends.diff().tolist() for ends in (ends_q, ends_k)]
    assert [max(n) for n in lengths] == [most_q, most_k]
    parts = [x.split(n) for x, n in zip((query, key, value), (lengths[0], lengths[1], lengths[1]), strict=True)]
    outputs = []
    for segment in zip(*parts, strict=True):
        seen = torch.ones(len(segment[0]), len(segment[1]), dtype=torch.bool)
        if window_size == (-1, 0):  # causal, the last query beside the last key
            seen = seen.tril(len(segment[1]) - len(segment[0]))
        heads = (x[None].transpose(1, 2) for x in segment)
        outputs.append(eager_attention(*heads, attn_mask=seen, enable_gqa=enable_gqa)[0].transpose(0, 1))
    return torch.cat(outputs)


def test_packed_sequences_in_one_kernel_are_the_reference(build_model, monkeypatch):
    model = build_model(tie=True, seed=3)
    prompts = [[9, *range(n)] for n in (3, 1, 7, 2, 30, 4, 5, 8)]
    wanted = [expected(model, *request) for request in zip(prompts, MANY_MODES, strict=True)]
    monkeypatch.setattr(attention, "varlen_attn", varlen_by_the_book)
    model.set_attn_implementation("varlen")
    agree(generate(model, prompts, MANY_MODES), wanted, MANY_MODES)


def test_a_causal_model_in_one_kernel_is_the_same(build_model, monkeypatch):
    model = build_model(tie=True, seed=3, causal=True)
    prompts, settings = [[9, *range(n)] for n in (3, 1, 7, 2)], GenerationSettings(max_new_tokens=6, eos_token_id=None)
    wanted = generate(model, prompts, settings)
    monkeypatch.setattr(attention, "varlen_attn", varlen_by_the_book)
    model.set_attn_implementation("varlen")
    assert generate(model, prompts, settings) == wanted


def test_the_packed_kernel_is_refused_where_there_is_none(build_model):
    model = build_model(tie=True, seed=3)
    model.set_attn_implementation("varlen")
    with pytest.raises(IlladaError, match="varlen needs CUDA and bf16 or fp16, not cpu and float32: take sdpa"):
        generate(model, [[9]], SMALL)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_gives_the_tokens_of_the_cpu(build_model):
    model = build_model(tie=True, seed=3)
    prompts = [[9, *range(n)] for n in (3, 1, 7, 2, 30, 4, 5, 8)]
    wanted = [expected(model, *request) for request in zip(prompts, MANY_MODES, strict=True)]
    agree(generate(model.cuda(), prompts, MANY_MODES), wanted, MANY_MODES)
    half = model.to(torch.bfloat16)
    packing, ids = Packing((3, 9, 9, 1)), torch.arange(22, device="cuda")
    for causal in (False, True):
        half.config.causal = causal
        half.set_attn_implementation("sdpa")
        plain_states = half.model.packed(ids, packing)
        half.set_attn_implementation("varlen")
        torch.testing.assert_close(half.model.packed(ids, packing), plain_states, atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    ("cache", "block", "steps"),
    [("prefix", 4, 1), ("prefix", 1, None), ("dual", 4, 1), ("dual", 1, None), ("frozen", 12, 1)],
)
def test_a_cache_that_is_always_fresh_is_exact(tied, cache, block, steps):
    """One pass a block renews a prefix each time; one pass in all uses nothing old."""
    rule = {"block_length": block, "steps_per_block": steps, "later_masks": cache == "dual"}
    exact = GenerationSettings(max_new_tokens=12, eos_token_id=None, **rule)
    cached = dataclasses.replace(exact, cache=cache)
    prompts = [[8, 9, 10, 11], [20], []]
    assert [plain(a) for a in generate(tied, prompts, cached)] == [plain(a) for a in generate(tied, prompts, exact)]


def test_positions_computed_are_counted(tied):
    settings = {"max_new_tokens": 12, "block_length": 4, "eos_token_id": None}
    prompt = [8, 9, 10, 11, 12]
    counted = {
        cache: generate(tied, [prompt], GenerationSettings(**settings, cache=cache))[0].positions
        for cache in ("none", "prefix", "frozen")
    }
    assert counted["none"] == 4 * (5 + 4) + 4 * (5 + 8) + 4 * (5 + 12)
    assert counted["prefix"] == (9 + 3 * 4) + (13 + 3 * 4) + (17 + 3 * 4)
    assert counted["frozen"] == (9 + 3 * 4) + (8 + 3 * 4) + (8 + 3 * 4)
    guided = GenerationSettings(**settings, guidance_scale=1.0)
    assert generate(tied, [prompt], guided)[0].positions == 2 * counted["none"]
    dual = GenerationSettings(**settings, cache="dual", later_masks=True)
    assert generate(tied, [prompt], dual)[0].positions == 3 * (17 + 3 * 4)
    ahead = generate(tied, [prompt], dataclasses.replace(dual, speculate=2))[0]
    assert (ahead.positions - 3 * 17) % 4 == 0  # so are drafts


@pytest.mark.slow
@hypothesis_settings(deadline=None, max_examples=30, derandomize=True)
@given(
    st.lists(
        st.lists(st.none() | st.integers(6, 60), min_size=2, max_size=20).filter(
            lambda t: None in t and any(x is not None for x in t)
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([{}, {"threshold": 0.3}, {"steps_per_block": 3}, {"steps_per_block": 30}, {"guidance_scale": 0.7}]),
    st.sampled_from([0, 0, 3]),
)
def test_infill_is_the_reference_alone_and_in_any_batch(tied, templates, change, speculate):
    settings = GenerationSettings(**change, speculate=speculate)
    want = [reference_infill(tied, template, settings) for template in templates]
    together = infill(tied, templates, settings, tokenizer=Pieces())
    assert [g.ids for g in together] == [ids for ids, _ in want]
    for answer, (_, forwards) in zip(together, want, strict=True):
        assert answer.forwards <= forwards if speculate else answer.forwards == forwards
    assert [g.ids for g in infill(tied, templates[::-1], settings)[::-1]] == [ids for ids, _ in want]
    for template, answer in zip(templates, together, strict=True):
        assert all(a == b for a, b in zip(template, answer.ids, strict=True) if a is not None)
        assert len(answer.log_probs) == template.count(None)
        assert not any(map(math.isnan, answer.log_probs))
        assert answer.text == Pieces().decode(answer.ids)


@pytest.mark.parametrize(
    ("template", "change", "words"),
    [
        ([7, 8], {}, "template 0 has no slot"),
        ([None, 99], {}, "template 0 holds ids outside"),
        ([None] * 97, {}, "template 0 has 97 tokens but the context is 96"),
        (["a", None], {}, "not a list of token ids"),
        ([None, 7], {"think_boost": 2.0}, "think_boost cannot be used to fill slots"),
    ],
)
def test_templates_that_cannot_be_filled_are_refused(tied, template, change, words):
    with pytest.raises(IlladaError, match=words):
        infill(tied, [template], GenerationSettings(**change))


class Biased(torch.nn.Module):
    """An LM head that favours some ids."""

    def __init__(self, head, bias):
        super().__init__()
        self.head, self.bias = head, bias

    def forward(self, hidden):
        return self.head(hidden) + self.bias


def biased(model, **by_id):
    bias = torch.zeros(model.config.vocab_size)
    for i, amount in by_id.items():
        bias[int(i[1:])] = amount
    model.lm_head = Biased(model.lm_head, bias)
    return model


SMALL = GenerationSettings(max_new_tokens=12, block_length=4, eos_token_id=None)


@pytest.mark.parametrize("speculate", [0, 2])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "frozen", "adaptive"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"threshold": 0.9},
        {"entropy_bound": 0.1},
        {"steps_per_block": 2},
        {"temperature": 1.0},
        {"remasking": "random"},
        {"remasking": "margin"},
    ],
)
def test_a_model_that_wants_mask_everywhere_still_progresses(build_model, change, cache, speculate):
    model = biased(build_model(tie=True, seed=3), i5=50.0)
    settings = dataclasses.replace(SMALL, **change, cache=cache, later_masks=cache == "dual", speculate=speculate)
    (answer,) = generate(model, [[8, 9]], settings)
    assert len(answer.ids) == 12
    assert 5 not in answer.ids
    agree([answer], [expected(model, [8, 9], settings)], [settings])


def test_confidence_counts_the_probability_of_mask(build_model):
    model = biased(build_model(tie=True, seed=3), i5=50.0)
    events = []
    generate(model, [[8, 9]], SMALL, on_step=events.append)
    assert max(events[-1].confidence) < 1e-15


def test_eos_inside_the_prompt_ends_nothing(tied):
    prompt = [2, 9, 2, 2]
    settings = dataclasses.replace(SMALL, eos_token_id=2)
    (answer,) = generate(tied, [prompt], settings)
    assert plain(answer) == expected(tied, prompt, settings)
    assert answer.forwards >= 4


def test_the_mask_id_inside_the_prompt_is_a_token_like_any_other(tied):
    # Where all is MASK all positions are alike and rounding would rank them, so ranks are random there.
    for prompt, remasking in (([5], "random"), ([5, 5, 9, 5], "low_confidence"), ([9, 5], "low_confidence")):
        settings = dataclasses.replace(SMALL, remasking=remasking)
        (answer,) = generate(tied, [prompt], settings)
        assert answer.forwards == 12  # positions of the prompt are never filled in
        assert plain(answer) == expected(tied, prompt, settings)


def test_a_batch_of_two_is_two_batches_of_one(untied):
    prompts = [[8, 9, 10], [30] * 11]
    both = generate(untied, prompts, SMALL)
    for one, prompt in zip(both, prompts, strict=True):
        (alone,) = generate(untied, [prompt], SMALL)
        assert plain(one) == plain(alone)
        assert one.log_probs == pytest.approx(alone.log_probs, abs=1e-5)
    assert both[0].ids != both[1].ids


def test_guidance_with_prompts_of_different_lengths(untied):
    prompts = [[8], [30] * 11, [], [7, 1, 3]]
    settings = dataclasses.replace(SMALL, guidance_scale=1.5, remasking="random")
    answers = generate(untied, prompts, settings)
    assert [plain(a) for a in answers] == [expected(untied, prompt, settings) for prompt in prompts]
    assert [a.forwards for a in answers] == [24] * 4
    assert answers[1].ids != generate(untied, prompts, dataclasses.replace(settings, guidance_scale=0.0))[1].ids


@pytest.mark.parametrize("mask_id", [0, 17, 63])
def test_any_mask_id(build_model, mask_id):
    model = build_model(tie=True, seed=4, mask_token_id=mask_id)
    (answer,) = generate(model, [[1, 2, 3]], SMALL)
    assert plain(answer) == expected(model, [1, 2, 3], SMALL)
    assert mask_id not in answer.ids


@pytest.mark.parametrize(
    "change",
    [
        *({"cache": cache} for cache in ("prefix", "frozen", "adaptive")),
        {"cache": "dual", "later_masks": True},
        {"speculate": 3},
    ],
)
@pytest.mark.parametrize("rule", [{}, {"threshold": 0.2}, {"guidance_scale": 1.0}, {"later_masks": True}])
def test_the_traps_of_others_in_every_mode(tied, change, rule):
    """EOS and MASK inside prompts, several rows, no prompt at all, a prompt that leaves one block."""
    settings = dataclasses.replace(SMALL, eos_token_id=2, remasking="low_confidence", **{**change, **rule})
    prompts = [[2, 9, 2, 2], [9, 5, 5], [30] * 11, [8] + [9] * 90]
    answers = generate(tied, prompts, settings)
    agree(answers, [expected(tied, prompt, settings) for prompt in prompts], [settings] * 4)
    assert len(generate(tied, [[]], dataclasses.replace(settings, eos_token_id=None))[0].ids) == 12


def test_an_empty_prompt_and_no_prompt(tied):
    settings = dataclasses.replace(SMALL, remasking="random")
    assert plain(generate(tied, [[]], settings)[0]) == expected(tied, [], settings)
    assert generate(tied, [], SMALL) == []


def test_right_padding_changes_nothing(tied):
    row, other = [8, 9, 10], [30] * 11
    ids = torch.tensor([row + [1] * 8, other])
    kept = torch.tensor([[1] * 3 + [0] * 8, [1] * 11])
    with torch.no_grad():
        padded, alone = tied(ids, attention_mask=kept).logits[0, :3], tied(torch.tensor([row])).logits[0]
    torch.testing.assert_close(padded, alone, atol=1e-4, rtol=0)


def test_the_budget_is_rounded_down_to_blocks_and_cut_to_the_context(tied):
    settings = dataclasses.replace(SMALL, max_new_tokens=11)
    assert len(generate(tied, [[9]], settings)[0].ids) == 8
    assert len(generate(tied, [[9] * 87], SMALL)[0].ids) == 8


def test_one_block_is_fixed_length_generation(tied):
    settings = GenerationSettings(max_new_tokens=12, block_length=12, eos_token_id=None)
    assert plain(generate(tied, [[9]], settings)[0]) == expected(tied, [9], settings)


def test_no_trailing_forwards_under_a_threshold(build_model):
    model = biased(build_model(tie=True, seed=3), i7=50.0)
    (answer,) = generate(model, [[9]], dataclasses.replace(SMALL, threshold=0.9))
    assert (answer.ids, answer.forwards) == ([7] * 12, 3)


def test_quotas_are_even_with_the_remainder_first():
    for block in range(1, 40):
        for steps in range(1, block + 1):
            counts = [quota(block, steps, i) for i in range(steps)]
            assert sum(counts) == block
            assert min(counts) >= 1
            assert counts == sorted(counts, reverse=True)
            assert counts[0] - counts[-1] <= 1


@pytest.mark.parametrize("confidence", [0.25, math.nan])
def test_ties_go_to_the_left(confidence):
    tied_M, position_M = np.full(128, confidence, dtype=np.float32), np.arange(128)
    halves = GenerationSettings(block_length=128, steps_per_block=2)
    assert positions_to_commit(halves, tied_M, position_M, 128, 0, 0).tolist() == list(range(64))
    sure = GenerationSettings(block_length=128, threshold=0.5)
    assert positions_to_commit(sure, tied_M, position_M, 128, 0, 0).tolist() == [0]
    tied_M[7:9] = 0.5  # at least the threshold
    assert positions_to_commit(sure, tied_M, position_M, 128, 0, 0).tolist() == [7, 8]


@pytest.mark.slow
def test_gumbel_max_samples_the_softmax(build_model):
    model = build_model(tie=False, seed=5, vocab_size=8)
    prompt, temperature, count = [3, 6], 0.7, 4000
    settings = [
        GenerationSettings(max_new_tokens=1, block_length=1, eos_token_id=None, temperature=temperature, seed=seed)
        for seed in range(count)
    ]
    drawn = torch.bincount(torch.tensor([g.ids[0] for g in generate(model, [prompt] * count, settings)]), minlength=8)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, 5]])).logits[0, -1].double()
    logits[5] = -math.inf
    wanted = count * (logits / temperature).softmax(-1)
    assert drawn[5] == 0
    kept = wanted > 5
    assert kept.sum() >= 4
    chi_square = ((drawn - wanted)[kept] ** 2 / wanted[kept]).sum()
    assert chi_square < 25  # at most 6 degrees of freedom: p < 4e-4


def next_logits(model, prompt):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, model.config.mask_token_id]])).logits[0, -1].double()
    logits[model.config.mask_token_id] = -math.inf
    return logits


@pytest.mark.parametrize(("top_k", "top_p", "temperature"), [(3, 1.0, 9.0), (None, 0.7, 2.0), (4, 0.6, 9.0)])
def test_the_draw_is_from_all_the_ids_kept_and_no_others(build_model, top_k, top_p, temperature):
    model = build_model(tie=False, seed=5, vocab_size=8)
    prompt = [3, 6]
    settings = [
        GenerationSettings(1, 1, eos_token_id=None, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        for seed in range(300)
    ]
    logits = next_logits(model, prompt)
    ranked = logits.argsort(descending=True)[:top_k]
    p = (logits[ranked] / temperature).softmax(-1)
    kept = {int(v) for n, v in enumerate(ranked) if p[:n].sum() < top_p}
    assert 1 < len(kept) < 7
    assert {g.ids[0] for g in generate(model, [prompt] * 300, settings)} == kept


WARM = dataclasses.replace(SMALL, temperature=1.5, seed=11)


@pytest.mark.parametrize("change", [{"top_k": 1}, {"top_p": 1e-9}, {"top_k": 64, "temperature": 1e-300}])
def test_narrow_enough_sampling_is_greedy(untied, change):
    greedy, warm = generate(untied, [[8, 9]] * 2, [SMALL, WARM])
    assert greedy.ids != warm.ids
    assert plain(generate(untied, [[8, 9]], dataclasses.replace(WARM, **change))[0]) == plain(greedy)


def test_a_top_k_of_the_vocabulary_keeps_all(untied):
    (warm,) = generate(untied, [[8, 9]], WARM)
    for top_k in (63, 64, 10**6):
        assert generate(untied, [[8, 9]], dataclasses.replace(WARM, top_k=top_k)) == [warm]
    # Beside a row that narrows, all is still all.
    both = generate(untied, [[8, 9]] * 2, [dataclasses.replace(WARM, top_k=10**6), dataclasses.replace(WARM, top_k=2)])
    assert plain(both[0]) == plain(warm)
    assert both[0].ids != both[1].ids


class Level(torch.nn.Module):
    """An LM head that says the same everywhere: falling logits from `top` by steps of 0.1."""

    def __init__(self, top):
        super().__init__()
        self.top = top

    def forward(self, hidden):
        return (self.top - 0.1 * torch.arange(64)).expand(len(hidden), 64).clone()


@pytest.mark.parametrize("top", [20.0, -3.0])
def test_the_penalty_counts_the_prompt_and_committed_tokens_only(build_model, top):
    model = build_model(tie=True, seed=3, mask_token_id=63)
    model.lm_head = Level(top)
    prompt = [0, 2, 3]
    (answer,) = generate(model, [prompt], dataclasses.replace(SMALL, repetition_penalty=1000.0))
    assert answer.ids == [1, *range(4, 15)]
    # What a step commits at once is alike at all of its positions: proposals count for nothing.
    settings = dataclasses.replace(SMALL, repetition_penalty=1000.0, steps_per_block=1)
    (answer,) = generate(model, [prompt], settings)
    assert answer.ids == [1] * 4 + [4] * 4 + [5] * 4


def test_ids_tied_with_the_last_one_kept_stay(build_model):
    model = build_model(tie=True, seed=3, mask_token_id=63)
    model.lm_head = Biased(Level(0.0), torch.where(torch.arange(64) < 3, 0.1 * torch.arange(64), -100.0))
    settings = [dataclasses.replace(SMALL, temperature=1.0, top_k=2, seed=seed) for seed in range(20)]
    drawn = {i for g in generate(model, [[9]] * 20, settings) for i in g.ids}
    assert drawn == {0, 1, 2}


def test_log_probs_are_those_of_the_moment_of_commitment(tied):
    events = []
    settings = dataclasses.replace(WARM, top_k=3, top_p=0.8, max_new_tokens=8, steps_per_block=3)
    (answer,) = generate(tied, [[9, 8]], settings, on_step=events.append)
    for at, log_prob in enumerate(answer.log_probs):
        then = next(e for e in events if len(e.ids) > at and e.committed[at])
        assert log_prob == pytest.approx(math.log(then.confidence[at]), abs=1e-5)
    # The first committed token's: what temperature and truncation did to the draw is left out.
    seen = torch.tensor([[9, 8, 5, 5, 5, 5]])
    at = events[0].committed.index(True)
    with torch.no_grad():
        log_p = tied(seen).logits[0, 2 + at].log_softmax(-1)
    assert answer.log_probs[at] == pytest.approx(float(log_p[answer.ids[at]]), abs=1e-4)


def test_log_probs_stay_finite_where_the_confidence_underflows(build_model):
    model = biased(build_model(tie=True, seed=3), i5=500.0)
    (answer,) = generate(model, [[8, 9]], SMALL)
    assert all(-600 < x < -400 for x in answer.log_probs)


@hypothesis_settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.sampled_from([0.0, 0.01, 0.1, 0.5, 2.0]), min_size=1, max_size=9), st.floats(0, 3))
def test_an_entropy_bound_commits_as_many_as_it_allows(entropies, bound):
    settings = GenerationSettings(block_length=16, entropy_bound=bound)
    entropy_M = np.array(entropies, dtype=np.float32)
    chosen = positions_to_commit(settings, entropy_M, np.arange(len(entropy_M)), 16, 0, 0).tolist()
    ranked = sorted(range(len(entropies)), key=lambda i: (entropies[i], i))
    assert chosen == ranked[: len(chosen)]
    assert math.fsum(entropy_M[chosen]) - max(entropy_M[chosen]) <= bound + 1e-6
    if len(chosen) < len(ranked):
        assert math.fsum(entropy_M[ranked[: len(chosen)]]) > bound - 1e-6


def test_an_entropy_bound_from_zero_to_all(build_model, tied):
    def forwards(model, bound):
        return generate(model, [[9, 8]], dataclasses.replace(SMALL, entropy_bound=bound))[0].forwards

    assert forwards(tied, 0.0) == 12
    assert 3 < forwards(tied, 2.0) < 12
    assert forwards(tied, 100.0) == 3
    # Tokens that are exactly certain cost nothing; a model certain of MASK is certain of no token.
    assert forwards(biased(build_model(tie=True, seed=3), i7=500.0), 0.0) == 3
    assert forwards(biased(build_model(tie=True, seed=3), i5=500.0), 0.0) == 12


def test_an_entropy_that_is_no_number_still_progresses():
    settings = GenerationSettings(block_length=4, entropy_bound=0.1)
    assert positions_to_commit(settings, np.full(4, np.nan, np.float32), np.arange(4), 4, 0, 0).tolist() == [0]


class Rows(torch.nn.Module):
    """An LM head that gives the first positions of a block these probabilities for ids 0, 1, 2, ... ."""

    def __init__(self, *rows):
        super().__init__()
        self.logits = torch.full((len(rows), 64), -math.inf)
        for at, row in enumerate(rows):
            self.logits[at, : len(row)] = torch.tensor(row).log()

    def forward(self, hidden):
        return self.logits[: len(hidden)].clone()


def test_margin_prefers_a_clear_lead_to_a_high_probability(build_model):
    model = build_model(tie=True, seed=3, mask_token_id=63)
    model.lm_head = Rows([0.5, 0.45, 0.05], [0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    first = {}
    for remasking in ("low_confidence", "margin"):
        settings = GenerationSettings(2, 2, eos_token_id=None, remasking=remasking)
        events = []
        generate(model, [[9]], settings, on_step=events.append)
        first[remasking] = events[0].committed
        assert events[0].confidence == pytest.approx([0.5, 0.4])  # the confidence is not the margin
    assert first == {"low_confidence": [True, False], "margin": [False, True]}


def test_random_remasking_begins_anywhere(tied):
    first = []
    settings = [dataclasses.replace(SMALL, max_new_tokens=4, remasking="random", seed=seed) for seed in range(200)]
    generate(tied, [[9]] * 200, settings, on_step=lambda e: e.step == 0 and first.append(e.committed.index(True)))
    assert min(first.count(i) for i in range(4)) > 25


def test_temperature_zero_ignores_the_seed_and_others_do_not(tied):
    greedy = {tuple(generate(tied, [[9, 8]], dataclasses.replace(SMALL, seed=seed))[0].ids) for seed in range(3)}
    warm = dataclasses.replace(SMALL, temperature=1.0)
    sampled = {tuple(generate(tied, [[9, 8]], dataclasses.replace(warm, seed=seed))[0].ids) for seed in range(3)}
    assert (len(greedy), len(sampled)) == (1, 3)


@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
def test_the_boost_writes_the_end_of_thinking_once(tied, power):
    settings = GenerationSettings(
        max_new_tokens=24, block_length=8, eos_token_id=None, think_boost=200.0, think_boost_power=power
    )
    (answer,) = generate(tied, [[9, *THINK]], settings, Pieces())
    assert answer.text is not None
    assert answer.text.count("</think>") == 1
    assert plain(answer) == expected(tied, [9, *THINK], settings)
    if power == 0:
        assert answer.text.startswith("</think>")


def test_the_end_of_thinking_counts_once_it_is_committed():
    row = Request(np.array([9]), 4, GenerationSettings(4, 4, think_boost=8.0, think_boost_power=1.0), THINK)
    row.ids_G[:] = THINK
    for masked, boost in (
        ([0, 1, 2, 3], (13, 2.0)),
        ([2, 3], (3, 6.0)),
        ([0, 2], (13, 2.0)),
        ([1], (2, 4.0)),
        ([], None),
    ):
        row.masked_G[:] = np.isin(np.arange(4), masked)
        assert row.boost() == boost


def test_a_stop_string_is_found_across_tokens_and_cut_inside_one(build_model):
    model = Scripted(build_model(tie=True, seed=3), [6, 8, 11, 12, 9, 10, 6, 6, 7, 7, 7, 7])
    settings = dataclasses.replace(SMALL, stop=("Py", "nothing", "STOP", "SP"))
    (answer,) = generate(model, [[20]], settings, Pieces())
    # Text: a ab xS Py | ST OP a a | ...: "SP" starts inside the third token, which the ids leave out.
    assert (*plain(answer), answer.text) == ([6, 8], "stop", 4, "aabx")
    assert len(answer.log_probs) == len(answer.ids)
    (answer,) = generate(model, [[20]], dataclasses.replace(settings, stop=("PySTO",)), Pieces())
    assert (*plain(answer), answer.text) == ([6, 8, 11], "stop", 8, "aabxS")
    assert len(answer.log_probs) == len(answer.ids)
    (answer,) = generate(model, [[20]], dataclasses.replace(settings, stop=("OPaa",), eos_token_id=6), Pieces())
    assert (*plain(answer), answer.text) == ([], "stop", 1, "")
    assert len(answer.log_probs) == len(answer.ids)
    (answer,) = generate(model, [[20]], dataclasses.replace(settings, stop=("zz",), eos_token_id=10), Pieces())
    assert (*plain(answer), answer.text) == ([6, 8, 11, 12, 9], "stop", 6, "aabxSPyST")
    assert len(answer.log_probs) == len(answer.ids)
    (answer,) = generate(model, [[20]], dataclasses.replace(settings, stop=("bbb[",)), Pieces())
    assert (answer.finish_reason, answer.text) == ("length", "aabxSPySTOPaabbbb")


def Scripted(model, script):  # noqa: N802
    """Make a model write `script` after a prompt of one token, whatever it sees."""

    def packed(ids_T, packing, wanted):
        assert len(packing.lengths) == 1
        rows = torch.zeros(len(ids_T), 64)
        for at, i in enumerate(script[: len(ids_T) - 1]):
            rows[at + 1, i] = 5.0
        return rows[wanted[0]]

    model.model.packed = packed
    model.lm_head = torch.nn.Identity()
    return model


def test_forward_passes_hold_no_more_positions_than_allowed(untied, monkeypatch):
    seen = []
    packed = untied.model.packed
    monkeypatch.setattr(untied.model, "packed", lambda *a, **k: seen.append(a[1].lengths) or packed(*a, **k))
    settings = [dataclasses.replace(SMALL, max_new_tokens=4, steps_per_block=1, guidance_scale=w) for w in (0, 0, 1, 0)]
    generate(untied, [[8], [9] * 20, [7, 7], [6]], settings, max_batch_tokens=17)
    # In the order of requests; one row may be too long; a guided row is never torn apart.
    assert seen == [(5,), (24,), (5, 6, 6)]


def test_events_show_the_answer_forming(tied):
    prompts = [[9], [8] * 5]
    settings = [dataclasses.replace(SMALL, steps_per_block=2), SMALL]
    events = []
    answers = generate(tied, prompts, settings, on_step=events.append)
    assert answers == generate(tied, prompts, settings)
    for row, answer in enumerate(answers):
        mine = [event for event in events if event.row == row]
        assert len(mine) == answer.forwards
        assert [event.done for event in mine] == [False] * (len(mine) - 1) + [True]
        assert mine[-1].ids == answer.ids
        assert all(mine[-1].committed)
        steps = settings[row].steps_per_block or 4
        assert [(e.block, e.step) for e in mine] == [(4 * (i // steps), i % steps) for i in range(3 * steps)]
        for event in mine:
            assert len(event.ids) == len(event.committed) == len(event.confidence) == event.block + 4
            assert all(0 < c <= 1 for c in event.confidence)
            assert all(i == answer.ids[at] for at, i in enumerate(event.ids) if event.committed[at])
        for before, after in itertools.pairwise(mine):
            assert all(b for a, b in zip(before.committed, after.committed, strict=False) if a)


def test_an_end_with_nothing_masked_before_it_ends_the_row(build_model):
    """What would still be filled in behind it can change nothing."""
    model = Scripted(build_model(tie=True, seed=3), [6, 8, 2, 9, 9, 9, 9, 9])
    settings = GenerationSettings(max_new_tokens=8, block_length=8, eos_token_id=2)
    events = []
    (answer,) = generate(model, [[20]], settings, on_step=events.append)
    assert plain(answer) == ([6, 8], "stop", 3)
    assert [event.done for event in events] == [False, False, True]


def test_speculation_saves_passes_and_shows_every_step(tied):
    prompts, settings = [[9], [8] * 5], dataclasses.replace(SMALL, speculate=3)
    events, plain_events = [], []
    answers = generate(tied, prompts, settings, on_step=events.append)
    slow = generate(tied, prompts, SMALL, on_step=plain_events.append)
    assert [a.ids for a in answers] == [a.ids for a in slow]
    assert sum(a.forwards for a in answers) < sum(a.forwards for a in slow)
    assert sum(a.positions for a in answers) > sum(a.positions for a in slow)

    def in_order(events):
        return sorted((e.row, e.block, e.step, e.ids, e.committed, e.done) for e in events)

    # Proposals for masked positions are those of the same states, so all of an event is the same.
    assert in_order(events) == in_order(plain_events)


def test_a_stop_string_ends_what_drafts_went_beyond(build_model):
    model = biased(build_model(tie=True, seed=3), i7=50.0)
    settings = dataclasses.replace(SMALL, stop=("bbbb",))
    (slow,) = generate(model, [[9]], settings, Pieces())
    events = []
    (fast,) = generate(model, [[9]], dataclasses.replace(settings, speculate=9), Pieces(), events.append)
    assert [event.done for event in events] == [False, False, False, True]
    assert (fast.ids, fast.text, fast.finish_reason) == (slow.ids, slow.text, slow.finish_reason) == ([], "", "stop")
    assert (slow.forwards, fast.forwards) == (4, 2)


def test_drafts_take_only_the_room_that_is_left(tied, monkeypatch):
    seen = []
    packed = tied.model.packed
    monkeypatch.setattr(tied.model, "packed", lambda *a, **k: seen.append(sum(a[1].lengths)) or packed(*a, **k))
    settings = dataclasses.replace(SMALL, max_new_tokens=4, speculate=3)
    answers = generate(tied, [[9], [8]], settings, max_batch_tokens=17)
    assert max(seen) == 15  # two rows of 5 and one draft
    assert [a.ids for a in answers] == [a.ids for a in generate(tied, [[9], [8]], settings)]


def proposals(first, scores, ids=(6, 7, 8, 9), probabilities=None):
    """What a pass says about the positions from `first` on of a block of four."""
    score_M, p_M = (np.array(x, dtype=np.float32) for x in (scores, probabilities or scores))
    return Proposals(
        np.arange(first, 4), np.array(ids[first:]), np.log(p_M), score_M, np.zeros((0, len(p_M)), np.int32)
    )


def after_one_step(ids=(6, 7, 8, 9), probabilities=None, **change):
    row = Request(np.array([9]), 8, GenerationSettings(8, 4, **change))
    row.commit(proposals(0, [0.9, 0.8, 0.7, 0.6], ids, probabilities))
    return row


def test_drafts_go_as_far_as_the_last_pass_foretells():
    def drafts(room=1000, **change):
        row = after_one_step(**change)
        assert draft_ahead(row, room) == sum(draft.size for draft in row.drafts) <= max(0, room)
        return [draft.masked_G.tolist().count(False) for draft in row.drafts]

    assert drafts(speculate=2) == [2, 3]
    assert drafts(speculate=50) == [2, 3, 4]  # the last is the first state of the next block
    assert drafts(room=18, speculate=50) == [2, 3]  # it sees 9 positions, those before it 5
    assert drafts(room=9, speculate=50) == [2]
    assert drafts(room=-3, speculate=50) == []
    assert drafts(speculate=50, cache="frozen") == [2, 3]  # a block begun renews the past
    assert drafts(speculate=50, cache="adaptive", refresh_below=0.75) == [2]  # and so does a doubt
    unsure_at_first = {"probabilities": [0.3, 0.9, 0.9, 0.9], "remasking": "margin"}
    assert drafts(speculate=50, cache="adaptive", **unsure_at_first) == []
    assert drafts(speculate=50, ids=(6, 7, 2, 9)) == [2]  # nothing after the end
    assert drafts(speculate=50, ids=(6, 7, 8, 2)) == [2, 3]


def test_slots_have_no_later_masks_so_a_dual_cache_is_a_prefix_cache(tied):
    templates = [[9, None, 7, None, None], [None, 12, 13, None], [9] * 40 + [None, 8]]
    ways = [{"cache": "prefix"}, {"cache": "dual", "later_masks": True}]
    prefix, dual = (infill(tied, templates, GenerationSettings(speculate=2, **way)) for way in ways)
    assert [(a.ids, a.forwards, a.positions) for a in dual] == [(a.ids, a.forwards, a.positions) for a in prefix]


def test_a_draft_counts_only_for_the_state_it_foretold():
    for came, ids, same in (
        ([0.8, 0.7, 0.6], (6, 7, 8, 9), True),
        ([0.78, 0.3, 0.2], (6, 7, 8, 10), True),
        ([0.8, 0.7, 0.6], (6, 20, 8, 9), False),  # another id
        ([0.8, 0.9, 0.6], (6, 7, 8, 9), False),  # another place
        ([0.5, 0.4, 0.3], (6, 7, 8, 9), False),  # doubt: the next pass renews the past
    ):
        row = after_one_step(speculate=1, cache="adaptive", refresh_below=0.75)
        draft_ahead(row, 1000)
        row.commit(proposals(1, came, ids))
        assert has_come_true(row, row.drafts[0]) == same


def test_requests_enter_and_leave_between_passes(tied):
    alone = generate(tied, [[9], [8] * 5, [7]], SMALL)
    engine = Engine(tied)
    assert engine.submit([9], SMALL) == 0
    assert engine.submit([8] * 5, SMALL) == 1
    assert engine.submit([7], SMALL) == 2
    engine.step()
    engine.cancel(0)
    engine.cancel(99)
    ended = {}
    while engine.busy:
        ended |= engine.step()
    assert ended == {1: alone[1], 2: alone[2]}
    with pytest.raises(IlladaError, match="prompt 3 has 97 tokens"):
        engine.submit([1] * 97, SMALL)
    assert not engine.busy
    assert engine.step() == {}


def test_neighbours_of_a_pass_are_of_equal_length(tied, monkeypatch):
    seen = []
    packed = tied.model.packed
    monkeypatch.setattr(tied.model, "packed", lambda *a, **k: seen.append(a[1].lengths) or packed(*a, **k))
    generate(tied, [[9] * n for n in (5, 2, 5, 1)], dataclasses.replace(SMALL, threshold=0.3, speculate=2))
    assert max(map(len, seen)) > 4
    assert all(lengths == tuple(sorted(lengths)) for lengths in seen)


def test_a_request_that_waits_may_be_cancelled(tied):
    engine = Engine(tied, max_batch_tokens=14)  # two see five positions each in their first block
    for prompt in ([9], [6], [8], [7]):
        engine.submit(prompt, SMALL)
    ended = engine.step()
    assert [request.index for request in engine.running] == [0, 1]
    engine.cancel(2)
    while engine.busy:
        ended |= engine.step()
    assert list(ended) == [0, 1, 3]  # in the order of requests


def test_the_memory_of_caches_is_bounded(tied):
    settings = dataclasses.replace(SMALL, cache="frozen", max_new_tokens=8)
    engine = Engine(tied, max_past_tokens=30)
    for prompt in ([9] * 4, [8] * 5, [7] * 30):
        engine.submit(prompt, settings)
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, len([request for request in engine.running if request.pasts]))
    assert most == 2
    # All pages are given back, those of drafts and of cancelled requests too.
    for change in ({}, {}, {"cache": "dual", "later_masks": True}):
        engine.submit([9] * 4, dataclasses.replace(settings, speculate=2, guidance_scale=1.0, **change))
    for _ in range(3):
        engine.step()
    assert len(engine.pool.free) < engine.pool.pages
    engine.cancel(4)
    while engine.busy:
        engine.step()
    assert sorted(engine.pool.free) == list(range(engine.pool.pages))
    assert Request(np.array([9]), 8, settings).cache_size == 9
    assert Request(np.array([9]), 8, dataclasses.replace(settings, guidance_scale=1.0)).cache_size == 18  # two branches


def test_a_row_without_a_cache_does_not_wait_for_its_memory(tied):
    engine = Engine(tied, max_past_tokens=1)
    once = dataclasses.replace(SMALL, max_new_tokens=4, steps_per_block=1)
    for cache in ("frozen", "none", "none"):
        engine.submit([9], dataclasses.replace(once, cache=cache))
    assert len(engine.step()) == 3


@pytest.mark.parametrize("mask_id", [0, 17, 63])
@pytest.mark.parametrize("narrowest", [1, 9, 1024])
def test_the_vocabulary_in_pieces_is_the_vocabulary(build_model, monkeypatch, mask_id, narrowest):
    model = build_model(tie=True, seed=3, mask_token_id=mask_id)
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    hidden[0] = 10 * model.lm_head.weight[mask_id].detach()  # certain of MASK
    monkeypatch.setattr(sampling, "NARROWEST", narrowest)
    monkeypatch.setattr(sampling, "IN_CACHE", 1)
    with torch.inference_mode():
        logits = model.lm_head(hidden)
        log_p = logits.log_softmax(-1)
        logits[:, mask_id] = -math.inf
        want = logits.argmax(-1, keepdim=True)
        for held in (1, 60, 200, 7 * 64, 2**24):
            ids, log_prob, score = sampling.most_probable(model, hidden, held)
            assert ids.tolist() == want[:, 0].tolist()
            torch.testing.assert_close(log_prob, log_p.gather(1, want)[:, 0], atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(score, log_prob.exp())


def test_a_head_that_someone_wrapped_is_called_as_a_whole(build_model):
    model = build_model(tie=True, seed=3)
    inner, bias = model.lm_head.forward, 500.0 * torch.eye(64)[7]
    model.lm_head.forward = lambda hidden: inner(hidden) + bias  # as accelerate does
    engine = Engine(model, max_logits=1)
    engine.submit([9], SMALL)
    assert engine.run()[0].ids == [7] * 12


def test_the_training_flag_is_restored(build_model):
    model = build_model(tie=True, seed=3).train()
    generate(model, [[9]], SMALL)
    assert model.training

    def fail(event):
        assert not model.training
        raise KeyError

    with pytest.raises(KeyError):
        generate(model, [[9]], SMALL, on_step=fail)
    assert model.training


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"block_length": 0}, "block_length"),
        ({"steps_per_block": 0}, "steps_per_block"),
        ({"steps_per_block": 33}, "between 1 and block_length 32"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"guidance_scale": math.inf}, "guidance_scale"),
        ({"think_boost": -1.0}, "think_boost"),
        ({"seed": -1}, "seed"),
        ({"threshold": 0.0}, "threshold"),
        ({"threshold": 1.1}, "threshold"),
        ({"threshold": 0.5, "steps_per_block": 4}, "steps_per_block and threshold each say"),
        ({"threshold": 0.5, "entropy_bound": 0.1}, "threshold and entropy_bound each say"),
        ({"entropy_bound": 0.1, "steps_per_block": 4}, "steps_per_block and entropy_bound each say"),
        ({"threshold": 0.5, "remasking": "random"}, "leave out remasking random"),
        ({"entropy_bound": 0.5, "remasking": "margin"}, "leave out remasking margin"),
        ({"entropy_bound": -0.1}, "entropy_bound must be finite and at least 0"),
        ({"entropy_bound": math.inf}, "entropy_bound"),
        ({"remasking": "entropy"}, "remasking"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be above 0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p"),
        ({"top_k": 4}, "do nothing at temperature 0"),
        ({"top_p": 0.9}, "do nothing at temperature 0"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be between 1e-06 and 1e\+06"),
        ({"repetition_penalty": math.nan}, "repetition_penalty"),
        ({"presence_penalty": math.inf}, r"presence_penalty must be between -1e\+06 and"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"logit_bias": {-1: 2.0}}, "logit_bias must be ids"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"temperature": 1.0, "min_p": 1.5}, "min_p must be between 0 and 1"),
        ({"min_p": 0.1}, "do nothing at temperature 0"),
        ({"stop": "x"}, "stop must be a list of texts"),
        ({"stop": ("",)}, "not empty"),
        ({"eos_token_id": -2}, "eos_token_id"),
        ({"cache": "nonsense"}, "cache"),
        ({"cache": "frozen", "refresh_below": 0.3}, "refresh_below does nothing with cache frozen"),
        ({"cache": "dual"}, "cache dual keeps the later masks too: give later_masks, or take cache prefix"),
    ],
)
def test_bad_settings_are_refused(change, says):
    with pytest.raises(IlladaError, match=says) as caught:
        GenerationSettings(**change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompts", "change", "says"),
    [
        ([[1] * 97], {}, "97 tokens but the context is 96"),
        ([[1], [1] * 94], {}, "prompt 1: budget below one block"),
        ([[1]], {"max_new_tokens": 3}, "budget below one block: max_new_tokens 3"),
        ([[64]], {}, "outside the vocabulary of 64"),
        ([[-1]], {}, "outside the vocabulary"),
        ([3, 4], {}, "list of integers per prompt"),
        (["text"], {}, "list of integers per prompt"),
        ([[[1], [2, 3]]], {}, "list of integers per prompt"),
        ([[1.5]], {}, "list of integers per prompt"),
        ([[1]], {"stop": ("a",)}, "stop needs a tokenizer"),
        ([[1]], {"think_boost": 1.0}, "think_boost needs a tokenizer"),
    ],
)
def test_bad_requests_are_refused(tied, prompts, change, says):
    with pytest.raises(IlladaError, match=says):
        generate(tied, prompts, dataclasses.replace(SMALL, **change))


def test_settings_are_for_all_or_one_each(tied):
    with pytest.raises(IlladaError, match="2 prompts but 1 settings"):
        generate(tied, [[1], [2]], [SMALL])
    with pytest.raises(IlladaError, match="max_batch_tokens"):
        generate(tied, [[1]], SMALL, max_batch_tokens=0)


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 1e-300, "top_p": 0.5},
        {"temperature": 1e6, "top_k": 3},
        {"guidance_scale": 1e6},
        {"guidance_scale": 1e6, "temperature": 1e6, "top_p": 0.9},
        {"repetition_penalty": 1e-6, "guidance_scale": 1e6},
        {"repetition_penalty": 1e6},
    ],
)
def test_the_largest_settings_keep_confidences_finite(tied, change):
    settings = GenerationSettings(8, 4, eos_token_id=None, **change)
    assert np.isfinite(generate(tied, [[9, 8, 7]], settings)[0].log_probs).all()


def test_only_watched_requests_tell_their_steps(tied):
    seen = []
    engine = Engine(tied, on_step=lambda event: seen.append(event.row))
    settings = GenerationSettings(4, 4, eos_token_id=None)
    for watched in (True, False):
        request = engine.request([9, 8], settings)
        request.watched = watched
        engine.enter(request)
    assert len(engine.run()) == 2
    assert seen == [0] * 4


@pytest.mark.parametrize(
    "change", [{}, {"temperature": 1.3, "logit_bias": {7: 2.0}}, {"cache": "prefix", "speculate": 2}]
)
def test_alternatives_are_the_best_ids_of_the_pass_that_committed(tied, change):
    settings = dataclasses.replace(SMALL, block_length=1, max_new_tokens=6, **change)
    engine = Engine(tied)
    few, many = (engine.request([9, 8], settings) for _ in range(2))
    few.alternatives, many.alternatives = 3, 1000
    for request in (few, many):
        engine.enter(request)
    ids = engine.run()[0].ids
    assert few.best_2KG.shape == (2, 3, 6)
    mask, vocabulary = tied.config.mask_token_id, tied.config.vocab_size
    for at in range(6):
        logits = reference.logits_of(tied, [9, 8, *ids[:at], mask])[-1]
        if settings.logit_bias:
            logits[7] += 2
        wanted = logits.log_softmax(-1)
        wanted[mask] = -math.inf
        assert few.best_2KG[0, :, at].tolist() == many.best_2KG[0, :3, at].tolist() == wanted.topk(3).indices.tolist()
        assert few.best_2KG[1].view(np.float32)[:, at] == pytest.approx(wanted.topk(3).values.numpy(), abs=1e-5)
        assert many.best_2KG.shape[1] == vocabulary
    assert engine.request([9], settings).best_2KG is None
