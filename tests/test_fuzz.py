"""Every JSON and YAML file that the program reads, damaged at random: only an `IlladaError` of one line may come out.

A file of the right form loses a field, gets one of another type, or is cut or overwritten somewhere. Hypothesis draws
the damage; `derandomize` makes every run the same.
"""

import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from illada import cli
from illada.bench.generation import _demo_problems
from illada.bench.options import BenchGenerateOptions
from illada.commands.scoring import read_items
from illada.data.shards import Shards
from illada.errors import IlladaError
from illada.evaluation.compare import differences
from illada.evaluation.journal import Journal
from illada.preparation.plan import read_plan
from illada.preparation.readers import Options, ReadStats, Unit, read_unit
from illada.text.prompts import read_prompts
from illada.training.optional.plots import draw_runs
from illada.training.recipe import Recipe
from illada.weights.adapters import adapter_base
from illada.weights.convert import _read_shape
from illada.weights.load import check_shards, complete_ids, load_config, load_tokenizer
from illada.weights.runs import read_metrics, read_recipe, read_state

bounded = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 10**9, 10**13, 10**30, -(10**30), 1.5, 1e308, float("nan"), float("inf")]),
    st.sampled_from(["", "x", "5", "\ud83d", "\0", "/", "../..", "é" * 300, "{{", "<|"]),
    st.recursive(
        st.integers() | st.text(max_size=3) | st.none(),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    ),
)


