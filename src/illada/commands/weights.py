"""`illada export`, `convert` and `verify`."""

from typing import Literal

from illada.commands import heavy
from illada.commands.next import next_commands
from illada.errors import IlladaError
from illada.weights.options import Dtype, Quantization


def export(
    model: str,
    output: str,
    dtype: Dtype | Literal["q8_0"] = "auto",
    layout: Literal["illada", "released", "gguf"] = "illada",
    max_shard_size: str = "5GB",
    quantize: Quantization | None = None,
) -> None:
    """Write a model as a folder that transformers loads, in our layout or the released one, or as a file for llama.cpp.

    With --quantize the folder is smaller and every command loads it in seconds, with what the same --quantize while
    loading gives.

    Args:
        model: model or run folder, or a hub name (GSAI-ML/LLaDA-8B-Instruct).
        output: new folder to write; with layout gguf a file, NAME.gguf.
        dtype: type of the weights written; auto is the checkpoint's own. q8_0 (8 bits) is for layout gguf.
        layout: "illada" loads in transformers after `import illada`; "released" is also what the authors' code reads;
            "gguf" is one file that llama.cpp loads (pip install 'illada[gguf]').
        max_shard_size: largest file of weights; more are written in several, with an index (not with layout gguf).
        quantize: weights of the blocks in 8 or 4 bits, for layout illada (pip install 'illada[quantize]').
    """
    if layout == "gguf":
        if quantize is not None:
            raise IlladaError("--quantize is for --layout illada: with gguf, take --dtype q8_0 or llama-quantize")
        heavy.gguf.export_gguf(model, output, dtype)
        print(
            f"written to {output}: llama-diffusion-cli -m {output} -p PROMPT -ub 256 --diffusion-block-length 32 "
            "--diffusion-steps 256 (it samples otherwise than illada: docs/released-weights.md)"
        )
        return
    if dtype == "q8_0":
        raise IlladaError("--dtype q8_0 is for --layout gguf: choose fp32, bf16 or fp16")
    heavy.export.export_model(model, output, dtype, layout, max_shard_size, quantize)
    load = f"AutoModelForMaskedLM.from_pretrained({output!r}) after `import illada`"
    print(f"written to {output}: load it with {load if quantize is None else f'illada.load_model({output!r})'}")
    next_commands(f"illada chat --model {output}", f"illada serve --model {output}")


def convert(
    from_: str,
    output: str,
    objective: Literal["diffusion", "causal"] = "diffusion",
    mask_token: str | None = None,
    dtype: Dtype = "auto",
    max_shard_size: str = "5GB",
) -> None:
    """Read a causal llama-like checkpoint: a starting point for diffusion (not the paper's way), or as it is.

    Args:
        from_: model folder or hub name of type llama, or of another type with the same network.
        output: new folder to write.
        objective: "diffusion" makes a starting point for training; "causal" keeps the model as it is, to be evaluated,
            served and trained beside diffusion models.
        mask_token: what stands for a masked token (objective diffusion); null takes the tokenizer's own, else an unused
            reserved token, else adds <[MASK]>.
        dtype: type of the weights written; auto is the checkpoint's own.
        max_shard_size: largest file of weights; more are written in several, with an index.
    """
    print(heavy.convert.convert_model(from_, output, objective, mask_token, dtype, max_shard_size))


def verify(place: str, /) -> None:
    """Check the files of a run, prepared data, a model or a tokenizer against the checksums kept beside them.

    Args:
        place: folder to check, and all folders below it.
    """
    states, faults = set(), 0
    for finding in heavy.verification.verify(place):
        states.add(finding.state)
        faults += len(finding.faults)
        remark = {
            "whole": f" ({finding.files} files)",
            "no checksums": " (written by another program, or before illada kept them)",
            "put aside": " (damaged before; the run went on from another checkpoint)",
        }.get(finding.state, "")
        print(f"{finding.state}: {finding.folder}{remark}")
        for fault in finding.faults:
            print(f"    {fault}")
    if faults:
        raise IlladaError(f"not as written in {place}: {faults} file{'s' * (faults > 1)}; restore from a copy")
    if "whole" not in states:
        raise IlladaError(f"nothing in {place} has checksums: whether it is whole is not known")
