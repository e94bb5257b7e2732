"""A command of the user's on every checkpoint, in a process of its own beside the training, which never waits."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from threading import Lock
from types import TracebackType

from illada.errors import IlladaError


def words_of(command: str, run: Path, checkpoint: Path) -> list[str]:
    """Return the words of a command with {run}, {checkpoint} and {step} filled in.

    Raises:
        IlladaError: when they cannot be.
    """
    step = checkpoint.name.removeprefix("step-").lstrip("0") or "0"
    try:
        return [word.format(run=run, checkpoint=checkpoint, step=step) for word in shlex.split(command)]
    except (KeyError, IndexError, ValueError) as error:
        raise IlladaError(
            f"log.evaluate cannot be filled in ({error!r}): it may hold {{run}}, {{checkpoint}} and {{step}}"
        ) from None


class Evaluations:
    """Runs the command on one checkpoint at a time; one that comes while another is looked at is passed over.

    What the command prints goes to evaluations/step-N.log in the run folder. It is no part of torchrun's group.

    Raises:
        IlladaError: when there is no such command.
    """

    def __init__(self, run: Path, command: str | None):
        self.run, self.command = run, command
        self.held: Path | None = None
        """The checkpoint that is being looked at: not to be deleted."""
        self._process: subprocess.Popen[bytes] | None = None
        self._ended: list[str] = []
        # Checkpoints are announced by the thread that writes them, news are asked for by the training.
        self._lock = Lock()
        if command is not None:
            words = words_of(command, run, Path("step-0"))
            if not words or shutil.which(words[0]) is None:
                raise IlladaError(f"log.evaluate: there is no command {words[0] if words else command!r}")

    def begin(self, checkpoint: Path) -> None:
        """Look at a checkpoint, unless another one still is."""
        self._collect()
        if self.command is None:
            return
        folder = self.run / "evaluations"
        folder.mkdir(exist_ok=True)
        outside = {name: value for name, value in os.environ.items() if name not in _OF_TORCHRUN}
        words = words_of(self.command, self.run, checkpoint)
        with self._lock:
            if self._process is not None:
                return
            with (folder / f"{checkpoint.name}.log").open("wb") as log:
                self._process = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=outside
                )
            self.held = checkpoint

    def news(self) -> list[str]:
        """Return a line about each evaluation that has ended since this was last asked."""
        self._collect()
        with self._lock:
            said, self._ended = self._ended, []
        return said

    def finish(self, last: Path) -> list[str]:
        """Wait for what is under way, look at the last checkpoint if nobody has, and say how they ended."""
        for _ in range(2):
            if self._process is not None:
                self._process.wait()
                self._collect()
            if self.command is not None and not (self.run / "evaluations" / f"{last.name}.log").exists():
                self.begin(last)
        return self.news()

    def _collect(self) -> None:
        with self._lock:
            if self._process is None or self._process.poll() is None or self.held is None:
                return
            code, name = self._process.returncode, self.held.name
            self._process, self.held = None, None
            how = "done" if code == 0 else f"failed with code {code}"
            self._ended.append(f"evaluation of {name} {how}: {self.run / 'evaluations' / name}.log")

    def __enter__(self) -> "Evaluations":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what is still under way: the run was stopped."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()


_OF_TORCHRUN = {
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip
