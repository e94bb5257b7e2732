"""The datatrove steps of data preparation: read documents, write shards, put the shards together.

The steps find their tasks in the output folder, so they are small and the same on the local, Slurm and Ray executors of
datatrove. Importing this module needs `pip install 'illada[data]'`.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from illada.data.shards import ShardWriter
from illada.errors import IlladaError, needs
from illada.files import write_json
from illada.preparation.finish import finish
from illada.preparation.plan import TOKENIZER, UNITS, WORK, stats_file, task_folder
from illada.preparation.readers import Options, ReadStats, Unit, read_unit
from illada.preparation.settings import PrepareSettings
from illada.text.chat import encode_conversation, split_turns
from illada.text.tokenizer import encode_texts, load_tokenizer

with needs("data", "preparing data"):
    from datatrove.data import Document
    from datatrove.pipeline.base import PipelineStep

_BATCH_CHARACTERS = 4_000_000
_BATCH_PIECES = 2000
_PROGRESS_BYTES = 4 << 20


class ReadDocuments(PipelineStep):
    """Yields the pieces of the documents of a task as datatrove documents."""

    type = "READER"
    name = "illada documents"

    def __init__(self, settings: PrepareSettings):
        super().__init__()
        self.output, self.options = Path(settings.output), Options.of(settings)

    def run(self, data: Iterator[Document] | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:  # noqa: ARG002
        """Yield the documents of task `rank`; none when the task is finished already."""
        if data:
            yield from data
        if task_folder(self.output, rank).exists():
            return
        progress, reported, done = self.output / WORK / f"progress-{rank:05d}", 0, 0
        stats = ReadStats()
        with open(self.output / UNITS, encoding="utf-8") as file:
            units = [Unit(**unit) for unit in json.loads(next(islice(file, rank, None)))]
        for unit in units:
            stats.bytes_read = 0
            for number, piece in enumerate(read_unit(unit, self.options, stats)):
                metadata = {"last": piece.last, "record": piece.record, "messages": piece.messages}
                yield Document(text=piece.text, id=f"{rank}/{unit.path}/{unit.start}/{number}", metadata=metadata)
                now = done + min(stats.bytes_read, unit.size)
                if now - reported >= _PROGRESS_BYTES:
                    reported = now
                    progress.write_text(str(now))
            done += unit.size
        progress.write_text(str(done))
        stats.bytes_read = 0
        write_json(stats_file(self.output, rank), asdict(stats))


class WriteShards(PipelineStep):
    """Tokenises the documents of a task and writes them as shards; the last step of a task."""

    type = "WRITER"
    name = "illada shards"

    def __init__(self, settings: PrepareSettings, threads: bool):
        super().__init__()
        self.settings, self.threads = settings, threads

    def run(self, data: Iterator[Document] | None = None, rank: int = 0, world_size: int = 1) -> None:  # noqa: ARG002
        """Write the shards of task `rank` into a folder that gets its final name when all of them are complete."""
        output = Path(self.settings.output)
        final = task_folder(output, rank)
        if data is None or final.exists():
            return
        if not self.threads:
            # There are as many processes as the machine should run; threads in each would fight over it.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.tokenizer = load_tokenizer(output / TOKENIZER)
        # The process id keeps this task apart from the same task of a killed run that may still be writing.
        partial = final.with_name(f"{final.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        self.writer = ShardWriter(partial, len(self.tokenizer), self.settings.tokens_per_shard)
        refused, first = self._write_conversations(data) if self.settings.kind == "chat" else self._write_texts(data)
        shards = [asdict(shard) for shard in self.writer.finish()]
        write_json(partial / "summary.json", {"shards": shards, "refused": refused, "first_refused": first})
        try:
            os.rename(partial, final)
        except OSError:
            if not final.exists():
                raise
            shutil.rmtree(partial)

    def _write_texts(self, data: Iterator[Document]) -> tuple[int, str]:
        bos = [self.tokenizer.bos_token_id] if self.settings.add_bos else []
        eos = [self.tokenizer.eos_token_id] if self.settings.add_eos else []
        begun, source_bytes = False, 0
        for batch in _batches(data):
            for document, ids in zip(batch, encode_texts(self.tokenizer, [d.text for d in batch]), strict=True):
                if not begun:
                    self.writer.extend(bos)
                    begun = True
                self.writer.extend(ids)
                source_bytes += len(document.text.encode())
                if document.metadata["last"]:
                    self.writer.extend(eos)
                    self.writer.end_document(source_bytes=source_bytes)
                    begun, source_bytes = False, 0
        return 0, ""

    def _write_conversations(self, data: Iterator[Document]) -> tuple[int, str]:
        refused, first = 0, ""
        for document in data:
            messages, record = document.metadata["messages"], document.metadata["record"]
            try:
                examples = [
                    (*encode_conversation(self.tokenizer, part, record), part)
                    for part in (split_turns(messages) if self.settings.split_turns else [messages])
                ]
            except IlladaError as error:
                refused, first = refused + 1, first or str(error)
                continue
            for ids, prompt_tokens, part in examples:
                size = sum(len(message["content"].encode()) for message in part)
                self.writer.append(ids, prompt_tokens, size)
        return refused, first


class Finish(PipelineStep):
    """Completes the data set when all tasks are done, for Slurm, where no process waits for them."""

    type = "WRITER"
    name = "illada index"

    def __init__(self, output: str):
        super().__init__()
        self.output = output

    def run(self, data: Iterator[Document] | None = None, rank: int = 0, world_size: int = 1) -> None:  # noqa: ARG002
        """Put the shards of all tasks together and write the index."""
        finish(self.output)


def _batches(data: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in data:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_PIECES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
