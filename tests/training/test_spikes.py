"""Steps that go wrong, by faults put into the loss."""

import json
import math
import threading
from pathlib import Path

import pytest
import torch
from test_trainer import held, same, steps_of, train_killed_at, weights

from illada.errors import DivergedError
from illada.training import parallel, trainer
from illada.training.optional import spikes
from illada.training.optional.spikes import data_step, remember, trouble
from illada.training.trainer import train
from illada.weights.runs import RunState, checkpoints, read_metrics


def poison(monkeypatch, factor, *moments):
    """Multiply the loss at moments: (step counted from 0, how often the run has gone back)."""
    honest, now = parallel.masked_loss, []

    def note(step, seed, returns):
        if threading.current_thread() is threading.main_thread():  # a thread makes batches of later steps
            now.append((step, len(returns)))
        return data_step(step, seed, returns)

    def poisoned(*given):
        return honest(*given) * (factor if now[-1] in moments and torch.is_grad_enabled() else 1)

    monkeypatch.setattr(trainer, "data_step", note)
    monkeypatch.setattr(parallel, "masked_loss", poisoned)


def state_of(run):
    return json.loads((checkpoints(Path(run))[-1] / "state.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("factor", [math.nan, math.inf, 1000.0])
def test_a_spike_is_left_out(make_recipe, monkeypatch, factor):
    monkeypatch.setattr(spikes, "FIRST_JUDGED", 8)
    whole = make_recipe("whole", on_spike="skip", checkpoint_every=10)
    train(whole)  # nothing is left out without a fault
    assert state_of(whole.output)["updates"] == 30
    recipe = make_recipe(on_spike="skip", checkpoint_every=10)
    with monkeypatch.context() as patch:
        poison(patch, factor, (10, 0))
        train(recipe)
    records = read_metrics(Path(recipe.output) / "metrics.jsonl")
    assert [r["step"] for r in records if "trouble" in r] == [11]
    assert steps_of(recipe.output) == list(range(1, 31))
    state = state_of(recipe.output)
    assert (state["updates"], state["skipped"], state["tokens"]) == (29, 0, 29 * 4 * 32)
    assert not same(weights(whole.output), weights(recipe.output))


def test_a_left_out_step_changes_nothing(make_recipe, monkeypatch):
    """Weights after a run whose last step is left out are those before it."""
    short = make_recipe("short", steps=9, decay_steps=0)
    train(short)
    recipe = make_recipe(steps=10, decay_steps=0, on_spike="skip")
    poison(monkeypatch, math.nan, (9, 0))
    train(recipe)
    assert same(held(checkpoints(Path(short.output))[-1]), held(checkpoints(Path(recipe.output))[-1]))


@pytest.mark.slow
def test_a_run_goes_back_and_takes_other_data(make_recipe, monkeypatch, capsys):
    monkeypatch.setattr(spikes, "REORDERED", 12)
    ends = []
    # Killed at 20, before the next checkpoint, the run meets the fault once more and decides as before.
    for name, kills in (("whole", ()), ("killed", (13, 16, 20))):
        recipe = make_recipe(name, on_spike="rollback")
        with monkeypatch.context() as patch:
            poison(patch, math.nan, (16, 0))
            train_killed_at(recipe, *kills)
        assert steps_of(recipe.output) == list(range(1, 31))
        assert state_of(recipe.output)["returns"] == [14]
        ends.append(weights(recipe.output))
    assert same(*ends)
    assert "at step 16: back to step 14 and other data than before" in capsys.readouterr().err
    plain = make_recipe("plain")
    train(plain)
    assert not same(ends[0], weights(plain.output))
    mine, theirs = (read_metrics(Path(r) / "metrics.jsonl") for r in (recipe.output, plain.output))
    assert [r["loss"] for r in mine[:14]] == [r["loss"] for r in theirs[:14]]
    assert [r["loss"] for r in mine[14:]] != [r["loss"] for r in theirs[14:]]


@pytest.mark.slow
def test_a_run_gives_up_in_the_end(make_recipe, monkeypatch):
    faults = {
        "skip": [(step, 0) for step in range(8, 30)],
        "rollback": [(9, returns) for returns in range(spikes.RETURNS_TO_ONE_STEP + 1)],
    }
    for policy, moments in faults.items():
        recipe = make_recipe(policy, on_spike=policy)
        with monkeypatch.context() as patch:
            poison(patch, math.nan, *moments)
            with pytest.raises(DivergedError, match="last good checkpoint"):
                train(recipe)
        assert not (Path(recipe.output) / "model").exists()
    poison(monkeypatch, math.nan, (3, 0))
    with pytest.raises(DivergedError, match="no good checkpoint"):
        train(make_recipe("early", on_spike="rollback"))


def test_mean_and_deviation_are_those_of_the_losses():
    state, losses = RunState(), torch.linspace(3, 2, 80, dtype=torch.float64)
    for loss in losses.tolist():
        remember(state, loss)
    assert state.updates == 80
    assert state.loss_mean == pytest.approx(float(losses.mean()))
    assert state.loss_variance == pytest.approx(float(losses.var(unbiased=False)))
    limit = float(losses.mean() + 4 * losses.std(unbiased=False))
    assert trouble(state, limit - 1e-6, 1.0, 4.0) is None
    assert "4 deviations above the mean" in trouble(state, limit + 1e-6, 1.0, 4.0)
    assert trouble(state, 1e9, 1.0, None) is None
    assert trouble(state, 1.0, math.inf, None) is not None
    assert trouble(RunState(), 1e9, 1.0, 4.0) is None


def test_other_data_is_the_same_data_in_another_order():
    plain = [data_step(step, 0, []) for step in range(3000)]
    assert plain == list(range(3000))
    once = [data_step(step, 0, [700]) for step in range(3000)]
    assert once[:700] == plain[:700]
    assert once[1700:] == plain[1700:]
    assert sorted(once) == plain
    assert sum(a == b for a, b in zip(once[700:1700], plain[700:1700], strict=True)) < 10
    twice = [data_step(step, 0, [700, 900]) for step in range(3000)]
    assert sorted(twice) == plain
    assert twice[:900] == once[:900]
    assert twice[900:1900] != once[900:1900]
    assert [data_step(step, 1, [700]) for step in range(3000)] != once
