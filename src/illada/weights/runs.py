"""What a run folder holds: checkpoints, the finished model or adapter, the log of its steps."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from illada.errors import IlladaError
from illada.hub import MODEL_FILES, hub_folder, is_hub_name
from illada.weights import adapters

STATE, ABOUT = "state.json", "about"


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run folder, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if (path / STATE).is_file())


def assemble(checkpoint: Path, parent: Path) -> Path:
    """Put the shards together to a folder that transformers or PEFT loads: parent/model or parent/adapter.

    Complete or not at all; the weights pass through memory once.
    """
    about = checkpoint / ABOUT
    adapter = (about / adapters.CONFIG).is_file()
    target = parent / ("adapter" if adapter else "model")
    partial = parent / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(about, partial)
    found = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
        for name, entry in sorted(found.items())
        if "/" not in name
    }
    load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    if adapter:
        save_file(tensors, partial / adapters.WEIGHTS, metadata={"format": "pt"})
    else:
        save_torch_state_dict(tensors, partial, max_shard_size="5GB", metadata={"format": "pt"})
    for path in partial.glob("*.safetensors"):
        path.chmod(partial.stat().st_mode & 0o666)  # safetensors makes it private
    if not target.exists():
        partial.rename(target)
        return target
    for path in partial.iterdir():
        path.replace(target / path.name)
    partial.rmdir()
    return target


def model_folder(path: str) -> Path:
    """Return the local folder meant by `path`: itself, or a run's finished model or adapter, or its newest checkpoint.

    It holds config.json or adapter_config.json. A checkpoint is put together from its shards when first asked for. A
    path that does not exist and looks like a hub name is downloaded into the local cache.

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
