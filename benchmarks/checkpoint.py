"""What does a checkpoint cost the training? Time in which the training stands still: written at once, or beside it.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py

Paired: every round trains steps without a checkpoint, with one written at once, and with one written beside the steps.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from illada.model.attention import Packing
from illada.model.config import IlladaConfig
from illada.model.transformer import IlladaForMaskedLM
from illada.training.checkpoint import Checkpoints, RunState
from illada.training.optim import make_optimizers, moments
from illada.training.parallel import Processes, distribute
from illada.training.recipe import Recipe, TrainingRecipe


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--preset", default="15m")
    arguments.add_argument("--vocabulary", type=int, default=8192)
    arguments.add_argument("--windows", type=int, default=16, help="of 256 tokens, in a step")
    arguments.add_argument("--rounds", type=int, default=7)
    given = arguments.parse_args()
    processes = Processes(0, 1, torch.device("cpu"))
    recipe = Recipe(training=TrainingRecipe(dtype="fp32", keep_checkpoints=1))
    torch.manual_seed(0)
    model = IlladaForMaskedLM(IlladaConfig.preset(given.preset, vocab_size=given.vocabulary))
    objective = distribute(model, recipe, processes)
    (optimizer,) = make_optimizers(model, recipe.training)
    named = dict(model.named_parameters())
    kept = {name: p.detach() for name, p in named.items()} | moments([optimizer], {p: n for n, p in named.items()})
    tokens = given.windows * 256
    clean, masked = torch.randint(8, given.vocabulary, (tokens,)), torch.rand(tokens) < 0.5
    weight, packing = torch.full((tokens,), 1 / tokens), Packing((256,) * given.windows)
    state = RunState()
    found: dict[str, list[float]] = {name: [] for name in ("step", "at once", "beside", "step beside", "until written")}
    with (
        tempfile.TemporaryDirectory() as folder,
        Checkpoints(Path(folder), processes, kept, lambda path: path.mkdir(), recipe.training) as saved,
    ):

        def step(settle: bool = False) -> tuple[float, float]:
            """Return the seconds of a step and those it waited for the checkpoint."""
            begun = time.perf_counter()
            objective(clean, masked, weight, packing).backward()
            waiting = time.perf_counter()
            if settle:
                saved.wait_for_copy()
            waited = time.perf_counter() - waiting
            optimizer.step()
            optimizer.zero_grad()
            state.step += 1
            return time.perf_counter() - begun, waited

        step()
        for number in range(given.rounds + 1):
            plain, _ = step()
            begun = time.perf_counter()
            saved.save(state)
            saved.wait()
            at_once = time.perf_counter() - begun
            step()
            begun = time.perf_counter()
            saved.save(state)
            called = time.perf_counter() - begun
            beside, waited = step(settle=True)
            saved.wait()
            written = time.perf_counter() - begun
            if number:  # the first one makes the buffers
                for name, value in zip(found, (plain, at_once, called + waited, beside, written), strict=True):
                    found[name].append(value)
    size = sum(tensor.numel() * tensor.element_size() for tensor in kept.values()) / 1e6
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}; "
        f"{model.num_parameters():,} parameters, {size:.0f} MB of weights and moments, median of {given.rounds}\n"
    )
    middle = {name: statistics.median(values) for name, values in found.items()}
    print("| what | seconds |\n|---|---|")
    print(f"| a step without a checkpoint | {middle['step']:.3f} |")
    print(f"| standing still, written at once | {middle['at once']:.3f} |")
    print(f"| standing still, written beside the training | {middle['beside']:.4f} |")
    print(f"| the step beside which it is written | {middle['step beside']:.3f} |")
    print(f"| from the call until it can be seen | {middle['until written']:.3f} |")
    print(f"\nstall: {100 * middle['beside'] / middle['at once']:.1f} % of writing at once")


if __name__ == "__main__":
    main()
