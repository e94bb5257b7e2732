"""The demo's report from numbers of all stages: tables, pictures, and texts that are no Markdown and no HTML."""

import json
from dataclasses import asdict

import pytest

from illada.demo import align
from illada.demo.report import report_markdown, write_report
from illada.demo.stages import QUICK, suggestions
from illada.files import write_json
from illada.post_training.problems import Problems, read_problems
from illada.serving.about import read_about
from illada.toy_tasks import held_out

pytestmark = pytest.mark.slow

ODD = "Solve\n1|2 *a* _b_ <b>x</b> `c` [d](e) $1"
HARNESS = [
    {"task": "shift", "metric": "exact_match", "value": 0.5, "standard_error": 0.5},
    {"task": "library-choices", "metric": "acc", "value": 0.25, "standard_error": None},
]


def metrics(folder, **validation):
    folder.mkdir()
    records = [{"step": step, "loss": 4 / step} for step in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r | validation) + "\n" for r in records))


@pytest.fixture
def results():
    scores = {"accuracy": 0.5, "standard_error": 0.05, "seconds": 1.25}
    rows = [
        {"task": task, "steps_per_block": n, "problems": 50, "accuracy": share, "standard_error": 0.02}
        for task, share in (("shift", 0.75), ("library", 0.25))
        for n in (1, 16)
    ]
    step = {"tokens": ["1", "\n", "<|eos|>", "$"], "committed": [True, True, True, False]}
    sample = {"prompt": ODD, "expected": "1|2", "answer": ODD, "right": False, "forwards": 16}
    return {
        "settings": {"quick": True, "seed": 0, **asdict(QUICK)},
        "seconds": 240,
        "text": {
            "bits_per_byte": {"model": 2.75, "unigram": 3.5, "bigram": 2.5},
            "nats_per_token": {"model": 5.5, "unigram": 7.0, "bigram": 5.0},
            "parameters": 1_234_567,
            "training_tokens": 7_000_000,
            "validation_bytes": 900_000,
            "likelihood": {
                "windows": 16,
                "tokens": 2032,
                "figures": {
                    name: {"mean": mean, "standard_error": 0.015}
                    for name, mean in (("bound", 2.5), ("path", 2.25), ("path - bound", -0.25))
                },
            },
        },
        "frontier": [row | {"forwards_per_token": row["steps_per_block"] / 10} for row in rows],
        "samples": {"shift": [sample, sample | {"right": True}]},
        "choice": {"problems": 50, "confidence": scores, "likelihood": scores},
        "denoising": {"task": "sudoku", "prompt": ODD, "steps": [step | {"confidence": [0.9, 0.5, None, None]}]},
        "align": None,
        "harness": [row | {"documents": 1200, "forwards": 34_000, "seconds": 1.5} for row in HARNESS],
    }


