import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from illada import cli
from illada.commands.export import export_model
from illada.errors import IlladaError


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
    assert "2.5000 bits per byte" in card
    assert "steps: 7" in card


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
