"""One run on 1, 2 and 4 processes: the same noise, the same losses to rounding, the same files at the end."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from illada.diffusion.noisy import noisy_batches
from illada.training import train
from illada.training.report import read_metrics

PRETRAIN = {
    "1 process": (1, "pretrain"),
    "1 process, 4 passes": (1, "pretrain", "--training.samples_per_batch", "1"),
    "2 processes": (2, "pretrain"),
    "2 processes, 2 passes": (2, "pretrain", "--training.samples_per_batch", "1"),
    "4 processes": (4, "pretrain"),
    "4 processes, 2 copies, recomputing, 2 passes": (
        *(4, "pretrain", "--parallel.replicate", "2", "--parallel.recompute", "selective"),
        *("--training.samples_per_step", "8", "--training.samples_per_batch", "1"),
    ),
    "8 windows, 1 process": (1, "pretrain", "--training.samples_per_step", "8"),
    "5 windows, 1 process": (1, "pretrain", "--training.samples_per_step", "5"),
    "5 windows, 2 processes": (2, "pretrain", "--training.samples_per_step", "5", "--training.samples_per_batch", "1"),
    "5 windows, 4 processes": (4, "pretrain", "--training.samples_per_step", "5"),
    "muon, 1 process": (1, "pretrain", "--training.optimizer", "muon"),
    "muon, 2 processes": (2, "pretrain", "--training.optimizer", "muon"),
    "bf16, 1 process": (1, "pretrain", "--training.dtype", "bf16"),
    "bf16, 2 processes": (2, "pretrain", "--training.dtype", "bf16"),
    "bad": (2, "pretrain", "--data.train", "nowhere"),
    "bad copies": (2, "pretrain", "--parallel.replicate", "3"),
}
SAME = {
    "1 process, 4 passes": "1 process",
    "2 processes": "1 process",
    "2 processes, 2 passes": "1 process",
    "4 processes": "1 process",
    "4 processes, 2 copies, recomputing, 2 passes": "8 windows, 1 process",
    "5 windows, 2 processes": "5 windows, 1 process",
    "5 windows, 4 processes": "5 windows, 1 process",
    "muon, 2 processes": "muon, 1 process",
    "bf16, 2 processes": "bf16, 1 process",
}


def run_groups(recipe, folder, runs):
    written = dataclasses.asdict(recipe)
    del written["output"]
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(written))
    script = Path(__file__).with_name("groups.py")
    words = [sys.executable, script, file, folder, json.dumps(runs)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_same_run(folder, ends, name, other, loss=1e-5, weight=1e-5):
    assert ends[name]["noise"] == ends[other]["noise"], name
    mine, theirs = (read_metrics(folder / n / "metrics.jsonl") for n in (name, other))
    assert [r["step"] for r in mine] == [r["step"] for r in theirs]
    for key in ("loss", "gradient_norm", "validation_loss", "tokens", "learning_rate"):
        a, b = ([r.get(key) for r in records] for records in (mine, theirs))
        assert a == pytest.approx(b, rel=loss if key != "gradient_norm" else 10 * loss), (name, key)
    kind = "adapter/adapter_model" if (folder / name / "adapter").exists() else "model/model"
    a, b = (load_file(folder / n / f"{kind}.safetensors") for n in (name, other))
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=0, atol=weight, msg=f"{name}: {key}")


def test_any_number_of_processes_is_the_same_run(make_recipe, tmp_path):
    recipe = make_recipe(validation="held_out", steps=6, validate_every=3, validation_samples=5, samples_per_batch=4)
    recipe.training.learning_rate = 1e-3
    ends = run_groups(recipe, tmp_path, PRETRAIN)
    for name, end in ends.items():
        assert end["codes"] == [2 if "bad" in name else 0] * len(end["codes"]), (name, end["said"])
    for name, other in SAME.items():
        # Muon orthogonalises in bf16, where another order of sums shows.
        loose = name.startswith(("bf16", "muon"))
        assert_same_run(tmp_path, ends, name, other, *((3e-3, 1e-3) if loose else (1e-5, 2e-5)))
    assert len(ends["2 processes"]["noise"]) == 6
    assert ends["1 process"]["noise"] != ends["8 windows, 1 process"]["noise"]
    # One voice: that of the first process.
    said = ends["4 processes"]["said"]
    assert said.count("validation") == 2
    assert said.count("model written to") == 1
    assert ends["bad"]["said"] == "illada: error: no prepared data at nowhere: make it with `illada prepare`\n"
    assert ends["bad copies"]["said"].startswith("illada: error: parallel.replicate is 3: it must divide")
    assert ends["bad copies"]["said"].count("\n") == 1
    assert not (tmp_path / "bad copies").exists()
    shards = list((tmp_path / "4 processes" / "checkpoints" / "step-00000006").glob("shard-*.safetensors"))
    assert len(shards) == 4


@pytest.mark.parametrize("rule", ["illada", "llada"])
def test_tuning_is_the_same_run_too(make_recipe, tmp_path, rule):
    base = train(make_recipe("base", steps=2)).model
    recipe = make_recipe("tuned", "chat", start=base, steps=4, rule=rule, samples_per_batch=4, learning_rate=1e-3)
    lora = ("--lora.rank", "2")
    runs = {
        "1 process": (1, "sft"),
        "2 processes, 2 passes": (2, "sft", "--training.samples_per_batch", "1"),
        "4 processes": (4, "sft"),
        "adapter, 1 process": (1, "sft", *lora),
        "adapter, 2 processes": (2, "sft", *lora),
    }
    ends = run_groups(recipe, tmp_path, runs)
    assert all(not any(end["codes"]) for end in ends.values()), ends
    for name in ("2 processes, 2 passes", "4 processes"):
        assert_same_run(tmp_path, ends, name, "1 process", 1e-5, 2e-5)
    assert_same_run(tmp_path, ends, "adapter, 2 processes", "adapter, 1 process", 1e-5, 2e-5)


def test_every_process_makes_the_same_number_of_passes(make_recipe, data):
    from illada.data.batches import Batches
    from illada.data.shards import Shards

    shards = Shards.open(data / "train")
    plan = Batches(shards, 32, 5, 0).plan(0)
    whole = sum(float((b.weight_T * b.masked_T).sum()) for b in noisy_batches(plan, 5, shards, 0, 0))
    for ranks in (1, 2, 3, 4, 7):
        parts = [list(noisy_batches(plan, 2, shards, 0, 0, rank=rank, ranks=ranks)) for rank in range(ranks)]
        assert len({len(part) for part in parts}) == 1
        found = sum(float((batch.weight_T * batch.masked_T).sum()) for part in parts for batch in part)
        assert found == pytest.approx(whole, rel=1e-6)
