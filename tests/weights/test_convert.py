import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from illada import GenerationSettings, cli, diffusion_loss, generate
from illada.errors import IlladaError
from illada.preparation.train_tokenizer import train_tokenizer
from illada.scoring.likelihood import likelihood_scores
from illada.text.tokenizer import load_tokenizer
from illada.weights.convert import convert_model
from illada.weights.load import load_model

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": [2, 7],
    "pad_token_id": None,
}


def tokenizer_without_mask(reserved=()):
    """A tokenizer of bytes and ends; no text of a token says mask."""
    made = train_tokenizer(["one two three four five six seven"] * 3, 280)
    text = made.backend_tokenizer.to_str().replace("<[MASK]>", "<|other|>")
    made._tokenizer = type(made.backend_tokenizer).from_str(text)
    made.mask_token = None
    made.add_tokens(list(reserved), special_tokens=True)
    return made


def make(path, tokenizer, model_class=LlamaForCausalLM, config_class=LlamaConfig, extra_rows=0, dtype=None, **changes):
    """A small causal model as transformers saves it."""
    torch.manual_seed(1)
    model = model_class(config_class(**{**SHAPE, "vocab_size": len(tokenizer) + extra_rows, **changes})).eval()
    if dtype is not None:
        model.to(dtype)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


def convert(source, target, mask_token=None, dtype="auto", objective="diffusion"):
    convert_model(str(source), str(target), objective, mask_token, dtype, "5GB")
    return load_model(str(target), device="cpu")


