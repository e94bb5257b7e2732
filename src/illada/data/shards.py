"""Token shards: what a prepared data set looks like on disk, and how to read it (format ours).

A prepared folder holds `index.json` (written last: without it the folder is not a data set) and, for each shard,

* `shard-00000.tokens`: the ids of its documents, one after another, little-endian uint16 (uint32 above 65536 ids);
* `shard-00000.documents`: little-endian int64 [documents, 2]: where each document ends inside the shard (exclusive)
  and how many prompt tokens stand at its start (0 for plain text).

The files are raw arrays: memory-mapped, never parsed. A document never crosses a shard. A folder may also lie at any
place that fsspec reaches, and several folders may be mixed.
"""

import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from illada.data.optional.remote import Remote
from illada.data.storage import Folder, Range
from illada.errors import IlladaError
from illada.files import parse_json

FORMAT_VERSION = 1
INDEX = "index.json"

# The ends of more documents than this are checked shard by shard on first use, not when the data set is opened.
_DOCUMENTS_CHECKED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class ShardInfo:
    """One shard: its file name without suffix, its tokens, documents, and UTF-8 bytes of source text."""

    name: str
    tokens: int
    documents: int
    bytes: int


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type in which ids below `vocab_size` are stored."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class Source:
    """One data set of a mixture: a stretch of the stream, and its share of the samples."""

    name: str
    first_token: int
    tokens: int
    documents: int
    share: Fraction


