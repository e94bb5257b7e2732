"""The autoregressive baseline: the same trunk made causal, through every room."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from illada import (
    GenerationSettings,
    IlladaError,
    cli,
    confidence_scores,
    diffusion_loss,
    generate,
    infill,
    likelihood_scores,
)
from illada.data.batches import Batches, Segment
from illada.data.collate import noisy_batches
from illada.data.shards import Shards
from illada.diffusion.causal import causal_loss
from illada.generation.engine import Engine
from illada.model.attention import Packing
from illada.model.kv_cache import KVCache, PagePool
from illada.training.optional.estimate import estimate
from illada.training.optional.flops import flops_per_token
from illada.training.optional.options import EstimateOptions
from illada.training.optional.plots import draw_runs
from illada.training.recipe import DataRecipe, ModelRecipe, Recipe, TrainingRecipe
from illada.training.trainer import train
from illada.training.validation import bits_per_byte, validation_bound
from illada.weights.load import load_model
from illada.weights.runs import read_metrics
from reference import logits_of, reference_causal_generate, reference_causal_loss, reference_causal_score

TO_THE_END = GenerationSettings(max_new_tokens=12, eos_token_id=None)
PROMPTS = [[7], [9, 8, 7, 6, 3, 4, 30, 11, 12], [50, 3], [9, 8]]


@pytest.fixture(scope="module")
def model(build_model):
    return build_model(tie=True, seed=5, causal=True)


@pytest.fixture(scope="module")
def llama(model):
    """transformers' own network with the same weights."""
    config = model.config
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    names += " max_position_embeddings rope_theta rms_norm_eps tie_word_embeddings"
    shape = {name: getattr(config, name) for name in names.split()}
    other = LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=None, eos_token_id=None, pad_token_id=None)).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_logits_are_those_of_transformers_llama(model, llama, kernel, lengths, seed):
    ids = torch.randint(0, 64, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    padded = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, (start, end) in enumerate(pairwise(ends)):
        padded[row, : end - start], mask[row, : end - start] = ids[start:end], 1
    model.set_attn_implementation(kernel)
    try:
        with torch.no_grad():
            got = model(ids[None], cu_seqlens=ends).logits[0]
            rows = model(padded, attention_mask=mask).logits
            for row, (start, end) in enumerate(pairwise(ends)):
                want = llama(ids[None, start:end]).logits[0]
                for mine in (got[start:end], rows[row, : end - start]):
                    assert (mine - want).abs().max() <= 1e-5 * want.abs().max()
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_with_a_cache_a_position_sees_what_is_not_after_it(model, kernel):
    """Three segments in pieces, so that in one pass several positions follow caches of different lengths."""
    ids = [torch.arange(first, first + 14) for first in (3, 20, 40)]
    pool = PagePool()
    caches = [KVCache(pool) for _ in ids]
    model.set_attn_implementation(kernel)
    try:
        with torch.no_grad():
            want = [model.model.packed(one, Packing((14,))) for one in ids]
            at = [0, 0, 0]
            for sizes in ((5, 5, 3), (4, 4, 4), (1, 1, 1), (4, 4, 6)):
                for cache, start, size in zip(caches, at, sizes, strict=True):
                    cache.begin(start, start + size)
                piece = [one[start : start + size] for one, start, size in zip(ids, at, sizes, strict=True)]
                got = model.model.packed(torch.cat(piece), Packing(sizes, tuple(caches))).split(sizes)
                for mine, theirs, start, size in zip(got, want, at, sizes, strict=True):
                    torch.testing.assert_close(mine, theirs[start : start + size], atol=1e-5, rtol=1e-5)
                at = [start + size for start, size in zip(at, sizes, strict=True)]
    finally:
        model.set_attn_implementation("sdpa")


def test_greedy_answers_are_those_of_transformers(model, llama):
    got = generate(model, PROMPTS, TO_THE_END)
    for prompt, answer in zip(PROMPTS, got, strict=True):
        ids = torch.tensor([prompt])
        silent = [model.config.mask_token_id]
        want = llama.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, suppress_tokens=silent
        )
        assert answer.ids == want[0, len(prompt) :].tolist()
        # One pass for a token, over the prompt once and then over one position.
        assert (answer.forwards, answer.positions) == (12, len(prompt) + 11)


SAMPLED = [
    replace(TO_THE_END, temperature=1.5, seed=3),
    replace(TO_THE_END, temperature=2.0, top_k=3, seed=4),
    replace(TO_THE_END, temperature=2.0, top_p=0.7, seed=5),
    TO_THE_END,
]