def shared(model):
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_is_kept(tmp_path, tiny_tokenizer, tie, dtype):
    theirs = make(tmp_path / "causal", tiny_tokenizer, tie_word_embeddings=tie, dtype=dtype, rope_theta=777.0)
    model, tokenizer = convert(tmp_path / "causal", tmp_path / "out")
    assert model.dtype == dtype
    before, after = theirs.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) != tie
    config = model.config
    assert (config.mask_token_id, config.bos_token_id, config.eos_token_id) == (5, 0, [2, 7])
    assert config.rope_theta == theirs.config.rope_parameters["rope_theta"]
    assert config.rms_norm_eps == theirs.config.rms_norm_eps == 1e-6
    assert config.max_position_embeddings == 64
    messages = [{"role": "user", "content": "one"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == tiny_tokenizer.apply_chat_template(
        messages, tokenize=False
    )


@pytest.mark.parametrize("model_class", [(LlamaForCausalLM, LlamaConfig), (MistralForCausalLM, MistralConfig)])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_the_network_is_theirs_where_causal_and_bidirectional_agree(tmp_path, tiny_tokenizer, tie, model_class):
    """One token, whatever the depth; and the last of many in one block, which sees all of them in both."""
    for layers, length in ((2, 1), (1, 17)):
        source, target = tmp_path / f"causal-{layers}", tmp_path / f"out-{layers}"
        no_window = {"sliding_window": None} if model_class[1] is MistralConfig else {}
        theirs = make(
            source,
            tiny_tokenizer,
            *model_class,
            tie_word_embeddings=tie,
            num_hidden_layers=layers,
            head_dim=16,
            **no_window,
        )
        model, _ = convert(source, target)
        ids = torch.arange(20, 20 + 2 * length).view(2, length)
        with torch.no_grad():
            a, b = theirs(ids).logits, model(ids).logits
        torch.testing.assert_close(b[:, -1], a[:, -1], rtol=1e-5, atol=1e-5)
        if length > 1:  # and elsewhere it does look ahead
            assert (b[:, 0] - a[:, 0]).abs().max() > 0.1


def test_a_tokenizers_own_mask_is_taken(tmp_path):
    tokenizer = tokenizer_without_mask()
    tokenizer.mask_token = "<|other|>"
    theirs = make(tmp_path / "causal", tokenizer)
    model, again = convert(tmp_path / "causal", tmp_path / "out")
    assert again.mask_token == "<|other|>"
    assert again.mask_token_id == model.config.mask_token_id == 5
    assert torch.equal(model.model.embed_tokens.weight, theirs.model.embed_tokens.weight)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("extra_rows", [0, 3])
def test_a_mask_is_added_as_the_mean_of_the_others(tmp_path, tie, extra_rows):
    """The mask gets a new row, or a row that the embedding has beyond the tokenizer's tokens."""
    tokenizer = tokenizer_without_mask()
    known = len(tokenizer)
    theirs = make(tmp_path / "causal", tokenizer, extra_rows=extra_rows, tie_word_embeddings=tie)
    text = "one two ü<|user|>"
    ids = tokenizer.encode(text)
    model, again = convert(tmp_path / "causal", tmp_path / "out")
    assert again.mask_token == "<[MASK]>"
    assert again.mask_token_id == model.config.mask_token_id == known
    assert again.encode(text) == ids
    assert again.encode("<[MASK]>") == [known]
    assert model.config.vocab_size == known + max(1, extra_rows)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        before, after = theirs.state_dict()[name], model.state_dict()[name]
        others = [n for n in range(len(before)) if n != known]
        assert torch.equal(after[others], before[others])
        torch.testing.assert_close(after[known], before[:known].double().mean(0).float())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    for name, tensor in theirs.model.layers.state_dict().items():
        assert torch.equal(tensor, model.model.layers.state_dict()[name]), name


def test_an_unused_reserved_token_becomes_the_mask(tmp_path):
    """A token that the chat template or a special id uses is not taken, nor an ordinary word with such a name."""
    names = ["<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|reserved_special_token_2|>"]
    tokenizer = tokenizer_without_mask()
    tokenizer.add_tokens(["unused_word"])
    tokenizer.add_tokens(names, special_tokens=True)
    tokenizer.chat_template = "{{ '<|reserved_special_token_0|>' }}"
    first = len(tokenizer) - 3
    theirs = make(tmp_path / "causal", tokenizer, eos_token_id=[2, first + 1])
    model, again = convert(tmp_path / "causal", tmp_path / "out")
    assert again.mask_token == names[2]
    assert again.mask_token_id == model.config.mask_token_id == first + 2
    assert len(again) == len(tokenizer) == model.config.vocab_size
    before, after = theirs.model.embed_tokens.weight, model.model.embed_tokens.weight
    others = [n for n in range(len(before)) if n != first + 2]
    assert torch.equal(after[others], before[others])
    torch.testing.assert_close(after[first + 2], before[others].mean(0))


def test_a_mask_token_can_be_named(tmp_path):
    tokenizer = tokenizer_without_mask(["<|reserved_special_token_0|>", "<|unused_1|>"])
    theirs = make(tmp_path / "causal", tokenizer)
    for number, (name, expected) in enumerate(
        (("<|unused_1|>", len(tokenizer) - 1), ("<|other|>", 5), ("<gap>", len(tokenizer)))
    ):
        model, again = convert(tmp_path / "causal", tmp_path / f"out-{number}", name)
        assert (again.mask_token, model.config.mask_token_id) == (name, expected)
        kept = torch.equal(model.model.embed_tokens.weight[: len(tokenizer)], theirs.model.embed_tokens.weight)
        assert kept == (name != "<|unused_1|>")
    for name in ("<|eos|>", "e", "<|end|>"):
        with pytest.raises(IlladaError, match="means something else to this tokenizer"):
            convert(tmp_path / "causal", tmp_path / "out", name)
    with pytest.raises(IlladaError, match="mask_token is empty"):
        convert(tmp_path / "causal", tmp_path / "out", " ")


def test_special_ids_come_from_every_file(tmp_path, tiny_tokenizer):
    make(tmp_path / "causal", tiny_tokenizer, eos_token_id=2)
    path = tmp_path / "causal" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [7, 2], "temperature": 0.6, "bos_token_id": 0}))
    config = json.loads((tmp_path / "causal" / "config.json").read_text())
    del config["bos_token_id"]
    (tmp_path / "causal" / "config.json").write_text(json.dumps({**config, "pad_token_id": -1}))
    model, _ = convert(tmp_path / "causal", tmp_path / "out")
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (0, [2, 7], None)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {"eos_token_id": [2, 7], "temperature": 0.6, "bos_token_id": 0}


def test_it_generates_and_training_lowers_its_loss(tmp_path):
    tokenizer = tokenizer_without_mask()
    make(tmp_path / "causal", tokenizer, initializer_range=0.02)
    model, again = convert(tmp_path / "causal", tmp_path / "out")
    answer = generate(model, [[3, 17]], GenerationSettings(max_new_tokens=8, block_length=4), tokenizer=again)[0]
    assert answer.forwards >= 4
    assert model.config.mask_token_id not in answer.ids
    ids = torch.tensor(again.encode("one two three four five six seven")).repeat(8, 1)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = diffusion_loss(model, ids)  # the same noise each time
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_old_files_and_shards_are_read(tmp_path, tiny_tokenizer):
    """The files hold rotary frequencies, as those of Llama 2 do, and an explicit tied head; there are several files."""
    theirs = make(tmp_path / "causal", tiny_tokenizer, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "causal" / "model.safetensors")
    (tmp_path / "causal" / "model.safetensors").unlink()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    places = {}
    for number, name in enumerate(tensors):
        file = f"model-{number % 3}.safetensors"
        places[name] = file
    for file in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, tmp_path / "causal" / file)
    (tmp_path / "causal" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    model, _ = convert(tmp_path / "causal", tmp_path / "out")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def change(path, **values):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))