def places(value, path=()):
    """Yield the path of every value inside."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield (*path, key)
        yield from places(part, (*path, key))


@st.composite
def damaged(draw, value, dump=json.dumps):
    """Bytes of a file that should hold `value`."""
    whole = json.loads(json.dumps(value))
    kind = draw(st.sampled_from(["change", "change", "change", "drop", "cut", "bytes", "other", "deep"]))
    if kind == "other":
        whole = draw(ODD)
    elif kind == "deep":
        return draw(st.sampled_from(["[", '{"a":', "- "])).encode() * draw(st.sampled_from([10, 2000, 100_000]))
    elif kind in ("change", "drop"):
        *path, last = draw(st.sampled_from(list(places(whole))))
        inside = whole
        for key in path:
            inside = inside[key]
        if kind == "drop":
            del inside[last]
        else:
            inside[last] = draw(ODD)
    content = dump(whole).encode("utf-8", "surrogatepass")
    if kind == "cut":
        content = content[: draw(st.integers(0, len(content)))]
    elif kind == "bytes":
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.binary(min_size=1, max_size=4)) + content[at:]
    return content


def survives(read):
    """Read; the file may be good all the same."""
    said = "good"
    try:
        read()
    except IlladaError as error:
        said = str(error)
    assert said
    assert "\n" not in said


@pytest.fixture(scope="module")
def model(tmp_path_factory, write_tiny_model):
    folder = write_tiny_model(tmp_path_factory.mktemp("fuzz") / "model")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "base"}))
    return folder


def read_model(folder):
    config = load_config(folder)
    check_shards(folder)
    complete_ids(config, folder, load_tokenizer(folder))


INDEX_OF_WEIGHTS = {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": "model.safetensors"}}
LLAMA = {
    **{"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 1e4, "rms_norm_eps": 1e-5},
    **{"hidden_act": "silu", "tie_word_embeddings": True, "bos_token_id": 0, "rope_scaling": None, "eos_token_id": [2]},
}
OF_A_MODEL = {
    "config.json": (None, read_model),
    "generation_config.json": ({"eos_token_id": [2, 3], "bos_token_id": 0}, read_model),
    "tokenizer_config.json": (None, read_model),
    "model.safetensors.index.json": (INDEX_OF_WEIGHTS, check_shards),
    "adapter_config.json": (None, adapter_base),
}


@pytest.mark.parametrize("file", OF_A_MODEL)
@given(data=st.data())
@bounded
def test_model_folders(model, tmp_path_factory, file, data):
    right, read = OF_A_MODEL[file]
    right = json.loads((model / file).read_text()) if right is None else right
    folder = Path(shutil.copytree(model, tmp_path_factory.mktemp("copy") / "model"))
    (folder / file).write_bytes(data.draw(damaged(right)))
    survives(lambda: read(folder))


@given(data=st.data())
@bounded
def test_configurations_to_convert(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_bytes(data.draw(damaged(LLAMA)))
    survives(lambda: _read_shape(folder))


RECIPE = {
    "output": "run",
    "model": {"preset": "1m", "hidden_size": 64},
    "lora": {"rank": 0, "targets": ["q_proj"]},
    "data": {"train": {"a": 1.0, "b": 2}, "window": 32},
    "training": {"steps": 3, "learning_rate": 1e-3, "mask_range": [0.1, 0.9], "decay": "linear", "device": "cpu"},
    "log": {"wandb": None, "evaluate": "true"},
}


@given(data=st.data())
@settings(bounded, max_examples=20)
@pytest.mark.slow
def test_recipes(tmp_path, data):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(data.draw(damaged(RECIPE, dump=yaml.safe_dump)))

    def read():
        arguments = cli._parse(["pretrain", str(file)])[1]
        Recipe(**{field.name: arguments[field.name] for field in fields(Recipe)}).check()

    survives(read)


@pytest.mark.slow
@given(data=st.data())
@bounded
def test_indices_of_prepared_data(make_data, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("data") / "data"
    make_data(folder, [[1, 2, 3], [4, 5]])
    (folder / "index.json").write_bytes(data.draw(damaged(json.loads((folder / "index.json").read_text()))))
    survives(lambda: Shards.open(folder))


def test_a_whole_index_is_read(make_data, tmp_path):
    assert make_data(tmp_path / "data", [[1, 2, 3], [4, 5]]).tokens == 5


ENTRY = [{"key": "a", "value": [1.0, True], "forwards": 1, "seconds": 0.5}]
SAMPLE = {"doc_id": 3, "filter": "none", "metrics": ["acc"], "acc": 1.0}
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
LIKELIHOOD = {"step": 1, "tokens": 5, "models": {"run": {"bound": {"mean": 1.0, "standard_error": 0.1}}}}


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content + b"\n")
    return str(path)


def of_chats(folder, content, kind="chat"):
    file = write(folder, "chats.jsonl", content)
    list(read_unit(Unit(file, 0, Path(file).stat().st_size), Options(kind=kind), ReadStats()))


def of_preferences(folder, content):
    of_chats(folder, content, "preference")


def of_samples(folder, content):
    for run in ("a", "b"):
        write(folder, f"{run}/samples/task.jsonl", content)
    differences(str(folder / "a"), str(folder / "b"))


def of_demo(folder, content):
    write(folder, "demo.json", content)
    _demo_problems(None, BenchGenerateOptions(model=str(folder), limit=0))


def of_journal(folder, content):
    write(folder, "requests.0.jsonl", content)
    Journal(folder)


def of_plan(folder, content):
    write(folder, "work/plan.json", content)
    read_plan(folder)


def of_likelihood(folder, content):
    write(folder, "metrics.jsonl", b'{"step": 1, "bits_per_byte": 2.0, "tokens_per_second": 1.0}')
    write(folder, "likelihood.json", content)
    draw_runs([str(folder)])


def of_metrics(folder, content):
    read_metrics(Path(write(folder, "metrics.jsonl", content + b"\n" + content)))


STATE = {
    **{"step": 3, "updates": 2, "tokens": 96, "decay_start": 2, "validation_losses": [4.5], "loss_mean": 4.0},
    **{"loss_variance": 0.5, "skipped": 1, "returns": [1]},
}

FILES = {
    "state.json": (STATE, lambda f, c: read_state(Path(write(f, "state.json", c)).parent, 3)),
    "metrics.jsonl": ({"step": 1, "loss": 2.0, "loss_by_mask_ratio": [1.0]}, of_metrics),
    "recipe.yaml of a run": (RECIPE, lambda f, c: read_recipe(Path(write(f, "recipe.yaml", c)))),
    "questions.jsonl": (
        {"context": "a", "candidates": ["b", "c"], "answer": 1},
        lambda f, c: read_items(None, None, write(f, "q.jsonl", c)),
    ),
    "prompts.jsonl": ({"prompt": "a"}, lambda f, c: read_prompts(None, write(f, "p.jsonl", c))),
    "chats.jsonl": ({"messages": MESSAGES}, of_chats),
    "pairs.jsonl": ({"prompt": "a", "response": "b"}, of_chats),
    "preferences.jsonl": ({"prompt": "a", "chosen": "b", "rejected": MESSAGES[1:]}, of_preferences),
    "preferences without prompt.jsonl": ({"chosen": MESSAGES, "rejected": MESSAGES}, of_preferences),
    "samples of eval": (SAMPLE, of_samples),
    "journal of eval": (ENTRY, of_journal),
    "plan.json": ({"tasks": 1, "vocab_size": 5}, of_plan),
    "demo.json": ({"tasks": ["sorting"], "seed": 0}, of_demo),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # matplotlib's, about letters of damaged names, as on the command line
@given(content=damaged(LIKELIHOOD))
@settings(bounded, max_examples=20)
def test_likelihoods(tmp_path_factory, content):
    survives(lambda: of_likelihood(tmp_path_factory.mktemp("run"), content))


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
@bounded
def test_other_files(tmp_path_factory, monkeypatch, name, data):
    monkeypatch.setattr("illada.evaluation.compare.RESAMPLES", 10)
    right, read = FILES[name]
    folder = tmp_path_factory.mktemp("file")
    content = data.draw(damaged(right))
    survives(lambda: read(folder, content))
