"""LoRA adapters (arXiv 2106.09685) in PEFT's own files: add an adapter to a model, save it, attach it, merge it.

PEFT replaces linear layers in place, so an adapted model is still an `IlladaForMaskedLM`: its methods, the loss and the
sampler work unchanged. The base weights are frozen; only `attach(..., merge=True)` changes them.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from illada.errors import IlladaError, first_line, needs
from illada.files import parse_json
from illada.model.transformer import IlladaForMaskedLM
from illada.weights.check import misfits

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""PEFT's names; a folder with the first is an adapter folder."""

_NAME = "default"  # PEFT's name for the only adapter of a model; the names in the file lack it
_PREFIX = "base_model.model."  # begins every name in the file, so that PeftModel finds its place
# With these values of init_lora_weights, PEFT does not change the weights of the base.
_HARMLESS_STARTS = (True, False, "gaussian", "orthogonal", "eva")


def add_adapter(
    model: IlladaForMaskedLM,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    base: str,
    seed: int,
) -> None:
    """Freeze the model and add a trainable adapter in fp32 that does not change its output yet.

    Args:
        model: model to change in place.
        rank: inner width of the two matrices beside each target.
        alpha: the product of the two matrices is scaled by alpha / rank.
        dropout: chance that an input of the adapter is zeroed in training.
        targets: names of linear layers of the blocks.
        base: path or hub name of the model, to be written into the adapter's files.
        seed: seed of the first matrix (uniform, as in PEFT); the second is zero.

    Raises:
        IlladaError: when PEFT is not installed.
    """
    config = _peft().LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        base_model_name_or_path=base,
        # AutoPeftModel finds the class of the base by this.
        auto_mapping={"base_model_class": "IlladaForMaskedLM", "parent_library": "illada.model.transformer"},
    )
    _place(model, config, seed)


def is_adapted(model: IlladaForMaskedLM) -> bool:
    """Say whether an adapter lies beside the model's weights."""
    return hasattr(model, "peft_config")


@contextmanager
def without_adapter(model: IlladaForMaskedLM) -> Iterator[None]:
    """Let an adapted model compute with its frozen weights alone, as it began."""
    layers = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    # Not PEFT's enable_adapters: that also changes which parameters are trained, under the feet of FSDP.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def adapter_tensors(model: IlladaForMaskedLM) -> dict[str, Tensor]:
    """Return the adapter's own tensors by their names in the file; they share memory with the model's."""
    # With any other value than False, PEFT would look the base up on the hub.
    tensors = _peft().get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False)
    return {_PREFIX + name: tensor for name, tensor in tensors.items()}


def base_fingerprint(model: IlladaForMaskedLM) -> str:
    """Return a hash of the first numbers of every frozen tensor: enough to notice another base."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def save_adapter(model: IlladaForMaskedLM, folder: Path) -> None:
    """Write the adapter of an adapted model into `folder`, as PEFT does."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in adapter_tensors(model).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    save_adapter_config(model, folder)


def save_adapter_config(model: IlladaForMaskedLM, folder: Path) -> None:
    """Write the configuration of a model's adapter into `folder`, as PEFT does, in an order that is always the same."""
    values = {**model.peft_config[_NAME].to_dict(), "inference_mode": True}
    (folder / CONFIG).write_text(json.dumps(values, indent=1, sort_keys=True, default=sorted))  # sets are sorted


def adapter_base(folder: Path) -> str:
    """Return the model that an adapter folder belongs to: a path or a hub name.

    Raises:
        IlladaError: when the folder is damaged, or holds an adapter of another kind than LoRA.
    """
    base = _read_config(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise IlladaError(f"{folder / CONFIG} does not name a base model: write it there as base_model_name_or_path")
    return base


def attach(model: IlladaForMaskedLM, folder: Path, merge: bool) -> IlladaForMaskedLM:
    """Put the adapter in `folder` onto its base; returns the model, which is changed in place.

    Args:
        model: the base (see `adapter_base`), in any dtype, on any device. After an error, throw it away.
        folder: adapter folder.
        merge: add the adapter to the weights in fp32, round once to their dtype, and leave no trace of PEFT. Otherwise
            the adapter stays beside the weights, in fp32 and frozen; that is better on a quantised base, where a merge
            would quantise a second time.

    Raises:
        IlladaError: when PEFT is not installed, or the adapter is damaged or belongs to a base of another shape.
    """
    if is_adapted(model):
        raise IlladaError(f"the model already has an adapter: load its base again to put {folder} onto it")
    peft = _peft()
    values = _read_config(folder)
    start = values.get("init_lora_weights", True)
    if start not in _HARMLESS_STARTS:
        raise IlladaError(f"{folder} was begun as {start!r}, which changes the base weights: convert it to plain LoRA")
    if not (folder / WEIGHTS).is_file():
        raise IlladaError(f"{folder} lacks {WEIGHTS} (only safetensors are read): fetch or save the adapter again")
    try:
        tensors = load_file(folder / WEIGHTS)
    except Exception as error:
        raise IlladaError(f"{folder / WEIGHTS} is damaged ({first_line(error)}): fetch it again") from error
    try:
        config = peft.LoraConfig.from_peft_type(**{**values, "inference_mode": True, "init_lora_weights": True})
        tuner = _place(model, config, seed=0)
    except Exception as error:
        raise IlladaError(f"{folder} does not fit the model: {first_line(error)}") from error
    places = adapter_tensors(model)
    if odd := misfits(tensors, places, stray="has no place"):
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise IlladaError(
            f"{folder} does not fit the model, it was trained on {adapter_base(folder)}: {'; '.join(odd[:3])}{more}"
        )
    for name, place in places.items():
        place.copy_(tensors[name])
    if not merge:
        return model
    merged: IlladaForMaskedLM = tuner.merge_and_unload()
    for parameter in merged.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # as before, but for bitsandbytes' packed weights
    return merged


def _place(model: IlladaForMaskedLM, config: Any, seed: int) -> Any:
    """Put a fresh adapter into the model, in fp32; returns PEFT's handle on it."""
    # fork_rng keeps the caller's random state.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuner = _peft().LoraModel(model, config, _NAME)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:  # PEFT makes these in the dtype of the base
            parameter.data = parameter.data.float()
    model.train(model.training)  # puts the new dropout layers into the mode of the others
    return tuner


def _read_config(folder: Path) -> dict[str, Any]:
    """Return the contents of adapter_config.json; its adapter is LoRA."""
    path = folder / CONFIG
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
        kind = values.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise IlladaError(f"{path} cannot be read ({first_line(error)}): fetch or save the adapter again") from error
    if kind != "LORA":
        raise IlladaError(f"{folder} is an adapter of type {kind!r}: illada reads LORA")
    return dict(values)


def _peft() -> Any:
    """Import PEFT."""
    # PEFT imports bitsandbytes where it is installed, and bitsandbytes then advises to fetch kernels.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with needs("tune", "an adapter"):
        import peft
    return peft
