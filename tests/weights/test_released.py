"""Released checkpoints: folders in their exact layouts are read, run, and refused when anything is odd."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline

from fake_hub import serve
from illada import GenerationSettings, confidence_scores, diffusion_loss, generate
from illada.errors import IlladaError
from illada.generation.settings import settings_for
from illada.model.config import IlladaConfig
from illada.model.transformer import IlladaForMaskedLM, IlladaModel
from illada.text.chat import encode_conversation, encode_prompt
from illada.weights.load import load_model
from released import LLADA_SPECIAL, ours, random_tensors, tensors, write_released

IDS = torch.tensor([[3, 5, 5, 60, 1, 0, 300]])
SHAPE = {"vocab": 320, "width": 32, "inner": 48, "layers": 2, "heads": 4}


def names_and_shapes(family):
    return tensors(family, **SHAPE, kv_heads=2 if family == "illada" else 4)


def all_tensors(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.fixture(scope="module", params=["illada", "llada"])
def released(request, tmp_path_factory):
    return request.param, write_released(
        tmp_path_factory.mktemp("hub") / request.param, request.param, random_tensors(1)
    )


@pytest.fixture
def copy(released, tmp_path):
    """A folder one may damage."""
    return released[0], Path(shutil.copytree(released[1], tmp_path / "copy"))


def built(family, folder):
    """The same network put together by hand."""
    common = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 4, "max_position_embeddings": 96}
    theirs = {
        "illada": {"num_key_value_heads": 2, "rope_theta": 123456.0, "rms_norm_eps": 3e-6},
        "llada": {"mask_token_id": 316, "eos_token_id": [315, 319], "bos_token_id": 314, "tie_word_embeddings": False},
    }
    model = IlladaForMaskedLM(IlladaConfig(**common, **theirs[family])).to(torch.bfloat16).eval()
    model.load_state_dict({ours(name): tensor for name, tensor in all_tensors(folder).items()})
    return model


def test_the_fixture_has_the_released_number_of_tensors():
    for family, kv_heads in (("illada", 8), ("llada", 32)):
        shapes = tensors(family, 155_136, 4096, 14_336, 32, 32, kv_heads)
        assert len(shapes) == 291  # spec §1
    with torch.device("meta"):
        model = IlladaForMaskedLM(IlladaConfig.preset("illada-8b"))
    shapes = tensors("illada", 155_136, 4096, 14_336, 32, 32, 8)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_weights_shape_and_ids_come_from_the_folder(released):
    family, folder = released
    model, tokenizer = load_model(str(folder))
    mine = built(family, folder)
    for (name, a), (_, b) in zip(model.named_parameters(), mine.named_parameters(), strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b), name
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, mine(IDS).logits)
    for name in ("mask_token_id", "eos_token_id", "bos_token_id", "rope_theta", "rms_norm_eps", "num_key_value_heads"):
        assert getattr(model.config, name) == getattr(mine.config, name), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (family == "illada")
    assert tokenizer.convert_ids_to_tokens(model.config.mask_token_id) in ("<[MASK]>", "<|mdm_mask|>")
    assert not model.training


def test_every_auto_class_gives_the_model_with_its_head_and_runs_no_code_of_theirs(released):
    family, folder = released
    assert isinstance(AutoConfig.from_pretrained(folder), IlladaConfig)
    mine = built(family, folder)
    for auto in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
        # Scripts written for the release trust its code; the files it names are not there.
        for words in ({}, {"trust_remote_code": True, "dtype": torch.bfloat16}):
            model = auto.from_pretrained(folder, **words)
            assert isinstance(model, IlladaForMaskedLM)
            with torch.no_grad():
                assert torch.equal(model(IDS).logits, mine(IDS).logits)
    trunk = IlladaModel.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(trunk(IDS).last_hidden_state, mine.model(IDS).last_hidden_state)
    text = "one two <eos> three"
    assert AutoTokenizer.from_pretrained(folder).encode(text) == load_model(str(folder))[1].encode(text)


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_weights_in_another_type_are_the_released_ones_rounded(released, name):
    family, folder = released
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
    model, _ = load_model(str(folder), name, "cpu")
    for (key, a), (_, b) in zip(model.named_parameters(), built(family, folder).named_parameters(), strict=True):
        assert torch.equal(a, b.to(dtype)), key


def test_a_saved_copy_is_the_same_model_in_our_layout(released, tmp_path):
    _, folder = released
    model, tokenizer = load_model(str(folder))
    model.save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    again, tokens = load_model(str(tmp_path / "mine"))
    assert all("transformer" not in name for name in all_tensors(tmp_path / "mine"))
    for name in ("mask_token_id", "eos_token_id", "bos_token_id", "rope_theta", "rms_norm_eps"):
        assert getattr(again.config, name) == getattr(model.config, name)
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "one two"}])
    assert encode_prompt(tokens, [{"role": "user", "content": "one two"}]) == prompt
    settings = GenerationSettings(max_new_tokens=16, block_length=8, eos_token_id=None)
    assert generate(model, [prompt], settings)[0].ids == generate(again, [prompt], settings)[0].ids
    pairs = [(prompt, [7, 8]), (prompt, [9])]
    assert confidence_scores(model, pairs) == confidence_scores(again, pairs)


def rewrite(folder, change):
    """Change the tensors of the shard that holds the first block's k_proj, and let the index agree."""
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    name = next(name for name in index["weight_map"] if "k_proj" in name)
    file = index["weight_map"][name]
    held = load_file(folder / file)
    change(held, name)
    save_file(held, folder / file, metadata={"format": "pt"})
    kept = {key: place for key, place in index["weight_map"].items() if place != file}
    index_path.write_text(json.dumps({**index, "weight_map": {**kept, **dict.fromkeys(held, file)}}))


