"""The journal of an evaluation: results go to disk as they come, so that a killed evaluation continues there."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from illada.errors import IlladaError
from illada.files import parse_json
from illada.weights import adapters
from illada.weights.runs import model_folder

OF_TRAINING = ("state.json", "optimizer.safetensors")
PIECES, PIECE_BYTES = 64, 4096
"""A fingerprint takes the header of a file of weights and so many pieces, spread evenly over the file."""


@dataclass(frozen=True)
class Entry:
    """The result of one request."""

    key: str
    value: list[Any]
    """[score, whether greedy generation gives the candidate] or [text]."""
    forwards: int
    """Forward passes of this row; a pass that it shared with other rows counts in full."""
    seconds: float
    """Equal share of the time of the requests that were computed together."""


def _is_whole(entry: Entry) -> bool:
    """Say whether every part of an entry from a file is of its type."""
    answer = [type(part) for part in entry.value] if isinstance(entry.value, list) else []
    return (
        isinstance(entry.key, str)
        and answer in ([str], [float], [int], [float, bool], [int, bool])
        and type(entry.forwards) is int
        and type(entry.seconds) in (int, float)
        and min(entry.forwards, entry.seconds) >= 0
    )


class Journal:
    """Keeps results by key, and appends them to a file.

    A line holds the results of requests that finished together, so the file has all of them or none; a line torn by a
    crash is cut off.

    Args:
        folder: folder of the files `requests.RANK.jsonl`; all are read and this rank's is written. None writes nothing.
        rank: rank of this process.

    Raises:
        IlladaError: when a file holds something else.
    """

    def __init__(self, folder: str | Path | None, rank: int = 0):
        self.entries: dict[str, Entry] = {}
        self.path = None if folder is None else Path(folder) / f"requests.{rank}.jsonl"
        if self.path is None:
            return
        for path in sorted(self.path.parent.glob("requests.*.jsonl")):
            whole = self._read(path)
            if path == self.path:
                with path.open("r+b") as file:
                    file.truncate(whole)

    def _read(self, path: Path) -> int:
        """Read a file; return where its last whole line ends."""
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                entries = [Entry(**record) for record in parse_json(line.decode())]
                if not all(map(_is_whole, entries)):
                    raise TypeError("a part is of another type")
            except (ValueError, TypeError) as error:
                raise IlladaError(f"{path} line {number} is damaged: delete the file to evaluate anew") from error
            self.entries |= {entry.key: entry for entry in entries}
        return whole

    def add(self, entries: list[Entry]) -> None:
        """Keep results of requests that finished together."""
        self.entries |= {entry.key: entry for entry in entries}
        if self.path is not None and entries:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write((json.dumps([asdict(entry) for entry in entries]) + "\n").encode())


def fingerprint(model: str) -> str:
    """Return a short hash that tells models apart, of all small files and of pieces of every file of weights.

    Pieces suffice because training changes every tensor; hashing a model of 16 GB in full would take a minute.
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
