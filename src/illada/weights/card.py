"""Model cards: what a model's files and its run know, filled into `card.md.jinja`."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from jinja2 import Template

from illada.devices import DTYPES
from illada.files import read_text
from illada.hub import is_hub_name
from illada.model.config import IlladaConfig
from illada.weights.adapters import CONFIG, adapter_base
from illada.weights.options import LIBRARIES, Quantization
from illada.weights.runs import RECIPE, STATE, read_metrics, read_recipe, read_state

_TEMPLATE = Template(
    Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8"),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def converted_card(source: str, summary: str, purpose: str, causal: bool) -> str:
    """Return the card of a model that was converted from the causal model `source`, to diffusion or as it is."""
    return _card(source, converted=summary, purpose=purpose, causal=causal)


def exported_card(
    model: str,
    folder: Path,
    parameters: int,
    dtype: torch.dtype,
    layout: str,
    config: IlladaConfig,
    quantize: Quantization | None = None,
) -> str:
    """Return the card of an exported model; nothing is invented where its run folder knows nothing."""
    run = _run_of(folder)
    recipe = {} if run is None else read_recipe(run / RECIPE)
    recipe = {key: part for key, part in recipe.items() if isinstance(part, dict)} if isinstance(recipe, dict) else {}
    adapted = (folder / CONFIG).is_file()
    if run is not None:
        base = recipe.get("model", {}).get("start")
    else:
        base = adapter_base(folder) if adapted else model if _on_hub(model) else None
    return _card(
        base,
        adapted=adapted,
        parameters=parameters,
        dtype=next((name for name, kind in DTYPES.items() if kind == dtype), str(dtype)),
        layout=layout,
        quantize=quantize,
        library=None if quantize is None else f"{LIBRARIES[quantize]} {version(LIBRARIES[quantize])}",
        causal=config.causal,
        mask_token_id=config.mask_token_id,
        rule=recipe.get("training", {}).get("rule"),
        run=None if run is None else _records(run, folder),
    )


def _card(base: str | None, **facts: Any) -> str:
    """Fill in the template; the head names `base` only when it is on the hub."""
    hub = base is not None and _on_hub(base)
    start = base if hub or base is None else f"`{base}`"
    return _TEMPLATE.render(base_model=base if hub else None, start=start, version=version("illada"), **facts)


def _on_hub(name: str) -> bool:
    """Say whether `name` is a hub repository that has been read here: runs/base only looks like one."""
    cached = not Path(name).exists() and is_hub_name(name) and try_to_load_from_cache(name, "config.json")
    return isinstance(cached, str)


def _run_of(folder: Path) -> Path | None:
    """Return the run whose finished model or checkpoint this folder is, if it is one."""
    folder = folder.resolve()
    parent = folder.parent
    run = parent.parent.parent if parent.parent.name == "checkpoints" else parent
    return run if folder.name in ("model", "adapter") and (run / RECIPE).is_file() else None


def _records(run: Path, folder: Path) -> dict[str, Any]:
    """Return what a run recorded until the step of the weights in `folder`."""
    records = read_metrics(run / "metrics.jsonl")
    is_checkpoint = (folder.parent / STATE).is_file()
    if is_checkpoint:
        step = read_state(folder.parent).step
        records = [record for record in records if record["step"] <= step]
    return {
        "recipe": read_text(run / RECIPE).strip(),
        "is_checkpoint": is_checkpoint,
        "last": next(reversed(records), None),
        "validation": next((record for record in reversed(records) if "validation_bits_per_byte" in record), None),
    }
