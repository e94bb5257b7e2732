"""The folder of a preparation: its plan, its tasks' work, and the data set that is made of them."""

import json
import os
import shutil
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from illada.data.shards import INDEX, ShardInfo, Shards, write_index
from illada.errors import IlladaError

WORK = "work"


TOKENIZER = "tokenizer"


UNITS = "units.jsonl"


def task_folder(output: Path, rank: int) -> Path:
    """Return the folder of the finished shards of task `rank`; it appears all at once."""
    return output / WORK / f"task-{rank:05d}"


PLAN = "plan.json"


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
    planned = read_plan(folder)
    shards: list[ShardInfo] = []
    odd: Counter[str] = Counter()
    failures: dict[str, Counter[str]] = {}
    first_failure: dict[str, str] = {}
    refused = ""
    for rank in range(planned["tasks"]):
        done = task_folder(folder, rank)
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


def existing_plan(folder: Path) -> dict[str, Any] | None:
    """Return the preparation that `folder` holds, finished or not; None for an empty or new folder."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise IlladaError(f"{folder} is a file: choose another output")
    if (folder / INDEX).exists():
        provenance = Shards.open(folder).index.get("provenance", {})
        return {name: value for name, value in provenance.items() if name != "date"}
    if (folder / "work" / PLAN).exists():
        return {name: value for name, value in read_plan(folder).items() if name not in ("tasks", "vocab_size")}
    # Interrupted while planning: nothing but our own two folders is there.
    if {entry.name for entry in folder.iterdir()} <= {"work", "tokenizer"}:
        return None
    raise IlladaError(f"{folder} is not empty and holds no preparation: choose another output or empty it")


def compare_plans(folder: Path, existing: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise an IlladaError that names the first difference between a plan and the wanted one."""
    for name, value in wanted.items():
        before = existing.get(name)
        if before != value:
            was, now = str(before), str(value)
            change = f": {name} was {was}, now {now}" if len(was) + len(now) < 200 else f": {name} differs"
            raise IlladaError(f"{folder} holds another preparation{change}; choose another output or delete it")


def read_plan(folder: Path) -> dict[str, Any]:
    """Return the plan in a folder; raise an IlladaError when there is none or it is damaged."""
    try:
        planned: dict[str, Any] = json.loads((folder / "work" / PLAN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IlladaError(f"no preparation is planned in {folder}") from None
    except ValueError as error:
        raise IlladaError(f"the plan in {folder / 'work'} is damaged ({error}): delete {folder}") from None
    return planned
