"""Does Muon help masked diffusion? AdamW everywhere against Muon for the matrices of the blocks, at equal steps.

    OMP_NUM_THREADS=1 python benchmarks/muon.py

One small model on the files of this Python's standard library; every seed changes weights, order and noise, and both
optimisers see the same of each. The bound on held-out files is measured on the same noise for all.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from pathlib import Path

from common import machine

from illada.preparation.options import PrepareSettings
from illada.preparation.prepare import prepare
from illada.preparation.train_tokenizer import train_tokenizer_from_files
from illada.toy_tasks import standard_library
from illada.training.recipe import DataRecipe, ModelRecipe, Recipe, TrainingRecipe
from illada.training.trainer import train
from illada.weights.runs import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    files = sorted(str(path) for path in standard_library().glob("*.py"))
    held_out, texts = files[::12], [file for number, file in enumerate(files) if number % 12]
    print(f"{machine()}; ", end="")
    print(f"preset 1m, V = 2048, {args.steps} steps of 16 windows of 128, {args.seeds} seeds\n")
    print("| optimiser | learning rate | bits per byte (mean ± deviation) | seconds a step |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name, open(os.devnull, "w") as nothing:
        folder = Path(name)
        with contextlib.redirect_stderr(nothing):
            train_tokenizer_from_files(texts[::4], 2048, folder / "tokenizer")
            prepare(PrepareSettings(texts, str(folder / "train"), str(folder / "tokenizer")))
            prepare(PrepareSettings(held_out, str(folder / "held_out"), str(folder / "tokenizer")))
        for rate in args.rates:
            for optimizer in ("adamw", "muon"):
                bounds, seconds = [], []
                for seed in range(args.seeds):
                    run = folder / f"{optimizer}-{rate:g}-{seed}"
                    settings = TrainingRecipe(
                        steps=args.steps,
                        samples_per_step=16,
                        samples_per_batch=16,
                        learning_rate=rate,
                        final_learning_rate=rate / 10,
                        warmup_steps=20,
                        decay_steps=args.steps // 4,
                        optimizer=optimizer,
                        beta2=0.98,
                        dtype="fp32",
                        device="cpu",
                        seed=seed,
                        validate_every=args.steps,
                        checkpoint_every=args.steps,
                        validation_samples=128,
                    )
                    data = DataRecipe(str(folder / "train"), str(folder / "held_out"), 128)
                    begun = time.perf_counter()
                    with contextlib.redirect_stderr(nothing):
                        train(Recipe(str(run), ModelRecipe("1m"), data=data, training=settings))
                    seconds.append((time.perf_counter() - begun) / args.steps)
                    bounds.append(read_metrics(run / "metrics.jsonl")[-1]["validation_bits_per_byte"])
                mean, deviation = statistics.mean(bounds), statistics.stdev(bounds) if len(bounds) > 1 else 0.0
                cells = f"{mean:.4f} ± {deviation:.4f} | {statistics.median(seconds):.3f}"
                print(f"| {optimizer} | {rate:g} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
