"""Kernels of other libraries in place of our own operations, in a model that knows nothing of them.

| recipe | what it is |
|---|---|
| `parallel.attention` varlen | torch's flash attention over packed segments, one call for all of them |
| `parallel.kernels` liger | norms, rotations and SwiGLU of every block as one kernel each (Liger, arXiv 2410.10989) |
| `training.cross_entropy` cut | head and cross-entropy without logits in memory (cut cross-entropy, arXiv 2411.09009) |
| `training.dtype` fp8 | products of the blocks' linear layers in FP8 with dynamic scales (torchao) |

The first two change no more than the order of sums; the others are coarser, so only a recipe that names them gets them.
Methods are replaced on instances: names and values of parameters stay as they are, and so do checkpoints. One call of a
kernel shows whether it works.

Shape letters: T packed tokens · D width · H query heads · G key/value heads · K head width · M masked tokens ·
V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from illada.diffusion.loss import CrossEntropy, chunked_cross_entropy
from illada.errors import IlladaError, first_line, needs
from illada.model.attention import Packing, packed_attention
from illada.model.config import IlladaConfig
from illada.model.transformer import MLP, Attention, IlladaForMaskedLM, RMSNorm, Rotary
from illada.training.recipe import Recipe

FP8_CAPABILITY = (8, 9)
"""The first CUDA compute capability with FP8 products."""

FP8_WIDTHS = 16
"""Inputs and outputs of an FP8 product are multiples of this."""


def fuse(model: IlladaForMaskedLM, recipe: Recipe, device: torch.device) -> list[str]:
    """Give a model the kernels that a recipe names, and on auto those that work on `device`, if it is CUDA.

    To be called before the weights go into shards. Auto does not choose Liger beside torch.compile, which fuses the
    same operations.

    Returns:
        a line that says which kernels are used and why others are not; no line on a CPU when the recipe names none.

    Raises:
        IlladaError: when the recipe names a kernel that is not installed or does not work here.
    """
    settings, dtype = recipe.parallel, recipe.training.dtype
    gpu, used, left_out = device.type == "cuda", [], []

    def choose(key: str, value: str, name: str, auto: bool, attempt: Callable[[], object]) -> bool:
        """Say whether to use kernel `name`: the recipe names it, or `auto` allows it and it works."""
        if value != name and not (value == "auto" and auto):
            return False
        try:
            attempt()
        except Exception as error:
            problem = f"does not work on {device.type}: {first_line(error)}"
            if isinstance(error, ImportError):
                problem = f"is not installed: pip install 'illada[fused]' ({first_line(error)})"
            if value == name:
                raise IlladaError(f"{key} {name} {problem}") from error
            left_out.append(f"{name} {problem}")
            return False
        used.append(f"{key} {name}")
        return True

    varlen, liger = partial(_try_varlen, model.config, device), partial(_try_liger, device)
    if choose("parallel.attention", settings.attention, "varlen", gpu and dtype != "fp32", varlen):
        model.set_attn_implementation("varlen")
    if choose("parallel.kernels", settings.kernels, "liger", gpu and not settings.compile, liger):
        use_liger(model)
    choose("training.cross_entropy", recipe.training.cross_entropy, "cut", False, partial(_try_cut, device))
    if dtype == "fp8":
        use_fp8(model, device)
        used.append("training.dtype fp8")
    if not used and not left_out:
        return []
    return ["; ".join([f"fused kernels: {', '.join(used) or 'none'}", *left_out])]


def trials(device: torch.device) -> dict[str, str | None]:
    """Return for each kernel why it does not work on a device, or None where it works."""
    attempts: dict[str, Callable[[], object]] = {
        "varlen attention": partial(_try_varlen, IlladaConfig.preset("1m"), device),
        "Liger's kernels": partial(_try_liger, device),
        "cut cross-entropy": partial(_try_cut, device),
    }
    found: dict[str, str | None] = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = None
        except Exception as error:
            missing = "not installed: pip install 'illada[fused]'"
            found[name] = missing if isinstance(error, ImportError) else f"not on {device.type}: {first_line(error)}"
    return found


def use_liger(model: IlladaForMaskedLM) -> None:
    """Let Liger's kernels compute norms, rotations and SwiGLU; they compute in fp32 inside, as ours do."""
    ops = import_module("liger_kernel.ops")
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.forward = partial(_norm, ops, module)  # type: ignore[method-assign]
        elif isinstance(module, MLP):
            module.forward = partial(_swiglu, ops, module)  # type: ignore[method-assign]
        elif isinstance(module, Attention):
            module.ask = partial(_ask, ops, module, module.ask)  # type: ignore[method-assign]


def _norm(ops: Any, norm: RMSNorm, hidden_TD: Tensor) -> Tensor:
    # "llama": cast back before the gain. In place (True), because nothing else needs the incoming gradient.
    return ops.LigerRMSNormFunction.apply(hidden_TD, norm.weight, norm.eps, 0.0, "llama", True)


def _swiglu(ops: Any, mlp: MLP, hidden_TD: Tensor) -> Tensor:
    return mlp.down_proj(ops.LigerSiLUMulFunction.apply(mlp.gate_proj(hidden_TD), mlp.up_proj(hidden_TD)))


def _ask(
    ops: Any,
    attention: Attention,
    ours: Callable[..., Any],
    hidden_TD: Tensor,
    rotary: Rotary,
    asking_M: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace `Attention.ask`; Liger rotates queries and keys together, so ours computes where only some ask."""
    if asking_M is not None:
        return ours(hidden_TD, rotary, asking_M)
    heads = (-1, attention.head_dim)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    query_THK, key_TGK, value_TGK = (project(hidden_TD).unflatten(-1, heads) for project in projections)
    # Liger rotates in place. Selective recomputation keeps the projections and would rotate them twice, hence copies.
    query_1HTK, key_1GTK = (x.clone()[None].transpose(1, 2) for x in (query_THK, key_TGK))
    half = attention.head_dim // 2
    cos_TK, sin_TK = rotary[0][:, 0, :half], rotary[1][:, 0, half:]
    rotated = ops.LigerRopeFunction.apply(query_1HTK, key_1GTK, cos_TK, sin_TK, None, 1, attention.head_dim)
    return rotated[0].transpose(1, 2)[0], rotated[1].transpose(1, 2)[0], value_TGK


def cut_cross_entropy(
    hidden_MD: Tensor, head_VD: Tensor, target_M: Tensor, weight_M: Tensor, entropy_M: Tensor | None = None
) -> Tensor:
    """Compute `chunked_cross_entropy` without ever holding logits, in bf16 or fp16.

    Gradients are added up in that type too, over blocks of 128 ids or rows (version 25.1.1): with 155,136 ids in bf16
    the gradient of the rows is 10 % off where ours is 0.3 % (docs/log.md).

    Every gradient is computed. By default the library leaves out blocks of probabilities below 2^-12; its paper found
    that this costs perplexity in pre-training, because rare tokens then learn nothing.
    """
    linear_cross_entropy = import_module("cut_cross_entropy").linear_cross_entropy
    device = hidden_MD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_MD.dtype
    with torch.autocast(device, enabled=False):
        loss_M = linear_cross_entropy(
            hidden_MD.to(dtype), head_VD.to(dtype), target_M, reduction="none", filter_eps=None
        )
        if entropy_M is not None:
            entropy_M.copy_(loss_M.detach())
        return (loss_M * weight_M.float()).sum()


CROSS_ENTROPIES: dict[str, CrossEntropy] = {"chunked": chunked_cross_entropy, "cut": cut_cross_entropy}
"""By the names of training.cross_entropy."""


def use_fp8(model: IlladaForMaskedLM, device: torch.device, emulate: bool = False) -> None:
    """Let the linear layers of the blocks multiply in FP8, forward and backward; head and embedding stay as they are.

    Each tensor has one scale, computed at every product. Weights keep their values, types and names.

    Args:
        model: changed in place, before its weights go into shards.
        device: where the model will compute.
        emulate: round as FP8 does, on any device, for tests.

    Raises:
        IlladaError: when torchao is missing, or the device or a width does not allow it.
    """
    if not emulate and (device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY):
        raise IlladaError(
            "training.dtype fp8 needs a GPU of compute capability 8.9 or newer (H100, L40S, RTX 4090): take bf16"
        )
    with needs("fused", "training.dtype fp8"):
        float8 = import_module("torchao.float8")
    for name, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear) and any(width % FP8_WIDTHS for width in module.weight.shape):
            raise IlladaError(
                f"training.dtype fp8 needs widths that are multiples of {FP8_WIDTHS}, but {name} is "
                f"{module.out_features} x {module.in_features}: take bf16"
            )
    # Padding, because the number of tokens is a width too, in the product that gives the weights' gradient.
    config = float8.Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    float8.convert_to_float8_training(model.model.layers, config=config)


def _try_varlen(config: IlladaConfig, device: torch.device) -> None:
    sizes = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    half: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
    query_THK, key_TGK, value_TGK = (torch.zeros(2, heads, config.head_dim, **half) for heads in sizes)
    packed_attention(query_THK, key_TGK, value_TGK, Packing((1, 1)), "varlen").sum().backward()


def _try_liger(device: torch.device) -> None:
    ops = import_module("liger_kernel.ops")
    hidden_TD = torch.ones(1, 16, device=device, requires_grad=True)
    _norm(ops, RMSNorm(16, 1e-5).to(device), hidden_TD).sum().backward()


def _try_cut(device: torch.device) -> None:
    hidden_MD, head_VD = (torch.ones(1, 16, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    target_M = torch.zeros(1, dtype=torch.int64, device=device)
    cut_cross_entropy(hidden_MD, head_VD, target_M, torch.ones(1, device=device)).backward()
