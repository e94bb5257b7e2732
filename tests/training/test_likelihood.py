"""Held-out text by exact likelihood: the same windows as the bound, paired, with standard errors."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from illada import cli
from illada.errors import IlladaError
from illada.generation.settings import GenerationSettings
from illada.scoring.likelihood import likelihood_scores
from illada.training.optional import likelihood
from illada.training.optional.likelihood import held_out_pairs, likelihood_table, run_likelihood, text_likelihood
from illada.training.trainer import train
from reference import reference_causal_score, reference_path


@pytest.fixture(scope="module")
def shards(make_data, tmp_path_factory):
    documents = [[(5 * n + i * i) % 50 + 6 for i in range(n % 9 + 4)] for n in range(30)]
    return make_data(tmp_path_factory.mktemp("text"), documents, per_shard=50)


def bits(nats, shards):
    return nats * shards.tokens / shards.bytes / math.log(2)


def test_path_and_bound_are_of_the_same_tokens(untied, shards):
    found = text_likelihood(untied, shards, window=8, windows=4, block_length=3)
    pairs = held_out_pairs(shards, 8, 4)
    whole = shards.tokens // 8
    assert [[*left, *rest] for left, rest in pairs] == [shards.read(i * whole // 4 * 8, 8).tolist() for i in range(4)]
    assert (found.windows, found.tokens) == (4, 28)
    rule = GenerationSettings(block_length=3, eos_token_id=None)
    path = np.array([bits(-reference_path(untied, *pair, rule)[0] / 7, shards) for pair in pairs])
    bound = np.array([bits(-x / 7, shards) for x in likelihood_scores(untied, pairs, 128, likelihood.VALIDATION_SEED)])
    for name, values in {"path": path, "bound": bound, "path - bound": path - bound}.items():
        assert found.figures[name]["mean"] == pytest.approx(values.mean(), abs=1e-4)
        assert found.figures[name]["standard_error"] == pytest.approx(values.std(ddof=1) / 2, abs=1e-4)


def test_a_causal_model_has_its_exact_figure(build_model, shards):
    model = build_model(tie=True, seed=3, causal=True)
    found = text_likelihood(model, shards, window=8, windows=3)
    want = [bits(-reference_causal_score(model, *pair)[0] / 7, shards) for pair in held_out_pairs(shards, 8, 3)]
    assert found.figures.keys() == {"exact"}
    assert found.figures["exact"]["mean"] == pytest.approx(sum(want) / 3, abs=1e-4)


def test_windows_are_as_many_as_there_are(untied, shards):
    assert len(held_out_pairs(shards, 8, 10_000)) == shards.tokens // 8
    assert text_likelihood(untied, shards, 8, 1).figures["path"]["standard_error"] is None
    for window, windows in ((1, 3), (8, 0)):
        with pytest.raises(IlladaError, match="needs one of two tokens"):
            held_out_pairs(shards, window, windows)


@pytest.mark.slow
def test_the_report_compares_runs(make_recipe, data, capsys):
    pytest.importorskip("matplotlib")
    runs = {}
    for name, causal in (("diffusion", False), ("ar", True)):
        recipe = make_recipe(name, validation="held_out", steps=2)
        recipe.model = replace(recipe.model, causal=causal)
        train(recipe)
        runs[name] = recipe.output
    picture = Path(runs["diffusion"]) / "report.png"
    cli.main(["report", runs["diffusion"]])
    plain = picture.read_bytes()
    cli.main(["report", runs["diffusion"], "--windows", "3", "--beside", runs["ar"]])
    said = capsys.readouterr().out
    found = json.loads((Path(runs["diffusion"]) / likelihood.RESULT).read_text())
    assert likelihood_table(found) in said
    assert found["step"] == 2
    assert picture.read_bytes() != plain
    assert found["models"][runs["ar"]].keys() == {"exact"}
    assert found["models"][runs["diffusion"]].keys() == {"bound", "path", "path - bound"}
    for words, says in (
        (["--windows", "-1"], "at least 0"),
        (["--beside", runs["ar"]], "give --windows"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["report", runs["diffusion"], *words])
        assert says in capsys.readouterr().err
    unheld = make_recipe("unheld", steps=1)
    train(unheld)
    other = Path(runs["ar"]) / "recipe.yaml"
    other.write_text(other.read_text().replace(str(data / "held_out"), str(data / "other")))
    for run, says in (
        (unheld.output, "names no data.validation"),
        (runs["ar"], "another tokenizer"),
        (str(data), "holds no recipe.yaml"),
    ):
        with pytest.raises(IlladaError, match=says):
            run_likelihood(run, 3)
