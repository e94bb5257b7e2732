"""`illada eval` and `illada compare`: killed and continued, shared, tables of what ran and of what could not."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from illada import cli
from illada.errors import IlladaError
from illada.evaluation import run, task_files
from illada.evaluation.compare import differences, mcnemar
from illada.evaluation.journal import Entry, Journal, fingerprint
from illada.evaluation.options import EvalOptions
from illada.evaluation.rows import Row, Variant, ablation, paper_rows, select_rows
from illada.evaluation.run import Evaluation
from illada.evaluation.task_files import task_manager

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
TASKS = HERE / "tasks"


@pytest.fixture(scope="module")
def runs(model_folder, tmp_path_factory):
    """The output folders of runs.py."""
    output = tmp_path_factory.mktemp("runs")
    command = [sys.executable, str(HERE / "runs.py"), str(model_folder), str(TASKS), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def without_times(folder):
    content = json.loads((folder / "results.json").read_text())
    for result in content["results"]:
        assert result.pop("seconds") > 0 or result["status"] != "ok"
    content["arguments"].pop("output")
    content["environment"].pop("processes")
    return json.dumps(content)


def samples(folder):
    return {path.name: path.read_bytes() for path in (folder / "samples").iterdir()}


def keys(folder):
    lines = [line for path in sorted(folder.glob("requests.*")) for line in path.read_text().splitlines()]
    return [found["key"] for line in lines for found in json.loads(line)]


def test_killed_again_and_again_the_results_are_the_same_and_nothing_is_done_twice(runs):
    assert int((runs / "kills").read_text()) >= 10
    assert without_times(runs / "killed") == without_times(runs / "whole")
    assert samples(runs / "killed") == samples(runs / "whole")
    assert len(samples(runs / "whole")) == 6
    assert sorted(keys(runs / "killed")) == sorted(keys(runs / "whole"))
    assert len(set(keys(runs / "killed"))) == len(keys(runs / "killed"))


def test_two_processes_share_the_work(runs):
    one, two = (json.loads((runs / name / "results.json").read_text()) for name in ("whole", "shared"))
    assert two["environment"]["processes"] == 2
    for a, b in zip(one["results"], two["results"], strict=True):
        assert (a["row"], a["documents"], a["status"]) == (b["row"], b["documents"], b["status"])
        assert a["forwards"] == b["forwards"]
        for name, (value, error) in a["metrics"].items():
            assert b["metrics"][name] == [pytest.approx(value, abs=1e-4), error and pytest.approx(error, abs=1e-4)]
    assert sorted(keys(runs / "shared")) == sorted(keys(runs / "whole"))
    assert (runs / "shared" / "requests.1.jsonl").stat().st_size > 0


def test_a_run_compared_with_itself_differs_nowhere(runs, capsys):
    cli.main(["compare", str(runs / "whole"), str(runs / "killed")])
    table = capsys.readouterr().out
    assert "McNemar" in table
    assert "letters" in table
    assert all((d.low, d.high, d.p) == (0, 0, 1) for d in differences(str(runs / "whole"), str(runs / "killed")))


def write_samples(folder, values, metric="acc"):
    (folder / "samples").mkdir(parents=True)
    rows = [{"doc_id": i, "filter": "none", "metrics": [metric], metric: v} for i, v in values.items()]
    (folder / "samples" / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_differences_are_paired(tmp_path):
    # Everything else equal, B wins twelve documents that A has not: as groups no difference would be seen.
    a = {i: float(i % 2) for i in range(100)}
    b = {i: 1.0 if i < 24 else v for i, v in a.items()} | {200: 0.0}
    write_samples(tmp_path / "a", a)
    write_samples(tmp_path / "b", b)
    (d,) = differences(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (d.documents, d.a, d.b) == (100, 0.5, 0.62)
    assert d.p == pytest.approx(2 * 0.5**12)
    assert 0.05 < d.low < 0.12 < d.high < 0.2
    with pytest.raises(IlladaError, match="no samples in"):
        differences(str(tmp_path), str(tmp_path / "b"))
    write_samples(tmp_path / "c", {500: 1.0})
    with pytest.raises(IlladaError, match="share no task"):
        differences(str(tmp_path / "a"), str(tmp_path / "c"))


def test_mcnemar():
    assert mcnemar(0, 0) == 1
    assert mcnemar(1, 5) == pytest.approx(2 * (1 + 6) / 64)


def test_a_torn_line_is_cut_off_and_a_damaged_one_named(tmp_path):
    journal = Journal(tmp_path)
    journal.add([Entry("a", [1.5, False], 2, 0.1)])
    with journal.path.open("a") as file:
        file.write('[{"key": "b", "val')
    again = Journal(tmp_path)
    assert list(again.entries) == ["a"]
    again.add([Entry("c", ["text"], 3, 0.1)])
    other = Journal(tmp_path, rank=1)
    assert list(other.entries) == ["a", "c"]
    journal.path.write_text("[1]\n")
    with pytest.raises(IlladaError, match="line 1 is damaged"):
        Journal(tmp_path)


def test_fingerprints_tell_models_apart(model_folder, tmp_path, build_model, tiny_tokenizer):
    for name, seed in (("same", 3), ("other", 4)):
        model = build_model(
            tie=True, seed=seed, vocab_size=len(tiny_tokenizer), max_position_embeddings=256, mask_token_id=5
        )
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    assert fingerprint(str(tmp_path / "same")) == fingerprint(str(model_folder))
    assert fingerprint(str(tmp_path / "other")) != fingerprint(str(model_folder))


def test_ablations_are_one_table(model_folder, tmp_path, capsys):
    words = ["eval", "--model", str(model_folder), "--task_files", str(TASKS), "--output", str(tmp_path)]
    words += ["--dtype", "fp32", "--device", "cpu", "--limit", "2", "--samples", "3"]
    cli.main([*words, "--ablate", "scoring"])
    table = capsys.readouterr().out
    assert [line.split("|")[1:3] for line in table.splitlines()[2:] if "acc " in line] == [
        [f" {scorer} ", f" {task} "]
        for scorer in ("confidence", "likelihood", "path      ")
        for task in ("endings  ", "last_word", "letters  ")
    ]
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    forwards = {(r["variant"], r["row"]): r["forwards"] for r in results}
    # Two documents with two candidates of two tokens each.
    assert [forwards[scorer, "letters"] for scorer in ("confidence", "likelihood", "path")] == [8, 12, 8]
    assert (tmp_path / "variants.png").stat().st_size > 1000
    settings = ["--settings.threshold", "0.75", "--settings.cache", "frozen"]
    cli.main([*words, "--ablate", "block_length", "--values", "2", "4", "--tasks", "sums", *settings])
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    generation = [r["settings"]["generation"] for r in rows]
    assert [(g["block_length"], g["threshold"], g["cache"]) for g in generation] == [
        (2, 0.75, "frozen"),
        (4, 0.75, "frozen"),
    ]


def test_every_checkpoint_of_a_run(model_folder, tmp_path, capsys):
    for step in (1, 2):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(model_folder)
    (model_folder / "state.json").write_text("{}")
    try:
        words = ["--run", str(tmp_path / "run"), "--task_files", str(TASKS), "--tasks", "letters", "--device", "cpu"]
        cli.main(["eval", *words, "--output", str(tmp_path / "out")])
    finally:
        (model_folder / "state.json").unlink()
    table = capsys.readouterr().out
    assert "step-00000001" in table
    assert "step-00000002" in table


DOCUMENTS = {
    "openai/openai_humaneval": {
        "test": [
            {
                "prompt": "def f(x):\n",
                "entry_point": "f",
                "test": "def check(g):\n    assert g(1) == 2",
                "canonical_solution": "    return x + 1",
            }
        ]
    },
    "google-research-datasets/mbpp": {
        "prompt": [
            {"task_id": i, "text": f"Task {i}.", "code": f"x = {i}", "test_list": ["a", "b"], "test_setup_code": ""}
            for i in range(1, 6)
        ],
        "test": [{"task_id": 11, "text": "Make f.", "code": "f = 1", "test_list": ["assert f"], "test_setup_code": ""}],
    },
    "openai/gsm8k": {"test": [{"question": "One and one?", "answer": "1 + 1 = 2\n#### 2"}]},
    "EleutherAI/hendrycks_math": {"test": [{"problem": "One?", "solution": r"\boxed{1}"}]},
    "HuggingFaceH4/MATH-500": {"test": [{"problem": "One?", "solution": r"\boxed{1}", "answer": "1"}]},
    "TIGER-Lab/MMLU-Pro": {
        "test": [{"question": "Which?", "options": ["x", "y", "z"], "answer": "B", "category": "law"}]
    },
}


CHOICES = [{"question": f"Q{i}?", "choices": ["a", "b", "c", "d"], "answer": i % 4} for i in range(8)]
LETTERS = {"Question": "q", "A": "a", "B": "b", "C": "c", "D": "d", "Answer": "B"}
HARNESS = {
    "cais/mmlu": {"test": CHOICES, "dev": CHOICES},
    "fxmarty/mmlu-redux-2.0-ok": {"test": CHOICES},
    "SaylorTwift/bbh": {"test": [{"input": "x", "target": "(A)"}]},
    "allenai/ai2_arc": {
        split: [{"question": "q", "choices": {"text": ["a b", "c"], "label": ["A", "B"]}, "answerKey": "A"}]
        for split in ("train", "test")
    },
    "Rowan/hellaswag": {
        split: [{"ctx_a": "a", "ctx_b": "b", "activity_label": "l", "endings": ["x y", "z"], "label": "0"}]
        for split in ("train", "validation")
    },
    "baber/piqa": {split: [{"goal": "g", "sol1": "a b", "sol2": "c", "label": 0}] for split in ("train", "validation")},
    "haonan-li/cmmlu": {"test": [LETTERS], "dev": [LETTERS] * 5},
}


@pytest.fixture
def ours(monkeypatch):
    """The data sets of the paper's tasks, of a few documents each."""
    import datasets

    known = DOCUMENTS | HARNESS

    def load(path, name=None, **_):
        return datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in known[path].items()})

    monkeypatch.setattr(datasets, "load_dataset", load)