class Shards:
    """Prepared data, read as one stream of tokens: the documents of all shards one after another.

    Attributes:
        path: folder of the (first) data set; for a remote one, its folder in the local cache.
        tokens: length of the stream.
        documents: number of documents.
        bytes: UTF-8 bytes of the source text, to turn nats per token into bits per byte.
        vocab_size: every id is below it.
        tokenizer_sha256: `tokenizer_sha256` of the tokenizer that made the ids ("" if unknown).
        kind: "text", "chat" (of a mixture: when all its data sets are), or "preference": document 2i is the chosen
            and 2i + 1 the rejected side of pair i, which have the same prompt.
        index: all of `index.json`; of a mixture, only the fingerprints of the sources.
        sources: the data sets, in stream order; more than one in a mixture.

    Args:
        data_sets: where each data set lies, and its `index.json`.
        shares: of the data sets in a mixture; None for a single data set.
    """

    def __init__(
        self, data_sets: Sequence[tuple[Folder | Remote, dict[str, Any]]], shares: Sequence[Fraction] | None = None
    ):
        self._data_set = store, first = data_sets[0]
        indexes = [index for _, index in data_sets]
        fingerprints = [index.get("provenance", {}).get("source_fingerprint") for index in indexes]
        self.index = first if shares is None else {"provenance": {"source_fingerprint": fingerprints}}
        self.path = store.path
        self.vocab_size: int = first["vocab_size"]
        self.tokenizer_sha256: str = first["tokenizer_sha256"]
        self.kind: str = first["kind"] if len({index["kind"] for index in indexes}) == 1 else "text"
        self.bytes: int = sum(index["bytes"] for index in indexes)
        self._dtype = np.dtype(first["dtype"]).newbyteorder("<")
        self.tokens = self.documents = 0
        self.sources: list[Source] = []
        self._shards: list[ShardInfo] = []
        self._stores: list[Folder | Remote] = []
        for (store, index), share in zip(data_sets, shares or [Fraction(1)], strict=True):
            self.sources.append(Source(store.name, self.tokens, index["tokens"], index["documents"], share))
            self.tokens, self.documents = self.tokens + index["tokens"], self.documents + index["documents"]
            self._shards += [ShardInfo(**shard) for shard in index["shards"]]
            self._stores += [store] * len(index["shards"])
        # First token and first document of every shard, and the totals at the end.
        self._first_token = list(accumulate((shard.tokens for shard in self._shards), initial=0))
        self._first_document = list(accumulate((shard.documents for shard in self._shards), initial=0))
        self._checked: set[int] = set()

    @classmethod
    def open(cls, place: str | os.PathLike[str] | Mapping[str, float]) -> "Shards":
        """Open a prepared folder, the URL of one, or several with weights; no token is read yet.

        Weights are shares of the samples, in any unit.

        Raises:
            IlladaError: when a folder is no data set or has a newer format, when a shard is missing, cut or damaged,
                when a weight is not above 0, or when two data sets have different tokenizers or do not mix.
        """
        weights = place if isinstance(place, Mapping) else {os.fspath(place): 1}
        if not weights:
            raise IlladaError("the mixture is empty: give at least one folder with a weight")
        for name, weight in weights.items():
            if not 0 < weight < float("inf"):
                raise IlladaError(f"the weight of {name} is {weight:g}: it must be above 0 (leave out what has none)")
        parts = [cls._open_one(name) for name in weights]
        if not isinstance(place, Mapping):
            return parts[0]
        for name, part in zip(weights, parts, strict=True):
            if part.kind != parts[0].kind and "preference" in (part.kind, parts[0].kind):
                raise IlladaError(f"{name} does not mix with {next(iter(weights))}: one of them holds preference pairs")
            if (part.tokenizer_sha256, part.vocab_size) != (parts[0].tokenizer_sha256, parts[0].vocab_size):
                raise IlladaError(
                    f"{name} was prepared with another tokenizer than {next(iter(weights))}: use one for both"
                )
        # From their decimal digits, so that 0.1 is a tenth and the shares are exact.
        fractions = [Fraction(str(weight)) for weight in weights.values()]
        return cls([part._data_set for part in parts], [fraction / sum(fractions) for fraction in fractions])

    @classmethod
    def _open_one(cls, place: str) -> "Shards":
        store = Remote(place) if "://" in place else Folder(Path(place))
        name = store.name
        if not store.exists():
            raise IlladaError(f"no prepared data at {name}: make it with `illada prepare`")
        try:
            index = parse_json(store.text(INDEX))
        except FileNotFoundError:
            raise IlladaError(
                f"{name} has no {INDEX}: it is not prepared data, or `illada prepare` was interrupted (run it again)"
            ) from None
        except ValueError as error:
            raise IlladaError(f"{name}/{INDEX} is damaged ({error}): prepare the data again") from None
        version = index.get("format_version") if isinstance(index, dict) else None
        if not isinstance(version, int):
            raise IlladaError(f"{name}/{INDEX} is not an index of prepared data: it has no format_version")
        if version > FORMAT_VERSION:
            raise IlladaError(
                f"{name} has data format {version}, this illada reads up to {FORMAT_VERSION}: use a newer illada"
            )
        try:
            if not all(type(index[key]) is int for key in ("vocab_size", "tokens", "documents", "bytes")):
                raise TypeError("its totals must be whole numbers")
            shards = cls([(store, index)])
            shards._check(store)
        except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
            raise IlladaError(f"{name}/{INDEX} is damaged ({error!r}): prepare the data again") from None
        return shards

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Return tokens start..start+count-1 of the stream, int64 [count].

        Raises:
            IndexError: when the range is not inside the stream.
        """
        return self.read_all([(start, count)])

    def read_all(self, spans: Iterable[tuple[int, int]]) -> npt.NDArray[np.int64]:
        """Return the tokens of many (start, count), one span after another, int64; remote ones are requested together.

        Raises:
            IndexError: when a span is not inside the stream.
        """
        pieces_of: dict[Folder | Remote, list[tuple[int, Range]]] = {}
        total = 0
        for start, count in spans:
            end, done = start + count, start
            if not 0 <= start <= end <= self.tokens:
                raise IndexError(f"tokens {start}..{end} are outside the stream of {self.tokens}")
            while done < end:
                number = bisect_right(self._first_token, done) - 1
                first = done - self._first_token[number]
                length = min(end - done, self._shards[number].tokens - first)
                place = (f"{self._shards[number].name}.tokens", first, first + length)
                pieces_of.setdefault(self._stores[number], []).append((total, place))
                done, total = done + length, total + length
        out = np.empty(total, dtype=np.int64)
        for store, entries in pieces_of.items():
            pieces = store.pieces([place for _, place in entries], self._dtype)
            for (offset, _), piece in zip(entries, pieces, strict=True):
                out[offset : offset + len(piece)] = piece
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
        """Return the offsets e with start < e < end at which a document ends and the next begins."""
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

    def _documents(self, shard: int) -> npt.NDArray[np.int64]:
        info, store = self._shards[shard], self._stores[shard]
        rows = store.whole(f"{info.name}.documents", np.dtype("<i8")).reshape(-1, 2)
        if shard not in self._checked:
            ends = rows[:, 0]
            lengths = np.diff(ends, prepend=0)
            if (
                int(ends[-1]) != info.tokens
                or (lengths <= 0).any()
                or ((rows[:, 1] < 0) | (rows[:, 1] > lengths)).any()
            ):
                raise IlladaError(f"{store.name}/{info.name}.documents is damaged: prepare the data again")
            self._checked.add(shard)
        return rows

    def _check(self, store: Folder | Remote) -> None:
        """Check every file's size and, unless they are many or remote, the document ends against the index."""
        totals = {
            "tokens": self._first_token[-1],
            "documents": self._first_document[-1],
            "bytes": sum(shard.bytes for shard in self._shards),
        }
        for name, total in totals.items():
            if self.index[name] != total:
                raise IlladaError(
                    f"{store.name}/{INDEX} is damaged: {name} is {self.index[name]} but its shards hold {total}"
                )
        sizes = store.sizes()
        for shard in self._shards:
            for suffix, size in (("tokens", shard.tokens * self._dtype.itemsize), ("documents", shard.documents * 16)):
                file = f"{shard.name}.{suffix}"
                if file not in sizes:
                    raise IlladaError(
                        f"{store.name}/{file} is missing: copy the whole folder or prepare the data again"
                    )
                if sizes[file] != size:
                    raise IlladaError(
                        f"{store.name}/{file} has {sizes[file]} bytes instead of {size}: "
                        "copy the whole folder or prepare the data again"
                    )
        if isinstance(store, Folder) and self.documents <= _DOCUMENTS_CHECKED_AT_ONCE:
            for number in range(len(self._shards)):
                self._documents(number)
