"""Small files: whole or absent when written; one clear line of error when they cannot be read."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from illada.errors import IlladaError, first_line


def read_lines(file: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, line) of a UTF-8 text file, empty lines left out.

    Raises:
        IlladaError: when the file is missing, is not text or is empty.
    """
    path = Path(file)
    if not path.is_file():
        raise IlladaError(f"no file {file}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise IlladaError(f"{file} is not UTF-8 text: {error}") from error
    if not any(line.strip() for line in lines):
        raise IlladaError(f"{file} is empty")
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, line


def parse_json(text: str) -> Any:
    """Return what a JSON text holds; raise ValueError for what is none, too deep, or half of a surrogate pair."""
    try:
        values = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(values, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return values


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        IlladaError: when it cannot be read or holds something else.
    """
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IlladaError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise IlladaError(f"{path} cannot be read: it is no JSON object")
    return values


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file so that it is whole or absent, whatever happens meanwhile."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file so that it is whole or absent, whatever happens meanwhile; lone surrogates become "?"."""
    write_bytes(path, text.encode("utf-8", "replace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is whole or absent, whatever happens meanwhile; return when the disk has it."""
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def partial_path(target: Path) -> Path:
    """Return the name under which `new_folder` fills a folder."""
    return target.with_name(f".{target.name}.partial")


@contextmanager
def new_folder(target: Path, into_existing: bool = False) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `target` at the end; an error deletes it and the parents made for it.

    Args:
        target: the folder to make.
        into_existing: where `target` exists, move the files into it one by one, in place of those of the same names.
    """
    partial = partial_path(target)
    new_parents = [path for path in target.parents if not path.exists()]
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if into_existing and target.exists():
            for path in partial.iterdir():
                path.replace(target / path.name)
            partial.rmdir()
        else:
            partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for path in new_parents:
            with suppress(OSError):
                path.rmdir()
        raise
