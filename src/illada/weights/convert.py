"""`illada convert`: a causal llama-like checkpoint as a starting point for diffusion, or as the causal model it is.

This is an extra: others start from a causal model, the paper from random weights. Every shared weight is kept bit for
bit. For diffusion two things change: attention sees both ways, and a position predicts itself instead of the next
token. With the objective "causal" nothing changes, and the model stands in every table beside diffusion models.

Shape letters: V vocabulary · C a piece of it · D width.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from illada.errors import IlladaError, first_line
from illada.model.config import IlladaConfig
from illada.model.released import FAMILY_IDS, MASK_TOKENS
from illada.model.transformer import IlladaForMaskedLM
from illada.text.tokenizer import load_tokenizer
from illada.weights.card import converted_card
from illada.weights.check import check_sizes, misfits, read_values
from illada.weights.load import check_shards, complete_ids
from illada.weights.options import Dtype
from illada.weights.runs import NOT_A_MODEL, model_folder
from illada.weights.save import check_output, torch_dtype, write_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose network can be ours; a checkpoint with anything beyond it is refused."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ID_NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_SPARE = re.compile("reserved|unused", re.IGNORECASE)
_NOT_A_MODEL = (
    f"{NOT_A_MODEL}: its weights learned to predict the next token from those before it; "
    "here every position sees all others and predicts itself"
)
_AFTER_DIFFUSION = (
    "illada prepare TEXTS --tokenizer {output} --output DATA; "
    "illada pretrain --model.start {output} --data.train DATA --data.window 512 --training.samples_per_step 32 "
    "--training.steps 1000 --training.warmup_steps 100 --output RUN"
)
_AS_IT_IS = "the causal model itself, every weight bit for bit: a position predicts the next token"
_AFTER_CAUSAL = "illada eval --model {output} ..., illada generate --model {output} ..."


@dataclass(frozen=True)
class _Mask:
    """The mask token of a converted model."""

    token: str
    id: int
    is_untrained: bool
    """Whether its row was never trained, so that the row becomes the mean of the others."""
    origin: str
    """Where the token comes from, in words."""


def convert_model(
    source: str,
    output: str,
    objective: Literal["diffusion", "causal"],
    mask_token: str | None,
    dtype: Dtype,
    max_shard_size: str,
) -> str:
    """Write the new folder `output` in our layout; return what was done and what to do next.

    Args:
        source: model folder or hub name.
        output: folder to make.
        objective: "diffusion" makes a starting point for training, "causal" keeps the model as it is: no mask token is
            added, the embedding does not grow.
        mask_token: the token to use as mask. None takes the tokenizer's own, else an unused reserved special token,
            else a new one. A token without a trained row starts as the mean of the others (ours).
        dtype: type of the weights written; auto keeps the checkpoint's own, bit for bit.
        max_shard_size: largest file of weights, as "5GB".

    Raises:
        IlladaError: when the checkpoint is missing, damaged, or holds what our network does not have; when a mask token
            is given for a causal model.
    """
    target = check_output(output, source, max_shard_size)
    if mask_token is not None and not mask_token.strip():
        raise IlladaError("mask_token is empty: name a token, for instance '<[MASK]>'")
    causal = objective == "causal"
    if causal and mask_token is not None:
        raise IlladaError("mask_token is for --objective diffusion: a causal model sees no masks")
    folder = model_folder(source)
    shape, values = _read_shape(folder)
    tensors = _read_tensors(folder, shape)
    tokenizer = load_tokenizer(folder)
    rows, known = shape["vocab_size"], len(tokenizer)
    if known > rows:
        raise IlladaError(
            f"the tokenizer in {folder} has {known} tokens but the model only {rows}: it belongs to another model"
        )
    ids = _special_ids(values, tokenizer)
    mask = None if causal else _choose_mask(tokenizer, mask_token, ids)
    if mask is not None:
        shape["vocab_size"] = max(rows, mask.id + 1)
    config = IlladaConfig(**shape, **ids, mask_token_id=0 if mask is None else mask.id, causal=causal)
    complete_ids(config, folder, tokenizer)
    config.mask_token_id = None if mask is None else mask.id
    if mask is not None and mask.is_untrained:
        for name in {_EMBEDDING, _HEAD} & tensors.keys():
            tensors[name] = _set_mask_row(tensors[name], mask.id, known)
    kind = torch_dtype(dtype, functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values()}))
    count = sum(tensor.numel() for tensor in tensors.values())
    summary = f"{source}: a {values['model_type']} of {count:,} parameters; {_about(mask)}"
    if config.vocab_size > rows:
        summary += f"; the vocabulary grew from {rows:,} to {config.vocab_size:,}"
    purpose, after = (_AS_IT_IS, _AFTER_CAUSAL) if causal else (_NOT_A_MODEL, _AFTER_DIFFUSION)
    card = converted_card(source, summary, purpose, causal)
    write_model(target, folder, config, tensors, kind, card, "illada", max_shard_size, tokenizer)
    return f"{summary}\nwritten to {output}: {purpose}. Next: {after.format(output=output)}"


def _about(mask: _Mask | None) -> str:
    """Say what stands for a masked token."""
    if mask is None:
        return "causal as it was, no mask token"
    row = ", its row the mean of the others" if mask.is_untrained else ""
    return f"masks are {mask.token!r} (id {mask.id}, {mask.origin}{row})"


def _read_shape(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the sizes as arguments of `IlladaConfig`, and the contents of config.json."""
    path = folder / "config.json"
    values = read_values(path)
    family = values.get("model_type")
    if family in FAMILY_IDS:
        raise IlladaError(f"{folder} is a masked diffusion model already: train it with --model.start {folder}")
    if family not in FAMILIES:
        raise IlladaError(f"{folder} is a {family!r} model: only these can be converted: {', '.join(FAMILIES)}")
    if quantised := values.get("quantization_config") or values.get("compression_config"):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
        raise IlladaError(f"the checkpoint in {folder} is quantised ({method}): take the bf16 or fp16 one")
    try:
        config: Any = AutoConfig.for_model(**values)
    except Exception as error:
        raise IlladaError(f"{path} cannot be used: {first_line(error)}") from error
    rope = config.rope_parameters or {}
    scaled = rope.get("rope_type", "default") != "default" or rope.get("factor", 1.0) != 1.0
    rotated = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1.0)
    window = getattr(config, "sliding_window", None)
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        window = window or "some layers"
    extras = {
        f"rotary embedding scaled ({rope.get('rope_type')})": scaled,
        f"rotary embedding on a part of each head ({rotated})": rotated != 1.0,
        f"a sliding attention window ({window})": window is not None,
        "biases": getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False),
        f"activation {config.hidden_act}": config.hidden_act != "silu",
    }
    if names := [name for name, is_there in extras.items() if is_there]:
        raise IlladaError(f"{folder} has {' and '.join(names)}: this network has not, so it cannot be converted")
    same = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
        max_position_embeddings rms_norm_eps initializer_range tie_word_embeddings"""
    sizes = {name: getattr(config, name) for name in same.split()}
    return {**sizes, "head_dim": getattr(config, "head_dim", None) or 0, "rope_theta": rope["rope_theta"]}, values


def _read_tensors(folder: Path, shape: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return all weights, still on disk, in the order of our network.

    Raises:
        IlladaError: when tensors do not fit, naming them.
    """
    tensors: dict[str, Tensor] = {}
    config = IlladaConfig(**shape, **dict.fromkeys(_ID_NAMES), mask_token_id=0)
    files = check_shards(folder)
    check_sizes(config, files)
    for file in files:
        tensors |= load_file(file)
    # Old checkpoints hold the rotary frequencies too, which follow from rope_theta.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    extras = {
        "biases": [name for name in tensors if name.endswith(".bias")],
        "norms of queries and keys": [name for name in tensors if re.search(r"\.[qk]_norm\.", name)],
        "quantised weights": [name for name, tensor in tensors.items() if tensor.dtype not in _FLOATS],
    }
    for what, names in extras.items():
        if names:
            raise IlladaError(f"{folder} has {what} ({names[0]}, …): this network has not, so it cannot be converted")
    with torch.device("meta"):
        places = IlladaForMaskedLM(config).state_dict()
    if shape["tie_word_embeddings"]:
        del places[_HEAD]
        head = tensors.pop(_HEAD, None)
        if head is not None and _EMBEDDING in tensors and not torch.equal(head, tensors[_EMBEDDING]):
            raise IlladaError(f"{folder} ties its head to the embedding, but {_HEAD} differs: config.json is wrong")
    if odd := misfits(tensors, places, stray="is not part of the model"):
        listed = "; ".join(odd[:5]) + ("; …" if len(odd) > 5 else "")
        raise IlladaError(f"the weights in {folder} do not fit its config.json ({len(odd)} tensors): {listed}")
    return {name: tensors[name] for name in places}


