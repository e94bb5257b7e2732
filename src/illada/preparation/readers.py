"""Read documents from text files, JSON lines and parquet, whatever state the files are in.

A document arrives as one or more *pieces*, so that a file larger than memory can be one document. Broken UTF-8 becomes
U+FFFD and is counted; what cannot be read at all is counted and skipped, unless it is all there is.
"""

import codecs
import fnmatch
import gzip
import hashlib
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

from illada.errors import IlladaError, needs
from illada.preparation.options import PrepareSettings
from illada.preparation.records import CONTENTS, FIELDS, Kind, conversation_of, kind_of_record, pair_of, text_of
from illada.text.chat import Message

PIECE_CHARACTERS = 1_000_000
PEEK_RECORDS = 20
"""Records at the beginning of a file that say what it holds."""

_CHUNK = 1 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACE_AFTER_TEXT = re.compile(r"(?<=\S)[ \t\r\n]")


@dataclass(frozen=True)
class SourceFile:
    """A file to read; its size and time tell one version of it from another."""

    path: str
    size: int
    modified_ns: int


@dataclass(frozen=True)
class Unit:
    """Part of a file: the lines that begin in bytes start..end-1; formats that cannot be divided are one unit."""

    path: str
    start: int
    end: int
    whole: bool = True

    @property
    def size(self) -> int:
        """The number of bytes."""
        return self.end - self.start


@dataclass(frozen=True)
class Options:
    """How to find documents in files."""

    kind: Kind = "text"
    text_field: str = "text"
    documents: Literal["file", "line"] = "file"
    whole: bool = False
    """Whether each document is one piece, however long it is."""

    @classmethod
    def of(cls, settings: PrepareSettings) -> "Options":
        """Return the options of a preparation; filters and deduplication judge whole documents, so those stay whole."""
        judged = bool(settings.filters) or settings.dedup != "none"
        assert settings.kind != "auto"
        return cls(settings.kind, settings.text_field, settings.documents, whole=judged)


@dataclass
class Piece:
    """A stretch of a document, a conversation (kind "chat"), or a prompt and its two answers (kind "preference")."""

    text: str
    last: bool
    record: str
    messages: list[dict[str, str]] | None = None


@dataclass
class ReadStats:
    """Counts of what was unusual in the units read so far."""

    broken_utf8_documents: int = 0
    replaced_characters: int = 0
    empty_documents: int = 0
    split_documents: int = 0
    unusable_records: int = 0
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """For each file that was divided into units: how many records were good and bad, and why the first was bad."""
    bytes_read: int = 0

    def count_records(self, path: str, good: int, bad: int, first: str) -> None:
        """Add the records of a unit to those of its file; `first` says why the first bad one was bad."""
        entry = self.failures.setdefault(path, {"good": 0, "bad": 0, "first": ""})
        entry["good"] += good
        entry["bad"] += bad
        entry["first"] = entry["first"] or first


def find_files(sources: Sequence[str], patterns: Sequence[str], exclude: Sequence[str] = ()) -> list[SourceFile]:
    """Return the files of `sources` in a fixed order: sources as they are listed, files of a folder by name.

    Patterns match the name of a file or its path inside the folder; hidden files and folders are left out.

    Raises:
        IlladaError: when a source is missing, unreadable or holds no file to read.
    """
    if not sources:
        raise IlladaError("no sources: give at least one file or folder")
    files: list[SourceFile] = []
    for source in sources:
        root = Path(source)
        if root.is_dir():
            paths = sorted(_walk(root, patterns, exclude))
            if not paths:
                raise IlladaError(f"{source} holds no file that matches {' '.join(patterns)}: give other --patterns")
        elif root.is_file():
            if root.suffix.lower() == ".json":
                raise IlladaError(f"{source} is JSON, one record per line is needed: convert it and name it .jsonl")
            paths = [root]
        else:
            raise IlladaError(f"no such file or folder: {source}")
        for path in paths:
            try:
                stat = path.stat()
            except OSError as error:
                raise IlladaError(f"cannot read {path}: {error.strerror}") from None
            if not os.access(path, os.R_OK):
                raise IlladaError(f"cannot read {path}: permission denied")
            files.append(SourceFile(os.path.abspath(path), stat.st_size, stat.st_mtime_ns))
    return files


