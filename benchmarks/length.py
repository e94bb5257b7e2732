"""How does the cost of an answer grow with its length and with the rows beside it? Seconds, positions and memory, with
and without a cache, and the exponents: seconds ~ tokens^a.

    OMP_NUM_THREADS=1 python benchmarks/length.py [--preset 1m] [--lengths 64 128 ... 2048] [--rows 1 4 16 64]

Random weights and no end-of-sequence id, so every answer takes its whole budget: blocks of 32, four tokens a pass,
behind a prompt of 64 tokens, `--rows` answers at once, `--most` tokens in all. Processor seconds of one run each;
memory is what the kept keys and values take at their most.
"""

import argparse
import time
from itertools import product

import numpy as np
import torch
from common import machine

from illada.generation.engine import Engine
from illada.generation.settings import GenerationSettings
from illada.model.config import PRESETS, IlladaConfig
from illada.model.transformer import IlladaForMaskedLM

BLOCK, PASSES, PROMPT = 32, 8, 64
CACHES = ("none", "prefix", "frozen")


def answered(model: IlladaForMaskedLM, cache: str, tokens: int, rows: int) -> tuple[float, int, int, float]:
    """Return processor seconds, passes, positions and MB of kept keys and values of `rows` answers."""
    engine = Engine(model)
    settings = GenerationSettings(
        max_new_tokens=tokens, block_length=BLOCK, steps_per_block=PASSES, eos_token_id=None, cache=cache
    )
    draw = np.random.default_rng(0)
    for _ in range(rows):
        engine.submit(draw.integers(9, model.config.vocab_size, PROMPT).tolist(), settings)
    passes, answers = 0, {}
    begun = time.process_time()
    while engine.busy:
        answers |= engine.step()
        passes += 1
    seconds = time.process_time() - begun
    kept = sum(layer.nbytes for layer in engine.pool.layers) / 1e6
    return seconds, passes, sum(answer.positions for answer in answers.values()), kept


def exponent(points: list[tuple[int, float]]) -> str:
    """Return a of seconds ~ tokens^a, by least squares of the logarithms: over all lengths, over the longest three."""
    if len(points) < 3:
        return "-"
    x, y = np.log(np.array(points)).T
    return f"{np.polyfit(x, y, 1)[0]:.2f}, {np.polyfit(x[-3:], y[-3:], 1)[0]:.2f}"


def main() -> None:
    """Read the command line and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="1m", choices=PRESETS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--most", type=int, default=32_768, help="most tokens of a run, in all its answers")
    options = parser.parse_args()
    torch.manual_seed(0)
    shape = {**PRESETS[options.preset], "vocab_size": 8192, "mask_token_id": 5, "max_position_embeddings": 8192}
    model = IlladaForMaskedLM(IlladaConfig(**shape)).eval()
    print(f"{machine()}, {options.preset}\n")
    print("| rows | cache | tokens | seconds | ms a token | passes | positions | MB kept |")
    print("|---:|---|---:|---:|---:|---:|---:|---:|")
    points: dict[tuple[int, str], list[tuple[int, float]]] = {}
    answered(model, "none", 64, 1)  # what is done once
    for rows, tokens, cache in product(options.rows, options.lengths, CACHES):
        if rows * tokens > options.most:
            continue
        seconds, passes, positions, kept = answered(model, cache, tokens, rows)
        points.setdefault((rows, cache), []).append((tokens, seconds))
        per_token = 1000 * seconds / rows / tokens
        cells = f"{seconds:.2f} | {per_token:.2f} | {passes:,} | {positions:,} | {kept:.1f}"
        print(f"| {rows} | {cache} | {tokens:,} | {cells} |", flush=True)
    print("\n| rows | " + " | ".join(f"{cache}: all lengths, the longest three" for cache in CACHES) + " |")
    print("|---:|" + "---|" * len(CACHES))
    for rows in options.rows:
        print(f"| {rows} | " + " | ".join(exponent(points.get((rows, cache), [])) for cache in CACHES) + " |")


if __name__ == "__main__":
    main()
