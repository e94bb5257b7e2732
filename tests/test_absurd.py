"""Absurd calls and files from strangers: one clear line each, at once, and nothing left behind."""

import json
import shutil
from pathlib import Path

import pytest

from illada import cli
from illada.errors import IlladaError
from illada.evaluation.options import EvalOptions
from illada.files import parse_json
from illada.serving.middleware import warn_if_open
from illada.serving.options import ServerSettings
from illada.training.optional.trackers import WandB
from illada.training.recipe import ModelRecipe, Recipe, TrainingRecipe
from illada.weights.load import load_config, load_model

pytestmark = pytest.mark.slow

HALF, DEEP = "one \ud83d two", "[" * 5000 + "]" * 5000


@pytest.fixture(scope="module")
def model(tmp_path_factory, write_tiny_model):
    """A small model of ours, as a folder; read only."""
    return write_tiny_model(tmp_path_factory.mktemp("absurd") / "model")


@pytest.fixture
def copy(model, tmp_path):
    return Path(shutil.copytree(model, tmp_path / "copy"))


@pytest.fixture
def says(capsys, tmp_path, monkeypatch):
    """Run a command in an empty folder; return its one line. It must exit with 2 and leave nothing behind."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as end:
            cli.main([str(word) for word in words])
        said = capsys.readouterr()
        assert end.value.code == 2, said.err
        assert said.err.startswith("illada: error: ")
        assert said.err.count("\n") == 1
        assert len(said.err) < 1100
        assert sorted(tmp_path.rglob("*")) == before
        return said.err

    return run


# Words


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["generate", "--model", "m", "--prompt", HALF], "half of a surrogate pair"),
        (["generate", "--model", "m", "--prompt", "a\udcff"], "a byte that is not UTF-8"),
        (["estimate", "a\0b"], "a null character"),
        (["generate", "--model", "x" * 5000, "--prompt", "a"], "File name too long"),
        (["generate", "--model", "m", "--prompt", "a", "--stop", DEEP], "stop is '[[["),
        (["eval", "--model", "m", "--output", "o", "--tasks", "t", "--settings", DEEP], "settings"),
        (["eval", "--model", "m", "--output", "o", "--tasks", "t", "--limit", "0"], "--limit is 0"),
        (["eval", "--model", "m", "--output", "o", "--tasks", "t", "--limit", "-1"], "--limit is -1"),
        (["serve", "--model", "m", "--host", ""], "host is empty"),
        (["serve", "--model", "m", "--host", "é" * 70], "cannot listen on"),
        (["report", "run", "--output", "x.xyz"], "must end in .png, .svg, .pdf"),
        (["report", "run", "--output", "nowhere/x.png"], "there is no folder nowhere"),
        (["estimate", "--model.preset", "1m", "--training.steps", "1", "--model.num_hidden_layers", "100000",
          "--data.window", "64"], "num_hidden_layers is 100,000: it must be at most 1,000"),
        (["estimate", "--model.preset", "1m", "--training.steps", "1", "--data.window", "64",
          "--model.intermediate_size", str(10**17)], "parameters takes"),
        (["estimate", "--model.preset", "1m", "--training.steps", "1", "--data.window", "64",
          "--training.samples_per_batch", str(10**9), "--training.samples_per_step", str(10**9)], "more than a pass"),
    ],
)  # fmt: skip
def test_absurd_words(words, line, says):
    assert line in says(*words)


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b"[" * 100_000, "nests more than 100 levels"),
        (b"a: " * 5000, "not YAML"),
        (b"- " * 5000, "nests more than 100 levels"),
        (b"a: &a [*a]", "refers to *a: write the value itself"),
        (b"training: {steps: " + b"9" * 5000 + b"}", "not YAML"),
        (b'output: "a\\0b"', "a null character"),
        (b'model: {start: "\\ud83d"}', "not YAML"),
        (b"!!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_absurd_recipes(recipe, line, says, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(recipe)
    assert line in says("pretrain", "recipe.yaml", "--data.train", "d", "--training.steps", "1")


def test_what_a_person_types_is_no_alias():
    parsed = cli._parse(["chat", "--model", "m", "--system", "*smiles*"])[1]
    assert parsed.system == "*smiles*"


@pytest.mark.parametrize("line", ['{"prompt": "\\ud83d"}', '{"prompt": ' + DEEP + "}", "9" * 5000])
def test_absurd_prompts(line, says, tmp_path):
    (tmp_path / "p.jsonl").write_text(line + "\n")
    assert "line 1 is not" in says("generate", "--model", "m", "--file", "p.jsonl")


@pytest.mark.parametrize("line", ['{"context": "\\udc00", "candidates": ["a"]}', DEEP])
def test_absurd_questions(line, says, tmp_path):
    (tmp_path / "q.jsonl").write_text(line + "\n")
    assert "line 1 is not" in says("score", "--model", "m", "--file", "q.jsonl")


def test_words_that_only_the_model_shows_to_be_absurd(says, model):
    generate = ["generate", "--model", model, "--prompt", "one ___"]
    assert "slot_tokens is 1000000000000: it must be between" in says(*generate, "--slot_tokens", 10**12)
    assert "device meta cannot be used here" in says(*generate, "--device", "meta")


def test_a_library_that_gives_up_is_one_line(says, monkeypatch):
    class PanicException(BaseException):
        """As pyo3 has it."""

    def loads(error):
        def load(*_):
            raise error

        monkeypatch.setattr("illada.weights.load.load_model", load)
        return says("generate", "--model", "m", "--prompt", "a")

    assert "a library below gave up (index out of range)" in loads(PanicException("index out of range"))
    assert "not enough memory" in loads(MemoryError())
    assert "not enough memory" in loads(RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"))
    assert loads(OSError(28, "No space left on device")) == "illada: error: No space left on device\n"


def test_a_pair_of_surrogates_is_text():
    assert parse_json('"\\ud83d\\ude00"') == "😀"
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)


# Model folders


def change(folder, file="config.json", **values):
    path = folder / file
    held = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**held, **values}))


@pytest.mark.parametrize("name", ["num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size"])
@pytest.mark.parametrize("size", [10**9, 10**13])
def test_sizes_are_those_of_the_weights(copy, name, size):
    change(copy, **{name: size})
    with pytest.raises(IlladaError, match=rf"do not fit its config\.json|{name} is {size}|not a multiple|is odd"):
        load_model(str(copy))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("rope_theta", [None, "x", [], 0, -1.0, float("nan"), float("inf"), 10**30]),
        ("rms_norm_eps", [None, "x", {}, -1.0, float("inf")]),
        ("causal", [None, 0, [], "no"]),
        ("mask_token_id", [1.5, [], [1], "5", 10**12, True]),
        ("eos_token_id", [1.5, "x", [1.5], [[1]], {}]),
        ("num_attention_heads", [None, 0, 1.5, "4"]),
        ("num_hidden_layers", [True, None, -1, 10**30]),
        ("dtype", ["nn", "float8", 3]),
        ("model_type", [3, ["illada"], {}]),
        ("rope_parameters", [3, "x", {"rope_theta": "x"}]),
    ],
)
def test_values_are_checked_where_they_are_read(copy, name, values):
    for value in values:
        change(copy, **{name: value})
        with pytest.raises(IlladaError, match=rf"config\.json cannot be used: ({name}|rope_theta)") as caught:
            load_config(copy)
        assert "\n" not in str(caught.value)


def test_what_only_transformers_would_act_on_is_not_read(copy):
    change(copy, num_labels=10**9, id2label={"x": 1}, problem_type=3)
    load_config(copy)


@pytest.mark.parametrize("ids", ["x", [1.5], {"a": 1}, 10**12, True, [None]])
def test_ends_of_generation_are_ids(copy, ids):
    change(copy, "generation_config.json", eos_token_id=ids)
    with pytest.raises(IlladaError, match=r"generation_config\.json: eos_token_id"):
        load_model(str(copy))


def test_files_that_nest_too_deeply(copy):
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        whole = (copy / name).read_bytes()
        (copy / name).write_text("[" * 100_000)
        with pytest.raises(IlladaError):
            load_model(str(copy))
        (copy / name).write_bytes(whole)
    load_model(str(copy))


def test_a_tokenizer_that_makes_rust_panic(copy):
    change(copy, "tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    with pytest.raises(IlladaError, match="cannot load the tokenizer"):
        load_model(str(copy))


def test_a_tokenizer_with_an_id_beyond_the_embedding(copy):
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[next(reversed(vocabulary))] = 10**6
    change(copy, "tokenizer.json", model=tokenizer["model"])
    with pytest.raises(IlladaError, match=r"belongs to another model|cannot load"):
        load_model(str(copy))


# Servers and trackers


def test_an_open_address_without_keys_is_said_loudly(caplog):
    warn_if_open(ServerSettings(host="127.0.0.1"), [])
    warn_if_open(ServerSettings(host="0.0.0.0"), ["key"])
    assert not caplog.records
    warn_if_open(ServerSettings(host="0.0.0.0"), [])
    assert "NO API KEY: everybody who reaches 0.0.0.0" in caplog.text


def test_an_evaluation_of_no_documents_is_refused():
    for limit in (0, -1):
        with pytest.raises(IlladaError, match="at least 1"):
            EvalOptions(output="o", model="m", tasks=["t"], limit=limit)


def test_wandb_without_a_key_is_one_line(monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(IlladaError, match=r"No API key configured.*leave it out"):
        WandB(tmp_path, "project", {})


def test_a_network_that_memory_cannot_hold_is_refused_before_it_is_built(make_data, tiny_tokenizer, tmp_path):
    from illada.training.trainer import train

    make_data(tmp_path / "data", [[5] * 200], tiny_tokenizer)
    recipe = Recipe(
        output=str(tmp_path / "run"),
        model=ModelRecipe(preset="1m", hidden_size=2**20, intermediate_size=2**20),
        training=TrainingRecipe(steps=1, device="cpu"),
    )
    recipe.data.train, recipe.data.window = str(tmp_path / "data"), 32
    with pytest.raises(IlladaError, match=r"parameters takes .* GB, there are"):
        train(recipe, "pretrain")
    assert not (tmp_path / "run").exists()
