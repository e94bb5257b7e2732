"""Groups of processes as torchrun would start them, forked from one process that has imported everything already.

Run as a script it trains the recipes in a JSON file, {name: [processes, recipe]}, and prints one JSON object; used by
test_parallel.py, test_damage.py and post_training/test_preferences.py. A third entry names files of the run to cut
short before. Nothing may be computed before the forks: threads do not survive them.
"""

import hashlib
import json
import os
import signal
import socket
import sys
import traceback
from collections import defaultdict
from functools import partial
from pathlib import Path

import peft  # noqa: F401 - once, not in every process
import torch.distributed as dist

from illada.errors import IlladaError
from illada.post_training.distillation import DistillTrainer
from illada.post_training.options import (
    DistillRecipe,
    DistillSection,
    DpoRecipe,
    DpoSection,
    ProblemFiles,
    RlRecipe,
    RlSection,
)
from illada.post_training.preferences import PreferenceTrainer
from illada.post_training.reinforcement import RlTrainer
from illada.training import trainer
from illada.training.recipe import DataRecipe, LoraRecipe, ModelRecipe, ParallelRecipe, Recipe, TrainingRecipe


def group(world, action, said):
    """Act in `world` processes, given the rank; returns exit codes. The file `said` gets what all of them print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said.write_text("")
    pids = []
    for rank in range(world):
        if pid := os.fork():
            pids.append(pid)
            continue
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_PORT=str(port))
        os.environ.update(MASTER_ADDR="127.0.0.1")
        with said.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = 1
        try:
            action(rank)
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    codes, waiting = {}, set(pids)
    while waiting:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        waiting.discard(pid)
        if codes[pid] < 0 or codes[pid] == 1:  # as torchrun: one fails, and the others are killed
            for other in waiting:
                os.kill(other, signal.SIGKILL)
    return [codes[pid] for pid in pids]


POST_TRAINING = {
    "dpo": (DpoRecipe, DpoSection, PreferenceTrainer),
    "rl": (RlRecipe, RlSection, RlTrainer),
    "distill": (DistillRecipe, DistillSection, DistillTrainer),
}


def train_and_record(values, folder, rank):
    """Train, and write a hash of every segment that this process sees: ids, mask and weights, by step.

    Also how often weights were gathered, where there was something to gather.
    """
    noisy_batches, seen = trainer.noisy_batches, defaultdict(list)
    gather, gathers = dist.all_gather_single, []

    def count(*values, **words):
        gathers.append(1)
        return gather(*values, **words)

    dist.all_gather_single = count

    def look(plan, size, shards, seed, step, *rest, **words):
        for batch in noisy_batches(plan, size, shards, seed, step, *rest, **words):
            if batch.weight_T.any():
                columns = (batch.clean_T, batch.masked_T, batch.weight_T)
                for parts in zip(*(x.split(batch.packing.lengths) for x in columns), strict=True):
                    whole = b"".join(x.numpy().tobytes() for x in parts)
                    seen[step].append(hashlib.sha256(whole).hexdigest())
            yield batch

    trainer.noisy_batches = look
    kinds = {"model": ModelRecipe, "lora": LoraRecipe, "data": DataRecipe}
    kinds |= {"training": TrainingRecipe, "parallel": ParallelRecipe}
    title = next((name for name in POST_TRAINING if name in values), "train")
    recipe, section, kind = POST_TRAINING.get(title, (Recipe, None, None))
    if section is not None:
        kinds[title] = section
    if title in ("rl", "distill"):
        kinds["data"] = ProblemFiles
    parts = {name: kind(**values[name]) for name, kind in kinds.items()}
    try:
        trainer.train(recipe(output=values["output"], **parts), title, kind)
    except IlladaError as error:
        print(f"error: {error}")
        sys.exit(2)
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    (folder / "gathers.txt").write_text(str(len(gathers)))


def main():
    ends = {}
    for name, (world, values, *damaged) in json.loads(Path(sys.argv[1]).read_text()).items():
        for pattern in damaged:
            for file in Path(values["output"]).glob(pattern):
                file.write_bytes(file.read_bytes()[:-1])
        seen = Path(f"{values['output']}-{name}-seen")
        seen.mkdir()
        codes = group(world, partial(train_and_record, values, seen), seen / "said.txt")
        noise = defaultdict(list)
        for file in seen.glob("*.json"):
            for step, hashes in json.loads(file.read_text()).items():
                noise[step] += hashes
        # Batches are made ahead, some for steps that never come.
        metrics = Path(values["output"]) / "metrics.jsonl"
        trained = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        noise = {step: sorted(hashes) for step, hashes in noise.items() if int(step) < trained}
        ends[name] = {"codes": codes, "said": (seen / "said.txt").read_text(), "noise": noise}
        if (seen / "gathers.txt").exists():
            ends[name]["gathers"] = int((seen / "gathers.txt").read_text())
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
