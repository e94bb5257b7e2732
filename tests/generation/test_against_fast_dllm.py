"""Decoding with caches beside Fast-dLLM's own functions (arXiv:2505.22618), on the same weights.

ILLADA_FAST_DLLM names a checkout of NVlabs/Fast-dLLM: the repository carries no code of theirs. Their functions run on
our network behind the adapter of `illada bench generate --outside`, and on their own network where einops is installed,
which it needs. Two things differ: theirs commits MASK where the model says so, ours never does; theirs compares a
probability in fp64 with the threshold, ours in fp32, which shows at threshold 1.
"""

import ast
import importlib
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from illada.bench.external import OutsideModel
from illada.bench.samplers import cut
from illada.generation.engine import generate
from illada.generation.settings import GenerationSettings
from illada.model.released import LLADA_TENSORS

PROMPTS = [[9], [7, 8], [30] * 11, [*range(6, 40)], [12, 50, 3, 44, 21, 6], [60, 33, 17]]
FUNCTIONS = {"dual": "generate_with_dual_cache", "prefix": "generate_with_prefix_cache", "none": "generate"}
ENDS = (7, 20, 41)


@pytest.fixture(scope="module")
def folder():
    """Their folder for LLaDA."""
    if not os.environ.get("ILLADA_FAST_DLLM"):
        pytest.skip("set ILLADA_FAST_DLLM to a checkout of NVlabs/Fast-dLLM")
    return Path(os.environ["ILLADA_FAST_DLLM"]) / "llada"


@pytest.fixture(scope="module")
def theirs(folder):
    """Their functions by name."""
    source = ast.parse((folder / "generate.py").read_text())
    found = [node for node in source.body if isinstance(node, ast.FunctionDef) and node.name != "main"]
    space = {"torch": torch, "F": torch.nn.functional, "np": np}
    exec(compile(ast.Module(found, []), "generate.py", "exec"), space)
    return space


@pytest.fixture(scope="module")
def sure(build_model):
    """A model sure enough of itself for a threshold to commit several tokens at once, and never of MASK."""
    model = build_model(False, 5, initializer_range=0.5, num_key_value_heads=4)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
        model.lm_head.weight[model.config.mask_token_id] = 0
    return model


@pytest.fixture(scope="module", params=["adapter", "their network"])
def network(request, folder, sure):
    """What their functions call, with our weights."""
    if request.param == "adapter":
        return OutsideModel(sure, 10**9)
    pytest.importorskip("einops", reason="their network needs einops")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        theirs = importlib.import_module("model.modeling_llada")
    c, names = sure.config, {"block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms", "rope": True}
    config = theirs.LLaDAConfig(
        **names,
        d_model=c.hidden_size,
        mlp_hidden_size=c.intermediate_size,
        n_layers=c.num_hidden_layers,
        n_heads=c.num_attention_heads,
        max_sequence_length=c.max_position_embeddings,
        vocab_size=c.vocab_size,
        embedding_size=c.vocab_size,
        rope_theta=c.rope_theta,
        rms_norm_eps=c.rms_norm_eps,
        use_cache=False,
        **dict.fromkeys(("include_bias", "include_qkv_bias", "weight_tying", "alibi", "attention_layer_norm"), False),
        **dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), 0.0),
    )
    config.use_cache = False  # transformers 4 gave it to every configuration
    model, ours = theirs.LLaDAModelLM(config).eval(), sure.state_dict()

    def place(name):
        [(pattern, own)] = [pair for pair in LLADA_TENSORS.items() if re.search(pair[0], name)]
        return ours[re.sub(pattern, own, name)]

    model.load_state_dict({name: place(name) for name in model.state_dict()})
    return model


@pytest.mark.weights
@pytest.mark.parametrize("cache", FUNCTIONS)
@pytest.mark.parametrize("block", [2, 4, 6, 12, 24])
@pytest.mark.parametrize("rule", [{}, {"passes": 2}, *({"threshold": p} for p in (0.3, 0.6, 0.9, 0.99))])
def test_tokens_and_forwards_are_fast_dllms(theirs, network, sure, cache, block, rule):
    """Theirs answers one prompt at a time, ours all together; with a cache theirs never takes one pass for a block."""
    blocks, passes = 24 // block, rule.get("passes")
    theirs_rule = {"steps": passes * blocks if passes else 24, "threshold": rule.get("threshold")}
    settings = GenerationSettings(
        24,
        block,
        steps_per_block=passes,
        threshold=rule.get("threshold"),
        later_masks=True,
        cache=cache,
        eos_token_id=None,
    )
    events = []
    answers = generate(sure, PROMPTS, settings, on_step=events.append)
    ended = generate(sure, PROMPTS, GenerationSettings(**{**vars(settings), "eos_token_id": ENDS}))
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        x, forwards = theirs[FUNCTIONS[cache]](
            network,
            torch.tensor([prompt]),
            gen_length=24,
            block_length=block,
            mask_id=sure.config.mask_token_id,
            **theirs_rule,
        )
        written = x[0, len(prompt) :].tolist()
        assert sure.config.mask_token_id not in written
        assert answer.ids == written
        in_one = blocks - len({event.block for event in events if event.row == row and event.step == 1})
        assert answer.forwards == forwards - in_one * (cache != "none")
        assert ended[row].ids == cut(written, ENDS)
