"""Where tasks and data come from: a folder in the hub's layout, and the authors' own checkout."""

import json
import sys
from dataclasses import replace

import lm_eval.tasks
import pyarrow
import pytest
from pyarrow import parquet

from illada import cli
from illada.errors import IlladaError
from illada.evaluation import local_data, run
from illada.evaluation.authors import CodeEval, _load
from illada.evaluation.local_data import check_folder, reading_from
from illada.evaluation.rows import paper_rows

README = """---
configs:
- config_name: {config}
  data_files:
{files}
---
"""
SUM = {"question": "One and one?", "answer": "1 + 1 = 2\n#### 2"}
SHORT = ["--settings.max_new_tokens", "4", "--settings.block_length", "4"]


def write_data(folder, config="main", **splits):
    """Write a data set as the hub has it: one parquet file a split, and a README that names them."""
    (folder / config).mkdir(parents=True)
    files = []
    for split, rows in splits.items():
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / config / f"{split}.parquet")
        files.append(f"  - split: {split}\n    path: {config}/{split}.parquet")
    (folder / "README.md").write_text(README.format(config=config, files="\n".join(files)))


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "hub"
    write_data(folder / "openai" / "gsm8k", train=[SUM], test=[SUM, {**SUM, "question": "And one?"}])
    return folder


def evaluate(model_folder, output, *words):
    cli.main(["eval", "--model", str(model_folder), "--device", "cpu", "--output", str(output), *words])


@pytest.mark.slow
def test_the_papers_rows_read_local_data_and_say_what_is_not_there(model_folder, hub, tmp_path, capsys):
    words = ["--paper", "instruct", "--tasks", "GSM8K", "MMLU-Redux", "--local_data", str(hub)]
    evaluate(model_folder, tmp_path / "out", *words, *SHORT)
    table = capsys.readouterr().out
    (row,) = [line for line in table.splitlines() if line.startswith("| GSM8K")]
    assert row.split("|")[-4].strip() == "2"
    assert "fxmarty/mmlu-redux-2.0-ok is not in" in table
    assert "lm-evaluation-harness 0." in table
    assert "the authors' is 0.4.10" in table
    assert "seeds 1234 (shots) and 0" in table
    assert local_data.datasets.load_dataset.__name__ == "load_dataset"  # put back


@pytest.mark.slow
def test_any_task_of_the_harness_reads_local_data(model_folder, hub, tmp_path, capsys):
    words = ["--tasks", "gsm8k_cot", "--local_data", str(hub), "--limit", "1", "--shots", "0"]
    evaluate(model_folder, tmp_path / "out", *words, *SHORT)
    table = capsys.readouterr().out
    assert "flexible-extract" in table
    assert "the first 1 documents of each task" in table


def test_an_older_name_of_a_data_set_is_known(hub):
    with reading_from(hub, download=False):
        assert local_data.datasets.load_dataset("gsm8k", "main")["test"].num_rows == 2
        with pytest.raises(FileNotFoundError, match="owner/name is not in"):
            local_data.datasets.load_dataset("owner/name")


def test_a_column_that_is_empty_in_one_split_only(tmp_path):
    write_data(tmp_path / "a" / "b", train=[{"x": "1", "more": [None]}], test=[{"x": "2", "more": ["assert"]}])
    with reading_from(tmp_path, download=False):
        data = local_data.datasets.load_dataset("a/b", "main")
    assert data["test"]["more"][0] == ["assert"]
    assert data["train"].num_rows == 1


def test_changed_files_and_other_folders_are_read_anew(hub, tmp_path):
    other = tmp_path / "other"
    write_data(other / "openai" / "gsm8k", train=[SUM], test=[{**SUM, "question": "Another?"}])
    with reading_from(hub, download=False):
        assert local_data.datasets.load_dataset("openai/gsm8k", "main")["test"].num_rows == 2
    with reading_from(other, download=False):
        assert local_data.datasets.load_dataset("openai/gsm8k", "main")["test"]["question"] == ["Another?"]
    parquet.write_table(pyarrow.Table.from_pylist([SUM] * 3), hub / "openai" / "gsm8k" / "main" / "test.parquet")
    with reading_from(hub, download=False):
        assert local_data.datasets.load_dataset("openai/gsm8k", "main")["test"].num_rows == 3


@pytest.mark.slow
def test_what_cannot_be_read_costs_its_row_alone(model_folder, hub, tmp_path, capsys):
    (hub / "openai" / "openai_humaneval").mkdir()  # nothing in it
    words = ["--paper", "base", "--tasks", "GSM8K", "HumanEval", "--local_data", str(hub), "--limit", "1", *SHORT]
    evaluate(model_folder, tmp_path / "out", *words, "--allow_code")
    table = capsys.readouterr().out
    assert "openai_humaneval cannot be read" in table
    assert "flexible-extract" in table


def test_a_folder_without_data_is_refused(model_folder, tmp_path, capsys):
    with pytest.raises(IlladaError, match="holds no data sets"):
        check_folder(str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit) as stop:
        evaluate(model_folder, tmp_path / "out", "--paper", "base", "--local_data", str(tmp_path / "nowhere"))
    assert stop.value.code == 2
    assert "nowhere holds no data sets" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


