"""`illada export --layout gguf`: read back with gguf's own reader, and by llama.cpp where there is one."""

import json
import os
import re
import subprocess
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers

from illada import cli
from illada.errors import IlladaError
from illada.weights import save
from illada.weights.load import load_model
from released import random_tensors, write_released

gguf = pytest.importorskip("gguf")
export_gguf = pytest.importorskip("illada.weights.gguf").export_gguf

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SHAPES = {
    "grouped": {},
    "untied": {"tie": False, "num_key_value_heads": 4, "mask_token_id": 63},
    "wide heads": {"head_dim": 16, "num_key_value_heads": 1},
    "more rows than tokens": {"vocab_size": 300, "pad_token_id": None, "eos_token_id": [2, 7]},
}


@pytest.fixture
def write(build_model, tiny_tokenizer, tmp_path):
    """A function that writes a model of random weights with the tiny tokenizer, or another, and returns its folder."""

    def of(tokenizer=tiny_tokenizer, tie=True, **changes):
        model = build_model(tie, seed=4, **{"vocab_size": len(tiny_tokenizer), **changes})
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return of


def read(path):
    """Fields by name, and tensors as fp32 with their types."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: (gguf.dequantize(t.data, t.tensor_type), t.tensor_type.name) for t in reader.tensors}
    return fields, tensors


def neighbours(weight, head_dim):
    """Rows of each head in the order 0, K/2, 1, K/2 + 1, …: what turns together stands together."""
    half = head_dim // 2
    order = [number for i in range(half) for number in (i, i + half)]
    return np.concatenate([head[order] for head in np.split(weight, len(weight) // head_dim)])


def expected(model):
    """Our weights under llama.cpp's names, as fp32."""
    named = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        block, _, part = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
        place = f"blk.{block}.{NAMES[part]}" if block.isdigit() else NAMES[name.removesuffix(".weight")]
        value = tensor.float().numpy()
        turned = part in ("self_attn.q_proj", "self_attn.k_proj")
        named[f"{place}.weight"] = neighbours(value, model.config.head_dim) if turned else value
    return named


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_tensor_and_field_is_read_back(write, tiny_tokenizer, tmp_path, capsys, shape, dtype):
    folder = write(**SHAPES[shape])
    cli.main(["export", str(folder), "--output", str(tmp_path / "up" / "m.gguf"), "--layout", "gguf", "--dtype", dtype])
    assert "llama-diffusion-cli -m" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "up").iterdir()] == ["m.gguf"]
    fields, tensors = read(tmp_path / "up" / "m.gguf")
    model, _ = load_model(str(folder), device="cpu")
    wanted = expected(model)
    assert tensors.keys() == wanted.keys()
    kinds = {"fp32": (torch.float32, "F32", 0), "fp16": (torch.float16, "F16", 1), "bf16": (torch.bfloat16, "BF16", 32)}
    kind, named, number = kinds[dtype]
    for name, (values, type_name) in tensors.items():
        is_norm = wanted[name].ndim == 1
        assert type_name == ("F32" if is_norm else named), name
        value = wanted[name] if is_norm else torch.from_numpy(wanted[name]).to(kind).float().numpy()
        assert np.array_equal(values, value), name
    config = model.config
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    texts = [
        f"[PAD{n}]" if token is None else token
        for n, token in enumerate(tiny_tokenizer.convert_ids_to_tokens(list(range(config.vocab_size))))
    ]
    rows, known = config.vocab_size, len(tiny_tokenizer)
    merges = json.loads(tiny_tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    own = {
        "general.architecture": "llada",
        "general.type": "model",
        "general.name": "m",
        "general.file_type": number,
        "general.quantization_version": 2,
        "llada.vocab_size": rows,
        "llada.context_length": 96,
        "llada.embedding_length": 32,
        "llada.feed_forward_length": 48,
        "llada.block_count": 2,
        "llada.attention.head_count": 4,
        "llada.attention.head_count_kv": config.num_key_value_heads,
        "llada.attention.key_length": config.head_dim,
        "llada.attention.value_length": config.head_dim,
        "llada.rope.dimension_count": config.head_dim,
        "llada.rope.freq_base": 10_000.0,
        "llada.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llada.attention.causal": False,
        "diffusion.shift_logits": False,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [3] * 8 + [1] * (known - 8) + [5] * (rows - known),
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in merges],
        "tokenizer.ggml.mask_token_id": config.mask_token_id,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": tiny_tokenizer.chat_template,
        **({} if config.pad_token_id is None else {"tokenizer.ggml.padding_token_id": 1}),
        **dict(zip(("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"), eos, strict=False)),
    }
    assert {name: value for name, value in fields.items() if not name.startswith("GGUF.")} == own


