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

from illada.bench.generation import bench_generate, compared, shown, table
from illada.bench.options import BenchGenerateOptions
from illada.bench.samplers import EXACT, THRESHOLDS, modes, rules
from illada.errors import IlladaError
from illada.generation.settings import GenerationSettings

BLOCK, BUDGET = 16, 48  # of the demo's answers
FAST_DLLM = ("generate_with_dual_cache", "generate_with_prefix_cache")
DINFER = ("cache=prefix", "cache=dual", "cache=dual,look=4")


def by_threshold() -> list[str]:
    """The variants of the engine that commit by threshold, with and without a cache."""
    names = []
    for mode, of_mode in modes().items():
        for rule, of_rule in rules(BLOCK, BUDGET).items():
            try:
                settings = GenerationSettings(**of_mode, **of_rule)
            except IlladaError:
                continue
            if settings.threshold is not None and not settings.speculate:
                names.append(rule + mode)
    return names


def beside(results: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Pair the first outside sampler with a dual cache at each threshold with every other row at that threshold."""
    rows = [row for row in results["rows"] if row["threshold"] is not None]
    seen = set()
    for theirs in rows:
        if theirs["settings"] or "dual" not in theirs["name"] or theirs["threshold"] in seen:
            continue
        seen.add(theirs["threshold"])
        for row in rows:
            if row["threshold"] == theirs["threshold"] and row is not theirs:
                yield theirs, row


def comparison(results: dict[str, Any]) -> str:
    """Return the same problems solved by others' dual cache and by every other way at the same threshold."""
    heads = ("threshold, way", "right", "lost, won, p", "forwards", "CPU time")
    lines = [f"| {' | '.join(heads)} |", "|---|---:|---:|---:|---:|"]

    def line(row: dict[str, Any], theirs: dict[str, Any]) -> str:
        forwards = row["answer_forwards"] / results["problems"]
        pairs = zip(theirs["cpu_seconds"], row["cpu_seconds"], strict=True)
        times = statistics.median(a / b for a, b in pairs)
        paired = "" if row is theirs else shown(compared(row["right"], theirs["right"]))
        name = row["name"].removeprefix("outside ")
        return f"| {name} | {sum(row['right'])} | {paired} | {forwards:.1f} | {times:.2f} |"

    last = None
    for theirs, row in beside(results):
        if theirs is not last:
            lines.append(line(theirs, theirs))
            last = theirs
        lines.append(line(row, theirs))
    return "\n".join(
        [
            *lines,
            "",
            "Each threshold begins with theirs. Right: problems. Lost, won: those that theirs alone solves and "
            "that the row alone solves; p: McNemar's exact test. Forwards: of an answer. CPU time: theirs through the "
            "row's. Fast-dLLM's length is fixed: it goes on behind the end.",
        ]
    )


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
        outside += [f"{arguments.fast_dllm}:{name},threshold={p}" for name in FAST_DLLM for p in THRESHOLDS]
    if arguments.dinfer:
        driver = f"{Path(__file__).with_name('dinfer.py')},dinfer={arguments.dinfer}"
        outside += [f"{driver},{options},threshold={p}" for options in DINFER for p in THRESHOLDS]
    for batch in (1, arguments.batch) if outside else ():
        options = {"max_new_tokens": BUDGET, "batch": batch, "only": by_threshold(), "outside": outside}
        results = run(f"others {batch}", **demo, **options)
        print(f"### Against others, engine in batches of {batch}\n\n{table(results)}\n\n{comparison(results)}\n")


if __name__ == "__main__":
    main()
