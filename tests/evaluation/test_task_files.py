"""What `illada eval` reads: task files, their data, settings and its own folder, damaged or of another kind."""

import json
import re

import pytest
import yaml

from illada import cli
from illada.errors import IlladaError
from illada.evaluation.compare import differences
from illada.evaluation.harness import IlladaLM
from illada.evaluation.journal import Journal
from illada.evaluation.options import EvalOptions
from illada.evaluation.task_files import names_in, task_manager

pytestmark = pytest.mark.slow

TASK = {
    **{"task": "odd", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "d.jsonl"}}},
    **{"test_split": "test"},
    **{"doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}", "target_delimiter": ""},
    **{"output_type": "generate_until", "generation_kwargs": {"until": [], "max_new_tokens": 4, "block_length": 4}},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip
RECORD = {"prompt": "one two", "answer": " three", "candidates": [" three", " four"]}
CHOICES = {"output_type": "multiple_choice", "doc_to_choice": "{{candidates}}", "metric_list": [{"metric": "acc"}]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"", "must hold lines of `key: value`"),
        (b"- a", "must hold lines of `key: value`"),
        (b"[" * 100_000, "nests more than 100 levels"),
        (b"task: [", "is no task file"),
        (b"task: a\ntask: !!python/object/apply:os.system ['true']", "is no task file"),
        (b"task:", "task is 'None', which is no name"),
        (b"task: 3", "task is '3', which is no name"),
        (b"task: [a]", r"task is \"\['a'\]\", which is no name"),
        (b'task: "a\\0b"', "which is no name"),
        (b'task: " "', "which is no name"),
        (b"group: [a]\ntask: [b]", "group is .* which is no name"),
        (b"task: a\ninclude: nowhere.yaml", "includes 'nowhere.yaml', which is no file"),
        (b"task: a\ninclude: 3", "includes '3', which is no file"),
        (b"dataset_path: json", "names no task: a file must have a line `task: NAME`"),
    ],
)
def test_a_file_that_is_no_task_is_named(tmp_path, content, says):
    (tmp_path / "a.yaml").write_bytes(content)
    for place in (tmp_path, tmp_path / "a.yaml"):
        with pytest.raises(IlladaError, match=says) as error:
            task_manager(str(place))
        assert "\n" not in str(error.value)


def test_one_damaged_file_among_others_is_not_left_out_in_silence(tmp_path):
    (tmp_path / "good.yaml").write_text("task: good\nx: &a [1]\ny: *a\nz: !function utils.f\n")
    (tmp_path / "damaged.yaml").write_text("task: {")
    with pytest.raises(IlladaError, match=r"damaged\.yaml is no task file"):
        task_manager(str(tmp_path))
    file = str(tmp_path / "good.yaml")
    assert names_in(task_manager(file), file) == ["good"]


@pytest.fixture
def says(model_folder, tmp_path, capsys):
    """Evaluate a task of one document; return the one line of its refusal. There must be no result."""

    def run(changes, *words, records=(RECORD,)):
        folder = tmp_path / "task"
        folder.mkdir(exist_ok=True)
        (folder / "task.yaml").write_text(changes if isinstance(changes, str) else yaml.safe_dump(TASK | changes))
        (folder / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        options = ["--model", str(model_folder), "--device", "cpu", "--task_files", str(folder)]
        with pytest.raises(SystemExit) as stop:
            cli.main(["eval", *options, "--output", str(tmp_path / "out"), *words])
        assert stop.value.code == 2
        assert {path.name for path in (tmp_path / "out").glob("*")} <= {"requests.0.jsonl"}  # answers are kept
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("illada: error: ")]
        return line

    return run


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"doc_to_text": "{{nowhere}}"}, "check its file and its data: UndefinedError"),
        ({"doc_to_text": "{% for %}"}, "TemplateSyntaxError"),
        ({"doc_to_target": "{{ 1/0 }}"}, "ZeroDivisionError"),
        ({"repeats": "x"}, "TypeError"),
        ({"repeats": 10**30}, "OverflowError"),
        ({"num_fewshot": 1.5}, "ValueError: Sample larger"),
        ({"output_type": "nothing"}, "cannot be loaded, check its file and its data"),
        ({"filter_list": [{"name": "x", "filter": [{"function": "regex", "regex_pattern": "("}]}]}, "check its file"),
        ({"metric_list": [{"metric": "exact_match", "aggregation": "nothing"}]}, "check its file"),
        (CHOICES | {"doc_to_choice": "{{nowhere}}"}, "UndefinedError"),
        ("group: all\ntask: []\n", "all holds no task"),
        ({"generation_kwargs": {"until": 3}}, "until is '3': it must be text or a list of text"),
        ({"generation_kwargs": {"max_gen_toks": "many"}}, "max_new_tokens is 'many': it must be a whole number"),
    ],
)
def test_what_a_task_makes_the_harness_trip_over_is_one_line(says, changes, line):
    assert line in says(changes)