def _walk(root: Path, patterns: Sequence[str], exclude: Sequence[str]) -> Iterator[Path]:
    def matches(relative: str, name: str, globs: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(relative, glob) for glob in globs)

    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if name.startswith(".") or not path.is_file():
                continue
            if matches(relative, name, patterns) and not matches(relative, name, exclude):
                yield path


def fingerprint(files: Sequence[SourceFile]) -> str:
    """Return a hash of paths, sizes and modification times."""
    lines = "".join(f"{file.path}\0{file.size}\0{file.modified_ns}\n" for file in files)
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def _format(path: str) -> Literal["text", "jsonl", "parquet"]:
    """Return how to read a file, by its name."""
    name = path.lower().removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "text"


def kind_of(path: str, text_field: str = "text") -> Kind | None:
    """Say what the first records of a file are: texts, where they have the field; pairs; conversations; else None.

    A file that cannot be read is None too: reading it will say why.
    """
    format_ = _format(path)
    if format_ == "text":
        return "text"
    try:
        if format_ == "parquet":
            with needs("data", "reading parquet"):
                import pyarrow.parquet as pq
            records: list[Any] = [dict.fromkeys(pq.read_schema(path).names)]
        else:
            unit = Unit(path, 0, os.path.getsize(path))
            records = [record for _, record in islice(_jsonl_records(unit, ReadStats()), PEEK_RECORDS)]
    except (OSError, EOFError, zlib.error, ValueError):  # ArrowInvalid is a ValueError
        return None
    for record in records:
        if isinstance(record, dict) and text_field in record:
            return "text"
        if kind := kind_of_record(record):
            return kind
    return None


def recognise(settings: PrepareSettings) -> PrepareSettings:
    """Return the settings with a kind: what the files hold, where it is "auto".

    Raises:
        IlladaError: when a source is missing, or files differ in what they hold.
    """
    if settings.kind != "auto":
        return settings
    files = find_files(settings.sources, settings.patterns, settings.exclude)
    first: dict[Kind | None, str] = {}
    for file in files:
        first.setdefault(kind_of(file.path, settings.text_field), file.path)
    kinds: list[Kind] = [kind for kind in CONTENTS if kind in first]
    if len(kinds) > 1:
        one, other = kinds[:2]
        raise IlladaError(
            f"{first[one]} holds {CONTENTS[one]}, {first[other]} {CONTENTS[other]}: prepare them one at a time, into "
            f"two folders (--kind {one} and --kind {other})"
        )
    return replace(settings, kind=kinds[0] if kinds else "text")


def divide(file: SourceFile, options: Options, unit_bytes: int) -> list[Unit]:
    """Divide a file into units of about `unit_bytes`, where its format allows reading to begin in the middle."""
    format_ = _format(file.path)
    by_line = format_ == "jsonl" or (format_ == "text" and options.documents == "line")
    if not by_line or file.path.lower().endswith(".gz") or file.size <= unit_bytes:
        return [Unit(file.path, 0, file.size)]
    starts = range(0, file.size, unit_bytes)
    return [Unit(file.path, start, min(start + unit_bytes, file.size), whole=False) for start in starts]


def read_unit(unit: Unit, options: Options, stats: ReadStats) -> Iterator[Piece]:
    """Yield the pieces of the documents of a unit, and count in `stats` what was unusual.

    Raises:
        IlladaError: when the file cannot be read, or not one of its records is usable.
    """
    format_ = _format(unit.path)
    if options.kind != "text" and format_ == "text":
        raise IlladaError(f"{unit.path} is plain text: {CONTENTS[options.kind]} come from .jsonl or .parquet files")
    try:
        if format_ == "text":
            yield from _read_text(unit, options, stats)
        else:
            records = _jsonl_records(unit, stats) if format_ == "jsonl" else _parquet_records(unit, options, stats)
            yield from _read_records(unit, records, options, stats)
    except (OSError, EOFError, zlib.error) as error:  # BadGzipFile is an OSError
        raise IlladaError(f"cannot read {unit.path}: {error}") from None


