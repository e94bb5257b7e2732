"""Quantised inference (ours): the linear layers of the blocks in 8 or 4 bits, through torchao or bitsandbytes.

transformers quantises each tensor as it is read, so no full-precision copy of the model is ever in memory. Norms,
embedding and LM head keep their type: the head gives the confidences that decide what is committed, and it is 8 % of
the 8B model's weights.

    name      library       bits of a weight                      products
    int8      torchao       8, a scale per output                 weights widened each time
    int4      OpenVINO      5.25, scale and zero per 32 inputs    activations in int8 too, a scale per 32 of a row
      on GPUs torchao       5, scale and offset per 32 inputs     a kernel of torch; bf16 only
    int8-bnb  bitsandbytes  8, a scale per output                 LLM.int8(): activations in int8 too, outliers apart
    nf4       bitsandbytes  4.5, normal float per 64 inputs       a kernel where the CPU has AVX-512 BF16

`illada export --quantize` writes such weights; `stored_quantization` knows them again. With int8-bnb an outlier changes
the rounding of every row in its forward pass, so a row's result may differ by a rounding error from its result alone.
"""

import logging
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, TorchAoConfig

from illada.errors import IlladaError, needs
from illada.model.config import IlladaConfig
from illada.model.transformer import IlladaForMaskedLM
from illada.weights.int4 import GROUP, METHOD, Int4Config, Int4Linear
from illada.weights.options import Quantization

NF4_GROUP = 64
"""Inputs that share a scale in nf4."""

WIDTHS: dict[str, tuple[int, int]] = {"int4": (GROUP, 1), "nf4": (NF4_GROUP, 32)}
"""The CPU's kernels demand that a layer's inputs and outputs are multiples of these."""

KEPT = ["lm_head"]
"""Linear layers that keep their type; a tied embedding is the same tensor as the head."""


def quantized_loading(
    name: Quantization, config: IlladaConfig, device: torch.device, dtype: torch.dtype | str = "auto"
) -> dict[str, Any]:
    """Return the arguments of `IlladaForMaskedLM.from_pretrained` that quantise while loading, on `device`.

    The model arrives on its device. Call `check_shapes` on it: transformers does not compare quantised shapes.

    Args:
        name: way to quantise.
        config: configuration of the model.
        device: device to load on.
        dtype: type of activations and of everything that is not quantised; auto is the checkpoint's own.

    Raises:
        IlladaError: when a library is missing, or the device, the type or the model's widths do not allow it.
    """
    if name not in get_args(Quantization):
        raise IlladaError(f"no quantization {name!r}: choose one of {', '.join(get_args(Quantization))}")
    if device.type == "cpu" and name in WIDTHS:
        _check_widths(name, config)
    compute = config.dtype if dtype == "auto" else dtype
    method: Any
    if name in ("int8-bnb", "nf4"):
        method = _bitsandbytes(name, compute)
    elif name == "int4" and device.type == "cpu":
        with needs("quantize", "quantization int4"):
            import_module("accelerate")  # transformers loads with it
            import_module("openvino")
        method = Int4Config()
    else:
        method = _torchao(name, device, compute)
    return {"quantization_config": method, "device_map": {"": device}}


def stored_quantization(values: Any) -> Quantization | None:
    """Return how weights in a folder were made smaller, from the quantization_config of its config.json.

    None stands for a form that `illada export` does not write.
    """
    values = values if isinstance(values, Mapping) else {}
    kind = values.get("quant_type")
    kind = kind.get("default") if isinstance(kind, Mapping) else None
    kind = kind.get("_type") if isinstance(kind, Mapping) else None
    match values.get("quant_method"):
        case "torchao" if kind == "Int8WeightOnlyConfig":
            return "int8"
        case "bitsandbytes" if values.get("load_in_8bit") is True:
            return "int8-bnb"
        case "bitsandbytes" if values.get("bnb_4bit_quant_type") == "nf4":
            return "nf4"
        case method if method == METHOD:
            return "int4"
    return None


def refuse_quantized(model: IlladaForMaskedLM, name: str) -> None:
    """Raise an IlladaError if the weights of the model called `name` were quantised in its folder."""
    if stored := quantization_of(model.config):
        raise IlladaError(f"the weights in {name} are {stored} already: copy the folder, or take their source")


def quantization_of(config: IlladaConfig) -> Quantization | None:
    """Return how the weights of a loaded model are quantised, at loading or in its folder."""
    method = getattr(config, "quantization_config", None)
    return None if method is None else stored_quantization(method.to_dict())


