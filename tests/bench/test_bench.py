"""`illada bench generate`: counters against numbers worked out by hand, every sampler, the files, and bad input."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from illada import cli
from illada.bench import generation, samplers
from illada.bench.external import OutsideModel, outside_samplers
from illada.bench.measure import agreement, count_work, measure
from illada.bench.options import BenchGenerateOptions
from illada.bench.samplers import Answer, engine_samplers, modes, plain_sampler, rules, steps_of_rule
from illada.errors import IlladaError
from illada.generation import sampling
from illada.generation.settings import GenerationSettings
from illada.preparation.train_tokenizer import train_tokenizer
from outside import OUTSIDE
from reference import logits_with_past

B, G = 4, 12
PROMPTS = [[7, 8, 9], [10, 11, 12, 13, 14, 15]]
EXACT = GenerationSettings(max_new_tokens=G, block_length=B, eos_token_id=None)

# Fast-dLLM's calls, in the paper's variable-length decoding: the first pass of a block makes keys and values, the
# others take those before the block (prefix) or put the block's into all of them (dual).
CACHED = """
import torch

def commit(logits, x, mask_id, threshold):
    p, best = logits.softmax(-1).max(-1)
    p = torch.where(x == mask_id, p, -1)
    chosen = p == p.max() if threshold is None else (p >= threshold) | (p == p.max())
    x[chosen] = best[chosen]

def prefix(model, prompt, gen_length, block_length, mask_id, threshold=None, dual=False):
    x = prompt.clone()
    while x.shape[1] < prompt.shape[1] + gen_length:
        start = x.shape[1]
        x = torch.cat((x, torch.full((1, block_length), mask_id)), 1)
        out = model(x, use_cache=True)
        commit(out.logits[:, start:], x[:, start:], mask_id, threshold)
        past, places = out.past_key_values, None
        if dual:
            places = torch.zeros_like(x, dtype=torch.bool)
            places[:, start:] = True
        else:
            past = [tuple(kv[:, :, :start] for kv in layer) for layer in past]
        while (x == mask_id).any():
            out = model(x[:, start:], past_key_values=past, use_cache=True, replace_position=places)
            commit(out.logits, x[:, start:], mask_id, threshold)
    return x, 0

def dual(model, prompt, gen_length, block_length, mask_id, threshold=None):
    return prefix(model, prompt, gen_length, block_length, mask_id, threshold, dual=True)
