"""The command line in this process: what it prints, and one clear line for everything that is wrong."""

import io
import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from illada import cli
from illada.commands.shown import SHOWN, TAKES_MODEL
from illada.errors import DivergedError
from illada.text.prompts import encode_plain
from illada.text.tokenizer import load_tokenizer
from illada.weights.runs import NOT_A_MODEL, read_metrics

TEXT = "one two three four five six seven\n"
SHAPE = ["--model.hidden_size", "32", "--model.intermediate_size", "48", "--model.num_hidden_layers", "2"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The road of a user, by commands: tokenizer, data, a model of two steps."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "text.txt").write_text(TEXT * 200)
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text("\n \n")
    tok, data = str(folder / "tok"), str(folder / "data")
    cli.main(["tokenizer", str(folder / "text.txt"), "--output", tok, "--vocab_size", "280"])
    cli.main(["prepare", str(folder / "text.txt"), "--tokenizer", tok, "--output", data])
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {"preset": "1m", "max_position_embeddings": 64},
                "data": {"train": data, "window": 32},
                "training": {
                    "steps": 9,
                    "samples_per_step": 2,
                    "device": "cpu",
                    "learning_rate": 0.001,
                    "warmup_steps": 1,
                },
            }
        )
    )
    recipe, run = str(folder / "recipe.yaml"), str(folder / "run")
    cli.main(["pretrain", recipe, *SHAPE, "--training.steps", "2", "--training.decay_steps=1", "--output", run])
    return SimpleNamespace(folder=folder, tok=tok, data=data, recipe=recipe, run=run, text=str(folder / "text.txt"))


