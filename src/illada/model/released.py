"""The released checkpoints: names in their config.json and of their tensors, and what this network refuses of them.

Two families are read. iLLaDA (model_type "illada", class ILLaDAForCausalLM) uses the names of this package. LLaDA
(model_type "llada", class LLaDAModelLM: LLaDA-8B-Base, -Instruct, LLaDA-1.5) uses OLMo's; the forward pass is the same
(spec §8). Everything here is about names: no tensor is changed.
"""

from collections.abc import Mapping
from typing import Any

from illada.errors import IlladaError

FAMILY_IDS: dict[str, dict[str, int]] = {
    "illada": {"mask_token_id": 5, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2},
    "llada": {"mask_token_id": 126_336, "bos_token_id": 126_080, "eos_token_id": 126_081},
}
"""Special ids where a checkpoint's own files do not give them (spec §1, §8)."""

MASK_TOKENS = ("<[MASK]>", "<|mdm_mask|>")
"""Names of the mask in the released tokenizers; neither declares it as its mask_token."""

TURN_ENDS = ("<|eot_id|>",)
"""Tokens that end an assistant's turn besides the end-of-sequence token."""

LLADA_TENSORS = {
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
    r"^model\.transformer\.blocks\.(\d+)\.attn_norm\.": r"model.layers.\1.input_layernorm.",
    r"^model\.transformer\.blocks\.(\d+)\.q_proj\.": r"model.layers.\1.self_attn.q_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.k_proj\.": r"model.layers.\1.self_attn.k_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.v_proj\.": r"model.layers.\1.self_attn.v_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.attn_out\.": r"model.layers.\1.self_attn.o_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_norm\.": r"model.layers.\1.post_attention_layernorm.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_proj\.": r"model.layers.\1.mlp.gate_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.up_proj\.": r"model.layers.\1.mlp.up_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_out\.": r"model.layers.\1.mlp.down_proj.",
}
"""LLaDA's tensor names as patterns, and ours; they match nothing in an iLLaDA checkpoint."""

_LLADA_CONFIG = {
    "d_model": "hidden_size",
    "mlp_hidden_size": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "max_sequence_length": "max_position_embeddings",
    "init_std": "initializer_range",
    "weight_tying": "tie_word_embeddings",
    "dtype": "dtype",
    "torch_dtype": "dtype",
    **{name: name for name in ("rope_theta", "rms_norm_eps", "attn_implementation")},
    **{f"{name}_token_id": f"{name}_token_id" for name in ("mask", "bos", "eos", "pad")},
}

# The values of a configuration that this network implements. A checkpoint with any other value is refused.
_ILLADA_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "layer_norm_eps": (None,),
    "qk_norm": (False, None),
}
_LLADA_FIXED: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "block_group_size": (1,),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False, None),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "input_emb_norm": (False,),
    "rope": (True,),
    "alibi": (False,),
    "scale_logits": (False,),
    "clip_qkv": (None,),
}

# These fields are neutral, or serve the authors' own code only.
_DROPPED = {*_ILLADA_FIXED, "rope_scaling", "rope_parameters", "auto_map", "use_cache", "pretraining_tp"}


def read_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `IlladaConfig` for the contents of a config.json of either family.

    Raises:
        IlladaError: when it is of another family, quantised, or asks for something this network does not do.
    """
    family = values.get("model_type", "illada")
    if family not in FAMILY_IDS:
        raise IlladaError(
            f"this is a {family!r} model; illada reads model_type illada and llada, and `illada convert` makes a "
            "starting point for training of a llama-like one"
        )
    if quantised := values.get("quantization_config"):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, Mapping) else "unknown"
        raise IlladaError(
            f"the checkpoint is quantised ({method}): take the bf16 or fp16 one (illada.load_model loads our exports)"
        )
    return _read_llada(values) if family == "llada" else _read_illada(values)


def _read_illada(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `IlladaConfig` for a config.json of iLLaDA or of ours."""
    _require_fixed(values, _ILLADA_FIXED)
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    if rope.get("rope_type", rope.get("type", "default")) != "default" or rope.get("factor", 1.0) != 1.0:
        raise IlladaError(f"the checkpoint scales its rotary embedding ({rope}): this network does not")
    fields = {name: value for name, value in values.items() if name not in _DROPPED}
    if "rope_theta" not in fields and "rope_theta" in rope:
        fields["rope_theta"] = rope["rope_theta"]
    return fields


def _read_llada(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `IlladaConfig` for a config.json of LLaDA."""
    if "d_model" not in values:
        named = ", ".join(values.get("architectures") or ["no class name"])
        raise IlladaError(f"config.json of type llada has no d_model ({named}): only dense LLaDA models can be read")
    _require_fixed(values, _LLADA_FIXED)
    fields = {ours: values[theirs] for theirs, ours in _LLADA_CONFIG.items() if values.get(theirs) is not None}
    if "num_key_value_heads" not in fields and values.get("multi_query_attention"):
        fields["num_key_value_heads"] = 1
    if "intermediate_size" not in fields:
        fields["intermediate_size"] = round(values.get("mlp_ratio", 4) * values["d_model"])
    if "vocab_size" not in values:
        raise IlladaError("config.json of type llada has no vocab_size: the file is damaged")
    # The embedding may have more rows than the vocabulary.
    fields["vocab_size"] = values.get("embedding_size") or values["vocab_size"]
    fields.setdefault("tie_word_embeddings", False)
    # The family's ids are those of its 126,464 tokens: a smaller relative has its own.
    ids = {name: number for name, number in FAMILY_IDS["llada"].items() if number < fields["vocab_size"]}
    if "mask_token_id" not in {**ids, **fields}:
        raise IlladaError("config.json of type llada has no mask_token_id: add the id of the tokenizer's mask token")
    return {"bos_token_id": None, "pad_token_id": None, **ids, **fields}


def _require_fixed(values: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> None:
    for name, allowed in fixed.items():
        if name in values and values[name] not in allowed:
            raise IlladaError(f"the checkpoint has {name} {values[name]!r}: this network has {allowed[0]!r}")


def released_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json in the form of the released iLLaDA folders, from the values of `IlladaConfig.to_dict()`.

    The mask id is added to the released fields: the authors' code ignores it, and ours need not guess. `auto_map` names
    the two files of the authors' code, which are not ours to copy.

    Raises:
        IlladaError: when a head is not hidden_size / num_attention_heads wide (the authors' code knows no other width),
            or the model is causal.
    """
    if values.get("causal"):
        raise IlladaError(
            "the released layout is of bidirectional models, and this one is causal: take --layout illada"
        )
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if values["head_dim"] * heads != width:
        raise IlladaError(
            f"the released layout has no head_dim ({values['head_dim']} here): its heads are hidden_size / "
            f"num_attention_heads wide ({width} / {heads}); choose --layout illada"
        )
    same = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
        max_position_embeddings rope_theta rms_norm_eps initializer_range tie_word_embeddings mask_token_id bos_token_id
        pad_token_id eos_token_id dtype transformers_version"""
    return {
        "architectures": ["ILLaDAForCausalLM"],
        "model_type": "illada",
        "auto_map": {
            "AutoConfig": "configuration_illada.ILLaDAConfig",
            "AutoModel": "modeling_illada.ILLaDAForCausalLM",
            "AutoModelForCausalLM": "modeling_illada.ILLaDAForCausalLM",
        },
        **{name: values[name] for name in same.split()},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "layer_norm_eps": None,
        "rope_scaling": None,
        "attention_dropout": values.get("attention_dropout", 0.0),
        "resid_pdrop": values.get("resid_pdrop", 0.0),
    }
