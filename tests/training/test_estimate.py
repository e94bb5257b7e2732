import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from illada.cli import main
from illada.diffusion.loss import masked_loss
from illada.errors import IlladaError
from illada.model.attention import Packing
from illada.model.config import IlladaConfig
from illada.model.transformer import IlladaForMaskedLM
from illada.training.optim import make_optimizers, moments
from illada.training.optional import estimate as estimation
from illada.training.optional.estimate import CHECKPOINTING, _lengths, table
from illada.training.optional.flops import GPUS, flops_per_token
from illada.training.optional.options import EstimateOptions
from illada.training.parallel import recompute
from illada.training.recipe import DataRecipe, LoraRecipe, ModelRecipe, Recipe, TrainingRecipe
from illada.weights.load import load_config

SHAPE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}


def recipe(dtype="fp32", window=64, batch=8, **training):
    settings = {"steps": 10, "samples_per_step": 8, "samples_per_batch": batch, "dtype": dtype} | training
    return Recipe(
        model=ModelRecipe(preset="1m", **SHAPE),
        data=DataRecipe(window=window),
        training=TrainingRecipe(**settings),
    )


def estimate(recipe, gpus=1, gpu="h100", **options):
    return estimation.estimate(recipe, EstimateOptions(gpus, gpu, **options))


def real_pass(dtype, kind, before_backward=lambda: None):
    """A forward and backward pass of the network that `recipe(dtype)` describes."""
    model = IlladaForMaskedLM(IlladaConfig.preset("1m", vocab_size=500, **SHAPE)).train()
    recompute(model, kind)
    packing = Packing(_lengths(64, 8, 0.3))
    ids = torch.zeros(packing.tokens, dtype=torch.int64)
    masked = torch.rand(packing.tokens, generator=torch.Generator().manual_seed(0)) < 0.7
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        loss = masked_loss(model, ids, masked, torch.ones(packing.tokens), packing)
    before_backward()
    loss.backward()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_activations_are_the_tensors_that_autograd_keeps(dtype):
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    found = {}

    def count():
        found["bytes"] = sum(storage.nbytes() for storage in kept.values())

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model = real_pass(dtype, "none", count)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    real = found["bytes"] - sum(kept[place].nbytes() for place in own & set(kept))
    memory = estimate(recipe(dtype), 1, "cpu", vocab_size=500).memory["none"]
    # Autograd also keeps the two gradients that the loss has made, which the estimate counts with the loss.
    assert memory.activations == pytest.approx(real, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "kind"), [("fp32", "none"), ("bf16", "selective"), ("fp32", "full")])
def test_the_peak_is_what_the_allocator_sees(dtype, kind):
    real_pass(dtype, kind)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = real_pass(dtype, kind)
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    optimizer = 8 * sum(p.numel() for p in model.parameters())
    memory = estimate(recipe(dtype), 1, "cpu", vocab_size=500).memory[kind]
    assert memory.peak == pytest.approx(most + optimizer, rel=0.15)
    # The copy from which a checkpoint is written: weights and two moments.
    assert memory.saving == 12 * sum(p.numel() for p in model.parameters())
    assert estimate(recipe(dtype), 1, "h100", vocab_size=500).memory[kind].saving == 0