def packed_tensors(model: IlladaForMaskedLM) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors that a quantised model consists of, and texts for the header of their file.

    The model must not have run: bitsandbytes arranges its weights anew at the first product.
    """
    tensors, texts = model.hf_quantizer.get_state_dict_and_metadata(model)
    return dict(model.state_dict() if tensors is None else tensors), dict(texts)


def check_packed(name: Quantization, config: IlladaConfig, files: Sequence[Path]) -> None:
    """Check that the headers of quantised weights name every tensor of the blocks' linear layers, in its shape.

    Not every library does: bitsandbytes takes packed weights that are too short.

    Args:
        name: how the weights are quantised.
        config: configuration of the model.
        files: files of its weights.

    Raises:
        IlladaError: naming tensors.
    """
    found: dict[str, tuple[str, list[int]]] = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for stored in weights.keys():  # noqa: SIM118 (it is no mapping)
                part = weights.get_slice(stored)
                found[stored] = (part.get_dtype(), list(part.get_shape()))
    with torch.device("meta"):
        model = IlladaForMaskedLM(config)
    odd = []
    for path, layer in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(layer, nn.Linear):
            for ending, wanted in _packed(name, layer.out_features, layer.in_features).items():
                tensor = path + ending
                if tensor not in found:
                    odd.append(f"{tensor} is missing")
                elif found[tensor] != wanted and wanted[1]:
                    odd.append(f"{tensor} is {' '.join(map(str, found[tensor]))}, not {' '.join(map(str, wanted))}")
    if odd:
        more = f"; and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise IlladaError(
            f"the weights in {files[0].parent} are not the {name} weights that its config.json describes: "
            f"{'; '.join(odd[:3])}{more}: export or fetch the folder again"
        )


def _packed(name: Quantization, outputs: int, inputs: int) -> dict[str, tuple[str, list[int]]]:
    """Return types and shapes of the tensors that a layer's weight is stored as, by the ends of their names.

    Without a shape, a tensor need only be there.
    """
    groups = [outputs, inputs // GROUP]
    return {
        "int8": {
            "._weight_qdata": ("I8", [outputs, inputs]),
            "._weight_scale": ("F32", [outputs, 1]),
            "._weight_zero_point": ("I8", [outputs, 1]),
        },
        "int4": {".weight": ("U8", [outputs, inputs // 2]), ".scale": ("F32", groups), ".zero": ("U8", groups)},
        "int8-bnb": {".weight": ("I8", [outputs, inputs]), ".SCB": ("F32", [outputs]), ".weight_format": ("U8", [])},
        "nf4": {
            ".weight": ("U8", [outputs * inputs // 2, 1]),
            ".weight.absmax": ("F32", [outputs * inputs // NF4_GROUP]),
            ".weight.quant_map": ("F32", [16]),
            ".weight.quant_state.bitsandbytes__nf4": ("U8", []),
        },
    }[name]


def check_shapes(model: IlladaForMaskedLM) -> None:
    """Check that every linear layer of the blocks is quantised and has the shape that it was built for.

    Raises:
        IlladaError: when layers have another shape, naming them.
        RuntimeError: when a library passed over a layer.
    """
    odd, skipped = [], []
    for path, layer in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(layer, nn.Linear):
            state = getattr(layer.weight, "quant_state", None)  # bitsandbytes keeps the shape of packed weights here
            shape = list((state or layer.weight).shape)
            if isinstance(layer, Int4Linear):
                shape[1] *= 2
            if state is not None and state.blocksize != NF4_GROUP:
                odd.append(f"{path}.weight has {state.blocksize} inputs in a group, not {NF4_GROUP}")
            if shape != (built := [layer.out_features, layer.in_features]):
                odd.append(f"{path}.weight is {shape}, not {built}")
            elif type(layer.weight) is nn.Parameter and not isinstance(layer, Int4Linear):
                skipped.append(path)
    if odd:
        raise IlladaError(f"the weights do not fit config.json ({len(odd)} tensors): {'; '.join(odd)}")
    if skipped:
        raise RuntimeError(f"not quantised: {', '.join(skipped)}")


def _torchao(name: str, device: torch.device, dtype: torch.dtype | str | None) -> TorchAoConfig:
    method: Any
    with needs("quantize", f"quantization {name}"):
        import_module("accelerate")  # transformers loads with it
        from torchao import quantization

        if name == "int8":
            method = quantization.Int8WeightOnlyConfig(set_inductor_config=False)
        elif dtype != torch.bfloat16:
            raise IlladaError("int4 on a GPU computes in bf16 only: load the model in bf16, or choose int8")
        elif device.type == "cuda":
            from torchao.quantization.quantize_.workflows import Int4PackingFormat

            layout = Int4PackingFormat.TILE_PACKED_TO_4D  # needs no library but torch
            method = quantization.Int4WeightOnlyConfig(GROUP, int4_packing_format=layout, set_inductor_config=False)
        else:
            raise IlladaError(f"int4 runs on cpu and cuda, not on {device.type}: choose int8")
    return TorchAoConfig(method, modules_to_not_convert=KEPT)


def _bitsandbytes(name: str, dtype: torch.dtype | str | None) -> BitsAndBytesConfig:
    # bitsandbytes advises to fetch kernels when imported, and says at every product that activations are rounded.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with needs("quantize", f"quantization {name}"):
        import_module("accelerate")  # transformers loads with it
        import_module("bitsandbytes")
    if name == "int8-bnb":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=KEPT)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype or torch.bfloat16,
        llm_int8_skip_modules=KEPT,
    )


def _check_widths(name: str, config: IlladaConfig) -> None:
    """Raise an error when the widths of the blocks' layers are not what the kernels demand."""
    inputs, outputs = WIDTHS[name]
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    widths = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size}
    odd = [f"{key} {value}" for key, value in {**widths, "query width": queries}.items() if value % inputs]
    odd += [f"key width {keys}"] if keys % outputs else []
    if odd:
        raise IlladaError(
            f"{name} on a CPU needs widths that are multiples of {inputs} (keys: {outputs}), but the model has "
            f"{', '.join(odd)}: choose int8"
        )
