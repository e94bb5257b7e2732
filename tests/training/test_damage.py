"""What happens to a run whose files were damaged while nobody looked."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from illada import cli
from illada.data.optional import checks
from illada.errors import DamagedError, IlladaError
from illada.folders import SUMS
from illada.training.log import StepLog
from illada.training.trainer import train
from illada.weights.export import export_model
from illada.weights.load import load_model
from illada.weights.runs import RunState, checkpoints, model_folder, read_metrics, read_state

SHARD = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture
def recipe(make_recipe):
    return make_recipe(steps=8, checkpoint_every=3)


def first_quick(cases):
    """Mark every case but the first slow: half a second each."""
    first, *others = cases
    return [first, *(pytest.param(case, marks=pytest.mark.slow) for case in others)]


def flip(path, place=-1000):
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(content)


def zeros(path):
    content = path.read_bytes()
    path.write_bytes(content[:-8192] + bytes(4096) + content[-4096:])


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def lose_moments(path):
    with safe_open(path, "pt") as opened:
        about = opened.metadata()
    save_file({k: v for k, v in load_file(path).items() if "layers.1" not in k}, path, about)


def state(**values):
    def change(checkpoint):
        path = checkpoint / "state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


DAMAGE = {
    "a bit": lambda c: flip(c / SHARD),
    "a block of zeros": lambda c: zeros(c / SHARD),
    "a cut shard": lambda c: cut(c / SHARD),
    "a missing shard": lambda c: (c / SHARD).unlink(),
    "lost moments": lambda c: lose_moments(c / SHARD),
    "the configuration": lambda c: flip(c / "about" / "config.json", 5),
    "half a state": lambda c: (c / "state.json").write_text('{"step": 8'),
    "the checksums": lambda c: (c / SUMS).write_bytes(b"\xff"),
}
STATES = {
    "a list": lambda c: (c / "state.json").write_text("[]"),
    "bytes": lambda c: (c / "state.json").write_bytes(b"\xff\xfe"),
    "a negative step": state(step=-1),
    "a step beyond the run": state(step=10**9),
    "a step that is no number": state(step="8"),
    "a step that is a fraction": state(step=7.5),
    "true": state(step=True),
    "no tokens": state(tokens=None),
    "null losses": state(validation_losses=[None]),
    "losses that are no list": state(validation_losses=3.5),
    "a mean that is null": state(loss_mean=None),
    "a return to a step that is none": state(returns=["x"]),
    "a decay beyond the run": state(decay_start=99),
    "an unknown key": state(stepp=3),
}


def check_that_it_goes_back(recipe, how, capsys):
    """Damage the newest checkpoint; the same command ends in the same weights, and nothing was deleted."""
    run = Path(recipe.output)
    train(recipe)
    want = load_file(run / "model" / "model.safetensors")
    newest = checkpoints(run)[-1]
    assert newest.name == "step-00000008"
    how(newest)
    damaged = {path.relative_to(newest): path.read_bytes() for path in newest.rglob("*") if path.is_file()}
    capsys.readouterr()
    train(recipe)
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if "is put aside" in line]
    assert line.startswith("checkpoint step-00000008 is put aside: ")
    assert f"continuing {run} at step 6 of 8" in said
    got = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(got[name], value) for name, value in want.items())
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == list(range(1, 9))
    aside = newest.with_name("damaged-1-step-00000008")
    assert {path.relative_to(aside): path.read_bytes() for path in aside.rglob("*") if path.is_file()} == damaged
    return line


@pytest.mark.parametrize("how", first_quick(DAMAGE))
def test_a_damaged_checkpoint_is_put_aside_and_the_run_ends_in_the_same_bits(recipe, capsys, how):
    check_that_it_goes_back(recipe, DAMAGE[how], capsys)


@pytest.mark.parametrize("how", STATES)
def test_a_state_that_no_run_writes_is_damage(tmp_path, how):
    """Whatever the checksums say, as those of older checkpoints, which have none."""
    (tmp_path / "state.json").write_text(json.dumps(dataclasses.asdict(RunState(step=8))))
    assert read_state(tmp_path, 8) == RunState(step=8)
    STATES[how](tmp_path)
    with pytest.raises(DamagedError, match=r"state\.json") as caught:
        read_state(tmp_path, 8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "how", first_quick(["a cut shard", "a missing shard", "lost moments", "a step beyond the run"])
)
def test_what_can_be_seen_without_checksums_is_seen(recipe, capsys, how):
    def damage(checkpoint):
        (checkpoint / SUMS).unlink()
        (DAMAGE | STATES)[how](checkpoint)

    check_that_it_goes_back(recipe, damage, capsys)


def test_a_checkpoint_of_an_older_version_is_continued(recipe):
    train(recipe)
    run = Path(recipe.output)
    shutil.rmtree(checkpoints(run)[-1])
    (checkpoints(run)[-1] / SUMS).unlink()
    train(recipe)
    assert [path.name for path in checkpoints(run)][-1] == "step-00000008"


def test_without_a_whole_checkpoint_the_run_says_so_and_touches_nothing(recipe):
    train(recipe)
    run = Path(recipe.output)
    for checkpoint in checkpoints(run):
        flip(checkpoint / SHARD)
    before = sorted(run.rglob("*"))
    for _ in range(2):
        with pytest.raises(IlladaError, match=r"no checkpoint in .* is whole: restore a copy"):
            train(recipe)
    assert sorted(run.rglob("*")) == before


def test_a_damaged_checkpoint_does_not_count_among_those_to_keep(make_recipe, capsys):
    """Else the newer name would make the run delete the checkpoint that it has just written."""
    recipe = make_recipe(steps=8, checkpoint_every=3, keep_checkpoints=2)
    train(recipe)
    run = Path(recipe.output)
    flip(checkpoints(run)[-1] / SHARD)
    recipe = dataclasses.replace(
        recipe, training=dataclasses.replace(recipe.training, checkpoint_every=7, keep_checkpoints=1)
    )
    train(recipe)
    assert [path.name for path in checkpoints(run)] == ["step-00000008"]
    flip(checkpoints(run)[-1] / SHARD)
    with pytest.raises(IlladaError, match="is whole"):
        train(recipe)


# What is made of a run


def test_a_damaged_checkpoint_is_neither_exported_nor_loaded(recipe, tmp_path):
    train(recipe)
    run = Path(recipe.output)
    shutil.rmtree(run / "model")
    flip(checkpoints(run)[-1] / SHARD)
    words = r"shard-00001.* is damaged.*; the newest whole checkpoint is .*step-00000006, which may be given"
    for use in (lambda: export_model(str(run), str(tmp_path / "out")), lambda: load_model(str(run), device="cpu")):
        with pytest.raises(DamagedError, match=words):
            use()
    assert not (tmp_path / "out").exists()
    with pytest.raises(DamagedError, match=r"written$"):
        model_folder(str(checkpoints(run)[-1]))
    export_model(str(checkpoints(run)[-2]), str(tmp_path / "out"))
    flip(checkpoints(run)[-2] / SHARD)
    shutil.rmtree(checkpoints(run)[-2] / "model")
    with pytest.raises(DamagedError, match="no other is whole"):
        model_folder(str(run))


def test_damaged_weights_are_not_loaded_but_texts_may_be_edited(recipe):
    model = train(recipe).model
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 128}))
    load_model(str(model), device="cpu")
    flip(model / "model.safetensors")
    with pytest.raises(DamagedError, match=r"model\.safetensors is damaged.*: write or fetch it again \(or delete"):
        load_model(recipe.output, device="cpu")
    (model / SUMS).unlink()
    load_model(str(model), device="cpu")


def test_a_disk_too_full_for_the_model_is_one_line_and_the_run_is_completed_later(recipe, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("illada.weights.runs.write_weights", full)
    with pytest.raises(IlladaError, match=r"no room for .*/model: the disk is full: free some"):
        train(recipe)
    assert not list(Path(recipe.output).glob("*model*"))
    monkeypatch.undo()
    assert train(recipe).model.is_dir()


# The other files of a run


@pytest.mark.parametrize("content", [b"\xff\xfe\0\0", b"a: [", b"- 1\n"])
def test_a_recipe_that_is_none_is_one_line(recipe, content):
    train(recipe)
    (Path(recipe.output) / "recipe.yaml").write_bytes(content)
    with pytest.raises(IlladaError, match=r"recipe.yaml is damaged \(.*\): restore it") as caught:
        train(recipe)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", [b"\xff\xfe", b'{"st', b"[]", b'{"loss": 1}'])
def test_a_damaged_line_among_the_metrics_is_named_and_none_is_lost(recipe, line):
    train(recipe)
    path = Path(recipe.output) / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], line, *lines[3:]]) + b"\n")
    before = path.read_bytes()
    with pytest.raises(IlladaError, match=r"metrics.jsonl is damaged: line 3 is no record of a step: delete"):
        train(recipe)
    assert path.read_bytes() == before


def test_a_tail_that_a_power_loss_left_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + bytes(4096))
    assert [record["step"] for record in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize("content", first_quick([b"\xff\xfe\0", b"9" * 5000, "٣".encode()]))
def test_whatever_stands_in_the_file_decay_begins_the_decay(make_recipe, content, capsys):
    recipe = make_recipe(steps=8, decay_steps=3)
    Path(recipe.output).mkdir()
    train(dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, steps=8)))
    shutil.rmtree(Path(recipe.output) / "checkpoints")
    (Path(recipe.output) / "DECAY").write_bytes(content)
    train(recipe)
    assert "decaying from step 0" in capsys.readouterr().err


# Data


@pytest.mark.parametrize(
    "file", ["shard-00000.tokens", "shard-00000.documents", "index.json", "tokenizer/tokenizer.json"]
)
def test_damaged_data_is_not_trained_on(make_recipe, data, tmp_path, file):
    for part in ("train", "held_out"):
        shutil.copytree(data / "train", tmp_path / "copy", dirs_exist_ok=True)
        recipe = make_recipe(validation="held_out", steps=2)
        where = {"train" if part == "train" else "validation": str(tmp_path / "copy")}
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **where))
        flip(tmp_path / "copy" / file, 40 if file != "index.json" else -3)
        with pytest.raises(IlladaError, match=r"damaged|cannot load the tokenizer") as caught:
            train(recipe)
        assert "\n" not in str(caught.value)
    assert not Path(recipe.output).exists()


def test_data_too_large_to_read_at_once_is_left_to_verify(make_recipe, data, monkeypatch, capsys):
    monkeypatch.setattr(checks, "READ_AT_ONCE", 10)
    train(make_recipe(steps=1))
    assert f"`illada verify {data / 'train'}` does" in capsys.readouterr().err


# Several processes


@pytest.mark.slow
def test_processes_go_back_together(make_recipe, tmp_path):
    """Whichever of them reads the damaged file, and however many wrote it."""
    recipe = {name: dataclasses.asdict(make_recipe(name, steps=8, checkpoint_every=3)) for name in ("a", "b", "c")}
    shard = "checkpoints/step-00000008/shard-0000{}*"
    starts = {
        "whole": [2, recipe["a"]],
        "first": [2, recipe["b"]],
        "second is damaged": [2, recipe["b"], shard.format(2)],
        "again": [2, recipe["c"]],
        "one continues": [1, recipe["c"], shard.format(1)],
        "none is whole": [2, recipe["c"], "checkpoints/step-*/shard-*"],
    }
    (tmp_path / "runs.json").write_text(json.dumps(starts))
    words = [sys.executable, Path(__file__).with_name("groups.py"), tmp_path / "runs.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout)
    codes = {name: [0] * world for name, (world, *_) in starts.items()} | {"none is whole": [2, 2]}
    assert {name: end["codes"] for name, end in ends.items()} == codes, ends
    for name in ("second is damaged", "one continues"):
        assert ends[name]["said"].count("is put aside") == 1
        assert "at step 6 of 8" in ends[name]["said"]
    assert ends["none is whole"]["said"].count("error: no checkpoint in") == 1
    a, b = (load_file(Path(recipe[name]["output"]) / "model" / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    newest = checkpoints(Path(recipe["b"]["output"]))[-1]
    assert {path.name for path in newest.glob("shard-*")} < set((newest / SUMS).read_text().split())


# The command


@pytest.mark.slow
def test_verify_says_what_is_whole(recipe, data, capsys):
    train(recipe)
    run = Path(recipe.output)
    capsys.readouterr()
    cli.main(["verify", str(run)])
    said = capsys.readouterr().out
    assert said.count("whole: ") == len(checkpoints(run)) + 1
    flip(run / "checkpoints" / "step-00000006" / SHARD)
    (run / "metrics.jsonl").write_bytes(b'\xff\n{"step": 1}\n')
    (run / "model" / SUMS).unlink()
    with pytest.raises(SystemExit) as end:
        cli.main(["verify", str(run)])
    said = capsys.readouterr()
    assert end.value.code == 2
    assert f"damaged: {run}/checkpoints/step-00000006\n    {run}/checkpoints/step-00000006/{SHARD} is dam" in said.out
    assert f"whole: {run}/checkpoints/step-00000008 (" in said.out
    assert f"no checksums: {run}/model (written by another program" in said.out
    assert "metrics.jsonl is damaged: line 1" in said.out
    assert said.err == f"illada: error: not as written in {run}: 2 files; restore from a copy\n"


@pytest.mark.slow
def test_verify_of_data_and_of_nothing(data, tmp_path, capsys):
    shutil.copytree(data / "train", tmp_path / "copy")
    cli.main(["verify", str(tmp_path / "copy")])
    assert capsys.readouterr().out.startswith(f"whole: {tmp_path}/copy (")
    flip(tmp_path / "copy" / "shard-00000.tokens", 4)
    (tmp_path / "empty").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "index.json").write_text("{}")
    words = {
        "copy": "copy: 1 file; restore",
        "empty": "there is nothing to check",
        "old": "has checksums",
        "gone": "no folder",
    }
    for name, text in words.items():
        with pytest.raises(SystemExit) as end:
            cli.main(["verify", str(tmp_path / name)])
        assert end.value.code == 2
        assert text in capsys.readouterr().err


@pytest.mark.slow
def test_a_picture_that_does_not_fit_is_one_line_that_names_it(recipe, monkeypatch, capsys, tmp_path):
    def full(_):
        raise OSError(28, "No space left on device")

    train(recipe)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as end:
        cli.main(["report", recipe.output, "--output", str(tmp_path / "picture.png")])
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith(f"illada: error: {tmp_path}/picture.png: No space left on device\n")
    assert not list(tmp_path.glob("picture*"))


def test_metrics_that_do_not_fit_are_named(recipe, monkeypatch):
    """The error comes when the line is written, and again when the file is closed."""
    begin = StepLog.rewind

    def into_a_full_disk(self, step):
        begin(self, step)
        self._file.close()
        self._file = open("/dev/full", "a")  # noqa: SIM115

    monkeypatch.setattr(StepLog, "rewind", into_a_full_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        train(recipe)
    assert caught.value.filename == f"{recipe.output}/metrics.jsonl"
