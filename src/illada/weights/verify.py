"""`illada verify`: says which folders of a run, a data set or a model are as they were written."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from illada.errors import IlladaError
from illada.folders import SUMS, damage, read_sums
from illada.weights import adapters
from illada.weights.runs import PUT_ASIDE, RECIPE, STATE, read_metrics, read_recipe

_OURS = (STATE, "index.json", "config.json", adapters.CONFIG, "tokenizer.json")
"""Files that show that a folder is a checkpoint, data, a model or a tokenizer."""


@dataclass(frozen=True)
class Finding:
    """What was found in a folder."""

    folder: Path
    state: Literal["whole", "damaged", "put aside", "no checksums"]
    files: int
    """Files that have a checksum."""
    faults: list[str]
    """A line about each file that is not as it was written."""


def verify(place: str) -> Iterator[Finding]:
    """Check all that has a checksum in and below a folder, and yield what was found, folder by folder.

    Raises:
        IlladaError: when there is no such folder, or nothing in it that could be checked.
    """
    top = Path(place)
    if not top.is_dir():
        raise IlladaError(f"no folder {place}: give the folder of a run, of prepared data or of a model")
    found = sorted({path.parent for name in (SUMS, *_OURS) for path in top.rglob(name)})
    folders: list[Path] = []
    for folder in found:
        inside = folder.relative_to(top).parts
        part = folders and folder.is_relative_to(folders[-1]) and not (folder / SUMS).exists()
        if not part and not any(name.startswith(".") or name == "work" for name in inside):
            folders.append(folder)
    if not folders:
        raise IlladaError(f"{place} holds no run, no prepared data and no model: there is nothing to check")
    for folder in folders:
        yield _look(folder)
    yield from _texts(top)


def _look(folder: Path) -> Finding:
    """Check a folder's files."""
    if folder.name.startswith(PUT_ASIDE):
        return Finding(folder, "put aside", 0, [])
    if not (folder / SUMS).exists():
        return Finding(folder, "no checksums", 0, [])
    faults = damage(folder)
    return Finding(folder, "damaged" if faults else "whole", 0 if faults else len(read_sums(folder)), faults)


def _texts(run: Path) -> Iterator[Finding]:
    """Read what grows or may be edited in the folder of a run, and has no checksum for that reason."""
    if not (run / RECIPE).is_file():
        return
    faults = []
    for read, name in ((read_recipe, RECIPE), (read_metrics, "metrics.jsonl")):
        try:
            read(run / name)
        except IlladaError as error:
            faults.append(str(error))
    if faults:
        yield Finding(run, "damaged", 0, faults)
