"""What a run folder holds: checkpoints, the finished model or adapter, the log of its steps."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from illada.errors import IlladaError
from illada.files import new_folder, read_json
from illada.hub import MODEL_FILES, hub_folder, is_hub_name
from illada.weights import adapters

STATE, ABOUT = "state.json", "about"
NOT_A_MODEL = "a starting point for training, not a model"
"""What the card of a converted model says until it is trained."""

AVERAGE = "/average"
"""Ends the name of a weight's average in a checkpoint (training.average)."""


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run folder, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if (path / STATE).is_file())


def assemble(checkpoint: Path, parent: Path) -> Path:
    """Join the shards of a checkpoint to a folder that transformers or PEFT loads: parent/model or parent/adapter.

    Where the checkpoint holds an average of the weights, the folder gets that in their place.

    The folder appears whole or not at all; the weights pass through memory once.
    """
    about = checkpoint / ABOUT
    adapter = (about / adapters.CONFIG).is_file()
    target = parent / ("adapter" if adapter else "model")
    entries = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    names = sorted(name for name in entries if name.endswith(AVERAGE))
    names = names or sorted(name for name in entries if "/" not in name)  # the others are the optimiser's
    tensors: dict[str, Tensor] = {
        name: torch.empty(entries[name].size, dtype=entries[name].properties.dtype)  # type: ignore[union-attr]
        for name in names
    }
    load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    tensors = {name.removesuffix(AVERAGE): tensor for name, tensor in tensors.items()}
    with new_folder(target, into_existing=True) as folder:
        shutil.copytree(about, folder, dirs_exist_ok=True)
        if adapter:
            save_file(tensors, folder / adapters.WEIGHTS, metadata={"format": "pt"})
        else:
            save_torch_state_dict(tensors, folder, max_shard_size="5GB", metadata={"format": "pt"})
        for path in folder.glob("*.safetensors"):
            path.chmod(folder.stat().st_mode & 0o666)  # safetensors makes it private
    return target


def tuned_on_chats(path: str) -> bool:
    """Say whether a model was tuned on conversations, as far as its name, or its run and the run's data, tell."""
    if re.search("instruct|chat", Path(path).name, re.IGNORECASE):
        return True
    recipe = next((p / "recipe.yaml" for p in (Path(path), *Path(path).absolute().parents[:3]) if is_run(p)), None)
    try:
        train = yaml.safe_load(recipe.read_text())["data"]["train"] if recipe else []
        names = [train] if isinstance(train, str) else list(train)
        return bool(names) and all(read_json(Path(name) / "index.json")["kind"] == "chat" for name in names)
    except (IlladaError, OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return False  # the data are gone, or elsewhere


def is_run(folder: Path) -> bool:
    """Say whether a folder is that of a training run."""
    return (folder / "recipe.yaml").is_file() and (folder / "checkpoints").is_dir()


def converted_only(path: str) -> bool:
    """Say whether a folder holds a causal model made a starting point for diffusion, and not trained since."""
    card = Path(path) / "README.md"
    return card.is_file() and NOT_A_MODEL in card.read_text(encoding="utf-8", errors="replace")


def model_folder(path: str) -> Path:
    """Return the local folder meant by `path`: itself, or a run's finished model or adapter, or its newest checkpoint.

    The folder holds config.json or adapter_config.json. The first call joins the shards of a checkpoint. A path that
    does not exist and looks like a hub name is downloaded into the local cache.

    Raises:
        IlladaError: when there is no model, or it cannot be downloaded.
    """
    folder = Path(path)
    if not folder.exists():
        if not is_hub_name(path):
            raise IlladaError(f"no model at {path}: the folder does not exist")
        folder = hub_folder(path, MODEL_FILES)
    places = [folder, *checkpoints(folder)[-1:]]
    for candidate in (place / name for place in places for name in (".", "model", "adapter")):
        if any((candidate / name).is_file() for name in ("config.json", adapters.CONFIG)):
            return candidate
    if (places[-1] / STATE).is_file():
        return assemble(places[-1], places[-1])
    raise IlladaError(f"no model at {path}: give a folder with config.json, a run folder, or a hub name")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file; a half-written last line is dropped."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
