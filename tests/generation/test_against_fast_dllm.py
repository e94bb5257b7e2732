"""Decoding with caches beside Fast-dLLM's own functions (arXiv:2505.22618), on the same weights.

Their functions are taken from a checkout that an environment variable names: the repository carries no code of theirs.
One case behaves differently by design: theirs commits MASK where the model says so, ours never does.
"""

import ast
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from illada.bench.external import OutsideModel
from illada.bench.samplers import cut
from illada.generation.engine import generate
from illada.generation.settings import GenerationSettings

PROMPTS = [[9], [7, 8], [30] * 11, [*range(6, 40)], [12, 50, 3, 44, 21, 6], [60, 33, 17]]
FUNCTIONS = {"dual": "generate_with_dual_cache", "prefix": "generate_with_prefix_cache"}


@pytest.fixture(scope="module")
def theirs():
    """Their functions by name."""
    if not os.environ.get("ILLADA_FAST_DLLM"):
        pytest.skip("set ILLADA_FAST_DLLM to a checkout of NVlabs/Fast-dLLM")
    source = (Path(os.environ["ILLADA_FAST_DLLM"]) / "llada" / "generate.py").read_text()
    found = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name != "main"]
    space = {"torch": torch, "F": torch.nn.functional, "np": np}
    exec(compile(ast.Module(found, []), "generate.py", "exec"), space)
    return space


@pytest.fixture(scope="module")
def sure(build_model):
    """A model sure enough of itself for a threshold to commit several tokens at once, and never of MASK."""
    model = build_model(False, 5, initializer_range=0.5)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
        model.lm_head.weight[model.config.mask_token_id] = 0
    return model


@pytest.mark.weights
@pytest.mark.parametrize("cache", FUNCTIONS)
@pytest.mark.parametrize("block", [2, 4, 6, 12, 24])
@pytest.mark.parametrize("rule", [{}, {"passes": 2}, *({"threshold": p} for p in (0.3, 0.6, 0.9, 0.99, 1.0))])
def test_tokens_and_forwards_are_fast_dllms(theirs, sure, cache, block, rule):
    """Theirs answers one prompt at a time, ours all together; theirs has one pass more in a block that needs one."""
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
    ended = generate(sure, PROMPTS, GenerationSettings(**{**vars(settings), "eos_token_id": (7, 20, 41)}))
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        x, forwards = theirs[FUNCTIONS[cache]](
            OutsideModel(sure, 1000),
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
        assert answer.forwards == forwards - in_one
        assert ended[row].ids == cut(written, (7, 20, 41))
