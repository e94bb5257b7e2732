import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_trainer import MACHINE, Killed, held, kill_after, refused, same, train_killed_at
from transformers import AutoModelForMaskedLM

from illada import cli, rng
from illada.data.shards import Shards
from illada.errors import IlladaError
from illada.model.transformer import IlladaForMaskedLM
from illada.training import setup
from illada.training.recipe import LORA_TARGETS, LoraRecipe
from illada.training.trainer import train
from illada.training.validation import validation_bound
from illada.weights import adapters
from illada.weights.adapters import CONFIG, WEIGHTS, adapter_base, attach
from illada.weights.runs import checkpoints, model_folder, read_metrics

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def bases(build_model, tiny_tokenizer, tmp_path_factory):
    """Model folders to start from: tied and untied, fp32 and bf16."""
    folder = tmp_path_factory.mktemp("bases")
    ids = {f"{name}_token_id": getattr(tiny_tokenizer, f"{name}_token_id") for name in ("mask", "bos", "eos", "pad")}
    for name, tie in (("tied", True), ("untied", False)):
        model = build_model(tie, 3, vocab_size=len(tiny_tokenizer), initializer_range=0.1, **ids)
        model.save_pretrained(folder / name)
        model.bfloat16().save_pretrained(folder / f"{name}-bf16")
    for path in folder.iterdir():
        tiny_tokenizer.save_pretrained(path)
    return folder


@pytest.fixture
def lora(make_recipe, bases):
    """A recipe of 8 steps with an adapter of rank 4; keywords change the training settings."""

    def make(name="run", base="tied", train="chat", section=None, **training):
        settings = {"steps": 8, "learning_rate": 2e-2, "decay_steps": 2, **training}
        recipe = make_recipe(name, train, start=bases / base, **settings)
        recipe.lora = LoraRecipe(**{"rank": 4, **(section or {})})
        return recipe

    return make


@pytest.fixture
def trained(monkeypatch):
    """The model at the end of every run, as the trainer held it."""
    models, distribute = [], setup.distribute

    def look(model, *rest):
        models.append(model)
        return distribute(model, *rest)

    monkeypatch.setattr(setup, "distribute", look)
    return models


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 43).view(2, 20)).logits


def fresh(folder, dtype=torch.float32) -> IlladaForMaskedLM:
    return AutoModelForMaskedLM.from_pretrained(folder, dtype=dtype).eval()


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(("base", "rule"), [("tied", "illada"), ("untied", "llada")])
def test_the_loss_falls_and_only_the_adapter_changes(
    lora, make_recipe, make_data, tiny_tokenizer, bases, trained, tmp_path, base, rule
):
    begun = train(make_recipe("base", start=bases / base, steps=40, learning_rate=1e-2)).model  # knows words
    answer = [*tiny_tokenizer.encode(" three one three one"), 2]
    make_data(tmp_path / "answers", [([0, 9, *answer], 2)] * 80, tiny_tokenizer, kind="chat")
    recipe = lora(base=begun, rule=rule, steps=60, decay_steps=6)
    recipe.data.train = recipe.data.validation = str(tmp_path / "answers")
    result = train(recipe)
    run = Path(recipe.output)
    assert (result.model, result.interrupted) == (run / "adapter", None)
    assert not (run / "model").exists()
    records = read_metrics(run / "metrics.jsonl")
    first, last = (sum(r["loss"] for r in part) / 10 for part in (records[:10], records[-10:]))
    assert last < 0.8 * first
    before = fresh(begun).state_dict()
    after = {name.replace(".base_layer", ""): tensor for name, tensor in trained[1].state_dict().items()}
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(".lora_" in name for name in after.keys() - before.keys())
    # Neither checkpoint nor optimiser holds anything else.
    newest = checkpoints(run)[-1]
    names = list(held(newest))
    assert len(names) == 2 * 7 * 2 * (1 + 2)  # layers, targets, A and B, the weight and its two moments
    assert all(".lora_" in name for name in names)
    merged = attach(fresh(begun), result.model, merge=True)
    bound = validation_bound(merged, Shards.open(recipe.data.validation), 32, 256, 2)
    assert records[-1]["validation_loss"] == pytest.approx(bound, rel=1e-5)


