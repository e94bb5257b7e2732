"""How a model is named and loaded; free of torch, so that the command line can show it at once."""

from typing import Literal

Dtype = Literal["auto", "fp32", "bf16", "fp16"]


Quantization = Literal["int8", "int4", "int8-bnb", "nf4"]
