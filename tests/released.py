"""Write model folders as the authors released them: configurations, tokenizer files, shards and their index.

This module does not use the package's own reading and writing: it spells names and fields out a second time, after spec
§1 and §8. `benchmarks/full_size.py` uses it at the size of 8B.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

Shape = tuple[int, ...]

ILLADA_SPECIAL = ["<bos>", "<pad>", "<eos>", "<unk>", "<sep>", "<[MASK]>"]
LLADA_SPECIAL = [
    "<|startoftext|>",
    "<|endoftext|>",
    "<|mdm_mask|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]

# This template refuses a system role, as spec §1 warns.
ILLADA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<role>' + message['role'] + '</role>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<role>assistant</role>' }}{% endif %}"
)
# This template opens the assistant's turn whether asked to or not.
LLADA_TEMPLATE = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


def illada_config(vocab: int, width: int, inner: int, layers: int, heads: int, kv_heads: int, context: int) -> dict:
    """config.json of iLLaDA: no mask id."""
    return {
        "architectures": ["ILLaDAForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_illada.ILLaDAConfig",
            "AutoModel": "modeling_illada.ILLaDAForCausalLM",
            "AutoModelForCausalLM": "modeling_illada.ILLaDAForCausalLM",
        },
        "bos_token_id": 0,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "layer_norm_eps": None,
        "max_position_embeddings": context,
        "mlp_bias": False,
        "model_type": "illada",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pad_token_id": 1,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 3e-6,
        "rope_scaling": None,
        "rope_theta": 123456.0,
        "tie_word_embeddings": True,
        "transformers_version": "4.57.1",
        "vocab_size": vocab,
    }


def llada_config(vocab: int, width: int, inner: int, layers: int, heads: int, kv_heads: int, context: int) -> dict:
    """config.json of LLaDA-8B and LLaDA-1.5; the special ids are the last of the vocabulary."""
    return {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": width,
        "embedding_dropout": 0.0,
        "embedding_size": vocab,
        "eos_token_id": vocab - 5,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": vocab - 4,
        "max_sequence_length": context,
        "mlp_hidden_size": inner,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "n_layers": layers,
        "pad_token_id": vocab - 5,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": vocab,
        "weight_tying": False,
    }


def tensors(
    family: str, vocab: int, width: int, inner: int, layers: int, heads: int, kv_heads: int
) -> dict[str, Shape]:
    """Names and shapes of a checkpoint, in file order."""
    keys = width // heads * kv_heads
    shapes: dict[str, Shape] = {}
    if family == "illada":
        shapes["model.embed_tokens.weight"] = (vocab, width)
        block = {
            "input_layernorm": (width,),
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, width),
            "post_attention_layernorm": (width,),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }
        shapes |= {f"model.layers.{n}.{name}.weight": shape for n in range(layers) for name, shape in block.items()}
        return shapes | {"model.norm.weight": (width,), "lm_head.weight": (vocab, width)}
    block = {
        "attn_norm": (width,),
        "q_proj": (width, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "attn_out": (width, width),
        "ff_norm": (width,),
        "ff_proj": (inner, width),
        "up_proj": (inner, width),
        "ff_out": (width, inner),
    }
    root = "model.transformer."
    shapes[f"{root}wte.weight"] = (vocab, width)
    shapes |= {f"{root}blocks.{n}.{name}.weight": shape for n in range(layers) for name, shape in block.items()}
    return shapes | {f"{root}ln_f.weight": (width,), f"{root}ff_out.weight": (vocab, width)}


def ours(name: str) -> str:
    """The name in this package of a tensor of a LLaDA checkpoint."""
    whole = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
    parts = {
        "attn_norm": "input_layernorm",
        "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj",
        "v_proj": "self_attn.v_proj",
        "attn_out": "self_attn.o_proj",
        "ff_norm": "post_attention_layernorm",
        "ff_proj": "mlp.gate_proj",
        "up_proj": "mlp.up_proj",
        "ff_out": "mlp.down_proj",
    }
    words = name.split(".")
    if words[0] != "model" or words[1] != "transformer":
        return name
    if words[2] == "blocks":
        return f"model.layers.{words[3]}.{parts[words[4]]}.weight"
    return f"{whole[words[2]]}.weight"


def write_weights(folder: Path, shapes: dict[str, Shape], make: Callable[[str, Shape], torch.Tensor], per_shard: int):
    """Shards of at most `per_shard` bytes and their index; one shard is in memory at a time."""
    files: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if files[-1] and held + size > per_shard:
            files.append([])
            held = 0
        files[-1].append(name)
        held += size
    places = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        save_file({name: make(name, shapes[name]) for name in names}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    total = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_tokenizer(folder: Path, family: str, vocab: int) -> None:
    """Byte-level BPE in tokenizer.json; the mask has a name but is not declared as mask_token."""
    special = ILLADA_SPECIAL if family == "illada" else LLADA_SPECIAL
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    first = special if family == "illada" else []
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(special) + len(first),
        special_tokens=first,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(["one two three four five"] * 3, trainer)
    if family == "llada":  # special tokens come last, after as many others as it takes
        backend.add_tokens([f"<filler {n}>" for n in range(vocab - len(special) - backend.get_vocab_size())])
        backend.add_special_tokens(special)
    backend.save(str(folder / "tokenizer.json"))
    bos, eos, pad = ("<bos>", "<eos>", "<pad>") if family == "illada" else (special[0], special[1], special[1])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    template = ILLADA_TEMPLATE if family == "illada" else LLADA_TEMPLATE
    if family == "illada":
        (folder / "chat_template.jinja").write_text(template)
    else:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def write_released(
    folder: Path,
    family: str,
    make: Callable[[str, Shape], torch.Tensor],
    vocab: int = 320,
    width: int = 32,
    inner: int = 48,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int | None = None,
    context: int = 96,
    per_shard: int = 20_000,
    tokenizer_vocab: int | None = None,
) -> Path:
    """A whole folder; `make(name, shape)` gives each tensor. The default shape fills three or four shards in bf16."""
    kv_heads = kv_heads or (2 if family == "illada" else heads)
    shape = (vocab, width, inner, layers, heads, kv_heads)
    config = illada_config if family == "illada" else llada_config
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    values = config(*shape, context)
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    eos = values["eos_token_id"]
    generation = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": eos, "pad_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    write_tokenizer(folder, family, tokenizer_vocab or vocab)
    write_weights(folder, tensors(family, *shape), make, per_shard)
    return folder


def random_tensors(seed: int, scale: float = 0.3) -> Callable[[str, Shape], torch.Tensor]:
    """Random bf16 tensors large enough for choices to be clear-cut; gains near one; a tied head is its embedding."""
    made: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(seed)

    def make(name: str, shape: Shape) -> torch.Tensor:
        if name == "lm_head.weight":
            return made["model.embed_tokens.weight"].clone()
        noise = torch.randn(shape, generator=generator) * scale
        made[name] = (1 + noise if len(shape) == 1 else noise).to(torch.bfloat16)
        return made[name]

    return make