def test_sampled_answers_are_the_reference_s_whatever_the_batch(model):
    want = [reference_causal_generate(model, *pair) for pair in zip(PROMPTS, SAMPLED, strict=True)]
    assert len({tuple(ids) for ids, _ in want}) == 4
    for most in (1, 7, 2048):
        got = generate(model, PROMPTS, SAMPLED, max_batch_tokens=most)
        assert [answer.ids for answer in got] == [ids for ids, _ in want]
        for answer, (_, log_probs) in zip(got, want, strict=True):
            assert answer.log_probs == pytest.approx(log_probs, abs=1e-4)


def test_requests_that_enter_later_get_the_same(model):
    engine = Engine(model)
    engine.submit(PROMPTS[0], SAMPLED[0])
    ended = [engine.step() for _ in range(5)]
    for prompt, one in zip(PROMPTS[1:], SAMPLED[1:], strict=True):
        engine.submit(prompt, one)
    while engine.busy:
        ended.append(engine.step())
    answers = {index: answer for step in ended for index, answer in step.items()}
    assert [answers[i] for i in range(4)] == generate(model, PROMPTS, SAMPLED)
    assert len(engine.pool.free) == engine.pool.pages  # every row gave its memory back


def test_answers_end_at_eos_and_at_stop_strings(model, tiny_tokenizer, build_model):
    whole = generate(model, [[9, 8]], TO_THE_END)[0].ids
    at = next(i for i in range(3, 12) if whole[i] not in whole[:i])
    (cut,) = generate(model, [[9, 8]], replace(TO_THE_END, eos_token_id=whole[at]))
    assert (cut.ids, cut.finish_reason, cut.forwards) == (whole[:at], "stop", at + 1)
    talker = build_model(tie=True, seed=6, causal=True, vocab_size=len(tiny_tokenizer))
    (free,) = generate(talker, [[9, 8]], TO_THE_END, tokenizer=tiny_tokenizer)
    stop = free.text[4:7]
    (ended,) = generate(talker, [[9, 8]], replace(TO_THE_END, stop=(stop,)), tokenizer=tiny_tokenizer)
    assert ended.text == free.text[: free.text.index(stop)]
    assert ended.finish_reason == "stop"


def test_scores_are_exact(model):
    pairs = [([0, 9, 8], [7, 6, 1]), ([3], [4]), ([0, 9, 8], [7, 6, 1, 4, 3, 2]), ([1, 2, 3, 4, 9], [11, 12])]
    want = [reference_causal_score(model, *pair)[0] for pair in pairs]
    for most in (1, 16_384):
        assert likelihood_scores(model, pairs, max_batch_tokens=most) == pytest.approx(want, abs=1e-4)
    assert likelihood_scores(model, pairs, right_context=(2,)) == pytest.approx(want, abs=1e-4)
    (answer,) = generate(model, [[9, 8]], TO_THE_END)
    p_mask = logits_of(model, [9, 8, *answer.ids])[1:-1].softmax(-1)[:, model.config.mask_token_id]
    want = sum(answer.log_probs) - float((-p_mask).log1p().sum())  # scores leave MASK out
    assert likelihood_scores(model, [([9, 8], answer.ids)])[0] == pytest.approx(want, abs=1e-4)


def test_what_is_about_masks_is_refused(model, build_model):
    for changed in ({"block_length": 8}, {"threshold": 0.9}, {"guidance_scale": 1.0}, {"cache": "prefix"}):
        with pytest.raises(IlladaError, match=f"one token at a time: leave out {next(iter(changed))}"):
            generate(model, [[3]], GenerationSettings(**changed))
    with pytest.raises(IlladaError, match="prompt 0 is empty"):
        generate(model, [[]], TO_THE_END)
    with pytest.raises(IlladaError, match="infilling is for masked diffusion models only"):
        infill(model, [[3, None]], GenerationSettings())
    with pytest.raises(IlladaError, match="take the likelihood, which is exact there"):
        confidence_scores(model, [([3], [4])])
    with pytest.raises(IlladaError, match="pair 0 has no context"):
        likelihood_scores(model, [([], [4])])
    with pytest.raises(IlladaError, match="diffusion_loss"):
        diffusion_loss(model, torch.tensor([[3, 4]]))


