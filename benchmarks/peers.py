"""What do others need for the same work? Every peer whose path is given runs beside ours, in one table.

    OMP_NUM_THREADS=1 python benchmarks/peers.py --model DEMO_MODEL [--authors CHECKOUT] [--fast_dllm CHECKOUT]
        [--dinfer CHECKOUT] [--dllm CHECKOUT --dllm_python PYTHON] [--llama_cpp PYTHON] [--only PEER ...]
        [--minutes 20] [--output runs/peers.json]

Their files are run as they are, on the same weights: LLaDA's generate.py and get_log_likelihood.py, the loops of
Fast-dLLM and the decoders of dInfer on our network (`illada bench generate --outside`), dllm's trainers in a Python
that has what they pin, llama.cpp in one that has llama-cpp-python. (benchmarks/generate.py, trainer.py and rl_step.py
say more of some of them.) Each peer has a process of its own and a share of the minutes that are left; whatever happens
to it becomes its row. The file is written after every peer, and the table holds the latest of each that it has. Seconds
are those of the processor. Exit code 1 when a peer of this run failed.
"""

import argparse
import os
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import peers_rows
from common import Found, machine, take_rows, taken_apart

from illada.files import read_json
from illada.reporting import commit


class Peer(NamedTuple):
    """A peer; `row_NAME` in peers_rows.py runs it."""

    weight: float
    """Its share of the time, in any unit."""
    title: str
    options: str
    """Those that name it on the command line."""
    files: tuple[str, ...] = ()
    """What its checkout must hold."""


PEERS = {
    "authors": Peer(2, "LLaDA's code", "--authors CHECKOUT", ("generate.py", "get_log_likelihood.py")),
    "fast_dllm": Peer(2, "Fast-dLLM", "--fast_dllm CHECKOUT", ("llada/generate.py",)),
    "dinfer": Peer(2, "dInfer", "--dinfer CHECKOUT", ("python/dinfer/decoding",)),
    "dllm": Peer(4, "dllm", "--dllm CHECKOUT --dllm_python PYTHON", ("dllm/core/trainers/mdlm.py",)),
    "llama_cpp": Peer(6, "llama.cpp", "--llama_cpp PYTHON"),
}


def lines_of(name: str, args: argparse.Namespace) -> Found:
    """Run a peer beside ours."""
    return {"lines": getattr(peers_rows, f"row_{name}")(args)}


def seconds(times: list[float]) -> str:
    """Return the median and the range of the rounds."""
    return f"{statistics.median(times):.3g} ({min(times):.3g} to {max(times):.3g})"


def table(rows: list[Found]) -> str:
    """Return the latest of each peer in Markdown, a line for each thing that is done, and where it was measured."""
    latest = {row["row"]: row for row in rows}
    text = ["| peer | what is done | theirs, s | ours, s | theirs / ours | agreement |", "|---|---|---:|---:|---:|---|"]
    for name, peer in PEERS.items():
        row = latest.get(name, {"status": "not run", "reason": peer.options})
        if row["status"] == "measured":
            for i, one in enumerate(row["lines"]):
                cells = [peer.title if i == 0 else "", one["what"], seconds(one["theirs"]), seconds(one["ours"])]
                text.append("| " + " | ".join([*cells, f"{one['ratio']:.2f}", one["agree"]]) + " |")
        else:
            said = f"{row['status']}: {row['reason']}".replace("|", "/").replace("\n", " ")
            text.append(f"| {peer.title} | {said} | | | | |")
    where = dict.fromkeys(f"{row['machine']}, commit {(row['commit'] or 'unknown')[:7]}" for row in latest.values())
    rounds = sorted({row["rounds"] for row in latest.values()})
    words = f"Medians of {' or '.join(map(str, rounds))} rounds in turns (least to most). " if rounds else ""
    return "\n".join([*text, "", words + "; ".join(where)])


def refused(args: argparse.Namespace) -> str | None:
    """Return why the paths cannot be used, or None."""
    if not (Path(args.model) / "config.json").is_file():
        return f"--model {args.model} holds no config.json: give a model's folder"
    if (args.dllm is None) != (args.dllm_python is None):
        return "--dllm CHECKOUT and --dllm_python PYTHON go together"
    for name, peer in PEERS.items():
        path = getattr(args, name)
        if missing := [file for file in peer.files if path is not None and not (Path(path) / file).exists()]:
            return f"--{name} {path} holds no {missing[0]}: give a checkout"
    for name in ("dllm_python", "llama_cpp"):
        path = getattr(args, name)
        if path is not None and not os.access(path, os.X_OK):
            return f"--{name} {path} is no program: give a Python interpreter"
    counts = {name: getattr(args, name) for name in ("limit", "rounds", "passes", "layers")}
    return next((f"--{name} must be at least 1, got {count}" for name, count in counts.items() if count < 1), None)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a trained demo's model folder")
    parser.add_argument("--authors", help="checkout of ML-GSAI/LLaDA")
    parser.add_argument("--fast_dllm", help="checkout of NVlabs/Fast-dLLM; its model code needs einops")
    parser.add_argument("--dinfer", help="checkout of inclusionAI/dInfer")
    parser.add_argument("--dllm", help="checkout of dllm")
    parser.add_argument("--dllm_python", help="interpreter with what dllm and its GRPO trainer need")
    parser.add_argument("--llama_cpp", help="interpreter with llama-cpp-python")
    parser.add_argument("--only", nargs="+", choices=PEERS, metavar="PEER", help=f"some of {', '.join(PEERS)}")
    parser.add_argument("--minutes", type=float, default=20.0, help="for all peers together")
    parser.add_argument("--output", type=Path, default=Path("runs/peers.json"))
    parser.add_argument("--limit", type=int, default=42, help="problems to answer and to score")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=3, help="in each round of llama.cpp's")
    parser.add_argument("--shape", default="illada-8b", help="preset whose layers llama.cpp is compared on")
    parser.add_argument("--layers", type=int, default=2, help="of that shape")
    parser.add_argument("--preset", default="15m", help="shape that dllm trains")
    args = parser.parse_args(words)
    if reason := refused(args):
        print(f"peers.py: {reason}", file=sys.stderr)
        return 2
    rows: list[Found] = read_json(args.output).get("rows", []) if args.output.exists() else []
    todo = {name: PEERS[name].weight for name in args.only or PEERS if getattr(args, name) is not None}
    about = {"machine": machine(), "commit": commit(), "rounds": args.rounds}
    # A fork spares the imports; nothing has started threads or a GPU here.
    failed = take_rows(
        todo,
        lambda name, limit: taken_apart(partial(lines_of, name, args), limit, "fork"),
        lambda name: about,
        rows,
        args.minutes,
        args.output,
    )
    print(table(rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