@pytest.fixture
def fails(capsys):
    """Run a command that must fail; return its one line."""

    def run(*words, code=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main(list(words))
        said = capsys.readouterr()
        assert end.value.code == code, said.err
        assert said.out == ""
        assert said.err.startswith("illada: error: ")
        assert said.err.count("\n") == 1
        assert len(said.err) < 500
        return said.err

    return run


@pytest.mark.parametrize(
    "command", ["", "demo", "tokenizer", "prepare", "pretrain", "sft", "generate", "chat", "score", "export", "convert"]
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([*command.split(), "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: illada")
    assert "ArgumentParser" not in said


def said_by(capsys, *words):
    with pytest.raises(SystemExit) as end:
        cli.main(list(words))
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("command", SHOWN)
def test_help_shows_what_matters_first_and_all_on_request(command, capsys):
    short, full = said_by(capsys, command, "--help"), said_by(capsys, command, "--help_all")
    assert full == said_by(capsys, command, "--help-all")
    assert short.count("\n") <= 80
    options = re.compile(r"^  (--[\w.]+)", flags=re.MULTILINE)
    shown, known = set(options.findall(short)), set(options.findall(full))
    positional = {"sources"} if command == "prepare" else set()
    assert shown == {f"--{name}" for name in SHOWN[command].split() if name not in positional}
    assert shown < known
    assert f"illada {command} --help_all" in short
    assert short.startswith(f"usage: illada {command} ")


def test_print_config_prints_a_recipe_that_is_read(work, capsys, tmp_path):
    printed = said_by(capsys, "pretrain", work.recipe, "--training.steps", "3", "--print_config")
    (tmp_path / "whole.yaml").write_text(printed)
    assert yaml.safe_load(printed)["training"]["steps"] == 3
    assert said_by(capsys, "pretrain", str(tmp_path / "whole.yaml"), "--print_config") == printed


def test_hyphens_are_underscores(work, capsys):
    words = ["generate", work.run, "--prompt", "a-b", "--json"]
    cli.main([*words, "--max-new-tokens", "8", "--block-length=4"])
    hyphens = capsys.readouterr().out
    cli.main([*words, "--max_new_tokens", "8", "--block_length=4"])
    assert capsys.readouterr().out == hyphens
    assert json.loads(hyphens)["prompt"] == "a-b"


@pytest.mark.slow
def test_the_model_may_come_first(work, fails, capsys):
    for command in TAKES_MODEL:
        assert "the model is given twice: as m and as --model" in fails(command, "m", "--model", "other")
    assert "no model at missing" in fails("chat", "missing")
    assert "no model at missing" in fails("serve", "missing")
    assert "no model at missing" in fails("export", "missing", "--output", "o")
    cli.main(["score", work.run, "--context", "one two", "--candidates", " three"])
    first = capsys.readouterr().out
    cli.main(["score", "--model", work.run, "--context", "one two", "--candidates", " three"])
    assert capsys.readouterr().out == first


@pytest.mark.slow
def test_a_shell_completes_commands_options_and_values(capsys, tmp_path):
    pytest.importorskip("shtab")
    for shell in ("zsh", "fish"):
        cli.main(["completion", shell])
        assert "--training.samples_per_step" in capsys.readouterr().out.replace("\\", "")
    cli.main(["completion", "bash"])
    (tmp_path / "script").write_text(capsys.readouterr().out)
    cases = {
        "pretrain --training.spike": "--training.spike_deviations",
        "pretrain --training.decay,": "cosine linear",
        "bench ge": "generate",
        "compl": "completion",
        "generate --chat,": "true false",
    }
    for typed, wanted in cases.items():
        words = ["illada", *typed.replace(",", " ,").split()]
        line = " ".join(f"'{word}'" for word in words).replace("','", "''")
        script = f"source {tmp_path}/script; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
        done = subprocess.run(
            ["bash", "-c", script + '_shtab_illada; echo "${COMPREPLY[@]}"'], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == wanted, typed


def test_the_doctor_says_what_is_here(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    real = metadata.version
    versions = {"peft": "0.1", "torch": "2.99.0"}

    def version(name):
        if name == "matplotlib":
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)
    cli.main(["doctor"])
    said = capsys.readouterr().out
    lines = {line[2:20].strip(): line[20:].strip() for line in said.splitlines()}
    assert lines["torch"] == "2.99.0"
    assert "matplotlib missing" in lines["report"]
    assert lines["report"].endswith("pip install 'illada[report]'")
    assert re.fullmatch(r"peft 0.1, but >=0.\d+ is needed: pip install 'illada\[tune\]'", lines["tune"])
    assert lines["HF_HUB_OFFLINE"] == "1"
    assert lines["device"]
    assert "dev" not in lines


def test_no_command_is_a_call_for_help(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == 0
    assert "pretrain" in capsys.readouterr().out


def test_a_recipe_file_and_overrides_make_the_run(work):
    written = yaml.safe_load((Path(work.run) / "recipe.yaml").read_text())
    assert written["training"]["steps"] == 2  # the command line wins
    assert written["training"]["decay_steps"] == 1
    assert written["training"]["learning_rate"] == 0.001  # the file wins over the default
    assert written["training"]["decay"] == "cosine"
    assert written["model"]["hidden_size"] == 32
    assert written["model"]["max_position_embeddings"] == 64
    assert [record["step"] for record in read_metrics(Path(work.run) / "metrics.jsonl")] == [1, 2]
    assert (Path(work.run) / "model" / "config.json").is_file()


def test_sft_has_its_own_defaults(work, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "illada.training.trainer.train",
        lambda recipe, title, *_: seen.update({title: recipe}) or SimpleNamespace(interrupted=None, model="x"),
    )
    words = ["--output", "x", "--data.train", "d", "--model.preset", "1m", "--training.samples_per_batch=3"]
    cli.main(["sft", *words])
    cli.main(["pretrain", *words, "--training.steps", "9"])
    sft, pretrain = seen["sft"].training, seen["pretrain"].training
    assert (sft.epochs, sft.learning_rate, sft.final_learning_rate, sft.decay) == (12.0, 5e-6, 5e-7, "linear")
    assert (pretrain.epochs, pretrain.learning_rate, pretrain.final_learning_rate) == (None, 2e-4, 5e-6)
    assert pretrain.decay == "cosine"
    assert sft.samples_per_batch == pretrain.samples_per_batch == 3


# What is wrong with the words themselves


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("nonsense", "no command 'nonsense': choose demo"),
        ("genrate", "no command 'genrate': did you mean generate?"),
        ("prepare", "missing: files or folders to read, --output, --tokenizer"),
        ("prepare a.txt --tokenizer t", "missing: --output"),
        ("generate", "missing: --model"),
        ("score --context a", "missing: --model"),
        ("export --model m", "missing: --output"),
        ("pretrain", "output is missing"),
        ("pretrain --output o", "data.train is missing"),
        ("pretrain --output o --data.train d", "model.preset"),
        ("pretrain --output o --data.train d --model.preset 1m", "training.steps or training.epochs"),
        ("pretrain --training.stepz 3", "unknown option --training.stepz: did you mean --training.steps?"),
        ("pretrain --training.steps many", "training.steps is 'many': it must be a whole number or null"),
        ("pretrain --training.steps 1.5", "training.steps is '1.5'"),
        ("pretrain --training.decay square", "training.decay is 'square': it must be cosine or linear"),
        ("pretrain --training.learning_rate fast", "training.learning_rate is 'fast': it must be a number"),
        ("pretrain --training.gradient_clip", "--training.gradient_clip needs a value"),
        ("pretrain --model 1m", "--model.KEY"),
        ("pretrain missing.yaml", "no recipe at"),
        ("generate --model m --prompt a --dtype fp64", "dtype is 'fp64': it must be auto or fp32 or bf16 or fp16"),
        ("generate --model m --prompt a --json maybe", "json is 'maybe': it must be true or false"),
        ("generate --model m --prompt a --stop x", "stop is 'x': it must be a list"),
        ("generate --model m --promt a", "unknown option --promt: did you mean --prompt?"),
        ("generate --model m --prompt a --block_length 0", "block_length must be at least 1"),
        ("generate --model m --prompt a --temperature -1", "temperature must be between 0 and 1e+06"),
        ("generate --model m --prompt a --threshold 2", "threshold must be above 0"),
        ("generate --model m --prompt a --steps_per_block 40", "steps_per_block must be between 1 and"),
        ("generate --model m", "give --prompt TEXT"),
        ("generate --model m --prompt a --file f", "give --prompt TEXT"),
        ("generate --model missing --prompt a", "no model at missing: the folder does not exist"),
        ("chat --model missing", "no model at missing"),
        ("score --model missing --context a --candidates b", "no model at missing"),
        ("score --model m", "give --context and --candidates"),
        ("score --model m --context a", "--candidates is missing"),
        ("score --model m --threshold 0.9", "only --method path looks at threshold"),
        ("score --model m --method path --threshold 0.9 --steps_per_block 2", "give one of them"),
        ("export --model missing --output o", "no model at missing"),
        ("tokenizer missing.txt --output o", "missing.txt"),
        ("prepare missing.txt --tokenizer t --output o", "missing.txt"),
        ("demo --seed x", "seed is 'x': it must be a whole number"),
        ("demo --fast", "unknown option --fast"),
    ],
)
def test_bad_words_are_one_clear_line(words, says, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in fails(*words.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("training:\n  stepz: 3\n", "unknown key training.stepz in the recipe: did you mean training.steps?"),
        ("trainin:\n  steps: 3\n", "unknown key trainin"),
        ("training:\n  steps: many\n", "training.steps is 'many'"),
        ("training: 3\n", "lines of `key: value`"),
        ("- 1\n", "lines of `key: value`"),
        ("", "lines of `key: value`"),
        (TEXT * 100, "lines of `key: value`"),
        ("model: [1\n", "not YAML: "),
        ("data:\n  window: 0\noutput: o\n", "data.train is missing"),
        ("data:\n  window: 0\n  train: d\nmodel: {preset: 1m}\ntraining: {steps: 1}\noutput: o\n", "data.window is 0"),
        ("data:\n  train: d\nmodel: {preset: 1m}\ntraining: {steps: 1}\noutput: o\n", "no prepared data at d"),
        ("model: {preset: 3m}\noutput: o\ntraining: {steps: 1}\ndata: {train: DATA}\n", "no preset '3m'"),
    ],
)
def test_a_bad_recipe_is_one_clear_line(recipe, says, fails, tmp_path, monkeypatch, work):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(recipe.replace("DATA", work.data))
    assert says in fails("pretrain", "recipe.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


# What is wrong with what the words point at


@pytest.mark.slow
def test_data_that_cannot_be_used(work, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["pretrain", work.recipe, *SHAPE, "--output", "run"]
    shards = sorted(Path(work.data).glob("*.tokens"))
    whole = shards[0].read_bytes()
    try:
        shards[0].write_bytes(whole[:-7])
        assert "bytes instead of" in fails(*command)
    finally:
        shards[0].write_bytes(whole)
    cli.main(["tokenizer", work.text, "--output", "tok", "--vocab_size", "270"])
    cli.main(["prepare", work.text, "--tokenizer", "tok", "--output", "other"])
    assert "another tokenizer" in fails(*command, "--data.validation", "other")
    start = ["sft", "--model.start", f"{work.run}/model", "--data.train", "other", "--data.window", "32"]
    assert "prepare it again with --tokenizer" in fails(*start, "--output", "run")
    assert "longer than the model's context" in fails(*command, "--data.window", "65")
    assert "less than one window" in fails(*command, "--data.window", "5000", "--model.max_position_embeddings", "5000")
    assert "device abacus" in fails(*command, "--training.device", "abacus")
    assert not Path("run").exists()
    Path("file").write_text("")
    assert "file/run: Not a directory" in fails(*command[:-1], "file/run")


@pytest.mark.slow
def test_prompts_that_cannot_be_used(work, fails):
    generate = ["generate", "--model", work.run]
    assert "is empty" in fails(*generate, "--file", str(work.folder / "empty.txt"))
    assert "is empty" in fails(*generate, "--file", str(work.folder / "blank.txt"))
    assert "no file" in fails(*generate, "--file", str(work.folder / "missing.txt"))
    assert "context is 64: shorten it" in fails(*generate, "--prompt", "one two three " * 40)
    assert "below one block" in fails(*generate, "--prompt", "one", "--max_new_tokens", "8", "--block_length", "16")
    assert "config.json" in fails("generate", "--model", work.tok, "--prompt", "one")
    assert "device abacus" in fails(*generate, "--prompt", "one", "--device", "abacus")
    (work.folder / "bad.jsonl").write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    assert "line 2" in fails(*generate, "--file", str(work.folder / "bad.jsonl"))
    (work.folder / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in fails(*generate, "--file", str(work.folder / "bytes.txt"))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"context": "a"}', "line 2"),
        ('{"context": "a", "candidates": "yes"}', "line 2"),
        ('{"context": "a", "candidates": []}', "no candidates"),
        ('{"context": "a", "candidates": ["b"], "answer": 1}', "answer 1 is not the index"),
        ("[1]", "line 2"),
        ("{", "line 2"),
    ],
)
def test_questions_that_cannot_be_used(work, fails, tmp_path, line, says):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"context": "a", "candidates": ["b"]}\n' + line + "\n")
    assert says in fails("score", "--model", work.run, "--file", str(file))


def test_candidates_and_samples_that_cannot_be_used(work, fails):
    score = ["score", "--model", work.run, "--context", "one"]
    assert "no tokens" in fails(*score, "--candidates", "")
    assert "samples must be at least 1" in fails(
        *score, "--candidates", "a b c", "--method", "likelihood", "--samples", "0"
    )


def test_a_run_that_diverged_exits_with_1(work, fails, tmp_path, monkeypatch):
    def diverge(*_):
        raise DivergedError("loss nan at step 3")

    monkeypatch.setattr("illada.training.trainer.train", diverge)
    assert "loss nan" in fails("pretrain", work.recipe, "--output", str(tmp_path / "run"), code=1)


@pytest.mark.slow
def test_a_loss_that_is_nan_exits_with_1(work, fails, tmp_path, monkeypatch, capsys):
    from illada.training import parallel

    monkeypatch.setattr(parallel, "masked_loss", lambda model, *_: model.lm_head.weight.sum() * float("nan"))
    line = fails("pretrain", work.recipe, *SHAPE, "--output", str(tmp_path / "run"), code=1)
    assert "no good checkpoint" in line


def test_an_error_of_ours_is_not_hidden(monkeypatch, work):
    monkeypatch.setattr("illada.weights.load.load_model", lambda *_: {}["a bug"])
    with pytest.raises(KeyError):
        cli.main(["generate", "--model", work.run, "--prompt", "one"])


# What works

GENERATE = ["--max_new_tokens", "8", "--block_length", "4"]


def test_generate(work, capsys):
    cli.main(["generate", "--model", work.run, "--prompt", "one two", *GENERATE, "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["prompt"] == "one two"
    assert record.keys() == {"prompt", "text", "ids", "finish_reason", "forwards", "positions", "forced", "log_probs"}
    assert record["forwards"] >= 4
    prompt_tokens = len(encode_plain(load_tokenizer(work.tok), "one two"))
    blocks = record["forwards"] // 4  # without a cache, each pass computes everything up to its block's end
    assert record["positions"] == sum(4 * (prompt_tokens + 4 * block) for block in range(1, blocks + 1))
    assert len(record["log_probs"]) == len(record["ids"])
    assert all(log_prob < 0 for log_prob in record["log_probs"])
    cli.main(["generate", "--model", f"{work.run}/model", "--prompt", "one two", *GENERATE])
    assert capsys.readouterr().out == record["text"] + "\n"
    cli.main(["generate", "--model", work.run, "--prompt", "three", "one two", *GENERATE, "--json", "true"])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["prompt"] for r in records] == ["three", "one two"]
    log_probs = [r.pop("log_probs") for r in (records[1], record)]
    assert records[1] == record  # company changes nothing
    assert log_probs[0] == pytest.approx(log_probs[1], abs=1e-5)


@pytest.mark.slow
def test_generate_says_what_a_plain_prompt_gets_wrong(work, capsys, tmp_path):
    def notes(model, *prompts, more=()):
        cli.main(["generate", str(model), "--prompt", *prompts, *GENERATE, *more])
        return capsys.readouterr().err

    assert notes(work.run, "one", "one\n") == ""
    assert "note: the space that ends 'one two ' belongs to the next word" in notes(work.run, "one", "one two ")
    assert notes(work.run, "one ", more=["--chat"]) == ""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "index.json").write_text('{"kind": "chat"}')
    shutil.copytree(work.run, tmp_path / "run")
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    recipe["data"]["train"] = str(tmp_path / "data")
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for model in (tmp_path / "run", tmp_path / "run" / "model"):
        assert f"note: {model} was tuned on conversations" in notes(model, "one")
        assert notes(model, "one", more=["--chat"]) == ""
    (tmp_path / "data" / "index.json").unlink()
    assert notes(tmp_path / "run", "one") == ""


def test_a_model_that_writes_nothing_says_why(work, capsys, tmp_path, monkeypatch):
    from illada.generation import engine

    nothing = engine.Generation([], "stop", 1, [], "")
    monkeypatch.setattr(engine, "generate", lambda *_, **__: [nothing])
    shutil.copytree(f"{work.run}/model", tmp_path / "start")
    cli.main(["generate", str(tmp_path / "start"), "--prompt", "one"])
    assert "nothing was written: the model ends at once" in capsys.readouterr().err
    (tmp_path / "start" / "README.md").write_text(f"**{NOT_A_MODEL}: its weights ...**")
    cli.main(["generate", str(tmp_path / "start"), "--prompt", "one"])
    assert (
        f"start was converted and not trained yet, it is no model before: illada pretrain --model.start {tmp_path}"
        in (capsys.readouterr().err)
    )


def test_generate_puts_prompts_into_the_chat_template(work, monkeypatch):
    from illada.generation import engine as module

    seen, real = [], module.generate
    monkeypatch.setattr(module, "generate", lambda model, ids, *a, **k: seen.append(ids) or real(model, ids, *a, **k))
    for more in ([], ["--chat"]):
        cli.main(["generate", "--model", work.run, "--prompt", "one two", *GENERATE, *more])
    plain, chat = seen[0][0], seen[1][0]
    assert plain[0] == chat[0] == 0
    assert 3 in chat  # <|user|>
    assert chat[-1] == 4  # <|assistant|>
    assert not {3, 4} & set(plain)


@pytest.mark.slow
def test_generate_fills_slots(work, fails, capsys):
    words = ["generate", "--model", work.run, "--prompt", "one ___ three ___", "___ two"]
    cli.main([*words, "--slot_tokens", "3", "--json"])
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["text"].startswith("one ")
    assert " three " in first["text"]
    assert second["text"].endswith(" two")
    assert (first["forwards"], second["forwards"]) == (6, 3)
    assert "there is no ___ to fill" in fails(*words, "none", "--slot_tokens", "3")
    assert "slot_tokens is 0" in fails(*words, "--slot_tokens", "0")
    assert "exclude each other" in fails(*words, "--slot_tokens", "3", "--chat")


def test_generate_from_files(work, capsys, tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    cli.main(["generate", "--model", work.run, "--file", str(tmp_path / "p.txt"), *GENERATE])
    plain = capsys.readouterr().out
    assert plain.startswith("> one\n")
    assert "\n> two\n" in plain
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two", "more": 1}\n')
    cli.main(["generate", "--model", work.run, "--file", str(tmp_path / "p.jsonl"), *GENERATE])
    assert capsys.readouterr().out == plain


@pytest.mark.slow
def test_generate_follows_its_settings(work, capsys):
    def forwards(*more):
        cli.main(["generate", "--model", work.run, "--prompt", "one", *GENERATE, "--json", *more])
        return json.loads(capsys.readouterr().out)

    assert forwards()["forwards"] % 4 == 0
    assert forwards("--steps_per_block", "1")["forwards"] <= 2
    assert forwards("--guidance_scale", "1.5", "--steps_per_block", "1")["forwards"] in (2, 4)
    hot = [forwards("--temperature", "5", "--seed", seed)["ids"] for seed in "112"]
    assert hot[0] == hot[1] != hot[2]


@pytest.mark.slow
def test_score(work, capsys, tmp_path):
    cli.main(["score", "--model", work.run, "--context", "one two", "--candidates", " three", " seven six"])
    record = json.loads(capsys.readouterr().out)
    scores = record["confidence"]["scores"]
    assert record["confidence"]["choice"] == record["candidates"][scores.index(max(scores))]
    assert all(score < 0 for score in scores)
    file = tmp_path / "questions.jsonl"
    question = {"context": "one two", "candidates": [" three", " seven six"]}
    best = scores.index(max(scores))
    file.write_text("".join(json.dumps({**question, "answer": a}) + "\n" for a in (best, 1 - best, best, best)))
    cli.main(["score", "--model", work.run, "--file", str(file), "--method", "both", "--samples", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["confidence"]["scores"] for line in lines[:4]] == [scores] * 4
    assert all(len(json.loads(line)["likelihood"]["scores"]) == 2 for line in lines[:4])
    assert lines[4] == "confidence: 3 of 4 right (75.0%)"
    assert lines[5].startswith("likelihood: ")
    assert len(lines) == 6
    words = ["score", "--model", work.run, "--context", "one two", "--candidates", " three", " seven six"]
    cli.main([*words, "--method", "path", "--steps_per_block", "1"])
    at_once = json.loads(capsys.readouterr().out)["path"]["scores"]
    cli.main([*words, "--method", "path", "--remasking", "margin"])
    one_by_one = json.loads(capsys.readouterr().out)["path"]["scores"]
    assert all(score < 0 for score in at_once + one_by_one)
    assert at_once != one_by_one
    cli.main(["score", "--model", work.run, "--context", "one two", "--candidates", " three", " seven six", "--chat"])
    assert json.loads(capsys.readouterr().out)["confidence"]["scores"] != scores


@pytest.mark.slow
def test_chat_reads_lines_until_they_end(work, capsys, monkeypatch):
    def talk(*lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        cli.main(["chat", "--model", work.run, *GENERATE])
        return capsys.readouterr().out

    first = talk("one two")
    assert first.endswith("\n")
    two = talk("one two", "/clear", "one two")
    assert two == first * 2  # forgotten in between
    assert talk("one two", "/quit", "three") == first
    assert talk("", "  ") == ""
    long = talk("one two three " * 60, "one two")
    assert "shorten" in long
    assert long.endswith(first)  # the message that did not fit is forgotten, the conversation goes on


def test_chat_knows_a_system_message(work, capsys, monkeypatch):
    seen = []
    from illada.commands import terminal as module

    real = module.encode_prompt
    monkeypatch.setattr(module, "encode_prompt", lambda tok, said: seen.append(list(said)) or real(tok, said))
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    cli.main(["chat", "--model", work.run, "--system", "count", *GENERATE])
    assert [[m["role"] for m in messages] for messages in seen] == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
    ]
    assert seen[1][3]["content"] == "two"
