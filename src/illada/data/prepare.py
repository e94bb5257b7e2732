"""Raw text to token shards: restartable, and the same bytes whatever the number of workers.

`prepare` has three phases: `plan` divides the sources into tasks, an executor of datatrove's carries out the stages
(`executors`), `finish` puts the shards together. Division and order depend on the sources alone.
"""

import dataclasses
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from illada.data.executors import progress, run_locally, run_on_ray, submit_to_slurm
from illada.data.shards import INDEX, TOKENS_PER_SHARD, ShardInfo, Shards, write_index, write_json
from illada.data.sources import PATTERNS, Options, SourceFile, Unit, divide, find_files, fingerprint
from illada.data.tokenizer import load_tokenizer, tokenizer_sha256
from illada.errors import IlladaError

if TYPE_CHECKING:
    from illada.data.cleaning import Stage

_PLAN = "plan.json"


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
        from illada.data.cleaning import Stage
        from illada.data.steps import Finish

        last = Stage("finish", 1, [Finish(os.path.abspath(output))])
        # Not in "work": the last job puts that away while its own log is still being written.
        log = Path(os.path.abspath(output), "slurm")
        assert partition is not None
        return submit_to_slurm([*stages(output), last], log, workers, partition, time, memory_gb, slurm_options)
    if tasks:
        work = Path(os.path.abspath(output), "work")
        todo = stages(output, threads=executor == "local" and min(workers, tasks) == 1)
        with progress(work, _planned(Path(output))["source_bytes"]):
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
    _require_extra()
    if kind not in ("text", "chat") or documents not in ("file", "line"):
        raise IlladaError(f"kind is text or chat and documents is file or line, not {kind!r} and {documents!r}")
    if split_turns and kind != "chat":
        raise IlladaError("split_turns is for conversations: add kind chat")
    from illada.data import cleaning, steps

    if dedup not in ("none", "exact", "minhash"):
        raise IlladaError(f"dedup is none, exact or minhash, not {dedup!r}")
    filters = [name for given in filters for name in given.replace(",", " ").split()]
    cleaning.check(filters, kind)
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
    existing = _existing(folder)
    if existing is not None:
        _compare(folder, existing, preparation)
        return 0 if (folder / INDEX).exists() else len(tasks)
    work = folder / steps.WORK
    work.mkdir(parents=True, exist_ok=True)
    loaded.save_pretrained(folder / steps.TOKENIZER)
    if tokenizer_sha256(load_tokenizer(folder / steps.TOKENIZER)) != preparation["tokenizer_sha256"]:
        raise IlladaError(f"the tokenizer {tokenizer} changes when it is saved: it cannot travel with the data")
    with open(work / steps.UNITS, "w", encoding="utf-8") as file:
        file.writelines(json.dumps([dataclasses.asdict(unit) for unit in units]) + "\n" for units in tasks)
    # Written last: a folder with a plan has all that the tasks need.
    write_json(work / _PLAN, preparation | {"tasks": len(tasks), "vocab_size": len(loaded)})
    return len(tasks)


def stages(output: str, threads: bool = False) -> "list[Stage]":
    """Return the stages that carry out the plan in `output`; `threads` lets the tokenizer use all cores."""
    _require_extra()
    from illada.data import cleaning, steps

    planned = _planned(Path(output))
    options = Options(kind=planned["kind"], text_field=planned["text_field"], documents=planned["documents"])
    if planned["filters"] or planned["dedup"] != "none":
        # Rules and duplicates are about whole documents.
        options = dataclasses.replace(options, piece_characters=sys.maxsize)
    settings = {name: planned[name] for name in ("kind", "add_bos", "add_eos", "split_turns", "tokens_per_shard")}
    path = os.path.abspath(output)
    return cleaning.stages(
        lambda: steps.ReadDocuments(path, options),
        lambda: steps.WriteShards(path, **settings, threads=threads),
        planned["tasks"],
        planned["filters"],
        planned["dedup"],
        Path(path, steps.WORK, "dedup"),
    )