@pytest.mark.slow
def test_parts_and_sharding():
    parameters = sum(
        p.numel() for p in IlladaForMaskedLM(IlladaConfig.preset("1m", vocab_size=500, **SHAPE)).parameters()
    )
    one = estimate(recipe(batch=2), 1, vocab_size=500)
    four = estimate(recipe(batch=2), 4, vocab_size=500)
    assert (one.parameters, one.parameters_trained, one.vocab_size) == (parameters, parameters, 500)
    assert (one.windows_per_pass, one.passes_per_step, four.passes_per_step) == (2, 4, 1)
    for kind in CHECKPOINTING:
        whole, part = one.memory[kind], four.memory[kind]
        assert (whole.weights, whole.gradients, whole.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
        assert (part.weights, part.gradients, part.optimizer) == (parameters, parameters, 2 * parameters)
        assert (whole.gathered, part.activations) == (0, whole.activations)
        for memory in (whole, part):
            assert memory.peak <= sum(vars(memory).values()) - memory.peak
        assert 0 < part.gathered <= 4 * parameters
    kept = [one.memory[kind].activations for kind in ("full", "selective", "none")]
    assert kept == sorted(kept)
    assert kept[2] > 2 * kept[0]


@pytest.mark.slow
def test_an_average_of_the_weights_is_counted():
    plain, averaged = estimate(recipe(), 2, vocab_size=500), estimate(recipe(average=0.9), 2, vocab_size=500)
    for kind in CHECKPOINTING:
        before, after = plain.memory[kind], averaged.memory[kind]
        assert after.optimizer - before.optimizer == after.peak - before.peak == 4 * plain.parameters // 2


@pytest.mark.slow
def test_what_dropout_keeps_is_counted():
    plain, dropping = estimate(recipe(), vocab_size=500), estimate(recipe(dropout=0.1), vocab_size=500)
    kept = [dropping.memory[kind].activations - plain.memory[kind].activations for kind in CHECKPOINTING]
    tokens, places = 8 * 64, 2 * 2
    # A byte for every number of a branch; nothing where the backward pass computes it again, but for the tokens' bits.
    assert kept[0] == pytest.approx(tokens * places * 64, rel=0.1)
    assert 0 <= kept[1] < 0.1 * kept[0]
    assert 0 <= kept[2] < 0.1 * kept[0]


@pytest.mark.slow
def test_copies_of_the_weights_leave_fewer_shards():
    doubled = recipe(batch=2)
    doubled.parallel.replicate = 2
    two, four, copies = estimate(recipe(batch=2), 2), estimate(recipe(batch=2), 4), estimate(doubled, 4)
    for kind in CHECKPOINTING:
        found = copies.memory[kind]
        for part in ("weights", "gradients", "optimizer"):
            assert getattr(found, part) == getattr(two.memory[kind], part) == 2 * getattr(four.memory[kind], part)
        assert two.memory[kind].peak >= found.peak > four.memory[kind].peak
    assert copies.tokens_per_second == four.tokens_per_second
    assert "4 x h100, 80 GB each, 2 copies of the weights: " in table(copies)
    with pytest.raises(
        IlladaError, match=r"parallel.replicate 2 times parallel.tensor 1 must divide the number of GPUs, 3"
    ):
        estimate(doubled, 3)


@pytest.mark.slow
def test_gathering_once_a_step_keeps_whole_weights_and_gradients():
    once = recipe("bf16", batch=2)
    by_block = estimate(once, 2)
    once.parallel.gather = "step"
    found = estimate(once, 2)
    outside = found.parameters - found.parameters_in_blocks
    a, b = found.memory["none"], by_block.memory["none"]
    assert a.gathered == pytest.approx(2 * found.parameters_in_blocks + 4 * outside, rel=1e-3)
    assert (a.gradients, b.gradients) == (4 * found.parameters, 2 * found.parameters)
    assert a.peak > b.peak
    assert estimate(once, 8).memory["none"].gradients == found.parameters // 2  # of one pass nothing is kept whole


@pytest.mark.slow
def test_heads_over_processes_leave_each_less_to_keep():
    split = recipe(batch=2)
    split.parallel.tensor = 2
    one, two, found = estimate(recipe(batch=2), 1), estimate(recipe(batch=2), 2), estimate(split, 2)
    assert (found.parameters, found.parameters_trained) == (one.parameters, one.parameters)
    # Both compute all windows; embedding, head and norms are on both.
    assert found.passes_per_step == one.passes_per_step == 2 * two.passes_per_step
    config = IlladaConfig.preset("1m", **SHAPE)
    norms = 2 * 2 * config.hidden_size
    outside = one.parameters - one.parameters_in_blocks
    here = (one.parameters_in_blocks - norms) // 2 + norms + outside
    assert found.memory["none"].weights == 4 * here
    assert 0.5 < found.memory["none"].activations / one.memory["none"].activations < 0.9
    split.parallel.tensor = 4
    with pytest.raises(IlladaError, match=r"parallel.tensor is 4: it must divide num_key_value_heads of the model, 2"):
        estimate(split, 4)


@pytest.mark.slow
def test_muon_keeps_one_moment_of_the_matrices_in_blocks():
    tuned = recipe(optimizer="muon")
    model = IlladaForMaskedLM(IlladaConfig.preset("1m", vocab_size=500, **SHAPE))
    optimizers = make_optimizers(model, tuned.training)
    names = {parameter: name for name, parameter in model.named_parameters()}
    real = sum(value.nbytes for value in moments(optimizers, names).values())
    adamw, muon = estimate(recipe(), vocab_size=500), estimate(tuned, vocab_size=500)
    assert muon.memory["none"].optimizer == real < adamw.memory["none"].optimizer
    assert adamw.memory["none"].peak - muon.memory["none"].peak == adamw.memory["none"].optimizer - real


@pytest.mark.slow
def test_an_adapter_trains_little_beside_frozen_weights(tied, tmp_path):
    pytest.importorskip("peft")
    tied.save_pretrained(tmp_path)
    tuned = recipe("bf16")
    tuned.model = ModelRecipe(start=str(tmp_path))
    everything = estimate(tuned)
    tuned.lora = LoraRecipe(rank=2, targets=["q_proj"])
    found = estimate(tuned)
    frozen = everything.parameters
    assert found.parameters_trained == found.parameters - frozen == 2 * 2 * (32 + 32)
    memory = found.memory["none"]
    assert memory.weights == 2 * frozen + 4 * found.parameters_trained
    assert memory.optimizer == 8 * found.parameters_trained
    assert found.flops_per_token < 0.85 * everything.flops_per_token


@pytest.mark.slow
def test_noise_changes_how_many_rows_the_head_sees():
    """At most the greatest chance to be masked; a complement's counts."""

    def loss(**noise):
        return estimate(recipe(batch=1, **noise), vocab_size=500).memory["none"].loss

    assert loss(mask_range=[0.1, 0.3]) < loss(mask_range=[0.3, 0.6]) < loss() == loss(noise="bell")
    assert loss(mask_range=[0.1, 0.3], complementary=True) == loss(mask_range=[0.1, 0.9])


def test_flops_are_those_of_the_formula():
    config = IlladaConfig.preset("illada-8b")
    blocks, head = 6_979_584_000, 155_136 * 4096
    assert flops_per_token(config, 8192) == pytest.approx(
        3 * (2 * blocks + 4 * 8192 * 4096 * 32 + 2 * head * 0.5005), rel=1e-12
    )
    assert flops_per_token(config, 8192, adapter=10) < 0.8 * flops_per_token(config, 8192)


@pytest.mark.slow
def test_a_split_window_costs_less_attention():
    """Two segments of a window split anywhere hold 2/3 of its pairs, on average."""
    whole, split = recipe(), recipe()
    whole.data.split_probability, split.data.split_probability = 0.0, 1.0
    cuts = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    pairs = float((cuts**2 + (1 - cuts) ** 2).mean())
    found = [estimate(one) for one in (whole, split)]
    config = IlladaConfig.preset("1m", vocab_size=500, **SHAPE)
    attention = 3 * 4 * 64 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    assert (found[0].flops_per_token - found[1].flops_per_token) / attention == pytest.approx(1 - pairs, rel=1e-3)


@pytest.mark.slow
def test_speed_days_and_cost():
    found = estimate(recipe(), 2, "h100", mfu=0.5, price=3.0, vocab_size=500)
    assert found.tokens_per_second == pytest.approx(2 * GPUS["h100"].teraflops * 1e12 * 0.5 / found.flops_per_token)
    assert found.steps == 10
    assert found.days == pytest.approx(10 * 8 * 64 / found.tokens_per_second / 86_400)
    assert found.cost == pytest.approx(found.days * 24 * 2 * 3.0)
    assert estimate(recipe(steps=None, epochs=2.0), vocab_size=500, data_tokens=64_000).steps == 250
    unknown = estimate(recipe(steps=None, epochs=2.0), vocab_size=500)
    assert unknown.days is None
    assert "duration: not known" in table(unknown)


def test_prepared_data_says_vocabulary_and_tokens(make_data, tmp_path):
    make_data(tmp_path / "data", [[7] * 640], vocab_size=300)
    counted = recipe(steps=None, epochs=4.0)
    counted.data.train = str(tmp_path / "data")
    found = estimate(counted)
    assert (found.vocab_size, found.steps) == (300, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpu": "abacus"}, "no gpu 'abacus': choose one of a100, h100"),
        ({"gpus": 0}, "at least 1"),
        ({"gpus": 2, "gpu": "cpu"}, "1 on a cpu"),
        ({"gpus": 9}, "samples_per_step 8 leaves some of 9 GPUs without a window"),
        ({"mfu": 0.0}, "above 0 and at most 1"),
        ({"price": -1.0}, "price"),
    ],
)
def test_what_cannot_be_estimated_is_refused(arguments, message):
    with pytest.raises(IlladaError, match=message):
        estimate(recipe(), **arguments)
    with pytest.raises(IlladaError, match="longer than the model's context 1024"):
        estimate(recipe(window=2048))


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(
        "model: {preset: 1m, num_hidden_layers: 1}\ndata: {window: 32}\n"
        "training: {steps: 100, samples_per_step: 16, samples_per_batch: 2}\n"
    )
    main(["estimate", str(tmp_path / "r.yaml"), "--gpus", "2", "--gpu", "a100", "--price", "2"])
    text = capsys.readouterr().out
    for part in (
        "2 x a100, 80 GB each: 2 windows a pass, 4 passes a step",
        "selective",
        "100 steps, 51,200 tokens",
        "cost",
    ):
        assert part in text
    (tmp_path / "sft.yaml").write_text("model: {preset: 1m, num_hidden_layers: 1}\ndata: {window: 32}\n")
    main(
        [
            "estimate",
            str(tmp_path / "sft.yaml"),
            "--command",
            "sft",
            "--data_tokens",
            "81920",
            "--training.samples_per_batch",
            "2",
        ]
    )
    assert "120 steps, 983,040 tokens" in capsys.readouterr().out  # 12 epochs of 256 windows a step
    with pytest.raises(SystemExit):
        main(["estimate", str(tmp_path / "sft.yaml"), "--data_tokens", "81920"])
    assert "set training.steps or training.epochs" in capsys.readouterr().err
    main(["estimate", str(tmp_path / "r.yaml"), "--gpu", "cpu", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["tokens_per_second"] is None
    assert set(answer["memory"]) == set(CHECKPOINTING)
    with pytest.raises(SystemExit):
        main(["estimate", str(tmp_path / "r.yaml"), "--gpu", "abacus"])
    assert "gpu is 'abacus'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [1, 2])
def test_a_deep_network_is_estimated_from_two_shallower_ones(monkeypatch, gpus):
    recipe = Recipe(
        model=ModelRecipe(preset="1m", num_hidden_layers=12),
        data=DataRecipe(train="none", window=64),
        training=TrainingRecipe(steps=2, samples_per_step=4, samples_per_batch=2),
    )
    whole = estimation.estimate(recipe, EstimateOptions(gpus=gpus))
    monkeypatch.setattr(estimation, "DEEP", 8)
    assert estimation.estimate(recipe, EstimateOptions(gpus=gpus)) == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "words", "times", "forward"),
    [
        ("dpo", "--dpo.samples 3", 6, 6),  # two answers, the start's bounds of which are computed once: one epoch
        ("dpo", "--dpo.samples 3 --dpo.complementary --dpo.reference live", 12, 12),
        # old sums and the start's, and an answer of four passes over 24 to 32 tokens for two steps
        (
            "rl",
            "RL ANSWERS",
            4,
            8 + 4 * (1 - 4 / 64) / 2,
        ),
        (
            "rl",
            "RL --rl.method gdsd ANSWERS",
            4,
            4 + 1.875,
        ),
        ("distill", "--distill.tasks sorting --distill.problems 640 --training.epochs 2 ANSWERS", 2, 3.75 / 2),
    ],
)
def test_post_training_is_estimated_too(command, words, times, forward, tmp_path, write_tiny_model, capsys):
    start = write_tiny_model(tmp_path / "start")
    words = words.replace("RL", "--rl.tasks sorting --rl.answers 2 --rl.samples 2 --rl.inner_steps 2")
    words = words.replace("ANSWERS", f"--{command}.settings.max_new_tokens 4 --{command}.settings.block_length 4")
    shared = (
        f"--command {command} --model.start {start} --data.window 32 --training.samples_per_step 8 --gpu h100 --json"
    )
    main(["estimate", *shared.split(), *words.split(), "--training.samples_per_batch", "2"])
    found = json.loads(capsys.readouterr().out)
    assert found["tokens_per_step"] == 8 * 32 * times
    assert found["windows_per_pass"] == 2 * times
    assert found["passes_per_step"] == 4
    config = load_config(start)
    learnt, passed = flops_per_token(config, 32), flops_per_token(config, 32) / 3
    assert found["flops_per_token"] == pytest.approx(learnt + passed * forward / times)
    copied = (command == "rl" and "gdsd" not in words) or "live" in words
    assert found["memory"]["none"]["weights"] == 4 * found["parameters"] * (1 + copied)
    if command == "distill":
        assert found["steps"] == 2 * 640 // 8
