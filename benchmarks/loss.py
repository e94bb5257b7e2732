"""What does the head cost? The chunked loss on masked rows (ours) against cross-entropy of all logits of these rows, or
of all rows: seconds and peak memory of a forward and backward pass, each way in a process of its own, in markdown.

    OMP_NUM_THREADS=1 python benchmarks/loss.py
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from common import machine

from illada.diffusion.loss import chunked_cross_entropy

TOKENS, WIDTH = 4096, 384  # 16 windows of 256; the preset of 15 million parameters
WAYS = ("chunked", "masked rows", "all rows")
MASKED = 0.5  # the mean of p


def measure(way: str, vocabulary: int, repeats: int) -> dict[str, float]:
    """Return the median seconds of a pass, the memory it added at its peak in MB, and the loss."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    head = (torch.randn(vocabulary, WIDTH) / WIDTH**0.5).requires_grad_()
    target = torch.randint(0, vocabulary, (TOKENS,))
    masked = torch.rand(TOKENS) < MASKED
    weight = torch.rand(TOKENS)

    def one_pass() -> torch.Tensor:
        hidden.grad = head.grad = None
        rows = masked.nonzero()[:, 0]
        if way == "chunked":
            loss = chunked_cross_entropy(hidden[rows], head, target[rows], weight[rows])
        elif way == "masked rows":
            losses = F.cross_entropy(hidden[rows] @ head.T, target[rows], reduction="none")
            loss = (losses * weight[rows]).sum()
        else:
            losses = F.cross_entropy(hidden @ head.T, target, reduction="none")
            loss = (losses * weight * masked).sum()
        loss.backward()
        return loss.detach()

    # A small product first, so that the libraries' own buffers are not counted.
    (hidden[:64] @ head.T[:, :64]).sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    loss = torch.zeros(())
    for _ in range(repeats + 1):
        start = time.perf_counter()
        loss = one_pass()
        times.append(time.perf_counter() - start)
    unit = 1e6 if platform.system() == "Darwin" else 1e3  # bytes there, kB elsewhere
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit
    return {"seconds": statistics.median(times[1:]), "megabytes": peak, "loss": float(loss)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--way", choices=WAYS, help="measure one way here, print JSON")
    parser.add_argument("--vocabulary", type=int, default=2000)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.vocabulary, args.repeats)))
        return
    print(f"{machine()}; ", end="")
    print(f"{TOKENS} tokens of width {WIDTH}, half of them masked, fp32, median of {args.repeats}\n")
    print("| vocabulary | way | seconds | times chunked | peak (MB) |\n|---|---|---|---|---|")
    for vocabulary in (2000, 32_000):
        results = {}
        for way in WAYS:
            words = [sys.executable, __file__, "--way", way, "--vocabulary", str(vocabulary)]
            done = subprocess.run([*words, "--repeats", str(args.repeats)], check=True, capture_output=True, text=True)
            results[way] = json.loads(done.stdout)
        base = results["chunked"]
        for way, row in results.items():
            assert abs(row["loss"] / base["loss"] - 1) < 1e-4, results
            cells = f"{row['seconds']:.3f} | {row['seconds'] / base['seconds']:.1f} | {row['megabytes']:.0f}"
            print(f"| {vocabulary} | {way} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