def finish(output: str) -> Shards:
    """Put the shards of all tasks together and write the index; returns at once when that is done.

    Raises:
        IlladaError: when a task is not finished or no document was kept.
    """
    folder = Path(output)
    work = folder / "work"
    if (folder / INDEX).exists():
        shutil.rmtree(work, ignore_errors=True)
        return Shards.open(folder)
    from illada.data import steps

    planned = _planned(folder)
    shards: list[ShardInfo] = []
    odd: Counter[str] = Counter()
    failures: dict[str, Counter[str]] = {}
    first_failure: dict[str, str] = {}
    refused = ""
    for rank in range(planned["tasks"]):
        done = steps.task_folder(folder, rank)
        try:
            summary = json.loads((done / "summary.json").read_text(encoding="utf-8"))
            counts = json.loads((work / f"odd-{rank:05d}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise IlladaError(f"task {rank} of {output} is not finished: run the preparation again") from None
        counts.pop("bytes_read")
        for path, entry in counts.pop("failures").items():
            failures.setdefault(path, Counter()).update(good=entry["good"], bad=entry["bad"])
            first_failure[path] = first_failure.get(path) or entry["first"]
        odd.update(counts)
        odd["refused_conversations"] += summary["refused"]
        refused = refused or summary["first_refused"]
        for made in summary["shards"]:
            info = ShardInfo(**made | {"name": f"shard-{len(shards):05d}"})
            for suffix in ("tokens", "documents"):
                # Already there when the last finish() was interrupted.
                if (source := done / f"{made['name']}.{suffix}").exists():
                    os.replace(source, folder / f"{info.name}.{suffix}")
            shards.append(info)
    for path, count in failures.items():
        if count["bad"] and not count["good"]:
            raise IlladaError(f"{path}: none of its {count['bad']} records is usable; {first_failure[path]}")
    odd.update(_left_out(folder, planned))
    if not shards:
        counted = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in odd.items() if count)
        raise IlladaError(f"nothing to keep in the sources of {output} ({counted or 'no records'}) {refused}".strip())
    preparation = {name: value for name, value in planned.items() if name not in ("tasks", "vocab_size")}
    write_index(
        folder,
        shards,
        vocab_size=planned["vocab_size"],
        tokenizer_sha256=planned["tokenizer_sha256"],
        kind=planned["kind"],
        special_ids=planned["special_ids"],
        odd=dict(odd),
        provenance=preparation | {"date": datetime.now(UTC).isoformat(timespec="seconds")},
    )
    shutil.rmtree(work, ignore_errors=True)
    return Shards.open(folder)


def _left_out(folder: Path, planned: dict[str, Any]) -> Counter[str]:
    """Return how many documents the filters and the search for duplicates dropped, from datatrove's counts."""
    names = [name.replace("-", "_") for name in planned["filters"]] + ["duplicate"] * (planned["dedup"] != "none")
    dropped: Counter[str] = Counter()
    for log in (folder / "work" / "log", folder / "slurm"):
        for file in (log / "write" / "stats").glob("*.json"):
            # The first of the steps reads, the last one writes.
            for name, step in zip(names, json.loads(file.read_text())[1:], strict=False):
                count = step["stats"].get("dropped", 0)
                dropped[f"{name}_documents"] += int(count["total"] if isinstance(count, dict) else count)
    return dropped


def _require_extra() -> None:
    try:
        import datatrove  # noqa: F401
    except ImportError:
        raise IlladaError("preparing data needs datatrove: pip install 'illada[data]'") from None


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


def _existing(folder: Path) -> dict[str, Any] | None:
    """Return the preparation that `folder` holds, finished or not; None for an empty or new folder."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise IlladaError(f"{folder} is a file: choose another output")
    if (folder / INDEX).exists():
        provenance = Shards.open(folder).index.get("provenance", {})
        return {name: value for name, value in provenance.items() if name != "date"}
    if (folder / "work" / _PLAN).exists():
        return {name: value for name, value in _planned(folder).items() if name not in ("tasks", "vocab_size")}
    # Interrupted while planning: nothing but our own two folders is there.
    if {entry.name for entry in folder.iterdir()} <= {"work", "tokenizer"}:
        return None
    raise IlladaError(f"{folder} is not empty and holds no preparation: choose another output or empty it")


def _compare(folder: Path, existing: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        before = existing.get(name)
        if before != value:
            was, now = str(before), str(value)
            change = f": {name} was {was}, now {now}" if len(was) + len(now) < 200 else f": {name} differs"
            raise IlladaError(f"{folder} holds another preparation{change}; choose another output or delete it")


def _planned(folder: Path) -> dict[str, Any]:
    try:
        planned: dict[str, Any] = json.loads((folder / "work" / _PLAN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IlladaError(f"no preparation is planned in {folder}") from None
    except ValueError as error:
        raise IlladaError(f"the plan in {folder / 'work'} is damaged ({error}): delete {folder}") from None
    return planned
