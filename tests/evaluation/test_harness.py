"""The unmodified harness drives the model on local tasks: what it gets is what the package computes."""

import copy
import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from illada.errors import IlladaError
from illada.evaluation import harness
from illada.evaluation.harness import IlladaLM, Scorable
from illada.generation.engine import Generation, generate
from illada.generation.settings import GenerationSettings, settings_for
from illada.scoring.confidence import confidence_scores
from illada.scoring.layout import score_layout
from illada.scoring.likelihood import likelihood_scores
from illada.scoring.path import path_log_likelihoods
from illada.text.chat import encode_prompt
from illada.text.prompts import show_ids

TASKS = Path(__file__).parent / "tasks"


@pytest.fixture(scope="module")
def lm(model_folder):
    return IlladaLM(str(model_folder), samples=4, dtype="fp32", device="cpu")


def evaluated(lm, *tasks, **options):
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    return simple_evaluate(lm, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **options)


def ask(kind, *arguments, doc=0, index=0):
    return Instance(kind, {}, arguments, index, ("task", doc, 1))


def rows(name):
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_multiple_choice_is_decided_by_our_scores_in_the_authors_layout(lm, in_tasks):
    results = evaluated(lm, "letters", "endings")
    right = {}
    for task in ("letters", "endings"):
        samples = results["samples"][task]
        for sample in samples:
            context = sample["arguments"][0][0]
            pairs, eos = score_layout(lm.tokenizer, context, [a[1] for a in sample["arguments"]])
            assert pairs[0][0][0] == 0
            assert eos == (2,)
            want = confidence_scores(lm.model, pairs, eos)
            assert [r[0][0] for r in sample["resps"]] == pytest.approx(want, abs=1e-4)
        right[task] = sum(s["acc"] for s in samples) / len(samples)
        assert results["results"][task]["acc,none"] == pytest.approx(right[task])
    assert "acc_norm,none" in results["results"]["endings"]
    assert lm.forwards["letters"] == sum(
        len(score_layout(lm.tokenizer, "x", [" A"])[0][0][1]) for _ in range(2 * len(rows("letters")))
    )


@pytest.mark.slow
def test_likelihood_is_the_other_scorer(lm, model_folder):
    other = IlladaLM(str(model_folder), scoring="likelihood", samples=4, seed=7, dtype="fp32", device="cpu")
    requests = [ask("loglikelihood", "one two", word, index=i) for i, word in enumerate((" three four", " five"))]
    pairs, eos = score_layout(lm.tokenizer, "one two", [" three four", " five"])
    got = [score for score, _ in other.loglikelihood(requests)]
    assert got == pytest.approx(likelihood_scores(lm.model, pairs, 4, 7, eos), abs=1e-4)


def test_greedy_is_what_the_model_would_say(lm):
    begin = [0, 20, 30]
    said = generate(lm.model, [begin], GenerationSettings(max_new_tokens=3, block_length=3, eos_token_id=None))[0].ids
    other = [*said[:2], 40 if said[2] != 40 else 41]
    assert lm._says([Scorable("a", (begin, said), True), Scorable("b", (begin, other), True)]) == {
        "a": True,
        "b": False,
    }


def test_only_a_single_continuation_is_asked_whether_it_would_be_said(lm, monkeypatch):
    asked = []
    monkeypatch.setattr(lm, "_says", lambda job: asked.append(len(job)) or {one.key: True for one in job})
    one = ask("loglikelihood", "seven", " six five", doc=1)
    several = [ask("loglikelihood", "seven", text, doc=2, index=i) for i, text in enumerate((" six four", " six two"))]
    assert [said for _, said in lm.loglikelihood([one, *several, one])] == [True, False, False, True]
    assert asked == [1]


