"""Triton's kernels beside ours on a CPU, in Triton's interpreter: test_kernels.py runs this file in a separate process.

The interpreter (Triton 3.7) lacks three things, which are given to it here: CUDA's own log1p and rsqrt, and floats as
arguments of kernels. It reads bf16 as integers, so half precision is fp16.
"""

import pytest

pytest.importorskip("triton")

import numpy as np
import torch
import triton.language as tl
from safetensors.torch import load_file
from triton.language.extra import libdevice
from triton.runtime import interpreter

from illada.diffusion.loss import chunked_cross_entropy, masked_loss
from illada.model.attention import Packing
from illada.model.transformer import RMSNorm
from illada.training.optional.kernels import _norm, cut_cross_entropy, use_liger
from illada.training.parallel import recompute
from illada.training.trainer import train

convert = interpreter._implicit_cvt


def with_floats(value):
    if isinstance(value, float):
        return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
    return convert(value)


# Not tl.rsqrt itself: the interpreter has its own while a kernel runs.
libdevice.log1p, libdevice.rsqrt = (lambda x: tl.log(1 + x)), (lambda x: 1 / tl.sqrt(x))
interpreter._implicit_cvt = with_floats

PACKING = Packing((4, 4, 3))
IDS = torch.arange(11) % 11 + 8
MASKED = torch.arange(11) % 3 > 0
WEIGHT = 1 / torch.linspace(0.001, 1, 11) / 11


@pytest.fixture
def liger():
    return pytest.importorskip("liger_kernel.ops")


@pytest.fixture
def cut():
    return pytest.importorskip("cut_cross_entropy")


def relative(found, wanted):
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def loss_and_gradients(model, autocast, **how):
    each = torch.zeros(11)
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        loss = masked_loss(model, IDS, MASKED, WEIGHT, PACKING, each, **how)
    loss.backward()
    return loss.detach(), each, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("kind", "autocast"), [("none", False), ("selective", False), ("selective", True)])
def test_liger_is_our_network(build_model, liger, kind, autocast):
    """With selective recomputation too, which must not see what kernels write in place."""
    ours, theirs = build_model(tie=True, seed=3), build_model(tie=True, seed=3)
    use_liger(theirs)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    for model in (ours, theirs):
        recompute(model.train(), kind)
    wanted, wanted_each, slopes = loss_and_gradients(ours, autocast)
    loss, each, found = loss_and_gradients(theirs, autocast)
    worst = max(relative(found[name], slopes[name]) for name in slopes)
    print(f"liger {kind} autocast={autocast}: loss {relative(loss, wanted):.1e}, worst gradient {worst:.1e}")
    assert 0 < worst < (5e-3 if autocast else 1e-5)  # equal to the bit would mean that nothing was replaced
    assert relative(loss, wanted) < (1e-3 if autocast else 1e-6)
    torch.testing.assert_close(each, wanted_each, rtol=0, atol=3e-3 if autocast else 1e-5)


@pytest.mark.parametrize("types", [("float32", "float32"), ("float32", "float16"), ("float16", "float16")])
def test_ligers_norm_casts_as_ours(liger, types):
    """Under FSDP the residual stream is fp32 and gains are rounded; a model in half precision has both so."""
    hidden_type, gain_type = (getattr(torch, name) for name in types)
    norm = RMSNorm(48, 1e-5)
    gain = torch.randn(48).to(gain_type)
    norm.weight = torch.nn.Parameter(gain)
    start = (100 * torch.randn(7, 48)).to(hidden_type)
    slope = torch.randn(7, 48).to(start.dtype)
    results = []
    for forward in (norm, lambda x: _norm(liger, norm, x)):
        hidden = start.clone().requires_grad_()
        norm.weight.grad = None
        out = forward(hidden)
        out.backward(slope.clone())
        results.append((out.detach(), hidden.grad, norm.weight.grad))
    for wanted, found in zip(*results, strict=True):
        assert found.dtype == wanted.dtype
        assert relative(found, wanted) < (2e-3 if "float16" in types else 1e-6)
    if hidden_type == torch.float16:
        assert torch.equal(results[0][0], results[1][0])