def test_a_missing_tensor_stops_the_load_with_its_name(copy):
    _, folder = copy
    rewrite(folder, lambda held, name: held.pop(name))
    for load in (lambda: load_model(str(folder)), lambda: AutoModel.from_pretrained(folder)):
        with pytest.raises(IlladaError, match=r"layers\.0\.self_attn\.k_proj\.weight is missing"):
            load()


def test_an_extra_tensor_stops_the_load_with_its_name(copy):
    _, folder = copy
    rewrite(folder, lambda held, name: held.update({name.replace("k_proj", "k_norm"): torch.ones(8)}))
    with pytest.raises(IlladaError, match=r"k_norm\.weight is not part of the model"):
        load_model(str(folder))


def test_a_tensor_of_another_shape_stops_the_load_with_both_shapes(copy):
    _, folder = copy
    rewrite(folder, lambda held, name: held.update({name: torch.ones(8, 32, dtype=torch.bfloat16)}))
    with pytest.raises(IlladaError, match=r"k_proj\.weight is \[8, 32\], not \[\d+, 32\]"):
        load_model(str(folder))


def test_a_head_that_differs_from_its_tied_embedding_stops_the_load(tmp_path):
    folder = write_released(tmp_path / "model", "illada", random_tensors(1))
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]["lm_head.weight"]
    held = load_file(file)
    held["lm_head.weight"][7, 7] += 1
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(IlladaError, match="differs from"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), "lacks model-00002"),
        (lambda f: os.truncate(sorted(f.glob("*.safetensors"))[1], 5000), "model-00002.*damaged or incomplete"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "names no files"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), r"lacks model\.safetensors"),
        (lambda f: (f / "tokenizer.json").unlink(), r"no tokenizer\.json"),
        (lambda f: (f / "generation_config.json").write_text("[]"), "no JSON object"),
        (lambda f: (f / "config.json").unlink(), "give a folder with config.json"),
    ],
)
def test_a_damaged_download_is_one_clear_line(copy, damage, words):
    damage(copy[1])
    with pytest.raises(IlladaError, match=words) as caught:
        load_model(str(copy[1]))
    assert "\n" not in str(caught.value)


