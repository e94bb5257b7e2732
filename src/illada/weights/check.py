"""What is checked of a model folder before anything is built from it: folders come from strangers.

`read_values` looks at the types and ranges in config.json, `check_sizes` at what the headers of the weights say. Both
are quick, whatever the files hold. `misfits` compares the tensors themselves with the places they are meant for.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from illada.errors import IlladaError
from illada.files import read_json
from illada.model.config import IlladaConfig
from illada.model.released import LLADA_TENSORS

MOST = 2**31 - 1
"""Largest size and largest id: token ids and positions of other libraries are 32 bits wide."""

_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_SIZES = (
    *("num_key_value_heads", "head_dim", "d_model", "mlp_hidden_size", "n_layers", "n_heads", "n_kv_heads"),
    *("max_sequence_length", "embedding_size"),
)
_NUMBERS = ("rope_theta", "rms_norm_eps", "initializer_range", "init_std", "mlp_ratio")
_SWITCHES = ("causal", "tie_word_embeddings", "weight_tying", "multi_query_attention", "attention_bias", "mlp_bias")
_IDS = ("mask_token_id", "bos_token_id", "pad_token_id")
_TEXTS = ("model_type", "attn_implementation", "transformers_version")
_OBJECTS = ("rope_scaling", "rope_parameters", "auto_map")
_DTYPES = ("float32", "bfloat16", "float16")
_OF_TRANSFORMERS = ("num_labels", "id2label", "label2id", "per_layer_config", "problem_type")
"""Fields of transformers' own that mean nothing here, and for which it builds tables or objects of its own."""


def read_values(path: Path) -> dict[str, Any]:
    """Return the contents of a config.json of any family without what transformers alone would act on.

    Only types and ranges are looked at; what the values mean is for `IlladaConfig` and `illada.model.released` to say.

    Raises:
        IlladaError: when the file cannot be read, or naming a field, its value, and what it must be.
    """
    values = read_json(path)
    rope = [value for name in ("rope_scaling", "rope_parameters") if isinstance(value := values.get(name), Mapping)]
    # LLaDA's files have null for what is not set; elsewhere null would stand in the place of a number.
    may_be_null = values.get("model_type") == "llada"
    for part in (values, *rope):
        for name, value in part.items():
            if (wanted := _wanted(name, value, may_be_null)) is not None:
                raise IlladaError(f"{path} cannot be used: {name} is {_short(value)}: it must be {wanted}")
    return {name: value for name, value in values.items() if name not in _OF_TRANSFORMERS}


def token_ids(value: Any, vocab_size: int, file: Path) -> list[int]:
    """Return the eos_token_id of a generation_config.json as a list; it may be an id, a list of ids, or nothing.

    Raises:
        IlladaError: when it holds anything else than ids of the vocabulary.
    """
    ids = value if isinstance(value, list) else [] if value is None or value == -1 else [value]
    if odd := [i for i in ids if not _is_whole(i, 0, vocab_size - 1)]:
        raise IlladaError(f"{file}: eos_token_id {_short(odd[0])} is not the id of one of {vocab_size:,} tokens")
    return ids


def _wanted(name: str, value: Any, may_be_null: bool) -> str | None:
    """Say what a field must be; None where its value will do, or nothing is known of the field."""
    if value is None and (may_be_null or name not in (*_NEEDED, *_NUMBERS, *_SWITCHES)):
        return None
    if name in _NEEDED:
        return None if _is_whole(value, 1, MOST) else f"a whole number between 1 and {MOST:,}"
    if name in (*_IDS, "eos_token_id"):
        ids = value if name == "eos_token_id" and isinstance(value, list) else [value]
        # Llama's first files have -1 for "none".
        return None if all(i is None or _is_whole(i, -1, MOST) for i in ids) else "the id of a token"
    if name in _SIZES:
        return None if _is_whole(value, 0, MOST) else f"a whole number between 0 and {MOST:,}"
    if name in (*_NUMBERS, "factor", "partial_rotary_factor"):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        low = 1.0 if name == "rope_theta" else 0.0
        return None if is_number and low <= value <= 1e15 else f"a number between {low:g} and 1e15"
    if name in _SWITCHES:
        return None if isinstance(value, bool) else "true or false"
    if name in (*_TEXTS, "rope_type", "type"):
        return None if isinstance(value, str) else "text"
    if name in _OBJECTS:
        return None if isinstance(value, Mapping) else "an object or null"
    if name in ("dtype", "torch_dtype"):
        return None if value in _DTYPES else " or ".join(_DTYPES)
    if name == "architectures":
        is_list = isinstance(value, list) and all(isinstance(item, str) for item in value)
        return None if is_list else "a list of names"
    return None


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def check_sizes(config: IlladaConfig, files: Sequence[Path], quantized: bool = False) -> None:
    """Check that the sizes in a configuration are those in the headers of its weights, before a network is built.

    Args:
        config: configuration of the model; only its sizes count.
        files: files of weights of any family that `illada.model.released` or `illada.weights.convert` reads.
        quantized: whether the weights of the blocks are packed, so that their shapes say nothing.

    Raises:
        IlladaError: naming the size, and what the weights have instead.
    """
    blocks: set[int] = set()
    shapes: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for stored in weights.keys():  # noqa: SIM118 (it is no mapping)
                name = _our_name(stored)
                if match := re.match(r"model\.layers\.(\d+)\.(.*)", name):
                    blocks.add(int(match[1]))
                    name = match[2]
                if name not in shapes:
                    shapes[name] = list(weights.get_slice(stored).get_shape())
    misfit = f"the weights in {files[0].parent} do not fit its config.json"
    if len(blocks) != (layers := config.num_hidden_layers):
        raise IlladaError(f"{misfit}: they have {len(blocks)} blocks, num_hidden_layers is {layers}")
    width, head = config.hidden_size, config.head_dim
    expected = {
        "model.embed_tokens.weight": [config.vocab_size, width],
        "mlp.gate_proj.weight": [config.intermediate_size, width],
        "self_attn.q_proj.weight": [config.num_attention_heads * head, width],
        "self_attn.k_proj.weight": [config.num_key_value_heads * head, width],
    }
    for name, shape in expected.items():
        is_packed = quantized and name != "model.embed_tokens.weight"
        if name in shapes and shapes[name] != shape and not is_packed:
            raise IlladaError(f"{misfit}: {name} is {shapes[name]}, not {shape}")


def _our_name(name: str) -> str:
    """Return our name of a stored tensor."""
    for pattern, ours in LLADA_TENSORS.items():
        name = re.sub(pattern, ours, name)
    return name


def misfits(tensors: Mapping[str, Tensor], places: Mapping[str, Tensor], stray: str) -> list[str]:
    """Name each tensor that is missing, is `stray` (has no place) or has another shape than its place."""
    return [
        *(f"{name} is missing" for name in places if name not in tensors),
        *(f"{name} {stray}" for name in tensors if name not in places),
        *(
            f"{name} is {list(tensors[name].shape)}, not {list(place.shape)}"
            for name, place in places.items()
            if name in tensors and tensors[name].shape != place.shape
        ),
    ]