def test_a_run_with_liger_is_the_same_run(make_recipe, liger, capsys):
    runs = {}
    for kernels in ("plain", "liger"):
        recipe = make_recipe(kernels, steps=2, samples_per_step=2, samples_per_batch=1, window=8, learning_rate=1e-3)
        recipe.parallel.kernels, recipe.parallel.recompute = kernels, "selective"
        model = train(recipe).model
        runs[kernels] = load_file(model / "model.safetensors")
    assert "fused kernels: parallel.kernels liger" in capsys.readouterr().err
    assert runs["plain"].keys() == runs["liger"].keys()
    for name, wanted in runs["plain"].items():
        torch.testing.assert_close(runs["liger"][name], wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("rows", "vocabulary", "frozen"), [(150, 300, False), (1, 40, False), (9, 300, True)])
def test_the_cut_loss_is_ours(cut, rows, vocabulary, frozen):
    make = torch.Generator().manual_seed(rows)
    hidden, head = (torch.randn(n, 32, generator=make) * s for n, s in ((rows, 1.0), (vocabulary, 0.3)))
    target = torch.randint(vocabulary, (rows,), generator=make)
    weight = 1 / (0.001 + torch.rand(rows, generator=make)) / rows
    half = [x.half().double().requires_grad_() for x in (hidden, head)]
    exact = torch.nn.functional.cross_entropy(half[0] @ half[1].T, target, reduction="none")
    (exact * weight).sum().backward()
    for name, function in (("chunked", chunked_cross_entropy), ("cut", cut_cross_entropy)):
        given, each = [hidden.clone().requires_grad_(), head.clone().requires_grad_(not frozen)], torch.zeros(rows)
        with torch.autocast("cpu", torch.float16):
            loss = function(*given, target, weight, each)
        assert loss.dtype == torch.float32
        (2 * loss).backward()
        errors = [relative(x.grad / 2, y.grad) for x, y in zip(given, half, strict=True) if x.requires_grad]
        print(
            f"{name}, {rows} x {vocabulary}: each {(each - exact).abs().max():.1e}, gradients",
            *(f"{e:.1e}" for e in errors),
        )
        torch.testing.assert_close(each.double(), exact.detach(), rtol=0, atol=3e-3)
        assert relative(loss, (exact * weight).sum()) < 1e-3
        assert max(errors) < 2e-3
        assert (given[1].grad is None) == frozen


def test_the_cut_loss_of_no_rows_is_zero(cut):
    hidden, head = torch.randn(0, 32, requires_grad=True), torch.randn(40, 32, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        loss = cut_cross_entropy(hidden, head, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    loss.backward()
    assert loss == 0
    assert not head.grad.any()


def test_the_cut_loss_leaves_no_small_probability_out(cut):
    """By default the library would give rare tokens no gradient."""
    hidden, head = torch.zeros(8, 32), torch.zeros(300, 32, requires_grad=True)
    hidden[:, 0], start = 1.0, head.detach()
    start[0, 0] = 12.0  # all others have a probability below exp(-12)
    with torch.autocast("cpu", torch.float16):
        cut_cross_entropy(hidden, head, torch.zeros(8, dtype=torch.int64), torch.full((8,), 100.0)).backward()
    assert head.grad[1:, 0].min() > 0


def test_a_model_with_the_cut_loss(build_model, cut):
    ours, theirs = build_model(tie=True, seed=3).train(), build_model(tie=True, seed=3).train()
    wanted, wanted_each, slopes = loss_and_gradients(ours, True)
    loss, each, found = loss_and_gradients(theirs, True, cross_entropy=cut_cross_entropy)
    assert relative(loss, wanted) < 1e-3
    torch.testing.assert_close(each, wanted_each, rtol=0, atol=5e-3)
    assert max(relative(found[name], slopes[name]) for name in slopes) < 5e-3
