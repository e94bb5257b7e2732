"""`illada bench generate`: counters against numbers worked out by hand, every sampler, the files, and bad input."""

import json
import sys

import pytest

from illada import cli
from illada.benchmark import generation
from illada.benchmark.measure import agreement, counted, measure
from illada.benchmark.samplers import engine_samplers, outside_sampler, plain_sampler
from illada.data.tokenizer import train_tokenizer
from illada.errors import IlladaError
from illada.generation import GenerationSettings

B, G = 4, 12
PROMPTS = [[7, 8, 9], [10, 11, 12, 13, 14, 15]]
EXACT = GenerationSettings(max_new_tokens=G, block_length=B, eos_token_id=None)

# LLaDA's interface and order of work: all masks in view, `steps` divided over the blocks.
OUTSIDE = """
import torch

def generate(model, prompt, attention_mask=None, steps=8, gen_length=8, block_length=8, temperature=0.0,
             cfg_scale=0.0, remasking="low_confidence", mask_id=0):
    assert temperature == cfg_scale == 0 and remasking == "low_confidence" and steps == gen_length
    x = torch.cat((prompt, torch.full((1, gen_length), mask_id)), 1).to(model.device)
    for block in range(prompt.shape[1], x.shape[1], block_length):
        for _ in range(block_length):
            logits = model(x, attention_mask=attention_mask).logits
            p = logits.softmax(-1)
            p[..., mask_id] = -1
            best_p, best = p.max(-1)
            best_p[x != mask_id] = -1
            best_p[:, block + block_length:] = -1
            i = best_p[0].argmax()
            x[0, i] = best[0, i]
    return RESULT
"""


def by_name(samplers):
    return {sampler.name: sampler for sampler in samplers}


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory, build_model):
    """Untrained in truth, but with a tokenizer and a template, as a trained one has."""
    folder = tmp_path_factory.mktemp("bench") / "model"
    tokenizer = train_tokenizer(["one two three four"] * 3, 270)
    tokenizer.save_pretrained(folder)
    model = build_model(False, 3, vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id)
    model.save_pretrained(folder)
    return folder


def test_work_of_one_token_a_forward_is_what_arithmetic_says(untied):
    samplers = by_name([plain_sampler(untied, EXACT), *engine_samplers(untied, EXACT, batch=1)[0]])
    positions = sum(B * (len(prompt) + end) for prompt in PROMPTS for end in (4, 8, 12))
    found = {}
    for name in ("plain loop", "1 token", "2 tokens", "later masks", "one block"):
        with counted(untied) as work:
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
    with counted(untied) as work:
        by_name(engine_samplers(untied, EXACT, batch=2)[0])["1 token"].answer(PROMPTS)
    assert work.forwards == G
    untied.lm_head(untied.model.embed_tokens.weight)
    assert work.head_positions == 2 * 3 * (4 + 3 + 2 + 1)  # counting has ended