def test_q8_0_is_within_half_a_step_of_each_block(write, tmp_path):
    folder = write(intermediate_size=64)
    export_gguf(str(folder), str(tmp_path / "m.gguf"), "q8_0")
    fields, tensors = read(tmp_path / "m.gguf")
    assert fields["general.file_type"] == 7
    for name, value in expected(load_model(str(folder), device="cpu")[0]).items():
        values, type_name = tensors[name]
        assert type_name == ("F32" if value.ndim == 1 else "Q8_0"), name
        blocks, given = values.reshape(-1, 32), value.reshape(-1, 32)
        step = np.abs(given).max(1, keepdims=True) / 127
        assert np.all(np.abs(blocks - given) <= step * 0.57), name  # the scale is rounded to fp16 too


@pytest.mark.parametrize("family", ["illada", "llada"])
def test_released_families_are_exported(family, tmp_path):
    write_released(tmp_path / "model", family, random_tensors(9), heads=4, kv_heads=2)
    export_gguf(str(tmp_path / "model"), str(tmp_path / "m.gguf"))
    fields, tensors = read(tmp_path / "m.gguf")
    model, tokenizer = load_model(str(tmp_path / "model"), device="cpu")
    wanted = expected(model)
    assert tensors.keys() == wanted.keys()
    assert ("output.weight" in tensors) == (family == "llada")
    for name, (values, type_name) in tensors.items():
        assert type_name == ("F32" if values.ndim == 1 else "BF16"), name
        assert np.array_equal(values, wanted[name]), name
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.mask_token_id"] == model.config.mask_token_id
    assert fields["tokenizer.ggml.tokens"][model.config.mask_token_id] in ("<[MASK]>", "<|mdm_mask|>")
    types = fields["tokenizer.ggml.token_type"]
    assert all(types[number] == (3 if added.special else 4) for number, added in tokenizer.added_tokens_decoder.items())
    assert set(types) == ({1, 3, 5} if family == "illada" else {1, 3, 4})


