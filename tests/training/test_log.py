"""What a run says of itself: numbers against their definitions, trackers, the picture."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from illada import cli
from illada.data.batches import Batches
from illada.data.collate import noisy_batches
from illada.data.shards import Shards
from illada.errors import IlladaError
from illada.training import log, trainer
from illada.training.optional import pace, plots
from illada.training.recipe import LogRecipe
from illada.training.trainer import train
from illada.weights.load import load_model
from illada.weights.runs import read_metrics


@pytest.mark.slow
def test_the_loss_by_mask_ratio_is_the_mean_cross_entropy(make_recipe, data):
    """The first step of a run against plain logits of the weights it began with."""
    base = train(make_recipe("base", steps=2)).model
    recipe = make_recipe(start=base, steps=1, samples_per_step=16, samples_per_batch=5)
    train(recipe)
    record = read_metrics(Path(recipe.output) / "metrics.jsonl")[0]
    shards = Shards.open(data / "train")
    plan = Batches(shards, 32, 16, 0).plan(0)
    (batch,) = noisy_batches(plan, 16, shards, 0, 0)
    model, _ = load_model(str(base))
    noisy = batch.clean_T.masked_fill(batch.masked_T, model.config.mask_token_id)
    with torch.no_grad():
        logits = model.lm_head(model.model.packed(noisy, batch.packing)).double()
    entropies = torch.nn.functional.cross_entropy(logits, batch.clean_T, reduction="none")
    assert record["loss"] == pytest.approx(float((entropies * batch.masked_T * batch.weight_T).sum()), rel=1e-5)
    assert record["bits_per_byte"] == pytest.approx(record["loss"] * shards.tokens / shards.bytes / math.log(2))
    for part, found in enumerate(record["loss_by_mask_ratio"]):
        inside = batch.masked_T & (batch.probability_T >= part / 5) & (batch.probability_T < (part + 1) / 5)
        assert inside.any()
        assert found == pytest.approx(float(entropies[inside].mean()), rel=1e-5)
    assert record["memory_gb"] > 0.05
    assert "mfu" not in record  # the peak of this processor is in no data sheet


def test_mfu_is_flops_over_the_peak(make_recipe, monkeypatch):
    monkeypatch.setattr(trainer, "peak_flops", lambda _: 1e9)
    monkeypatch.setattr(trainer, "flops_per_token", lambda config, seen, adapter: 1e6 * (1 <= seen <= 32))
    recipe = make_recipe(steps=3)
    train(recipe)
    for record in read_metrics(Path(recipe.output) / "metrics.jsonl"):
        assert record["mfu"] == pytest.approx(record["tokens_per_second"] / 1e3, abs=2e-3)


def test_the_line_of_a_step(monkeypatch):
    """The speed is the present one, the loss a mean, the time left that of the steps so far."""
    now = [100.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    run = pace.Pace(step=10, tokens=5_000)
    speeds = []
    for step, seconds in enumerate([60.0, *[1.0] * 20], start=11):  # the first step compiles
        now[0] += seconds
        speeds.append(run.take(5_000 + 136 * (step - 10)))
        record = {"loss": float(step), "learning_rate": 1e-3, "tokens_per_second": round(speeds[-1])}
        line = run.line(step, 111, record)
    assert speeds[0] == pytest.approx(136 / 60)
    assert speeds[-1] == pytest.approx(136)
    assert line == "loss 21.500  lr 1.0e-03  136 tokens/s  0:01:20 elapsed, 0:05:05 left"
    trouble = record | {"loss": float("nan"), "trouble": "loss nan", "tokens_per_second": 12345}
    assert run.line(31, 111, trouble).startswith("loss 21.500  lr 1.0e-03  12,345 tokens/s")


def test_without_a_terminal_there_is_a_line_now_and_then(make_recipe, monkeypatch, capfd):
    monkeypatch.setattr(log, "PLAIN_EVERY", 0.0)
    train(make_recipe(steps=3, warmup_steps=0, decay_steps=0), title="pretrain")
    lines = capfd.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert "tokens/s" in lines[-1]
    assert lines[-1].endswith("0:00:00 left")


def test_tensorboard_gets_every_number(make_recipe):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = make_recipe(validation="held_out", steps=4, validate_every=2)
    recipe.log = LogRecipe(tensorboard=True)
    train(recipe)
    events = EventAccumulator(str(Path(recipe.output) / "tensorboard")).Reload()
    records = read_metrics(Path(recipe.output) / "metrics.jsonl")
    for name in ("loss", "gradient_norm", "validation_loss"):
        wanted = {r["step"]: r[name] for r in records if name in r}
        assert {e.step: e.value for e in events.Scalars(name)} == pytest.approx(wanted)
    assert {f"loss_by_mask_ratio/{part}" for part in range(5)} <= set(events.Tags()["scalars"])


@pytest.mark.slow
def test_weights_and_biases_gets_every_number_and_one_run(make_recipe, monkeypatch):
    begun, logged = [], []
    session = SimpleNamespace(log=lambda values, step: logged.append((step, values["loss"])), finish=lambda: None)
    fake = SimpleNamespace(init=lambda **words: begun.append(words) or session)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    recipe = make_recipe(steps=3)
    recipe.log = LogRecipe(wandb="project")
    train(recipe)
    train(recipe)
    assert logged == [(r["step"], r["loss"]) for r in read_metrics(Path(recipe.output) / "metrics.jsonl")]
    assert begun[0] == begun[1]
    assert (begun[0]["project"], begun[0]["resume"]) == ("project", "allow")


@pytest.mark.parametrize("trackers", [{"wandb": "project"}, {"tensorboard": True}])
def test_a_missing_tracker_is_one_clear_line(make_recipe, monkeypatch, trackers):
    for module in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    recipe = make_recipe(steps=1)
    recipe.log = LogRecipe(**trackers)
    with pytest.raises(IlladaError, match=r"pip install 'illada\[track\]'") as caught:
        train(recipe)
    assert "\n" not in str(caught.value)


def test_a_smooth_curve_is_the_mean_of_neighbours():
    values = np.random.default_rng(0).normal(size=300)
    got = plots.smoothed(values)
    for at in (0, 1, 2, 3, 150, 298, 299):
        assert got[at] == pytest.approx(values[max(at - 7, 0) : at + 8].mean())
    assert plots.smoothed(np.array([4.0])).tolist() == [4.0]


@pytest.mark.slow
def test_the_report_draws_several_runs(make_recipe, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    recipes = [make_recipe(name, validation="held_out", steps=4, validate_every=2) for name in ("first", "second")]
    for recipe in recipes:
        train(recipe)
    svg = str(tmp_path / "x.svg")
    cli.main(["report", *(recipe.output for recipe in recipes), "--output", svg])
    cli.main(["report", recipes[0].output, "--output", str(tmp_path / "one.svg")])
    both, one = ((tmp_path / name).read_text() for name in ("x.svg", "one.svg"))
    for label in ("first, training", "second, held out", "bits per byte (upper bound)", "learning rate", "step"):
        assert f"<!-- {label} -->" in both, label
    for label in ("training", "held out", "80 to 100 % masked", "cross-entropy of masked tokens, nats"):
        assert f"<!-- {label} -->" in one, label
    with pytest.raises(SystemExit):
        cli.main(["report", *(recipe.output for recipe in recipes), "--windows", "2"])
    assert "--windows measures one run" in capsys.readouterr().err


@pytest.mark.slow
def test_the_report_draws_a_run(make_recipe, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    recipe = make_recipe(validation="held_out", steps=4, validate_every=2)
    train(recipe)
    cli.main(["report", recipe.output])
    picture = Path(recipe.output) / "report.png"
    assert capsys.readouterr().out == f"written to {picture}\n"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    cli.main(["report", recipe.output, "--output", str(tmp_path / "x.svg")])
    drawn = (tmp_path / "x.svg").read_text()
    assert drawn.startswith("<?xml")
    with pytest.raises(SystemExit) as end:
        cli.main(["report", str(tmp_path)])
    assert end.value.code == 2
    assert "holds no metrics" in capsys.readouterr().err
