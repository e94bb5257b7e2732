"""`illada export`: a folder that transformers loads after `import illada`, in our layout or in the released one.

With quantised weights it is a folder that illada loads: mapped from the files, without quantising them again.
"""

import torch

from illada.errors import IlladaError
from illada.model.transformer import IlladaForMaskedLM
from illada.weights.adapters import CONFIG as ADAPTER
from illada.weights.card import exported_card
from illada.weights.load import load_model
from illada.weights.options import Dtype, Quantization
from illada.weights.quantize import packed_tensors, refuse_quantized
from illada.weights.runs import model_folder
from illada.weights.save import Layout, check_output, torch_dtype, write_model


def export_model(
    model: str,
    output: str,
    dtype: Dtype = "auto",
    layout: Layout = "illada",
    max_shard_size: str = "5GB",
    quantize: Quantization | None = None,
) -> None:
    """Write weights, configuration, tokenizer and a model card into the new folder `output`.

    Args:
        model: model or run folder, or a hub name; ours, iLLaDA's or LLaDA's.
        output: folder to make.
        dtype: type of the weights written; auto keeps the checkpoint's own, bit for bit.
        layout: "illada" writes a tied head once; "released" has it twice, and the released class and field names.
        max_shard_size: largest file of weights, as "5GB".
        quantize: way to make the weights of the blocks smaller, as they run on a CPU; None leaves them.

    Raises:
        IlladaError: when there is no model, it is quantised already, `output` exists or lies in the model's folder, or
            the disk is full.
    """
    target = check_output(output, model, max_shard_size)
    if quantize is not None and layout != "illada":
        raise IlladaError(f"the {layout} layout has no quantised weights: take --layout illada")
    # It is looked up once: it may be a hub name, or a run whose newest checkpoint changes.
    folder = model_folder(model)
    if quantize is not None and (folder / ADAPTER).is_file():
        raise IlladaError(f"{model} is an adapter: export it without --quantize first, then the export with it")
    # On the CPU and in their own type, the weights stay in the files that they are read from.
    network, tokenizer = load_model(str(folder), "auto" if quantize is None else dtype, "cpu", quantize)
    if quantize is None:
        refuse_quantized(network, model)
    tensors, packed = (network.state_dict(), None) if quantize is None else packed_tensors(network)
    if layout == "illada" and network.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    kind = torch_dtype(dtype, network.dtype)
    with torch.device("meta"):
        parameters = IlladaForMaskedLM(network.config).num_parameters()  # packed weights cannot be counted
    card = exported_card(model, folder, parameters, kind, layout, network.config, quantize)
    # Tokenizer files are copied as they are, where they are: the released ones were written for transformers 4.
    to_save = None if (folder / "tokenizer.json").is_file() else tokenizer
    write_model(target, folder, network.config, tensors, kind, card, layout, max_shard_size, to_save, packed)
