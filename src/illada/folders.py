"""Folders that are whole or absent: on the disk before they can be seen, with checksums of their files.

The checksums stand in `XXH128SUMS`, a line for each file, as the program `xxhsum` writes and checks them. They find
what chance does to files (a flipped bit, a block of zeros, half a copy), not what an attacker does.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from xxhash import xxh3_128

from illada.errors import DamagedError, IlladaError, first_line
from illada.files import read_text, write_text

SUMS = "XXH128SUMS"
_PIECE = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


def partial_path(target: Path) -> Path:
    """Return the name under which `new_folder` and `new_file` write."""
    return target.with_name(f".{target.name}.partial")


def remove_partial(target: Path) -> None:
    """Delete what a killed process left of a file or folder."""
    with suppress(OSError):
        partial_path(target).unlink()
    shutil.rmtree(partial_path(target), ignore_errors=True)


@contextmanager
def new_folder(target: Path, into_existing: bool = False) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `target` at the end; an error deletes it and the parents made for it.

    At the end its files get checksums, and the disk has all of them before the folder can be seen.

    Args:
        target: the folder to make.
        into_existing: where `target` exists, move the files into it one by one, in place of those of the same names.

    Raises:
        IlladaError: when the disk is full, or the folder cannot be written for another reason.
    """
    with _all_or_nothing(target) as partial:
        partial.mkdir(parents=True)
        yield partial
        seal(partial)
        if into_existing and target.exists():
            # The checksums come last: until then they say that the folder is damaged.
            for path in sorted(partial.iterdir(), key=lambda path: path.name == SUMS):
                path.replace(target / path.name)
            partial.rmdir()
            sync(target)
        else:
            partial.rename(target)


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yield the path of a file to write, which becomes `target` when the disk has it; errors as in `new_folder`."""
    with _all_or_nothing(target) as partial:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        sync(partial)
        partial.rename(target)


@contextmanager
def _all_or_nothing(target: Path) -> Iterator[Path]:
    """Yield the partial path of a file or folder; an error deletes what is there, and the parents made for it."""
    partial = partial_path(target)
    new_parents = [path for path in target.parents if not path.exists()]
    remove_partial(target)
    try:
        yield partial
        for parent in (target.parent, *(path.parent for path in new_parents)):
            sync(parent)
    except BaseException as error:
        remove_partial(target)
        for path in new_parents:
            with suppress(OSError):
                path.rmdir()
        if is_full(error):
            raise IlladaError(
                f"no room for {target}: the disk is full: free some or choose another --output; nothing was left behind"
            ) from error
        if isinstance(error, OSError):
            raise IlladaError(f"{target} cannot be written: {first_line(error)}") from error
        raise


def is_full(error: BaseException) -> bool:
    """Say whether an error means that a disk or a quota is full."""
    # Libraries in Rust name the cause in their text only.
    named = isinstance(error, Exception) and not isinstance(error, IlladaError)
    texts = tuple(f"os error {number})" for number in _FULL)
    return named and (getattr(error, "errno", None) in _FULL or any(text in str(error) for text in texts))


def sync(path: Path) -> None:
    """Return when the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """Return the checksum of a file: XXH3, 128 bits, as hexadecimal digits."""
    digest, piece = xxh3_128(), memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


def seal(folder: Path, known: Mapping[str, str] | None = None, choose: Callable[[str], bool] = lambda _: True) -> None:
    """Write the checksums of the files in and below a folder into it, and return when the disk has everything.

    Args:
        folder: the folder, complete.
        known: checksums by name of files that the disk has already, or will have.
        choose: says which of the other files belong to the folder, by name.
    """
    sums, inside = dict(known or {}), {folder}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != SUMS and name not in sums and choose(name):
            sync(path)
            sums[name] = checksum(path)
            inside |= {parent for parent in path.parents if parent.is_relative_to(folder)}
    write_text(folder / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
    for path in inside:
        sync(path)


def read_sums(folder: Path) -> dict[str, str]:
    """Return the checksums that a folder keeps, by name; an empty dict where it keeps none.

    Raises:
        DamagedError: when the file of checksums is no such file.
    """
    path, sums = folder / SUMS, {}
    if not path.exists():
        return {}
    try:
        lines = read_text(path).splitlines()
    except IlladaError as error:
        raise DamagedError(str(error)) from error
    for line in lines:
        match = re.fullmatch(r"([0-9a-f]{32})  (\S.*)", line)
        if match is None or match[2].startswith("/") or ".." in match[2].split("/"):
            raise DamagedError(f"{path} is damaged: {line[:60]!r} is no checksum of a file in the folder")
        sums[match[2]] = match[1]
    if not sums:
        raise DamagedError(f"{path} is damaged: it is empty")
    return sums


def damage(folder: Path, choose: Callable[[str], bool] = lambda _: True, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Return a line about each file in a folder that is not as it was written; without checksums there is none.

    Args:
        folder: a folder that may keep checksums.
        choose: says which files to look at, by name.
        share: which share of the files to look at, and how many shares there are.
    """
    try:
        sums = read_sums(folder)
    except DamagedError as error:
        return [str(error)]

    def look(name: str) -> str | None:
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        try:
            same = checksum(path) == sums[name]
        except OSError as error:
            return f"{path} cannot be read ({first_line(error)})"
        return None if same else f"{path} is damaged: its checksum is another than when it was written"

    names = [name for name in sorted(sums) if choose(name)][share[0] :: share[1]]
    with ThreadPoolExecutor(4) as threads:
        return [line for line in threads.map(look, names) if line is not None]
