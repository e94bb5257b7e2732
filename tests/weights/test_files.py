import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from illada.errors import IlladaError
from illada.model.config import IlladaConfig
from illada.model.transformer import IlladaForMaskedLM, IlladaModel
from illada.preparation.train_tokenizer import train_tokenizer
from illada.weights.load import load_model
from illada.weights.runs import model_folder

IDS = torch.tensor([[3, 5, 5, 60, 1, 0]])


@pytest.fixture(scope="module", params=["tied", "untied"])
def saved(request, build_model, tmp_path_factory):
    model = build_model(request.param == "tied", seed=4, vocab_size=264)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    train_tokenizer(["a b c"], 264).save_pretrained(folder)
    return model, folder


def test_auto_classes_load_what_was_saved(saved):
    model, folder = saved
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, IlladaConfig)
    assert config.mask_token_id == model.config.mask_token_id
    again = AutoModelForMaskedLM.from_pretrained(folder)
    assert isinstance(again, IlladaForMaskedLM)
    for auto in (AutoModel, AutoModelForCausalLM):  # as the released folders' auto_map has it
        assert isinstance(auto.from_pretrained(folder), IlladaForMaskedLM)
    trunk = IlladaModel.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert torch.equal(trunk(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == model.config.tie_word_embeddings
    for (name, a), (_, b) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_files_are_safetensors_without_a_copy_of_a_tied_head(saved):
    model, folder = saved
    assert not list(folder.glob("*.bin")) + list(folder.glob("*.pt"))
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in set(file.keys())) != model.config.tie_word_embeddings
    assert json.loads((folder / "config.json").read_text())["model_type"] == "illada"


def test_a_pickle_is_not_read(saved, tmp_path):
    """Neither by our loader nor by the classes of transformers."""
    model, folder = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(IlladaError, match=r"there is pytorch_model\.bin; only safetensors are read"):
        load_model(str(tmp_path))
    for loader in (AutoModel, AutoModelForMaskedLM, IlladaForMaskedLM, IlladaModel):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            loader.from_pretrained(tmp_path)


def test_a_pad_row_that_was_trained_survives_loading(build_model, tmp_path):
    model = build_model(tie=True, seed=9)
    with torch.no_grad():
        model.model.embed_tokens.weight[1] = 0.5
    model.save_pretrained(tmp_path)
    assert (AutoModelForMaskedLM.from_pretrained(tmp_path).model.embed_tokens.weight[1] == 0.5).all()


def test_a_checkpoint_with_an_explicit_tied_head_loads(tied, tmp_path):
    """As the released shards do (spec §1)."""
    tied.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, tied(IDS).logits)


def test_loading_half_precision_rounds_the_weights(saved):
    model, folder = saved
    half = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.bfloat16)
    for (name, a), (_, b) in zip(half.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b.to(torch.bfloat16)), name
    with torch.no_grad():
        assert half(IDS).logits.isfinite().all()


def test_load_model_gives_model_and_tokenizer(saved):
    model, folder = saved
    again, tokenizer = load_model(str(folder))
    assert not again.training
    assert tokenizer.mask_token_id == 5
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_model_folder_finds_the_newest_model_of_a_run(tmp_path):
    for name in ("checkpoints/step-00000007", "checkpoints/step-00000014", "checkpoints/.step-00000021.partial"):
        (tmp_path / name).mkdir(parents=True)
        for file in ("config.json", "state.json"):
            (tmp_path / name / file).write_text("{}")
    assert model_folder(str(tmp_path)).name == "step-00000014"
    (tmp_path / "checkpoints/step-00000014/state.json").unlink()
    assert model_folder(str(tmp_path)).name == "step-00000007"
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    assert model_folder(str(tmp_path)).name == "model"


def damage(folder, how):
    config, weights = folder / "config.json", folder / "model.safetensors"
    if how == "no config":
        config.unlink()
    elif how == "config is no json":
        config.write_text("{")
    elif how == "other family":
        config.write_text(json.dumps({"model_type": "bert"}))
    elif how == "unknown family":
        config.write_text(json.dumps({"model_type": "nonsense"}))
    elif how == "impossible shape":
        config.write_text(json.dumps({**json.loads(config.read_text()), "mask_token_id": 999}))
    elif how == "another shape":
        config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 3}))
    elif how == "another width":
        config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 50}))
    elif how == "no weights":
        weights.unlink()
    elif how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif how == "damaged tokenizer":
        (folder / "tokenizer.json").write_text("[1]")


@pytest.mark.parametrize(
    "how",
    [
        "no config",
        "config is no json",
        "other family",
        "unknown family",
        "impossible shape",
        "another shape",
        "another width",
        "no weights",
        "cut weights",
        "no tokenizer",
        "damaged tokenizer",
    ],
)
def test_a_damaged_folder_is_one_clear_error(saved, tmp_path, how):
    folder = tmp_path / "model"
    shutil.copytree(saved[1], folder)
    damage(folder, how)
    with pytest.raises(IlladaError) as caught:
        load_model(str(folder))
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    shutil.rmtree(folder)
    with pytest.raises(IlladaError, match="does not exist"):
        load_model(str(folder))


def test_an_impossible_device_is_one_clear_error(saved):
    with pytest.raises(IlladaError, match="device nonsense cannot be used") as caught:
        load_model(str(saved[1]), device="nonsense")
    assert "\n" not in str(caught.value)
