"""Does `illada estimate` tell the memory that training takes? Each shape trains a few steps in a fresh process, whose
peak of resident memory above what it held before the model was built is compared with the estimate, in markdown.

    OMP_NUM_THREADS=1 python benchmarks/estimate.py

"Measured" is with MALLOC_MMAP_THRESHOLD_=1048576, so that glibc gives freed tensors back to the system; "as it is" is
without, where the heap's holes come on top.
"""

import argparse
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from common import machine, status

from illada.data.batches import Batches
from illada.data.collate import noisy_batches
from illada.data.shards import Shards
from illada.diffusion.loss import masked_loss
from illada.model.transformer import IlladaForMaskedLM
from illada.preparation.shard_writer import ShardWriter, write_index
from illada.training.optional.estimate import _config, estimate
from illada.training.optional.options import EstimateOptions
from illada.training.parallel import recompute
from illada.training.recipe import DataRecipe, ModelRecipe, Recipe, TrainingRecipe

# preset, vocabulary, window, windows a step, windows a pass, type, checkpointing
SHAPES = {
    "1m, V 32k, 16 x 256, fp32": ("1m", 32_000, 256, 16, 16, "fp32", "none"),
    "5m, V 8k, 2 passes of 8 x 256, fp32": ("5m", 8_000, 256, 16, 8, "fp32", "none"),
    "5m, V 8k, 2 passes of 8 x 512, bf16": ("5m", 8_000, 512, 16, 8, "bf16", "none"),
    "15m, V 32k, 8 x 256, fp32": ("15m", 32_000, 256, 8, 8, "fp32", "none"),
    "15m, V 32k, 8 x 256, fp32, selective": ("15m", 32_000, 256, 8, 8, "fp32", "selective"),
    "15m, V 32k, 16 x 512, fp32, full": ("15m", 32_000, 512, 16, 16, "fp32", "full"),
    "50m, V 4k, 1 x 256, fp32": ("50m", 4_096, 256, 1, 1, "fp32", "none"),
}


def recipe_of(shape: str) -> Recipe:
    preset, _, window, step, batch, dtype, _ = SHAPES[shape]
    training = TrainingRecipe(steps=3, samples_per_step=step, samples_per_batch=batch, dtype=dtype)
    return Recipe(model=ModelRecipe(preset=preset), data=DataRecipe(window=window), training=training)


def measure(shape: str) -> int:
    """Train three steps and return the peak of memory above the start, in bytes."""
    recipe, vocabulary = recipe_of(shape), SHAPES[shape][1]
    settings = recipe.training
    with TemporaryDirectory() as folder:
        writer = ShardWriter(folder, vocabulary)
        writer.append(np.random.default_rng(0).integers(8, vocabulary, 200_000))
        write_index(folder, writer.finish(), vocab_size=vocabulary)
        shards = Shards.open(folder)
        batches = Batches(shards, recipe.data.window, settings.samples_per_step, 0, recipe.data.split_probability)
        # A little of everything first: what libraries set up once is no part of the estimate.
        train(
            IlladaForMaskedLM(_config(Recipe(model=ModelRecipe(preset="1m")), 64)), recipe, batches, shards, tiny=True
        )
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        model = IlladaForMaskedLM(_config(recipe, vocabulary))
        recompute(model, SHAPES[shape][-1])
        train(model, recipe, batches, shards)
        return status("VmHWM") - before


def train(model: IlladaForMaskedLM, recipe: Recipe, batches: Batches, shards: Shards, tiny: bool = False) -> None:
    settings = recipe.training
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()
    for step in range(1 if tiny else recipe.training.steps):
        plan = batches.plan(step)[: 1 if tiny else None]
        for batch in noisy_batches(plan, settings.samples_per_batch, shards, 0, step):
            clean, masked, weight = batch.on(torch.device("cpu"))
            with torch.autocast("cpu", torch.bfloat16) if settings.dtype == "bf16" else nullcontext():
                loss = masked_loss(model, clean % model.config.vocab_size, masked, weight, batch.packing)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, help="measure one here, print JSON")
    args = parser.parse_args()
    if args.shape:
        print(json.dumps(measure(args.shape)))
        return
    print(f"{machine()}\n")
    print("| shape | estimated (MB) | measured (MB) | estimated / measured | as it is (MB) |\n|---|---|---|---|---|")
    for shape in SHAPES:
        options = EstimateOptions(gpu="cpu", vocab_size=SHAPES[shape][1])
        guess = estimate(recipe_of(shape), options).memory[SHAPES[shape][-1]].peak
        words = [sys.executable, __file__, "--shape", shape]
        real, loose = (
            json.loads(subprocess.run(words, check=True, capture_output=True, env=os.environ | more).stdout)
            for more in ({"MALLOC_MMAP_THRESHOLD_": "1048576"}, {})
        )
        cells = f"{guess / 1e6:.0f} | {real / 1e6:.0f} | {guess / real:.2f} | {loose / 1e6:.0f}"
        print(f"| {shape} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
