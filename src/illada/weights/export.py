"""`illada export`: a folder that transformers loads after `import illada`, in our layout or in the released one."""

from illada.weights.card import exported_card
from illada.weights.load import load_model
from illada.weights.options import Dtype
from illada.weights.runs import model_folder
from illada.weights.save import Layout, check_output, torch_dtype, write_model


def export_model(
    model: str,
    output: str,
    dtype: Dtype = "auto",
    layout: Layout = "illada",
    max_shard_size: str = "5GB",
) -> None:
    """Write weights, configuration, tokenizer and a model card into the new folder `output`.

    Args:
        model: model or run folder, or a hub name; ours, iLLaDA's or LLaDA's.
        output: folder to make.
        dtype: type of the weights; auto keeps the checkpoint's own, bit for bit.
        layout: "illada" writes a tied head once; "released" has it twice, and the released class and field names.
        max_shard_size: largest file of weights, as "5GB".

    Raises:
        IlladaError: when there is no model, `output` exists or lies in the model's folder, or the disk is full.
    """
    target = check_output(output, model, max_shard_size)
    # It is looked up once: it may be a hub name, or a run whose newest checkpoint changes.
    folder = model_folder(model)
    # On the CPU and in their own type, the weights stay in the files that they are read from.
    network, tokenizer = load_model(str(folder), "auto", "cpu")
    tensors = network.state_dict()
    if layout == "illada" and network.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    kind = torch_dtype(dtype, network.dtype)
    card = exported_card(model, folder, network.num_parameters(), kind, layout, network.config)
    # Tokenizer files are copied as they are, where they are: the released ones were written for transformers 4.
    to_save = None if (folder / "tokenizer.json").is_file() else tokenizer
    write_model(target, folder, network.config, tensors, kind, card, layout, max_shard_size, to_save)