def overlap(one, other):
    """Whether one string can begin within the other and reach its end or beyond."""
    return any(other.startswith(one[at:]) or one[at:].startswith(other) for at in range(1, len(one)))


@pytest.mark.slow
def test_the_harness_has_the_tasks_and_metrics_of_the_papers_rows(ours, build_model, tiny_tokenizer, tmp_path):
    model = build_model(tie=True, seed=3, vocab_size=len(tiny_tokenizer), max_position_embeddings=4096, mask_token_id=5)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    lm = run.IlladaLM(str(tmp_path / "model"), dtype="fp32", device="cpu")
    manager = task_manager(None)
    evaluation = Evaluation(EvalOptions(str(tmp_path), "model", tasks=["any"], limit=1), manager)
    for row in [*paper_rows("base", "exact", "3-4"), *paper_rows("instruct", "exact", "3-4")]:
        small = {"max_gen_toks": 2, "block_length": 2, "think_boost": 0.0} if row.generation else {}
        result = evaluation.add(lm, row, Variant(generation=small))
        if result.status == "ok":
            assert set(result.metrics) == set(row.metrics)
            assert set(result.settings["shots"].values()) == {row.shots}
            # The authors cut at one stop string after the other, we at the earliest: equal where none overlap.
            stops = result.settings.get("generation", {}).get("stop", ())
            assert not any(overlap(one, other) for one in stops for other in stops if one != other), stops
        else:  # programs are not allowed here
            assert result.status == "not run"
    assert sum(result.status == "ok" for result in evaluation.results) >= 12
    for path in (tmp_path / "samples").glob("mmlu_redux_*"):
        assert path.read_text().count('"doc_id"') == 1


