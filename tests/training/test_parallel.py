"""One run on 1, 2 and 4 processes: the same noise, the same losses to rounding, the same files at the end."""

import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from illada.data.collate import noisy_batches
from illada.errors import IlladaError
from illada.training.trainer import train
from illada.weights.runs import read_metrics
from process_groups import run_groups

pytestmark = pytest.mark.slow


def assert_same_run(folder, ends, name, other, loss=1e-5, weight=2e-5):
    assert ends[name]["noise"] == ends[other]["noise"], name
    mine, theirs = (read_metrics(folder / n / "metrics.jsonl") for n in (name, other))
    assert [r["step"] for r in mine] == [r["step"] for r in theirs]
    for key in ("loss", "gradient_norm", "validation_loss", "tokens", "learning_rate", "raw_validation_bits_per_byte"):
        a, b = ([r.get(key, 0.0) for r in records] for records in (mine, theirs))
        assert a == pytest.approx(b, rel=loss if key != "gradient_norm" else 10 * loss), (name, key)
    kind = "adapter/adapter_model" if (folder / name / "adapter").exists() else "model/model"
    a, b = (load_file(folder / n / f"{kind}.safetensors") for n in (name, other))
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=0, atol=weight, msg=f"{name}: {key}")


def test_any_number_of_processes_is_the_same_run(make_recipe, tmp_path):
    def make(**changes):
        settings = {"steps": 5, "validate_every": 3, "validation_samples": 5, "samples_per_batch": 4}
        return make_recipe(validation="held_out", **{**settings, "learning_rate": 1e-3, **changes})

    spikes = {"steps": 70, "validate_every": 70, "on_spike": "skip", "spike_deviations": 1.0}
    copies = make(samples_per_step=8, samples_per_batch=1)
    copies.parallel.replicate, copies.parallel.recompute = 2, "selective"
    by_block, nowhere, odd_copies = make(samples_per_batch=1), make(), make()
    copies.parallel.gather = by_block.parallel.gather = "block"  # as on GPUs
    nowhere.data.train, odd_copies.parallel.replicate = "nowhere", 3
    # Through more than an epoch of the data, which is some 40 windows.
    shifted, shifted_on_2 = (make(samples_per_step=13, samples_per_batch=size) for size in (13, 2))
    shifted.data.shift_windows = shifted_on_2.data.shift_windows = True
    noise = {"noise": "bell", "mask_range": [0.2, 0.9], "complementary": True, "samples_per_step": 6}
    runs = {
        "1": (1, make()),
        "1, 4 passes": (1, make(samples_per_batch=1)),
        "2": (2, make()),
        "2, 2 passes": (2, make(samples_per_batch=1)),
        "2, 2 passes by block": (2, by_block),
        "3": (3, make()),
        "4": (4, make()),
        "8 windows on 1": (1, make(samples_per_step=8)),
        "8 windows on 4, 2 copies, 2 passes": (4, copies),
        "5 windows on 1": (1, make(samples_per_step=5)),
        "5 windows on 2, 3 passes": (2, make(samples_per_step=5, samples_per_batch=1)),
        "5 windows on 4": (4, make(samples_per_step=5)),
        "shifted on 1": (1, shifted),
        "shifted on 2, 4 passes": (2, shifted_on_2),
        "noise on 1": (1, make(**noise)),
        "noise on 2, 3 passes": (2, make(**noise, samples_per_batch=1)),
        "muon on 1": (1, make(optimizer="muon")),
        "muon on 2": (2, make(optimizer="muon")),
        "bf16 on 1": (1, make(dtype="bf16")),
        "bf16 on 2": (2, make(dtype="bf16")),
        "averaged on 1": (1, make(average=0.5)),
        "averaged on 2": (2, make(average=0.5)),
        "averaged on 3": (3, make(average=0.5)),
        "dropped on 1": (1, make(dropout=0.3)),
        "dropped on 1, 4 passes": (1, make(dropout=0.3, samples_per_batch=1)),
        "dropped on 2": (2, make(dropout=0.3)),
        "dropped on 3": (3, make(dropout=0.3)),
        "spikes on 1": (1, make(**spikes)),
        "spikes on 2": (2, make(**spikes)),
        "nowhere": (2, nowhere),
        "odd copies": (2, odd_copies),
    }
    ends = run_groups(tmp_path, runs)
    wrong = ("nowhere", "odd copies")
    for name, end in ends.items():
        assert end["codes"] == [2 if name in wrong else 0] * runs[name][0], (name, end["said"])
    for name in ("1, 4 passes", "2", "2, 2 passes", "2, 2 passes by block", "3", "4"):
        assert_same_run(tmp_path, ends, name, "1")
    # Two blocks, and all else, in each of five steps and two validations.
    assert ends["2, 2 passes"]["gathers"] == (2 + 1) * (5 + 2)
    assert ends["2, 2 passes by block"]["gathers"] > 2 * ends["2, 2 passes"]["gathers"]
    assert_same_run(tmp_path, ends, "8 windows on 4, 2 copies, 2 passes", "8 windows on 1")
    for name in ("5 windows on 2, 3 passes", "5 windows on 4"):
        assert_same_run(tmp_path, ends, name, "5 windows on 1")
    assert_same_run(tmp_path, ends, "shifted on 2, 4 passes", "shifted on 1")
    for name in ("averaged on 2", "averaged on 3", "dropped on 2", "dropped on 3", "dropped on 1, 4 passes"):
        assert_same_run(tmp_path, ends, name, f"{name.split()[0]} on 1")
        with pytest.raises(AssertionError, match=name):
            assert_same_run(tmp_path, ends, name, "1")
    assert_same_run(tmp_path, ends, "noise on 2, 3 passes", "noise on 1")
    # bf16 shows another order of sums, and Muon computes in it.
    for kind in ("muon", "bf16"):
        assert_same_run(tmp_path, ends, f"{kind} on 2", f"{kind} on 1", 3e-3, 1e-3)
    assert_same_run(tmp_path, ends, "spikes on 2", "spikes on 1", 1e-4, 2e-4)  # after 70 steps
    left_out = [
        ["trouble" in record for record in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("spikes on 1", "spikes on 2")
    ]
    assert left_out[0] == left_out[1]
    assert any(left_out[0])
    assert len(ends["2"]["noise"]) == 5
    assert ends["1"]["noise"] != ends["5 windows on 1"]["noise"]
    # One voice: that of the first process.
    assert ends["4"]["said"].count("validation") == 2
    assert ends["nowhere"]["said"] == "error: no prepared data at nowhere: make it with `illada prepare`\n"
    assert ends["odd copies"]["said"].startswith("error: parallel.replicate is 3: it must divide")
    assert ends["odd copies"]["said"].count("\n") == 1
    assert not any((tmp_path / name).exists() for name in wrong)
    shards = list((tmp_path / "4" / "checkpoints" / "step-00000005").glob("shard-*.safetensors"))
    assert len(shards) == 4


def test_heads_over_processes_are_the_same_run_too(make_recipe, tmp_path):
    def make(tensor, **changes):
        settings = {"steps": 5, "validate_every": 3, "validation_samples": 5, "samples_per_batch": 2}
        recipe = make_recipe(
            validation="held_out", **{**settings, "learning_rate": 1e-3, "checkpoint_every": 3, **changes}
        )
        recipe.parallel.tensor = tensor
        return recipe

    again, alone, odd_heads, odd_copies = make(2), make(2), make(2), make(2)
    again.parallel.recompute, odd_heads.model.num_key_value_heads, odd_copies.parallel.replicate = "selective", 1, 2
    runs = {
        "1": (1, make(1)),
        "2": (2, make(2)),
        "4, computed again": (4, again),
        "bf16 on 1": (1, make(1, dtype="bf16")),
        "bf16 on 2": (2, make(2, dtype="bf16")),
        "options on 1": (1, make(1, average=0.5, dropout=0.3)),
        "options on 2": (2, make(2, average=0.5, dropout=0.3)),
        "alone": (1, alone),
        "heads": (2, odd_heads),
        "copies": (2, odd_copies),
    }
    ends = run_groups(tmp_path, runs)
    wrong = {
        "alone": "parallel.tensor is 2: it must divide the number of processes, 1",
        "heads": "parallel.tensor is 2: it must divide num_key_value_heads of the model, 1",
        "copies": "parallel.replicate is 2: it must divide the number of groups of 2 processes, 1",
    }
    for name, end in ends.items():
        assert end["codes"] == [2 if name in wrong else 0] * runs[name][0], (name, end["said"])
        if name in wrong:
            assert end["said"] == f"error: {wrong[name]}\n"
        # Both of a group see every window.
        end["noise"] = {step: sorted(set(seen)) for step, seen in end["noise"].items()}
    for name in ("2", "4, computed again"):
        assert_same_run(tmp_path, ends, name, "1")
    assert_same_run(tmp_path, ends, "options on 2", "options on 1")
    assert_same_run(tmp_path, ends, "bf16 on 2", "bf16 on 1", 3e-3, 1e-3)
    # One process goes on from what two wrote, each its heads.
    for file in (tmp_path / "2" / "checkpoints" / "step-00000003").glob("shard-*.safetensors"):
        assert load_file(file)["model.layers.0.self_attn.q_proj.weight"].shape == (16, 32)
    shutil.rmtree(tmp_path / "2" / "checkpoints" / "step-00000005")
    shutil.rmtree(tmp_path / "2" / "model")
    rest = make(1)
    rest.output = str(tmp_path / "2")
    train(rest)
    assert read_metrics(tmp_path / "2" / "metrics.jsonl")[3]["step"] == 4
    assert_same_run(tmp_path, ends, "2", "1")


def test_what_wants_whole_matrices_refuses_parts_of_heads(make_recipe):
    muon, adapter = make_recipe(optimizer="muon"), make_recipe(start="somewhere")
    adapter.lora.rank = 2
    for recipe, what in ((muon, "training.optimizer muon"), (adapter, "lora")):
        recipe.check()
        recipe.parallel.tensor = 2
        with pytest.raises(IlladaError, match=f"^{what} wants whole matrices: take parallel.tensor 1$"):
            recipe.check()
    compiled = make_recipe()
    compiled.parallel.compile, compiled.parallel.tensor = True, 2
    with pytest.raises(IlladaError, match=r"^parallel.compile and parallel.tensor do not go together"):
        compiled.check()


def test_tuning_is_the_same_run_too(make_recipe, tmp_path):
    base = train(make_recipe("base", steps=2)).model
    runs = {}
    for rule in ("illada", "llada"):
        tune = partial(make_recipe, "", "chat", start=base, steps=4, rule=rule, learning_rate=1e-3)
        adapters = [tune(), tune(samples_per_batch=1)]
        for recipe in adapters:
            recipe.lora.rank = 2
        runs |= {
            f"{rule} on 1": (1, tune(samples_per_batch=4)),
            f"{rule} on 2": (2, tune(samples_per_batch=1)),
            f"{rule} on 4": (4, tune()),
            f"{rule}, adapter on 1": (1, adapters[0]),
            f"{rule}, adapter on 2": (2, adapters[1]),
        }
    ends = run_groups(tmp_path, runs)
    assert not any(any(end["codes"]) for end in ends.values()), ends
    for name in runs:
        assert_same_run(tmp_path, ends, name, f"{name[:-1]}1")


def test_every_process_makes_the_same_number_of_passes(make_recipe, data):
    from illada.data.batches import Batches
    from illada.data.shards import Shards

    shards = Shards.open(data / "train")
    plan = Batches(shards, 32, 5, 0).plan(0)
    whole = sum(float((b.weight_T * b.masked_T).sum()) for b in noisy_batches(plan, 5, shards, 0, 0))
    for ranks in (1, 2, 3, 4, 7):
        parts = [list(noisy_batches(plan, 2, shards, 0, 0, rank=rank, ranks=ranks)) for rank in range(ranks)]
        assert len({len(part) for part in parts}) == 1
        found = sum(float((batch.weight_T * batch.masked_T).sum()) for part in parts for batch in part)
        assert found == pytest.approx(whole, rel=1e-6)
