"""Checkpoints: a model folder that transformers loads, or an adapter folder that PEFT loads, plus the optimiser and the
state of the run; no pickle.

A checkpoint is written under a temporary name and renamed when complete, so one that can be seen can be trusted.
"""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from illada.adapters import WEIGHTS, adapter_tensors, is_adapted, save_adapter
from illada.errors import IlladaError
from illada.model import IlladaForMaskedLM


@dataclass
class RunState:
    """What a run is besides weights and optimiser; order, noise and learning rate follow from it and the recipe."""

    step: int = 0
    """Optimiser steps done."""
    tokens: int = 0
    """Tokens trained on."""
    decay_start: int | None = None
    """Step at which the decay was begun ahead of time."""
    validation_losses: list[float] = field(default_factory=list)
    """Every validation so far, nats per token."""


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run folder, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if (path / "state.json").is_file())


def save_checkpoint(
    run: Path, model: IlladaForMaskedLM, optimizer: torch.optim.Optimizer, state: RunState, tokenizer: Any, keep: int
) -> Path:
    """Write checkpoints/step-NNNNNNNN, then delete all but the `keep` newest; returns its path."""
    target = run / "checkpoints" / f"step-{state.step:08d}"
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if is_adapted(model):
        save_adapter(model, partial)
    else:
        model.save_pretrained(partial, max_shard_size="1TB")
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    save_file(_optimizer_tensors(model, optimizer), partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps(asdict(state), indent=1))
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(path: Path, model: IlladaForMaskedLM, optimizer: torch.optim.Optimizer) -> RunState:
    """Load what is trained (the weights, or an adapter), optimiser and state in place, bit for bit.

    Raises:
        IlladaError: when the checkpoint does not fit the model or is damaged.
    """
    adapted = is_adapted(model)
    try:
        weights = load_file(path / (WEIGHTS if adapted else "model.safetensors"))
        moments = load_file(path / "optimizer.safetensors")
        state = RunState(**json.loads((path / "state.json").read_text()))
    except Exception as error:
        raise IlladaError(
            f"checkpoint {path} cannot be read ({error}): delete it to continue from the one before"
        ) from error
    places = adapter_tensors(model) if adapted else dict(model.named_parameters())
    trained = _in_order(model, optimizer)
    _require_same(path, set(places), set(weights))
    slots = ("step", "exp_avg", "exp_avg_sq") if state.step else ()
    _require_same(path, {f"{name}/{slot}" for name, _ in trained for slot in slots}, set(moments))
    for name, place in places.items():
        place.data.copy_(weights[name])
    optimizer_state = {
        number: {slot: moments[f"{name}/{slot}"] for slot in slots} for number, (name, _) in enumerate(trained) if slots
    }
    optimizer.load_state_dict({"state": optimizer_state, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def _require_same(path: Path, wanted: set[str], found: set[str]) -> None:
    if wanted != found:
        odd = sorted(wanted ^ found)
        raise IlladaError(f"checkpoint {path} has another shape than the recipe: {', '.join(odd[:5])} do not match")


def _in_order(model: IlladaForMaskedLM, optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.nn.Parameter]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [(names[p], p) for group in optimizer.param_groups for p in group["params"]]


def _optimizer_tensors(model: IlladaForMaskedLM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{slot}": value.contiguous()
        for name, parameter in _in_order(model, optimizer)
        for slot, value in optimizer.state.get(parameter, {}).items()
    }