@pytest.mark.parametrize("base", ["tied", "untied"])
def test_merged_in_place_and_in_plain_peft_are_the_same_model(lora, bases, trained, base):
    recipe = lora(base=base)
    adapter = train(recipe).model
    assert adapter_base(adapter) == str(bases / base)
    plain = logits(fresh(bases / base))
    placed = attach(fresh(bases / base), adapter, merge=False)
    merged = attach(fresh(bases / base), adapter, merge=True)
    assert torch.equal(logits(placed), logits(trained[0].eval()))
    assert (logits(placed) - plain).abs().max() > 0.1  # the adapter does something
    # W x + s B (A x) against (W + s B A) x: equal but for the rounding of fp32 (2^-24 of logits near 10, a few layers).
    torch.testing.assert_close(logits(merged), logits(placed), rtol=0, atol=2e-4)
    assert type(merged) is IlladaForMaskedLM
    assert not any("peft" in type(module).__module__ for module in merged.modules())
    assert merged.state_dict().keys() == fresh(bases / base).state_dict().keys()
    assert all(p.requires_grad for p in merged.parameters())
    assert not hasattr(merged, "peft_config")
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == (base == "tied")
    theirs = peft.PeftModel.from_pretrained(fresh(bases / base), adapter)
    assert torch.equal(logits(theirs), logits(placed))
    auto = peft.AutoPeftModel.from_pretrained(adapter, import_allowlist=["illada.model.transformer"])
    assert torch.equal(logits(auto), logits(placed))
    assert not any(p.requires_grad for p in placed.parameters())
    with pytest.raises(IlladaError, match="already has an adapter"):
        attach(placed, adapter, merge=False)


def test_merging_into_bf16_rounds_once(lora, bases):
    adapter = train(lora()).model
    merged = attach(fresh(bases / "tied", torch.bfloat16), adapter, merge=True).state_dict()
    tensors = load_file(adapter / WEIGHTS)
    for name, before in fresh(bases / "tied", torch.bfloat16).state_dict().items():
        if f"base_model.model.{name.replace('weight', 'lora_A.weight')}" not in tensors:
            assert torch.equal(merged[name], before)
            continue
        a, b = (tensors[f"base_model.model.{name.replace('weight', f'lora_{x}.weight')}"] for x in "AB")
        assert torch.equal(merged[name], (before.float() + b @ a * 2).bfloat16()), name


@pytest.mark.slow
@pytest.mark.parametrize("section", [{}, {"dropout": 0.2}])
def test_a_killed_run_ends_in_the_same_adapter(lora, section):
    settings = {"section": section, "checkpoint_every": 3}
    whole, killed = lora("whole", **settings), lora("killed", **settings)
    for recipe in (whole, killed):
        recipe.data.validation = recipe.data.train.replace("chat", "held_out")
        recipe.training.validate_every = 2
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    train(whole)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    train_killed_at(killed, 2, 4, 6)
    a, b = Path(whole.output), Path(killed.output)
    assert files(a / "adapter") == files(b / "adapter")
    assert same(held(checkpoints(a)[-1]), held(checkpoints(b)[-1]))
    for one, other in zip(*(read_metrics(run / "metrics.jsonl") for run in (a, b)), strict=True):
        assert {**one, **MACHINE} == {**other, **MACHINE}


@pytest.mark.slow
def test_recomputing_changes_nothing_and_dropout_does(lora):
    ends = []
    for name, dropout, saving in (("plain", 0.2, "none"), ("saving", 0.2, "full"), ("without", 0.0, "none")):
        recipe = lora(name, section={"dropout": dropout}, steps=4)
        recipe.parallel.recompute = saving
        ends.append(load_file(train(recipe).model / WEIGHTS))
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


def test_dropout_is_drawn_anew_for_every_forward_pass(lora, monkeypatch):
    keys, seeded = [], rng.seeded

    def note(device, *key):
        keys.append(key)
        return seeded(device, *key)

    monkeypatch.setattr(rng, "seeded", note)
    train(lora(section={"dropout": 0.1}, steps=3))
    assert len(set(keys)) == len(keys) == 3 * 2  # steps, micro-batches
    keys.clear()
    train(lora("without", steps=3))
    assert keys == []


def test_an_interrupted_run_holds_usable_adapters(lora, bases):
    recipe = lora(checkpoint_every=3)
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(Killed):
            train(recipe)
    newest = model_folder(recipe.output)
    assert newest == checkpoints(Path(recipe.output))[-1] / "adapter"
    assert (newest / "tokenizer.json").is_file()
    assert adapter_base(newest) == str(bases / "tied")
    merged = logits(attach(fresh(bases / "tied"), newest, merge=True))
    assert (merged - logits(fresh(bases / "tied"))).abs().max() > 0.01


