"""What does a checkpoint cost the training? Time in which training stands still while it is written, or is begun.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py

Paired: every round trains steps without a checkpoint, with one written at once, and with one written beside the steps.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import machine

from illada.model.attention import Packing
from illada.model.config import IlladaConfig
from illada.model.transformer import IlladaForMaskedLM
from illada.training.checkpoint import Checkpoints
from illada.training.optim import make_optimizers, moments
from illada.training.parallel import Processes, distribute
from illada.training.recipe import Recipe, TrainingRecipe
from illada.weights.runs import RunState


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="15m")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=16, help="of 256 tokens, in a step")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    processes = Processes(0, 1, torch.device("cpu"))
    recipe = Recipe(training=TrainingRecipe(dtype="fp32", keep_checkpoints=1))
    torch.manual_seed(0)
    model = IlladaForMaskedLM(IlladaConfig.preset(args.preset, vocab_size=args.vocabulary))
    objective = distribute(model, recipe, processes)
    (optimizer,) = make_optimizers(model, recipe.training)
    named = dict(model.named_parameters())
    kept = {name: p.detach() for name, p in named.items()} | moments([optimizer], {p: n for n, p in named.items()})
    tokens = args.windows * 256
    clean, masked = torch.randint(8, args.vocabulary, (tokens,)), torch.rand(tokens) < 0.5
    weight, packing = torch.full((tokens,), 1 / tokens), Packing((256,) * args.windows)
    state = RunState()
    names = ("step", "at once", "beside", "step beside", "until written")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with (
        tempfile.TemporaryDirectory() as folder,
        Checkpoints(Path(folder), processes, kept, lambda path: path.mkdir(), recipe.training) as saved,
    ):

        def step(settle: bool = False) -> tuple[float, float]:
            """Return the seconds of a step, and how many of them it waited for the checkpoint."""
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
        for number in range(args.rounds + 1):
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
                for name, value in zip(seconds, (plain, at_once, called + waited, beside, written), strict=True):
                    seconds[name].append(value)
    size = sum(tensor.numel() * tensor.element_size() for tensor in kept.values()) / 1e6
    print(f"{machine()}; {model.num_parameters():,} parameters, {size:.0f} MB of weights and moments, ", end="")
    print(f"median of {args.rounds}\n")
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    print("| what | seconds |\n|---|---|")
    print(f"| a step without a checkpoint | {middle['step']:.3f} |")
    print(f"| standing still, written at once | {middle['at once']:.3f} |")
    print(f"| standing still, written beside the training | {middle['beside']:.4f} |")
    print(f"| the step beside which it is written | {middle['step beside']:.3f} |")
    print(f"| from the call until it can be seen | {middle['until written']:.3f} |")
    print(f"\nstall: {100 * middle['beside'] / middle['at once']:.1f} % of writing at once")


if __name__ == "__main__":
    main()
