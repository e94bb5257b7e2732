import math
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from illada.errors import IlladaError
from illada.model.attention import Packing, packed_attention
from illada.model.config import IlladaConfig
from illada.model.transformer import IlladaForMaskedLM, IlladaModel

HYPOTHESIS = settings(deadline=None, max_examples=15, derandomize=True)
ids_strategy = st.lists(st.integers(0, 63), min_size=2, max_size=12)


def plain_norm(x, gain, eps):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * gain


def plain_logits(model, ids, positions=None):
    """The forward pass of spec §1 in float64, one head at a time; a rotary pair is a complex number."""
    config, weights = model.config, {name: w.double() for name, w in model.state_dict().items()}
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    position = torch.tensor(list(range(len(ids))) if positions is None else positions, dtype=torch.float64)
    frequency = config.rope_theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    turn = torch.polar(torch.ones(len(ids), width // 2, dtype=torch.float64), position[:, None] * frequency)

    def rotated(x):
        y = torch.complex(x[:, : width // 2], x[:, width // 2 :]) * turn
        return torch.cat((y.real, y.imag), dim=-1)

    x = weights["model.embed_tokens.weight"][ids]
    for n in range(config.num_hidden_layers):
        layer = {k.removeprefix(f"model.layers.{n}."): w for k, w in weights.items() if f".layers.{n}." in k}
        normed = plain_norm(x, layer["input_layernorm.weight"], config.rms_norm_eps)
        q, k, v = (normed @ layer[f"self_attn.{name}_proj.weight"].T for name in "qkv")
        outs = []
        for head in range(heads):
            group = head * groups // heads
            query = rotated(q[:, head * width : (head + 1) * width])
            key = rotated(k[:, group * width : (group + 1) * width])
            value = v[:, group * width : (group + 1) * width]
            outs.append((query @ key.T / math.sqrt(width)).softmax(-1) @ value)
        x = x + torch.cat(outs, dim=-1) @ layer["self_attn.o_proj.weight"].T
        normed = plain_norm(x, layer["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = normed @ layer["mlp.gate_proj.weight"].T
        up = normed @ layer["mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ layer["mlp.down_proj.weight"].T
    return plain_norm(x, weights["model.norm.weight"], config.rms_norm_eps) @ weights["lm_head.weight"].T


@torch.no_grad()
def logits(model, ids, **more):
    return model(torch.tensor([ids]), **more).logits[0]


@pytest.mark.parametrize(
    "shape", [{}, {"num_key_value_heads": 1}, {"num_key_value_heads": 4}, {"head_dim": 6}, {"rope_theta": 50.0}]
)
def test_logits_are_those_of_the_plain_forward_pass(build_model, shape):
    model = build_model(tie=False, seed=5, **shape)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    ids = [3, 40, 5, 5, 17, 63, 0, 1, 22]
    torch.testing.assert_close(logits(model, ids).double(), plain_logits(model, ids), rtol=1e-4, atol=1e-4)
    positions = [7, 3, 90, 0, 4, 5, 6, 11, 12]
    got = logits(model, ids, position_ids=torch.tensor([positions]))
    torch.testing.assert_close(got.double(), plain_logits(model, ids, positions), rtol=1e-4, atol=1e-4)
    assert (got - logits(model, ids)).abs().max() > 1e-2


@HYPOTHESIS
@given(ids_strategy, st.data())
def test_every_position_sees_every_other(tied, ids, data):
    changed = list(ids)
    place = data.draw(st.integers(0, len(ids) - 1))
    changed[place] = (ids[place] + data.draw(st.integers(1, 63))) % 64
    difference = (logits(tied, ids) - logits(tied, changed)).abs().amax(-1)
    assert (difference > 0).all()


@HYPOTHESIS
@given(st.lists(ids_strategy, min_size=2, max_size=5), st.data())
def test_nothing_crosses_a_segment(tied, rows, data):
    lengths = [len(row) for row in rows]
    packing = Packing(tuple(lengths))
    other = data.draw(st.integers(0, len(rows) - 1))
    replaced = [[(x + 7) % 64 for x in row] if n == other else row for n, row in enumerate(rows)]
    with torch.no_grad():
        before, after = (
            tied.model.packed(torch.tensor([x for row in r for x in row]), packing).split(lengths)
            for r in (rows, replaced)
        )
        for n, row in enumerate(rows):
            # Positions restart: a segment is what it is alone.
            alone = tied.model(torch.tensor([row])).last_hidden_state[0]
            torch.testing.assert_close(before[n], alone, rtol=1e-5, atol=1e-5)
            if n != other:
                torch.testing.assert_close(before[n], after[n], rtol=0, atol=0)
            else:
                assert (before[n] - after[n]).abs().max() > 1e-3


@HYPOTHESIS
@given(st.lists(ids_strategy, min_size=1, max_size=4), st.integers(0, 63), st.data())
def test_padding_and_company_change_nothing(untied, rows, filler, data):
    longest = max(map(len, rows)) + 3
    ids = torch.full((len(rows), longest), filler)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    places = []
    for n, row in enumerate(rows):
        # Padding left, right, on both sides, or holes in the middle.
        place = sorted(data.draw(st.permutations(range(longest)))[: len(row)])
        ids[n, place], mask[n, place] = torch.tensor(row), 1
        places.append(place)
    with torch.no_grad():
        got = untied(ids, attention_mask=mask).logits
    for n, row in enumerate(rows):
        torch.testing.assert_close(got[n, places[n]], logits(untied, row), rtol=1e-5, atol=2e-5)


def test_cu_seqlens_divide_the_flattened_rows(tied):
    ids = torch.arange(12).view(2, 6)
    cu = torch.tensor([0, 4, 4, 9, 12])
    with torch.no_grad():
        got = tied(ids, cu_seqlens=cu).logits.flatten(0, 1)
    for a, b in ((0, 4), (4, 9), (9, 12)):
        torch.testing.assert_close(got[a:b], logits(tied, list(range(a, b))), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="not both"):
        tied(ids, attention_mask=torch.ones_like(ids), cu_seqlens=cu)
    with pytest.raises(ValueError, match="hold 11 tokens but 12"):
        tied(ids, cu_seqlens=torch.tensor([0, 11]))
    for bad in ([1, 12], [0, 7, 5, 12], []):
        with pytest.raises(ValueError, match="cu_seqlens"):
            tied(ids, cu_seqlens=bad)


@pytest.mark.parametrize("shape", [(1, 0), (0, 4), (3, 0)])
def test_empty_input_gives_empty_logits(tied, shape):
    ids = torch.zeros(shape, dtype=torch.int64)
    assert tied(ids).logits.shape == (*shape, 64)
    assert tied(ids, attention_mask=torch.ones_like(ids)).logits.shape == (*shape, 64)


def test_a_row_of_padding_alone_is_harmless(tied):
    ids = torch.ones(2, 4, dtype=torch.int64)
    with torch.no_grad():
        got = tied(ids, attention_mask=torch.tensor([[0, 0, 0, 0], [0, 1, 1, 0]])).logits
    assert got.isfinite().all()
    torch.testing.assert_close(got[1, 1:3], logits(tied, [1, 1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tie", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(build_model, tie):
    gradients = []
    for checkpointing in (False, True):
        model = build_model(tie, seed=3).train()
        blocks = []
        for block in model.model.layers:
            block.mlp.register_forward_pre_hook(lambda *_, seen=blocks: seen.append(1))
        if checkpointing:
            model.activation_checkpointing_enable()
        model(torch.arange(24).view(2, 12)).logits.logsumexp(-1).mean().backward()
        assert len(blocks) == (4 if checkpointing else 2)  # every block again in the backward pass
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0, msg=name)


@HYPOTHESIS
@given(st.data())
def test_wanted_positions_are_those_of_all(tied, data):
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any))
    wanted = [np.array(sorted(data.draw(st.sets(st.integers(0, n - 1))) if n else []), dtype=np.int64) for n in lengths]
    ids = torch.arange(sum(lengths)) % 64
    starts = [0, *accumulate(lengths)]
    at = [start + int(i) for start, positions in zip(starts, wanted, strict=False) for i in positions]
    with torch.no_grad():
        all_states = tied.model.packed(ids, Packing(tuple(lengths)))
        states = tied.model.packed(ids, Packing(tuple(lengths)), wanted=wanted)
    torch.testing.assert_close(states, all_states[at], atol=1e-5, rtol=1e-5)


@HYPOTHESIS
@given(st.lists(st.integers(0, 4), max_size=12))
def test_groups_and_positions_cover_the_tokens(lengths):
    packing = Packing(tuple(lengths))
    assert Packing.from_cu_seqlens([0, *accumulate(lengths)]) == packing
    assert packing.tokens == sum(lengths)
    assert packing.positions().tolist() == [i for length in lengths for i in range(length)]
    assert [group.length for group in packing.groups for _ in range(group.segments)] == [n for n in lengths if n]
    assert all(a.length != b.length for a, b in zip(packing.groups, packing.groups[1:], strict=False))


def test_heads_of_a_group_share_their_key(tied):
    query, key, value = torch.randn(3, 4, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    got = packed_attention(query, key, value, Packing((3,)))
    wide = packed_attention(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), Packing((3,)))
    torch.testing.assert_close(got, wide)


# Configuration and initial weights


@pytest.mark.parametrize(
    ("name", "total", "inner"),
    [("illada-8b", 7_615_025_152, 6_979_588_096), ("llada-8b", 8_015_581_184, 6_979_588_096)],
)
def test_presets_have_the_published_sizes(name, total, inner):
    with torch.device("meta"):
        model = IlladaForMaskedLM(IlladaConfig.preset(name))
    assert model.num_parameters() == sum(p.numel() for p in model.parameters()) == total
    outer = {id(p): p.numel() for p in (model.model.embed_tokens.weight, model.lm_head.weight)}
    assert total - sum(outer.values()) == inner
    assert model.num_parameters(exclude_embeddings=True) in (inner, total - model.model.embed_tokens.weight.numel())


def test_parameters_carry_the_names_of_llama(tied, untied):
    layer = ["input_layernorm", "post_attention_layernorm", *(f"self_attn.{n}_proj" for n in "qkvo")]
    layer += [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    names = {f"model.layers.{n}.{part}.weight" for n in range(2) for part in layer}
    names |= {"model.embed_tokens.weight", "model.norm.weight"}
    assert {name for name, _ in tied.named_parameters()} == names
    assert {name for name, _ in untied.named_parameters()} == names | {"lm_head.weight"}


@pytest.mark.parametrize("tie", [True, False])
def test_initial_weights(tie):
    torch.manual_seed(0)
    config = IlladaConfig(
        vocab_size=2000,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
        initializer_range=0.05,
    )
    model = IlladaForMaskedLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert (weight == 1).all()
            continue
        if "embed_tokens" in name:
            assert (weight[1] == 0).all()
            part, std = weight[2:], 1 / math.sqrt(2 * 128)
        elif "o_proj" in name or "down_proj" in name:
            part, std = weight, 0.05 / math.sqrt(2 * 8)
        else:
            part, std = weight, 0.05
        assert abs(part.std().item() / std - 1) < 0.03, name
        assert abs(part.mean().item()) < 5 * std / math.sqrt(part.numel()), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    ends = {name.rsplit(".", 2)[1] for name, p in model.named_parameters() if name.endswith("bias")}
    assert not ends


def test_small_presets_build_and_take_overrides():
    for name in ("1m", "5m", "15m", "50m"):
        with torch.device("meta"):
            model = IlladaForMaskedLM(IlladaConfig.preset(name))
        size = model.num_parameters() - model.model.embed_tokens.weight.numel()
        assert 0.7 < size / (int(name[:-1]) * 1e6) < 1.3, (name, size)
    assert IlladaConfig.preset("1m", vocab_size=300, num_hidden_layers=2).num_hidden_layers == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 30}, "not a multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"head_dim": 7}, "odd"),
        ({"mask_token_id": 64}, "mask_token_id 64 is outside"),
        ({"mask_token_id": -1}, "mask_token_id -1 is outside"),
        ({"pad_token_id": 64}, "pad_token_id 64 is outside"),
        ({"eos_token_id": [2, 99]}, "eos_token_id 99 is outside"),
        ({"bos_token_id": -2}, "bos_token_id -2 is outside"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": -2}, "num_key_value_heads is -2"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"intermediate_size": -8}, "intermediate_size is -8"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    ],
)
def test_impossible_shapes_are_refused(build_model, changes, words):
    with pytest.raises(IlladaError, match=words) as caught:
        build_model(True, 0, **changes)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_is_refused():
    with pytest.raises(IlladaError, match=r"no preset '2m': choose one of 1m, .*llada-8b"):
        IlladaConfig.preset("2m")


def test_missing_head_counts_are_filled_in():
    config = IlladaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=None, head_dim=None)
    assert (config.num_key_value_heads, config.head_dim) == (4, 16)


def test_the_trunk_is_the_model_without_its_head(tied):
    ids = torch.arange(10)[None]
    trunk = IlladaModel(tied.config)
    trunk.load_state_dict(tied.model.state_dict())
    with torch.no_grad():
        assert torch.equal(trunk(ids).last_hidden_state @ tied.lm_head.weight.T, tied(ids).logits)
