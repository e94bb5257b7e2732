"""What does the head cost? The chunked loss on masked rows (ours) against cross-entropy of all logits: seconds and peak
memory of a forward and backward pass, each way in a process of its own, as a markdown table.

    OMP_NUM_THREADS=1 python bench/loss.py
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from illada.diffusion.loss import chunked_cross_entropy

TOKENS, WIDTH = 4096, 384  # 16 windows of 256; the preset of 15 million parameters
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
        if way == "chunked":
            rows = masked.nonzero()[:, 0]
            loss = chunked_cross_entropy(hidden[rows], head, target[rows], weight[rows])
        else:
            each = F.cross_entropy(hidden @ head.T, target, reduction="none")
            loss = (each * weight * masked).sum()
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
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--repeats", type=int, default=7)
    arguments.add_argument("--way", choices=["chunked", "plain"], help="measure one way here, print JSON")
    arguments.add_argument("--vocabulary", type=int, default=2000)
    given = arguments.parse_args()
    if given.way:
        print(json.dumps(measure(given.way, given.vocabulary, given.repeats)))
        return
    load = os.getloadavg()[0]
    print(
        f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} thread(s), load {load:.1f}; ",
        end="",
    )
    print(f"{TOKENS} tokens of width {WIDTH}, half of them masked, fp32, median of {given.repeats}\n")
    print("| vocabulary | chunked (s) | plain (s) | plain / chunked | chunked peak (MB) | plain peak (MB) |")
    print("|---|---|---|---|---|---|")
    for vocabulary in (2000, 32_000):
        found = {}
        for way in ("chunked", "plain"):
            words = [sys.executable, __file__, "--way", way, "--vocabulary", str(vocabulary)]
            done = subprocess.run([*words, "--repeats", str(given.repeats)], check=True, capture_output=True, text=True)
            found[way] = json.loads(done.stdout)
        a, b = found["chunked"], found["plain"]
        assert abs(a["loss"] / b["loss"] - 1) < 1e-4, found
        cells = (f"{a['seconds']:.3f}", f"{b['seconds']:.3f}", f"{b['seconds'] / a['seconds']:.1f}")
        print(f"| {vocabulary} | {' | '.join(cells)} | {a['megabytes']:.0f} | {b['megabytes']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