def test_texts_get_the_bound_in_windows(lm):
    text = "one two three four five six seven " * 20
    ids = lm.tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > 255
    cut = [([0], ids[start : start + 255]) for start in range(0, len(ids), 255)]
    got = lm.loglikelihood_rolling([ask("loglikelihood_rolling", text)])
    assert got == pytest.approx([sum(likelihood_scores(lm.model, cut, 4))], rel=1e-5)
    assert "bound" in lm.get_model_info()["loglikelihood_rolling"]


@pytest.mark.slow
def test_answers_are_those_of_the_engine_cut_at_stops(lm, in_tasks):
    results = evaluated(lm, "sums")
    for sample in results["samples"]["sums"]:
        context = sample["arguments"][0][0]
        assert context.count("####") == 2  # the shots
        ids = [0, *lm.tokenizer.encode(context, add_special_tokens=False)]
        settings = GenerationSettings(max_new_tokens=12, block_length=4, stop=("Q:",))
        answer = generate(lm.model, [ids], settings_for(lm.model, settings), lm.tokenizer)[0]
        assert sample["resps"][0][0] == show_ids(lm.tokenizer, answer.ids).partition("Q:")[0]


def test_answers_end_before_the_first_stop_even_within_a_token(lm):
    free = {"max_gen_toks": 24, "block_length": 4, "until": []}
    (whole,) = lm.generate_until([ask("generate_until", "one two", free)])
    pieces = [lm.tokenizer.decode([i]) for i in lm.tokenizer.encode(whole, add_special_tokens=False)]
    long = next(piece for piece in pieces if len(piece) > 2)
    stop = whole[whole.index(long) + 1 :][:3]
    (cut,) = lm.generate_until([ask("generate_until", "one two", {**free, "until": ["never seen", stop]})])
    assert cut == whole[: whole.index(stop)]
    assert cut


def says(lm, monkeypatch, text):
    """Let the engine answer every request with a text; return the settings it is given."""
    submitted = []

    class Once:
        busy = True

        def submit(self, _, settings):
            submitted.append(settings)
            return 0

        def step(self):
            self.busy = False
            return {0: Generation([], "stop", 3, [], text)}

    monkeypatch.setattr(harness, "Engine", lambda *_, **__: Once())
    return submitted


def test_special_tokens_are_left_out_of_answers_but_for_the_marks_of_thinking(lm, monkeypatch):
    eos, user = lm.tokenizer.eos_token, "<|user|>"
    submitted = says(lm, monkeypatch, f"<think>a{user}</think>b{eos}c")
    assert lm.generate_until([ask("generate_until", "seven seven", {"max_gen_toks": 4})]) == ["<think>a</think>bc"]
    assert submitted[0].stop == ()


def test_special_tokens_can_be_kept_as_the_authors_do(lm, monkeypatch):
    submitted = says(lm, monkeypatch, "a<|user|>b")
    monkeypatch.setattr(lm, "special_tokens", "keep")
    request = ask("generate_until", "seven seven", {"max_gen_toks": 4, "until": ["Q:"]})
    assert lm.generate_until([request]) == ["a<|user|>b"]  # and not what the journal has of the test before
    assert submitted[0].stop == ("Q:", lm.tokenizer.eos_token)


