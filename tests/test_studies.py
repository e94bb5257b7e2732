"""The runner of studies: killed and started again it gives the same numbers; its report pairs arms by seed."""

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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


@pytest.fixture
def studies(tmp_path):
    """A copy of the studies with a question of two tiny arms."""
    shutil.copytree(ROOT / "studies", tmp_path / "studies", ignore=shutil.ignore_patterns("data", "results", "*.yaml"))
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "docs" / "images").mkdir(parents=True)
    data = tmp_path / "studies" / "data" / "words"
    data.mkdir(parents=True)
    for part in ("train", "held-out"):
        lines = [json.dumps({"text": f"{part} one two three four {i}."}) for i in range(60)]
        (data / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    question = {
        **{"question": "Does it split?", "hypothesis": "Yes.", "refuted_by": "No.", "text": "words", "vocab_size": 300},
        **{"recipe": "recipes/tiny-cpu-pretrain.yaml", "settings": SMALL, "seeds": [0], "windows": {8: 3, 16: 2}},
        **{"arms": {"split": {"data.split_probability": 0.3}, "whole": {"data.split_probability": 0.0}}},
        "pairs": [["split", "whole"]],
    }
    (tmp_path / "studies" / "questions").mkdir(exist_ok=True)
    (tmp_path / "studies" / "questions" / "q.yaml").write_text(yaml.safe_dump(question, sort_keys=False))
    return tmp_path / "studies"


def started(studies, work):
    words = [sys.executable, "studies/run.py", "studies/questions/q.yaml", "--cores", "1", "--work", str(work)]
    return subprocess.Popen(words, cwd=studies.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def numbers(studies):
    found = {path.name: json.loads(path.read_text()) for path in (studies / "results" / "q").glob("*.json")}
    for result in found.values():
        result.pop("environment")
    return found


@pytest.mark.slow
def test_killed_and_started_again_the_numbers_are_the_same(studies, tmp_path):
    whole = started(studies, tmp_path / "a")
    out, _ = whole.communicate()
    assert whole.returncode == 0, out
    want = numbers(studies)
    assert set(want) == {"split-0.json", "whole-0.json"}
    shutil.rmtree(studies / "results")
    killed = started(studies, tmp_path / "b")
    for line in killed.stdout:
        if line.startswith("whole-0 begins"):
            killed.send_signal(signal.SIGTERM)
            break
    killed.communicate()
    assert killed.returncode
    assert set(numbers(studies)) == {"split-0.json"}
    again = started(studies, tmp_path / "b")
    out, _ = again.communicate()
    assert again.returncode == 0, out
    assert "split-0" not in out  # it was done
    assert numbers(studies) == want

    command = [sys.executable, "studies/report.py"]
    report = subprocess.run(command, cwd=studies.parent, capture_output=True, text=True, check=False)
    assert report.returncode == 0, report.stderr
    page = (tmp_path / "docs" / "study.md").read_text()
    assert "| split − whole" in page
    assert (tmp_path / "docs" / "images" / "study-q.png").stat().st_size > 1000

    path = studies / "questions" / "q.yaml"
    path.write_text(path.read_text().replace("training.steps: 12", "training.steps: 13"))
    changed = started(studies, tmp_path / "b")
    out, _ = changed.communicate()
    assert changed.returncode
    assert "is of other settings" in out


def test_differences_are_paired_by_seed():
    sys.path.insert(0, str(ROOT / "studies"))
    try:
        import report
    finally:
        sys.path.pop(0)
    assert report.differences({0: 3.0, 1: 2.0, 5: 9.0}, {1: 1.0, 0: 1.5, 2: 7.0}) == [1.5, 1.0]
    assert report.mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / math.sqrt(3)))
    assert report.cell([1.0, 2.0, 3.0], "+") == "+2.0000 ± 0.5774 (3)"
    assert report.cell([1.25]) == "1.2500 (1)"