@pytest.mark.parametrize(
    ("base", "dtype", "frozen"),
    [("tied-bf16", "bf16", torch.bfloat16), ("tied", "bf16", torch.float32), ("tied-bf16", "fp32", torch.float32)],
)
def test_the_base_keeps_its_type(lora, trained, base, dtype, frozen):
    recipe = lora(base=base, dtype=dtype, steps=2)
    recipe.parallel.recompute = "full"
    train(recipe)
    found = {(p.dtype, p.requires_grad) for p in trained[0].parameters()}
    assert found == {(frozen, False), (torch.float32, True)}


def test_rank_alpha_and_targets_reach_the_adapter(lora, bases):
    section = {"rank": 3, "alpha": 5.0, "targets": ["q_proj", "down_proj"]}
    adapter = train(lora(section=section, steps=2)).model
    written = json.loads((adapter / CONFIG).read_text())
    assert (written["r"], written["lora_alpha"], written["target_modules"]) == (3, 5.0, ["down_proj", "q_proj"])
    tensors = load_file(adapter / WEIGHTS)
    assert len(tensors) == 2 * 2 * 2
    assert all(min(t.shape) == 3 and t.dtype == torch.float32 for t in tensors.values())
    name = "model.layers.1.mlp.down_proj"
    a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    merged, before = attach(fresh(bases / "tied"), adapter, merge=True), fresh(bases / "tied")
    change = merged.get_submodule(name).weight - before.get_submodule(name).weight
    torch.testing.assert_close(change.detach(), b @ a * 5 / 3, rtol=0, atol=1e-6)


def test_all_linear_layers_of_a_block_are_targets(tied):
    linear = {n.split(".")[-1] for n, m in tied.model.layers[0].named_modules() if isinstance(m, torch.nn.Linear)}
    assert linear == set(LORA_TARGETS)


def test_a_run_without_an_adapter_is_written_as_before(make_recipe):
    recipe = make_recipe(steps=1)
    train(recipe)
    written = yaml.safe_load((Path(recipe.output) / "recipe.yaml").read_text())
    assert list(written) == ["model", "data", "training", "parallel", "data_fingerprint"]
    off = make_recipe(steps=1)
    off.lora = LoraRecipe(rank=0, alpha=3.0)  # switched off on the command line
    train(off)


@pytest.mark.slow
def test_the_command_trains_an_adapter(lora, tmp_path, capsys):
    recipe = lora(steps=2)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**asdict(recipe), "lora": {"rank": 0}}))
    words = ["sft", str(tmp_path / "recipe.yaml"), "--lora.rank", "2", "--lora.targets", "q_proj", "v_proj"]
    cli.main([*words, "--lora.dropout", "0.1"])
    said = capsys.readouterr()
    first, *commands = said.out.splitlines()
    assert first == f"adapter written to {recipe.output}/adapter"
    assert commands == [f"next: illada chat --model {recipe.output}/adapter", f"      illada report {recipe.output}"]
    assert "an adapter of 448 parameters beside" in said.err  # 2 layers x rank 2 x (32 + 32 for q, 32 + 16 for v)
    assert "adapters want ten times as much" not in said.err
    assert adapter_base(Path(recipe.output) / "adapter") == recipe.model.start
    cli.main([*words, "--output", f"{recipe.output}-low", "--training.learning_rate", "5e-6"])
    assert "learning_rate 5e-06 suits all weights: adapters want ten times as much" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "--lora.dropout", "0.2"])
    assert end.value.code == 2
    assert "lora.dropout differ" in capsys.readouterr().err


def test_dropout_that_a_checkpoint_asks_for_is_named(lora, bases, tmp_path, capsys):
    shutil.copytree(bases / "tied", tmp_path / "start")
    values = json.loads((tmp_path / "start" / "config.json").read_text())
    values |= {"attention_dropout": 0.1, "resid_pdrop": 0.0}
    (tmp_path / "start" / "config.json").write_text(json.dumps(values))
    for name, start in (("asks", tmp_path / "start"), ("silent", bases / "tied")):
        recipe = lora(name, steps=1)
        recipe.model.start = str(start)
        train(recipe)
        said = " ".join(capsys.readouterr().err.split())
        assert ("attention_dropout 0.1: trained without" in said) == (name == "asks")
        assert "resid_pdrop" not in said


