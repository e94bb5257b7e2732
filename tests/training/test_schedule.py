import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from illada.errors import IlladaError
from illada.training.recipe import DataRecipe, ModelRecipe, Recipe, TrainingRecipe
from illada.training.schedule import Schedule, on_plateau


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_warm_up_plateau_decay(decay):
    schedule = Schedule(peak=1.0, final=0.1, warmup_steps=4, decay=decay, decay_steps=5, decay_start=10)
    rates = [schedule.learning_rate(step) for step in range(schedule.steps)]
    assert schedule.steps == 15
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4:10] == [1.0] * 6
    shape = {
        "linear": [0.8, 0.6, 0.4, 0.2, 0.0],
        "cosine": [0.5 + 0.5 * math.cos(math.pi * k / 5) for k in range(1, 6)],
    }
    assert rates[10:] == pytest.approx([0.1 + 0.9 * x for x in shape[decay]])
    assert rates[-1] == 0.1


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(0, 30), st.integers(1, 20), st.integers(0, 40), st.sampled_from(["cosine", "linear"]))
def test_a_decay_ends_the_run_at_the_final_rate_whenever_it_begins(warmup, decay_steps, start, decay):
    schedule = Schedule(3.0, 0.3, warmup, decay, decay_steps, start)
    rates = [schedule.learning_rate(step) for step in range(schedule.steps)]
    assert len(rates) == start + decay_steps
    assert rates[-1] == pytest.approx(0.3)
    assert all(0 < rate <= 3.0 for rate in rates)
    if start >= warmup:
        falling = rates[max(0, start - 1) :]
        assert falling == sorted(falling, reverse=True)


def test_a_run_without_decay_stays_at_the_peak():
    schedule = Schedule(1.0, 0.1, 0, "cosine", 0, 7)
    assert [schedule.learning_rate(step) for step in range(schedule.steps)] == [1.0] * 7


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([5.0], False),
        ([5.0, 5.0, 5.0], False),  # patience 3 needs one to compare with
        ([5.0, 5.0, 5.0, 5.0], True),
        ([5.0, 4.96, 4.96, 4.96], True),  # less than 1 % better
        ([5.0, 4.94, 5.2, 5.2], False),
        ([5.0, 4.94, 5.2, 5.2, 4.93], True),
        ([5.0, 6.0, 6.0, 4.9], False),
        ([9.0, 8.0, 7.0, 6.0, 5.0, 4.0], False),
    ],
)
def test_plateau(losses, expected):
    assert on_plateau(losses, patience=3, delta=0.01) is expected


GOOD = Recipe(
    output="runs/x",
    model=ModelRecipe(preset="1m"),
    data=DataRecipe(train="data"),
    training=TrainingRecipe(steps=10),
)


def test_a_good_recipe_passes():
    GOOD.check()


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("", {"output": ""}, "output is missing"),
        ("data", {"train": ""}, "data.train is missing"),
        ("model", {"preset": None}, "exactly one of model.preset"),
        ("model", {"start": "runs/y/model"}, "exactly one of model.preset"),
        ("model", {"start": "a", "preset": None, "hidden_size": 64}, "model.hidden_size cannot be changed"),
        ("training", {"steps": None}, "set training.steps or training.epochs"),
        ("training", {"steps": 0}, "training.steps is 0: it must be at least 1"),
        ("training", {"steps": None, "epochs": 0.0}, "training.epochs is 0: it must be above 0"),
        ("training", {"steps": None, "epochs": -1.0}, "training.epochs is -1"),
        ("training", {"steps": None, "epochs": math.nan}, "training.epochs is nan"),
        ("data", {"window": 1}, "data.window is 1: it must be at least 2"),
        ("data", {"split_probability": 1.5}, "data.split_probability is 1.5: it must be between 0 and 1"),
        ("training", {"samples_per_step": 0}, "training.samples_per_step"),
        ("training", {"samples_per_batch": 0}, "training.samples_per_batch"),
        ("training", {"learning_rate": -1.0}, "training.learning_rate"),
        ("training", {"learning_rate": math.nan}, "training.learning_rate is nan"),
        ("training", {"beta1": 1.0}, "training.beta1"),
        ("training", {"beta2": -0.1}, "training.beta2"),
        ("training", {"seed": -1}, "training.seed"),
        ("training", {"seed": 2**70}, "training.seed"),
        ("training", {"plateau_delta": -0.5}, "training.plateau_delta"),
        ("training", {"decay_steps": -1}, "training.decay_steps"),
        ("training", {"validation_samples": 0}, "training.validation_samples"),
        ("training", {"keep_checkpoints": 0}, "training.keep_checkpoints"),
        ("training", {"checkpoint_every": 0}, "training.checkpoint_every"),
        ("training", {"validate_every": 0}, "training.validate_every"),
        ("training", {"gradient_clip": -1.0}, "training.gradient_clip"),
        ("training", {"weight_decay": -1.0}, "training.weight_decay"),
        ("training", {"warmup_steps": -1}, "training.warmup_steps"),
        ("training", {"decay_when": "plateau"}, "needs data.validation"),
        ("training", {"mask_range": [0.3]}, r"training.mask_range is \[0.3\]: it must be low and high"),
        ("training", {"mask_range": [0.8, 0.3]}, "0.001 <= low <= high <= 1$"),
        ("training", {"mask_range": [0.0, 0.3]}, "training.mask_range is"),
        ("training", {"mask_range": [0.3, math.nan]}, "training.mask_range is"),
        ("training", {"mask_range": [0.3, 1.0], "complementary": True}, "0.001 <= low <= high <= 0.999$"),
        ("training", {"mask_range": [0.3, 0.8], "loss_weight": "bound"}, "loss_weight bound needs every"),
        ("training", {"samples_per_step": 5, "complementary": True}, "take an even training.samples_per_step"),
    ],
)
def test_a_bad_recipe_is_refused_by_the_name_of_its_key(part, changes, words):
    recipe = replace(GOOD, **({part: replace(getattr(GOOD, part), **changes)} if part else changes))
    with pytest.raises(IlladaError, match=words) as caught:
        recipe.check()
    assert "\n" not in str(caught.value)
