"""Other libraries' kernels: each beside ours, who chooses them, and what is said where they are absent."""

import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from illada.diffusion.loss import chunked_cross_entropy, masked_loss
from illada.errors import IlladaError
from illada.model.attention import Packing
from illada.training.optional import kernels
from illada.training.optional.estimate import estimate
from illada.training.optional.kernels import CROSS_ENTROPIES, cut_cross_entropy, fuse, use_fp8
from illada.training.optional.options import EstimateOptions
from illada.training.parallel import Objective, recompute
from illada.training.trainer import train
from illada.weights.runs import read_metrics
from process_groups import run_groups

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PACKING = Packing((20, 20, 13))
IDS = torch.arange(53) % 11 + 8
MASKED = torch.arange(53) % 3 > 0
WEIGHT = 1 / torch.linspace(0.001, 1, 53) / 53


# Each kernel beside ours


@pytest.fixture(scope="module")
def interpreter():
    """What pytest says of interpreted.py, whose kernels are known to the interpreter when they are imported."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    words = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "--tb=short", "--show-capture=stdout"]
    file = Path(__file__).with_name("interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run([*words, file], capture_output=True, text=True, check=False, env=environment).stdout


@pytest.mark.parametrize(("library", "tests"), [("liger_kernel", "liger"), ("cut_cross_entropy", "the_cut_loss")])
def test_the_interpreter_finds_kernels_equal_to_ours(interpreter, library, tests):
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    lines = [line for line in interpreter.splitlines() if line.startswith(("PASSED", "FAILED", "ERROR", "SKIPPED"))]
    found = [line for line in lines if tests in line]
    assert len(found) >= 6, interpreter
    assert all(line.startswith("PASSED") for line in found), interpreter


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao.float8")


def test_an_fp8_layer_rounds_as_fp8(build_model, torchao):
    model = build_model(tie=True, seed=3, hidden_size=64)
    plain = model.model.layers[0].mlp.up_proj
    use_fp8(model, CPU, emulate=True)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight is plain.weight
    results = []
    for each in (plain, layer):
        hidden = torch.randn(37, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        layer.weight.grad = None
        out = each(hidden)
        (out * torch.sin(torch.arange(out.numel())).view_as(out)).sum().backward()
        results.append((out.detach(), hidden.grad, layer.weight.grad))
    errors = [float((a - b).norm() / b.norm()) for b, a in zip(*results, strict=True)]
    # Roundings to 3 bits of mantissa, 2 in gradients: 2.6 and 5 % each, two a product.
    assert 0.01 < errors[0] < 0.05, errors
    assert all(0.02 < error < 0.08 for error in errors[1:]), errors


def test_an_fp8_model_is_near_ours_and_has_its_names(build_model, torchao):
    results = []
    for fp8, kind in ((False, "none"), (True, "none"), (True, "selective")):
        model = build_model(tie=True, seed=3, initializer_range=0.02).train()
        names = list(model.state_dict())
        if fp8:
            use_fp8(model, CPU, emulate=True)
        assert list(model.state_dict()) == names
        assert type(model.lm_head) is torch.nn.Linear
        recompute(model, kind)
        loss = masked_loss(model, IDS, MASKED, WEIGHT, PACKING)
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (plain, plain_slope), (near, near_slope), (again, again_slope) = results
    assert near != plain
    assert near == pytest.approx(plain, rel=1e-3)
    assert torch.cosine_similarity(near_slope, plain_slope, 0) > 0.99
    assert again == near
    assert torch.equal(again_slope, near_slope)


@pytest.mark.slow
def test_fp8_trains_in_shards_and_its_checkpoints_have_the_same_names(make_recipe, tmp_path, torchao):
    emulated = (
        "import sys; from functools import partial; from illada.training.optional import kernels\n"
        "kernels.use_fp8 = partial(kernels.use_fp8, emulate=True)\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r}); import groups; groups.main()"
    )
    runs = {
        "bf16 on 1": (1, make_recipe(steps=3, checkpoint_every=2, dtype="bf16")),
        "fp8 on 2": (2, make_recipe(steps=3, checkpoint_every=2, dtype="fp8")),
    }
    ends = run_groups(tmp_path, runs, ("-c", emulated))
    assert not any(any(end["codes"]) for end in ends.values()), ends
    assert "fused kernels: training.dtype fp8" in ends["fp8 on 2"]["said"]
    plain, fp8 = ([record["loss"] for record in read_metrics(tmp_path / name / "metrics.jsonl")] for name in runs)
    assert fp8 != plain
    assert fp8 == pytest.approx(plain, rel=2e-2)
    plain_weights, fp8_weights = (load_file(tmp_path / name / "model" / "model.safetensors") for name in runs)
    assert plain_weights.keys() == fp8_weights.keys()


class Count(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "passes"), [("none", 1), ("selective", 1), ("full", 2)])
def test_selective_recomputation_keeps_what_varlen_attention_gave(build_model, kind, passes):
    with FakeTensorMode():
        model = build_model(tie=True, seed=3).train()
        model.set_attn_implementation("varlen")
        recompute(model, kind)
        with Count() as count, torch.autocast("cpu", torch.bfloat16):
            model.model.packed(torch.zeros(9, dtype=torch.int64), Packing((4, 5))).sum().backward()
    assert count.found["torch_attn::_varlen_attn"] == 2 * passes  # of two layers


# Who chooses


@pytest.fixture
def here(monkeypatch):
    """A machine on which some kernels work: `here("varlen", ...)`; those called `absent-…` are not installed."""

    def make(*names):
        def attempt(name):
            if f"absent-{name}" in names:
                raise ModuleNotFoundError(f"No module named {name!r}")
            if name not in names:
                raise RuntimeError("no driver\nand more")

        for name in ("varlen", "liger", "cut"):
            monkeypatch.setattr(kernels, f"_try_{name}", lambda *_, name=name: attempt(name))
        monkeypatch.setattr(kernels, "use_liger", lambda model: setattr(model, "with_liger", True))

    return make


def test_on_a_cpu_nothing_is_chosen_or_said(build_model, make_recipe, here):
    here("varlen", "liger", "cut")
    model = build_model(tie=True, seed=3)
    assert fuse(model, make_recipe(dtype="bf16"), CPU) == []
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model, "with_liger")


@pytest.mark.parametrize(
    ("works", "dtype", "compile", "attention", "said"),
    [
        (["varlen", "liger"], "bf16", False, "varlen", "parallel.attention varlen, parallel.kernels liger"),
        (["varlen", "liger"], "bf16", True, "varlen", "parallel.attention varlen"),
        (["varlen", "liger"], "fp32", False, "sdpa", "parallel.kernels liger"),
        (
            ["varlen", "absent-liger"],
            "bf16",
            False,
            "varlen",
            "parallel.attention varlen; liger is not installed: pip install 'illada[fused]' (No module named 'liger')",
        ),
        (
            [],
            "bf16",
            False,
            "sdpa",
            "none; varlen does not work on cuda: no driver; liger does not work on cuda: no driver",
        ),
    ],
)
def test_auto_takes_what_works_on_a_gpu(build_model, make_recipe, here, works, dtype, compile, attention, said):
    here(*works)
    model, recipe = build_model(tie=True, seed=3), make_recipe(dtype=dtype)
    recipe.parallel.compile = compile
    assert fuse(model, recipe, CUDA) == [f"fused kernels: {said}"]
    assert model.config._attn_implementation == attention
    assert "varlen" not in model.config.to_json_string()
    assert hasattr(model, "with_liger") == ("liger" in works and not compile)


def test_ours_can_be_asked_for(build_model, make_recipe, here):
    here("varlen", "liger")
    model, recipe = build_model(tie=True, seed=3), make_recipe(dtype="bf16")
    recipe.parallel.attention, recipe.parallel.kernels = "sdpa", "plain"
    assert fuse(model, recipe, CUDA) == []
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("parallel", "attention", "varlen"), ("parallel", "kernels", "liger"), ("training", "cross_entropy", "cut")],
)
def test_what_is_asked_for_and_absent_is_one_clear_error(build_model, make_recipe, here, section, key, value):
    recipe = make_recipe(dtype="bf16")
    setattr(getattr(recipe, section), key, value)
    here(f"absent-{value}")
    with pytest.raises(IlladaError, match=rf"^{section}.{key} {value} is not installed: pip install 'illada\[fused\]'"):
        fuse(build_model(tie=True, seed=3), recipe, CUDA)
    here()
    with pytest.raises(IlladaError, match=rf"^{section}.{key} {value} does not work on cpu: no driver$"):
        fuse(build_model(tie=True, seed=3), recipe, CPU)
    here(value)
    assert fuse(build_model(tie=True, seed=3), recipe, CPU) == [f"fused kernels: {section}.{key} {value}"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it works")
def test_varlen_is_really_tried(build_model, make_recipe):
    recipe = make_recipe(dtype="bf16")
    recipe.parallel.attention = "varlen"
    with pytest.raises(IlladaError, match=r"varlen does not work on cpu: .*take sdpa"):
        fuse(build_model(tie=True, seed=3), recipe, CPU)


def test_the_loss_is_the_chosen_one(build_model):
    model = build_model(tie=True, seed=3)
    assert Objective(model, CPU, "bf16", CROSS_ENTROPIES["cut"]).cross_entropy is cut_cross_entropy
    assert Objective(model, CPU, "bf16").cross_entropy is chunked_cross_entropy


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("parallel", {"kernels": "liger", "compile": True}, "fuse the same operations: choose one"),
        ("parallel", {"attention": "varlen"}, "parallel.attention varlen computes in half precision"),
        ("training", {"cross_entropy": "cut"}, "training.cross_entropy cut computes in half precision"),
    ],
)
def test_what_excludes_each_other_is_refused(make_recipe, section, values, message):
    recipe = make_recipe()
    for name, value in values.items():
        setattr(getattr(recipe, section), name, value)
    with pytest.raises(IlladaError, match=message):
        recipe.check()


def test_fp8_is_refused_where_it_cannot_be(build_model, make_recipe, monkeypatch, torchao):
    model, recipe = build_model(tie=True, seed=3), make_recipe(dtype="fp8")
    with pytest.raises(IlladaError, match=r"fp8 needs a GPU of compute capability 8.9 or newer .*: take bf16"):
        fuse(model, recipe, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(IlladaError, match=r"capability 8\.9"):
        use_fp8(model, CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pytest.raises(IlladaError, match=r"fp8 needs widths that are multiples of 16, but 0.mlp.gate_proj is 40 x 32"):
        use_fp8(build_model(tie=True, seed=3, intermediate_size=40), CUDA)
    use_fp8(model, CUDA)
    assert "Float8Linear" in repr(model.model.layers)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(IlladaError, match=r"fp8 needs torchao: pip install 'illada\[fused\]'"):
        use_fp8(build_model(tie=True, seed=3), CUDA)
    recipe.model.start, recipe.model.preset, recipe.lora.rank = "base", None, 4
    recipe.model.__dict__.update(dict.fromkeys(recipe.model.changes()))
    with pytest.raises(IlladaError, match="fp8 trains whole matrices: take bf16 to train an adapter"):
        recipe.check()


def test_a_run_may_go_on_with_other_kernels(make_recipe, capsys, monkeypatch):
    recipe = make_recipe(steps=2, checkpoint_every=1, dtype="bf16")
    train(recipe)
    recipe.parallel.attention, recipe.parallel.kernels = "sdpa", "plain"
    train(recipe)
    assert "continuing" in capsys.readouterr().err
    recipe.training.cross_entropy = "cut"  # not to rounding
    monkeypatch.setattr(kernels, "_try_cut", lambda device: None)
    with pytest.raises(IlladaError, match=r"another recipe \(training\.cross_entropy differ\)"):
        train(recipe)


@pytest.mark.slow
def test_fp8_is_estimated_as_bf16(make_recipe):
    options = EstimateOptions(gpu="cpu", vocab_size=64)
    half, eighth = (estimate(make_recipe(dtype=dtype), options) for dtype in ("bf16", "fp8"))
    assert eighth.memory == half.memory
