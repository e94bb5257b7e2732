"""The steps of a preparation that are ours: functions that datatrove calls with (settings, data, rank, world size).

They find their tasks in the output folder, so a step is small and the same on the local, Slurm and Ray executors.
Importing this module needs `pip install 'illada[data]'`.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from illada.errors import IlladaError, needs
from illada.files import write_json
from illada.folders import sync
from illada.preparation.finish import finish
from illada.preparation.options import PrepareSettings
from illada.preparation.plan import TOKENIZER, UNITS, WORK, stats_file, task_folder
from illada.preparation.readers import Options, ReadStats, Unit, read_unit
from illada.preparation.records import both_sides
from illada.preparation.shard_writer import ShardWriter
from illada.text.chat import encode_conversation, split_turns
from illada.text.tokenizer import encode_texts, load_tokenizer

with needs("data", "preparing data"):
    from datatrove.data import Document

_BATCH_CHARACTERS = 4_000_000
_BATCH_PIECES = 2000
_PROGRESS_BYTES = 4 << 20


def read_documents(settings: PrepareSettings, _data: None, rank: int, _world_size: int) -> Iterator[Document]:
    """Yield the pieces of the documents of task `rank` as datatrove documents; none when the task is finished."""
    output, options, stats = Path(settings.output), Options.of(settings), ReadStats()
    if task_folder(output, rank).exists():
        return
    progress, reported, done = output / WORK / f"progress-{rank:05d}", 0, 0
    with open(output / UNITS, encoding="utf-8") as file:
        units = [Unit(**unit) for unit in json.loads(next(islice(file, rank, None)))]
    for unit in units:
        stats.bytes_read = 0
        for number, piece in enumerate(read_unit(unit, options, stats)):
            metadata = {"last": piece.last, "record": piece.record, "messages": piece.messages}
            yield Document(text=piece.text, id=f"{rank}/{unit.path}/{unit.start}/{number}", metadata=metadata)
            now = done + min(stats.bytes_read, unit.size)
            if now - reported >= _PROGRESS_BYTES:
                reported = now
                progress.write_text(str(now))
        done += unit.size
    progress.write_text(str(done))
    stats.bytes_read = 0
    write_json(stats_file(output, rank), asdict(stats))


def write_shards(settings: PrepareSettings, data: Iterator[Document], rank: int, tasks: int) -> None:
    """Tokenise the documents of task `rank` into shards, in a folder that gets its final name when all are complete."""
    output = Path(settings.output)
    final = task_folder(output, rank)
    if final.exists():
        return
    if settings.executor != "local" or min(settings.workers, tasks) > 1:
        # There are as many processes as the machine should run; threads in each would fight over it.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(output / TOKENIZER)
    # The process id keeps this task apart from the same task of a killed run that may still be writing.
    partial = final.with_name(f"{final.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    writer = ShardWriter(partial, len(tokenizer), settings.tokens_per_shard)
    refused, first = 0, ""
    try:
        if settings.kind == "text":
            _write_texts(settings, tokenizer, writer, data)
        else:
            refused, first = _write_conversations(settings, tokenizer, writer, data)
        summary = {"shards": [asdict(shard) for shard in writer.finish()], "sums": writer.sums}
        write_json(partial / "summary.json", {**summary, "refused": refused, "first_refused": first})
        sync(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        os.rename(partial, final)
    except OSError:
        if not final.exists():
            raise
        shutil.rmtree(partial)


def _write_texts(
    settings: PrepareSettings, tokenizer: PreTrainedTokenizerFast, writer: ShardWriter, data: Iterator[Document]
) -> None:
    bos = [tokenizer.bos_token_id] if settings.add_bos else []
    eos = [tokenizer.eos_token_id] if settings.add_eos else []
    begun, source_bytes = False, 0
    for batch in _batches(data):
        for document, ids in zip(batch, encode_texts(tokenizer, [d.text for d in batch]), strict=True):
            writer.extend(ids if begun else bos + ids)
            begun = not document.metadata["last"]
            source_bytes += len(document.text.encode())
            if not begun:
                writer.extend(eos)
                writer.end_document(source_bytes=source_bytes)
                source_bytes = 0


def _write_conversations(
    settings: PrepareSettings, tokenizer: PreTrainedTokenizerFast, writer: ShardWriter, data: Iterator[Document]
) -> tuple[int, str]:
    """Write conversations and, as two documents in a row, the sides of a pair, the chosen one first.

    Return how many were refused, by the chat template or for answers that are the same, and why the first was.
    """
    refused, first = 0, ""
    for document in data:
        messages, record = document.metadata["messages"], document.metadata["record"]
        pair = settings.kind == "preference"
        parts = both_sides(messages) if pair else split_turns(messages) if settings.split_turns else [messages]
        try:
            examples = [(*encode_conversation(tokenizer, part, record), part) for part in parts]
            # Of ids, because a template may drop the white space in which the texts differ.
            if pair and examples[0][0] == examples[1][0]:
                raise IlladaError(f"{record}: the chosen and the rejected answer are the same")
        except IlladaError as error:
            refused, first = refused + 1, first or str(error)
            continue
        for ids, prompt_tokens, part in examples:
            writer.append(ids, prompt_tokens, sum(len(message["content"].encode()) for message in part))
    return refused, first


def finish_data(settings: PrepareSettings, *_: object) -> None:
    """Complete the data set when all tasks are done, for Slurm, where no process waits for them."""
    finish(settings.output)


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
