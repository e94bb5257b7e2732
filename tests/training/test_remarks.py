"""A run that will learn next to nothing says so in one line each, before its first step."""

import pytest
import torch

from illada.data.batches import Batches
from illada.data.shards import Shards
from illada.model.config import IlladaConfig
from illada.training.optional.remarks import remarks_on
from illada.training.setup import build_model
from illada.training.trainer import train


@pytest.fixture
def remarks(make_recipe, data):
    """Return what is said of a recipe, as it is or with other numbers of the model."""

    def say(device="cpu", shift=False, rule="illada", wide=None, window=32, train="train", **training):
        recipe = make_recipe(window=window, train=train, **training)
        recipe.data.shift_windows = shift
        shards = Shards.open(data / train)
        batches = Batches(
            shards, window, recipe.training.samples_per_step, 0, rule=rule, eos_token_id=2, shift_windows=shift
        )
        config = IlladaConfig.preset("1m", **recipe.model.changes(), vocab_size=shards.vocab_size)
        model = build_model(recipe, None, config)
        if wide:
            model.config.intermediate_size = wide
        return remarks_on(recipe, None, model, batches, torch.device(device))

    return say


def test_a_sound_run_says_nothing(remarks):
    assert remarks() == []
    assert remarks(steps=1, warmup_steps=1, decay_steps=0) == []


def test_a_warm_up_longer_than_the_run(remarks):
    """The journey that was reported: 180 chats are 18 steps, the recipe warms up for 100."""
    (line,) = remarks(steps=18, warmup_steps=100, decay_steps=1)
    assert line.startswith("warning: the learning rate warms up for 100 of 18 steps, and gets no higher than")
    assert "5.1e-04 of 3.0e-03" in line
    assert "--training.warmup_steps 1," in line
    (line,) = remarks(steps=18, warmup_steps=9, decay_steps=1)
    assert "9 of 18 steps: the model" in line  # it gets there, late


def test_a_decay_that_begins_before_the_warm_up_ends(remarks):
    """The recipe's 700 steps of decay in a run of 50: it begins at step 0, at a tenth of the rate."""
    (line,) = remarks(steps=50, warmup_steps=10, decay_steps=700)
    assert "decays from step 0 on, and gets no higher than 3.9e-04 of 3.0e-03" in line
    assert "--training.warmup_steps 5 --training.decay_steps 10" in line
    assert remarks(steps=50, warmup_steps=5, decay_steps=10) == []


def test_a_step_larger_than_the_data(remarks, data):
    windows = Shards.open(data / "train").tokens // 32
    (line,) = remarks(samples_per_step=10 * windows)
    assert f"takes {10 * windows:,} windows, the data holds {windows:,} windows of 32 tokens" in line
    assert "sees all of it 10.0 times; add --training.samples_per_step" in line
    (line,) = remarks(train="chat", rule="llada", samples_per_step=90)
    assert "the data holds 60 conversations: every step sees all of it 1.5 times" in line


def test_windows_that_leave_much_out(remarks, data):
    tokens = Shards.open(data / "train").tokens
    (line,) = remarks(window=tokens * 2 // 3, samples_per_step=1)
    assert "leave out 33% of the data" in line
    assert remarks(window=tokens * 2 // 3, samples_per_step=1, shift=True) == []


def test_steps_of_hours_on_a_cpu(remarks):
    lines = remarks(samples_per_step=1280, wide=10_000_000)
    assert any("a step is 40,960 tokens, on a CPU" in line and "tiny-cpu-pretrain" in line for line in lines)
    assert not any("on a CPU" in line for line in remarks(samples_per_step=1280, wide=10_000_000, device="cuda"))


def test_the_run_says_it_and_goes_on(make_recipe, capfd):
    train(make_recipe(steps=2, warmup_steps=100, decay_steps=1), title="sft")
    said = capfd.readouterr().err
    assert "sft: warning: the learning rate warms up for 100 of 2 steps" in said
    assert said.count("warning: ") == 1
