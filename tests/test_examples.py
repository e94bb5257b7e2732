"""The examples run as their first lines say, on a model that the first of them trains (for a server: tests/serving)."""

import importlib
import json
import random
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example as a script and returns what it printed."""

    def run_example(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_tiny.py", str(folder), "20"])
        runpy.run_path(str(EXAMPLES / "train_tiny.py"), run_name="__main__")
    return folder / "run" / "model"


def test_train_tiny_continues_and_prints_completed_lines(run, model_folder):
    printed = run("train_tiny.py", model_folder.parent.parent, 20).splitlines()
    assert len(printed) == 9
    assert printed[0].startswith("monday tuesday")
    assert printed[-1].endswith(f"of 54 lines completed correctly; the model is in {model_folder}")


@pytest.mark.slow
def test_train_tiny_learns_its_lines(run, tmp_path):
    *_, last = run("train_tiny.py", tmp_path).splitlines()
    assert int(last.split()[0]) >= 40, last


def test_infill_fills_every_gap(run, model_folder):
    text, *tokens = run("infill.py", model_folder, "a b___ d___ f", 2).splitlines()
    assert text.startswith("a b")
    assert text.endswith(" f")
    assert len(tokens) == 4
    assert all("log probability -" in token for token in tokens)


def test_custom_task_prints_an_accuracy(run, model_folder):
    pytest.importorskip("lm_eval")
    assert " ± " in run("custom_task.py", model_folder).splitlines()[-1]


def test_denoising_notebook_ends_with_a_picture(model_folder, monkeypatch):
    nbformat, client = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    path = EXAMPLES / "denoising.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size <= 100_000
    assert not any(cell.get("outputs") for cell in notebook.cells)
    monkeypatch.setenv("ILLADA_MODEL", str(model_folder))
    client.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(EXAMPLES))
    assert "image/png" in notebook.cells[-1].outputs[-1].data


NOUNS = """  1 a line of the licence
00000001 03 n 02 dog 0 hound 0 002 @ 00000002 n 0000 ~ 00000003 n 0000 | it has four legs; "the dog barked at night"
00000002 03 n 01 animal 0 001 ~ 00000001 n 0000 | a living thing that moves
00000003 03 n 01 toy_dog 0 001 @ 00000001 n 0000 | a very small dog
00000004 03 n 01 puppy 0 001 @ 00000001 n 0000 | a young dog
"""
NOUN_INDEX = """  1 a line of the licence
animal n 1 1 ~ 1 1 00000002
dog n 1 2 @ ~ 1 1 00000001
hound n 1 2 @ ~ 1 1 00000001
puppy n 1 1 @ 1 1 00000004
toy_dog n 1 1 @ 1 0 00000003
"""


@pytest.fixture
def texts(tmp_path):
    """A folder as `studies/texts.py` writes it, with a WordNet of five nouns."""
    wordnet = tmp_path / "texts" / "files" / "wordnet-base" / "usr" / "share" / "wordnet"
    wordnet.mkdir(parents=True)
    for part in ("noun", "verb", "adj", "adv"):
        (wordnet / f"data.{part}").write_text(NOUNS if part == "noun" else "")
        (wordnet / f"index.{part}").write_text(NOUN_INDEX if part == "noun" else "")
    for text in ("glosses", "definitions", "verses"):
        (tmp_path / "texts" / text).mkdir()
        for part in ("train", "held-out"):
            lines = [json.dumps({"text": f"{text} {part} {i}: a dog is an animal."}) for i in range(100)]
            (tmp_path / "texts" / text / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "texts"


def test_conversations_about_words(run, texts, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "dictionary")
    instructions = importlib.import_module("instructions")
    every = instructions.meanings(texts / "files" / "wordnet-base" / "usr" / "share" / "wordnet")
    asked = instructions.conversations("dog", "noun", every["n00000001"], every, random.Random(0))
    found = {record["group"]: (record["prompt"], record["response"]) for record in asked}
    assert found.pop("meaning")[1] == "It has four legs."
    assert found.pop("word")[1] == "dog"
    assert found == {
        "sentence": ("Use dog in a sentence.", "The dog barked at night."),
        "kind": ("What kind of thing is a dog?", "An animal."),
        "example": ("Name a kind of dog.", "A toy dog."),
        "synonym": ("What is another word for dog?", "hound"),
    }


def test_the_dictionary_is_made_and_reported(texts, tmp_path):
    """Its conversations are given, since five nouns are too few for some to be held out."""
    output = tmp_path / "dictionary"
    chats = output / "chats"
    chats.mkdir(parents=True)
    records = [{"prompt": f"What is a dog {i}?", "response": "An animal.", "group": "meaning"} for i in range(100)]
    for name, count in (("train", 100), ("held-out", 4)):  # what is held out is all asked
        chosen = [{**record, "group": group} for record in records[:count] for group in ("meaning", "kind")]
        chosen += [{**record, "group": group} for record in records[:2] for group in ("opposite", "synonym", "word")]
        (chats / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chosen))
    choices = {"context": "What is a dog?", "candidates": ["An animal.", "A dog.", "All.", "Four."], "answer": 0}
    (chats / "choices.jsonl").write_text(12 * (json.dumps(choices) + "\n"))
    small = ["--training.steps", 2, "--training.warmup_steps", 1, "--training.samples_per_step", 2]
    small += ["--training.decay_steps", 1, "--training.dtype", "fp32", "--parallel.compile", "false"]
    words = [EXAMPLES / "dictionary" / "make.py", "--output", output, "--data", texts, "--windows", 1, "--", *small]
    command = [sys.executable, *map(str, words)]
    once = subprocess.run(command, capture_output=True, text=True, check=False)
    assert once.returncode == 0, once.stderr
    assert "## It says" in once.stdout
    assert "- **What is a dog?**" in once.stdout
    assert (output / "forming.png").stat().st_size > 1000
