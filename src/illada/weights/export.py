"""`illada export`: a folder that transformers loads after `import illada`, in our layout or in the released one."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import try_to_load_from_cache

import illada
from illada.devices import DTYPES
from illada.hub import is_hub_name
from illada.model import IlladaConfig
from illada.weights.adapters import CONFIG, adapter_base
from illada.weights.load import load_model
from illada.weights.options import Dtype
from illada.weights.runs import model_folder, read_metrics
from illada.weights.save import Layout, check_output, torch_dtype, write_model

_RULES = {
    "illada": "every token may be masked, prompt and answer alike (paper Eq. 1)",
    "llada": "the prompt stays visible, answers are padded with EOS, their loss is divided by their length (LLaDA)",
}
_CAUSAL_RULES = {
    "illada": "every token is predicted from those before it",
    "llada": "answers, padded with EOS, are predicted from what is before them; their loss is divided by their length",
}


def export_model(
    model: str,
    output: str,
    dtype: Dtype = "auto",
    layout: Layout = "illada",
    max_shard_size: str = "5GB",
) -> None:
    """Write weights, configuration, tokenizer and a model card into the new folder `output`.

    Args:
        model: model or run folder, or a hub name; ours, iLLaDA's or LLaDA's.
        output: folder to make.
        dtype: of the weights; auto keeps the checkpoint's own, bit for bit.
        layout: "illada" writes a tied head once; "released" has it twice, and the released class and field names.
        max_shard_size: largest file of weights, as "5GB".

    Raises:
        IlladaError: when there is no model, `output` exists or lies in the model's folder, or the disk is full.
    """
    target = check_output(output, model, max_shard_size)
    # Once: it may be a hub name, or a run whose newest checkpoint changes.
    folder = model_folder(model)
    # On the CPU and in their own type, weights stay in the file they are read from.
    network, tokenizer = load_model(str(folder), "auto", "cpu")
    tensors = network.state_dict()
    if layout == "illada" and network.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    kind = torch_dtype(dtype, network.dtype)
    card = _card(model, folder, network.num_parameters(), kind, layout, network.config)
    # Files as they are, where they are: the released ones were written for transformers 4.
    changed = None if (folder / "tokenizer.json").is_file() else tokenizer
    write_model(target, folder, network.config, tensors, kind, card, layout, max_shard_size, changed)


def card_head(base: str | None, causal: bool = False) -> list[str]:
    """Return the YAML head and the title of a model card; `base` is named there only when it is a hub name."""
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base is not None and on_hub(base):
        head["base_model"] = base
    head["tags"] = ["illada", *([] if causal else ["masked-diffusion", "diffusion-language-model"])]
    title = f"# {'Autoregressive' if causal else 'Masked diffusion'} language model"
    return ["---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "", title, ""]


def on_hub(name: str) -> bool:
    """Say whether `name` is a hub repository that has been read here: runs/base only looks like one."""
    return (
        not Path(name).exists() and is_hub_name(name) and isinstance(try_to_load_from_cache(name, "config.json"), str)
    )


def card_use() -> list[str]:
    """Return the lines of a model card that say how to load it."""
    return [
        "```python",
        "import illada  # registers the classes; no remote code is run",
        "from transformers import AutoModelForMaskedLM, AutoTokenizer",
        "",
        'model = AutoModelForMaskedLM.from_pretrained("this folder")',
        'tokenizer = AutoTokenizer.from_pretrained("this folder")',
        "```",
        "",
    ]


def _card(model: str, folder: Path, parameters: int, dtype: torch.dtype, layout: Layout, config: IlladaConfig) -> str:
    """Return a model card made of what the run folder knows; nothing is invented where it knows nothing."""
    run = _run_of(folder)
    recipe = _recipe(run)
    base: str | None = model if on_hub(model) else None
    adapted = (folder / CONFIG).is_file()
    if run is not None:
        base = recipe.get("model", {}).get("start")
    elif adapted:
        base = adapter_base(folder)
    name = next((name for name, kind in DTYPES.items() if kind == dtype), str(dtype))
    of = "as transformers loads it after `import illada`" if layout == "illada" else "of the released iLLaDA"
    lines = [
        *card_head(base, config.causal),
        f"An iLLaDA-style model (arXiv 2606.25331) of {parameters:,} parameters in {name}, written by illada "
        f"{illada.__version__} in the layout {of}. "
        + (
            "It is the autoregressive baseline: attention is causal; logits at position i predict token i + 1."
            if config.causal
            else "Attention is bidirectional; logits at position i predict token i; "
            f"the mask is token {config.mask_token_id}."
        ),
        "",
    ]
    start = base if base is None or on_hub(base) else f"`{base}`"
    if run is None and start is not None:
        lines += [f"The weights are those of {start}{', with a LoRA adapter merged in' if adapted else ''}.", ""]
    if run is not None:
        lines += ["## Training", ""]
        if start is not None:
            lines.append(f"- Started from {start}{'; a LoRA adapter was trained and merged in' if adapted else ''}.")
        lines += _training(run, folder, recipe.get("training", {}).get("rule"), config.causal)
        lines += ["", "Recipe:", "", "```yaml", (run / "recipe.yaml").read_text().strip(), "```", ""]
    lines += ["## Use", "", *card_use()]
    if layout == "released":
        lines += [
            "Without illada, by `trust_remote_code=True`: copy `configuration_illada.py` and `modeling_illada.py` from "
            "the authors' repository (GSAI-ML/iLLaDA-8B-Base) into this folder. They are the authors', so they are not "
            "included; they do not read `mask_token_id`.",
            "",
        ]
    return "\n".join(lines)


def _run_of(folder: Path) -> Path | None:
    """Return the run whose finished model or checkpoint this folder is, if it is one."""
    folder = folder.resolve()
    parent = folder.parent
    run = parent.parent.parent if parent.parent.name == "checkpoints" else parent
    return run if folder.name in ("model", "adapter") and (run / "recipe.yaml").is_file() else None


def _recipe(run: Path | None) -> dict[str, Any]:
    values = None if run is None else yaml.safe_load((run / "recipe.yaml").read_text())
    return {key: part for key, part in values.items() if isinstance(part, dict)} if isinstance(values, dict) else {}


def _training(run: Path, folder: Path, rule: Any, causal: bool) -> list[str]:
    """Return what the run's records say, up to the step these weights are of."""
    records = read_metrics(run / "metrics.jsonl")
    state = folder.parent / "state.json"
    if state.is_file():
        step = json.loads(state.read_text())["step"]
        records = [record for record in records if record["step"] <= step]
    rules = _CAUSAL_RULES if causal else _RULES
    lines = [f"- Rule `{rule}`: {rules[rule]}."] if rule in rules else []
    if records:
        where = " (a checkpoint of the run)" if state.is_file() else ""
        lines.append(f"- {records[-1]['step']:,} steps on {records[-1]['tokens']:,} tokens{where}.")
    tested = [record for record in records if "validation_bits_per_byte" in record]
    if tested:
        lines.append(
            f"- Validation at step {tested[-1]['step']:,}: {tested[-1]['validation_bits_per_byte']:.4f} bits per byte"
            + ("." if causal else " (an upper bound).")
        )
    return lines