ODD = [
    ("illada", {"model_type": "llama"}, "'llama' model"),
    ("illada", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\)"),
    ("llada", {"quantization_config": {"quant_method": "fp8"}}, r"quantised \(fp8\)"),
    ("illada", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("illada", {"attention_bias": True}, "attention_bias True"),
    ("illada", {"layer_norm_eps": 1e-5}, "layer_norm_eps"),
    ("illada", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "scales its rotary"),
    ("llada", {"alibi": True}, "alibi True"),
    ("llada", {"layer_norm_type": "default"}, "layer_norm_type"),
    ("llada", {"include_bias": True}, "include_bias"),
    ("llada", {"activation_type": "swiglu"}, "activation_type"),
    ("llada", {"attention_layer_norm": True}, "attention_layer_norm"),
    ("llada", {"d_model": None, "architectures": ["LLaDAMoEModelLM"]}, "LLaDAMoEModelLM.*only dense"),
    ("llada", {"vocab_size": None}, "no vocab_size"),
    ("llada", {"mask_token_id": None}, "no mask_token_id"),
]


@pytest.mark.parametrize(("family", "change", "words"), ODD)
def test_what_this_network_cannot_do_is_refused(tmp_path, family, change, words):
    path = write_released(tmp_path / "model", family, random_tensors(1)) / "config.json"
    values = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    with pytest.raises(IlladaError, match=words) as caught:
        load_model(str(path.parent))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_padded_in_the_embedding_and_grouped_heads_are_read():
    values = json.loads(json.dumps(IlladaConfig.preset("llada-8b").to_dict()))
    config = {"model_type": "llada", "d_model": 64, "n_layers": 1, "n_heads": 4, "multi_query_attention": True}
    config |= {"vocab_size": 300, "embedding_size": 320, "mask_token_id": 299, "mlp_ratio": 2, "eos_token_id": 298}
    read = IlladaConfig.from_dict(config)
    assert (read.vocab_size, read.num_key_value_heads, read.intermediate_size) == (320, 1, 128)
    assert not read.tie_word_embeddings
    assert read.bos_token_id is None
    whole = {"model_type": "llada", "d_model": 4096, "n_layers": 32, "n_heads": 32, "mlp_hidden_size": 12288}
    whole = IlladaConfig.from_dict({**whole, "vocab_size": 126464, "max_sequence_length": 4096})
    for name in ("mask_token_id", "bos_token_id", "eos_token_id", "num_key_value_heads", "intermediate_size"):
        assert getattr(whole, name) == values[name]


def test_the_mask_id_is_the_tokenizers_where_config_json_has_none(copy):
    family, folder = copy
    path = folder / "config.json"
    values = json.loads(path.read_text())
    if family == "illada":
        assert "mask_token_id" not in values
        # A related model has the mask elsewhere in its vocabulary.
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        text = json.dumps(tokenizer).replace("<[MASK]>", "<other>").replace("<sep>", "<[MASK]>")
        (folder / "tokenizer.json").write_text(text)
        assert load_model(str(folder))[0].config.mask_token_id == 4
        declared = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**declared, "mask_token": "<unk>"}))
        assert load_model(str(folder))[0].config.mask_token_id == 3
    path.write_text(json.dumps({**values, "mask_token_id": 17}))
    assert load_model(str(folder))[0].config.mask_token_id == 17


def test_generation_ends_at_every_id_the_files_name(copy):
    family, folder = copy
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [12, 2]}))
    ends = load_model(str(folder))[0].config.eos_token_id
    assert ends == ([2, 12] if family == "illada" else [315, 12, 2, 315 + 4])
    assert LLADA_SPECIAL[-1] == "<|eot_id|>"


def test_a_tokenizer_of_another_model_is_refused(copy):
    path = copy[1] / "tokenizer.json"
    values = json.loads(path.read_text())
    base = max(values["model"]["vocab"].values())
    values["added_tokens"] += [
        {"id": base + 1000 + n, "content": f"<more {n}>", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": False} for n in range(100)
    ]  # fmt: skip
    path.write_text(json.dumps(values))
    with pytest.raises(IlladaError, match="belongs to another model"):
        load_model(str(copy[1]))


def test_a_system_message_reaches_a_template_that_refuses_the_role(released):
    family, folder = released
    _, tokenizer = load_model(str(folder))
    ids = encode_prompt(tokenizer, [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one two"}])
    text = tokenizer.decode(ids)
    assert text.index("be brief") < text.index("one two")
    assert ("system" in text) == (family == "llada")


def test_a_conversation_ends_with_one_eos_and_opens_no_further_turn(released):
    family, folder = released
    _, tokenizer = load_model(str(folder))
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three"}]
    ids, prompt = encode_conversation(tokenizer, turns)
    ends = {"illada": "two three<eos>", "llada": "two three<|eot_id|><|endoftext|>"}
    assert tokenizer.decode(ids[prompt:]) == ends[family]
    assert ids[:prompt] == encode_prompt(tokenizer, turns[:1])


def test_eager_and_sdpa_attention_agree(released):
    _, folder = released
    sdpa = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32)
    eager = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    assert (sdpa.config._attn_implementation, eager.config._attn_implementation) == ("sdpa", "eager")
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    ids = IDS.repeat(2, 1)
    with torch.no_grad():
        reference = sdpa(ids, attention_mask=mask).logits
        torch.testing.assert_close(eager(ids, attention_mask=mask).logits, reference)
        eager.set_attn_implementation("sdpa")
        assert torch.equal(eager(ids, attention_mask=mask).logits, reference)
    with pytest.raises(Exception, match="nonsense"):
        AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="nonsense")


def test_gradient_checkpointing_changes_memory_not_gradients(released):
    _, folder = released
    gradients = []
    for checkpointing in (False, True):
        model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        assert model.is_activation_checkpointing == checkpointing
        diffusion_loss(model, torch.arange(40).remainder(9) + 10, key=(3, 0, 0)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)


def test_a_device_map_places_layers_and_offloads_to_disk(released, tmp_path):
    pytest.importorskip("accelerate")
    family, folder = released
    mine = built(family, folder)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    places["lm_head"] = "cpu"
    for device_map in ({"": "cpu"}, "auto", places):
        model = AutoModel.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, mine(IDS).logits)
        settings = GenerationSettings(max_new_tokens=8, block_length=4, eos_token_id=None)
        assert generate(model, [[7, 8]], settings) == generate(mine, [[7, 8]], settings)
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"