TASK = """
task: gsm8k_cot_reasoning
dataset_path: gsm8k
dataset_name: main
unsafe_code: true
output_type: generate_until
test_split: test
doc_to_text: "Their words: {{question}}"
doc_to_target: "assert True"
generation_kwargs: {until: ["Q:"], max_gen_toks: 256}
metric_list: [{metric: !function utils.passed, aggregation: mean, higher_is_better: true}]
filter_list: [{name: reasoning-final-answer, filter: [{function: custom, filter_fn: !function utils.read}]}]
"""
UTILS = """
import evaluate
from lm_eval.tasks.gsm8k.only_theirs import program

measure = evaluate.load("code_eval")
wrong = measure.compute(references=["assert add(2, 3) == 5"], predictions=[["def add(a, b): return a * b"]], k=[1])
assert wrong[0] == {"pass@1": 0.0}


def read(resps, docs):
    print("a word on stdout")
    return [[program] for _ in resps]


def passed(references, predictions):
    return measure.compute(references=references, predictions=predictions, k=[1])[0]["pass@1"]
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder in the form of the authors' checkout, with a task file and modules of our own in it."""
    folder = tmp_path / "checkout" / "eval_instruct" / "lm_eval" / "tasks" / "gsm8k"
    folder.mkdir(parents=True)
    (folder / "gsm8k-cot-reasoning.yaml").write_text(TASK)
    (folder / "utils.py").write_text(UTILS)
    (folder / "only_theirs.py").write_text("program = 'x = 1'")
    return tmp_path / "checkout"


@pytest.mark.slow
def test_the_authors_own_task_files_are_run(model_folder, hub, checkout, tmp_path, capsys, monkeypatch):
    (row,) = [row for row in paper_rows("instruct", "exact", "3-4", authors=True) if row.name == "GSM8K"]
    assert row.task == "gsm8k_cot_reasoning"
    others = [row for row in paper_rows("instruct", "exact", "3-4", authors=True) if row.name == "MMLU"]
    mine = [replace(row, metrics=("passed,reasoning-final-answer",)), *others]
    monkeypatch.setattr(run, "paper_rows", lambda *_: mine)
    before = [*lm_eval.tasks.__path__], sys.modules.get("evaluate")
    words = ["--paper", "instruct", "--local_data", str(hub), "--authors_tasks", str(checkout), *SHORT]
    with pytest.raises(SystemExit):
        evaluate(model_folder, tmp_path / "out", *words, "--tasks", "MMLU")
    assert "lacks the tasks mmlu_generative: check out all of it" in capsys.readouterr().err
    words += ["--tasks", "GSM8K"]
    evaluate(model_folder, tmp_path / "out", *words)
    assert "it runs generated programs" in capsys.readouterr().out
    evaluate(model_folder, tmp_path / "out", *words, "--allow_code")
    out, err = capsys.readouterr()
    assert "100.0" in out
    assert "a word on stdout" not in out
    assert "a word on stdout" in err
    assert ([*lm_eval.tasks.__path__], sys.modules.get("evaluate")) == before


def test_rows_without_a_task_of_the_authors_keep_the_harness_one():
    rows = {row.name: row for row in paper_rows("instruct", "exact", "3-4", authors=True)}
    assert {name for name, row in rows.items() if row.from_authors} == {
        *("MMLU", "MMLU-Pro", "GSM8K", "HumanEval", "MBPP")
    }
    assert rows["MMLU-Redux"].task == "mmlu_redux_generative"
    ours = {row.name: row for row in paper_rows("instruct", "exact", "3-4")}
    assert all(rows[name].generation == row.generation for name, row in ours.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--paper", "base", "--authors_tasks", "x"], "--authors_tasks is about --paper instruct"),
        (["--paper", "instruct", "--authors_tasks", "nowhere"], "give a checkout of the authors' repository"),
        (["--paper", "instruct", "--limit", "0"], "--limit is 0: it must be at least 1"),
    ],
)
def test_errors_are_one_line(words, message, model_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate(model_folder, tmp_path / "out", *words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_authors_measure_runs_programs_in_the_sandbox():
    tests, programs = ["assert f() == 1"] * 2, [["def f(): return 1"], ["def f(): return 2"]]
    assert CodeEval().compute(tests, programs, k=[1])[0] == {"pass@1": 0.5}
    with pytest.raises(IlladaError, match="only pass@1"):
        CodeEval().compute(tests, programs, k=[1, 10])
    with pytest.raises(IlladaError, match="only code_eval"):
        _load("bleu")


def test_the_rows_treat_bos_and_special_tokens_as_the_authors_script_does():
    for table in ("base", "instruct"):
        for row in paper_rows(table, "exact", "3-4"):
            assert (row.bos, row.special_tokens) == ("scores", "keep")


@pytest.mark.slow
def test_options_replace_what_rows_say(model_folder, hub, tmp_path, capsys):
    words = ["--paper", "instruct", "--tasks", "GSM8K", "--local_data", str(hub), "--limit", "1", *SHORT]
    ways = []
    for name, more in (("rows", []), ("mine", ["--bos", "always", "--special_tokens", "drop"])):
        evaluate(model_folder, tmp_path / name, *words, *more)
        settings = json.loads((tmp_path / name / "results.json").read_text())["results"][0]["settings"]
        ways.append((settings["bos"], settings["special_tokens"]))
    assert ways == [("scores", "keep"), ("always", "drop")]
