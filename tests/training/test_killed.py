"""The real command, really killed: see kill_runs.py for the kills, and for 20 of them at random moments."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_trainer import MACHINE

from illada.weights.runs import checkpoints, read_metrics

pytestmark = pytest.mark.slow

CODES = {
    "whole": [0],
    "killed at 4": [-9],
    "killed in the shards of 14": [-9],
    "terminated at 17": [143],
    "interrupted at 23": [130],
    "killed while finishing": [-9],
    "last": [0],
    "again": [0],
    "other recipe": [2],
    "whole pair": [0, 0],
    "second of the pair killed in the shards of 14": [-9, -9],
    "second of the pair terminated": [143, 143],
    "last of the pair": [0, 0],
    "1 killed at 16": [-9],
    "2 killed before the name of 21": [-9, -9],
    "1 killed in the shards of 28": [-9],
    "last of the mixed": [0, 0],
}


@pytest.fixture
def written(make_recipe, tmp_path):
    """A recipe file without an output."""
    values = dataclasses.asdict(make_recipe(validation="held_out"))
    del values["output"]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_a_killed_run_ends_in_the_same_weights(written, tmp_path):
    script = Path(__file__).with_name("kill_runs.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, script, written, tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout)
    # Beside a killed process another one is killed too, or finds that it is alone.
    codes = {name: [-9] * len(end["codes"]) if -9 in end["codes"] else end["codes"] for name, end in ends.items()}
    assert codes == CODES, ends
    said = {name: end["said"] for name, end in ends.items()}
    assert "stopped by SIGTERM; the same command continues from" in said["terminated at 17"]
    assert "checkpoints/step-00000017" in said["terminated at 17"]
    assert "stopped by SIGINT" in said["interrupted at 23"]
    assert "at step 7 of 30" in said["terminated at 17"]  # the half-written checkpoint of step 14 did not count
    assert "at step 17 of 30" in said["interrupted at 23"]
    assert "at step 23 of 30" in said["killed while finishing"]
    assert f"model written to {tmp_path}/killed/model" in said["last"]
    assert said["other recipe"].startswith("illada: error: ")
    assert "training.learning_rate" in said["other recipe"]
    assert said["other recipe"].count("\n") == 1
    assert not any("Traceback" in text for name, text in said.items() if -9 not in CODES[name])
    # Two processes: either both have a checkpoint or none has, whichever of them dies or is told to stop.
    assert "at step 7 of 30" in said["second of the pair terminated"]
    assert said["second of the pair terminated"].count("stopped by SIGTERM") == 1
    assert "at step 17 of 30" in said["last of the pair"] or "at step 18 of 30" in said["last of the pair"]
    # A checkpoint is complete when the next one is begun; how long before that is nobody's promise.
    assert any(f"at step {step} of 30" in said["2 killed before the name of 21"] for step in (7, 14))
    assert "at step 14 of 30" in said["1 killed in the shards of 28"]
    assert "at step 21 of 30" in said["last of the mixed"]

    def held(run):
        """Weights of the finished model, and all the last checkpoint holds."""
        found = {"model": load_file(tmp_path / run / "model" / "model.safetensors")}
        for file in checkpoints(tmp_path / run)[-1].glob("shard-*.safetensors"):
            found[file.name] = load_file(file)
        return found

    for whole, killed in (("whole", "killed"), ("whole pair", "pair")):
        a, b = held(whole), held(killed)
        assert {name: tensors.keys() for name, tensors in a.items()} == {n: tensors.keys() for n, tensors in b.items()}
        assert all(torch.equal(a[file][name], b[file][name]) for file in a for name in a[file]), killed
        metrics = [read_metrics(tmp_path / run / "metrics.jsonl") for run in (whole, killed)]
        assert [record["step"] for record in metrics[1]] == list(range(1, 31))
        for one, other in zip(*metrics, strict=True):
            assert {**one, **MACHINE} == {**other, **MACHINE}
    for run in ("pair", "mixed"):  # to the rounding of sums in another order
        a, b = held("whole")["model"], held(run)["model"]
        for name, value in a.items():
            torch.testing.assert_close(b[name], value, rtol=0, atol=2e-4, msg=f"{run}: {name}")
        assert [r["step"] for r in read_metrics(tmp_path / run / "metrics.jsonl")] == list(range(1, 31))
    left = [path for run in ("killed", "pair", "mixed") for path in (tmp_path / run).rglob("*partial*")]
    assert left == []


def test_torchrun_is_the_same_command(written, tmp_path):
    words = ["-m", "illada", "pretrain", written, "--output", tmp_path / "run", "--training.steps", "3"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"model written to {tmp_path}/run/model\nnext: ")
    assert done.stdout.count("model written to") == 1
    assert len(list((checkpoints(tmp_path / "run")[-1]).glob("shard-*"))) == 2
