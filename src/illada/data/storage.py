"""The files of a prepared data set in a folder of this machine, memory-mapped."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from illada.errors import IlladaError

# Every map keeps a file open, and a process may open few.
_OPEN_MAPS = 128

Range = tuple[str, int, int]
"""File, first item, and the item after the last one."""


class Folder:
    """A folder of this machine; `illada.data.optional.remote.Remote` has the same methods for other places."""

    def __init__(self, path: Path):
        self.path = path
        self.name = str(path)
        self._maps: dict[tuple[str, str], npt.NDArray[Any]] = {}

    def exists(self) -> bool:
        """Say whether the folder is there."""
        return self.path.is_dir()

    def sizes(self) -> dict[str, int]:
        """Return the size of every file in bytes."""
        return {entry.name: entry.stat().st_size for entry in os.scandir(self.path) if entry.is_file()}

    def text(self, file: str) -> str:
        """Return the contents of a small file; FileNotFoundError when there is none."""
        return (self.path / file).read_text(encoding="utf-8")

    def whole(self, file: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return a file as a memory-mapped array.

        Raises:
            IlladaError: when it cannot be read.
        """
        mapped = self._maps.pop((file, dtype.str), None)
        if mapped is None:
            if len(self._maps) >= _OPEN_MAPS:
                del self._maps[next(iter(self._maps))]
            try:
                # A plain view: indexing a memmap subclass is several times slower.
                mapped = np.memmap(self.path / file, dtype=dtype, mode="r").view(np.ndarray)
            except (OSError, ValueError) as error:
                raise IlladaError(f"cannot read {self.path / file} ({error}): prepare the data again") from None
        self._maps[file, dtype.str] = mapped  # last = most recently used
        return mapped

    def pieces(self, ranges: Sequence[Range], dtype: np.dtype[Any]) -> list[npt.NDArray[Any]]:
        """Return ranges of files."""
        return [self.whole(file, dtype)[start:end] for file, start, end in ranges]

    def __getstate__(self) -> dict[str, Any]:
        """Pickle no maps, because a pickled map is a copy of the file."""
        return {**self.__dict__, "_maps": {}}
