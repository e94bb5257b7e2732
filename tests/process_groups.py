"""Runs in groups of processes, for the tests that compare one process with several."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

GROUPS = (str(Path(__file__).parent / "training" / "groups.py"),)


def run_groups(folder, runs, program=GROUPS):
    """Train recipes, {name: (processes, recipe)}, each in a folder of its name; returns how they ended."""
    values = {}
    for name, (processes, recipe) in runs.items():
        recipe.output = str(folder / name)
        values[name] = (processes, dataclasses.asdict(recipe))
    (folder / "runs.json").write_text(json.dumps(values))
    words = [sys.executable, *program, folder / "runs.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
