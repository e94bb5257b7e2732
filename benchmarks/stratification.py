"""What does it gain to spread the noise levels of a whole optimiser step evenly? (spec §2: t_i = (pi(i) + u_i)/N)

    OMP_NUM_THREADS=1 python benchmarks/stratification.py --model FOLDER [--windows 32] [--draws 60]

The same windows of text are noised again and again: t drawn for each on its own, spread within passes of 8 windows, and
spread over the whole step. Printed: the standard deviation of the step's loss, what it would be by the middle half of
the draws (the tails are heavy: a rare small p weighs a token a thousand times), and with --gradients the root of the
mean squared distance from the mean gradient; each with its factor against t on its own.
"""

import argparse

import torch

from illada import rng
from illada.diffusion.loss import masked_loss
from illada.diffusion.noise import masking_probability
from illada.model.attention import Packing
from illada.toy_tasks import standard_library
from illada.weights.load import load_model

PASS = 8


def times(way: str, windows: int, draw: int) -> torch.Tensor:
    """Return t of each window, float64."""
    index = torch.arange(windows)
    u = rng.uniform(draw, 1, index, dtype=torch.float64)
    if way == "on its own":
        return u
    size = windows if way == "whole step" else PASS
    strata = [rng.permutation(size, draw, 2, group) for group in range(windows // size)]
    return (torch.cat(strata) + u) / size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--draws", type=int, default=60)
    parser.add_argument("--gradients", action="store_true")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    text = "\n".join(
        path.read_text(encoding="utf-8", errors="ignore") for path in sorted(standard_library().glob("*.py"))[:40]
    )
    ids = tokenizer.encode(text, add_special_tokens=False)[: args.windows * args.length]
    clean_T = torch.tensor(ids)
    packing = Packing((args.length,) * args.windows)
    print("| t | sd of the loss (nats) | less by | sd by the middle half | less by | sd of the gradient | less by |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    first: list[float] = []
    for way in ("on its own", "within passes of 8", "whole step"):
        losses, total, squares = [], torch.zeros(()), 0.0
        for draw in range(args.draws):
            p_T = masking_probability(times(way, args.windows, draw)).float().repeat_interleave(args.length)
            masked_T = rng.uniform(draw, 3, torch.arange(len(clean_T)), dtype=torch.float64) < p_T
            with torch.set_grad_enabled(args.gradients):
                loss = masked_loss(model, clean_T, masked_T, 1 / p_T / len(clean_T), packing)
            losses.append(loss.item())
            if args.gradients:
                loss.backward()
                gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
                total, squares = total + gradient, squares + float(gradient.double().square().sum())
                model.zero_grad()
        loss_N = torch.tensor(losses)
        middle = float(loss_N.quantile(0.75) - loss_N.quantile(0.25)) / 1.349
        spread = max(0.0, squares / args.draws - float((total / args.draws).double().square().sum())) ** 0.5
        figures = [float(loss_N.std()), middle, spread]
        first = first or figures
        cells = (f"{x:.4f} | {y / x:.2f}" if x else " | " for x, y in zip(figures, first, strict=True))
        print(f"| {way} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
