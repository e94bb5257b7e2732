"""`illada export --layout gguf`: one file that llama.cpp loads as its architecture `llada`.

llama.cpp turns neighbouring values (2i, 2i + 1) of a head by an angle, this network the values (i, i + K/2): the rows
of the query and key projections change places. Matrices have the type asked for, norms are float32, as llama.cpp wants
them. Of a tokenizer it takes tokens and merges; its ways to divide a text into words before that are its own.

Shape letters: O outputs · B bytes of a row.
"""

import json
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from illada.errors import IlladaError, needs
from illada.folders import new_file
from illada.model.config import IlladaConfig
from illada.weights.load import load_model
from illada.weights.options import Dtype
from illada.weights.quantize import refuse_quantized
from illada.weights.save import cast_weight, check_output, check_room, torch_dtype

with needs("gguf", "--layout gguf"):
    from gguf import (
        GGML_QUANT_SIZES,
        MODEL_ARCH,
        GGMLQuantizationType,
        GGUFWriter,
        LlamaFileType,
        TokenType,
        get_tensor_name_map,
        quantize,
    )

_TYPES = {
    torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}
_Q8_0 = (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0)

_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_AFTER_DIGITS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS: dict[tuple[str | None, ...], str] = {
    ("GPT-2",): "gpt-2",
    ("digits", "GPT-2"): "smollm",
    # `illada tokenizer`. Of several spaces before a digit, smollm's last belongs to the others; here it is alone.
    (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",): "smollm",
    (_CASELESS + r"\p{N}{1,3}" + _AFTER_DIGITS,): "llama-bpe",
    (_CASELESS + r"\p{N}" + _AFTER_DIGITS,): "qwen2",
    (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    ): "bailingmoe",
}
"""How a tokenizer.json divides a text into words, and llama.cpp's name for it."""


def export_gguf(model: str, output: str, dtype: Dtype | Literal["q8_0"] = "auto") -> None:
    """Write weights, tokenizer, special ids and chat template into the new file `output`.

    Args:
        model: model or run folder, or a hub name; ours, iLLaDA's or LLaDA's.
        output: file to make, NAME.gguf.
        dtype: type of the matrices; auto is the checkpoint's own. q8_0 has 8 bits a value and a scale for each 32 of a
            row; the package gguf makes it from the checkpoint's own values.

    Raises:
        IlladaError: when there is no model, it is causal, its tokenizer or a row's length cannot be expressed; when
            `output` exists, has another ending or lies in the model's folder, or the disk is full.
    """
    target = check_output(output, model, "5GB")
    if target.suffix != ".gguf":
        raise IlladaError(f"--layout gguf writes one file: name it {target.name}.gguf")
    network, tokenizer = load_model(model, "auto", "cpu")
    refuse_quantized(network, model)
    config, tensors = network.config, network.state_dict()
    config.refuse_causal("llama.cpp's architecture llada is", "take --layout illada")
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    kind = torch.float32 if dtype == "q8_0" else torch_dtype(dtype, network.dtype)
    quant, file_type = _Q8_0 if dtype == "q8_0" else _TYPES[kind]
    writer = GGUFWriter(None, "llada")
    writer.add_type("model")
    writer.add_name(target.stem)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    _add_shape(writer, config)
    _add_tokenizer(writer, config, tokenizer)
    names = get_tensor_name_map(MODEL_ARCH.LLADA, config.num_hidden_layers)
    size = sum(
        _add_place(writer, f"{names.get_name(name.removesuffix('.weight'))}.weight", tensor, quant)
        for name, tensor in tensors.items()
    )
    check_room(target, size + 64 * config.vocab_size + 2**20)
    with new_file(target) as partial:
        writer.write_header_to_file(partial)
        try:
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for data_OB in _read(tensors, config, kind, quant):
                writer.write_tensor_data(data_OB)
        finally:
            writer.close()


def _add_shape(writer: GGUFWriter, config: IlladaConfig) -> None:
    """Add the sizes of the network, and that it sees both ways and predicts each position at that position."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_causal_attention(False)
    writer.add_diffusion_shift_logits(False)


def _add_tokenizer(writer: GGUFWriter, config: IlladaConfig, tokenizer: Any) -> None:
    """Add tokens, merges, special ids and the chat template; a row without a token gets one that is never used."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_words(state))
    tokens = tokenizer.convert_ids_to_tokens(list(range(config.vocab_size)))
    types = [TokenType.UNUSED if token is None else TokenType.NORMAL for token in tokens]
    for number, added in tokenizer.added_tokens_decoder.items():
        types[number] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    writer.add_token_list([f"[PAD{number}]" if token is None else token for number, token in enumerate(tokens)])
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ids = {
        writer.add_mask_token_id: config.mask_id,
        writer.add_bos_token_id: config.bos_token_id,
        writer.add_pad_token_id: config.pad_token_id,
        # llama.cpp knows two ends, of a text and of a turn.
        **dict(zip((writer.add_eos_token_id, writer.add_eot_token_id), ends, strict=False)),
    }
    for add, number in ids.items():
        if number is not None:
            add(number)
    # Where a template begins with BOS, llama.cpp takes that away before it adds its own.
    writer.add_add_bos_token(config.bos_token_id is not None)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _words(state: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the way in which a tokenizer.json divides a text into words.

    Raises:
        IlladaError: when it has none, or the tokenizer is no byte-level BPE.
    """
    model, divide, decoder = state["model"], state["pre_tokenizer"] or {}, state["decoder"] or {}
    # llama.cpp leaves NFC out: most texts have that form already.
    plain = state["normalizer"] in (None, {"type": "NFC"}) and not model.get("continuing_subword_prefix")
    if not plain or (model["type"], decoder.get("type")) != ("BPE", "ByteLevel") or not model["merges"]:
        raise IlladaError("llama.cpp has no form for this tokenizer: only byte-level BPE, as GPT-2's, can be exported")
    found: list[str | None] = []
    for step in divide.get("pretokenizers", [divide]):
        if step.get("type") == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            found.append(step["pattern"].get("Regex"))
        elif step.get("type") == "Digits" and step["individual_digits"]:
            found.append("digits")
        elif step.get("type") == "ByteLevel" and not step["add_prefix_space"]:
            found += ["GPT-2"] * step["use_regex"]
        else:
            found.append(None)
    name = _WORDS.get(tuple(found))
    if name is None or bool(model.get("ignore_merges")) != (name == "llama-bpe"):
        raise IlladaError(
            "llama.cpp does not divide texts into words as this tokenizer does: the model would see other ids than "
            "those it learnt"
        )
    return name


def _add_place(writer: GGUFWriter, name: str, tensor: Tensor, quant: GGMLQuantizationType) -> int:
    """Add name, shape and type of a tensor; return its size in bytes.

    Raises:
        IlladaError: when its rows cannot be divided into the blocks of the type.
    """
    quant = GGMLQuantizationType.F32 if tensor.ndim == 1 else quant
    block, width = GGML_QUANT_SIZES[quant]
    *rows, values = tensor.shape
    if values % block:
        raise IlladaError(
            f"{name} has rows of {values} values, and q8_0 needs a multiple of {block}: take --dtype bf16"
        )
    shape = (*rows, values // block * width)
    writer.add_tensor_info(name, shape, np.dtype(np.uint8), prod(shape), quant)
    return prod(shape)


def _read(
    tensors: Mapping[str, Tensor], config: IlladaConfig, kind: torch.dtype, quant: GGMLQuantizationType
) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of each tensor, [O, B] or [B], so that memory holds one at a time."""
    for name, tensor in tensors.items():
        values = cast_weight(tensor, name, torch.float32 if tensor.ndim == 1 else kind)
        if name.endswith((".q_proj.weight", ".k_proj.weight")):
            values = values.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        if quant == GGMLQuantizationType.Q8_0 and values.ndim == 2:
            yield quantize(values.numpy(), quant)
        else:
            yield values.contiguous().view(torch.uint8).numpy()
