"""Token shards: what a prepared data set looks like on disk, and how to read and write it (format ours).

A prepared folder holds `index.json` (written last: without it the folder is not a data set) and, for each shard,

* `shard-00000.tokens`: the ids of its documents, one after another, little-endian uint16 (uint32 above 65536 ids);
* `shard-00000.documents`: little-endian int64 [documents, 2]: where each document ends inside the shard (exclusive)
  and how many prompt tokens stand at its start (0 for plain text).

Raw arrays, so they are memory-mapped, never parsed. A document never crosses a shard.
"""

import json
import os
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from illada.errors import IlladaError

FORMAT_VERSION = 1
INDEX = "index.json"
TOKENS_PER_SHARD = 1 << 27

# A process may hold few files open, and a map holds one.
_MAPS_HELD = 128
# Beyond this many documents their ends are checked shard by shard on first use, not all when the data set is opened.
_DOCUMENTS_CHECKED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class ShardInfo:
    """One shard: file name without suffix, and how many tokens, documents and UTF-8 bytes of source text it holds."""

    name: str
    tokens: int
    documents: int
    bytes: int


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type in which ids below `vocab_size` are stored."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class Shards:
    """A prepared data set, read as one stream of tokens: the documents of all shards one after another.

    Attributes:
        path: its folder.
        tokens: length of the stream.
        documents: number of documents.
        bytes: UTF-8 bytes of the source text, to turn nats per token into bits per byte.
        vocab_size: every id is below it.
        tokenizer_sha256: `tokenizer_sha256` of the tokenizer that made the ids ("" if unknown).
        kind: "text" or "chat".
        index: all of `index.json`.
    """

    def __init__(self, path: Path, index: dict[str, Any]):
        self.path = path
        self.index = index
        self.tokens: int = index["tokens"]
        self.documents: int = index["documents"]
        self.bytes: int = index["bytes"]
        self.vocab_size: int = index["vocab_size"]
        self.tokenizer_sha256: str = index["tokenizer_sha256"]
        self.kind: str = index["kind"]
        self._dtype = np.dtype(index["dtype"]).newbyteorder("<")
        self._shards = [ShardInfo(**shard) for shard in index["shards"]]
        # First token and first document of every shard, and the totals at the end.
        self._first_token = list(accumulate((shard.tokens for shard in self._shards), initial=0))
        self._first_document = list(accumulate((shard.documents for shard in self._shards), initial=0))
        self._maps: dict[str, npt.NDArray[Any]] = {}
        self._checked: set[int] = set()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Shards":
        """Open a prepared folder; no token is read yet.

        Raises:
            IlladaError: when the folder is no data set, is of a newer format, or lacks, or has cut or damaged, a shard.
        """
        path = Path(path)
        if not path.is_dir():
            raise IlladaError(f"no prepared data at {path}: make it with `illada prepare`")
        try:
            index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise IlladaError(
                f"{path} has no {INDEX}: it is not prepared data, or `illada prepare` was interrupted (run it again)"
            ) from None
        except ValueError as error:
            raise IlladaError(f"{path / INDEX} is damaged ({error}): prepare the data again") from None
        version = index.get("format_version") if isinstance(index, dict) else None
        if not isinstance(version, int):
            raise IlladaError(f"{path / INDEX} is not an index of prepared data: it has no format_version")
        if version > FORMAT_VERSION:
            raise IlladaError(
                f"{path} has data format {version}, this illada reads up to {FORMAT_VERSION}: use a newer illada"
            )
        try:
            shards = cls(path, index)
        except (KeyError, TypeError, ValueError) as error:
            raise IlladaError(f"{path / INDEX} is damaged ({error!r}): prepare the data again") from None
        shards._check()
        return shards

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Return tokens start..start+count-1 of the stream, int64 [count].

        Raises:
            IndexError: when the range is not inside the stream.
        """
        end = start + count
        if not 0 <= start <= end <= self.tokens:
            raise IndexError(f"tokens {start}..{end} are outside the stream of {self.tokens}")
        out = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            shard = bisect_right(self._first_token, start + done) - 1
            first = start + done - self._first_token[shard]
            length = min(count - done, self._shards[shard].tokens - first)
            out[done : done + length] = self._map(f"{self._shards[shard].name}.tokens")[first : first + length]
            done += length
        return out

    def document_span(self, i: int) -> tuple[int, int, int]:
        """Return (start, end, prompt tokens) of document `i`; start and end are offsets into the stream.

        Raises:
            IndexError: when there is no such document.
        """
        if not 0 <= i < self.documents:
            raise IndexError(f"document {i} is outside 0..{self.documents - 1}")
        shard = bisect_right(self._first_document, i) - 1
        row, rows = i - self._first_document[shard], self._documents(shard)
        base = self._first_token[shard]
        start = int(rows[row - 1, 0]) if row else 0
        return base + start, base + int(rows[row, 0]), int(rows[row, 1])

    def document_ends_within(self, start: int, end: int) -> list[int]:
        """Return the offsets e with start < e < end at which a document ends and the next one begins."""
        ends: list[int] = []
        shard = max(0, bisect_right(self._first_token, start) - 1)
        while shard < len(self._shards) and self._first_token[shard] < end:
            base, column = self._first_token[shard], self._documents(shard)[:, 0]
            # bisect, not searchsorted: that would copy the whole strided column.
            low = bisect_right(column, start - base)
            high = bisect_left(column, end - base, lo=low)
            ends.extend((column[low:high] + base).tolist())
            shard += 1
        return ends

    def __getstate__(self) -> dict[str, Any]:
        """Leave the maps behind: a pickled map is a copy of the file."""
        return {**self.__dict__, "_maps": {}}

    def _map(self, name: str) -> npt.NDArray[Any]:
        mapped = self._maps.pop(name, None)
        if mapped is None:
            if len(self._maps) >= _MAPS_HELD:
                del self._maps[next(iter(self._maps))]
            dtype = self._dtype if name.endswith(".tokens") else np.dtype("<i8")
            try:
                mapped = np.memmap(self.path / name, dtype=dtype, mode="r")
            except (OSError, ValueError) as error:
                raise IlladaError(f"cannot read {self.path / name} ({error}): prepare the data again") from None
            if name.endswith(".documents"):
                mapped = mapped.reshape(-1, 2)
            # A plain view: indexing a memmap subclass is several times slower.
            mapped = mapped.view(np.ndarray)
        self._maps[name] = mapped  # last = most recently used
        return mapped

    def _documents(self, shard: int) -> npt.NDArray[np.int64]:
        info = self._shards[shard]
        rows = self._map(f"{info.name}.documents")
        if shard not in self._checked:
            ends = rows[:, 0]
            lengths = np.diff(ends, prepend=0)
            if (
                int(ends[-1]) != info.tokens
                or (lengths <= 0).any()
                or ((rows[:, 1] < 0) | (rows[:, 1] > lengths)).any()
            ):
                raise IlladaError(f"{self.path / info.name}.documents is damaged: prepare the data again")
            self._checked.add(shard)
        return rows

    def _check(self) -> None:
        """Compare every file's size with the index, and (unless they are very many) the document ends."""
        totals = {
            "tokens": self._first_token[-1],
            "documents": self._first_document[-1],
            "bytes": sum(shard.bytes for shard in self._shards),
        }
        for name, total in totals.items():
            if self.index[name] != total:
                raise IlladaError(
                    f"{self.path / INDEX} is damaged: {name} is {self.index[name]} but its shards hold {total}"
                )
        for shard in self._shards:
            for suffix, size in (("tokens", shard.tokens * self._dtype.itemsize), ("documents", shard.documents * 16)):
                file = self.path / f"{shard.name}.{suffix}"
                try:
                    found = file.stat().st_size
                except OSError:
                    raise IlladaError(f"{file} is missing: copy the whole folder or prepare the data again") from None
                if found != size:
                    raise IlladaError(
                        f"{file} has {found} bytes instead of {size}: copy the whole folder or prepare the data again"
                    )
        if self.documents <= _DOCUMENTS_CHECKED_AT_ONCE:
            for number in range(len(self._shards)):
                self._documents(number)


