"""The losses against the authors' own code, from the user's checkouts: ILLADA_ESPO, ILLADA_D1 and ILLADA_DPARALLEL.

These name folders with ML-GSAI/ESPO, dllm-reasoning/d1 and czg1225/dParallel. Only the functions named here are run;
what they need of their libraries is stood in for.
"""

import ast
import os
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from illada.post_training.bounds import Answer, AnswersObjective, Views
from illada.post_training.certainty import CertaintyObjective, Written, certainty_loss
from illada.post_training.options import DistillSection, RlSection
from illada.post_training.policy import MASKS, objective
from illada.scoring.likelihood import masked_tokens

LENGTH, ANSWERS = 6, 4


def authors(variable, file, *names):
    """Return functions of a checkout by name."""
    if not os.environ.get(variable):
        pytest.skip(f"set {variable} to a checkout that holds {file}")
    tree = ast.parse((Path(os.environ[variable]) / file).read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names]
    for node in found:
        node.decorator_list = []
    space = {"torch": torch, "F": torch.nn.functional, "nanmin": torch.min, "nanmax": torch.max}
    exec(compile(ast.Module(found, []), file, "exec"), space)
    return space


def trainer_like(**values):
    """Return what stands for a trainer of TRL."""
    return SimpleNamespace(
        _step=1,
        control=SimpleNamespace(should_evaluate=False),
        _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(gather_for_metrics=lambda value: value),
        **values,
    )


def answers(model, method, seed):
    """Return answers of one length, our view of them, and what a model says of it."""
    torch.manual_seed(seed)
    ids = torch.randint(6, 60, (ANSWERS, 3 + LENGTH))
    batch = Views.of([Answer(row.numpy(), 3, 7 + n) for n, row in enumerate(ids)], 1, method == "espo", MASKS[method])
    log_p = AnswersObjective(model, torch.device("cpu"), "fp32")(batch).detach()
    return ids, batch, log_p