@pytest.mark.parametrize("stops", [False, True])
def test_plain_loop_is_exact_decoding(tied, stops):
    settings = EXACT
    if stops:  # at what is the second block's first token
        free = plain_sampler(tied, EXACT).answer(PROMPTS)
        settings = GenerationSettings(max_new_tokens=G, block_length=B, eos_token_id=free[0][B])
    with counted(tied) as work:
        plain = plain_sampler(tied, settings).answer(PROMPTS)
    assert work.forwards == sum(min(G, len(answer) // B * B + B) for answer in plain)  # to the end of the last block
    assert plain == by_name(engine_samplers(tied, settings, 2)[0])["1 token"].answer(PROMPTS)
    assert len(plain[0]) < 2 * B if stops else len(plain[0]) == G


@pytest.mark.parametrize("result", ["x", "(x, 12)"])
def test_outside_sampler_agrees_with_ours(untied, tmp_path, result):
    file = tmp_path / "theirs.py"
    file.write_text(OUTSIDE.replace("RESULT", result))
    theirs = outside_sampler(str(file), untied, EXACT)
    assert theirs.name == "outside theirs.py"
    found = theirs.answer(PROMPTS)
    assert found == by_name(engine_samplers(untied, EXACT, 1)[0])["later masks"].answer(PROMPTS)
    end = found[0][5]
    ended = GenerationSettings(max_new_tokens=G, block_length=B, eos_token_id=end)
    assert outside_sampler(str(file), untied, ended).answer(PROMPTS)[0] == found[0][: found[0].index(end)]


def test_outside_sampler_gets_only_the_arguments_it_names(untied, tmp_path):
    file = tmp_path / "theirs.py"
    file.write_text("def generate(model, prompt, gen_length):\n    return prompt.repeat(1, 1 + gen_length)\n")
    assert outside_sampler(str(file), untied, EXACT).answer([[7]]) == [[7] * G]


def test_agreement():
    assert agreement([[1, 2], [1, 3, 4]], [[1, 2], [1, 2]]) == (0.5, 0.75)
    assert agreement([[]], [[1]]) == (0.0, None)


def test_every_sampler_runs_in_every_repeat(untied):
    samplers = engine_samplers(untied, EXACT, 2)[0][:3]
    order = []
    found = measure(untied, samplers, PROMPTS, 2, order.append)
    names = [sampler.name for sampler in samplers]
    assert order == [*names, *names, *names[::-1]]
    assert all(len(m.seconds) == 2 and min(m.seconds) > 0 and len(m.answers) == 2 for m in found)


def test_command_on_a_folder(trained_folder, tmp_path, capsys):
    prompts = ["one two", "three", "four one"]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": "?"}) + "\n" for p in prompts))
    tasks, output = str(tmp_path / "tasks.jsonl"), str(tmp_path / "out")
    options = "--limit 2 --max_new_tokens 16 --block_length 8 --repeats 1"
    words = ["bench", "generate", "--model", str(trained_folder), "--tasks", tasks, "--output", output]
    cli.main([*words, *options.split()])
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    names = [row["name"] for row in results["rows"]]
    rules = [*(f"{k} tokens" for k in (2, 4, 8)), *(f"threshold {p}" for p in (0.99, 0.95, 0.9))]
    rules += [f"entropy {nats}" for nats in (0.05, 0.2, 0.5)]
    assert names[:13] == ["plain loop", "1 token", *rules, "one block", "later masks"]
    assert all(name in said for name in names)
    assert results["problems"] == 2
    assert [results["rows"][1][key] for key in ("same_answers", "accuracy", "standard_error")] == [1.0, 0.0, 0.0]
    assert results["rows"][1]["settings"]["block_length"] == 8
    assert results["environment"]["dtype"] == "float32"
    assert results["arguments"]["limit"] == 2
    assert (tmp_path / "out" / "table.md").read_text() in said
    assert (tmp_path / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert "another --output" in capsys.readouterr().err


def test_accuracy_is_exact_match_after_stripping(trained_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "show_ids", lambda tokenizer, ids: " yes\n")
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({"prompt": "one", "answer": a}) + "\n" for a in ("yes", " yes", "no", "Yes")))
    options = {"repeats": 1, "only": ["1 token"], "max_new_tokens": 16}
    row = generation.bench_generate(str(trained_folder), tasks=str(tasks), **options)["rows"][0]
    assert (row["accuracy"], row["standard_error"]) == (0.5, 0.25)


def test_demo_problems_are_those_of_the_demo(tmp_path, monkeypatch):
    tokenizer = train_tokenizer(["one"], 264)

    def tasks(model):
        found = generation._demo_problems(tokenizer, str(model), 5, 0)
        return [tokenizer.decode(problem.prompt).removeprefix("<|bos|><|user|>").split()[0] for problem in found]

    monkeypatch.setattr(generation, "TASKS", {"shift": None, "sorting": None})
    assert tasks(tmp_path / "model") == ["Shift:", "Sort", "Shift:", "Sort", "Shift:"]
    (tmp_path / "demo.json").write_text('{"tasks": ["addition", "capitals"]}')
    assert tasks(tmp_path / "model") == tasks(tmp_path) == ["Add", "Capitals:", "Add", "Capitals:", "Add"]


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
    assert not (tmp_path / "out" / "frontier.png").exists()


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
        outside_sampler(str(tmp_path / "theirs.py"), untied, EXACT).answer(PROMPTS)


@pytest.mark.parametrize("line", ["[", '{"prompt": "one"}', "[1]"])
def test_bad_tasks(trained_folder, tmp_path, line):
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "one", "answer": "two"}\n' + line)
    with pytest.raises(IlladaError, match="line 2 is not"):
        generation.bench_generate(str(trained_folder), tasks=str(tmp_path / "tasks.jsonl"))


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