class ShardWriter:
    """Writes documents into shards `{prefix}-00000`, `{prefix}-00001`, … of a folder.

    Files are written under a temporary name and get their own when the shard is complete. A new shard begins with the
    first document after `tokens_per_shard` tokens. A document may arrive in pieces, so memory does not bound its size:

        writer.extend(ids); writer.extend(more); writer.end_document(source_bytes=...)
        shards = writer.finish()
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        vocab_size: int,
        tokens_per_shard: int = TOKENS_PER_SHARD,
        prefix: str = "shard",
    ):
        if tokens_per_shard < 1:
            raise IlladaError(f"tokens_per_shard must be at least 1, got {tokens_per_shard}")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.prefix = prefix
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._tokens_per_shard = tokens_per_shard
        self._shards: list[ShardInfo] = []
        self._file: BinaryIO | None = None
        self._rows = array("q")
        self._tokens = self._document_start = self._bytes = 0

    def extend(self, ids: Sequence[int] | npt.NDArray[Any]) -> None:
        """Add ids to the document being written.

        Raises:
            IlladaError: when an id is outside the vocabulary.
        """
        ids_T = np.asarray(ids, dtype=np.int64)
        if ids_T.size == 0:
            return
        if ids_T.min() < 0 or ids_T.max() >= self._vocab_size:
            wrong = int(ids_T.min()) if ids_T.min() < 0 else int(ids_T.max())
            raise IlladaError(f"token id {wrong} is outside the vocabulary of {self._vocab_size}")
        if self._file is None:
            self._file = open(self._temporary("tokens"), "wb", buffering=1 << 20)  # noqa: SIM115 - closed with the shard
        self._file.write(ids_T.astype(self._dtype).data)
        self._tokens += ids_T.size

    def end_document(self, prompt_tokens: int = 0, source_bytes: int = 0) -> None:
        """End the document: `prompt_tokens` of it are prompt, `source_bytes` is the size of its text in UTF-8."""
        length = self._tokens - self._document_start
        if length == 0:
            raise ValueError("a document needs at least one token")
        if not 0 <= prompt_tokens <= length:
            raise ValueError(f"{prompt_tokens} prompt tokens in a document of {length}")
        self._rows.extend((self._tokens, prompt_tokens))
        self._document_start = self._tokens
        self._bytes += source_bytes
        if self._tokens >= self._tokens_per_shard:
            self._close_shard()

    def append(self, ids: Sequence[int] | npt.NDArray[Any], prompt_tokens: int = 0, source_bytes: int = 0) -> None:
        """Write one whole document."""
        self.extend(ids)
        self.end_document(prompt_tokens, source_bytes)

    def finish(self) -> list[ShardInfo]:
        """Complete the last shard and return all of them, in order."""
        if self._tokens != self._document_start:
            raise ValueError("finish() inside a document: call end_document() first")
        if self._rows:
            self._close_shard()
        return self._shards

    def _name(self) -> str:
        return f"{self.prefix}-{len(self._shards):05d}"

    def _temporary(self, suffix: str) -> Path:
        return self.folder / f"{self._name()}.{suffix}.partial"

    def _close_shard(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        _write_durably(self._temporary("documents"), np.asarray(self._rows, dtype="<i8").tobytes())
        for suffix in ("tokens", "documents"):
            os.replace(self._temporary(suffix), self.folder / f"{self._name()}.{suffix}")
        self._shards.append(ShardInfo(self._name(), self._tokens, len(self._rows) // 2, self._bytes))
        self._file, self._rows = None, array("q")
        self._tokens = self._document_start = self._bytes = 0


def write_index(
    folder: str | os.PathLike[str],
    shards: Iterable[ShardInfo],
    *,
    vocab_size: int,
    tokenizer_sha256: str = "",
    kind: str = "text",
    special_ids: dict[str, int | None] | None = None,
    odd: dict[str, int] | None = None,
    provenance: dict[str, Any] | None = None,
) -> None:
    """Write `index.json`, at once and last: from now on the folder is a data set.

    Args:
        folder: where the shards lie.
        shards: the shards, in stream order.
        vocab_size: every id is below it.
        tokenizer_sha256: hash of the tokenizer's state.
        kind: "text" or "chat".
        special_ids: the ids put around the documents ("bos", "eos").
        odd: how many documents or records were odd, by reason.
        provenance: where the data came from.
    """
    shards = list(shards)
    index = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "dtype": "uint16" if token_dtype(vocab_size).itemsize == 2 else "uint32",
        "vocab_size": vocab_size,
        "tokenizer_sha256": tokenizer_sha256,
        "special_ids": special_ids or {},
        "tokens": sum(shard.tokens for shard in shards),
        "documents": sum(shard.documents for shard in shards),
        "bytes": sum(shard.bytes for shard in shards),
        "odd": odd or {},
        "provenance": provenance or {},
        "shards": [asdict(shard) for shard in shards],
    }
    write_json(Path(folder) / INDEX, index)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file so that it is either whole or absent, whatever happens meanwhile."""
    temporary = file.with_name(file.name + ".partial")
    _write_durably(temporary, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
    os.replace(temporary, file)


def _write_durably(file: Path, content: bytes) -> None:
    with open(file, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
