"""Find and load a trained model: a model folder, or a run folder with one inside."""

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig

from illada.data.tokenizer import load_tokenizer
from illada.errors import IlladaError
from illada.model import IlladaConfig, IlladaForMaskedLM

Dtype = Literal["fp32", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def model_folder(path: str) -> Path:
    """Return the model folder meant by `path`: itself, a run's finished model, or the run's newest checkpoint.

    Raises:
        IlladaError: when there is no model.
    """
    from illada.training.checkpoint import checkpoints

    folder = Path(path)
    if not folder.exists():
        raise IlladaError(f"no model at {path}: the folder does not exist")
    for candidate in (folder, folder / "model", *reversed(checkpoints(folder))):
        if (candidate / "config.json").is_file():
            return candidate
    raise IlladaError(f"no model at {path}: give a folder with config.json, or a run folder")


def load_config(folder: str | Path) -> IlladaConfig:
    """Read the configuration in a model folder.

    Raises:
        IlladaError: when it is damaged or of another family.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise IlladaError(f"{folder}/config.json cannot be used: {_first_line(error)}") from error
    if not isinstance(config, IlladaConfig):
        raise IlladaError(f"{folder} holds a {config.model_type!r} model; illada runs model_type 'illada'")
    return config


def load_model(path: str, dtype: Dtype = "fp32", device: str = "cpu") -> tuple[IlladaForMaskedLM, Any]:
    """Load a model for inference and its tokenizer from a local folder.

    Raises:
        IlladaError: when the folder holds no illada model, or its weights or tokenizer are missing or do not fit.
    """
    folder = model_folder(path)
    config = load_config(folder)
    tokenizer = load_tokenizer(folder)
    try:
        model, notes = IlladaForMaskedLM.from_pretrained(
            folder, config=config, dtype=DTYPES[dtype], local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        raise IlladaError(f"the weights in {folder} cannot be loaded: {_first_line(error)}") from error
    odd = [f"{kind.replace('_keys', '')} {sorted(map(str, names))[:3]}" for kind, names in notes.items() if names]
    if odd:
        raise IlladaError(f"the weights in {folder} do not fit its config.json: {'; '.join(odd)}")
    try:
        model = model.to(device)
    except Exception as error:
        raise IlladaError(f"device {device} cannot be used here: {_first_line(error)}") from error
    return model.eval(), tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