def test_the_loss_is_the_equation_however_a_step_is_divided(model, make_data, tmp_path):
    ids = [(7 * i * i + 3 * i) % 57 + 6 for i in range(120)]
    shards = make_data(tmp_path / "data", [ids])
    lengths = (9, 4, 1, 9, 2, 5)
    starts = [sum(lengths[:i]) for i in range(6)]
    plan = [[Segment(i, 0, 0, start, n, 0)] for i, (start, n) in enumerate(zip(starts, lengths, strict=True))]
    want = reference_causal_loss(model, ids[:30], lengths)
    for size, ranks in ((6, 1), (2, 1), (2, 2), (1, 4)):
        parts = [noisy_batches(plan, size, shards, 0, 0, rank=r, ranks=ranks, causal=True) for r in range(ranks)]
        losses = [causal_loss(model, b.clean_T, b.masked_T, b.weight_T, b.packing) for part in parts for b in part]
        assert float(sum(losses)) == pytest.approx(want, rel=1e-5)
    (batch,) = noisy_batches(plan, 6, shards, 0, 0, causal=True)
    loss = causal_loss(model, batch.clean_T, batch.masked_T, batch.weight_T, batch.packing)
    (got,) = torch.autograd.grad(loss, model.lm_head.weight)
    at = torch.cat([start + torch.arange(n - 1) for start, n in zip(starts, lengths, strict=True)])
    logits = model(torch.tensor([ids[:30]]), cu_seqlens=torch.tensor([*starts, 30])).logits[0]
    plain = torch.nn.functional.cross_entropy(logits[at], torch.tensor(ids)[at + 1])
    torch.testing.assert_close(got, torch.autograd.grad(plain, model.lm_head.weight)[0], atol=1e-6, rtol=1e-4)


def test_under_the_older_rule_answers_alone_are_learned(model, make_data, tmp_path):
    examples = [([9, 8, 7, 11, 12, 2], 3), ([20, 21, 22, 2], 1), ([33, 34, 2], 0)]
    shards = make_data(tmp_path / "data", examples, kind="chat")
    plan = Batches(shards, 16, 3, seed=0, rule="llada", eos_token_id=2).plan(0)
    (batch,) = noisy_batches(plan, 3, shards, 0, 0, "llada", 2, causal=True)
    predicted = {
        tuple(ids.tolist()): ids[chosen].tolist()
        for ids, chosen in zip(batch.clean_T.view(3, 6), batch.masked_T.view(3, 6), strict=True)
    }
    assert predicted == {
        (9, 8, 7, 11, 12, 2): [11, 12, 2],
        (20, 21, 22, 2, 2, 2): [21, 22, 2, 2, 2],
        (33, 34, 2, 2, 2, 2): [34, 2, 2, 2, 2],
    }
    assert float((batch.weight_T * batch.masked_T).sum()) == pytest.approx(1)  # each answer a third


@pytest.fixture(scope="module")
def run(make_data, tiny_tokenizer, tmp_path_factory):
    """A trained baseline, its recipe and its held-out data: words in counting order."""
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    texts = [" ".join(words[(first + n) % 7] for n in range(3 + first % 5)) for first in range(60)]
    documents = [[0, *tiny_tokenizer.encode(text), 2] for text in texts]
    folder = tmp_path_factory.mktemp("causal")
    make_data(folder / "train", documents, tiny_tokenizer)
    make_data(folder / "held_out", documents[20:40], tiny_tokenizer)
    make_data(folder / "chat", [(ids, 3) for ids in documents], tiny_tokenizer, kind="chat")
    shape = ModelRecipe(preset="1m", hidden_size=32, intermediate_size=48, num_hidden_layers=2, causal=True)
    training = TrainingRecipe(
        steps=40, samples_per_step=4, samples_per_batch=2, learning_rate=1e-2, warmup_steps=3, dtype="fp32",
        device="cpu", validate_every=20, checkpoint_every=20,
    )  # fmt: skip
    data = DataRecipe(str(folder / "train"), str(folder / "held_out"), window=32)
    recipe = Recipe(output=str(folder / "run"), model=shape, data=data, training=training)
    train(recipe)
    return recipe


