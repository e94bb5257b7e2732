"""Runs of post-training for the tests: from a recipe to weights and metrics, whole or killed on the way."""

import pytest
from safetensors.torch import load_file

from illada.training import trainer
from illada.training.recipe import TrainingRecipe
from illada.weights.runs import read_metrics


def six_steps(**changes):
    """Return settings of a run of six steps on a model's own answers, with three checkpoints and two validations."""
    settings = {"steps": 6, "warmup_steps": 1, "learning_rate": 3e-3, "final_learning_rate": 1e-3, "decay_steps": 0}
    settings |= {"dtype": "fp32", "device": "cpu", "checkpoint_every": 2, "validate_every": 3}
    return TrainingRecipe(**{**settings, **changes})


def run(recipe, title, kind):
    """Carry a recipe out; returns the weights by name, and the records of its metrics."""
    result = trainer.train(recipe, title, kind)
    return load_file(next(result.model.glob("*.safetensors"))), read_metrics(result.model.parent / "metrics.jsonl")


def run_killed(recipe, title, kind, stops):
    """Carry a recipe out like `run`, but kill it after each of these steps and begin it again."""
    stops = [*stops]

    class Stops(kind):
        def write_log(self, record):
            super().write_log(record)
            if self.state.step == stops[0]:
                raise KeyboardInterrupt

    while stops:
        with pytest.raises(KeyboardInterrupt):
            trainer.train(recipe, title, Stops)
        stops.pop(0)
    return run(recipe, title, kind)
