"""The log of a run: a JSON line for every step in metrics.jsonl, progress on the terminal, and the trackers."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from illada.files import naming, write_text
from illada.reporting import PLAIN_EVERY
from illada.weights.runs import read_metrics


class Tracker(Protocol):
    """Another place for the numbers of a run (see `optional.trackers`)."""

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Take the numbers of a step."""

    def close(self) -> None:
        """Finish."""


class StepLog:
    """Metrics file, terminal and trackers of one run; use as a context manager.

    On a terminal it draws a progress bar; elsewhere it prints a line every `PLAIN_EVERY` seconds. A quiet log, in every
    process but the first, does nothing.
    """

    def __init__(
        self, run: Path, title: str, total: int, done: int, quiet: bool = False, trackers: Sequence[Tracker] = ()
    ):
        self.path = run / "metrics.jsonl"
        self.title, self.done, self.quiet, self.trackers = title, done, quiet, trackers
        self.live = sys.stderr.isatty() and not quiet
        self._file: TextIO | None = None
        self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            console=Console(stderr=True, quiet=quiet),
            disable=not self.live,
        )
        self._task = self._bar.add_task(title, total=total, completed=done, text="")

    def __enter__(self) -> "StepLog":
        """Drop what a killed run wrote after its last checkpoint, then open the file."""
        self.rewind(self.done)
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Close the bar, the trackers and the file."""
        self._bar.stop()
        for tracker in self.trackers:
            tracker.close()
        if self._file is not None:
            with naming(self.path):  # what a full disk did not take is still to be written
                self._file.close()

    def rewind(self, step: int) -> None:
        """Drop the records of later steps."""
        if self.quiet:
            return
        if self._file is not None:
            self._file.close()
        records = [record for record in read_metrics(self.path) if record["step"] <= step]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in records))
        self._file = self.path.open("a")

    def write(self, step: int, **values: Any) -> None:
        """Append the record of a step."""
        if self._file is not None:
            with naming(self.path):
                self._file.write(json.dumps({"step": step, **values}) + "\n")
                self._file.flush()
        for tracker in self.trackers:
            tracker.log(step, values)

    def progress(self, done: int, total: int, text: str) -> None:
        """Show how far the run is."""
        if self.live:
            self._bar.update(self._task, completed=done, total=total, text=text)
        elif time.monotonic() - self._last_line >= PLAIN_EVERY or done == total:
            self._last_line = time.monotonic()
            self._print(f"{self.title} {done}/{total}  {text}")

    def say(self, *messages: str) -> None:
        """Print lines above the bar."""
        for message in messages:
            self._print(f"{self.title}: {message}")

    def _print(self, line: str) -> None:
        self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
