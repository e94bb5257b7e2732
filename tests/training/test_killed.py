"""The real command, really killed: see kill_runs.py for the kills."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from illada.training.report import read_metrics


def test_a_killed_run_ends_in_the_same_weights(make_recipe, tmp_path):
    written = dataclasses.asdict(make_recipe(validation="held_out"))
    del written["output"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(written))
    script = Path(__file__).with_name("kill_runs.py")
    done = subprocess.run([sys.executable, script, recipe, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout)

    codes = {name: end["code"] for name, end in ends.items()}
    assert codes == {
        "whole": 0,
        "killed at 4": -9,
        "killed in checkpoint 14": -9,
        "terminated at 17": 143,
        "interrupted at 23": 130,
        "killed while finishing": -9,
        "last": 0,
        "again": 0,
        "other recipe": 2,
    }, ends
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
    assert not any("Traceback" in text for text in said.values())

    for folder in ("model", "checkpoints/step-00000030"):
        for file in ("model.safetensors", "optimizer.safetensors")[: 1 if folder == "model" else 2]:
            a, b = (load_file(tmp_path / run / folder / file) for run in ("whole", "killed"))
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a), (folder, file)
    metrics = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("whole", "killed")]
    assert [record["step"] for record in metrics[1]] == list(range(1, 31))
    for a, b in zip(*metrics, strict=True):
        assert {**a, "tokens_per_second": 0} == {**b, "tokens_per_second": 0}
    left = [path.name for path in (tmp_path / "killed").rglob("*") if "partial" in path.name]
    assert left == []