def _special_ids(values: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return bos, eos and pad from config.json, else from the tokenizer; `complete_ids` adds further ends."""
    ids = {name: values.get(name) for name in _ID_NAMES}
    # Llama's first files have -1 for "none".
    return {name: getattr(tokenizer, name) if i is None else None if i == -1 else i for name, i in ids.items()}


def _choose_mask(tokenizer: Any, token: str | None, ids: Mapping[str, Any]) -> _Mask:
    """Choose the mask token (see `convert_model`), and declare it to the tokenizer."""
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    taken = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    for value in ids.values():
        taken |= set(value) if isinstance(value, list) else {value}
    template = str(tokenizer.chat_template or "")
    spare = [
        entry.content
        for token_id, entry in sorted(added.items())
        if entry.special and token_id not in taken and _SPARE.search(entry.content) and entry.content not in template
    ]
    token = token or tokenizer.mask_token or next((name for name in MASK_TOKENS if name in vocabulary), None)
    if token is None and spare:
        token, origin = spare[0], "a reserved token of the tokenizer that nothing uses"
    elif token is None or token not in vocabulary:
        token, origin = token or MASK_TOKENS[0], "added to the tokenizer"
    else:
        origin, number = "in the tokenizer already", vocabulary[token]
        if number in taken or number not in added or not added[number].special:
            raise IlladaError(f"mask_token {token!r} means something else to this tokenizer: choose another")
    tokenizer.add_special_tokens({"mask_token": token})
    return _Mask(token, tokenizer.mask_token_id, token not in vocabulary or token in spare, origin)


def _set_mask_row(rows_VD: Tensor, mask_id: int, known: int) -> Tensor:
    """Return the rows, with new ones where needed, and the mean of the tokenizer's `known` rows as the mask's row."""
    total_D = torch.zeros(rows_VD.shape[1], dtype=torch.float64)
    for part_CD in rows_VD[:known].split(4096):  # all rows in float64 would need much memory
        total_D += part_CD.sum(0, dtype=torch.float64)
    if mask_id < known:
        total_D, known = total_D - rows_VD[mask_id], known - 1
    mean_D = (total_D / known).to(rows_VD.dtype)
    more_D = mean_D.expand(max(0, mask_id + 1 - len(rows_VD)), -1)
    grown_VD = torch.cat((rows_VD, more_D))
    grown_VD[mask_id] = mean_D
    return grown_VD