REFUSED = {
    "causal": (
        {"causal": True},
        "fp32",
        "m.gguf",
        "llama.cpp's architecture llada is for masked diffusion models only",
    ),
    "rows": ({}, "q8_0", "m.gguf", r"ffn_down.weight has rows of 48 values, and q8_0 needs a multiple of 32"),
    "name": ({}, "fp32", "m", r"--layout gguf writes one file: name it m\.gguf"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_expressed_is_refused_in_one_line(write, tmp_path, case):
    changes, dtype, name, says = REFUSED[case]
    folder = write(**changes)
    with pytest.raises(IlladaError, match=says) as caught:
        export_gguf(str(folder), str(tmp_path / name), dtype)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


DIVIDED = "does not divide texts into words as this tokenizer does"
NO_FORM = "only byte-level BPE"
CHANGES = {
    "other words": (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()), DIVIDED),
    "space first": (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)), DIVIDED),
    "lower case": (lambda t: setattr(t, "normalizer", normalizers.Lowercase()), NO_FORM),
    "other bytes": (lambda t: setattr(t, "decoder", decoders.Metaspace()), NO_FORM),
    "words": (lambda t: setattr(t, "model", models.WordLevel({"a": 0, "<[MASK]>": 1}, "a")), NO_FORM),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_tokenizer_that_llama_cpp_reads_otherwise_is_refused(write, tiny_tokenizer, tmp_path, case):
    change, says = CHANGES[case]
    folder = write()
    other = type(tiny_tokenizer).from_pretrained(folder)
    change(other.backend_tokenizer)
    other.save_pretrained(folder)
    with pytest.raises(IlladaError, match=says):
        export_gguf(str(folder), str(tmp_path / "m.gguf"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_q8_0_is_for_gguf_only(write, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["export", str(write()), "--output", str(tmp_path / "out"), "--dtype", "q8_0"])
    assert "--dtype q8_0 is for --layout gguf" in capsys.readouterr().err


def test_an_existing_file_is_left_alone(write, tmp_path):
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(IlladaError, match="exists: choose another --output"):
        export_gguf(str(write()), str(tmp_path / "m.gguf"))
    assert (tmp_path / "m.gguf").read_text() == "mine"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_midway_leaves_nothing(write, tmp_path, monkeypatch, error):
    folder, calls, add = write(), [], gguf.GGUFWriter.write_tensor_data

    def fail(*given):
        calls.append((tmp_path / "up" / ".m.gguf.partial").exists() and not (tmp_path / "up" / "m.gguf").exists())
        if len(calls) == 5:
            raise error
        add(*given)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
    with pytest.raises(IlladaError if isinstance(error, OSError) else KeyboardInterrupt):
        export_gguf(str(folder), str(tmp_path / "up" / "m.gguf"))
    assert calls == [True] * 5
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_export_left_is_replaced(write, tmp_path):
    (tmp_path / ".m.gguf.partial").write_bytes(b"half" * 10**6)
    export_gguf(str(write()), str(tmp_path / "m.gguf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "model"]
    assert read(tmp_path / "m.gguf")


def test_no_room_is_noticed_before_anything_is_written(write, tmp_path, monkeypatch):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(save.shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 50_000, 50_000))
    folder = write()
    with pytest.raises(IlladaError) as caught:
        export_gguf(str(folder), str(tmp_path / "m.gguf"))
    needed = int(re.search(r"needs about ([\d,]+) bytes", str(caught.value))[1].replace(",", ""))
    monkeypatch.undo()
    export_gguf(str(folder), str(tmp_path / "m.gguf"))
    size = (tmp_path / "m.gguf").stat().st_size
    assert size < needed < size + 1_100_000


TEXTS = ["one two  three\n\nfour's <|user|>five<|end|>", "17 of 2,048", "Straße ü 漢字 🙂"]


@pytest.mark.slow
@pytest.mark.skipif(
    "ILLADA_LLAMA_CPP" not in os.environ, reason="set ILLADA_LLAMA_CPP to a Python with llama-cpp-python"
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "q8_0"])
@pytest.mark.parametrize("shape", [*SHAPES, "ILLADA_MODEL"])
def test_llama_cpp_gives_the_same_logits(write, tmp_path, shape, dtype):
    """At every position of a sequence of which half is masked; ILLADA_MODEL may name a trained model."""
    if shape == "ILLADA_MODEL" and shape not in os.environ:
        pytest.skip("set ILLADA_MODEL to a model folder")
    folder = os.environ[shape] if shape in os.environ else write(**{"intermediate_size": 64, **SHAPES[shape]})
    export_gguf(str(folder), str(tmp_path / "m.gguf"), dtype)
    model, tokenizer = load_model(str(folder), "fp32", "cpu")
    length = 64
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(8, len(tokenizer), (length,), generator=generator)
    ids[torch.randperm(length, generator=generator)[: length // 2]] = model.config.mask_id
    asked = json.dumps({"ids": ids.tolist(), "texts": TEXTS})
    script = Path(__file__).with_name("llama_cpp_logits.py")
    command = [os.environ["ILLADA_LLAMA_CPP"], str(script), str(tmp_path / "m.gguf"), asked, str(tmp_path / "l.npy")]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    with torch.no_grad():
        ours = model(ids[None]).logits[0].numpy()
    theirs = np.load(tmp_path / "l.npy")
    assert theirs.shape == ours.shape
    difference, spread = np.abs(theirs - ours).max(), ours.std()
    agree = np.mean(theirs.argmax(1) == ours.argmax(1))
    print(f"{shape} {dtype}: largest difference {difference:.2e} of a spread of {spread:.2f}, top-1 {agree:.4f}")
    # llama.cpp rounds the activations too where weights are not fp32.
    assert difference < {"fp32": 1e-4, "fp16": 0.04, "bf16": 0.2, "q8_0": 0.4}[dtype] * spread
    assert agree >= {"fp32": 1.0}.get(dtype, 0.9)
    assert said["diffusion"]
    assert said["mask"] == model.config.mask_token_id
    assert said["texts"] == [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