# What goes wrong


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"rank": -1}, "lora.rank is -1: it must be at least 1"),
        ({"rank": None, "alpha": 8.0}, "lora.rank is missing"),
        ({"alpha": 0.0}, "lora.alpha is 0: it must be above 0"),
        ({"dropout": 1.0}, "lora.dropout is 1: it must be at least 0 and below 1"),
        ({"targets": ["q_proj", "w1"]}, "lora.targets has no 'w1': choose from q_proj, k_proj"),
        ({"targets": []}, "lora.targets is empty: choose from q_proj"),
    ],
)
def test_a_bad_section_is_one_clear_line(lora, section, words):
    refused(lora(section=section), words)


def test_a_new_network_gets_no_adapter(make_recipe):
    recipe = make_recipe()
    recipe.lora = LoraRecipe(rank=4)
    refused(recipe, r"lora\.rank needs model\.start")


def test_an_adapter_is_no_start(lora, adapter, bases, tmp_path):
    shutil.copytree(bases / "tied", tmp_path / "start")
    shutil.copy(adapter / CONFIG, tmp_path / "start")
    recipe = lora()
    recipe.model.start = str(tmp_path / "start")
    refused(recipe, "start is an adapter: merge it with `illada export")


def test_without_peft_there_is_one_clear_line(lora, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(lora(), r"pip install 'illada\[tune\]'")


def test_a_run_belongs_to_its_base(lora, bases, tmp_path):
    shutil.copytree(bases / "tied", tmp_path / "start")
    recipe = lora(steps=3, checkpoint_every=2)
    recipe.model.start = str(tmp_path / "start")
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(Killed):
            train(recipe)
    weights = load_file(tmp_path / "start" / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, tmp_path / "start" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IlladaError, match="base_fingerprint differ"):
        train(recipe)


@pytest.fixture(scope="module")
def adapter(bases, build_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = fresh(bases / "tied")
    adapters.add_adapter(model, 4, 8, 0.0, LORA_TARGETS, str(bases / "tied"), 0)
    adapters.save_adapter(model, folder)
    return folder


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("not JSON", "cannot be read"),
        ("a list", "cannot be read"),
        ("no base", "does not name a base model"),
        ("other kind", "adapter of type 'LOHA': illada reads LORA"),
        ("pissa", "begun as 'pissa', which changes the base weights"),
        ("no weights", "lacks adapter_model.safetensors"),
        ("cut weights", "is damaged"),
        ("lost tensor", "trained on .*tied: base_model.*lora_B.weight is missing$"),
        ("odd tensor", "model.lm_head.weight has no place$"),
        ("other targets", "does not fit the model: Target modules"),
        ("other width", r"lora_A.weight is \[4, 32\], not \[4, 64\].* and \d+ more"),
        ("fewer layers", "layers.1.*has no place.* and 11 more"),
    ],
)
def test_a_damaged_or_foreign_adapter_is_one_clear_line(adapter, bases, build_model, tmp_path, how, words):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    values, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    changes = {
        "no base": {"base_model_name_or_path": None},
        "other kind": {"peft_type": "LOHA"},
        "pissa": {"init_lora_weights": "pissa"},
        "other targets": {"target_modules": ["c_attn"]},
    }
    (folder / CONFIG).write_text(json.dumps({**values, **changes.get(how, {})}))
    if how in ("not JSON", "a list"):
        (folder / CONFIG).write_text("{" if how == "not JSON" else "[]")
    elif how == "no weights":
        (folder / WEIGHTS).unlink()
    elif how == "cut weights":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10])
    elif how == "lost tensor":
        del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
        save_file(tensors, folder / WEIGHTS)
    elif how == "odd tensor":
        save_file({**tensors, "base_model.model.lm_head.weight": torch.zeros(2)}, folder / WEIGHTS)
    shape = {"other width": {"hidden_size": 64}, "fewer layers": {"num_hidden_layers": 1}}.get(how, {})

    def load_base(name):
        assert name == str(bases / "tied")
        return build_model(True, 0, vocab_size=300, **shape)

    with pytest.raises(IlladaError, match=words) as caught:
        attach(load_base(adapter_base(folder)), folder, merge=True)
    assert "\n" not in str(caught.value)
