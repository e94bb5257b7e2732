import json
import re
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from illada import GenerationSettings, cli, confidence_scores, generate
from illada.errors import IlladaError
from illada.weights import adapters, tensor_file
from illada.weights import save as model_files
from illada.weights.export import export_model
from illada.weights.load import load_model
from released import ours, random_tensors, write_released

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module", params=["tied", "untied"])
def run(request, tiny_tokenizer, build_model, tmp_path_factory):
    """A run folder as training leaves it."""
    folder = tmp_path_factory.mktemp("run")
    model = build_model(request.param == "tied", seed=3, vocab_size=len(tiny_tokenizer))
    model.save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text("training:\n  steps: 7\n")
    records = [{"step": 6, "tokens": 700}, {"step": 7, "tokens": 1234, "validation_bits_per_byte": 2.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder, model


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_an_export_loads_with_the_auto_classes(run, tmp_path, name, dtype, tiny_tokenizer, capsys):
    folder, model = run
    target = tmp_path / "deep" / "exported"
    cli.main(["export", "--model", str(folder), "--output", str(target), "--dtype", name])
    assert "AutoModelForMaskedLM" in capsys.readouterr().out
    again = AutoModelForMaskedLM.from_pretrained(target)
    assert again.dtype == dtype
    for (key, a), (_, b) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b.to(dtype)), key
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == model.config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(target)
    text = "one two  three ü\n"
    assert tokenizer.encode(text) == tiny_tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.mask_token_id == model.config.mask_token_id == again.config.mask_token_id
    messages = [{"role": "user", "content": "one"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == tiny_tokenizer.apply_chat_template(
        messages, tokenize=False
    )
    if name == "fp32":
        ids = torch.arange(12)[None]
        with torch.no_grad():
            assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    assert not list(tmp_path.rglob("*.partial"))


def test_the_card_says_what_the_run_knows(run, tmp_path):
    folder, model = run
    export_model(str(folder), str(tmp_path / "out"), "bf16")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"{model.num_parameters():,} parameters in bf16" in card
    assert "7 steps on 1,234 tokens." in card
    assert "Validation at step 7: 2.5000 bits per byte" in card
    assert "steps: 7" in card
    assert "Rule" not in card
    assert "Started from" not in card


def test_a_bare_model_folder_has_a_card_without_training(run, tmp_path, tiny_tokenizer):
    _, model = run
    bare = tmp_path / "a" / "b" / "bare"
    model.save_pretrained(bare)
    tiny_tokenizer.save_pretrained(bare)
    export_model(str(bare), str(tmp_path / "out"), "fp32")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Training" not in card
    assert "## Use" in card


def test_an_existing_output_is_left_alone(run, tmp_path):
    folder, _ = run
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(IlladaError, match="exists: choose another --output"):
        export_model(str(folder), str(tmp_path / "out"), "fp32")
    assert [path.name for path in Path(tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_failed_export_leaves_nothing(run, tmp_path):
    with pytest.raises(IlladaError, match="no model"):
        export_model(str(tmp_path / "missing"), str(tmp_path / "out"), "fp32")
    assert list(tmp_path.iterdir()) == []


def weights(path):
    """All tensors of a folder; each lies in one file only."""
    files = [load_file(file) for file in sorted(path.glob("*.safetensors"))]
    tensors = {name: tensor for file in files for name, tensor in file.items()}
    assert len(tensors) == sum(map(len, files))
    return tensors


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def read(path):
    return json.loads(path.read_text())


def answers(path):
    """What a folder's model says: logits, a generated text, scores."""
    model, tokenizer = load_model(str(path), device="cpu")
    with torch.no_grad():
        logits = model(torch.arange(20)[None]).logits
    settings = GenerationSettings(max_new_tokens=8, block_length=4)
    answer = generate(model, [[3, 17]], settings, tokenizer=tokenizer)[0]
    return logits, answer.ids, confidence_scores(model, [([3, 17], [4, 9])])


@pytest.fixture(scope="module")
def illada_release(tmp_path_factory):
    path = write_released(tmp_path_factory.mktemp("hub") / "illada", "illada", random_tensors(1))
    generation = {
        "_from_model_config": True,
        "bos_token_id": 0,
        "eos_token_id": [2, 9],
        "pad_token_id": 1,
        "max_length": 77,
    }
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path


@pytest.fixture(scope="module")
def llada_release(tmp_path_factory):
    return write_released(tmp_path_factory.mktemp("hub") / "llada", "llada", random_tensors(2))


def test_ours_to_released_and_back_is_bit_equal(run, tmp_path):
    path, model = run
    before = weights(path / "model")
    export_model(str(path), str(tmp_path / "released"), layout="released", max_shard_size="20KB")
    released = weights(tmp_path / "released")
    # Spec §1: LLaMA's names, and an explicit head whether tied or not.
    layers = model.config.num_hidden_layers
    assert len(released) == 9 * layers + 3
    assert_same(released, {**before, "lm_head.weight": model.lm_head.weight.detach()})
    config = read(tmp_path / "released" / "config.json")
    assert config["architectures"] == ["ILLaDAForCausalLM"]
    assert config["model_type"] == "illada"
    assert config["tie_word_embeddings"] == model.config.tie_word_embeddings
    export_model(str(tmp_path / "released"), str(tmp_path / "back"))
    assert_same(weights(tmp_path / "back"), before)
    again = read(tmp_path / "back" / "config.json")
    wanted = read(path / "model" / "config.json")
    assert {name: again[name] for name in wanted} == wanted
    for a, b in zip(answers(tmp_path / "back"), answers(path), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_release_to_ours_and_back_is_bit_equal(illada_release, tmp_path):
    export_model(str(illada_release), str(tmp_path / "ours"))
    before = weights(illada_release)
    assert_same(weights(tmp_path / "ours"), {n: t for n, t in before.items() if n != "lm_head.weight"})
    export_model(str(tmp_path / "ours"), str(tmp_path / "back"), layout="released", max_shard_size="20KB")
    assert_same(weights(tmp_path / "back"), before)
    config, again = read(illada_release / "config.json"), read(tmp_path / "back" / "config.json")
    # All fields and values are back, with the mask id added; eos_token_id now holds every end.
    expected = {
        **config,
        "mask_token_id": 5,
        "eos_token_id": [2, 9],
        "transformers_version": again["transformers_version"],
    }
    assert again == expected
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert read(tmp_path / "back" / name) == read(illada_release / name)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (illada_release / name).read_bytes()
    first = answers(illada_release)
    for step in ("ours", "back"):
        for a, b in zip(answers(tmp_path / step), first, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("layout", ["illada", "released"])
def test_llada_becomes_ours(llada_release, tmp_path, layout):
    export_model(str(llada_release), str(tmp_path / "out"), layout=layout)
    before = {ours(name): tensor for name, tensor in weights(llada_release).items()}
    assert_same(weights(tmp_path / "out"), before)
    model, _ = load_model(str(tmp_path / "out"), device="cpu")
    source, _ = load_model(str(llada_release), device="cpu")
    for name in ("mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(model.config, name) == getattr(source.config, name), name
    assert read(tmp_path / "out" / "config.json")["mask_token_id"] == 316
    assert read(tmp_path / "out" / "config.json")["tie_word_embeddings"] is False
    for a, b in zip(answers(tmp_path / "out"), answers(llada_release), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_odd_special_ids_survive_the_round_trip(build_model, tiny_tokenizer, tmp_path):
    model = build_model(True, seed=5, vocab_size=len(tiny_tokenizer), mask_token_id=6, eos_token_id=[2, 7, 11])
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "a")
    tiny_tokenizer.save_pretrained(tmp_path / "a")
    export_model(str(tmp_path / "a"), str(tmp_path / "b"), layout="released")
    assert read(tmp_path / "b" / "generation_config.json") == {"bos_token_id": 0, "eos_token_id": [2, 7, 11]}
    assert read(tmp_path / "b" / "config.json")["pad_token_id"] is None
    export_model(str(tmp_path / "b"), str(tmp_path / "c"))
    config = load_model(str(tmp_path / "c"), device="cpu")[0].config
    assert (config.mask_token_id, config.eos_token_id, config.pad_token_id) == (6, [2, 7, 11], None)


def test_weights_are_written_in_files_of_the_size_asked_for(illada_release, tmp_path, monkeypatch):
    written, write = [], tensor_file.write_tensors

    def note(path, tensors, read, metadata):
        written.append(sum(t.nbytes for t in tensors.values()))
        return write(path, tensors, read, metadata)

    monkeypatch.setattr(tensor_file, "write_tensors", note)
    export_model(str(illada_release), str(tmp_path / "out"), "fp32", "released", "45KB")
    assert len(written) > 2
    assert max(written) <= 45_000
    index = read(tmp_path / "out" / "model.safetensors.index.json")
    tensors = weights(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values()) == sum(written)
    assert index["weight_map"].keys() == tensors.keys()
    for file in set(index["weight_map"].values()):
        here = {name for name, place in index["weight_map"].items() if place == file}
        assert load_file(tmp_path / "out" / file).keys() == here
        assert (tmp_path / "out" / file).stat().st_mode == (tmp_path / "out" / "config.json").stat().st_mode


def test_a_tied_head_is_written_twice_into_one_file(run, tmp_path):
    path, model = run
    export_model(str(path), str(tmp_path / "out"), layout="released")
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert torch.equal(weights(tmp_path / "out")["lm_head.weight"], model.lm_head.weight)


def test_the_released_layout_is_readable_by_transformers_4(run, tmp_path, tiny_tokenizer):
    path, _ = run
    export_model(str(path), str(tmp_path / "out"), layout="released")
    config = read(tmp_path / "out" / "tokenizer_config.json")
    # transformers 4 has this class, and this name for the list that 5 calls extra_special_tokens (a mapping in 4).
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    assert "extra_special_tokens" not in config
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "<|user|>one two<|end|> ü"
    assert again.encode(text) == tiny_tokenizer.encode(text)
    assert again.all_special_ids == tiny_tokenizer.all_special_ids


def test_the_released_layout_has_no_other_head_width(build_model, tiny_tokenizer, tmp_path):
    build_model(True, seed=5, vocab_size=len(tiny_tokenizer), head_dim=16).save_pretrained(tmp_path / "a")
    tiny_tokenizer.save_pretrained(tmp_path / "a")
    with pytest.raises(IlladaError, match=r"no head_dim .*choose --layout illada"):
        export_model(str(tmp_path / "a"), str(tmp_path / "b"), layout="released")
    export_model(str(tmp_path / "a"), str(tmp_path / "c"))
    assert {path.name for path in tmp_path.iterdir()} == {"a", "c"}


def card_of(path):
    text = (path / "README.md").read_text()
    return yaml.safe_load(text.split("---")[1]), text


def test_the_card_of_a_tuned_checkpoint(run, tmp_path, monkeypatch):
    """It names base and rule, and the numbers of the checkpoint's step though the run went on."""
    _, model = run
    path = tmp_path / "run"
    checkpoint = path / "checkpoints" / "step-00000004"
    export_model(str(run[0]), str(checkpoint / "model"))
    (checkpoint / "state.json").write_text(json.dumps({"step": 4, "tokens": 40}))
    recipe = {"model": {"start": "GSAI-ML/LLaDA-8B-Base"}, "training": {"rule": "llada"}}
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    records = [{"step": n, "tokens": 10 * n, "validation_bits_per_byte": 9 - n} for n in (2, 4, 6)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    export_model(str(path), str(tmp_path / "a"), "fp16", "released")
    head, card = card_of(tmp_path / "a")
    assert "base_model" not in head  # looks like a hub name, but nothing says that it is one
    assert f"{model.num_parameters():,} parameters in fp16" in card
    assert "Started from `GSAI-ML/LLaDA-8B-Base`." in card
    assert "Rule `llada`: the prompt stays visible" in card
    assert "4 steps on 40 tokens (a checkpoint of the run)." in card
    assert "Validation at step 4: 5.0000 bits per byte" in card
    assert "copy `configuration_illada.py` and `modeling_illada.py`" in card
    assert "layout of the released iLLaDA" in card
    monkeypatch.setattr("illada.weights.card.try_to_load_from_cache", lambda name, file: f"/cache/{name}/{file}")
    export_model(str(path), str(tmp_path / "b"))
    head, card = card_of(tmp_path / "b")
    assert head["base_model"] == "GSAI-ML/LLaDA-8B-Base"
    assert "configuration_illada.py" not in card
    # An export that merely lies in a run's folder is not that run.
    (path / "c").mkdir()
    (tmp_path / "b").rename(path / "c" / "b")
    export_model(str(path / "c" / "b"), str(tmp_path / "d"))
    assert "## Training" not in card_of(tmp_path / "d")[1]


@pytest.mark.parametrize("size", ["5", "0GB", "-5GB", "5GiB", "1.5GB", "", "lots"])
def test_a_size_that_is_none_is_refused(run, tmp_path, size):
    with pytest.raises(IlladaError, match=r"max_shard_size is .*: it must be a whole number of KB, MB, GB or TB"):
        export_model(str(run[0]), str(tmp_path / "out"), max_shard_size=size)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_would_touch_the_source_is_refused(illada_release, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(illada_release)
    for place in (illada_release / "out", link / "deep" / "out"):
        with pytest.raises(IlladaError, match="being read: choose another --output"):
            export_model(str(illada_release), str(place))
    # Here the partial folder of the output is the source: deleting it would delete what is read.
    export_model(str(illada_release), str(tmp_path / ".out.partial"))
    before = weights(tmp_path / ".out.partial")
    with pytest.raises(IlladaError, match="being read: choose another --output"):
        export_model(str(tmp_path / ".out.partial"), str(tmp_path / "out"))
    assert_same(weights(tmp_path / ".out.partial"), before)


def test_no_room_is_noticed_before_anything_is_written(illada_release, tmp_path, monkeypatch):
    monkeypatch.setattr(model_files.shutil, "disk_usage", lambda path: Usage(10**6, 10**6 - 50_000, 50_000))
    with pytest.raises(IlladaError) as caught:
        export_model(str(illada_release), str(tmp_path / "deep" / "out"))
    needed = int(re.search(r"needs about ([\d,]+) bytes", str(caught.value))[1].replace(",", ""))
    size = sum(t.nbytes for t in weights(illada_release).values()) - 320 * 32 * 2  # ours has the tied head once
    assert size < needed < size + 100_000
    assert f"{tmp_path} has 50.0 kB free" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SafetensorError("Error: I/O error: No space left on device (os error 28)"), "is full: free some"),
        (OSError(28, "No space left on device"), "is full: free some"),
        (OSError(122, "Disk quota exceeded"), "is full: free some"),
        (OSError(5, "Input/output error"), "cannot be written: .*Input/output error"),
        (KeyboardInterrupt(), None),
    ],
)
def test_a_write_that_fails_midway_leaves_nothing(illada_release, tmp_path, monkeypatch, error, message):
    files, write = [], tensor_file.write_tensors

    def fail(path, tensors, read, metadata):
        files.append(path)
        if len(files) == 3:
            raise error
        return write(path, tensors, read, metadata)

    monkeypatch.setattr(tensor_file, "write_tensors", fail)
    with pytest.raises(IlladaError if message else KeyboardInterrupt, match=message):
        export_model(str(illada_release), str(tmp_path / "deep" / "out"), max_shard_size="15KB")
    assert len(files) == 3
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    export_model(str(illada_release), str(tmp_path / "deep" / "out"), max_shard_size="15KB")


def test_what_a_killed_export_left_is_replaced(illada_release, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model-00009-of-00009.safetensors").write_bytes(b"half")
    export_model(str(illada_release), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1


def test_values_too_large_for_fp16_are_refused(build_model, tiny_tokenizer, tmp_path):
    model = build_model(False, seed=5, vocab_size=len(tiny_tokenizer))
    with torch.no_grad():
        model.lm_head.weight[3, 3] = 7e4
    model.save_pretrained(tmp_path / "a")
    tiny_tokenizer.save_pretrained(tmp_path / "a")
    with pytest.raises(IlladaError, match=r"lm_head.weight holds values too large for fp16: choose --dtype bf16"):
        export_model(str(tmp_path / "a"), str(tmp_path / "b"), "fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_adapter_is_exported_merged_into_its_base(run, tmp_path):
    pytest.importorskip("peft")
    base = run[0] / "model"
    model, tokenizer = load_model(str(base), device="cpu")
    adapters.add_adapter(model, 2, 4, 0.0, ["q_proj", "down_proj"], str(base), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        beside = model(ids).logits
    adapters.save_adapter(model, tmp_path / "tuned" / "adapter")
    tokenizer.save_pretrained(tmp_path / "tuned" / "adapter")
    (tmp_path / "tuned" / "recipe.yaml").write_text(yaml.safe_dump({"model": {"start": "runs/base"}}))
    before = weights(base)
    export_model(str(tmp_path / "tuned"), str(tmp_path / "out"))
    assert_same(weights(base), before)
    assert weights(tmp_path / "out").keys() == before.keys()
    merged, _ = load_model(str(tmp_path / "out"), device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, beside, rtol=1e-4, atol=1e-4)
        assert (beside - run[1](ids).logits).abs().max() > 0.1
    assert "Started from `runs/base`; a LoRA adapter was trained and merged in." in card_of(tmp_path / "out")[1]


def test_the_lines_of_the_card_generate(run, tmp_path, capsys):
    export_model(str(run[0]), str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag" not in card
    code = card.split("## Use")[1].split("```python\n")[1].split("```")[0]
    code = code.replace("this folder", str(tmp_path / "out")).replace('"..."', '"one"')
    exec(code.replace("max_new_tokens=128, block_length=32", "max_new_tokens=8, block_length=4"), {})
    assert capsys.readouterr().out.endswith("\n")
