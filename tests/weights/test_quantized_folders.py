"""What `illada export --quantize` writes, and what is said of folders that are not as it writes them."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from illada import cli
from illada.errors import IlladaError
from illada.folders import SUMS
from illada.generation.engine import generate
from illada.generation.settings import GenerationSettings
from illada.weights.export import export_model
from illada.weights.load import load_config, load_model
from illada.weights.options import LIBRARIES
from illada.weights.quantize import quantization_of

IDS = torch.arange(40)[None]


@pytest.fixture(scope="module")
def plain(build_model, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    model = build_model(True, seed=5, vocab_size=len(tiny_tokenizer), hidden_size=64, intermediate_size=128)
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=list(LIBRARIES))
def stored(request, plain, tmp_path_factory):
    """A way to quantise, and a folder with weights in it, in several files."""
    pytest.importorskip(LIBRARIES[request.param])
    folder = tmp_path_factory.mktemp("stored") / "model"
    export_model(str(plain), str(folder), max_shard_size="30KB", quantize=request.param)
    return request.param, folder


@torch.inference_mode()
def test_a_quantised_folder_gives_what_quantising_at_load_gives(plain, stored):
    way, folder = stored
    expected, tokenizer = load_model(str(plain), device="cpu", quantize=way)
    model, _ = load_model(str(folder), device="cpu")
    assert quantization_of(model.config) == quantization_of(expected.config) == way
    assert torch.equal(model(IDS).logits, expected(IDS).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    settings = GenerationSettings(max_new_tokens=8, block_length=4)
    assert generate(model, [[3, 17]], settings, tokenizer) == generate(expected, [[3, 17]], settings, tokenizer)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    assert sum(file.stat().st_size for file in files) < 0.85 * (plain / "model.safetensors").stat().st_size
    card = (folder / "README.md").read_text()
    assert f"{load_model(str(plain))[0].num_parameters():,} parameters in bf16, the linear layers" in card
    assert f"in {way} ({LIBRARIES[way]} " in card


def test_a_model_card_shows_how_to_load_it(plain, tmp_path, capsys):
    pytest.importorskip("torchao")
    export_model(str(plain), str(tmp_path / "out"), quantize="int8")
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("this folder", str(tmp_path / "out")).replace('"..."', '"one"')
    exec(code.replace("max_new_tokens=128, block_length=32", "max_new_tokens=8, block_length=4"), {})
    assert capsys.readouterr().out.endswith("\n")


def said(capsys, *words):
    """The one line that the command line says of bad input."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    lines = capsys.readouterr().err.strip().splitlines()
    assert (stop.value.code, len(lines)) == (2, 1), lines
    return lines[0]


def test_what_cannot_be_done_with_quantised_weights_is_refused(stored, tmp_path, capsys):
    way, folder = stored
    words = ("export", "--model", str(folder), "--output", str(tmp_path / "out"))
    assert f"are {way} already: copy the folder" in said(capsys, *words)
    with pytest.raises(IlladaError, match=f"are {way} already: leave out --quantize"):
        load_model(str(folder), quantize=way)
    with pytest.raises(IlladaError, match=f"are {way} already: leave out --quantize"):
        export_model(str(folder), str(tmp_path / "out"), quantize="int8")
    with pytest.raises(IlladaError, match=f"are {way}, made to run in bfloat16: leave out --dtype"):
        load_model(str(folder), "fp32")
    with pytest.raises(IlladaError, match="the checkpoint is quantised"):
        load_config(folder)  # as training reads it
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", ["released", "gguf"])
def test_other_layouts_have_no_quantised_weights(plain, tmp_path, layout, capsys):
    words = ("--model", str(plain), "--output", str(tmp_path / "x.gguf"), "--layout", layout, "--quantize", "int8")
    assert "--layout illada" in said(capsys, "export", *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "short", "other way"])
def test_a_quantised_folder_that_does_not_fit_is_refused(stored, tmp_path, damage):
    way, folder = stored
    tensors, header = {}, {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        with safe_open(file, "pt") as opened:
            header |= opened.metadata()
    for file in folder.iterdir():
        if file.suffix != ".safetensors" and file.name not in (SUMS, "model.safetensors.index.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    name = max((name for name in tensors if "layers.1.mlp.down_proj" in name), key=lambda name: tensors[name].numel())
    if damage == "missing":
        del tensors[name]
    elif damage == "short":
        tensors[name] = tensors[name][:32].contiguous()
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        method = "bitsandbytes" if way == "int4" else "illada-int4"
        config["quantization_config"] = {"quant_method": method, "load_in_8bit": True}
        (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", header)
    what = {"missing": f"{name} is missing", "short": f"{name} is .*, not", "other way": "q_proj"}[damage]
    with pytest.raises(IlladaError, match=f"are not the .* weights that its config.json describes: .*{what}"):
        load_model(str(tmp_path), device="cpu")