def test_a_text_that_is_a_list(says):
    kind = {"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "bits_per_byte"}]}
    line = says(kind, records=[RECORD | {"answer": [1]}])
    assert "task odd, document 0: '[1]' is no text: check the task's file and its data" in line


def test_more_shots_than_documents(says):
    assert "task odd cannot be evaluated" in says({}, "--shots", "5")


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("shots", "-1", "--shots is -1: it must be at least 0"),
        ("samples", "0", "--samples is 0: it must be at least 1"),
        ("samples", "9" * 30, "and below 2^31"),
        ("limit", "9" * 30, "and below 2^63"),
        ("max_batch_tokens", "0", "--max_batch_tokens is 0"),
        ("shots_seed", "-1", "--shots_seed is -1"),
        ("seed", "", "seed is '': it must be a whole number"),
        ("local_data", "", "--local_data is empty"),
        ("task_files", " ", "--task_files is empty"),
        ("output", "", "--output is empty"),
        ("settings.block_length", "x", "block_length is 'x': it must be a whole number"),
        ("settings.block_length", "true", "block_length is 'True': it must be a whole number"),
        ("settings.threshold", "x", "threshold is 'x': it must be a number or null"),
        ("settings.logit_bias", "{a: 1}", "it must be an object of numbers by token id or null"),
        ("settings.remasking", "x", "it must be low_confidence or margin or random"),
        ("settings.do_sample", "x", "do_sample is 'x': it must be true or false or null"),
    ],
)
def test_values_out_of_range(says, name, value, line):
    assert line in says({}, f"--{name}={value}")


def test_settings_keep_their_types(model_folder):
    lm = IlladaLM(str(model_folder), device="cpu", threshold=1)
    found = lm.settings_of({"temperature": 1, "logit_bias": {5: 1}, "until": "x", "max_gen_toks": 7, "top_k": None})
    assert (found.temperature, found.logit_bias, found.stop, found.max_new_tokens) == (1, {5: 1}, ("x",), 7)
    with pytest.raises(IlladaError, match="threshold is 'x'"):
        IlladaLM(str(model_folder), device="cpu", threshold="x")


ENTRY = {"key": "a", "value": [1.0, True], "forwards": 1, "seconds": 0.5}


@pytest.mark.parametrize(
    "change",
    [
        *({"value": value} for value in ([], {}, [None], [[1]], ["x", "y"], [True])),
        *({"forwards": value} for value in (None, -1, 1.5, "1", True)),
        *({"seconds": value} for value in (None, -1, "x")),
        {"key": 3},
    ],
)
def test_a_journal_of_other_types_is_named(tmp_path, change):
    (tmp_path / "requests.0.jsonl").write_text(json.dumps([ENTRY | change]) + "\n")
    with pytest.raises(IlladaError, match=re.escape("requests.0.jsonl line 1 is damaged")):
        Journal(tmp_path)
    (tmp_path / "requests.0.jsonl").write_text(json.dumps([ENTRY, ENTRY | {"key": "b", "value": ["text"]}]) + "\n")
    assert Journal(tmp_path).entries.keys() == {"a", "b"}


def test_samples_whose_numbers_are_none(tmp_path):
    good = {"doc_id": 0, "filter": "none", "metrics": ["acc"], "acc": 1.0}
    for name, lines in (("a", [good, good | {"doc_id": 1, "acc": float("nan")}]), ("b", [good, good | {"doc_id": 1}])):
        (tmp_path / name / "samples").mkdir(parents=True)
        (tmp_path / name / "samples/t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert differences(str(tmp_path / "a"), str(tmp_path / "b"))[0].documents == 1
    (tmp_path / "a/samples/t.jsonl").write_text(json.dumps(good | {"acc": 10**400}) + "\n")
    with pytest.raises(IlladaError, match="line 1 is no sample"):
        differences(str(tmp_path / "a"), str(tmp_path / "b"))


def test_options_are_checked_without_a_command_line():
    with pytest.raises(IlladaError, match="--model is empty"):
        EvalOptions("out", "", tasks=["x"])
