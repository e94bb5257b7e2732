"""Raw text to token shards: restartable, and the same bytes whatever the number of workers.

`prepare` has three phases: `plan` divides the sources into tasks, an executor of datatrove's carries out the stages
(`executors`), `finish` puts the shards together. Division and order depend on the sources alone.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal

from illada.data.shards import INDEX, TOKENS_PER_SHARD, Shards
from illada.errors import IlladaError
from illada.files import write_json
from illada.preparation import filters as text_filters
from illada.preparation import steps
from illada.preparation.executors import progress, run_locally, run_on_ray, submit_to_slurm
from illada.preparation.filters import Stage
from illada.preparation.folder import PLAN, TOKENIZER, UNITS, WORK, compare_plans, existing_plan, finish, read_plan
from illada.preparation.readers import PATTERNS, Options, SourceFile, Unit, divide, find_files, fingerprint
from illada.text.tokenizer import load_tokenizer, tokenizer_sha256


def prepare(
    sources: Sequence[str],
    output: str,
    tokenizer: str,
    kind: Literal["text", "chat"] = "text",
    text_field: str = "text",
    documents: Literal["file", "line"] = "file",
    patterns: Sequence[str] = PATTERNS,
    exclude: Sequence[str] = (),
    add_bos: bool = True,
    add_eos: bool = True,
    split_turns: bool = False,
    workers: int = 1,
    tokens_per_shard: int = TOKENS_PER_SHARD,
    task_bytes: int = 0,
    dedup: Literal["none", "exact", "minhash"] = "none",
    filters: Sequence[str] = (),
    executor: Literal["local", "ray", "slurm"] = "local",
    partition: str | None = None,
    time: str = "24:00:00",
    memory_gb: int = 2,
    slurm_options: Sequence[str] = (),
) -> Shards | str:
    """Turn files and folders into a prepared data set; the same call continues where an interrupted one stopped.

    Returns the data set, or the number of the last job where Slurm works on it.

    Args:
        sources: text files, .jsonl and .parquet files (also .gz for the first two), and folders of them.
        output: the folder to make.
        tokenizer: folder of the tokenizer; a copy goes with the data.
        kind: "text", or "chat" for records {"messages": [...]} or {"prompt", "response"}.
        text_field: the field (kind "text") that holds the text of a record.
        documents: whether a plain text file is one document or has one per line.
        patterns: which files of a folder are read.
        exclude: which of those are not.
        add_bos: begin each text with the tokenizer's BOS (ours); a conversation begins as its template says.
        add_eos: end each text with EOS (ours); a conversation always ends with one.
        split_turns: one example per assistant turn, not per conversation: the older LLaDA rule (spec §4).
        workers: processes; one process uses all cores for tokenising, several use one each and read in parallel too.
        tokens_per_shard: a shard is closed by the first document that reaches this.
        task_bytes: size of a task, the unit of restarting; 0 for a size that suits the sources.
        dedup: leave out repeated documents: "exact" the equal ones, "minhash" the very similar ones too.
        filters: leave out poor text by known rules, made for English web pages: gopher, gopher-repetition, c4, fineweb.
        executor: "local" for processes of this machine, "ray" for a Ray cluster (RAY_ADDRESS, or started here), "slurm"
            to submit jobs; clusters need `sources` and `output` on a disk that all machines share.
        partition: of the Slurm cluster.
        time: most a Slurm job may take.
        memory_gb: for each worker on Ray and Slurm.
        slurm_options: more of sbatch's, as account=NAME.

    Raises:
        IlladaError: when a source is missing or unusable, or `output` holds something else.
    """
    if workers < 1 or memory_gb < 1:
        raise IlladaError(f"workers and memory_gb must be at least 1, not {workers} and {memory_gb}")
    if executor == "slurm" and partition is None:
        raise IlladaError("executor slurm needs a partition: `sinfo` lists them")
    if executor != "slurm" and (partition is not None or slurm_options):
        raise IlladaError("partition and slurm_options are for executor slurm")
    tasks = plan(
        sources, output, tokenizer, kind, text_field, documents, patterns, exclude,
        add_bos, add_eos, split_turns, tokens_per_shard, task_bytes, dedup, filters,
    )  # fmt: skip
    if tasks and executor == "slurm":
        last = Stage("finish", 1, [steps.Finish(os.path.abspath(output))])
        # Not in "work": the last job puts that away while its own log is still being written.
        log = Path(os.path.abspath(output), "slurm")
        assert partition is not None
        return submit_to_slurm([*stages(output), last], log, workers, partition, time, memory_gb, slurm_options)
    if tasks:
        work = Path(os.path.abspath(output), "work")
        todo = stages(output, threads=executor == "local" and min(workers, tasks) == 1)
        with progress(work, read_plan(Path(output))["source_bytes"]):
            if executor == "ray":
                run_on_ray(todo, work / "log", workers, memory_gb)
            else:
                run_locally(todo, work / "log", workers)
    return finish(output)


def plan(
    sources: Sequence[str],
    output: str,
    tokenizer: str,
    kind: Literal["text", "chat"] = "text",
    text_field: str = "text",
    documents: Literal["file", "line"] = "file",
    patterns: Sequence[str] = PATTERNS,
    exclude: Sequence[str] = (),
    add_bos: bool = True,
    add_eos: bool = True,
    split_turns: bool = False,
    tokens_per_shard: int = TOKENS_PER_SHARD,
    task_bytes: int = 0,
    dedup: Literal["none", "exact", "minhash"] = "none",
    filters: Sequence[str] = (),
) -> int:
    """Write the plan of a preparation into `output`; returns how many tasks it has, 0 when all is finished.

    Arguments are those of `prepare`.

    Raises:
        IlladaError: when a source is missing, or `output` holds another preparation or anything else.
    """
    if kind not in ("text", "chat") or documents not in ("file", "line"):
        raise IlladaError(f"kind is text or chat and documents is file or line, not {kind!r} and {documents!r}")
    if split_turns and kind != "chat":
        raise IlladaError("split_turns is for conversations: add kind chat")

    if dedup not in ("none", "exact", "minhash"):
        raise IlladaError(f"dedup is none, exact or minhash, not {dedup!r}")
    filters = [name for given in filters for name in given.replace(",", " ").split()]
    text_filters.check(filters, kind)
    if tokens_per_shard < 1 or task_bytes < 0:
        raise IlladaError("tokens_per_shard must be at least 1 and task_bytes at least 0")
    files = find_files(sources, patterns, exclude)
    loaded = load_tokenizer(tokenizer)
    for wanted, name in ((add_bos and kind == "text", "bos"), (add_eos or kind == "chat", "eos")):
        if wanted and getattr(loaded, f"{name}_token_id") is None:
            raise IlladaError(f"the tokenizer {tokenizer} has no {name}_token: set add_{name} to false or use another")
    if kind == "chat" and not loaded.chat_template:
        raise IlladaError(f"the tokenizer {tokenizer} has no chat template: use one made by `illada tokenizer`")

    options = Options(kind=kind, text_field=text_field, documents=documents)
    tasks = _tasks(files, options, task_bytes)
    preparation = {
        "sources": [os.path.abspath(source) for source in sources],
        "source_files": len(files),
        "source_bytes": sum(file.size for file in files),
        "source_fingerprint": fingerprint(files),
        "tokenizer_sha256": tokenizer_sha256(loaded),
        "chat_template": loaded.chat_template if kind == "chat" else None,
        "kind": kind,
        "text_field": text_field,
        "documents": documents,
        "patterns": list(patterns),
        "exclude": list(exclude),
        "add_bos": add_bos,
        "add_eos": add_eos,
        "split_turns": split_turns,
        "tokens_per_shard": tokens_per_shard,
        "task_bytes": task_bytes,
        "dedup": dedup,
        "filters": filters,
        "illada": metadata.version("illada"),
        "datatrove": metadata.version("datatrove"),
        "special_ids": {
            "bos": loaded.bos_token_id if add_bos or kind == "chat" else None,
            "eos": loaded.eos_token_id if add_eos or kind == "chat" else None,
        },
    }
    folder = Path(output)
    existing = existing_plan(folder)
    if existing is not None:
        compare_plans(folder, existing, preparation)
        return 0 if (folder / INDEX).exists() else len(tasks)
    work = folder / WORK
    work.mkdir(parents=True, exist_ok=True)
    loaded.save_pretrained(folder / TOKENIZER)
    if tokenizer_sha256(load_tokenizer(folder / TOKENIZER)) != preparation["tokenizer_sha256"]:
        raise IlladaError(f"the tokenizer {tokenizer} changes when it is saved: it cannot travel with the data")
    with open(work / UNITS, "w", encoding="utf-8") as file:
        file.writelines(json.dumps([dataclasses.asdict(unit) for unit in units]) + "\n" for units in tasks)
    # Written last: a folder with a plan has all that the tasks need.
    write_json(work / PLAN, preparation | {"tasks": len(tasks), "vocab_size": len(loaded)})
    return len(tasks)


def stages(output: str, threads: bool = False) -> list[Stage]:
    """Return the stages that carry out the plan in `output`; `threads` lets the tokenizer use all cores."""
    planned = read_plan(Path(output))
    options = Options(kind=planned["kind"], text_field=planned["text_field"], documents=planned["documents"])
    if planned["filters"] or planned["dedup"] != "none":
        # Rules and duplicates are about whole documents.
        options = dataclasses.replace(options, piece_characters=sys.maxsize)
    settings = {name: planned[name] for name in ("kind", "add_bos", "add_eos", "split_turns", "tokens_per_shard")}
    path = os.path.abspath(output)
    return text_filters.stages(
        lambda: steps.ReadDocuments(path, options),
        lambda: steps.WriteShards(path, **settings, threads=threads),
        planned["tasks"],
        planned["filters"],
        planned["dedup"],
        Path(path, WORK, "dedup"),
    )


def _tasks(files: Sequence[SourceFile], options: Options, task_bytes: int) -> list[list[Unit]]:
    """Divide the files, in order, into tasks of about `task_bytes`."""
    # Some hundred tasks, so that workers finish together and an interruption costs little; neither tiny nor huge ones.
    task_bytes = task_bytes or min(max(sum(file.size for file in files) // 256, 16 << 20), 1 << 30)
    tasks: list[list[Unit]] = [[]]
    held = 0
    for file in files:
        for unit in divide(file, options, task_bytes):
            size = unit.end - unit.start
            if tasks[-1] and held + size > task_bytes:
                tasks.append([])
                held = 0
            tasks[-1].append(unit)
            held += size
    return tasks
