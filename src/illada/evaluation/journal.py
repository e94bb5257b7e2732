"""What an evaluation has found out so far: answers on disk as they come, so that a killed run goes on where it was."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from illada.errors import IlladaError
from illada.weights import adapters
from illada.weights.runs import model_folder

OF_TRAINING = ("state.json", "optimizer.safetensors")
PIECES, PIECE_BYTES = 64, 4096
"""How much of a file of weights goes into a fingerprint: these many pieces, spread evenly, after its header."""


@dataclass(frozen=True)
class Found:
    """The result of one request."""

    key: str
    value: list[Any]
    """[score, whether the model would say it] or [text]."""
    forwards: int
    """Forward passes of this row; those that it shared with others count in full."""
    seconds: float
    """Its equal share of the time of the job it was part of."""


class Journal:
    """Results by key, and a file that they are appended to.

    A line holds what was finished together, so either all of it is there or none; a line torn by a crash is cut off.

    Args:
        folder: where `requests.RANK.jsonl` lie; those of all ranks are read, one is written. None keeps nothing.
        rank: of this process.

    Raises:
        IlladaError: when a file holds something else.
    """

    def __init__(self, folder: str | Path | None, rank: int = 0):
        self.found: dict[str, Found] = {}
        self.path = None if folder is None else Path(folder) / f"requests.{rank}.jsonl"
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.path.parent.glob("requests.*.jsonl")):
            whole = self._read(path)
            if path == self.path:
                with path.open("r+b") as file:
                    file.truncate(whole)

    def _read(self, path: Path) -> int:
        """Take in a file; return where its last whole line ends."""
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                found = [Found(**record) for record in json.loads(line)]
            except (ValueError, TypeError) as error:
                raise IlladaError(f"{path} line {number} is damaged: delete the file to evaluate anew") from error
            self.found |= {one.key: one for one in found}
        return whole

    def add(self, found: list[Found]) -> None:
        """Keep results that were finished together."""
        self.found |= {one.key: one for one in found}
        if self.path is not None and found:
            with self.path.open("ab") as file:
                file.write((json.dumps([asdict(one) for one in found]) + "\n").encode())


def fingerprint(model: str) -> str:
    """Return a short hash that tells models apart: of all small files and of samples from every file of weights.

    Sampling suffices because training changes every tensor; a model of 16 GB would take a minute to hash in full.
    """
    folder = model_folder(model)
    digest = hashlib.sha256()
    if not (folder / "config.json").is_file():
        digest.update(fingerprint(adapters.adapter_base(folder)).encode())
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".jinja", ".txt", ".safetensors") or path.name in OF_TRAINING:
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if path.suffix != ".safetensors":
                digest.update(file.read())
                continue
            header = file.read(8)
            digest.update(header + file.read(min(size, int.from_bytes(header, "little"))))
            for piece in range(PIECES):
                file.seek(size * piece // PIECES)
                digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()[:16]


def request_key(*parts: object) -> str:
    """Return the key of a request: a hash of the model, the task, the settings and the request itself."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]
