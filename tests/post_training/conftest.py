import random

import pytest

from illada.post_training.options import DpoRecipe, DpoSection
from illada.training.recipe import DataRecipe, LoraRecipe, ModelRecipe, TrainingRecipe
from illada.weights.save import write_model


@pytest.fixture(scope="session")
def start(build_model, tiny_tokenizer, tmp_path_factory):
    """The folder of a small model with the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("start")
    network = build_model(tie=True, seed=3, vocab_size=len(tiny_tokenizer), initializer_range=0.05)
    tensors = {name: tensor for name, tensor in network.state_dict().items() if name != "lm_head.weight"}
    write_model(folder, folder, network.config, tensors, network.dtype, "", tokenizer=tiny_tokenizer)
    return folder


@pytest.fixture(scope="session")
def pairs(make_data, tiny_tokenizer, tmp_path_factory):
    """Folders train, held_out and longer: the chosen answer repeats the prompt's word, the rejected one another."""
    folder, picks = tmp_path_factory.mktemp("pairs"), random.Random(0)
    words = ("one", "two", "three", "four", "five", "six", "seven")

    def documents(count, times):
        made = []
        for _ in range(count):
            word, other = picks.sample(words, 2)
            prompt = [0, *tiny_tokenizer.encode(word)]
            for answer in (word, other):
                reply = tiny_tokenizer.encode(" ".join([answer] * picks.randint(1, times)))
                made.append(([*prompt, *reply, 2], len(prompt)))
        return made

    make_data(folder / "train", documents(40, 4), tiny_tokenizer, kind="preference", per_shard=100)
    make_data(folder / "held_out", documents(12, 4), tiny_tokenizer, kind="preference")
    make_data(folder / "longer", documents(3, 60), tiny_tokenizer, kind="preference")
    return folder


@pytest.fixture
def make_dpo(start, pairs, tmp_path):
    """A recipe of 12 steps on pairs; keywords change the training settings."""

    def make(name="run", train="train", rank=None, dpo=None, **training):
        settings = {
            "steps": 12,
            "samples_per_step": 8,
            "samples_per_batch": 4,
            "learning_rate": 3e-3,
            "final_learning_rate": 1e-4,
            "warmup_steps": 2,
            "dtype": "fp32",
            "device": "cpu",
            "checkpoint_every": 5,
            "validate_every": 6,
        }
        return DpoRecipe(
            output=str(tmp_path / name),
            model=ModelRecipe(start=str(start)),
            data=DataRecipe(train=str(pairs / train), validation=str(pairs / "held_out"), window=48),
            lora=LoraRecipe(rank=rank),
            training=TrainingRecipe(**{**settings, **training}),
            dpo=DpoSection(**{"samples": 3, "beta": 0.2, **(dpo or {})}),
        )

    return make
