"""Preference optimisation: the plain loss, the same run however it is cut or killed, and one line for bad input."""

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tuning_runs
from illada.data.shards import Shards
from illada.errors import IlladaError
from illada.post_training.bounds import noise_seed
from illada.post_training.options import DpoRecipe, DpoSection
from illada.post_training.preferences import REFERENCE, PreferenceTrainer, preference
from illada.training import trainer
from illada.training.recipe import ModelRecipe
from illada.weights.load import load_model
from illada.weights.runs import read_metrics
from process_groups import run_groups
from reference import reference_bound, reference_preference

NAMES = ("loss", "accuracy", "margin", "chosen_gap", "rejected_gap", "gradient_norm", "validation_loss")


def run(recipe):
    return tuning_runs.run(recipe, "dpo", PreferenceTrainer)


def close(one, other, names=NAMES, rel=1e-4):
    for name in names:
        a, b = ([record[name] for record in records if name in record] for records in (one, other))
        assert a == pytest.approx(b, rel=rel, abs=1e-5), name


@pytest.mark.parametrize("anchor", [0.0, 0.8])
@pytest.mark.parametrize("normalise", [False, True])
def test_the_loss_is_the_plain_one(normalise, anchor):
    torch.manual_seed(0)
    bounds, reference, lengths = torch.randn(6, requires_grad=True), torch.randn(6), torch.tensor([2.0, 3, 4, 5, 6, 7])
    found = preference(bounds, reference, lengths, torch.full((3,), 1 / 3), 0.7, normalise, anchor)
    values = (bounds.tolist(), reference.tolist(), lengths.tolist())
    assert found.loss.item() == pytest.approx(reference_preference(*values, 0.7, normalise, anchor), rel=1e-5)


@pytest.mark.parametrize("complementary", [False, True])
def test_the_first_step_is_the_plain_one(make_dpo, start, pairs, complementary):
    """The model is still the start: no margin, the loss log 2. The kept bounds are those of the start."""
    recipe = make_dpo(steps=2, dpo={"complementary": complementary})
    _, records = run(recipe)
    assert records[0]["loss"] == pytest.approx(math.log(2))
    assert records[0]["margin"] == pytest.approx(0, abs=1e-6)
    model, _ = load_model(str(start), "fp32", "cpu")
    shards = Shards.open(pairs / "train")
    kept = load_file(f"{recipe.output}/{REFERENCE}")["train"]
    for document in (0, 7, 33):
        first, end, prompt = shards.document_span(document)
        ids = shards.read(first, end - first).tolist()
        seed = noise_seed(0, document // 2, 0)
        plain = reference_bound(model, ids[:prompt], ids[prompt:], 3, seed, complementary)
        assert kept[document].item() == pytest.approx(plain, rel=1e-4)


@pytest.mark.slow
def test_it_learns_what_is_preferred(make_dpo):
    _, records = run(make_dpo(steps=40))
    assert records[-1]["validation_accuracy"] >= 0.75
    assert records[-1]["chosen_gap"] > records[-1]["rejected_gap"]


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["kept", "live"])
@pytest.mark.parametrize("rank", [None, 4])
def test_micro_batches_and_restarts_change_nothing(make_dpo, monkeypatch, reference, rank):
    changes = {"rank": rank, "dpo": {"reference": reference}, "learning_rate": 1e-3}
    weights, records = run(make_dpo("whole", **changes))
    _, in_parts = run(make_dpo("parts", **changes, samples_per_batch=1))
    close(records, in_parts)

    recipe = make_dpo("killed", **changes)
    again, continued = tuning_runs.run_killed(recipe, "dpo", PreferenceTrainer, [8])
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    close(records, continued, rel=0)


@pytest.mark.slow
def test_a_live_reference_is_the_kept_one_in_the_first_epoch(make_dpo):
    settings = {"steps": 5, "learning_rate": 1e-3}
    _, kept = run(make_dpo("kept", **settings))
    _, live = run(make_dpo("live", **settings, dpo={"reference": "live"}))
    close(kept, live)


@pytest.mark.slow
def test_any_number_of_processes_is_the_same_run(make_dpo, tmp_path):
    """Also an odd number of pairs, which leaves a process idle, and adapters."""
    changes = {"steps": 4, "validate_every": 2, "learning_rate": 1e-3, "samples_per_step": 5}
    runs = {
        f"{name} on {count}": (count, make_dpo(f"{name} on {count}", samples_per_batch=4 // count, **changes, **more))
        for name, more in (("kept", {}), ("live", {"dpo": {"reference": "live"}}), ("adapter", {"rank": 4}))
        for count in (1, 2)
    }
    ends = run_groups(tmp_path, runs)
    assert all(set(end["codes"]) == {0} for end in ends.values()), ends
    for name in ("kept", "live", "adapter"):
        close(*(read_metrics(tmp_path / f"{name} on {count}" / "metrics.jsonl") for count in (1, 2)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: setattr(r.model, "start", None), "model.start is missing"),
        (lambda r: setattr(r, "model", ModelRecipe(preset="1m")), "model.start is missing"),
        (lambda r: setattr(r.training, "rule", "llada"), "training.rule is for pretrain and sft"),
        (lambda r: setattr(r.training, "complementary", True), "training.complementary is for pretrain and sft"),
        (lambda r: setattr(r.training, "dropout", 0.1), "training.dropout is for"),
        (lambda r: setattr(r.dpo, "beta", 0.0), "dpo.beta is 0"),
        (lambda r: setattr(r.dpo, "beta", math.nan), "dpo.beta is nan"),
        (lambda r: setattr(r.dpo, "samples", 0), "dpo.samples is 0"),
        (lambda r: setattr(r.data, "window", 6), "longer than data.window 6"),
        (lambda r: setattr(r.data, "window", 4096), "longer than the model's context"),
        (lambda r: setattr(r.data, "train", str(Path(r.data.train).parent / "longer")), "longer than data.window"),
        (
            lambda r: setattr(r.data, "validation", str(Path(r.data.train).parent / "longer")),
            "longer than data.window",
        ),
    ],
)
def test_bad_recipes_are_one_line(make_dpo, change, words):
    recipe = make_dpo()
    change(recipe)
    with pytest.raises(IlladaError, match=words):
        trainer.train(recipe, "dpo", PreferenceTrainer)
    assert not Path(recipe.output).exists()


def test_other_data_and_a_causal_start_are_one_line(make_dpo, make_data, tiny_tokenizer, start, tmp_path):
    make_data(tmp_path / "chat", [([1, 2, 3], 1)] * 4, tiny_tokenizer, kind="chat")
    for part in ("train", "validation"):
        recipe = make_dpo()
        setattr(recipe.data, part, str(tmp_path / "chat"))
        with pytest.raises(IlladaError, match="preference"):
            trainer.train(recipe, "dpo", PreferenceTrainer)


def test_damaged_bounds_of_the_start_are_one_line(make_dpo):
    recipe = make_dpo(steps=3)
    run(recipe)
    file = f"{recipe.output}/{REFERENCE}"
    whole = load_file(file)
    for train in (whole["train"][:-1], whole["train"] / 0, torch.zeros(3)):
        save_file({**whole, "train": train}, file)
        with pytest.raises(IlladaError, match="reference"):
            trainer.train(copy.deepcopy(recipe), "dpo", PreferenceTrainer)


def test_the_recipe_says_what_each_key_is():
    documented = DpoRecipe.__doc__ + DpoSection.__doc__
    for kind in (DpoRecipe, DpoSection):
        assert all(f"{item.name}:" in documented for item in dataclasses.fields(kind))
