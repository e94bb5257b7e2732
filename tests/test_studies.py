"""The runner of studies: killed and started again it gives the same numbers; its report pairs arms by seed."""

import importlib.util
import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from illada import cli

ROOT = Path(__file__).parents[1]
SMALL = {
    "model.preset": "1m",
    "model.hidden_size": 32,
    "model.num_hidden_layers": 1,
    "model.intermediate_size": 32,
    "data.window": 16,
    "training.samples_per_step": 2,
    "training.samples_per_batch": 2,
    "training.steps": 12,
    "training.warmup_steps": 2,
    "training.decay_steps": 6,
    "training.validate_every": 12,
    "training.validation_samples": 4,
    "training.checkpoint_every": 3,
}
TUNED = {
    **{name: value for name, value in SMALL.items() if not name.startswith("model.") and name != "training.steps"},
    "data.window": 32,
    "training.epochs": 2,
}
WRITING = {
    "texts": 3,
    "given": 2,
    "judge": "split/causal",
    "ways": {"drawn": {"temperature": 1.0, "block_length": 4, "max_new_tokens": 4}},
}
CHOICES = {"problems": 3, "files": ["choices"], "method": "likelihood", "samples": 2}


@pytest.fixture
def studies(tmp_path):
    """A copy of the studies with a question of two tiny arms."""
    shutil.copytree(
        ROOT / "studies", tmp_path / "studies", ignore=shutil.ignore_patterns("data", "results", "questions")
    )
    (tmp_path / "docs" / "images").mkdir(parents=True)
    data = tmp_path / "studies" / "data" / "words"
    data.mkdir(parents=True)
    for part in ("train", "held-out"):
        lines = [json.dumps({"text": f"{part} one two three four {i}."}) for i in range(60)]
        (data / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    chats = tmp_path / "studies" / "data" / "chats"
    chats.mkdir()
    for part, group in (("train", ""), ("held-out", ""), ("problems", "one two")):
        groups = group.split() or [""]
        lines = [
            json.dumps({"prompt": f"{part} {i}", "response": "three", "group": groups[i % len(groups)]})
            for i in range(40)
        ]
        (chats / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    choices = {"context": "three", "candidates": ["four", "one two"], "answer": 0}
    (data / "choices.jsonl").write_text(3 * (json.dumps(choices) + "\n"))
    common = {"hypothesis": "Yes.", "refuted_by": "No.", "seeds": [0], "tokenizer": ["words", 300]}
    split = {
        **common,
        **{"number": 1, "question": "Does it split?", "data": "words", "recipe": "studies/recipes/pretrain.yaml"},
        **{"settings": SMALL, "measure": {"text": {8: 3, 16: 2}}, "show": ["bound 8", "path 16"]},
        "arms": {
            "split": {"data.split_probability": 0.3},
            "whole": {"data.split_probability": 0.0},
            "causal": {"model.causal": True},
        },
        **{"pairs": [["split", "whole"]], "plot": {"kind": "differences", "figures": ["bound 8"], "label": "tokens"}},
    }
    tuned = {
        **common,
        **{"number": 2, "question": "Does it answer?", "data": "chats", "recipe": "studies/recipes/sft.yaml"},
        **{"command": "sft", "settings": TUNED, "pairs": [], "show": ["accuracy", "accuracy one"]},
        "measure": {"answers": {"problems": 4, "max_new_tokens": 4, "block_length": 4}},
        "arms": {
            "base": {"same": "split/split"},
            "few": {"start": "base", "documents": 10},
            "written": {"start": "base", "recipe": None, "data": "words", "measure": {"writing": WRITING}},
            "chosen": {"start": "few", "recipe": None, "data": "words", "measure": {"choices": CHOICES}},
        },
        "plot": {"kind": "bars", "figures": ["accuracy"]},
    }
    (tmp_path / "studies" / "questions").mkdir(exist_ok=True)
    for name, question in (("split", split), ("tuned", tuned)):
        path = tmp_path / "studies" / "questions" / f"{name}.yaml"
        path.write_text(yaml.safe_dump(question, sort_keys=False))
    return tmp_path / "studies"


def loaded(name, studies, monkeypatch):
    """Load a program of the copy as a module."""
    specification = importlib.util.spec_from_file_location(name, studies / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, name, module)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def undisturbed(studies, monkeypatch):
    """Make all numbers, every command and every arm in this process, where nothing loads torch again."""

    def run(work, results):
        torch.set_num_threads(1)
        monkeypatch.syspath_prepend(studies)
        loaded("measure", studies, monkeypatch)
        runner = loaded("run", studies, monkeypatch)
        monkeypatch.setattr(runner, "illada", lambda *words, log: cli.main([str(word) for word in words]))
        monkeypatch.setattr(runner, "work_through", lambda arms, *_: [runner.run(arm) for arm in arms])
        words = ["studies/questions/tuned.yaml", "--work", str(work), "--results", str(results)]
        monkeypatch.setattr(sys, "argv", ["run.py", *words])
        handler = signal.getsignal(signal.SIGTERM)
        try:
            runner.main()
        finally:
            signal.signal(signal.SIGTERM, handler)

    return run


def started(studies, *options):
    words = [sys.executable, "studies/run.py", "studies/questions/tuned.yaml", *options]
    return subprocess.Popen(words, cwd=studies.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def numbers(results):
    found = {str(path.relative_to(results)): json.loads(path.read_text()) for path in results.glob("*/*.json")}
    for result in found.values():
        del result["environment"]
        result["figures"] = {name: value for name, value in result["figures"].items() if "seconds" not in name}
    return found


@pytest.mark.slow
def test_killed_and_started_again_the_numbers_are_the_same(studies, undisturbed, tmp_path):
    undisturbed(tmp_path / "a", tmp_path / "once")
    want = numbers(tmp_path / "once")
    names = ("split/split-0", "split/causal-0", "tuned/few-0", "tuned/written-0", "tuned/chosen-0")
    assert set(want) == {f"{name}.json" for name in names}
    written = want["tuned/written-0.json"]["figures"]
    assert {f"{what} {way}" for what in ("judged", "distinct", "varied", "tokens") for way in ("text", "drawn")} == set(
        written
    )
    assert 0 < written["distinct drawn"] <= 1 <= written["tokens drawn"] <= 4
    assert 5 < written["judged drawn"] < 12  # of 300 words that a model has hardly begun to tell apart
    assert want["tuned/few-0.json"]["tokens"] < want["split/split-0.json"]["tokens"] * 10
    assert want["tuned/chosen-0.json"]["figures"]["positions choices"] > 0
    assert "tokens" not in want["tuned/chosen-0.json"]
    assert {"bound 8", "path 8", "bound 16", "best", "last"} <= set(want["split/split-0.json"]["figures"])

    shutil.copytree(tmp_path / "a" / "data", tmp_path / "b" / "data")
    options = ["--cores", "1", "--work", str(tmp_path / "b")]
    killed = started(studies, *options)
    for line in killed.stdout:
        if line.startswith("tuned/few-0 begins"):
            killed.send_signal(signal.SIGTERM)
            break
    killed.communicate()
    assert killed.returncode
    assert set(numbers(studies / "results")) == {"split/split-0.json"}
    again = started(studies, *options)
    out, _ = again.communicate()
    assert again.returncode == 0, out
    assert "split/split-0" not in out  # it was done
    assert numbers(studies / "results") == want
    again = started(studies, *options)
    assert "all numbers are in" in again.communicate()[0]

    command = [sys.executable, "studies/report.py", "--output", str(tmp_path / "docs")]
    report = subprocess.run(command, cwd=studies.parent, capture_output=True, text=True, check=False)
    assert report.returncode == 0, report.stderr
    page = (tmp_path / "docs" / "study.md").read_text()
    assert "| split − whole" in page
    assert page.index("1. Does it split?") < page.index("2. Does it answer?")
    for name in ("split", "tuned"):
        assert (tmp_path / "docs" / "images" / f"study-{name}.png").stat().st_size > 1000

    path = studies / "questions" / "split.yaml"
    path.write_text(path.read_text().replace("training.steps: 12", "training.steps: 13"))
    changed = started(studies, *options)
    out, _ = changed.communicate()
    assert changed.returncode
    assert "is of other settings" in out


@pytest.fixture
def report(monkeypatch):
    """The report's functions."""
    monkeypatch.syspath_prepend(ROOT / "studies")
    return importlib.import_module("report")


def test_differences_are_paired_by_seed(report):
    assert report.differences({0: 3.0, 1: 2.0, 5: 9.0}, {1: 1.0, 0: 1.5, 2: 7.0}) == [1.5, 1.0]
    assert report.mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / math.sqrt(3)))
    assert report.cell([1.0, 2.0, 3.0], "+") == "+2.000 ± 0.577"
    assert report.cell([1.25]) == "1.250 (1)"
    assert report.cell([1000.0, 2000.0]) == "1500 ± 500 (2)"


def test_tokens_to_a_level_lie_between_validations(report):
    curve = [[100, 4.0], [200, 3.0], [300, 3.5], [400, 2.0]]
    assert report.tokens_to(curve, 3.25) == 175
    assert report.tokens_to(curve, 5.0) == 100
    assert report.tokens_to(curve, 2.5) == pytest.approx(300 + 100 * 1.0 / 1.5)
    assert report.tokens_to(curve, 1.0) is None


def test_the_questions_of_the_repository_are_whole(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "studies")
    runner = importlib.import_module("run")
    places = runner.Places(tmp_path / "work", tmp_path / "results")
    names = [path.stem for path in (ROOT / "studies" / "questions").glob("*.yaml")]
    for name in names:
        question = runner.read_question(name)
        for arm in runner.arms_of(name, places):
            arm.model()
            if arm.asked["recipe"] is not None:
                assert (ROOT / arm.asked["recipe"]).is_file()
        assert {arm for pair in question["pairs"] for arm in pair} <= set(question["arms"])
        assert len(question["seeds"]) >= 3
    assert runner.needed(names, places)


def test_an_arm_may_judge_itself_but_not_begin_with_itself(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "studies")
    runner = importlib.import_module("run")
    places = runner.Places(tmp_path / "work", tmp_path / "results")
    judged = {"measure": {"writing": {"judge": "judge"}}}
    question = {"seeds": [0], "recipe": "some.yaml", "arms": {"judge": judged, "judged": judged}}
    monkeypatch.setattr(runner, "read_question", lambda _: question)
    assert [arm.name for arm in runner.needed(["q"], places)] == ["judge", "judged"]
    question["arms"] = {"one": {"start": "two"}, "two": {"start": "one"}}
    with pytest.raises(SystemExit, match="q/one-0 needs its own model"):
        runner.needed(["q"], places)
