"""Runs a user command on each checkpoint in a separate process; training never waits for it."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from threading import Lock

from illada.errors import IlladaError


def fill_in(command: str, run: Path, checkpoint: Path) -> list[str]:
    """Return the words of a command with {run}, {checkpoint} and {step} filled in.

    Raises:
        IlladaError: when the command holds other fields.
    """
    step = checkpoint.name.removeprefix("step-").lstrip("0") or "0"
    try:
        return [word.format(run=run, checkpoint=checkpoint, step=step) for word in shlex.split(command)]
    except (KeyError, IndexError, ValueError) as error:
        raise IlladaError(
            f"log.evaluate cannot be filled in ({error!r}): it may hold {{run}}, {{checkpoint}} and {{step}}"
        ) from None


class CheckpointHook:
    """Runs the command on one checkpoint at a time; a checkpoint that comes while it still runs is passed over.

    What the command prints goes to evaluations/step-N.log in the run folder. The process does not belong to torchrun's
    group. Leaving the context ends a command that still runs, because the run was stopped.

    Raises:
        IlladaError: when there is no such command.
    """

    def __init__(self, run: Path, command: str | None):
        self.run, self.command = run, command
        self.current: Path | None = None
        """The checkpoint on which the command runs: not to be deleted."""
        self._process: subprocess.Popen[bytes] | None = None
        self._messages: list[str] = []
        # The thread that writes checkpoints begins commands, the training thread collects the messages.
        self._lock = Lock()
        if command is not None:
            words = fill_in(command, run, Path("step-0"))
            if not words or shutil.which(words[0]) is None:
                raise IlladaError(f"log.evaluate: there is no command {words[0] if words else command!r}")

    def begin(self, checkpoint: Path) -> Path | None:
        """Run the command on a checkpoint, unless it still runs on another; return the checkpoint on which it runs."""
        self._collect()
        if self.command is None:
            return None
        folder = self.run / "evaluations"
        folder.mkdir(exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name not in _OF_TORCHRUN}
        words = fill_in(self.command, self.run, checkpoint)
        with self._lock:
            if self._process is None:
                with (folder / f"{checkpoint.name}.log").open("wb") as log:
                    self._process = subprocess.Popen(
                        words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
                    )
                self.current = checkpoint
            return self.current

    def messages(self) -> list[str]:
        """Return a line about each command that has ended since the last call."""
        self._collect()
        with self._lock:
            messages, self._messages = self._messages, []
        return messages

    def finish(self, last: Path) -> list[str]:
        """Wait for a running command, run it on the last checkpoint if that was passed over, and return `messages`."""
        for _ in range(2):
            if self._process is not None:
                self._process.wait()
                self._collect()
            if self.command is not None and not (self.run / "evaluations" / f"{last.name}.log").exists():
                self.begin(last)
        return self.messages()

    def _collect(self) -> None:
        with self._lock:
            if self._process is None or self._process.poll() is None or self.current is None:
                return
            code, name = self._process.returncode, self.current.name
            self._process, self.current = None, None
            end = "done" if code == 0 else f"failed with code {code}"
            self._messages.append(f"evaluation of {name} {end}: {self.run / 'evaluations' / name}.log")

    def __enter__(self) -> "CheckpointHook":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()


_OF_TORCHRUN = {
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip
