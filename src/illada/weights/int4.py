"""Weights in 4 bits on a CPU (ours): a linear layer that OpenVINO multiplies, and how transformers makes and loads it.

A group of 32 inputs of an output shares a scale and a zero: weight = scale · (level - zero), with levels and zeros from
0 to 15. OpenVINO's kernel rounds the activations to 8 bits, each 32 of a row with a scale of their own, so a row's
result does not depend on the other rows. It computes in fp32, whatever the type of the model.

OpenVINO arranges the weights anew at a layer's first product and keeps that copy: 0.66 bytes a weight. The pages of
the file that they came from are the system's to take back.

Shape letters: N outputs · K inputs · G groups of inputs · M rows.
"""

from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from illada.errors import needs

METHOD = "illada-int4"
"""Names the form of the weights in a config.json."""

GROUP = 32
"""Inputs that share a scale and a zero."""

_SHARES = (1.0, 0.93, 0.86)
"""Shares of a group's range that are tried: a narrower one cuts off outliers for the sake of the others."""

_ROWS = 64
"""Rows of one product: OpenVINO keeps room for the largest for each layer, and more at once are no faster."""

_PRODUCT = Lock()  # a request of OpenVINO's serves one thread


def quantized(weight_NK: Tensor) -> dict[str, Tensor]:
    """Return the parameters of an `Int4Linear` for a weight: weight [N, K/2], scale [N, G] and zero [N, G]."""
    parts = [_quantized(part_CK) for part_CK in weight_NK.split(1024)]  # all rows in fp32 would need much memory
    levels_NK, scale, zero = (torch.cat(kind) for kind in zip(*parts, strict=True))
    return {"weight": levels_NK[:, 1::2] << 4 | levels_NK[:, ::2], "scale": scale, "zero": zero}


def _quantized(weight_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return levels [N, K], scales [N, G] and zeros [N, G]: of several shares of the range, the best for each group."""
    groups = weight_NK.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(2, keepdim=True).clamp_max(0), groups.amax(2, keepdim=True).clamp_min(0)
    step = ((high - low) / 15).clamp_min(1e-30)
    zero = (-low / step).round()
    levels = scale = least = torch.empty(0)
    for share in _SHARES:
        tried = (groups / (step * share) + zero).round_().clamp_(0, 15)
        signed = tried - zero
        fitted = (signed * groups).sum(2, keepdim=True) / signed.square().sum(2, keepdim=True).clamp_min(1)
        error = (signed * fitted - groups).square().sum(2, keepdim=True)
        if share == 1:
            levels, scale, least = tried, fitted, error
        else:
            best = error < least
            levels, scale, least = (
                torch.where(best, new, old) for new, old in ((tried, levels), (fitted, scale), (error, least))
            )
    return levels.to(torch.uint8).flatten(1), scale.squeeze(2), zero.to(torch.uint8).squeeze(2)


class Int4Linear(nn.Linear):
    """A linear layer without bias and gradients; `weight` holds two levels in a byte, the first in the low half.

    Args:
        inputs: K, a multiple of `GROUP`.
        outputs: N.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        self.weight = nn.Parameter(torch.empty(outputs, inputs // 2, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("scale", torch.empty(outputs, inputs // GROUP, dtype=torch.float32))
        self.register_buffer("zero", torch.empty(outputs, inputs // GROUP, dtype=torch.uint8))
        self._request: Any = None

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., K] to [..., N] in the input's type."""
        rows_MK = input.reshape(-1, self.in_features).float().contiguous()
        product_MN = torch.empty(len(rows_MK), self.out_features)
        if rows_MK.numel():
            with _PRODUCT:
                self._multiply(rows_MK, product_MN)
        return product_MN.to(input.dtype).unflatten(0, input.shape[:-1])

    def _multiply(self, rows_MK: Tensor, product_MN: Tensor) -> None:
        tensor = _openvino().Tensor
        self._request = self._request or self._compiled()
        for part_MK, result_MN in zip(rows_MK.split(_ROWS), product_MN.split(_ROWS), strict=True):
            self._request.set_input_tensor(tensor(part_MK.numpy(), shared_memory=True))
            self._request.set_output_tensor(tensor(result_MN.numpy(), shared_memory=True))
            self._request.infer()

    def _compiled(self) -> Any:
        """Return a request to OpenVINO for the product; it reads the parameters where they lie."""
        ov = _openvino()
        groups = [self.out_features, self.in_features // GROUP]

        def constant(values: Tensor, shape: list[int], kind: Any) -> Any:
            return ov.op.Constant(ov.Tensor(values.numpy().reshape(-1), ov.Shape(shape), kind))

        def widened(values: Any) -> Any:
            return ov.opset13.convert(values, "f32")

        levels = widened(constant(self.weight, [*groups, GROUP], ov.Type.u4))
        zero = widened(constant(self.zero, [*groups, 1], ov.Type.u8))
        scaled = ov.opset13.multiply(ov.opset13.subtract(levels, zero), constant(self.scale, [*groups, 1], ov.Type.f32))
        shape = ov.op.Constant(ov.Type.i64, ov.Shape([2]), [self.out_features, self.in_features])
        rows = ov.opset13.parameter([-1, self.in_features], ov.Type.f32)
        weight = ov.opset13.reshape(scaled, shape, special_zero=False)
        product = ov.opset13.matmul(rows, weight, transpose_a=False, transpose_b=True)
        options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
        return _core().compile_model(ov.Model([product], [rows]), "CPU", options).create_infer_request()


def _openvino() -> Any:
    """Import OpenVINO."""
    with needs("quantize", "int4 on a CPU"):
        import openvino
        import openvino.opset13
    return openvino


@cache
def _core() -> Any:
    """Return OpenVINO's runtime."""
    return _openvino().Core()


@register_quantization_config(METHOD)
class Int4Config(QuantizationConfigMixin):
    """What a config.json says of weights in this form."""

    def __init__(self, **_: Any):
        super().__init__(METHOD)


@register_quantizer(METHOD)
class Int4Quantizer(HfQuantizer):
    """Puts an `Int4Linear` in the place of every linear layer of the blocks, and fills it."""

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Raise an error when OpenVINO is missing."""
        _openvino()

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        for path, layer in list(model.model.layers.named_modules()):
            if isinstance(layer, nn.Linear):
                parent, name = get_module_from_name(model.model.layers, path)
                with torch.device("meta"):
                    setattr(parent, name, Int4Linear(layer.in_features, layer.out_features))

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Say whether a tensor is made of one that is read; its shape is for `check_shapes` to look at."""
        layer, _ = get_module_from_name(model, param_name)
        return not self.pre_quantized and isinstance(layer, Int4Linear)

    def get_quantize_ops(self) -> "_Quantize":
        """Return what makes a weight smaller."""
        return _Quantize()

    def is_serializable(self) -> bool:
        """Say that the weights can be written."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Say that they cannot be trained."""
        return False


class _Quantize(ConversionOps):
    """Quantises a weight when it has been read."""

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Tensor]:
        """Return the parameters of the layer, by their names in the model, for the one tensor that was read."""
        path, value = next(iter(input_dict.items()))
        weight = value[0] if isinstance(value, list) else value
        return {f"{path.removesuffix('weight')}{name}": tensor for name, tensor in quantized(weight).items()}
