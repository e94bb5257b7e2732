"""What a run folder holds: checkpoints and their state, the finished model or adapter, the log of its steps."""

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from illada.errors import DamagedError, IlladaError, first_line
from illada.files import check_yaml, parse_json, read_json, read_text
from illada.folders import damage, new_folder
from illada.hub import MODEL_FILES, hub_folder, is_hub_name
from illada.weights import adapters
from illada.weights.tensor_file import write_tensors, write_weights

STATE, ABOUT, RECIPE = "state.json", "about", "recipe.yaml"
PUT_ASIDE = "damaged-"
"""Begins the name of a checkpoint that was damaged."""
NOT_A_MODEL = "a starting point for training, not a model"
"""What the card of a converted model says until it is trained."""

AVERAGE = "/average"
"""Ends the name of a weight's average in a checkpoint (training.average)."""

_READ_AT_ONCE = 1 << 28
"""Bytes of a checkpoint's weights that are in memory at a time while a model is made of them."""


@dataclass
class RunState:
    """What a run is besides weights and moments. Order, noise and learning rate follow from this and the recipe."""

    step: int = 0
    """Steps done."""
    updates: int = 0
    """Those of the steps that changed the weights."""
    tokens: int = 0
    """Tokens trained on."""
    decay_start: int | None = None
    """Step at which an early decay began."""
    validation_losses: list[float] = field(default_factory=list)
    """Every validation so far, nats per token."""
    loss_mean: float = 0.0
    """Running mean of the loss, nats per token (see `spikes`)."""
    loss_variance: float = 0.0
    """Running variance of the loss."""
    skipped: int = 0
    """Steps left out since the last update."""
    returns: list[int] = field(default_factory=list)
    """Steps to which the run went back after spikes, in order of time."""


def read_state(checkpoint: Path, steps: float = math.inf) -> RunState:
    """Return the state of the run in a checkpoint; `steps` is how many the run has at most.

    Raises:
        DamagedError: when it cannot be read, or holds what no run can write.
    """
    path = checkpoint / STATE
    try:
        values = read_json(path)
    except IlladaError as error:
        raise DamagedError(str(error)) from error
    if unknown := sorted(values.keys() - {item.name for item in fields(RunState)}):
        raise DamagedError(f"{path} is damaged: a state has no {unknown[0]!r}")
    state = RunState(**values)  # older checkpoints lack what has come since
    for name, value in (("validation_losses", state.validation_losses), ("returns", state.returns)):
        if not isinstance(value, list):
            raise DamagedError(f"{path} is damaged: {name} is {value!r}, not a list")
    counts: list[tuple[str, Any]] = [(name, getattr(state, name)) for name in ("updates", "tokens", "skipped")]
    counts += [("step", values.get("step")), *(("returns", value) for value in state.returns)]
    counts += [("decay_start", state.decay_start)] * (state.decay_start is not None)
    numbers: list[tuple[str, Any]] = [("loss_mean", state.loss_mean), ("loss_variance", state.loss_variance)]
    numbers += [("validation_losses", value) for value in state.validation_losses]
    for name, value in counts:
        if type(value) is not int or not 0 <= value <= (math.inf if name == "tokens" else steps):
            most = "" if name == "tokens" or steps == math.inf else f" to {steps}, the last step of the run"
            raise DamagedError(f"{path} is damaged: {name} is {value!r}, not a whole number from 0{most}")
    for name, value in numbers:
        if type(value) not in (int, float):
            raise DamagedError(f"{path} is damaged: {name} holds {value!r}, not a number")
    return state


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run folder, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if (path / STATE).is_file())


def set_aside(damaged: list[Path]) -> None:
    """Give damaged checkpoints names under which they are none, so that no newer one makes way for them."""
    for path in damaged:
        number = 1
        while (target := path.with_name(f"{PUT_ASIDE}{number}-{path.name}")).exists():
            number += 1
        path.rename(target)


def check_checkpoint(path: Path, share: tuple[int, int] = (0, 1)) -> None:
    """Check a share of a checkpoint's files against their checksums; older checkpoints have none.

    Raises:
        DamagedError: when a file is not as it was written.
    """
    if faults := damage(path, share=share):
        raise DamagedError(faults[0])


def assemble(checkpoint: Path, parent: Path) -> Path:
    """Join the shards of a checkpoint to a folder that transformers or PEFT loads: parent/model or parent/adapter.

    Where the checkpoint holds an average of the weights, the folder gets that in their place.

    The folder appears whole or not at all; the weights pass through memory once, a part at a time.

    Raises:
        DamagedError: when a file of the checkpoint is not as it was written.
        IlladaError: when the disk is full.
    """
    check_checkpoint(checkpoint)
    about = checkpoint / ABOUT
    adapter = (about / adapters.CONFIG).is_file()
    target = parent / ("adapter" if adapter else "model")
    entries = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    names = sorted(name for name in entries if name.endswith(AVERAGE))
    names = names or sorted(name for name in entries if "/" not in name)  # the others are the optimiser's
    shapes: dict[str, Tensor] = {
        name.removesuffix(AVERAGE): torch.empty(
            entries[name].size,  # type: ignore[union-attr]
            dtype=entries[name].properties.dtype,  # type: ignore[union-attr]
            device="meta",
        )
        for name in names
    }
    saved = _Reader(checkpoint, shapes, names)
    with new_folder(target, into_existing=True) as folder:
        shutil.copytree(about, folder, dirs_exist_ok=True)
        if adapter:
            write_tensors(folder / adapters.WEIGHTS, shapes, saved.read)
        else:
            write_weights(folder, shapes, saved.read)
    return target


