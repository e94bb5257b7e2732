"""The folder of a run: the recipe that it belongs to, the lock of its trainer, the file that begins the decay."""

import fcntl
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import yaml

from illada.data.shards import Shards
from illada.errors import IlladaError
from illada.files import write_text
from illada.training.recipe import Recipe
from illada.training.schedule import Schedule
from illada.weights.runs import RECIPE, RunState, read_recipe

LOCK, DECAY = ".lock", "DECAY"
FREE_TO_CHANGE = (
    "training.samples_per_batch",
    "training.validate_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.keep_every",
    "training.device",
    "parallel.replicate",
    "parallel.tensor",
    "parallel.gather",
    "parallel.recompute",
    "parallel.compile",
    "parallel.attention",
    "parallel.kernels",
)
"""Recipe keys that may differ when a run is continued: they change its weights by no more than rounding."""

_TRAINING = "noise mask_range loss_weight complementary average dropout"
ADDED_LATER = {"data": "shift_windows", "training": _TRAINING, "dpo": "anchor"}
"""Recipe keys that older runs do not know: at their defaults they are left out, so that those runs can be continued."""


def claim(run: Path, recipe: Recipe, shards: Shards, base: str | None) -> TextIO:
    """Lock a run folder for one trainer. The recipe is written into a new folder; an old one must be a run of it.

    Args:
        run: the folder.
        recipe: of the run.
        shards: its training data.
        base: fingerprint of the frozen weights, which no checkpoint holds; None when all weights are trained.

    Returns:
        the lock: the folder is locked until this file is closed or the process ends, in whatever way.

    Raises:
        IlladaError: when the folder holds something else or another recipe's run, or another process trains in it.
    """
    sources = shards.index["provenance"].get("source_fingerprint")
    data = {"tokens": shards.tokens, "tokenizer": shards.tokenizer_sha256, "sources": sources}
    content = {**asdict(recipe), "data_fingerprint": data}
    del content["output"], content["log"]
    for section, names in ADDED_LATER.items():
        for name in names.split() if section in content else ():
            if content[section][name] == getattr(getattr(type(recipe)(), section), name):
                del content[section][name]
    if base is None:
        del content["lora"]
    else:
        content["base_fingerprint"] = base
    path = run / RECIPE
    if path.exists():
        previous = read_recipe(path)
        free = set(FREE_TO_CHANGE)
        if recipe.training.decay_when == "plateau":  # then validations decide when the decay begins
            free.discard("training.validate_every")
        changed = [key for key in _differences(previous, content) if key not in free]
        if changed:
            raise IlladaError(
                f"{run} holds a run with another recipe ({', '.join(changed[:4])} differ): "
                "choose another --output or restore the recipe"
            )
    elif run.exists() and (not run.is_dir() or any(p.suffix != ".partial" and p.name != LOCK for p in run.iterdir())):
        raise IlladaError(f"{run} is not empty and holds no run: choose another --output")
    run.mkdir(parents=True, exist_ok=True)
    lock = (run / LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise IlladaError(f"another process trains in {run}: wait for its end or choose another --output") from None
    if not path.exists():
        write_text(path, yaml.safe_dump(content, sort_keys=False))
    return lock


def requested_decay(run: Path, state: RunState, schedule: Schedule) -> int | None:
    """Return the step at which the decay begins, if the file DECAY in the run folder asks for it now.

    The step is written into the file, so that a run killed after the switch switches at the same step again.
    """
    path = run / DECAY
    if state.decay_start is not None or state.step >= schedule.decay_start or not path.exists():
        return None
    text = path.read_bytes().strip()
    if not text.isdigit() or len(text) > 18:  # whatever the user wrote, mostly nothing
        write_text(path, f"{state.step}\n")
        return state.step
    return int(text) if int(text) <= state.step else None


def _differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = list(dict.fromkeys([*a, *b]))
        return [d for k in keys for d in _differences(a.get(k), b.get(k), f"{prefix}.{k}" if prefix else str(k))]
    return [] if a == b else [prefix]
