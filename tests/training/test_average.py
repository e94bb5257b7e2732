"""training.average: the plain equation, what is exported and validated, adapters, spikes, the report."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from illada import cli
from illada.data.shards import Shards
from illada.errors import IlladaError
from illada.training import trainer
from illada.training.optional.average import Average, fading
from illada.training.trainer import train
from illada.training.validation import bits_per_byte, validation_bound
from illada.weights.load import load_model
from illada.weights.runs import checkpoints, read_metrics
from reference import average_of_weights

SHARD = "shard-00001-model-00001-of-00001.safetensors"


def history_of(run):
    """Return the tensors of every checkpoint, oldest first."""
    return [load_file(path / SHARD) for path in checkpoints(Path(run))]


def records_of(recipe):
    return read_metrics(Path(recipe.output) / "metrics.jsonl")


def test_the_average_is_the_plain_equation():
    generator = torch.Generator().manual_seed(0)
    for decay in (0.3, 0.9, 0.9999):
        weights = {name: torch.randn(*shape, generator=generator) for name, shape in {"a": (3, 5), "b": (2,)}.items()}
        average = Average(weights, decay)
        assert average.tensors.keys() == {"a/average", "b/average"}
        history = {name: [weight.clone()] for name, weight in weights.items()}
        for update in range(1, 40):
            for name, weight in weights.items():
                weight.add_(torch.randn(*weight.shape, generator=generator))
                history[name].append(weight.clone())
            average.update(update)
        for name, weight in weights.items():
            found = average.tensors[f"{name}/average"]
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), average_of_weights(history[name], decay), rtol=0, atol=1e-5)
            assert not torch.equal(found, weight)
    assert fading(0.9, 1) == pytest.approx(2 / 11)
    assert fading(0.9, 1000) == 0.9


def test_a_swap_is_undone_to_the_bit_also_by_an_error():
    weights = {"a": torch.tensor([1.0, 2.0, -0.0])}
    average = Average(weights, 0.9)
    weights["a"] += torch.tensor([0.1, 0.7, 0.0])
    before, own = weights["a"].clone(), average.tensors["a/average"].clone()
    with average.in_place():
        assert torch.equal(weights["a"], own)
        assert torch.equal(average.tensors["a/average"], before)
    assert torch.equal(weights["a"], before)
    with pytest.raises(ZeroDivisionError), average.in_place():
        raise ZeroDivisionError
    assert torch.equal(weights["a"], before)
    assert torch.equal(average.tensors["a/average"], own)
    nothing = Average(weights, 0.0)
    nothing.update(1)
    with nothing.in_place():
        assert torch.equal(weights["a"], before)
    assert nothing.tensors == {}


@pytest.mark.slow
def test_the_average_is_exported_and_validated_and_changes_no_step(make_recipe, data):
    settings = {"steps": 12, "checkpoint_every": 1, "keep_checkpoints": 20, "validate_every": 6}
    plain, averaged = (make_recipe(f"{x}", validation="held_out", average=x, **settings) for x in (0.0, 0.7))
    still = {"learning_rate": 0.0, "final_learning_rate": 0.0}
    start = make_recipe("start", validation="held_out", **{**settings, **still, "steps": 1})
    for recipe in (plain, averaged, start):
        train(recipe)
    before, free, history = (history_of(recipe.output) for recipe in (start, plain, averaged))
    model = load_file(Path(averaged.output) / "model" / "model.safetensors")
    assert model.keys() == free[-1].keys() - {name for name in free[-1] if "/" in name}
    for name, value in model.items():
        assert torch.equal(history[-1][name], free[-1][name]), name
        assert torch.equal(history[-1][f"{name}/average"], value), name
        expected = average_of_weights([before[-1][name], *(step[name] for step in history)], 0.7)
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6, msg=name)
        assert not torch.equal(value, free[-1][name]), name
    rows, plain_rows = records_of(averaged), records_of(plain)
    assert [row["loss"] for row in rows] == [row["loss"] for row in plain_rows]
    held_out = Shards.open(data / "held_out")
    network, _ = load_model(averaged.output, "fp32", "cpu")
    bound = validation_bound(network, held_out, 32, 256, 2)
    assert rows[-1]["validation_loss"] == pytest.approx(bound, rel=1e-6)
    expected = bits_per_byte(bound, held_out.tokens, held_out.bytes)
    assert rows[-1]["validation_bits_per_byte"] == pytest.approx(expected, rel=1e-6)
    for at in (5, 11):
        assert rows[at]["raw_validation_bits_per_byte"] == plain_rows[at]["validation_bits_per_byte"]
        assert rows[at]["raw_validation_bits_per_byte"] != rows[at]["validation_bits_per_byte"]
    assert not any("raw_validation_bits_per_byte" in row for row in plain_rows)


@pytest.mark.slow
def test_the_average_of_an_adapter_and_a_step_left_out(make_recipe, monkeypatch):
    """A step that changes no weights is no update: at the decay of 0 to 1 the average then stays where it is."""
    base = train(make_recipe("base", steps=2)).model
    settings = {"steps": 6, "checkpoint_every": 1, "keep_checkpoints": 20, "on_spike": "skip", "average": 0.6}
    recipe = make_recipe("adapter", "chat", start=base, learning_rate=1e-2, **settings)
    recipe.lora.rank = 2
    monkeypatch.setattr(trainer, "trouble", lambda state, *_: "a spike" if state.step == 3 else None)
    train(recipe)
    history = history_of(recipe.output)
    adapter = load_file(Path(recipe.output) / "adapter" / "adapter_model.safetensors")
    for name, value in adapter.items():
        for kept in (name, f"{name}/average"):
            assert torch.equal(history[3][kept], history[2][kept]), kept
        assert torch.equal(history[-1][f"{name}/average"], value)
        if "lora_B" in name:  # zero at the start
            updates = [history[n][name] for n in (0, 1, 2, 4, 5)]
            expected = average_of_weights([torch.zeros_like(value), *updates], 0.6)
            torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_is_none_is_refused(make_recipe, decay):
    with pytest.raises(IlladaError, match=r"^training\.average is .*: it must be between 0 and 0\.99999$"):
        make_recipe(average=decay).check()


@pytest.mark.slow
def test_the_report_shows_both_figures(make_recipe, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    recipe = make_recipe(validation="held_out", steps=4, validate_every=2, average=0.9)
    train(recipe)
    assert "bits/byte  (without the average " in capsys.readouterr().err
    picture = Path(recipe.output) / "x.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        cli.main(["report", recipe.output, "--output", str(picture)])
    for label in ("held out, average of the weights", "held out, without the average"):
        assert label in picture.read_text()
