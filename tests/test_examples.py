"""The examples run as their first lines say, on a model that the first of them trains (for a server: tests/serving)."""

import runpy
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
