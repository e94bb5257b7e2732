"""Prepared data at any place that fsspec reaches (s3://, gs://, hf://, memory://, ...).

The tokens stay where they are and are read by byte ranges, all ranges of a request together; the few small files
(index, tokenizer, document ends) are copied into the local cache when they are first used.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from fsspec.core import url_to_fs  # type: ignore[import-untyped]
from xxhash import xxh3_128

from illada.data.storage import Folder, Range
from illada.errors import DamagedError, IlladaError, first_line
from illada.folders import SUMS, read_sums
from illada.hub import network

_EXTRAS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}


class Remote:
    """A folder that fsspec reaches.

    Raises:
        IlladaError: when the library for its protocol is not installed, or the place cannot be read.
    """

    def __init__(self, url: str):
        self.name = url.rstrip("/")
        protocol = url.split("://", 1)[0]
        try:
            with network():
                self._files, self._root = url_to_fs(self.name)
        except ImportError:
            extra = _EXTRAS.get(protocol, protocol)
            raise IlladaError(f"reading {protocol}:// needs {extra}: pip install {extra}") from None
        except ValueError:
            raise IlladaError(f"{url}: nothing is known that reads {protocol}://") from None
        index = self._bytes("index.json") if self.exists() and "index.json" in self.sizes() else b""
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "illada"
        # Data that was prepared again gets a new folder in the cache.
        self.path = base / hashlib.sha256(self.name.encode() + b"\0" + index).hexdigest()[:20]
        self._sums: dict[str, str] = {}
        if index:
            if SUMS in self.sizes():
                self._copy(SUMS, self._bytes(SUMS))
                self._sums = read_sums(self.path)
            self._copy("index.json", index)
            for file in self._names(f"{self._root}/tokenizer"):
                self._fetch(f"tokenizer/{file}")

    def exists(self) -> bool:
        """Say whether anything is there."""
        with self._reading():
            return self._files.exists(self._root)

    def sizes(self) -> dict[str, int]:
        """Return the size of every file in bytes."""
        return self._names(self._root)

    def text(self, file: str) -> str:
        """Return the contents of a small file; FileNotFoundError when there is none."""
        return Folder(self.path).text(file)

    def whole(self, file: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return a small file as an array, from its copy in the cache.

        Raises:
            IlladaError: when it cannot be read.
        """
        self._fetch(file)
        return Folder(self.path).whole(file, dtype)

    def pieces(self, ranges: Sequence[Range], dtype: np.dtype[Any]) -> list[npt.NDArray[Any]]:
        """Return ranges of files, all requested together.

        Raises:
            IlladaError: when one cannot be read.
        """
        size = dtype.itemsize
        with self._reading():
            contents: list[bytes] = self._files.cat_ranges(
                [f"{self._root}/{file}" for file, _, _ in ranges],
                [start * size for _, start, _ in ranges],
                [end * size for _, _, end in ranges],
                on_error="raise",
            )
        for (file, start, end), content in zip(ranges, contents, strict=True):
            if len(content) != (end - start) * size:
                raise IlladaError(f"{self.name}/{file} is shorter than it was: prepare or copy the data again")
        return [np.frombuffer(content, dtype=dtype) for content in contents]

    def _names(self, folder: str) -> dict[str, int]:
        with self._reading():
            if not self._files.exists(folder):
                return {}
            entries = self._files.ls(folder, detail=True)
        return {entry["name"].rsplit("/", 1)[-1]: int(entry["size"]) for entry in entries if entry["type"] == "file"}

    def _bytes(self, file: str) -> bytes:
        with self._reading():
            return self._files.cat_file(f"{self._root}/{file}")

    def _fetch(self, file: str) -> None:
        if not (self.path / file).exists():
            self._copy(file, self._bytes(file))

    def _copy(self, file: str, content: bytes) -> None:
        """Write a file into the cache, whole or not at all, because other processes may do the same meanwhile.

        Raises:
            DamagedError: when the data set has another checksum for the file.
        """
        digest = xxh3_128(content).hexdigest()
        if digest != self._sums.get(file, digest):
            raise DamagedError(f"{self.name}/{file} is damaged: copy the whole folder again, or prepare the data again")
        target = self.path / file
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        partial.write_bytes(content)
        os.replace(partial, target)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn the errors of storage libraries into one line, and allow the network, as the user named the place."""
        try:
            with network():
                yield
        except IlladaError:
            raise
        except Exception as error:  # every storage library has errors of its own
            raise IlladaError(f"cannot read {self.name}: {first_line(error)}") from error
