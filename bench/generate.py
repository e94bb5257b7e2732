"""What does each way to generate cost, and what is it worth? The tables of RESULTS.md: seconds beside counters, each
table of one run in which every repeat runs all variants.

    OMP_NUM_THREADS=1 python bench/generate.py --model FOLDER [--fast_dllm llada/generate.py] [--output FOLDER]

--model is a trained demo's. --fast_dllm is that file in a checkout of NVlabs/Fast-dLLM, which is run as it is (its
model code needs einops); without it the comparison with its samplers is left out.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from illada.benchmark.generation import bench_generate, table
from illada.benchmark.samplers import EXACT, modes, rules
from illada.errors import IlladaError
from illada.generation import GenerationSettings

BLOCK, BUDGET = 16, 48  # of the demo's answers
THRESHOLDS = (0.99, 0.95, 0.9)
FAST_DLLM = ("generate", "generate_with_prefix_cache", "generate_with_dual_cache")


def cached_thresholds() -> list[str]:
    """The variants of the engine that keep keys and values and commit by threshold."""
    names = []
    for mode, of_mode in modes().items():
        for rule, of_rule in rules(BLOCK, BUDGET).items():
            try:
                settings = GenerationSettings(**of_mode, **of_rule)
            except IlladaError:
                continue
            if settings.cache != "none" and settings.threshold is not None:
                names.append(rule + mode)
    return names


def at_equal_accuracy(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Pair each outside row that has a cache and a threshold with the fastest such row of ours that is right as often.

    "times" is the median over the repeats of their seconds through ours, for the same problems.
    """
    ours = [row for row in rows if row["settings"] and row["settings"]["cache"] != "none"]
    ours = [row for row in ours if row["settings"]["threshold"] is not None]
    for theirs in rows:
        if theirs["settings"] or "cache" not in theirs["name"] or theirs["forwards_minimum"] is None:
            continue
        as_right = [row for row in ours if row["accuracy"] >= theirs["accuracy"]]
        best = min(as_right, key=lambda row: statistics.median(row["seconds"]), default=None)
        times = None if best is None else [a / b for a, b in zip(theirs["seconds"], best["seconds"], strict=True)]
        yield {"theirs": theirs, "ours": best, "times": times and statistics.median(times)}


def comparison(results: dict[str, Any]) -> str:
    """Return the pairs of equal accuracy as a Markdown table."""
    lines = ["| Fast-dLLM | accuracy | forwards | ours, as often right | accuracy | forwards | times faster |"]
    lines.append("|---|---:|---:|---|---:|---:|---:|")

    def cells(row: dict[str, Any]) -> str:
        name = row["name"].removeprefix("outside ").partition(":")[2] or row["name"]
        return f"{name} | {row['accuracy']:.1%} | {row['answer_forwards'] / results['problems']:.1f}"

    for pair in at_equal_accuracy(results["rows"]):
        ours = "none | | " if pair["ours"] is None else f"{cells(pair['ours'])} | {pair['times']:.2f}"
        lines.append(f"| {cells(pair['theirs'])} | {ours} |")
    return "\n".join(
        [*lines, "", "Forwards: of an answer. Their length is fixed: they generate on behind the answer's end."]
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a trained demo's model folder")
    parser.add_argument("--fast_dllm", help="llada/generate.py of a checkout of Fast-dLLM")
    parser.add_argument("--limit", type=int, default=112, help="problems")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32, help="prompts given to the engine at once, where not one")
    parser.add_argument("--output", help="folder for each table's JSON")
    parser.add_argument("--compare", action="store_true", help="the comparison with Fast-dLLM only")
    arguments = parser.parse_args()
    if arguments.compare and not arguments.fast_dllm:
        parser.error("--compare needs --fast_dllm")

    def run(name: str, **options: Any) -> dict[str, Any]:
        print(name, file=sys.stderr)
        output = None if arguments.output is None else str(Path(arguments.output) / name.replace(" ", "-"))
        return bench_generate(repeats=arguments.repeats, output=output, **options)

    demo = {"model": arguments.model, "limit": arguments.limit, "block_length": BLOCK}
    if not arguments.compare:
        print(f"### Every variant, trained demo model\n\n{table(run('demo', **demo, batch=arguments.batch))}\n")
        for vocab_size in (126_464, 8_192):
            shape = {"random": "1m", "vocab_size": vocab_size, "batch": 1, "limit": 2}
            results = run(f"V {vocab_size}", **shape, block_length=32, max_new_tokens=32, only=[EXACT])
            print(f"### Exact against the plain loop, one prompt at a time, V = {vocab_size:,}\n\n{table(results)}\n")
    if arguments.fast_dllm:
        only = cached_thresholds()
        outside = [f"{arguments.fast_dllm}:{name}" for name in FAST_DLLM]
        outside += [f"{spec},threshold={p}" for spec in outside[1:] for p in THRESHOLDS]
        # One block leaves nothing behind the end of an answer to generate in vain: what remains is the work itself.
        for batch, budget in ((1, BUDGET), (1, BLOCK), (arguments.batch, BUDGET)):
            what = f"engine in batches of {batch}, {budget} tokens"
            name = f"against Fast-dLLM {batch} {budget}"
            results = run(name, **demo, max_new_tokens=budget, batch=batch, only=only, outside=outside)
            print(f"### Against Fast-dLLM, {what}\n\n{table(results)}\n\n{comparison(results)}\n")


if __name__ == "__main__":
    main()