@pytest.mark.slow
def test_a_run_is_of_the_same_trainer(run, capsys):
    records = read_metrics(Path(run.output) / "metrics.jsonl")
    assert all("loss_by_mask_ratio" not in record for record in records)
    assert records[-1]["validation_loss"] < 0.5 * records[0]["loss"]
    model, _ = load_model(run.output, device="cpu")
    assert model.config.causal
    held_out = Shards.open(run.data.validation)
    count = held_out.tokens // 32
    want = reference_causal_loss(model, held_out.read(0, 32 * count).tolist(), [32] * count)
    assert records[-1]["validation_loss"] == pytest.approx(want, rel=1e-4)
    bits = bits_per_byte(want, held_out.tokens, held_out.bytes)
    assert records[-1]["validation_bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    assert validation_bound(model, held_out, 32, None, 4) == pytest.approx(want, rel=1e-4)
    pytest.importorskip("matplotlib")
    draw_runs([run.output])


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_weights(run, monkeypatch, tmp_path):
    again = replace(run, output=str(tmp_path / "again"))
    from illada.training import trainer

    honest, count = trainer.update, []

    def dies(*arguments):
        count.append(1)
        if len(count) == 30:
            raise KeyboardInterrupt
        honest(*arguments)

    monkeypatch.setattr(trainer, "update", dies)
    with pytest.raises(KeyboardInterrupt):
        train(again)
    monkeypatch.setattr(trainer, "update", honest)
    train(again)
    one, other = (load_model(path, device="cpu")[0].state_dict() for path in (run.output, again.output))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["illada", "llada"])
def test_fine_tuning_goes_on_causally(run, tmp_path, rule):
    data = DataRecipe(str(Path(run.data.train).parent / "chat"), window=16)
    training = replace(run.training, rule=rule, steps=2, learning_rate=1e-4)
    recipe = Recipe(str(tmp_path / "sft"), ModelRecipe(start=run.output), data=data, training=training)
    train(recipe)
    model, tokenizer = load_model(recipe.output, device="cpu")
    assert model.config.causal
    settings = GenerationSettings(max_new_tokens=6, eos_token_id=2)
    (answer,) = generate(model, [[0, *tokenizer.encode("three four")]], settings, tokenizer=tokenizer)
    assert answer.text.startswith(" five six")
    recipe.model.causal = True
    with pytest.raises(IlladaError, match=r"model\.causal cannot be changed when model\.start is given"):
        recipe.check()


@pytest.mark.slow
def test_the_command_line(run, capsys, tmp_path):
    def run_command(*arguments):
        try:
            code = cli.main([*arguments])
        except SystemExit as ended:
            code = ended.code
        return code, capsys.readouterr()

    score = ("score", "--model", run.output, "--context", "one two", "--candidates", " three", " six")
    code, output = run_command(*score, "--method", "likelihood")
    assert json.loads(output.out.splitlines()[0])["likelihood"]["choice"] == " three"
    code, output = run_command(*score)
    assert code == 2
    assert output.err.count("\n") == 1
    assert "take the likelihood" in output.err
    code, output = run_command("generate", "--model", run.output, "--prompt", "two three", "--max_new_tokens", "4")
    assert output.out.startswith(" four five")
    code, output = run_command("generate", "--model", run.output, "--prompt", "two", "--block_length", "4")
    assert code == 2
    assert "leave out block_length" in output.err
    code, output = run_command("bench", "generate", "--model", run.output)
    assert code == 2
    assert "causal" in output.err
    code, output = run_command(
        "export", "--model", run.output, "--output", str(tmp_path / "out"), "--layout", "released"
    )
    assert code == 2
    assert "take --layout illada" in output.err
    run_command("export", "--model", run.output, "--output", str(tmp_path / "export"))
    card = (tmp_path / "export" / "README.md").read_text()
    assert "predict token i + 1" in card
    assert "upper bound" not in card
    assert "diffusion" not in card
    assert load_model(str(tmp_path / "export"), device="cpu")[0].config.causal
    assert yaml.safe_load((Path(run.output) / "recipe.yaml").read_text())["model"]["causal"]


@pytest.mark.slow
def test_an_estimate_counts_every_prediction_and_half_the_pairs(run, model):
    big = replace(run, training=replace(run.training, samples_per_step=8, samples_per_batch=8))
    models = [replace(run.model, causal=causal) for causal in (True, None)]
    both = [estimate(replace(big, model=model), EstimateOptions(gpu="cpu")) for model in models]
    assert both[0].memory["none"].loss > both[1].memory["none"].loss
    assert both[0].flops_per_token != both[1].flops_per_token
    other, seen = type(model.config).from_dict({**model.config.to_dict(), "causal": False}), 40.0
    pairs = 3 * 4 * seen * 4 * model.config.head_dim * 2
    head = 6 * 64 * 32
    masked = 1e-3 + 0.999 / 2
    gap = flops_per_token(model.config, seen) - flops_per_token(other, seen)
    assert gap == pytest.approx(head * (1 - masked) - pairs / 2)