def test_a_task_file_is_taken_where_its_folder_is_and_samples_hold_the_question(model_folder, tmp_path, capsys):
    words = ["eval", str(model_folder), "--task_files", str(TASKS / "letters.yaml"), "--output", str(tmp_path / "out")]
    cli.main([*words, "--limit", "2", "--dtype", "fp32", "--device", "cpu"])
    said = capsys.readouterr()
    assert [line.split("|")[1].strip() for line in said.out.splitlines()[2:3]] == ["letters"]
    assert "tuned on conversations" not in said.err
    (file,) = (tmp_path / "out" / "samples").iterdir()
    questions = [json.loads(line)["question"] for line in file.read_text().splitlines()]
    assert len(questions) == 2
    assert all("Which comes after" in question for question in questions)
    (tmp_path / "group.yaml").write_text("dataset_path: json\n")
    with pytest.raises(IlladaError, match="names no task"):
        run.evaluate(EvalOptions(str(tmp_path / "x"), str(model_folder), task_files=str(tmp_path / "group.yaml")))


def test_a_tuned_model_without_the_template_is_asked_about(model_folder, tmp_path, capsys):
    folder = tmp_path / "my-Instruct"
    shutil.copytree(model_folder, folder)
    words = ["eval", str(folder), "--task_files", str(TASKS / "letters.yaml"), "--limit", "1", "--device", "cpu"]
    cli.main([*words, "--output", str(tmp_path / "plain")])
    said = capsys.readouterr().err
    assert "my-Instruct was tuned on conversations" in said
    assert "it/s" not in said  # no bar where there is no terminal
    cli.main([*words, "--output", str(tmp_path / "chat"), "--chat"])
    assert "tuned on conversations" not in capsys.readouterr().err


