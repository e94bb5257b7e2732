"""Start `illada pretrain` again and again on 1 or 2 processes and kill it; used by test_killed.py.

    python tests/training/kill_runs.py --kills 20 --worlds 1 2 1

Every process is forked before any computation, so torch is imported once and every kill is a real one. Given a recipe
and a folder, it dies at chosen moments and prints one JSON object: how every start ended and what it said. Given a
number of kills, it makes its own data and dies at random moments (--seed), then compares weights with a whole run's:
bit for bit when --worlds is one number, otherwise to rounding.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import yaml
from groups import group
from safetensors.torch import load_file

from illada import cli
from illada.training import checkpoint
from illada.training.log import StepLog
from illada.weights import runs

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SETTINGS = {"steps": 400, "samples_per_step": 4, "samples_per_batch": 2, "learning_rate": 3e-3, "warmup_steps": 10}
SETTINGS |= {"dtype": "fp32", "device": "cpu", "checkpoint_every": 15, "keep_every": 60}


def at_step(step, number):
    """Send a signal to ourselves when the metrics of `step` are written."""
    write = StepLog.write

    def write_and_signal(self, done, **values):
        write(self, done, **values)
        if done == step:
            os.kill(os.getpid(), number)

    StepLog.write = write_and_signal


def in_the_shards(step):
    """Die in the middle of writing the shards of the checkpoint of `step`."""
    write = checkpoint.CheckpointWriter.write_data

    def die(self, *plans):
        if f"{step:08d}" in str(self.path):
            Path(self.path, "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, *plans)

    checkpoint.CheckpointWriter.write_data = die


def before_the_name(step):
    """Die when the checkpoint of `step` is written and before it gets its name."""
    write = checkpoint.write_json

    def die(path, values):
        write(path, values)
        if f"{step:08d}" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.write_json = die


def while_finishing():
    """Die when the finished model is half written."""
    runs.write_weights = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)


def start(world, words, folder, patch=lambda: None, on=0):
    """Run the command in `world` processes, process `on` with a patch."""

    def run(rank):
        if rank == on:
            patch()
        cli.main(words)

    codes = group(world, run, folder / "said.txt")
    return {"codes": codes, "said": (folder / "said.txt").read_text()}


def chosen(recipe, folder):
    """Return how the runs ended that test_killed.py asks about."""

    def run(name, *options):
        return ["pretrain", recipe, "--output", f"{folder}/{name}", *options]

    whole, killed, pair, mixed = (run(name) for name in ("whole", "killed", "pair", "mixed"))
    go = partial(start, folder=folder)
    return {
        "whole": go(1, whole),
        "killed at 4": go(1, killed, patch=lambda: at_step(4, signal.SIGKILL)),
        "killed in the shards of 14": go(1, killed, patch=lambda: in_the_shards(14)),
        "terminated at 17": go(1, killed, patch=lambda: at_step(17, signal.SIGTERM)),
        "interrupted at 23": go(1, killed, patch=lambda: at_step(23, signal.SIGINT)),
        "killed while finishing": go(1, killed, patch=while_finishing),
        "last": go(1, killed),
        "again": go(1, killed),
        "other recipe": go(1, [*killed, "--training.learning_rate", "1"]),
        "whole pair": go(2, run("whole pair")),
        "second of the pair killed in the shards of 14": go(2, pair, patch=lambda: in_the_shards(14), on=1),
        "second of the pair terminated": go(2, pair, patch=lambda: at_step(17, signal.SIGTERM), on=1),
        "last of the pair": go(2, pair),
        "1 killed at 16": go(1, mixed, patch=lambda: at_step(16, signal.SIGKILL)),
        "2 killed before the name of 21": go(2, mixed, patch=lambda: before_the_name(21)),
        "1 killed in the shards of 28": go(1, mixed, patch=lambda: in_the_shards(28)),
        "last of the mixed": go(2, mixed),
    }


def make_data(folder, _):
    """Prepare counting words; in a process of its own, as tokenizers start threads."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from conftest import write_data
    from illada.preparation.train_tokenizer import train_tokenizer

    words = ("one", "two", "three", "four", "five", "six", "seven")
    tokenizer = train_tokenizer([" ".join(words)] * 3, 280)
    lines = [" ".join(words[(first + n) % 7] for n in range(length)) for first in range(7) for length in range(3, 24)]
    write_data(folder / "data", [tokenizer.encode(line) for line in lines], tokenizer)


def at_random(kills, worlds, seed, folder):
    """Kill a run `kills` times at random moments, finish it, and compare it with one that was left alone."""
    recipe = {"model": {"preset": "1m", **SHAPE, "num_key_value_heads": 2}, "training": SETTINGS}
    recipe["data"] = {"train": str(folder / "data"), "window": 32}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    group(1, partial(make_data, folder), folder / "said.txt")
    words = ["pretrain", str(folder / "recipe.yaml"), "--output"]
    begun = time.monotonic()
    assert start(worlds[0], [*words, f"{folder}/whole"], folder)["codes"] == [0] * worlds[0]
    seconds, idle = time.monotonic() - begun, {}
    for world in set(worlds):  # how long it takes to find that nothing is left to do
        begun = time.monotonic()
        start(world, [*words, f"{folder}/whole"], folder)
        idle[world] = time.monotonic() - begun
    picks, done = random.Random(seed), 0
    while done < kills:
        world = worlds[done % len(worlds)]
        delay = picks.uniform(0, idle[world] + 3 * world * seconds / kills)
        victim = picks.randrange(world)

        def die(delay=delay):
            # As sudden as SIGKILL: no handler, no clean-up.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, delay)

        end = start(world, [*words, f"{folder}/killed"], folder, die, victim)
        done += 1
        seen = [int(path.name[5:]) for path in runs.checkpoints(folder / "killed")]
        print(
            f"{done:3d}: {world} process(es), {delay:5.2f} s, exit codes {end['codes']}, checkpoints {seen}", flush=True
        )
    end = start(worlds[0], [*words, f"{folder}/killed"], folder)
    assert end["codes"] == [0] * worlds[0], end
    a, b = (load_file(folder / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    worst = max(float((a[name] - b[name]).abs().max()) for name in a)
    print(f"largest difference of a weight: {worst:g}")
    if len(set(worlds)) == 1:
        assert all(torch.equal(a[name], b[name]) for name in a)
    else:
        assert worst < 1e-3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="with a folder: die at chosen moments")
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 1], help="processes, in turn")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.folder is not None:
        print(json.dumps(chosen(given.recipe, Path(given.folder))))
        return
    with tempfile.TemporaryDirectory() as folder:
        at_random(given.kills, given.worlds, given.seed, Path(folder))


if __name__ == "__main__":
    main()
