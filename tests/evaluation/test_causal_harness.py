"""The autoregressive baseline in the harness: the same tasks, exact log-likelihoods."""

import json
import math
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance

from illada.errors import IlladaError
from illada.evaluation.harness import IlladaLM, Scorable
from illada.evaluation.options import EvalOptions
from illada.evaluation.rows import Row, Variant
from illada.evaluation.run import Evaluation, evaluate
from illada.evaluation.task_files import task_manager
from illada.generation.engine import generate
from illada.generation.settings import GenerationSettings
from illada.text.prompts import show_ids
from reference import reference_causal_score

TASKS = Path(__file__).parent / "tasks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, build_model, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("causal")
    size = len(tiny_tokenizer)
    build_model(True, 3, vocab_size=size, max_position_embeddings=256, causal=True).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def lm(folder):
    return IlladaLM(folder, dtype="fp32", device="cpu")


def ask(kind, *arguments, doc=0):
    return Instance(kind, {}, arguments, 0, ("task", doc, 1))


def test_scores_are_log_likelihoods_in_one_pass(lm):
    encode = lm.tokenizer.encode
    prompt = [0, *encode("one two", add_special_tokens=False)]
    answers = [" three", " three four", " four five"]
    got = lm.loglikelihood([ask("loglikelihood", "one two", text, doc=n) for n, text in enumerate(answers)])
    want = [reference_causal_score(lm.model, prompt, encode(a, add_special_tokens=False)) for a in answers]
    assert [score for score, _ in got] == pytest.approx([score for score, _ in want], abs=1e-4)
    assert lm.samples == 1
    lm.scoring = "path"
    requests = [ask("loglikelihood", "one two", text, doc=n) for n, text in enumerate(answers)]
    try:
        assert lm.loglikelihood(requests) == got  # the same, as the only rule is left to right
    finally:
        lm.scoring = "likelihood"
    said = generate(lm.model, [prompt], GenerationSettings(max_new_tokens=3, eos_token_id=None))[0].ids
    job = [
        Scorable(name, (prompt, ids), True) for name, ids in (("said", said), ("not said", [*said[:2], said[2] - 1]))
    ]
    found = {one.key: (one.value[1], one.forwards) for part in lm._score(job) for one in part}
    assert found == {"said": (True, 4), "not said": (False, 4)}
    assert [reference_causal_score(lm.model, *one.pair)[1] for one in job] == [True, False]


@pytest.mark.slow
def test_rolling_is_exact_over_windows(lm):
    text = "one two three four " * 120
    ids = lm.tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > 256
    parts = [ids[start : start + 255] for start in range(0, len(ids), 255)]
    want = sum(reference_causal_score(lm.model, [0], part)[0] for part in parts)
    assert lm.loglikelihood_rolling([ask("loglikelihood_rolling", text)])[0] == pytest.approx(want, rel=1e-5)
    assert lm.get_model_info()["loglikelihood_rolling"] == "log p"


def test_answers_leave_out_what_tasks_say_about_masks(lm):
    words = {"until": ["seven"], "max_gen_toks": 9, "block_length": 3, "threshold": 0.9, "temperature": 0.7, "seed": 4}
    (got,) = lm.generate_until([ask("generate_until", "one two", words)])
    settings = GenerationSettings(max_new_tokens=9, temperature=0.7, seed=4, eos_token_id=2, stop=("seven",))
    prompt = [0, *lm.tokenizer.encode("one two", add_special_tokens=False)]
    (want,) = generate(lm.model, [prompt], settings, tokenizer=lm.tokenizer)
    assert got == show_ids(lm.tokenizer, lm.tokenizer.encode(want.text, add_special_tokens=False))


def test_what_is_about_masks_is_refused(folder):
    with pytest.raises(IlladaError, match="take scoring=likelihood"):
        IlladaLM(folder, scoring="confidence", device="cpu")
    with pytest.raises(IlladaError, match="leave out threshold"):
        IlladaLM(folder, threshold=0.9, device="cpu")


@pytest.mark.slow
def test_an_evaluation_is_that_of_the_same_tasks(folder, tmp_path):
    options = {"model": folder, "task_files": str(TASKS), "output": str(tmp_path / "out"), "samples": 4}
    options |= {"max_batch_tokens": 64, "dtype": "fp32", "device": "cpu"}
    table = evaluate(EvalOptions(**options, tasks=["letters", "sums", "text"]))
    assert "bits_per_byte" in table
    found = {r["task"]: r for r in json.loads((tmp_path / "out" / "results.json").read_text())["results"]}
    assert (found["letters"]["settings"]["scoring"], found["letters"]["settings"]["samples"]) == ("likelihood", 1)
    assert found["letters"]["forwards"] == 10  # a pass for each of two candidates of five questions
    made = found["sums"]["settings"]["generation"]
    assert (made["block_length"], made["cache"], made["max_new_tokens"]) == (1, "frozen", 12)
    assert math.isfinite(found["text"]["metrics"]["bits_per_byte,none"][0])
    with pytest.raises(IlladaError, match="leave out block_length"):
        evaluate(EvalOptions(**options, tasks=["sums"], ablate="block_length", values=["2", "4"]))
    with pytest.raises(IlladaError, match="leave out threshold"):
        evaluate(EvalOptions(**options, tasks=["sums"], settings={"threshold": 0.5}))
    with pytest.raises(IlladaError, match="confidence"):
        evaluate(EvalOptions(**options, tasks=["letters"], ablate="scoring"))


@pytest.mark.slow
def test_the_boost_of_the_papers_rows_is_not_for_causal_models(lm, tmp_path, in_tasks):
    options = EvalOptions(str(tmp_path), "model", task_files=str(TASKS))
    evaluation = Evaluation(options, task_manager(str(TASKS)))
    row = Row("sums", "sums", generation={"think_boost": 100.0, "think_boost_power": 3.0, "max_gen_toks": 2})
    result = evaluation.add(lm, row, Variant())
    assert result.settings["generation"]["think_boost"] == 0.0
    assert result.settings["generation"]["max_new_tokens"] == 2
    result = evaluation.add(lm, row, Variant(generation={"think_boost": 5.0}))  # asked for by name
    assert result.settings["generation"]["think_boost"] == 5.0