def change_weights(path, edit):
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
BAD = {
    "scaled": (
        lambda p: change(p, rope_parameters={**LLAMA3, "original_max_position_embeddings": 32, "rope_theta": 1e4}),
        r"has rotary embedding scaled \(llama3\): this network has not",
    ),
    "scaled, old": (
        lambda p: change(p, rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}),
        r"has rotary embedding scaled \(linear\)",
    ),
    "scaled without a factor": (
        lambda p: change(p, rope_parameters=None, rope_scaling={"type": "longrope", **LONG}),
        r"has rotary embedding scaled \(longrope\)",
    ),
    "bias": (lambda p: change(p, attention_bias=True), "has biases: this network has not"),
    "bias in the files": (
        lambda p: change_weights(
            p, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})
        ),
        r"has biases \(model.layers.0.self_attn.q_proj.bias, …\): this network has not",
    ),
    "activation": (lambda p: change(p, hidden_act="gelu"), "has activation gelu"),
    "quantised": (
        lambda p: change(p, quantization_config={"quant_method": "gptq"}),
        r"is quantised \(gptq\): take the bf16",
    ),
    "eight bits": (
        lambda p: change_weights(
            p, lambda f: f.update({"model.norm.weight": f["model.norm.weight"].to(torch.float8_e4m3fn)})
        ),
        r"has quantised weights \(model.norm.weight, …\)",
    ),
    "other family": (
        lambda p: change(p, model_type="gpt2"),
        "is a 'gpt2' model: only these can be converted: llama, mistral",
    ),
    "ours": (
        lambda p: change(p, model_type="illada"),
        "is a masked diffusion model already: train it with --model.start",
    ),
    "missing": (
        lambda p: change_weights(p, lambda tensors: tensors.pop("model.norm.weight")),
        r"do not fit its config.json \(1 tensors\): model.norm.weight is missing",
    ),
    "odd": (
        lambda p: change_weights(p, lambda tensors: tensors.update({"score.weight": torch.zeros(2)})),
        "score.weight is not part of the model",
    ),
    "shape": (
        lambda p: change_weights(p, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(2)})),
        r"model.norm.weight is \[2\], not \[32\]",
    ),
    "head": (
        lambda p: change(p, tie_word_embeddings=True),
        "ties its head to the embedding, but lm_head.weight differs",
    ),
    "tokenizer": (lambda p: change(p, vocab_size=20), r"do not fit its config.json"),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), "holds no tokenizer.json"),
    "no config": (lambda p: (p / "config.json").unlink(), "no model at"),
    "config": (lambda p: (p / "config.json").write_text("{"), "config.json cannot be read"),
    "config value": (lambda p: change(p, hidden_size="wide"), "config.json cannot be used"),
    "cut": (
        lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:900]),
        "is damaged or incomplete",
    ),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "lacks model.safetensors"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_converted_is_one_line(tmp_path, tiny_tokenizer, what):
    make(tmp_path / "causal", tiny_tokenizer)
    spoil, message = BAD[what]
    spoil(tmp_path / "causal")
    with pytest.raises(IlladaError, match=message) as caught:
        convert(tmp_path / "causal", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["causal"]


@pytest.mark.parametrize(
    ("classes", "changes", "message"),
    [
        ((MistralForCausalLM, MistralConfig), {"sliding_window": 16}, r"has a sliding attention window \(16\)"),
        ((Qwen2ForCausalLM, Qwen2Config), {}, r"has biases \(model.layers.0.self_attn.k_proj.bias"),
        (
            (Qwen2ForCausalLM, Qwen2Config),
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
            r"has a sliding attention window \(16\)",
        ),
        (
            (Qwen3ForCausalLM, Qwen3Config),
            {},
            r"has norms of queries and keys \(model.layers.0.self_attn.k_norm.weight",
        ),
    ],
)
def test_other_families_are_refused_for_what_they_have(tmp_path, tiny_tokenizer, classes, changes, message):
    make(tmp_path / "causal", tiny_tokenizer, *classes, **changes)
    with pytest.raises(IlladaError, match=message + ".*this network has not"):
        convert(tmp_path / "causal", tmp_path / "out")


def test_another_type_with_the_same_network_is_read(tmp_path, tiny_tokenizer):
    """Qwen2 without biases."""
    theirs = make(tmp_path / "causal", tiny_tokenizer, tie_word_embeddings=True)
    change(tmp_path / "causal", model_type="qwen2", use_sliding_window=False, sliding_window=16)
    model, _ = convert(tmp_path / "causal", tmp_path / "out")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_tokenizer_of_another_model_is_refused(tmp_path, tiny_tokenizer):
    make(tmp_path / "causal", tiny_tokenizer)
    train_tokenizer(["one two three four five six seven eight nine"] * 3, 300).save_pretrained(tmp_path / "causal")
    with pytest.raises(IlladaError, match="belongs to another model"):
        convert(tmp_path / "causal", tmp_path / "out")


def test_the_command_says_what_it_made_and_what_is_next(tmp_path, capsys, monkeypatch):
    make(tmp_path / "causal", tokenizer_without_mask())
    monkeypatch.chdir(tmp_path)
    cli.main(["convert", "--from", "causal", "--output", "out", "--dtype", "bf16"])
    first, last = capsys.readouterr().out.splitlines()
    known = len(load_tokenizer(tmp_path / "causal"))
    assert f"masks are '<[MASK]>' (id {known}, added to the tokenizer, its row the mean of the others)" in first
    assert f"the vocabulary grew from {known} to {known + 1}" in first
    assert "a starting point for training, not a model" in last
    assert "predict the next token" in last
    assert "illada prepare TEXTS --tokenizer out" in last
    assert "illada pretrain --model.start out" in last
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model" not in yaml.safe_load(card.split("---")[1])
    assert "not a model" in card
    assert f"from {known} to {known + 1}" in card
    assert load_model("out", device="cpu")[0].dtype == torch.bfloat16
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert", "--output", "out2"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "illada: error: missing: --from (--help explains them)\n"


def test_a_hub_name_is_the_base_in_the_card(tmp_path, monkeypatch, tiny_tokenizer):
    make(tmp_path / "causal", tiny_tokenizer)
    monkeypatch.setattr("illada.weights.runs.hub_folder", lambda name, files: tmp_path / "causal")
    monkeypatch.setattr("illada.weights.card.try_to_load_from_cache", lambda name, file: f"/cache/{name}/{file}")
    convert_model("owner/causal-1b", str(tmp_path / "out"), "diffusion", None, "auto", "5GB")
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "owner/causal-1b"


def test_outputs_are_kept_apart_from_what_is_read(tmp_path, tiny_tokenizer):
    make(tmp_path / "causal", tiny_tokenizer)
    (tmp_path / "old").mkdir()
    with pytest.raises(IlladaError, match="old exists: choose another --output"):
        convert(tmp_path / "causal", tmp_path / "old")
    with pytest.raises(IlladaError, match="being read: choose another --output"):
        convert(tmp_path / "causal", tmp_path / "causal" / "out")
    shutil.rmtree(tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["causal"]


def test_a_causal_model_stays_what_it_is(tmp_path, capsys):
    tokenizer = tokenizer_without_mask()
    theirs = make(tmp_path / "causal", tokenizer, tie_word_embeddings=True)
    words = ["--from", str(tmp_path / "causal"), "--output", str(tmp_path / "out"), "--objective", "causal"]
    cli.main(["convert", *words])
    assert "no mask token" in capsys.readouterr().out
    model, kept = load_model(str(tmp_path / "out"), device="cpu")
    assert (model.config.causal, model.config.mask_token_id, model.config.vocab_size) == (True, None, len(tokenizer))
    assert kept.get_vocab() == tokenizer.get_vocab()
    assert kept.mask_token is None
    ids = torch.randint(0, len(tokenizer), (2, 30), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    prompt = [0, 20, 30, 40]
    with torch.inference_mode():
        log_p = theirs(torch.tensor([[*prompt, 50, 60]])).logits[0].double().log_softmax(-1)
    want = float(log_p[3, 50] + log_p[4, 60])
    assert likelihood_scores(model, [(prompt, [50, 60])]) == pytest.approx([want], abs=1e-5)
    settings = GenerationSettings(max_new_tokens=12, block_length=1, eos_token_id=None)
    said = generate(model, [prompt], settings)[0].ids
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **greedy)
    assert said == want[0, len(prompt) :].tolist()
    assert "Autoregressive" in (tmp_path / "out" / "README.md").read_text()
    assert "illada pretrain" not in (tmp_path / "out" / "README.md").read_text()


def test_a_causal_model_gets_no_mask(tmp_path, tiny_tokenizer):
    make(tmp_path / "causal", tiny_tokenizer)
    with pytest.raises(IlladaError, match="a causal model sees no masks"):
        convert(tmp_path / "causal", tmp_path / "out", mask_token="<m>", objective="causal")
    assert not (tmp_path / "out").exists()
    convert(tmp_path / "causal", tmp_path / "out", objective="causal")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    values["causal"] = False
    (tmp_path / "out" / "config.json").write_text(json.dumps(values))
    with pytest.raises(IlladaError, match="mask_token_id is null"):
        load_model(str(tmp_path / "out"), device="cpu")