def _open(path: str) -> IO[bytes]:
    if path.lower().endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]  # a GzipFile is a binary stream
    return open(path, "rb")


def _clean(text: str) -> tuple[str, int]:
    """Replace what UTF-8 cannot express (half a surrogate pair, an escaped broken byte); return how many there were."""
    if text.isascii():
        return text, 0
    return _SURROGATE.subn("\ufffd", text)


def _pieces(chunks: Iterator[str], record: str, options: Options, stats: ReadStats) -> Iterator[Piece]:
    """Turn the chunks of one document into pieces of bounded length, cut before white space where there is some."""
    buffer, replaced, count = "", 0, 0
    limit = sys.maxsize if options.whole else PIECE_CHARACTERS
    slices = (chunk[i : i + _CHUNK] for chunk in chunks for i in range(0, len(chunk), _CHUNK))
    for part in slices:
        text, wrong = _clean(part)
        replaced += wrong
        buffer += text
        while len(buffer) > limit:
            spaces = [match.start() for match in _SPACE_AFTER_TEXT.finditer(buffer, limit - limit // 8, limit)]
            # The cut is never inside a run of white space, which may be one token.
            cut = spaces[-1] if spaces else limit
            piece, buffer = buffer[:cut], buffer[cut:]
            # A document that begins with megabytes of white space loses them: it might hold nothing else.
            if count or piece.strip():
                count += 1
                yield Piece(piece, False, record)
    if replaced:
        stats.broken_utf8_documents += 1
        stats.replaced_characters += replaced
    if count:
        stats.split_documents += 1
    elif not buffer.strip():
        stats.empty_documents += 1
        return
    yield Piece(buffer, True, record)


def _read_text(unit: Unit, options: Options, stats: ReadStats) -> Iterator[Piece]:
    with _open(unit.path) as stream:
        if options.documents == "file":
            yield from _pieces(_decoded(iter(lambda: stream.read(_CHUNK), b""), stats), unit.path, options, stats)
            return
        for place, parts in _lines(stream, unit):
            yield from _pieces(_decoded(parts, stats, end_of_line=True), f"{unit.path} at byte {place}", options, stats)


def _lines(stream: IO[bytes], unit: Unit) -> Iterator[tuple[int, Iterator[bytes]]]:
    """Yield (offset, parts) of every line that begins in the unit; use up the parts of a line before the next line."""
    if unit.start:
        # A line that begins before the unit belongs to the previous one; if it ends exactly there, this reads its
        # newline.
        stream.seek(unit.start - 1)
        while (part := stream.readline(_CHUNK)) and not part.endswith(b"\n"):
            pass
    compressed = isinstance(stream, gzip.GzipFile)

    def parts(first: bytes) -> Iterator[bytes]:
        part = first
        yield part
        while not part.endswith(b"\n") and (part := stream.readline(_CHUNK)):
            yield part

    while compressed or stream.tell() < unit.end:
        place = stream.tell()
        first = stream.readline(_CHUNK)
        if not first:
            return
        yield place, parts(first)


def _decoded(chunks: Iterator[bytes], stats: ReadStats, end_of_line: bool = False) -> Iterator[str]:
    """Decode UTF-8, escape broken bytes as lone surrogates, and drop a byte order mark and the end of the line."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    first = True
    for chunk in chunks:
        stats.bytes_read += len(chunk)
        ending = (2 if chunk.endswith(b"\r\n") else 1) if end_of_line and chunk.endswith(b"\n") else 0
        text = decoder.decode(chunk[: len(chunk) - ending])
        yield text.removeprefix("\ufeff") if first else text
        first = first and not text
    yield decoder.decode(b"", final=True)


def _jsonl_records(unit: Unit, stats: ReadStats) -> Iterator[tuple[str, Any]]:
    """Yield (where, record); in place of a record that cannot be parsed, the exception that says why."""
    with _open(unit.path) as stream:
        for number, (place, parts) in enumerate(_lines(stream, unit), start=1):
            line = "".join(_decoded(parts, stats))
            if not line.strip():
                continue
            where = f"line {number}" if unit.start == 0 else f"the line at byte {place}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield where, IlladaError(f"not JSON ({error})")


def _parquet_records(unit: Unit, options: Options, stats: ReadStats) -> Iterator[tuple[str, Any]]:
    with needs("data", "reading parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    try:
        with pq.ParquetFile(unit.path) as file:
            names = set(file.schema_arrow.names)
            wanted = FIELDS.get(options.kind, (options.text_field,))
            columns = [name for name in wanted if name in names]
            if not columns:
                raise IlladaError(f"{unit.path} has no column {' or '.join(wanted)}: it has {', '.join(sorted(names))}")
            row, rows = 0, file.metadata.num_rows
            # Few rows at a time: a row may be a whole book.
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for record in pa.Table.from_batches([batch]).cast(_as_bytes(pa, batch.schema)).to_pylist():
                    row += 1
                    yield f"row {row}", _from_bytes(record)
                stats.bytes_read += (unit.end * row) // rows - (unit.end * (row - batch.num_rows)) // rows
    except pa.ArrowException as error:
        raise IlladaError(f"cannot read {unit.path}: {' '.join(str(error).split())}") from None


def _as_bytes(pa: Any, schema: Any) -> Any:
    """Return the schema with text as bytes, because arrow refuses to convert broken UTF-8 to str."""

    def change(kind: Any) -> Any:
        if pa.types.is_dictionary(kind):
            return change(kind.value_type)
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return pa.large_list(change(kind.value_type))
        if pa.types.is_struct(kind):
            return pa.struct([(member.name, change(member.type)) for member in kind])
        return pa.large_binary() if pa.types.is_string(kind) or pa.types.is_large_string(kind) else kind

    return pa.schema([(column.name, change(column.type)) for column in schema])


def _from_bytes(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_bytes(item) for item in value]
    if isinstance(value, dict):
        return {name: _from_bytes(item) for name, item in value.items()}
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _read_records(
    unit: Unit, records: Iterator[tuple[str, Any]], options: Options, stats: ReadStats
) -> Iterator[Piece]:
    good = bad = 0
    first_failure = ""
    for where, record in records:
        name = f"{unit.path} {where}"
        try:
            if isinstance(record, IlladaError):
                raise record
            if not isinstance(record, dict):
                raise IlladaError("not an object")
            if options.kind == "text":
                pieces = _pieces(iter((text_of(record, options.text_field),)), name, options, stats)
            else:
                messages = pair_of(record) if options.kind == "preference" else conversation_of(record)
                pieces = _conversation_pieces(messages, name, options.kind, stats)
        except IlladaError as error:
            bad += 1
            first_failure = first_failure or f"{where}: {error}"
            # Part of a file may be all bad by accident, but not if it is large.
            if good == 0 and not unit.whole and bad >= 1000:
                raise IlladaError(f"{unit.path}: none of the first {bad} records is usable; {first_failure}") from None
            continue
        good += 1
        yield from pieces
    stats.unusable_records += bad
    if bad and not good and unit.whole:
        raise IlladaError(f"{unit.path}: none of its {bad} records is usable; {first_failure}")
    if not unit.whole:
        stats.count_records(unit.path, good, bad, first_failure)


def _conversation_pieces(messages: Sequence[Message], record: str, kind: Kind, stats: ReadStats) -> Iterator[Piece]:
    """Yield a conversation or a pair as one piece, or nothing where the assistant or a side of the pair is silent."""
    cleaned = [(message["role"], *_clean(message["content"])) for message in messages]
    replaced = sum(count for _, _, count in cleaned)
    stats.broken_utf8_documents += bool(replaced)
    stats.replaced_characters += replaced
    said = [bool(content.strip()) for role, content, _ in cleaned if role == "assistant"]
    if all(said[-2:]) if kind == "preference" else any(said):
        plain = [{"role": role, "content": content} for role, content, _ in cleaned]
        yield Piece("\n".join(content for _, content, _ in cleaned), True, record, plain)
    else:
        stats.empty_documents += 1
