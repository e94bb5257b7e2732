"""How a model is named and loaded; free of torch, so that the command line can show it at once."""

from dataclasses import dataclass
from typing import Literal

Dtype = Literal["auto", "fp32", "bf16", "fp16"]
"""Type of the weights; auto is the checkpoint's own."""

Quantization = Literal["int8", "int4", "int8-bnb", "nf4"]
"""How weights are made smaller while loading (see `illada.weights.quantize`)."""

LIBRARIES: dict[str, str] = {
    "int8": "torchao",
    "int4": "openvino",
    "int8-bnb": "bitsandbytes",
    "nf4": "bitsandbytes",
}
"""The package that multiplies by each kind of weights, on a CPU."""


@dataclass(frozen=True)
class ModelOptions:
    """Which model to load, and how.

    Args:
        model: model or run folder, or a hub name (GSAI-ML/iLLaDA-8B-Instruct).
        dtype: of the weights; auto is the checkpoint's own.
        device: to run on; auto takes a GPU where there is one.
        quantize: weights of the blocks in 8 or 4 bits, made while loading (the latter two by bitsandbytes).
    """

    model: str
    dtype: Dtype = "auto"
    device: str = "auto"
    quantize: Quantization | None = None
