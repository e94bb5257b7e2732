"""Write a model folder: all of it or nothing, with checksums, and without a second copy of the weights in memory."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from rich.filesize import decimal
from torch import Tensor

from illada.devices import DTYPES
from illada.errors import IlladaError
from illada.files import read_json
from illada.folders import new_folder, partial_path, remove_partial
from illada.model.config import IlladaConfig
from illada.model.released import released_config
from illada.weights.options import Dtype
from illada.weights.tensor_file import write_weights

Layout = Literal["illada", "released"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
)


def check_output(output: str, source: str, max_shard_size: str) -> Path:
    """Check, before anything is read, that the folder `output` can be made; return its path.

    Raises:
        IlladaError: when it exists or would touch `source`, or the size is not a whole number with its unit.
    """
    if not re.fullmatch(r"0*[1-9]\d* ?[KMGT]B", max_shard_size.strip(), re.IGNORECASE):
        raise IlladaError(
            f"max_shard_size is {max_shard_size!r}: it must be a whole number of KB, MB, GB or TB, as 5GB"
        )
    target = Path(output)
    if target.exists() or target.is_symlink():
        raise IlladaError(f"{target} exists: choose another --output or delete it")
    # The weights stay in the files of the source while they are written: these files must not be touched.
    read, partial = Path(source).resolve(), partial_path(target).resolve()
    if read in partial.parents or partial in (read, *read.parents):
        raise IlladaError(f"{target} cannot be written while {source} is being read: choose another --output")
    return target


def torch_dtype(dtype: Dtype, own: torch.dtype) -> torch.dtype:
    """Return the type called `dtype`; auto is `own`."""
    named = DTYPES[dtype]
    return named if isinstance(named, torch.dtype) else own


def write_model(
    target: Path,
    source: Path,
    config: IlladaConfig,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    card: str,
    layout: Layout = "illada",
    max_shard_size: str = "5GB",
    tokenizer: Any = None,
    packed: Mapping[str, str] | None = None,
) -> None:
    """Write the folder `target`: weights, configuration, tokenizer, model card.

    Weights are cast and written one at a time, so tensors that lie on disk need no more memory than the largest one.

    Args:
        target: folder to make; it does not exist yet.
        source: folder of the model that was read; its generation_config.json and tokenizer files are taken over.
        config: configuration of the model; its dtype is set.
        tensors: weights by our names; "lm_head.weight" too when it is to be written.
        dtype: type of the weights written.
        card: text of the model card.
        layout: form of config.json.
        max_shard_size: largest file of weights, as "5GB".
        tokenizer: tokenizer to save; None copies the source's files as they are.
        packed: texts for the header of quantised weights, which are written as they are; None for ordinary ones.

    Raises:
        IlladaError: when the disk has no room, or a weight is too large for `dtype`.
    """
    config.dtype = dtype
    config.architectures = ["IlladaForMaskedLM"]
    values = json.loads(config.to_json_string())
    if layout == "released":
        values = released_config(config.to_dict() | {"dtype": values["dtype"]})
    kinds = {name: dtype if packed is None else tensor.dtype for name, tensor in tensors.items()}
    shapes = {name: torch.empty_like(x, dtype=kinds[name], device="meta") for name, x in tensors.items()}
    texts = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    size = sum(shape.nbytes for shape in shapes.values())
    size += sum(path.stat().st_size for path in texts) + len(card.encode()) + 2**16
    check_room(target, size)
    with new_folder(target) as folder:
        header = None if packed is None else {"format": "pt", **packed}
        write_weights(folder, shapes, lambda x: cast_weight(tensors[x], x, kinds[x]), max_shard_size, header)
        _write_json(folder / "config.json", values)
        _write_json(folder / "generation_config.json", _generation_config(source, config))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        else:
            for path in texts:
                shutil.copyfile(path, folder / path.name)
        if layout == "released":
            _for_transformers_4(folder / "tokenizer_config.json")
        (folder / "README.md").write_text(card, encoding="utf-8")


def cast_weight(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Return a weight in the type to be written."""
    cast = tensor.to(dtype)
    if dtype == torch.float16 and not cast.isfinite().all() and tensor.isfinite().all():
        raise IlladaError(f"{name} holds values too large for fp16: choose --dtype bf16 or fp32")
    return cast


def check_room(target: Path, size: int) -> None:
    """Check that the disk has room for `size` bytes.

    Raises:
        IlladaError: when it has not.
    """
    place = next(path for path in target.resolve().parents if path.exists())
    remove_partial(target)  # it takes room
    if (free := shutil.disk_usage(place).free) < size:
        raise IlladaError(
            f"no room for {target}: it needs about {size:,} bytes ({decimal(size)}) but {place} has {decimal(free)} "
            "free: free some or choose another --output; nothing was left behind"
        )


def _generation_config(source: Path, config: IlladaConfig) -> dict[str, Any]:
    """Return the source's generation_config.json with the special ids of `config`."""
    path = source / "generation_config.json"
    values = read_json(path) if path.is_file() else {}
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return values | {name: token_id for name, token_id in ids.items() if token_id is not None}


def _for_transformers_4(path: Path) -> None:
    """Rewrite what only transformers 5 understands, as the authors' code runs on transformers 4."""
    if not path.is_file():
        return
    values = read_json(path)
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        values.pop("backend", None)
        if extra := values.pop("extra_special_tokens", None):
            values["additional_special_tokens"] = extra
        _write_json(path, values)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON as transformers does."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
