"""Writes token shards and their index in the format that `illada.data.shards` describes and reads."""

import json
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128

from illada.data.shards import FORMAT_VERSION, INDEX, ShardInfo, token_dtype
from illada.errors import IlladaError
from illada.files import naming, write_bytes, write_text
from illada.folders import seal, sync

TOKENS_PER_SHARD = 1 << 27


class ShardWriter:
    """Writes documents into shards `shard-00000`, `shard-00001`, … of a folder.

    Files have a temporary name until their shard is complete. A new shard begins with the first document after
    `tokens_per_shard` tokens. A document may arrive in pieces, so memory does not bound its size:

        writer.extend(ids); writer.extend(more); writer.end_document(source_bytes=...)
        shards = writer.finish()

    Attributes:
        sums: checksums of the files of complete shards, by name.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        vocab_size: int,
        tokens_per_shard: int = TOKENS_PER_SHARD,
    ):
        if tokens_per_shard < 1:
            raise IlladaError(f"tokens_per_shard must be at least 1, got {tokens_per_shard}")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._tokens_per_shard = tokens_per_shard
        self._shards: list[ShardInfo] = []
        self.sums: dict[str, str] = {}
        self._file: BinaryIO | None = None
        self._rows, self._digest = array("q"), xxh3_128()
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
        piece = ids_T.astype(self._dtype).data
        with naming(self._temporary("tokens")):
            self._file.write(piece)
        self._digest.update(piece)
        self._tokens += ids_T.size

    def end_document(self, prompt_tokens: int = 0, source_bytes: int = 0) -> None:
        """End a document whose first `prompt_tokens` are prompt and whose text has `source_bytes` in UTF-8."""
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
        return f"shard-{len(self._shards):05d}"

    def _temporary(self, suffix: str) -> Path:
        return self.folder / f"{self._name()}.{suffix}.partial"

    def _close_shard(self) -> None:
        assert self._file is not None
        with naming(self._temporary("tokens")):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        rows = np.asarray(self._rows, dtype="<i8").tobytes()
        write_bytes(self._temporary("documents"), rows)
        self.sums[f"{self._name()}.tokens"] = self._digest.hexdigest()
        self.sums[f"{self._name()}.documents"] = xxh3_128(rows).hexdigest()
        for suffix in ("tokens", "documents"):
            os.replace(self._temporary(suffix), self.folder / f"{self._name()}.{suffix}")
        self._shards.append(ShardInfo(self._name(), self._tokens, len(self._rows) // 2, self._bytes))
        self._file, self._rows, self._digest = None, array("q"), xxh3_128()
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
    sums: Mapping[str, str] | None = None,
) -> None:
    """Write checksums and then `index.json`, the last file of a data set: from now on the folder is one.

    Args:
        folder: where the shards lie.
        shards: the shards, in stream order.
        vocab_size: every id is below it.
        tokenizer_sha256: hash of the tokenizer's state.
        kind: "text", "chat" or "preference".
        special_ids: the ids put around the documents ("bos", "eos").
        odd: numbers of odd documents or records, by reason.
        provenance: where the data came from.
        sums: checksums of the shards' files by name, where they are known; the others are read for them.
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
    folder = Path(folder)
    text = json.dumps(index, indent=1, ensure_ascii=False) + "\n"
    known = {**(sums or {}), INDEX: xxh3_128(text.encode()).hexdigest()}
    files = {f"{shard.name}.{suffix}" for shard in shards for suffix in ("tokens", "documents")}
    seal(folder, known, lambda name: name in files or name.startswith("tokenizer/"))
    write_text(folder / INDEX, text)
    sync(folder)