def test_the_fill_mask_pipeline_agrees_with_the_model(copy):
    family, folder = copy
    declared = json.loads((folder / "tokenizer_config.json").read_text())
    mask = "<[MASK]>" if family == "illada" else "<|mdm_mask|>"
    (folder / "tokenizer_config.json").write_text(json.dumps({**declared, "mask_token": mask}))
    fill = pipeline("fill-mask", model=str(folder), dtype=torch.bfloat16)
    best = fill(f"one {mask} two", top_k=1)[0]
    model, tokenizer = load_model(str(folder))
    ids = tokenizer(f"one {mask} two", return_tensors="pt")["input_ids"]
    place = int((ids[0] == model.config.mask_token_id).nonzero())
    with torch.no_grad():
        assert best["token"] == int(model(ids).logits[0, place].argmax())


HUB_CASES = """
import os, sys, urllib.request
from illada import cli
for name in sys.argv[1:]:
    if name == "unplug":
        urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/unplug").read()
        continue
    try:
        cli.main(["generate", "--model", name, "--prompt", "one two", "--max_new_tokens", "4", "--block_length", "4",
                  "--json", "--device", "cpu"])
    except SystemExit as end:
        print(name, "exit", end.code)
"""


@pytest.mark.slow
def test_hub_names_are_fetched_without_code_and_bad_ones_are_one_line(tmp_path):
    root = tmp_path / "hub"
    folder = write_released(root / "own" / "model", "illada", random_tensors(1))
    (folder / "modeling_illada.py").write_text("raise SystemExit('code of theirs ran')")
    shutil.copytree(folder, root / "gated" / "model")
    (root / "own" / "empty").mkdir()
    server = serve(root)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "ILLADA", "TRANSFORMERS"))}
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
    names = ["own/model", "gated/model", "own/none", "own/empty", "unplug", "own/model", "own/other"]
    words = [sys.executable, "-c", HUB_CASES, *names]
    done = subprocess.run(words, capture_output=True, text=True, env={**kept, **hub}, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("illada: error")]
    assert "gated/model is gated: accept its terms" in lines[0], done.stderr
    assert "neither a folder nor a hub repository own/none" in lines[1]
    assert "own/empty" in lines[2]
    assert "no folder own/other, and the hub cannot be reached" in lines[3]
    assert done.stdout.count("exit 2") == len(lines) == 4
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert json.loads(answers[0])["ids"]
    assert answers == answers[:1] * 2, "what was fetched serves without a network"
    assert not list((tmp_path / "home").rglob("*.py"))


@pytest.mark.weights
@pytest.mark.skipif(
    not os.environ.get("ILLADA_WEIGHTS"), reason="set ILLADA_WEIGHTS to a folder or hub name (Instruct)"
)
def test_real_weights_answer():
    """Logits are finite and sharp, the spec's probes hold, and a known answer comes out."""
    model, tokenizer = load_model(os.environ["ILLADA_WEIGHTS"])
    config = model.config
    shape = (config.hidden_size, config.num_hidden_layers, config.vocab_size)
    assert shape in ((4096, 32, 155_136), (4096, 32, 126_464))
    assert config.mask_token_id == (5 if config.vocab_size == 155_136 else 126_336)
    assert tokenizer.convert_ids_to_tokens(config.mask_token_id) in ("<[MASK]>", "<|mdm_mask|>")
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "What is the capital of France? One word."}])
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, config.mask_token_id]], device=model.device)).logits[0].float()
    assert logits.isfinite().all()
    # No shift: a visible token is what its own position predicts best, nearly everywhere.
    visible = torch.tensor(prompt, device=logits.device)
    assert (logits[:-1].argmax(-1) == visible).float().mean() > 0.5
    settings = settings_for(model, GenerationSettings(max_new_tokens=32, block_length=32))
    answer = generate(model, [prompt], settings, tokenizer=tokenizer)[0]
    assert "Paris" in tokenizer.decode(answer.ids)
    paris, rome = (tokenizer.encode(f" {city}", add_special_tokens=False) for city in ("Paris", "Rome"))
    question = tokenizer.encode("The capital of France is", add_special_tokens=False)
    scores = confidence_scores(model, [(question, paris), (question, rome)])
    assert scores[0] > scores[1]
