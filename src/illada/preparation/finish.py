"""The last phase of a preparation: put the shards of all tasks together and write the index."""

import json
import os
import shutil
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from illada.data.shards import INDEX, ShardInfo, Shards
from illada.errors import IlladaError
from illada.preparation.plan import LOG, SLURM_LOG, WORK, read_plan, stats_file, task_folder
from illada.preparation.readers import ReadStats
from illada.preparation.shard_writer import write_index


def finish(output: str) -> Shards:
    """Put the shards of all tasks together and write the index, unless that is done; delete what is no longer needed.

    Raises:
        IlladaError: when a task is not finished or no document was kept.
    """
    folder = Path(output)
    if not (folder / INDEX).exists():
        _assemble(folder)
    shutil.rmtree(folder / WORK, ignore_errors=True)
    return Shards.open(folder)


def _assemble(folder: Path) -> None:
    plan = read_plan(folder)
    shards: list[ShardInfo] = []
    sums: dict[str, str] = {}
    counts: Counter[str] = Counter()
    total = ReadStats()
    refusal = ""
    for rank in range(plan["tasks"]):
        task = task_folder(folder, rank)
        try:
            summary = json.loads((task / "summary.json").read_text(encoding="utf-8"))
            stats = json.loads(stats_file(folder, rank).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise IlladaError(f"task {rank} of {folder} is not finished: run the preparation again") from None
        stats.pop("bytes_read")
        for path, records in stats.pop("failures").items():
            total.count_records(path, records["good"], records["bad"], records["first"])
        counts.update(stats)
        counts["refused_pairs" if plan["kind"] == "preference" else "refused_conversations"] += summary["refused"]
        refusal = refusal or summary["first_refused"]
        for shard in summary["shards"]:
            info = ShardInfo(**shard | {"name": f"shard-{len(shards):05d}"})
            for suffix in ("tokens", "documents"):
                # The file has moved already when an earlier finish() was interrupted.
                if (source := task / f"{shard['name']}.{suffix}").exists():
                    os.replace(source, folder / f"{info.name}.{suffix}")
                if digest := summary.get("sums", {}).get(source.name):  # a task of an older version has none
                    sums[f"{info.name}.{suffix}"] = digest
            shards.append(info)
    for path, records in total.failures.items():
        if records["bad"] and not records["good"]:
            raise IlladaError(f"{path}: none of its {records['bad']} records is usable; {records['first']}")
    counts.update(_dropped_documents(folder, plan))
    if not shards:
        listed = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count)
        raise IlladaError(f"nothing to keep in the sources of {folder} ({listed or 'no records'}) {refusal}".strip())
    provenance = {name: value for name, value in plan.items() if name not in ("tasks", "vocab_size")}
    write_index(
        folder,
        shards,
        vocab_size=plan["vocab_size"],
        tokenizer_sha256=plan["tokenizer_sha256"],
        kind=plan["kind"],
        special_ids=plan["special_ids"],
        odd=dict(counts),
        sums=sums,
        provenance=provenance | {"date": datetime.now(UTC).isoformat(timespec="seconds")},
    )


def _dropped_documents(folder: Path, plan: dict[str, Any]) -> Counter[str]:
    """Return how many documents the filters and the search for duplicates dropped, from datatrove's counts."""
    names = [name.replace("-", "_") for name in plan["filters"]] + ["duplicate"] * (plan["dedup"] != "none")
    dropped: Counter[str] = Counter()
    for log in (LOG, SLURM_LOG):
        for file in (folder / log / "write" / "stats").glob("*.json"):
            # Our own steps, the first and the last, have no counts.
            for name, step in zip(names, json.loads(file.read_text()), strict=True):
                count = step["stats"].get("dropped", 0)
                dropped[f"{name}_documents"] += int(count["total"] if isinstance(count, dict) else count)
    return dropped