@pytest.mark.parametrize("seed", range(3))
def test_espo_loss(untied, seed):
    code = authors("ILLADA_ESPO", "espo/espo_trainer.py", "compute_loss", "compute_approx_kl")
    _, batch, log_p = answers(untied, "espo", seed)
    sums, advantage = batch.sums(log_p), torch.randn(ANSWERS)
    old, start = sums + 2 * torch.randn(ANSWERS), sums + 2 * torch.randn(ANSWERS)
    mine = sums.clone().requires_grad_()
    theirs = sums.clone().requires_grad_()
    self = trainer_like(
        args=SimpleNamespace(num_iterations=2, gradient_accumulation_steps=1),
        **{"num_iterations": 2, "num_mc": 1, "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.05},
        _get_elbo_mc=lambda *_, **__: theirs[:, None],
    )
    inputs = {
        "prompt_ids": torch.zeros(ANSWERS, 3, dtype=torch.long),
        "completion_ids": torch.zeros(ANSWERS, LENGTH, dtype=torch.long),
        "mask_seeds": torch.zeros(1, 2, 1),
        "advantages": advantage,
        "old_per_token_logps": old[:, None].repeat(1, 2),
        "ref_per_token_logps": start[:, None].repeat(1, 2),
    }
    expected = code["compute_loss"](self, None, inputs)
    section = RlSection(epsilon=0.2, beta=0.05)
    given = SimpleNamespace(lengths_A=batch.lengths_A, sums=lambda _: mine)
    found = objective(section, given, log_p, old, start, advantage, torch.full((ANSWERS,), 1 / ANSWERS))
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    found.loss.backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_espo_bound_on_the_same_masks(untied):
    """Theirs divides by l / (L + 1), ours by l / L."""
    code = authors("ILLADA_ESPO", "espo/espo_trainer.py", "_get_elbo")
    ids, batch, log_p = answers(untied, "espo", 0)
    mask = untied.config.mask_token_id
    masked = torch.from_numpy(np.concatenate([masked_tokens(LENGTH, 1, 7 + n, True)[0][:1] for n in range(ANSWERS)]))
    assert not masked.all(1).any(), "ours has no complement there: take other seeds"
    hidden = torch.cat([torch.zeros(ANSWERS, 3, dtype=torch.bool), masked], 1)
    p = (masked.sum(1, keepdim=True) / (LENGTH + 1)).expand(ANSWERS, 3 + LENGTH)
    code["forward_process"] = lambda *_, **__: (ids.masked_fill(hidden, mask), p)

    def logits(_, seen):
        with torch.no_grad():
            return untied(seen).logits.index_fill(2, torch.tensor([mask]), -torch.inf)

    self = SimpleNamespace(get_logits=logits, processing_class=SimpleNamespace(mask_token_id=mask))
    theirs = code["_get_elbo"](self, untied, ids[None], LENGTH, [0])[:, 0]
    torch.testing.assert_close(batch.sums(log_p) * (LENGTH + 1) / LENGTH, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_diffu_grpo_loss(untied, seed):
    code = authors("ILLADA_D1", "diffu-grpo/diffu_grpo_trainer.py", "compute_loss")
    _, batch, log_p = answers(untied, "diffu-grpo", seed)
    advantage = torch.randn(ANSWERS)
    old, start = log_p + 0.3 * torch.randn(len(log_p)), log_p + 0.3 * torch.randn(len(log_p))
    mine, theirs = (log_p.clone().requires_grad_() for _ in range(2))
    self = trainer_like(
        args=SimpleNamespace(num_iterations=1),
        **{"num_iterations": 2, "epsilon": 0.2, "beta": 0.05},
        _get_per_token_logps=lambda *_: theirs.view(ANSWERS, LENGTH),
    )
    inputs = {
        "prompt_ids": torch.zeros(ANSWERS, 3, dtype=torch.long),
        "prompt_mask": torch.ones(ANSWERS, 3),
        "completion_ids": torch.zeros(ANSWERS, LENGTH, dtype=torch.long),
        "completion_mask": torch.ones(ANSWERS, LENGTH),
        "mask_seeds": [0],
        "advantages": advantage,
        "old_per_token_logps": old.view(1, ANSWERS, LENGTH),
        "ref_per_token_logps": start.view(1, ANSWERS, LENGTH),
    }
    expected = code["compute_loss"](self, None, inputs)
    section = RlSection(method="diffu-grpo", epsilon=0.2, beta=0.05)
    found = objective(section, batch, mine, old, start, advantage, torch.full((ANSWERS,), 1 / ANSWERS))
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    found.loss.backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("seed", range(3))
def test_dparallel_loss(untied, seed):
    """One answer, as they normalise over a batch; both masks are ours, and MASK is left out as we leave it out."""
    code = authors("ILLADA_DPARALLEL", "LLaDA/llada_train.py", "compute_loss")
    torch.manual_seed(seed)
    ids, mask = torch.randint(6, 60, (3 + 8,)), untied.config.mask_token_id
    answer = Written(ids.numpy(), 3, torch.arange(8).numpy(), 8)
    with torch.no_grad():  # so that something is predicted right
        first, _ = answer.views(DistillSection(), slice(0, 4), 0.5, (seed,))
        place = int(np.flatnonzero(first.asked)[0])
        ids[place] = untied(ids.masked_fill(torch.from_numpy(first.hidden), mask)[None]).logits[0, place].argmax()
    views = answer.views(DistillSection(), slice(0, 4), 0.5, (seed,))
    masked = [torch.from_numpy(view.asked)[None] for view in views]
    noisy = [ids.masked_fill(torch.from_numpy(view.hidden), mask)[None] for view in views]
    code["forward_process_semi_ar"] = lambda *_: (*noisy, *masked)

    def answer_of(input_ids):
        logits = untied(input_ids).logits
        return SimpleNamespace(logits=logits.index_fill(2, torch.tensor([mask]), -1e9))

    self = SimpleNamespace(mask_token_id=mask, temperature=0.5, entropy_weight=2, block_size=4)
    expected = code["compute_loss"](self, answer_of, {"input_ids": ids[None], "prompt_lengths": torch.tensor([3])})
    expected.backward()
    theirs = untied.lm_head.weight.grad.clone()
    untied.zero_grad()
    batch = Views.pack(views, [2, 2])
    said = CertaintyObjective(untied, torch.device("cpu"), "fp32")(batch)
    assert said.right_M.sum() > 0
    found = certainty_loss(batch, said, 2.0, torch.ones(2), torch.ones(2))
    found.loss.backward()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(untied.lm_head.weight.grad, theirs, rtol=1e-3, atol=1e-5)
    untied.zero_grad()