def test_the_page_has_every_picture_and_shows_texts_as_they_are(results, tmp_path):
    metrics(tmp_path / "pretrain", validation_bits_per_byte=3.0)
    metrics(tmp_path / "sft", validation_loss=1.0)
    write_report(tmp_path, results)
    assert json.loads((tmp_path / "results.json").read_text())["seconds"] == 240
    pictures = {path.stem: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    assert set(pictures) == {"text-loss", "answers-loss", "accuracy", "frontier", "denoising"}
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())
    page = (tmp_path / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 5
    assert "images/" not in page
    shown = "Solve / 1|2 *a* _b_ &lt;b&gt;x&lt;/b&gt; `c` [d](e) $1"
    assert page.count(f"<td>{shown}</td>") == 4  # prompt and answer of two samples
    assert page.count(f"sudoku: {shown}") == 2  # below the picture and instead of it
    assert "<td>wrong, expected 1|2</td>" in page


def test_the_text_says_what_the_numbers_say(results, tmp_path):
    text = report_markdown(tmp_path, results)
    assert "1,234,567 parameters, trained from random weights in 4 minutes" in text
    assert "2.750 bits per byte, below the unigram model." in text
    assert "On 2,032 of these tokens, in 16 windows, blocks of 16" in text
    assert "take 2.250 ± 0.015 bits per byte" in text
    assert "the difference -0.250 ± 0.015." in text
    assert "no bound" not in report_markdown(tmp_path, {**results, "text": {**results["text"], "likelihood": None}})
    assert "Below half right: library." in text
    assert "| task | 1 step a block | 16 steps a block | problems |\n|---|---:|---:|---:|" in text
    assert "| shift | 75.0% ± 2.0% | 75.0% ± 2.0% | 50 |" in text
    assert "| forward passes per token (mean) | 0.10 | 1.60 | |" in text
    assert "| confidence | 50.0% ± 5.0% | 1.2 |" in text
    assert text.endswith(f"illada chat --model {tmp_path / 'model'} --block_length 16 --max_new_tokens 48\n```\n")


def test_the_report_has_a_table_of_the_harness_or_says_why_not(results, tmp_path):
    text = report_markdown(tmp_path, results)
    assert "| shift | exact_match | 50.0% ± 50.0% | 1,200 | 34,000 | 1.5 |" in text
    assert "| library-choices | acc | 25.0% | 1,200 |" in text
    assert "pip install 'illada[eval]'" in report_markdown(tmp_path, results | {"harness": None})


def test_what_the_page_offers_is_what_the_model_learned(tmp_path):
    row = {"steps_per_block": 4, "problems": 50, "standard_error": 0.0, "forwards_per_token": 0.4}
    results = {
        "frontier": [
            {**row, "task": task, "accuracy": a} for task, a in (("shift", 0.9), ("sudoku", 0.5), ("library", 0.1))
        ],
        "samples": {
            "shift": [{"prompt": "Shift: a", "right": False}, {"prompt": "Shift: b", "right": True}],
            "sudoku": [{"prompt": "Solve\n1", "right": True}],
            "library": [{"prompt": "Which module", "right": True}],
        },
    }
    found = suggestions(results)
    assert found["suggestions"] == [
        {"label": "Shift: b", "text": "Shift: b"},
        {"label": "Sudoku", "text": "Solve\n1"},
    ]
    assert "shift (90% right), sudoku (50% right)" in found["about"]
    (tmp_path / "config.json").write_text("{}")
    write_json(tmp_path / "suggestions.json", found)
    assert read_about(str(tmp_path)) == found


def test_the_page_goes_on_with_rewards_and_fewer_passes(results, tmp_path):
    metrics(tmp_path / "pretrain", validation_bits_per_byte=3.0)
    metrics(tmp_path / "sft", validation_loss=1.0)
    metrics(tmp_path / align.REWARDS, reward=0.5, validation_reward=0.625)
    metrics(
        tmp_path / align.FEWER_PASSES,
        **{"entropy": 0.1, "cross_entropy": 0.2, "validation_reward_at_0.9": 0.75, "validation_same_at_0.9": 0.5},
        **{"validation_tokens_per_pass_at_0.9": 3.5},
    )
    start = [
        {"threshold": None, "reward": 0.5, "same": 1.0, "tokens_per_pass": 0.75},
        {"threshold": 0.9, "reward": 0.25, "same": 0.9, "tokens_per_pass": 1.25},
    ]
    (tmp_path / align.FEWER_PASSES / "frontier.json").write_text(json.dumps({"points": start}))
    results["align"] = align.figures(tmp_path, (["shift"], ["shift", "library"]), 0.4375)
    write_report(tmp_path, results)
    text = (tmp_path / "report.md").read_text()
    assert "solves 62.5% of the held-out ones, 43.8% before" in text
    assert "| one token a pass | 50.0% | 0.75 | | |" in text
    assert "| threshold 0.9 | 25.0% | 1.25 | 75.0% | 3.50 |" in text
    assert (tmp_path / "report.html").read_text().count('src="data:image/png;base64,') == 7


def test_what_is_partly_right_is_rewarded():
    assert align.rewarded({"shift": 1.0, "sorting": 0.8, "addition": 0.01}) == ["sorting"]
    assert align.rewarded({"shift": 1.0, "addition": 0.01}) == ["shift"]


def test_the_further_runs_fit_each_other(tmp_path):
    """Each begins with the model before it, and neither trains on the problems that measure it."""
    (tmp_path / "data").mkdir()
    problems = {task: held_out(task, 3, 0) for task in ("shift", "sorting")}
    runs = align.recipes(tmp_path, align.QUICK, 0, (["sorting"], ["shift"]), problems, {"block_length": 16})
    for recipe, _, trainer in runs:
        recipe.check()
        assert trainer.opens.command in ("rl", "distill")
    (rl, _, _), (distill, _, _) = runs
    assert distill.model.start == f"{rl.output}/model"
    assert [p["prompt"] for p in read_problems(rl.data.validation)] == [e.prompt for e in problems["sorting"]]
    drawn = {Problems(rl.rl.tasks, "", 0)[n]["prompt"] for n in range(200)}
    assert not drawn & {example.prompt for example in problems["sorting"]}
