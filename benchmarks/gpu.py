"""What does all of this do on a GPU? One command fills every row that was never measured there.

    python benchmarks/gpu.py [--minutes 10] [--only ROW ...] [--again] [--output runs/gpu.json]
    python benchmarks/gpu.py --cpu                  # every row with tiny shapes: tests this code, measures nothing
    python benchmarks/gpu.py --table runs/gpu.json  # the table of an earlier run
    python benchmarks/gpu.py --row exact [--cpu]    # one row in this process, without a limit of time

Each row runs in a process of its own (`gpu_rows.py`) and gets a share of the minutes that are left. Whatever happens to
it becomes its row: what failed, what is missing, after how many seconds it was ended. The file is written after every
row; a second run goes on behind the rows that it holds. Exit code 1 when a row of this run failed. Weights and prompts
are random. What a row checks (yes or NO) is part of it, and a NO is a failure.
"""

import argparse
import json
import sys
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import gpu_rows
from common import Found, take_rows, taken, taken_apart

from illada.files import read_json


class Row(NamedTuple):
    """A row of the table; `row_NAME` in gpu_rows.py measures it."""

    weight: float
    """Its share of the time, in any unit."""
    what: str
    needs_cuda: bool = False


ROWS = {
    "exact": Row(
        4, "8B shape, bf16, a prompt of 200 ids, 256 new in blocks of 32, a token a pass; limit 131 forwards/s"
    ),
    "cached": Row(4, "the same with the frozen and the prefix cache; limit 187 forwards/s"),
    "threshold": Row(4, "the same by a threshold at which random weights decide several tokens a pass"),
    "batches": Row(5, "8B shape, 1, 8 and 32 prompts of 200 ids, 64 new each, exact and frozen"),
    "graphs": Row(
        4, "8B shape, 1 and 8 prompts of 200 ids, 64 new each: CUDA graphs for small passes, beside eager ones"
    ),
    "memory": Row(3, "8B shape, a prompt that leaves 32 of 8192 positions, four passes"),
    "training": Row(8, "1B shape (recipes/1b-pretrain.yaml), 8 windows of 8192 a step, 2 a pass, bf16"),
    "recompute": Row(10, "the same, one window a pass, by what is computed again; memory beside `illada estimate`"),
    "varlen": Row(4, "varlen against SDPA: attention of packed segments, 8B generation, training (4 layers)", True),
    "liger": Row(3, "Liger's kernels against ours in training (4 layers of the 1B shape)", True),
    "fp8": Row(10, "FP8 against bf16 in training, both compiled (4 layers of the 1B shape)", True),
    "scoring": Row(
        4, "8B shape, 16 candidates of 4 to 16 ids after 100, 16 samples, beside one forward after the other"
    ),
    "server": Row(6, "illada bench serve, short questions, 8 layers of the 8B shape, vocabulary of 280"),
    "quantised": Row(8, "8B shape from files: seconds of loading, GB of weights, passes of 64 positions"),
    "processes": Row(6, "training (4 layers of the 1B shape) in one and two processes: NCCL, with --cpu Gloo"),
}


def figures_of(name: str, cpu: bool) -> Found:
    """Measure a row; a check that is not so, or a way that failed, fails it."""
    at = gpu_rows.CPU if cpu else gpu_rows.GPU
    figures = getattr(gpu_rows, f"row_{name}")(at)
    found = {"figures": figures, "peak_gb": gpu_rows.peak(at, figures)}
    ways = {key: value for key, value in figures.items() if isinstance(value, dict) and "failed" in value}
    if untrue := [*ways, *(key for key, value in figures.items() if value is False)]:
        found |= {"status": "failed", "reason": f"not so or not done: {', '.join(untrue)}"}
    return found


def attempt(name: str, cpu: bool, limit: float) -> Found:
    """Measure a row in a process of its own, for at most `limit` seconds."""
    if cpu and ROWS[name].needs_cuda:
        return {"status": "not measured", "reason": "needs CUDA", "figures": {}, "seconds": 0.0}
    start = gpu_rows.START["cpu" if cpu else "cuda"]
    return {"figures": {}} | taken_apart(partial(figures_of, name, cpu), limit, start)


def shown(value: Any) -> str:
    """Return a figure, or the figures of one way, in words."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(each)}" for name, each in value.items() if each not in (None, ""))
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def table(rows: list[Found]) -> str:
    """Return the latest of each row in Markdown, a line for each way; a table for each machine and commit."""
    text: list[str] = []
    latest = {(row["row"], row["cpu"]): row for row in rows}.values()
    about = ("device", "driver", "cuda", "torch", "commit", "cpu")
    for head, members in groupby(latest, lambda row: [row[name] for name in about]):
        test = " Tiny shapes: a test of the code and no measurement, not even of this CPU." if head[-1] else ""
        text.append(f"{head[0]}, driver {head[1]}, CUDA {head[2]}, torch {head[3]}, commit {head[4]}.{test}\n")
        text.append("| row | way | found | s | peak GB |\n|---|---|---|---:|---:|")
        for row in members:
            peak = f"{row['peak_gb']:.1f}" if "peak_gb" in row else ""
            ended = {} if row["status"] == "measured" else {row["status"]: row["reason"]}
            lines = [(way, shown(found)) for way, found in {"what": row["what"], **ended, **row["figures"]}.items()]
            for i, (way, found) in enumerate(lines):
                cells = (row["row"], way, found, f"{row['seconds']:.0f}", peak) if i == 0 else ("", way, found, "", "")
                text.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
        text.append("")
    return "\n".join(text)


def run(todo: list[str], rows: list[Found], args: argparse.Namespace) -> bool:
    """Add these rows to those of the file, one after the other; return whether one failed."""
    machine = gpu_rows.environment(args.cpu)
    return take_rows(
        {name: ROWS[name].weight for name in todo},
        lambda name, limit: attempt(name, args.cpu, limit),
        lambda name: {"what": ROWS[name].what, "cpu": args.cpu, **machine},
        rows,
        args.minutes,
        args.output,
    )


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all rows together")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--again", action="store_true", help="rows too that the file holds already")
    parser.add_argument("--cpu", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu.json"))
    parser.add_argument("--row", choices=ROWS, metavar="ROW", help="measure one row here and print it")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of such a file")
    args = parser.parse_args(words)
    if args.row:
        row = taken(partial(figures_of, args.row, args.cpu))
        print(json.dumps(row, indent=1))
        return int(row["status"] == "failed")
    file = args.table or args.output
    rows = read_json(file)["rows"] if args.table or file.exists() else []
    there = {row["row"] for row in rows if row["cpu"] == args.cpu and not args.again}
    failed = not args.table and run([name for name in args.only or ROWS if name not in there], rows, args)
    print(table(rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
