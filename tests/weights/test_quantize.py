import copy
import re
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from illada.errors import IlladaError
from illada.generation.engine import generate
from illada.generation.settings import GenerationSettings
from illada.model.config import IlladaConfig
from illada.model.transformer import IlladaForMaskedLM
from illada.weights.options import LIBRARIES
from illada.weights.quantize import check_shapes, quantized_loading
from released import random_tensors, write_released

CPU = torch.device("cpu")
TYPES = {"int8": torch.float32, "int4": torch.bfloat16, "int8-bnb": torch.float32, "nf4": torch.bfloat16}
# QLoRA, appendix E.
NEGATIVE = (-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004)
POSITIVE = (0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0)
NF4 = torch.tensor([*NEGATIVE, 0.0, *POSITIVE])


@pytest.fixture(params=list(TYPES))
def way(request):
    pytest.importorskip(LIBRARIES[request.param])
    pytest.importorskip("accelerate")
    return request.param


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folders(request, build_model, tmp_path_factory):
    """The same model in fp32 and bf16."""
    model = build_model(request.param, seed=5, hidden_size=64, intermediate_size=128)
    places = {}
    for dtype in (torch.bfloat16, torch.float32):  # the values are those of bf16 in both
        places[dtype] = tmp_path_factory.mktemp("model")
        model.to(torch.bfloat16).to(dtype).save_pretrained(places[dtype])
    return places


def load(folder, way):
    config = IlladaConfig.from_pretrained(folder)
    arguments = {} if way is None else quantized_loading(way, config, CPU)
    model = IlladaForMaskedLM.from_pretrained(folder, config=config, dtype="auto", **arguments).eval()
    if way is not None:
        check_shapes(model)
    return model


def by_hand(way, weight_NK):
    """The weights that are left after rounding, and the rounding's step."""
    weight_NK = weight_NK.float()
    if way in ("int8", "int8-bnb"):
        step = weight_NK.abs().amax(1, keepdim=True) / (127.5 if way == "int8" else 127)
        return (weight_NK * (1 / step)).round().clamp(-128, 127) * step, step
    if way == "int4":
        group = weight_NK.unflatten(1, (-1, 32))
        low, high = group.amin(2, keepdim=True), group.amax(2, keepdim=True)
        step = (high - low) / 15
        zero = (-low / step).round()
        level = (group / step + zero).round().clamp(0, 15)
        return ((level - zero) * step).flatten(1), step.expand_as(group).flatten(1)
    group = weight_NK.unflatten(1, (-1, 64))
    most = group.abs().amax(2, keepdim=True)
    nearest = ((group / most)[..., None] - NF4).abs().argmin(-1)
    return (NF4[nearest] * most).flatten(1), (most * 0.3).expand_as(group).flatten(1)


def decoded(layer):
    """The weights that a layer's stored levels, scales and zeros stand for (int4)."""
    level_NK = torch.stack((layer.weight & 15, layer.weight >> 4), -1).flatten(1)
    groups = level_NK.float().unflatten(1, (-1, 32))
    return ((groups - layer.zero.float()[..., None]) * layer.scale[..., None]).flatten(1)


def linears(model):
    return {path: layer for path, layer in model.model.layers.named_modules() if isinstance(layer, nn.Linear)}


def rounded_by_hand(plain, way):
    model = copy.deepcopy(plain)
    with torch.no_grad():
        for layer in linears(model).values():
            layer.weight.copy_(by_hand(way, layer.weight)[0])
    return model


IDS = torch.tensor([[7, 5, 5, 60, 1, 0, 33, 5, 12, 41, 5, 5]])


@torch.inference_mode()
def test_weights_of_the_blocks_are_rounded_as_said_and_nothing_else(folders, way):
    plain, model = (load(folders[TYPES[way]], name) for name in (None, way))
    originals = linears(plain)
    assert linears(model).keys() == originals.keys()
    for path, layer in linears(model).items():
        effective_NK = layer(torch.eye(layer.in_features, dtype=TYPES[way])).float().T
        expected_NK, step = by_hand(way, originals[path].weight)
        original_NK = originals[path].weight.float()
        if way == "int4":  # better than rounding between the least and the greatest, as scales are fitted
            expected_NK = decoded(layer)
            assert all(len(group.unique()) <= 16 for group in expected_NK[::8].unflatten(1, (-1, 32)).flatten(0, 1))
            assert (expected_NK - original_NK).norm() < 0.98 * (by_hand(way, original_NK)[0] - original_NK).norm(), path
        off = (effective_NK - expected_NK).abs() > 0.15 * step
        assert off.float().mean() < 0.005, path
        assert (effective_NK - original_NK).norm() < 1.05 * (expected_NK - original_NK).norm(), path
    kept = {name: x for name, x in plain.named_parameters() if "_proj" not in name}
    actual = dict(model.named_parameters())
    for name, x in kept.items():
        assert type(actual[name]) is nn.Parameter
        assert torch.equal(actual[name], x), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert not model.training


