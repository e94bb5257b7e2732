"""Small files: whole or absent when written; one clear line of error when they cannot be read."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from illada.errors import IlladaError, first_line


def read_lines(file: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, line) of a UTF-8 text file, empty lines left out.

    Raises:
        IlladaError: when the file is missing, is not text or is empty.
    """
    if not Path(file).is_file():
        raise IlladaError(f"no file {file}")
    lines = read_text(Path(file)).splitlines()
    if not any(line.strip() for line in lines):
        raise IlladaError(f"{file} is empty")
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, line


def read_text(path: Path) -> str:
    """Return the contents of a UTF-8 text file.

    Raises:
        IlladaError: when it is not text.
        OSError: when it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise IlladaError(f"{path} is not UTF-8 text: {error}") from error


def parse_json(text: str) -> Any:
    """Return what a JSON text holds; raise ValueError for what is none, too deep, or half of a surrogate pair."""
    try:
        values = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(values, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return values


DEEPEST = 100
"""Levels of a YAML text: the loaders call themselves for each, and libyaml's ends the process after thousands."""


def check_yaml(text: str, aliases: bool = False) -> None:
    """Raise YAMLError for a text that is no YAML, nests deeper than `DEEPEST`, or has aliases, which can grow, unless
    `aliases` allows them."""
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.YAMLError(f"it nests more than {DEEPEST} levels")
        if not aliases and isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"it refers to *{event.anchor}: write the value itself")


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
    try:
        with naming(path), open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the system that names no file, as that of a full disk, name this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
