import random
from pathlib import Path

import pytest

from illada.training.recipe import DataRecipe, ModelRecipe, Recipe, TrainingRecipe

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
WORDS = ("one", "two", "three", "four", "five", "six", "seven")


@pytest.fixture(scope="session")
def data(make_data, tiny_tokenizer, tmp_path_factory) -> Path:
    """Folders train, held_out, chat and other (another tokenizer): counting words, which a tiny model can learn."""
    from illada.preparation.train_tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("data")
    picks = random.Random(0)

    def documents(count, prompt):
        made = []
        for _ in range(count):
            first = picks.randrange(7)
            words = [WORDS[(first + n) % 7] for n in range(picks.randint(3, 8))]
            ids = [[0, *tiny_tokenizer.encode(words[0])], [*tiny_tokenizer.encode(" " + " ".join(words[1:])), 2]]
            made.append((ids[0] + ids[1], len(ids[0]) if prompt else 0))
        return made

    make_data(folder / "train", documents(150, False), tiny_tokenizer)
    make_data(folder / "held_out", documents(20, False), tiny_tokenizer)
    make_data(folder / "chat", documents(60, True), tiny_tokenizer, kind="chat")
    make_data(folder / "other", [[8, 9, 10] * 40], train_tokenizer(["another text"], 270))
    return folder


@pytest.fixture
def make_recipe(data, tmp_path):
    """A recipe of 30 steps; keywords change the training settings."""

    def make(name="run", train="train", validation=None, start=None, window=32, **training):
        settings = {
            "steps": 30,
            "samples_per_step": 4,
            "samples_per_batch": 2,
            "learning_rate": 3e-3,
            "final_learning_rate": 1e-4,
            "warmup_steps": 3,
            "decay_steps": 6,
            "dtype": "fp32",
            "device": "cpu",
            "checkpoint_every": 7,
            "validate_every": 10,
        }
        return Recipe(
            output=str(tmp_path / name),
            model=ModelRecipe(start=str(start)) if start else ModelRecipe(preset="1m", **SHAPE),
            data=DataRecipe(
                train=str(data / train),
                validation=None if validation is None else str(data / validation),
                window=window,
            ),
            training=TrainingRecipe(**{**settings, **training}),
        )

    return make
