"""What does each way to generate cost, and what is it worth? The tables of RESULTS.md: seconds beside counters, each
table of one run in which every repeat runs all variants.

    OMP_NUM_THREADS=1 python benchmarks/generate.py --model FOLDER [--fast_dllm FILE] [--dinfer FOLDER]
        [--output FOLDER]

--model is a trained demo's. --fast_dllm is llada/generate.py in a checkout of NVlabs/Fast-dLLM (its model code needs
einops), --dinfer is python/dinfer in one of inclusionAI/dInfer; both are run as they are, on our weights.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from illada.bench.generation import bench_generate, table
from illada.bench.options import BenchGenerateOptions
from illada.bench.samplers import EXACT, modes, rules
from illada.errors import IlladaError
from illada.generation.settings import GenerationSettings

BLOCK, BUDGET = 16, 48  # of the demo's answers
THRESHOLDS = (0.99, 0.95, 0.9)
FAST_DLLM = ("generate", "generate_with_prefix_cache", "generate_with_dual_cache")
DINFER = ("cache=prefix", "cache=dual", "cache=dual,look=4")


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
    """Pair each outside row that has a cache and a threshold with such a row of ours that is right as often.

    Where none is, with one of those that are most often right; of several with that of the fewest forwards and then
    positions: to choose by the seconds would choose the luck of a run. "times" and "cpu_times" are medians over the
    repeats of their time through ours, for the same problems.
    """
    ours = [row for row in rows if row["settings"] and row["settings"]["cache"] != "none"]
    ours = [row for row in ours if row["settings"]["threshold"] is not None]
    for theirs in rows:
        if theirs["settings"] or "cache" not in theirs["name"] or theirs["forwards_minimum"] is None:
            continue
        wanted = min(theirs["accuracy"], max(row["accuracy"] for row in ours))
        as_right = [row for row in ours if row["accuracy"] >= wanted]
        best = min(as_right, key=lambda row: (row["answer_forwards"], row["positions"]))
        pair: dict[str, Any] = {"theirs": theirs, "ours": best}
        for times, seconds in (("times", "seconds"), ("cpu_times", "cpu_seconds")):
            pair[times] = statistics.median(a / b for a, b in zip(theirs[seconds], best[seconds], strict=True))
        yield pair


def comparison(results: dict[str, Any]) -> str:
    """Return the pairs of equal accuracy as a Markdown table."""
    lines = ["| theirs | accuracy | forwards | ours | accuracy | forwards | times faster | CPU time |"]
    lines.append("|---|---:|---:|---|---:|---:|---:|---:|")

    def cells(row: dict[str, Any]) -> str:
        forwards = row["answer_forwards"] / results["problems"]
        return f"{row['name'].removeprefix('outside ')} | {row['accuracy']:.1%} | {forwards:.1f}"

    for pair in at_equal_accuracy(results["rows"]):
        lines.append(
            f"| {cells(pair['theirs'])} | {cells(pair['ours'])} | {pair['times']:.2f} | {pair['cpu_times']:.2f} |"
        )
    return "\n".join([*lines, "", "Forwards: of an answer. Fast-dLLM's length is fixed: it goes on behind the end."])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a trained demo's model folder")
    parser.add_argument("--fast_dllm", help="llada/generate.py of a checkout of Fast-dLLM")
    parser.add_argument("--dinfer", help="python/dinfer of a checkout of dInfer")
    parser.add_argument("--limit", type=int, default=112, help="problems")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32, help="prompts given to the engine at once, where not one")
    parser.add_argument("--output", help="folder for each table's JSON")
    parser.add_argument("--compare", action="store_true", help="the comparison with others only")
    arguments = parser.parse_args()
    if arguments.compare and not (arguments.fast_dllm or arguments.dinfer):
        parser.error("--compare needs --fast_dllm or --dinfer")

    def run(name: str, **options: Any) -> dict[str, Any]:
        print(name, file=sys.stderr)
        output = None if arguments.output is None else str(Path(arguments.output) / name.replace(" ", "-"))
        return bench_generate(BenchGenerateOptions(repeats=arguments.repeats, output=output, **options))

    demo = {"model": arguments.model, "limit": arguments.limit, "block_length": BLOCK}
    if not arguments.compare:
        print(f"### Every variant, trained demo model\n\n{table(run('demo', **demo, batch=arguments.batch))}\n")
        for vocab_size in (126_464, 8_192):
            shape = {"random": "1m", "vocab_size": vocab_size, "batch": 1, "limit": 2}
            results = run(f"V {vocab_size}", **shape, block_length=32, max_new_tokens=32, only=[EXACT])
            print(f"### Exact against the plain loop, one prompt at a time, V = {vocab_size:,}\n\n{table(results)}\n")
    outside = []
    if arguments.fast_dllm:
        specs = [f"{arguments.fast_dllm}:{name}" for name in FAST_DLLM]
        outside += [*specs, *(f"{spec},threshold={p}" for spec in specs[1:] for p in THRESHOLDS)]
    if arguments.dinfer:
        driver = f"{Path(__file__).with_name('dinfer.py')},dinfer={arguments.dinfer}"
        outside += [f"{driver},{options},threshold={p}" for options in DINFER for p in THRESHOLDS]
    # One block leaves nothing behind the end of an answer to generate in vain: what remains is the work itself.
    for batch, budget in ((1, BUDGET), (1, BLOCK), (arguments.batch, BUDGET)) if outside else ():
        options = {"max_new_tokens": budget, "batch": batch, "only": cached_thresholds(), "outside": outside}
        results = run(f"others {batch} {budget}", **demo, **options)
        what = f"engine in batches of {batch}, {budget} tokens"
        print(f"### Against others, {what}\n\n{table(results)}\n\n{comparison(results)}\n")


if __name__ == "__main__":
    main()
