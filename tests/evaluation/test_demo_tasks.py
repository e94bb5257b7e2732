"""The demo's problems as task files: the harness asks what the demo asks."""

import json
import shutil

import pytest

from illada.demo import task_files
from illada.generation.engine import generate
from illada.generation.settings import GenerationSettings
from illada.scoring.optional.candidates import Item, score_candidates
from illada.text.chat import encode_prompt
from illada.toy_tasks import Choice, Example
from illada.weights.load import load_model

CHOICES = [Choice("One?", (" two", " three four", "five"), 1), Choice("Six\nor seven?", ("six", "seven"), 0)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory, model_folder):
    """A demo's folder with a model in it, the texts it says at one token a pass, and problems it half solves."""
    output = tmp_path_factory.mktemp("demo")
    shutil.copytree(model_folder, output / "model")
    model, tokenizer = load_model(str(output / "model"))
    asked = ["Shift: a b", "Solve\n12"]
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in asked]
    settings = GenerationSettings(max_new_tokens=8, block_length=4, eos_token_id=2)
    said = [tokenizer.decode(a.ids, skip_special_tokens=True) for a in generate(model, prompts, settings, tokenizer)]
    problems = {"shift": [Example("shift", asked[0], said[0]), Example("shift", asked[1], "12")]}
    rows = task_files.evaluate_in_harness(output, problems, CHOICES, {"max_new_tokens": 8, "block_length": 4}, 0)
    return output, said, rows


def samples(output, task):
    return [json.loads(line) for line in (output / "evaluation" / "samples" / f"{task}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_answers_and_scores_are_the_demo_s_own(demo):
    output, said, rows = demo
    assert [sample["filtered"][0] for sample in samples(output, "shift")] == said
    model, tokenizer = load_model(str(output / "model"))
    items = [Item(choice.prompt, list(choice.candidates)) for choice in CHOICES]
    scores = score_candidates(model, tokenizer, items, "confidence", 1, 0, chat=True)
    for sample, want in zip(samples(output, task_files.CHOICES), scores, strict=True):
        assert [float(score) for score, _ in sample["filtered"]] == pytest.approx(want, abs=1e-4)
    right = [max(range(len(s)), key=s.__getitem__) == c.answer for s, c in zip(scores, CHOICES, strict=True)]
    assert [(row["task"], row["metric"], row["value"], row["documents"]) for row in rows] == [
        ("shift", "exact_match", 0.5, 2),
        (task_files.CHOICES, "acc", sum(right) / 2, 2),
    ]
    assert rows[0]["standard_error"] == pytest.approx(0.5)
    assert (output / "tasks" / ".cache").is_dir()


def test_without_the_harness_nothing_is_evaluated(monkeypatch, tmp_path):
    monkeypatch.setattr(task_files, "find_spec", lambda _: None)
    assert task_files.evaluate_in_harness(tmp_path, {}, [], {}, 0) is None
    assert not list(tmp_path.iterdir())
