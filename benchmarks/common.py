"""Helpers of the benchmarks: the machine in words, the memory of this process, and rows in processes of their own."""

import multiprocessing
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from illada.errors import MissingExtraError, first_line
from illada.files import read_json, write_json

Found = dict[str, Any]
"""What became of a row: its status, the reason for it, its seconds, and what it measured."""


class NotHereError(Exception):
    """Something cannot be measured on this machine, which is no failure."""


def machine() -> str:
    """Return what timings depend on: torch, processor, threads and load."""
    return (
        f"torch {torch.__version__}, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}"
    )


def status(name: str) -> int:
    """Return a field of /proc/self/status in bytes: VmRSS (resident), VmHWM (its peak), RssAnon (not of files)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def taken(measure: Callable[[], Found]) -> Found:
    """Measure a row in this process; what it raises becomes the row."""
    started = time.perf_counter()
    row: Found = {"status": "measured", "reason": ""}
    try:
        row |= measure()
    except (NotHereError, ImportError, MissingExtraError) as error:
        row |= {"status": "not measured", "reason": first_line(error)}
    except Exception as error:
        traceback.print_exc()
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {first_line(error)}"}
    return row | {"seconds": time.perf_counter() - started}


def taken_into(file: Path, measure: Callable[[], Found]) -> None:
    """Measure a row in a process that was started for it; as head of a group it ends with all that it started."""
    os.setsid()
    with file.with_suffix(".log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    write_json(file, taken(measure))


def taken_apart(measure: Callable[[], Found], limit: float, start: str) -> Found:
    """Measure a row in a process of its own, for at most `limit` seconds; `start` is how the process begins."""
    context: Any = multiprocessing.get_context(start)
    with TemporaryDirectory() as folder:
        file, started = Path(folder) / "row.json", time.monotonic()
        process = context.Process(target=taken_into, args=(file, measure))
        process.start()
        try:
            process.join(limit)
            late = process.is_alive()
        finally:  # its children too: a row that crashed may have left a server behind
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
        log = file.with_suffix(".log")
        said = log.read_text(errors="replace")[-3000:] if log.exists() else ""
        if file.exists():
            row: Found = read_json(file)
        else:
            reason = f"ended after {limit:.0f} s" if late else f"the process ended with code {process.exitcode}"
            row = {"status": "failed", "reason": reason, "seconds": time.monotonic() - started}
    return row | ({"log": said} if row["status"] == "failed" else {})


def take_rows(
    weights: dict[str, float],
    take: Callable[[str, float], Found],
    about: Callable[[str], Found],
    rows: list[Found],
    minutes: float,
    output: Path,
) -> bool:
    """Take rows one after the other, each in its share of the minutes that are left; return whether one failed.

    Args:
        weights: shares of time by the names of the rows to take.
        take: measures the row of a name in so many seconds.
        about: what else belongs to the row of a name.
        rows: those of the file; the new ones are added.
        minutes: for all rows together.
        output: the file, written after every row.
    """
    until, failed = time.monotonic() + 60 * minutes, False
    output.parent.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(weights):
        share = weights[name] / sum(list(weights.values())[i:])
        found = take(name, max(1.0, share * (until - time.monotonic())))
        said = ": ".join(filter(None, (name, found["status"], found["reason"])))
        print(f"{said}, {found['seconds']:.0f} s", file=sys.stderr, flush=True)
        failed |= found["status"] == "failed"
        date = datetime.now(UTC).isoformat(timespec="seconds")
        rows.append({"row": name, **found, "date": date, **about(name)})
        write_json(output, {"rows": rows})
    return failed
