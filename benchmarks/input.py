"""Does a training step wait for its tokens? Steps of a small model on shards of this disk, and on shards that are
streamed with a delay before every request, with batches made in the loop or ahead of it in a thread, in markdown.

    OMP_NUM_THREADS=1 python benchmarks/input.py
"""

import argparse
import os
import time
from collections.abc import Iterator
from tempfile import TemporaryDirectory

import fsspec
import numpy as np
import torch
from common import machine
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

from illada.data.batches import Batches
from illada.data.collate import Batch, noisy_batches
from illada.data.prefetch import Prefetch
from illada.data.shards import Shards
from illada.diffusion.loss import masked_loss
from illada.model.config import IlladaConfig
from illada.model.transformer import IlladaForMaskedLM
from illada.preparation.shard_writer import ShardWriter, write_index

VOCABULARY, WINDOW, STEP, PASS = 8192, 256, 16, 8


DELAY = 0.05  # seconds of a request to an object store


def answer_late(self, *args, **keywords):
    time.sleep(DELAY)
    return AbstractFileSystem.cat_ranges(self, *args, **keywords)


def steps(shards: Shards, count: int, ahead: bool) -> tuple[float, float]:
    """Train and return (seconds, seconds waited for batches), without the first step."""
    model = IlladaForMaskedLM(IlladaConfig.preset("5m", vocab_size=VOCABULARY)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batches = Batches(shards, WINDOW, STEP, seed=0)
    waited = 0.0

    def make(step: int) -> Iterator[Batch]:
        return noisy_batches(batches.plan(step), PASS, shards, 0, step)

    def in_the_loop(step: int) -> Iterator[Batch]:
        nonlocal waited
        items = make(step)
        while True:
            begun = time.perf_counter()
            batch = next(items, None)
            waited += time.perf_counter() - begun if step else 0.0
            if batch is None:
                return
            yield batch

    with Prefetch(make) as beside:
        for step in range(count):
            if step == 1:
                begun = time.perf_counter()
            for batch in beside(step) if ahead else in_the_loop(step):
                masked_loss(model, *batch.on(torch.device("cpu")), batch.packing).backward()
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - begun, beside.waited if ahead else waited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=11)
    args = parser.parse_args()
    MemoryFileSystem.cat_ranges = answer_late
    with TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        writer = ShardWriter(f"{folder}/data", VOCABULARY)
        writer.append(np.random.default_rng(0).integers(8, VOCABULARY, 2_000_000))
        write_index(f"{folder}/data", writer.finish(), vocab_size=VOCABULARY)
        fsspec.filesystem("memory").put(f"{folder}/data", "/data", recursive=True)
        print(f"{machine()}, 5m, {STEP} windows of {WINDOW} a step\n")
        print("| shards | batches | seconds a step | of it waiting |\n|---|---|---|---|")
        for name, place in (
            ("disk", f"{folder}/data"),
            (f"streamed, {DELAY * 1e3:.0f} ms a request", "memory://data"),
        ):
            for ahead in (False, True):
                seconds, waited = steps(Shards.open(place), args.steps, ahead)
                way = "ahead" if ahead else "in the loop"
                print(f"| {name} | {way} | {seconds / (args.steps - 1):.3f} | {waited / seconds:.2%} |", flush=True)


if __name__ == "__main__":
    main()