def test_a_question_is_not_among_its_own_shots(model_folder, tmp_path, in_tasks):
    shutil.copy(TASKS / "letters.jsonl", tmp_path)
    text = (TASKS / "letters.yaml").read_text()
    (tmp_path / "letters.yaml").write_text(text.replace("task: letters", "task: own_shots"))
    options = EvalOptions(str(tmp_path / "out"), str(model_folder), task_files=str(tmp_path))
    evaluation = Evaluation(options, task_manager(str(tmp_path)))
    lm = run.IlladaLM(str(model_folder), dtype="fp32", device="cpu")
    seen = []
    lm.loglikelihood = lambda requests: [seen.append(r.args[0]) or (0.0, False) for r in requests]
    evaluation.add(lm, Row("own_shots", "own_shots", shots=4), Variant())
    assert len(seen) == 10
    for context in seen:
        assert len(set(re.findall(r"Which comes after \w+", context))) == 5


@pytest.mark.parametrize("table", ["base", "instruct"])
def test_our_task_files_ask_the_papers_way(table, ours, model_folder, tmp_path):
    rows = [row for row in paper_rows(table, "exact", "3-4") if row.task.startswith("illada_")]
    rows = [row for row in rows if row.task != "illada_mmlu_generative"]  # its subjects are the harness's
    small = {"max_gen_toks": 4, "block_length": 4, "think_boost": 0.0}
    manager = task_manager(str(task_files.TASKS))
    evaluation = Evaluation(EvalOptions(str(tmp_path), "model", paper=table, allow_code=True), manager)
    lm = run.IlladaLM(str(model_folder), dtype="fp32", device="cpu")
    asked = {}
    for row in rows:
        assert row.generation["max_gen_toks"] == lm.settings_of(row.generation).max_new_tokens
        result = evaluation.add(lm, row, Variant(generation=small))
        assert result.status == "ok"
        assert set(result.metrics) == set(row.metrics)
        asked[row.name] = result
        assert result.settings["chat"] == (table == "instruct")
    if table == "base":
        task = manager.load(["illada_mbpp"])["tasks"]["illada_mbpp"]
        task.set_fewshot_seed(0)
        text = task.fewshot_context(task.test_docs()[0], 3)
        assert [f"Task {i}." in text for i in (1, 2, 3, 4, 5)] == [False, True, True, True, False]
        assert text.endswith("Make f. Your code should pass these tests:\n\nassert f\n[BEGIN]\n")
        assert text.count("\n[DONE]") == 3
        assert set(asked) == {"MATH", "HumanEval", "MBPP", "MATH-500"}
    else:
        assert asked["MATH"].documents == asked["MATH-reasoning"].documents == 7
        assert set(asked) == {"MMLU-Pro", "GSM8K", "MATH", "HumanEval", "MBPP", "MATH-reasoning", "MATH-500"}