def test_a_special_mark_of_thinking_survives(tiny_tokenizer, build_model, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    build_model(tie=True, seed=3, vocab_size=len(tokenizer), mask_token_id=5).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    dropped = IlladaLM(str(tmp_path), dtype="fp32", device="cpu").dropped
    assert "<|user|>" in dropped
    assert not {"<think>", "</think>"} & set(dropped)


@pytest.mark.parametrize(
    ("bos", "adds", "scored", "asked"),
    [
        ("always", False, True, True),
        ("scores", False, True, False),
        ("tokenizer", False, False, False),
        ("scores", True, True, True),
        ("tokenizer", True, True, True),
    ],
)
def test_where_contexts_begin_with_bos(lm, monkeypatch, bos, adds, scored, asked):
    """`adds`: the tokenizer puts a BOS before texts by itself; there is one then, never two."""
    monkeypatch.setattr(lm, "bos", bos)
    monkeypatch.setattr(lm, "tokenizer_begins", adds)
    seen = []
    monkeypatch.setattr(lm, "_score", lambda jobs: [seen.append(job.pair[0]) for job in jobs] and iter(()))
    monkeypatch.setattr(lm, "_generate", lambda jobs: [seen.append(ids) for _, ids, _ in jobs] and iter(()))
    for kind, words in (("loglikelihood", ("six", " one")), ("generate_until", ("six", {"max_gen_toks": 4}))):
        with pytest.raises(KeyError):  # nothing was computed
            getattr(lm, kind)([ask(kind, *words)])
    body = lm.tokenizer.encode("six", add_special_tokens=False)
    assert seen == [[0] * scored + body, [0] * asked + body]
    lm.cut.clear()


def test_a_template_that_writes_bos_keeps_its_one(lm, monkeypatch):
    turns = [{"role": "user", "content": "one"}]
    text = lm.apply_chat_template(turns)
    assert text.startswith(lm.tokenizer.bos_token)
    for begins in (True, False):
        assert lm._encode(text, begins) == encode_prompt(lm.tokenizer, turns)


def test_scores_have_one_bos_where_the_template_writes_no_other_mark(lm):
    """As in Llama's `<s>[INST] ...`, whose other marks are plain text."""
    pairs = lm._layout(lm.tokenizer.bos_token + "[INST] one", [" two"])
    assert pairs[0][0] == [0, *lm.tokenizer.encode("[INST] one", add_special_tokens=False)]


def test_whether_a_tokenizer_adds_bos_is_seen(lm, model_folder, tmp_path):
    assert not lm.tokenizer_begins
    shutil.copytree(model_folder, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    values = json.loads(path.read_text())
    bos = {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|bos|>": bos},
    }
    path.write_text(json.dumps(values))
    assert IlladaLM(str(tmp_path / "model"), dtype="fp32", device="cpu", bos="tokenizer").tokenizer_begins


@pytest.mark.parametrize("wrong", [{"bos": "never"}, {"special_tokens": "some"}, {"scoring": "guess"}])
def test_unknown_ways_are_refused(model_folder, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(IlladaError, match=f"{name} must be one of .*, got {value}"):
        IlladaLM(str(model_folder), dtype="fp32", device="cpu", **wrong)


def test_chats_are_encoded_as_everywhere_else(lm):
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    text = lm.apply_chat_template(turns)
    assert lm._encode(text, begins=True) == encode_prompt(lm.tokenizer, turns)
    (pair,) = lm._layout(text, ["four"])
    assert pair == (encode_prompt(lm.tokenizer, turns), lm.tokenizer.encode("four", add_special_tokens=False))
    prefilled = lm.apply_chat_template([*turns, {"role": "assistant", "content": "The"}], add_generation_prompt=False)
    assert prefilled == text + "The"


@pytest.mark.slow
def test_shots_are_turns_of_a_chat(lm, in_tasks):
    results = evaluated(lm, "sums", apply_chat_template=True, fewshot_as_multiturn=True, limit=1)
    context = results["samples"]["sums"][0]["arguments"][0][0]
    assert context.count("<|user|>") == 3
    assert context.count("<|assistant|>") == 3


@pytest.mark.slow
def test_long_contexts_lose_their_beginning(lm):
    long = "six " + "seven " * 400
    before = dict(lm.cut)
    left = [0, *lm.tokenizer.encode(long.rstrip(), add_special_tokens=False)]
    answer = lm.tokenizer.encode("  one", add_special_tokens=False)
    room = lm.max_length - len(answer) - 1
    want = confidence_scores(lm.model, [([0, *left[1 - room :]], answer)], (2,))
    several = [ask("loglikelihood", long, " one"), ask("loglikelihood", long, " six", index=1)]
    assert [lm.loglikelihood(several)[0][0]] == pytest.approx(want, abs=1e-4)
    assert lm.cut["task"] == before.get("task", 0) + 2
    assert lm.generate_until([ask("generate_until", long, {"max_gen_toks": 4, "block_length": 4})])


def test_settings_of_a_task(lm):
    settings = lm.settings_of({"until": "\n", "max_gen_toks": 3, "do_sample": False, "temperature": 0.6, "top_p": 0.9})
    assert (settings.max_new_tokens, settings.block_length, settings.stop) == (3, 3, ("\n",))
    assert (settings.temperature, settings.top_p, settings.eos_ids) == (0.0, 1.0, (2,))
    assert lm.settings_of({"do_sample": True}).temperature == 1.0
    with pytest.raises(IlladaError, match="num_beams"):
        lm.settings_of({"num_beams": 4})
    with pytest.raises(IlladaError, match="unknown model_args blocklength"):
        IlladaLM("nowhere", blocklength=4)


@pytest.mark.slow
def test_a_sampled_answer_asked_for_twice_is_drawn_twice(lm):
    request = ask("generate_until", "one", {"do_sample": True, "temperature": 2.0, "max_gen_toks": 8, "seed": 5})
    first, second = lm.generate_until([request, request])
    assert first != second
    assert lm.generate_until([request]) == [first]


def test_path_is_the_exact_scorer(model_folder, lm):
    words = {"scoring": "path", "steps_per_block": 2, "block_length": 4}
    other = IlladaLM(str(model_folder), **words, dtype="fp32", device="cpu")
    texts = [" three four five six seven", " five"]
    requests = [ask("loglikelihood", "one two", text, index=i) for i, text in enumerate(texts)]
    pairs, eos = score_layout(lm.tokenizer, "one two", texts)
    want = path_log_likelihoods(lm.model, pairs, GenerationSettings(steps_per_block=2, block_length=4), eos)
    assert [score for score, _ in other.loglikelihood(requests)] == pytest.approx(want, abs=1e-4)
    length = len(pairs[0][1])
    assert other.forwards["task"] == length // 4 * 2 + min(length % 4, 2) + 1
    text = "one two three four"
    (rolling,) = other.loglikelihood_rolling([ask("loglikelihood_rolling", text)])
    whole = ([0], lm.tokenizer.encode(text, add_special_tokens=False))
    assert [rolling] == pytest.approx(path_log_likelihoods(lm.model, [whole], other.rule), abs=1e-4)
    assert rolling != pytest.approx(lm.loglikelihood_rolling([ask("loglikelihood_rolling", text)])[0], abs=1e-3)
    assert other.get_model_info()["loglikelihood_rolling"] == "log p under the decoding rule of the settings"
    other.rule = GenerationSettings(cache="frozen")
    with pytest.raises(IlladaError, match="leave out cache"):
        other.loglikelihood([ask("loglikelihood", "one", " four")])


def test_the_harness_knows_the_model_by_name():
    assert get_model("illada") is IlladaLM
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert (
        EntryPoint("illada", project["entry-points"]["lm_eval.models"]["illada"], "lm_eval.models").load() is IlladaLM
    )


WITH_FEW_TASKS = """
import runpy
import pytest
from conftest import know_few_tasks
know_few_tasks(pytest.MonkeyPatch())
runpy.run_module("illada.evaluation", run_name="__main__")
"""
"""`python -m illada.evaluation`, without the harness's thousands of other tasks."""


@pytest.mark.slow
def test_the_command_line_of_the_harness(model_folder, tmp_path):
    words = ["--model", "illada", "--model_args", f"pretrained={model_folder},dtype=fp32", "--device", "cpu"]
    words += ["--tasks", "letters", "--include_path", str(TASKS), "--output_path", str(tmp_path)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    path = [str(Path(__file__).parent), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    command = [sys.executable, "-c", WITH_FEW_TASKS, *words]
    run = subprocess.run(command, cwd=TASKS, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "letters" in run.stdout
    (written,) = tmp_path.rglob("results_*.json")
    assert json.loads(written.read_text())["config"]["scoring"] == "confidence"