"""


@pytest.fixture(scope="module")
def sure(build_model):
    """A model sure enough of itself for a threshold to commit several tokens at once."""
    model = build_model(False, 5, initializer_range=0.5)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    return model


def by_name(samplers):
    return {sampler.name: sampler for sampler in samplers}


def ids_of(answers):
    return [answer.ids for answer in answers]


def outside(spec, model, settings=EXACT):
    (sampler,) = outside_samplers([str(spec)], model, settings)
    return sampler


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory, build_model):
    """Untrained in truth, but with a tokenizer and a template, as a trained one has."""
    folder = tmp_path_factory.mktemp("bench") / "model"
    tokenizer = train_tokenizer(["one two three four"] * 3, 270)
    tokenizer.save_pretrained(folder)
    model = build_model(False, 3, vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_work_of_one_token_a_forward_is_what_arithmetic_says(untied):
    samplers = by_name([plain_sampler(untied, EXACT), *engine_samplers(untied, EXACT, batch=1)[0]])
    positions = sum(B * (len(prompt) + end) for prompt in PROMPTS for end in (4, 8, 12))
    found = {}
    for name in ("plain loop", "1 token", "2 tokens", "later masks", "one block"):
        with count_work(untied) as work:
            samplers[name].answer(PROMPTS)
        found[name] = (work.forwards, work.positions, work.head_positions)
    assert found == {
        "plain loop": (2 * G, positions, positions),
        "1 token": (2 * G, positions, 2 * 3 * (4 + 3 + 2 + 1)),
        "2 tokens": (G, positions // 2, 2 * 3 * (4 + 2)),
        "later masks": (2 * G, G * (3 + G + 6 + G), 2 * 3 * (4 + 3 + 2 + 1)),
        "one block": (2 * G, G * (3 + G + 6 + G), G * (G + 1)),
    }


def test_rows_of_a_batch_share_their_forwards(untied):
    with count_work(untied) as work:
        by_name(engine_samplers(untied, EXACT, batch=2)[0])["1 token"].answer(PROMPTS)
    assert work.forwards == G
    untied(torch.tensor(PROMPTS[:1]))
    assert (work.forwards, work.head_positions) == (G, 2 * 3 * (4 + 3 + 2 + 1))  # counting has ended


def test_a_head_in_pieces_counts_once(build_model, monkeypatch):
    monkeypatch.setattr(sampling, "IN_CACHE", 1)
    model = build_model(True, 4, vocab_size=3000)
    pieces, real = [], type(model).head_pieces
    monkeypatch.setattr(type(model), "head_pieces", lambda *a: pieces.append(a[2]) or real(*a))
    with count_work(model) as work:
        by_name(engine_samplers(model, EXACT, batch=2)[0])["1 token"].answer(PROMPTS)
    assert set(pieces) == {3}
    assert work.head_positions == 2 * 3 * (4 + 3 + 2 + 1)


@pytest.mark.parametrize("stops", [False, True])
def test_plain_loop_is_exact_decoding(tied, stops):
    settings = EXACT
    if stops:  # at what is the second block's first token
        free = plain_sampler(tied, EXACT).answer(PROMPTS)
        settings = GenerationSettings(max_new_tokens=G, block_length=B, eos_token_id=free[0].ids[B])
    with count_work(tied) as work:
        plain = plain_sampler(tied, settings).answer(PROMPTS)
    assert work.forwards == sum(answer.forwards for answer in plain)
    assert work.forwards == sum(min(G, len(ids) // B * B + B) for ids in ids_of(plain))  # to the end of the last block
    ours = by_name(engine_samplers(tied, settings, 2)[0])["1 token"].answer(PROMPTS)
    assert ids_of(ours) == ids_of(plain)  # in no more forwards: an answer may be sure before its block is full
    assert ours == plain if not stops else sum(a.forwards for a in ours) <= work.forwards
    assert len(plain[0].ids) < 2 * B if stops else len(plain[0].ids) == G


@pytest.mark.slow
@pytest.mark.parametrize("result", ["x", "(x, 12)"])
def test_outside_sampler_agrees_with_ours(untied, tmp_path, result):
    file = tmp_path / "theirs.py"
    file.write_text(OUTSIDE.replace("RESULT", result))
    theirs = outside(file, untied)
    assert theirs.name == "outside theirs.py"
    found = theirs.answer(PROMPTS)
    assert found == by_name(engine_samplers(untied, EXACT, 1)[0])["later masks"].answer(PROMPTS)
    end = found[0].ids[5]
    ended = outside(file, untied, replace(EXACT, eos_token_id=end)).answer(PROMPTS)[0]
    assert ended == Answer(found[0].ids[: found[0].ids.index(end)], G)  # it does not look for the end


def test_outside_sampler_gets_the_arguments_that_it_names_and_the_options(untied, tmp_path):
    file = tmp_path / "theirs.py"
    file.write_text(
        "def generate(model, prompt, gen_length):\n    return prompt.repeat(1, 1 + gen_length)\n"
        "def odd(model, prompt, a=0, b='', threshold=0, **more):\n"
        "    assert more.pop('steps') == 3 and model.device == prompt.device\n"
        "    found = (a is None, b == 'where/it/last', threshold == 0.5, more['mask_id'] == 63, 'gen_length' in more)\n"
        "    return prompt.new_tensor([[*prompt[0], *found]])\n"
    )
    assert outside(file, untied).answer([[7]]) == [Answer([7] * G, 0)]
    sampler = outside(f"{file}:odd,a=None,b=where/it/last,threshold=0.5,steps=3", untied)
    assert sampler.name == "outside theirs.py:odd,a=None,b=last,threshold=0.5,steps=3"
    assert sampler.threshold == 0.5
    assert ids_of(sampler.answer([[7]])) == [[1] * 5]
    with pytest.raises(IlladaError, match=r"theirs.py,threshold=1: threshold is none of its options: gen_length$"):
        outside(f"{file},threshold=1", untied)


def test_outside_sampler_finds_what_lies_beside_it(untied, tmp_path):
    for number in (1, 2):
        folder = tmp_path / str(number)
        (folder / "beside").mkdir(parents=True)
        (folder / "beside" / "__init__.py").write_text(f"NUMBER = {number}")
        code = "from beside import NUMBER\ndef generate(model, prompt):\n    return prompt.repeat(1, 1 + NUMBER)\n"
        (folder / "theirs.py").write_text(code)
    first, second = outside_samplers([str(tmp_path / n / "theirs.py") for n in "12"], untied, EXACT)
    assert ids_of(first.answer([[7]]) + second.answer([[7]])) == [[7], [7, 7]]
    assert "beside" not in sys.modules
    assert not any(str(tmp_path) in path for path in sys.path)


@pytest.mark.slow
def test_outside_sampler_that_never_ends_is_ended(untied, tmp_path):
    file = tmp_path / "theirs.py"
    file.write_text("def generate(model, prompt):\n    while True:\n        model(prompt)\n")
    with pytest.raises(IlladaError, match=r"theirs.py failed: it was ended after 96 forwards"):
        outside(file, untied).answer(PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["1 token", "threshold 0.9"])
@pytest.mark.parametrize("function", ["prefix", "dual"])
def test_outside_samplers_with_a_cache_do_what_our_prefix_cache_does(sure, tmp_path, function, rule):
    (tmp_path / "theirs.py").write_text(CACHED)
    option = ",threshold=0.9" if rule.startswith("threshold") else ""
    theirs = outside(f"{tmp_path / 'theirs.py'}:{function}{option}", sure)
    ours = by_name(engine_samplers(sure, EXACT, 1)[0])[f"{rule} (prefix cache)"]
    works = []
    for sampler in (theirs, ours):
        with count_work(sure) as work:
            answers = sampler.answer(PROMPTS)
        works.append((answers, work.forwards, work.positions))
    assert works[0] == works[1]
    assert work.forwards == 2 * G if not option else work.forwards < 2 * G


def plain_logits(model, ids, where, past):
    """Logits of tokens at positions `where`, which renew their keys and values in `past` and attend to all of it."""
    config = model.config
    pairs = torch.arange(0, config.head_dim, 2) / config.head_dim
    turn = torch.polar(torch.ones(()), torch.tensor(where)[:, None, None] * config.rope_theta**-pairs)

    def heads(x):
        return x.unflatten(-1, (-1, config.head_dim))

    def rotated(x):
        turned = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat((turned.real, turned.imag), -1)

    hidden = model.model.embed_tokens(torch.tensor(ids))
    for block, (keys, values) in zip(model.model.layers, past, strict=True):
        normal, attention = block.input_layernorm(hidden), block.self_attn
        keys[where], values[where] = rotated(heads(attention.k_proj(normal))), heads(attention.v_proj(normal))
        shared = config.num_attention_heads // config.num_key_value_heads
        k, v = (x.repeat_interleave(shared, 1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", rotated(heads(attention.q_proj(normal))), k) / config.head_dim**0.5
        hidden = hidden + attention.o_proj(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1))
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))


def test_adapter_is_the_network_and_its_caches_are_fast_dllms(tied):
    close = {"rtol": 1e-4, "atol": 1e-4}
    theirs = OutsideModel(tied, 99)
    ids = torch.arange(7, 19)[None]
    shape = (12, tied.config.num_key_value_heads, tied.config.head_dim)
    plain = [(torch.zeros(shape), torch.zeros(shape)) for _ in tied.model.layers]
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, tied(ids).logits)
        assert not hasattr(theirs(ids), "past_key_values")
        rows = torch.stack((ids[0], ids[0].flip(0)))
        assert torch.equal(theirs(rows, attention_mask=rows > 8).logits, tied(rows, attention_mask=rows > 8).logits)

        full = theirs(ids, use_cache=True)
        torch.testing.assert_close(full.logits, tied(ids).logits, **close)
        torch.testing.assert_close(full.logits[0], plain_logits(tied, ids[0].tolist(), list(range(12)), plain), **close)
        past = full.past_key_values
        assert past[0][0].shape == (1, shape[1], 12, shape[2])

        # Prefix: keys and values before position 4 stay what they were, whatever is said behind.
        changed = [*ids[0, :4].tolist(), *range(30, 38)]
        prefix = [tuple(kv[:, :, :4] for kv in layer) for layer in past]
        found = theirs(torch.tensor([changed[4:]]), past_key_values=prefix, use_cache=True)
        old = [tuple(kv[0].transpose(0, 1) for kv in layer) for layer in prefix]
        torch.testing.assert_close(found.logits[0].double(), logits_with_past(tied, changed, 4, old), **close)
        assert found.past_key_values[1][1].shape[2] == 12
        assert theirs(torch.tensor([changed[4:]]), past_key_values=prefix).past_key_values is None

        # Dual: a block in the middle renews its own, in the caller's tensors, and sees both sides as they were.
        for where in ([4, 5, 6, 7], [8, 9, 10], [4, 5, 6, 7]):
            places = torch.zeros(1, 12, dtype=torch.bool)
            places[0, where] = True
            block = [changed[i] for i in where]
            found = theirs(torch.tensor([block]), past_key_values=past, replace_position=places)
            torch.testing.assert_close(found.logits[0], plain_logits(tied, block, where, plain), **close)
    assert theirs.calls == 9


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ({"replace_position": [[0, 1]]}, "replace_position needs past_key_values"),
        ({"use_cache": True, "position_ids": [[0, 1]]}, "cannot have position_ids"),
        ({"use_cache": True, "rows": 2}, "takes one row, got 2"),
        ({"past": True, "replace_position": [[1, 0, 1]]}, "must mark one stretch of 2 places"),
        ({"past": True, "replace_position": [[1, 1, 1]]}, "must mark one stretch of 2 places"),
        ({"past": True, "replace_position": [[0, 0, 0]]}, "must mark one stretch of 2 places"),
    ],
)
def test_calls_that_mean_nothing_are_refused(untied, call, expected):
    theirs = OutsideModel(untied, 9)
    ids = torch.tensor([[7, 8]] * call.pop("rows", 1))
    past = theirs(torch.tensor([[7, 8, 9]]), use_cache=True).past_key_values if call.pop("past", False) else None
    tensors = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in call.items()}
    with pytest.raises(IlladaError, match=expected):
        theirs(ids, past_key_values=past, **tensors)


def test_every_rule_and_mode_is_a_row_or_refused():
    found = rules(16, 48)
    assert found["margin, 4 tokens"] == {"steps_per_block": 4, "remasking": "margin"}
    assert [name for name in rules(2, 4) if "tokens" in name] == ["2 tokens", "margin, 2 tokens"]
    assert modes() == {
        "": {},
        **{f" ({name} cache)": {"cache": name} for name in ("adaptive", "dual", "frozen", "prefix")},
    }


def test_a_threshold_implies_as_many_forwards_as_steps(sure):
    settings = replace(EXACT, threshold=0.9)
    answers = by_name(engine_samplers(sure, EXACT, 2)[0])["threshold 0.9"].answer(PROMPTS)
    steps = steps_of_rule(sure, PROMPTS, settings)
    assert steps == sum(answer.forwards for answer in answers) < 2 * G
    assert steps_of_rule(sure, PROMPTS, replace(EXACT, steps_per_block=1)) == 2 * G // B


def test_agreement():
    def answers(*ids):
        return [Answer(list(each), 1) for each in ids]

    assert agreement(answers([1, 2], [1, 3, 4]), answers([1, 2], [1, 2])) == (0.5, 0.75)
    assert agreement(answers([]), answers([1])) == (0.0, None)


def test_every_sampler_runs_in_every_repeat(untied):
    samplers = engine_samplers(untied, EXACT, 2)[0][:3]
    order = []
    found = measure(untied, samplers, PROMPTS, 2, order.append)
    names = [sampler.name for sampler in samplers]
    assert order == [*names, *names, *names[::-1]]
    assert all(len(m.seconds) == 2 and min(m.seconds) > 0 and len(m.answers) == 2 for m in found)


@pytest.mark.slow
def test_command_on_a_folder(trained_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(samplers, "modes", lambda: {"": {}, " (prefix cache)": {"cache": "prefix"}})
    prompts = ["one two", "three", "four one"]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": "?"}) + "\n" for p in prompts))
    tasks, output = str(tmp_path / "tasks.jsonl"), str(tmp_path / "out")
    options = "--limit 2 --max_new_tokens 8 --block_length 8 --repeats 1"
    words = ["bench", "generate", "--model", str(trained_folder), "--tasks", tasks, "--output", output]
    cli.main([*words, *options.split()])
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    names = [row["name"] for row in results["rows"]]
    rules = [*(f"{k} tokens" for k in (2, 4, 8)), *(f"threshold {p}" for p in (0.99, 0.95, 0.9))]
    rules += [f"entropy {nats}" for nats in (0.05, 0.2, 0.5)]
    rules += ["margin, 2 tokens", "margin, 4 tokens", "speculate 2", "speculate 4"]
    rules += ["threshold 0.9, speculate 2"]
    rules += ["one block", "later masks", *(f"later masks, threshold {p}" for p in (0.99, 0.95, 0.9))]
    assert names[:21] == ["plain loop", "1 token", *rules]
    assert all(name in said for name in names)
    assert results["problems"] == 2
    assert [results["rows"][1][key] for key in ("same_answers", "accuracy", "standard_error")] == [1.0, 0.0, 0.0]
    assert results["rows"][1]["settings"]["block_length"] == 8
    # What a threshold implies is what the engine needs, and stands beside the rows with a cache, too.
    of_rule = {row["name"]: (row["answer_forwards"], row["forwards_minimum"]) for row in results["rows"]}
    assert of_rule["1 token"] == (16, None)
    assert of_rule["threshold 0.9"][0] == of_rule["threshold 0.9"][1] == of_rule["threshold 0.9 (prefix cache)"][1] > 1
    assert results["environment"]["dtype"] == "float32"
    assert results["arguments"]["limit"] == 2
    assert (tmp_path / "out" / "table.md").read_text() in said
    assert (tmp_path / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert "another --output" in capsys.readouterr().err


@pytest.mark.slow
def test_accuracy_is_exact_match_after_stripping(trained_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "show_ids", lambda tokenizer, ids: " yes\n")
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({"prompt": "one", "answer": a}) + "\n" for a in ("yes", " yes", "no", "Yes")))
    options = {"repeats": 1, "only": ["1 token"], "max_new_tokens": 16}
    options = BenchGenerateOptions(str(trained_folder), tasks=str(tasks), **options)
    row = generation.bench_generate(options)["rows"][0]
    assert (row["accuracy"], row["standard_error"]) == (0.5, 0.25)
    assert (row["right"], row["against_exact"]) == ([True, True, False, False], {"lost": 0, "won": 0, "p": 1})
    assert generation.compared([True, False, False], row["right"][:3]) == {"lost": 1, "won": 0, "p": 1}


def test_demo_problems_are_those_of_the_demo(tmp_path, monkeypatch):
    tokenizer = train_tokenizer(["one"], 264)

    def tasks(model):
        found = generation._demo_problems(tokenizer, BenchGenerateOptions(str(model), limit=5))
        return [tokenizer.decode(problem.prompt).removeprefix("<|bos|><|user|>").split()[0] for problem in found]

    with monkeypatch.context() as patch:
        patch.setattr(generation, "TASKS", {"shift": None, "sorting": None})
        assert tasks(tmp_path / "model") == ["Shift:", "Sort", "Shift:", "Sort", "Shift:"]
    (tmp_path / "demo.json").write_text('{"tasks": ["addition", "capitals"]}')
    assert tasks(tmp_path / "model") == tasks(tmp_path) == ["Add", "Capitals:", "Add", "Capitals:", "Add"]


@pytest.mark.slow
def test_random_weights_have_no_accuracy_and_need_no_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words = (
        "bench generate --random 1m --vocab_size 50 --limit 1 --repeats 1 --max_new_tokens 4 --block_length 4 --only"
    )
    (tmp_path / "theirs.py").write_text(OUTSIDE.replace("RESULT", "x"))
    more = ["--outside", str(tmp_path / "theirs.py"), "--output", str(tmp_path / "out")]
    cli.main([*words.split(), "2 tokens", *more])
    said = capsys.readouterr()
    assert "illada[report]" in said.err
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["plain loop", "1 token", "2 tokens", "outside theirs.py"]
    assert rows[3]["same_answers"] == 1  # one block, so both see the same
    assert all(row["accuracy"] is None and row["answer_tokens"] == 4 for row in rows)
    assert [row["answer_forwards"] for row in rows] == [4, 4, 2, 4]
    assert not (tmp_path / "out" / "frontier.png").exists()


def test_others_are_compared_at_their_threshold_on_the_same_problems():
    spec = importlib.util.spec_from_file_location("bench", Path(__file__).parents[2] / "benchmarks" / "generate.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    assert {"threshold 0.9", "later masks, threshold 0.99 (dual cache)"} <= {*bench.by_threshold()}
    assert not [name for name in bench.by_threshold() if "speculate" in name or name == "threshold 0.9 (dual cache)"]

    def row(name, right, threshold=0.9, seconds=1.0):
        return {
            "name": name,
            "threshold": threshold,
            "right": [bool(int(x)) for x in right],
            "answer_forwards": 10,
            "cpu_seconds": [seconds, 3 * seconds, 2.0],
            "settings": None if name.startswith("outside") else {},
        }

    rows = [
        row("exact", "1111", None),
        row("ours", "1010", seconds=0.5),
        row("other threshold", "1010", 0.95),
        row("outside f.py:prefix,threshold=0.9", "1100"),
        row("outside f.py:dual,threshold=0.9", "0111"),
        row("outside g.py,cache=dual,threshold=0.9", "0111"),
    ]
    lines = bench.comparison({"problems": 4, "rows": rows}).splitlines()[2:-2]
    assert lines == [
        "| f.py:dual,threshold=0.9 | 3 | | 2.5 | 1.00 |".replace("| |", "|  |"),
        "| ours | 2 | 2, 1, 1 | 2.5 | 2.00 |",
        "| f.py:prefix,threshold=0.9 | 2 | 2, 1, 1 | 2.5 | 1.00 |",
        "| g.py,cache=dual,threshold=0.9 | 3 | 0, 0, 1 | 2.5 | 1.00 |",
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "give --model FOLDER, or --random SHAPE"),
        ("--model a --random 1m", "give --model FOLDER, or --random SHAPE"),
        ("--model a --vocab_size 9", "--vocab_size goes with --random"),
        ("--model /nowhere/at/all", "no model at"),
        ("--random 2m", "no preset '2m'"),
        ("--random 1m --tasks a", "--tasks needs --model"),
        ("--random 1m --limit 0", "limit must be at least 1"),
        ("--random 1m --only sideways", "no variant 'sideways': a table made without"),
        ("--random 1m --only token", "did you mean 1 token or"),
        ("--random 1m --outside nowhere.py", "no Python file nowhere.py"),
        ("--random 1m --outside a.txt", "'a.txt' does not say what to run: write FILE.py"),
        ("--random 1m --outside a.py:f,x", "does not say what to run: write FILE.py"),
        ("--random 1m --max_new_tokens 8", "no room for one block of 16"),
        ("--random llada-8b --vocab_size 64", "mask_token_id 126336 is outside"),
    ],
)
def test_bad_input_is_one_clear_line(words, expected, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "generate", *words.split()])
    said = capsys.readouterr()
    assert said.err.startswith("illada: error: ")
    assert expected in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("code", "expected"),
    [("1 / 0", "cannot be run: division"), ("x = 1", "defines no function"), ("def generate(m, p): m.no", "failed: ")],
)
def test_outside_files_that_do_not_work(untied, tmp_path, code, expected):
    (tmp_path / "theirs.py").write_text(code)
    with pytest.raises(IlladaError, match=expected):
        outside(tmp_path / "theirs.py", untied).answer(PROMPTS)


@pytest.mark.parametrize("line", ["[", '{"prompt": "one"}', "[1]"])
def test_bad_tasks(trained_folder, tmp_path, line):
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "one", "answer": "two"}\n' + line)
    with pytest.raises(IlladaError, match="line 2 is not"):
        generation.bench_generate(BenchGenerateOptions(str(trained_folder), tasks=str(tmp_path / "tasks.jsonl")))


@pytest.mark.parametrize("words", ["bench", "bench generate"])
def test_help(words, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([*words.split(), "--help"])
    assert "generate" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["bench", "bench sideways"])
def test_what_to_bench(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(words.split())
    assert "generate" in capsys.readouterr().err
