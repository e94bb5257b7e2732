"""The first phase of a preparation: divide the sources into tasks and write down what decides the data.

The plan lies in the output folder, where the tasks, `finish` and the next call of `prepare` find it. Division and order
depend on the sources alone.
"""

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from illada.data.shards import INDEX, Shards
from illada.errors import IlladaError
from illada.files import naming, parse_json, write_json
from illada.preparation.options import PrepareSettings
from illada.preparation.readers import Options, SourceFile, Unit, divide, find_files, fingerprint
from illada.text.tokenizer import load_tokenizer, tokenizer_sha256

# Paths inside the output folder. All of WORK is deleted when the data is complete.
WORK, TOKENIZER = "work", "tokenizer"
PLAN, UNITS, LOG = f"{WORK}/plan.json", f"{WORK}/units.jsonl", f"{WORK}/log"
SLURM_LOG = "slurm"  # not in WORK: the last job deletes that while its own log is still being written

FREE_TO_CHANGE = ("output", "tokenizer", "workers", "executor", "partition", "time", "memory_gb", "slurm_options")
"""Settings that may differ when a preparation is continued. The tokenizer is recorded by its hash, not by its path."""


def task_folder(output: Path, rank: int) -> Path:
    """Return the folder of the finished shards of task `rank`; it appears all at once."""
    return output / WORK / f"task-{rank:05d}"


def stats_file(output: Path, rank: int) -> Path:
    """Return the file with the `ReadStats` of task `rank`."""
    return output / WORK / f"odd-{rank:05d}.json"


def plan(settings: PrepareSettings) -> int:
    """Write the plan of a preparation into its output folder; return how many tasks it has, 0 when all is finished.

    Raises:
        IlladaError: when a source is missing, the tokenizer does not suit, or the folder holds anything else.
    """
    files = find_files(settings.sources, settings.patterns, settings.exclude)
    tokenizer = _load_suitable_tokenizer(settings)
    tasks = _divide_into_tasks(files, Options.of(settings), settings.task_bytes)
    chat = settings.kind != "text"
    preparation = {
        "sources": [os.path.abspath(source) for source in settings.sources],
        "source_files": len(files),
        "source_bytes": sum(file.size for file in files),
        "source_fingerprint": fingerprint(files),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "chat_template": tokenizer.chat_template if chat else None,
        **{name: value for name, value in asdict(settings).items() if name not in ("sources", *FREE_TO_CHANGE)},
        "illada": metadata.version("illada"),
        "datatrove": metadata.version("datatrove"),
        "special_ids": {
            "bos": tokenizer.bos_token_id if settings.add_bos or chat else None,
            "eos": tokenizer.eos_token_id if settings.add_eos or chat else None,
        },
    }
    output = Path(settings.output)
    if _holds(output, preparation):
        return 0 if (output / INDEX).exists() else len(tasks)
    new = not output.exists()
    try:
        _write(output, preparation, tasks, tokenizer)
    except BaseException:
        for part in (WORK, TOKENIZER):
            shutil.rmtree(output / part, ignore_errors=True)
        if new:
            shutil.rmtree(output, ignore_errors=True)
        raise
    return len(tasks)


def _write(output: Path, plan: dict[str, Any], tasks: list[list[Unit]], tokenizer: PreTrainedTokenizerFast) -> None:
    """Write all that the tasks need."""
    (output / WORK).mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output / TOKENIZER)
    if tokenizer_sha256(load_tokenizer(output / TOKENIZER)) != plan["tokenizer_sha256"]:
        raise IlladaError(
            f"the tokenizer {tokenizer.name_or_path} changes when it is saved: it cannot travel with the data"
        )
    with naming(output / UNITS), open(output / UNITS, "w", encoding="utf-8") as file:
        file.writelines(json.dumps([asdict(unit) for unit in units]) + "\n" for units in tasks)
    # The plan is written last: a folder with a plan has all that the tasks need.
    write_json(output / PLAN, plan | {"tasks": len(tasks), "vocab_size": len(tokenizer)})