@torch.inference_mode()
def test_logits_are_those_of_an_ordinary_model_with_rounded_weights(folders, way):
    dtype = TYPES[way]
    plain, model = (load(folders[dtype], name) for name in (None, way))
    # The ordinary models compute in fp32, so that only the quantised one has errors of its own.
    rounded = rounded_by_hand(plain.float(), way)
    if way == "int4":
        for path, layer in linears(model).items():
            linears(rounded)[path].weight.copy_(decoded(layer))
    original, expected, actual = (network(IDS).logits.float() for network in (plain, rounded, model))
    lost = (expected - original).norm()
    assert lost > 1e-3 * original.norm()
    if way == "int8":
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    elif way != "int8-bnb":
        assert (actual - expected).norm() < 0.5 * lost
    # LLM.int8() rounds the activations too.
    assert (actual - original).norm() < (0.05 if way.startswith("int8") else 0.6) * original.norm()


def test_generation_with_int8_commits_what_the_rounded_model_commits(folders):
    pytest.importorskip("torchao")
    plain, model = (load(folders[torch.float32], name) for name in (None, "int8"))
    settings = GenerationSettings(max_new_tokens=16, block_length=8, steps_per_block=4, eos_token_id=None)
    prompts = [[7, 9, 11], [3, 2, 40, 41, 8]]
    expected = generate(rounded_by_hand(plain, "int8"), prompts, settings)
    assert [x.ids for x in generate(model, prompts, settings)] == [x.ids for x in expected]


def test_generation_runs(folders, way):
    settings = GenerationSettings(max_new_tokens=16, block_length=8, eos_token_id=None)
    model = load(folders[TYPES[way]], way)
    answers = generate(model, [[7, 9, 11], [3]], settings)
    assert [len(x.ids) for x in answers] == [16, 16]
    assert model.config.mask_token_id not in answers[0].ids
    assert generate(model, [[7, 9, 11], [3]], settings) == answers


@pytest.mark.parametrize("family", ["illada", "llada"])
@torch.inference_mode()
def test_released_layouts(way, family, tmp_path):
    write_released(tmp_path / "model", family, random_tensors(3), width=64, inner=128)
    plain, model = load(tmp_path / "model", None), load(tmp_path / "model", way)
    assert linears(model).keys() == linears(plain).keys()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (family == "illada")
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    path = "1.mlp.down_proj"
    effective_NK = linears(model)[path](torch.eye(128, dtype=torch.bfloat16)).T
    original_NK = linears(plain)[path].weight
    assert 0 < (effective_NK - original_NK).norm() < 0.1 * original_NK.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.inference_mode()
def test_on_a_gpu(folders, way):
    gpu = torch.device("cuda", 0)
    config = IlladaConfig.from_pretrained(folders[torch.bfloat16])
    arguments = quantized_loading(way, config, gpu)
    model = IlladaForMaskedLM.from_pretrained(folders[torch.bfloat16], config=config, dtype="auto", **arguments).eval()
    check_shapes(model)
    assert {x.device for x in model.parameters()} == {gpu}
    original = load(folders[torch.bfloat16], None)(IDS).logits.float()
    actual = model(IDS.to(gpu)).logits.float().cpu()
    assert (actual - original).norm() < (0.1 if way.startswith("int8") else 0.6) * original.norm()


@pytest.mark.parametrize("damage", ["missing", "narrow", "short"])
def test_a_tensor_that_does_not_fit_is_refused(folders, way, damage, tmp_path):
    folder = folders[TYPES[way]]
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    whole = tensors.pop(name)
    if damage != "missing":
        tensors[name] = (whole[:, :64] if damage == "narrow" else whole[:32]).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(IlladaError, match=r"layers\.1\.mlp\.down_proj\.weight is") as caught:
        load(tmp_path, way)
    assert len(set(re.findall(r"\S+_proj", str(caught.value)))) == 1


@pytest.mark.parametrize(("name", "library"), [("int8", "torchao"), ("int4", "openvino"), ("nf4", "bitsandbytes")])
def test_a_missing_library_is_named_with_the_command(monkeypatch, name, library):
    monkeypatch.setitem(sys.modules, library, None)
    config = IlladaConfig(hidden_size=64, dtype="bfloat16")
    with pytest.raises(IlladaError, match=rf"{name} needs .*{library}.*: pip install [^\n]*$"):
        quantized_loading(name, config, CPU)


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("int4", {"intermediate_size": 80}, "intermediate_size 80"),
        ("nf4", {"hidden_size": 96, "head_dim": 16}, "hidden_size 96"),
        ("nf4", {"head_dim": 24}, "query width 96"),
    ],
)
def test_widths_that_the_kernels_cannot_do_are_named(name, changes, what):
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = IlladaConfig(**{**shape, "dtype": "bfloat16", **changes})
    with pytest.raises(IlladaError, match=f"{what}.*choose int8"):
        quantized_loading(name, config, CPU)


def test_what_cannot_run_is_refused():
    pytest.importorskip("torchao")
    config = IlladaConfig(dtype="float32")
    with pytest.raises(IlladaError, match="no quantization 'int2': choose one of int8, int4, int8-bnb, nf4"):
        quantized_loading("int2", config, CPU)
    gpu = torch.device("cuda", 0)
    with pytest.raises(IlladaError, match="int4 on a GPU computes in bf16 only"):
        quantized_loading("int4", config, gpu)
    with pytest.raises(IlladaError, match="int4 on a GPU computes in bf16 only"):
        quantized_loading("int4", IlladaConfig(dtype="bfloat16"), gpu, torch.float16)
    with pytest.raises(IlladaError, match="int4 runs on cpu and cuda, not on mps"):
        quantized_loading("int4", config, torch.device("mps"), torch.bfloat16)