def test_rows_of_the_paper():
    base, instruct = paper_rows("base", "exact", "3-4"), paper_rows("instruct", "exact", "4-3")
    assert sum(row.paper for row in base if row.average) / 8 == pytest.approx(63.95)
    assert sum(row.paper for row in instruct if row.average) / 7 == pytest.approx(67.13, abs=0.01)
    mmlu = select_rows(instruct, ["mmlu", "mmlu_redux_generative"])
    assert [row.generation["max_gen_toks"] for row in mmlu] == [4, 3]
    fast = {row.name: row for row in paper_rows("base", "fast", "3-4")}
    assert fast["GSM8K"].generation["threshold"] == 0.95
    assert not fast["ARC-C"].generation
    with pytest.raises(IlladaError, match="no task GSM9K"):
        select_rows(base, ["GSM9K"])


def test_what_cannot_be_reached_gets_no_number(model_folder, tmp_path, capsys):
    rows = [row for row in paper_rows("base", "exact", "3-4") if row.task.startswith("illada_")]
    options = EvalOptions(str(tmp_path), str(model_folder), paper="base", dtype="fp32", device="cpu")
    evaluation = Evaluation(options, task_manager(str(task_files.TASKS)), rows)
    table = evaluation.run({"": str(model_folder)}, [Variant()])
    assert [line.split("|")[3].strip() for line in table.splitlines()[2:7]] == ["dataset not reachable"] * 4 + ["–"]
    assert all(not result.metrics for result in evaluation.results)


def test_without_the_math_libraries_only_the_math_rows_are_missing(ours, model_folder, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if "/minerva" in name or ".minerva_math" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    rows = select_rows(paper_rows("instruct", "exact", "3-4"), ["MATH", "MATH-reasoning", "MATH-500", "GSM8K"])
    evaluation = Evaluation(EvalOptions(str(tmp_path), "model", paper="instruct"), task_manager(str(task_files.TASKS)))
    lm = run.IlladaLM(str(model_folder), dtype="fp32", device="cpu")
    small = {"max_gen_toks": 4, "block_length": 4, "think_boost": 0.0}
    found = [evaluation.add(lm, row, Variant(generation=small)).status for row in rows]
    assert found == ["library missing"] * 3 + ["ok"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "what to evaluate"),
        (["--paper", "base", "--task_files", "x"], "exclude each other"),
        (["--tasks", "x", "--decode", "fast"], "--decode and --lengths"),
        (["--paper", "base", "--shots", "2"], "--shots and --chat"),
        (["--tasks", "x", "--values", "1"], "give --ablate too"),
        (["--task_files", "nowhere"], "no task files in nowhere"),
        (["--task_files", str(TASKS), "--ablate", "steps", "--values", "many"], "values of steps are numbers"),
        (["--task_files", str(TASKS), "--tasks", "sum"], "no task sum here"),
    ],
)
def test_errors_are_one_line(words, message, model_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval", "--model", str(model_folder), "--output", str(tmp_path), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_an_ablation_that_concerns_nothing_says_so(model_folder, tmp_path, capsys):
    words = ["--task_files", str(TASKS), "--tasks", "letters", "--ablate", "steps", "--output", str(tmp_path)]
    with pytest.raises(SystemExit):
        cli.main(["eval", "--model", str(model_folder), "--device", "cpu", *words])
    assert "no task here is concerned" in capsys.readouterr().err
    assert ablation("threshold", ["none", "0.9"])[0].generation["threshold"] is None


def test_a_folder_of_tasks_may_be_relative(monkeypatch):
    monkeypatch.chdir(HERE)
    files = [getattr(task, "yaml_path", task) for task in task_manager(TASKS.name).task_index.values()]
    assert files
    assert all(Path(file).is_absolute() for file in files)
