"""training.dropout: the plain equation, what its numbers depend on, where it acts and where it never does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from illada.data.batches import Batches
from illada.data.collate import noisy_batches
from illada.data.shards import Shards
from illada.diffusion.noise import EPSILON, Noise
from illada.errors import IlladaError
from illada.model.attention import Packing
from illada.model.config import IlladaConfig
from illada.model.transformer import IlladaForMaskedLM, rotary_angles
from illada.training.optional.dropout import Dropout, dropped
from illada.training.trainer import train
from illada.weights.runs import read_metrics
from reference import is_dropped

SMALL = {"hidden_size": 30, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
SMALL |= {"num_key_value_heads": 1, "vocab_size": 50}
CPU = torch.device("cpu")


def network():
    torch.manual_seed(3)
    return IlladaForMaskedLM(IlladaConfig.preset("1m", **SMALL)).train()


def places(*rows):
    """Sample, epoch, position and view of tokens."""
    return tuple(torch.tensor(column) for column in zip(*rows, strict=True))


def masks(rows, rate=0.3, seed=5, branch=1, width=30):
    dropout = Dropout(network(), rate, seed)
    dropout.begin(places(*rows), CPU)
    return dropped(dropout.token_T, branch, width, dropout.level)


def test_what_is_dropped_is_the_plain_equation():
    rows = [(3, 0, 0, 0), (3, 0, 1, 0), (3, 1, 0, 1), (2**40, 7, 8191, 0)]
    for rate in (0.1, 0.5, 0.99999):
        for seed, branch, width in ((0, 0, 30), (2**62, 5, 7)):
            found = masks(rows, rate, seed, branch, width).tolist()
            assert found == [[is_dropped(seed, *row, branch, d, rate) for d in range(width)] for row in rows]


def test_every_word_of_the_key_counts_and_nothing_else():
    rows = [(3, 0, 0, 0), (3, 0, 1, 0), (3, 1, 0, 0), (4, 0, 0, 0), (3, 0, 0, 1)]
    whole = masks(rows)
    assert len({tuple(row) for row in whole.tolist()}) == 5
    for change in ({"seed": 6}, {"branch": 2}):
        assert not (masks(rows, **change) == whole).all(1).any(), change
    order = [2, 0, 3]
    assert torch.equal(masks([rows[n] for n in order]), whole[order])
    assert torch.equal(masks(rows, width=9), whole[:, :9])


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
def test_mean_and_variance_are_those_of_independent_draws(rate):
    size, width = 400, 500
    gone = masks([(n, 0, n % 7, 0) for n in range(size)], rate, width=width).double()
    spread = (rate * (1 - rate)) ** 0.5
    assert abs(gone.mean() - rate) < 4 * spread / (size * width) ** 0.5
    for axis, count in ((0, size), (1, width)):
        means = gone.mean(axis)  # of one number over tokens, of one token over numbers
        assert means.std() == pytest.approx(spread / count**0.5, rel=0.2)
    centred = (gone - rate) / spread
    for shift in (1, 2, 3, 4):  # neighbours share a hash
        for axis in (0, 1):
            product = centred.narrow(axis, shift, gone.shape[axis] - shift)
            product = product * centred.narrow(axis, 0, gone.shape[axis] - shift)
            assert abs(product.mean()) < 5 / (size * width) ** 0.5
    other = (masks([(n, 0, n % 7, 0) for n in range(size)], rate, width=width, branch=2).double() - rate) / spread
    assert abs((centred * other).mean()) < 5 / (size * width) ** 0.5


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_the_network_drops_where_branches_join_the_stream(kernel):
    """Two segments, against blocks written out with masks of the plain equation."""
    model, rate = network(), 0.25
    model.set_attn_implementation(kernel)
    rows = [(8, 2, position, 0) for position in range(5)] + [(9, 1, 4 + position, 1) for position in range(3)]
    ids_T, packing = torch.arange(10, 18), Packing((5, 3))

    def joined(branch_TD, branch):
        gone = [[is_dropped(11, *row, branch, d, rate) for d in range(30)] for row in rows]
        return branch_TD.masked_fill(torch.tensor(gone), 0) / (1 - rate)

    rotary = rotary_angles(packing.positions(), model.config.head_dim, model.config.rope_theta)
    hidden_TD = model.model.embed_tokens(ids_T)
    for layer, block in enumerate(model.model.layers):
        attended = block.self_attn.attend(*block.pre_attention(hidden_TD, rotary, None), packing)
        hidden_TD = hidden_TD + joined(block.self_attn.o_proj(attended), 2 * layer)
        hidden_TD = hidden_TD + joined(block.mlp(block.post_attention_layernorm(hidden_TD)), 2 * layer + 1)
    plain_TD = model.model.packed(ids_T, packing)
    random_state = torch.random.get_rng_state()
    dropout = Dropout(model, rate, 11)
    dropout.begin(places(*rows), CPU)
    torch.testing.assert_close(model.model.packed(ids_T, packing), model.model.norm(hidden_TD))
    assert not torch.allclose(plain_TD, model.model.norm(hidden_TD))
    model.eval()
    assert torch.equal(model.model.packed(ids_T, packing), plain_TD)
    assert torch.equal(torch.random.get_rng_state(), random_state)


@pytest.mark.parametrize(("causal", "views"), [(False, 1), (True, 1), (False, 2)])
def test_a_batch_says_where_its_tokens_come_from(data, causal, views):
    shards = Shards.open(data / "train")
    noise = Noise(band=(EPSILON, 1 - EPSILON), complementary=views == 2)
    plan = Batches(shards, 32, 6, 0, split_probability=0.9, noise=noise).plan(20)
    expected = {
        (s.sample, s.epoch, s.offset + n, s.complement): int(shards.read_all([(s.start + n, 1)])[0])
        for sample in plan
        for s in sample
        for n in range(s.size)
    }
    found = {}
    for batch in noisy_batches(plan, 2, shards, 0, 20, causal=causal, noise=noise):
        keys = zip(*(column.tolist() for column in batch.places), strict=True)
        found |= dict(zip(keys, batch.clean_T.tolist(), strict=True))
    assert found == expected
    assert len(found) == 6 * 32


@pytest.mark.slow
def test_only_training_drops_and_no_file_knows(make_recipe):
    """With a rate of 0 the weights stay, so that validation must be the same."""
    records, files = [], []
    for dropout in (0.0, 0.4):
        still = {"steps": 2, "learning_rate": 0.0, "final_learning_rate": 0.0, "validate_every": 1}
        recipe = make_recipe(str(dropout), validation="held_out", dropout=dropout, **still)
        model = train(recipe).model
        records.append(read_metrics(Path(recipe.output) / "metrics.jsonl"))
        files.append((json.loads((model / "config.json").read_text()), load_file(model / "model.safetensors")))
    plain, dropping = records
    assert [r["validation_loss"] for r in plain] == [r["validation_loss"] for r in dropping]
    assert all(a["loss"] != b["loss"] for a, b in zip(plain, dropping, strict=True))
    assert files[0][0] == files[1][0]
    assert files[0][1].keys() == files[1][1].keys()


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["illada", "llada"])
def test_an_adapter_is_trained_with_dropout_too(make_recipe, rule):
    base = train(make_recipe("base", steps=2)).model
    losses = []
    for dropout, passes in ((0.0, 2), (0.4, 2), (0.4, 4)):
        recipe = make_recipe(
            f"{dropout} {passes}", "chat", start=base, steps=3, rule=rule, dropout=dropout, samples_per_batch=passes
        )
        recipe.lora.rank = 2
        train(recipe)
        losses.append([r["loss"] for r in read_metrics(Path(recipe.output) / "metrics.jsonl")])
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=3e-5)  # the branches of a new base are weak


def test_what_does_not_work_is_refused_in_one_line(make_recipe):
    for rate in (-0.1, 1.0):
        with pytest.raises(IlladaError, match=r"^training\.dropout is .*: it must be between 0 and 0\.99999$"):
            make_recipe(dropout=rate).check()
    recipe = make_recipe(dropout=0.1)
    recipe.parallel.compile = True
    with pytest.raises(IlladaError, match=r"^training\.dropout and parallel\.compile do not go together: take one"):
        recipe.check()