def discard(output: Path) -> None:
    """Delete what a failed preparation has written, unless work would be lost: tokens, or a search for duplicates."""
    if (output / INDEX).exists() or any((output / LOG).glob("[!w]*/completions/*")):  # of all stages but `write`
        return
    summaries = output.glob(f"{WORK}/task-*/summary.json")
    if any(json.loads(summary.read_text(encoding="utf-8"))["shards"] for summary in summaries):
        return
    shutil.rmtree(output / WORK)
    shutil.rmtree(output / TOKENIZER, ignore_errors=True)
    with suppress(OSError):  # it holds something else
        output.rmdir()


def read_plan(output: Path) -> dict[str, Any]:
    """Return the plan in an output folder.

    Raises:
        IlladaError: when there is none or it is damaged.
    """
    try:
        content: dict[str, Any] = parse_json((output / PLAN).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("tasks"), int):
            raise ValueError("it does not say how many tasks there are")
    except FileNotFoundError:
        raise IlladaError(f"no preparation is planned in {output}") from None
    except ValueError as error:
        raise IlladaError(f"the plan in {output / WORK} is damaged ({error}): delete {output}") from None
    return content


def _holds(output: Path, preparation: dict[str, Any]) -> bool:
    """Say whether a folder holds this preparation already, finished or not; an empty or new folder does not.

    Raises:
        IlladaError: when it holds another preparation, naming the first difference, or anything else.
    """
    if not output.exists():
        return False
    if not output.is_dir():
        raise IlladaError(f"{output} is a file: choose another output")
    if (output / INDEX).exists():
        existing = Shards.open(output).index.get("provenance", {})
    elif (output / PLAN).exists():
        existing = read_plan(output)
    elif {entry.name for entry in output.iterdir()} <= {WORK, TOKENIZER}:  # interrupted while planning
        return False
    else:
        raise IlladaError(f"{output} is not empty and holds no preparation: choose another output or empty it")
    for name, value in preparation.items():
        if existing.get(name) != value:
            was, now = str(existing.get(name)), str(value)
            change = f": {name} was {was}, now {now}" if len(was) + len(now) < 200 else f": {name} differs"
            raise IlladaError(f"{output} holds another preparation{change}; choose another output or delete it")
    return True


def _load_suitable_tokenizer(settings: PrepareSettings) -> PreTrainedTokenizerFast:
    """Load the tokenizer and check that it has the tokens and the template that the documents need."""
    tokenizer, name, chat = load_tokenizer(settings.tokenizer), settings.tokenizer, settings.kind != "text"
    for needed, token in ((settings.add_bos and not chat, "bos"), (settings.add_eos or chat, "eos")):
        if needed and getattr(tokenizer, f"{token}_token_id") is None:
            raise IlladaError(f"the tokenizer {name} has no {token}_token: set add_{token} to false or use another")
    if chat and not tokenizer.chat_template:
        raise IlladaError(f"the tokenizer {name} has no chat template: use one made by `illada tokenizer`")
    return tokenizer


def _divide_into_tasks(files: Sequence[SourceFile], options: Options, task_bytes: int) -> list[list[Unit]]:
    """Divide the files, in order, into tasks of about `task_bytes`."""
    # Some hundred tasks, so that workers finish together and an interruption costs little; neither tiny nor huge ones.
    task_bytes = task_bytes or min(max(sum(file.size for file in files) // 256, 16 << 20), 1 << 30)
    tasks: list[list[Unit]] = [[]]
    held = 0
    for unit in (unit for file in files for unit in divide(file, options, task_bytes)):
        if tasks[-1] and held + unit.size > task_bytes:
            tasks.append([])
            held = 0
        tasks[-1].append(unit)
        held += unit.size
    return tasks
