"""What a run says: a JSON line for every step in metrics.jsonl, a progress bar or plain lines on the terminal, and what
the trackers show.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from illada.training.trackers import Tracker
from illada.weights.runs import read_metrics


class Report:
    """Metrics file and terminal of one run; use as a context manager.

    On a terminal it draws a progress bar; elsewhere it prints a line every `plain_every` seconds. A quiet one, of the
    processes that are not the first, does nothing.
    """

    def __init__(
        self,
        run: Path,
        title: str,
        total: int,
        done: int,
        plain_every: float = 15.0,
        quiet: bool = False,
        trackers: Sequence[Tracker] = (),
    ):
        self.path = run / "metrics.jsonl"
        self.title, self.total, self.done, self.plain_every = title, total, done, plain_every
        self.quiet, self.trackers = quiet, trackers
        self.console = Console(stderr=True, quiet=quiet)
        self.live = sys.stderr.isatty() and not quiet
        self._last_line = time.monotonic()

    def __enter__(self) -> "Report":
        """Drop what a killed run wrote after its last checkpoint, then open the file."""
        self._file: TextIO | None = None
        self.rewind(self.done)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
        )
        self._bar.start()
        self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, text="")
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file and the bar."""
        self._bar.stop()
        for tracker in self.trackers:
            tracker.close()
        if self._file is not None:
            self._file.close()

    def rewind(self, step: int) -> None:
        """Drop the records of later steps."""
        if self.quiet:
            return
        if self._file is not None:
            self._file.close()
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        partial.rename(self.path)
        self._file = self.path.open("a")

    def log(self, step: int, **values: Any) -> None:
        """Append one record."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        for tracker in self.trackers:
            tracker.log(step, values)

    def progress(self, done: int, total: int, text: str) -> None:
        """Show how far the run is."""
        if self.live:
            self._bar.update(self._task, completed=done, total=total, text=text)
        elif not self.quiet and (time.monotonic() - self._last_line >= self.plain_every or done == total):
            self._last_line = time.monotonic()
            self.say(f"{self.title} {done}/{total}  {text}")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