class _Reader:
    """Reads the tensors of a checkpoint in the order of their names, some ahead: every look at it opens all its shards.

    Args:
        checkpoint: its folder.
        shapes: meta tensors, by the names to read them by.
        names: the same tensors' names in the checkpoint, in that order.
    """

    def __init__(self, checkpoint: Path, shapes: Mapping[str, Tensor], names: list[str]):
        self.checkpoint, self.shapes = checkpoint, shapes
        self.names = dict(zip(shapes, names, strict=True))
        self.left = sorted(shapes)
        self.held: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        """Return a tensor, once."""
        if name not in self.held:
            chosen, size = [name], self.shapes[name].nbytes
            for other in self.left[self.left.index(name) + 1 :]:
                size += self.shapes[other].nbytes
                if size > _READ_AT_ONCE:
                    break
                chosen.append(other)
            tensors: dict[str, Tensor] = {
                self.names[one]: torch.empty_like(self.shapes[one], device="cpu") for one in chosen
            }
            load(tensors, storage_reader=HuggingFaceStorageReader(str(self.checkpoint)), no_dist=True)
            self.held = {one: tensors[self.names[one]] for one in chosen}
        return self.held.pop(name)


def tuned_on_chats(path: str) -> bool:
    """Say whether a model was tuned on conversations, as far as its name, or its run and the run's data, tell."""
    if re.search("instruct|chat", Path(path).name, re.IGNORECASE):
        return True
    recipe = next((p / RECIPE for p in (Path(path), *Path(path).absolute().parents[:3]) if is_run(p)), None)
    if recipe is None:
        return (Path(path).absolute().parent / "demo.json").is_file()  # the demo's model, copied out of its run
    try:
        train = read_recipe(recipe)["data"]["train"] if recipe else []
        names = [train] if isinstance(train, str) else list(train)
        return bool(names) and all(read_json(Path(name) / "index.json")["kind"] == "chat" for name in names)
    except (IlladaError, OSError, TypeError, KeyError):
        return False  # the data are gone, or elsewhere


def is_run(folder: Path) -> bool:
    """Say whether a folder is that of a training run."""
    return (folder / RECIPE).is_file() and (folder / "checkpoints").is_dir()


def converted_only(path: str) -> bool:
    """Say whether a folder holds a causal model made a starting point for diffusion, and not trained since."""
    card = Path(path) / "README.md"
    return card.is_file() and NOT_A_MODEL in card.read_text(encoding="utf-8", errors="replace")


def model_folder(path: str) -> Path:
    """Return the local folder meant by `path`: itself, or a run's finished model or adapter, or its newest checkpoint.

    The folder holds config.json or adapter_config.json. The first call joins the shards of a checkpoint. A path that
    does not exist and looks like a hub name is downloaded into the local cache.

    Raises:
        DamagedError: when the newest checkpoint is damaged; the message names the newest whole one.
        IlladaError: when there is no model, or it cannot be downloaded.
    """
    folder = Path(path)
    if not folder.exists():
        if not is_hub_name(path):
            raise IlladaError(f"no model at {path}: the folder does not exist")
        folder = hub_folder(path, MODEL_FILES)
    *older, newest = [folder, *checkpoints(folder)]
    for candidate in (place / name for place in dict.fromkeys((folder, newest)) for name in (".", "model", "adapter")):
        if any((candidate / name).is_file() for name in ("config.json", adapters.CONFIG)):
            return candidate
    if not (newest / STATE).is_file():
        raise IlladaError(f"no model at {path}: give a folder with config.json, a run folder, or a hub name")
    try:
        return assemble(newest, newest)
    except DamagedError as error:
        if newest == folder:
            raise
        whole = next((str(place) for place in reversed(older[1:]) if not damage(place)), None)
        use = "no other is whole" if whole is None else f"the newest whole checkpoint is {whole}, which may be given"
        raise DamagedError(f"{error}; {use}") from error


def read_recipe(path: Path) -> dict[str, Any]:
    """Return what the recipe in a run folder says.

    Raises:
        IlladaError: when it is damaged.
    """
    try:
        check_yaml(text := read_text(path))
        content = yaml.safe_load(text)
    except (IlladaError, yaml.YAMLError, ValueError, OverflowError) as error:
        raise IlladaError(f"{path} is damaged ({first_line(error)}): restore it, or choose another --output") from error
    if not isinstance(content, dict):
        raise IlladaError(f"{path} is damaged (it holds no recipe): restore it, or choose another --output")
    return content


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file; a half-written end is dropped.

    Raises:
        IlladaError: when a line is no record and others follow.
    """
    records: list[dict[str, Any]] = []
    damaged = 0
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line.decode("utf-8"))
        except ValueError:
            record = None
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            damaged = damaged or number
        elif damaged:
            raise IlladaError(f"{path} is damaged: line {damaged} is no record of a step: delete that line")
        else:
            records.append(record)
    return records
