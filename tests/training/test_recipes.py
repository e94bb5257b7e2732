"""Every recipe in recipes/ is read by the command line and passes its checks."""

import re
import subprocess
from pathlib import Path

import pytest

from illada import cli
from illada.commands.recipes import recipe_file
from illada.errors import IlladaError
from illada.model.config import IlladaConfig
from illada.training.recipe import Recipe

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
# Parameters without the embedding, in millions, that the first lines promise.
SIZES = {"150m-pretrain": 145, "1b-pretrain": 973, "8b-pretrain": 6980}

POST_TRAINING = ("dpo", "rl", "distill")


@pytest.fixture
def read(monkeypatch):
    """Return the recipe that a command would train."""
    found = []
    monkeypatch.setattr(
        "illada.training.trainer.train", lambda recipe, *_: found.append(recipe) or pytest.skip.Exception
    )

    def read(*words):
        with pytest.raises(AttributeError):  # of what stands for the result
            cli.main(list(words))
        return found[-1]

    return read


@pytest.mark.parametrize("file", RECIPES, ids=[file.stem for file in RECIPES])
def test_a_recipe_is_read_and_makes_sense(read, file):
    start = ("--model.start", "base") if file.stem in ("tiny-cpu-sft", *POST_TRAINING) else ()
    start += ("--rl.reward", '{exact: 1, "own:short": 0.1}') if file.stem == "rl" else ()
    command = file.stem if file.stem in POST_TRAINING else "sft" if file.stem.endswith("sft") else "pretrain"
    words = ("--data.train", "data", "--data.validation", "held", "--output", "run")
    recipe: Recipe = read(command, str(file), *words, *start)
    recipe.check()
    if file.stem == "rl":
        assert recipe.rl.reward == {"exact": 1, "own:short": 0.1}
    if file.stem in SIZES:
        config = IlladaConfig.preset(recipe.model.preset, **recipe.model.changes())
        heads = config.num_attention_heads + config.num_key_value_heads
        attention = 2 * config.hidden_size * heads * config.head_dim
        layer = attention + 3 * config.hidden_size * config.intermediate_size + 2 * config.hidden_size
        assert (config.num_hidden_layers * layer + config.hidden_size) / 1e6 == pytest.approx(
            SIZES[file.stem], rel=0.01
        )
        assert recipe.data.window <= config.max_position_embeddings
    written = file.read_text()
    for path in re.findall(r"recipes/[\w.-]+\.(?:yaml|sh)", written):
        assert (FOLDER.parent / path).is_file(), path


def test_the_papers_numbers_are_the_papers(read):
    words = ("--data.train", "data", "--output", "run")
    first = read("pretrain", str(FOLDER / "8b-pretrain.yaml"), *words)
    tuned = read("sft", str(FOLDER / "8b-sft.yaml"), *words)
    rates = [(r.training.learning_rate, r.training.final_learning_rate, r.training.decay) for r in (first, tuned)]
    assert rates == [(2e-4, 5e-6, "cosine"), (5e-6, 5e-7, "linear")]
    assert {r.data.window for r in (first, tuned)} == {8192}
    assert {r.data.split_probability for r in (first, tuned)} == {0.3}
    assert {r.training.weight_decay for r in (first, tuned)} == {0.1}
    assert tuned.training.epochs == 12
    tokens = first.training.steps * first.training.samples_per_step * first.data.window
    assert tokens == pytest.approx(12e12, rel=0.001)


def test_the_launchers_are_shell_scripts():
    for file in FOLDER.glob("*.sh"):
        assert subprocess.run(["bash", "-n", file], check=False).returncode == 0
        assert file.stat().st_mode & 0o111


@pytest.mark.slow
def test_a_recipe_is_found_by_its_name_anywhere(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--data.train", "data", "--output", "run")
    for name in ("tiny-cpu-pretrain", "tiny-cpu-pretrain.yaml", "recipes/tiny-cpu-pretrain.yaml"):
        assert read("pretrain", name, *words).training.decay_steps == 700
    (tmp_path / "tiny-cpu-pretrain").write_text((FOLDER / "150m-pretrain.yaml").read_text())
    assert read("pretrain", "tiny-cpu-pretrain", *words).training.decay_steps == 4000  # a file comes first
    for name in ("tiny", "elsewhere/tiny-cpu-pretrain.yaml"):
        with pytest.raises(
            IlladaError, match=f"no recipe at {name}: (give a file, or one of .*|did you mean )tiny-cpu-"
        ):
            recipe_file(name)
