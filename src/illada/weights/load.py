"""Find and load a model: a local folder, a training run, or a name on the Hugging Face hub."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from illada.devices import DTYPES, choose_device
from illada.errors import DamagedError, IlladaError, first_line
from illada.files import read_json
from illada.folders import SUMS, damage
from illada.model.config import IlladaConfig
from illada.model.released import MASK_TOKENS, TURN_ENDS
from illada.model.transformer import IlladaForMaskedLM
from illada.text.tokenizer import load_tokenizer
from illada.weights.adapters import adapter_base, attach
from illada.weights.check import check_sizes, read_values, token_ids
from illada.weights.options import Dtype, Quantization
from illada.weights.quantize import check_packed, check_shapes, quantized_loading, stored_quantization
from illada.weights.runs import model_folder
from illada.weights.tensor_file import INDEX

WEIGHTS = "model.safetensors"


def load_config(folder: str | Path) -> IlladaConfig:
    """Read the configuration in a model folder, of any family that can be read, to train the model.

    Raises:
        IlladaError: when it is damaged, of another family, quantised, or asks for what the network does not do.
    """
    path = Path(folder) / "config.json"
    return _config(path, read_values(path))


def _config(path: Path, values: dict[str, Any]) -> IlladaConfig:
    try:
        return IlladaConfig.from_dict(values)
    except Exception as error:
        raise IlladaError(f"{path} cannot be used: {first_line(error)}") from error


def _read_config(folder: Path) -> tuple[IlladaConfig, Quantization | None]:
    """Read the configuration in a model folder, and how its weights were made smaller, if they were."""
    path = folder / "config.json"
    values = read_values(path)
    stored = stored_quantization(values.get("quantization_config"))
    if stored is not None:
        del values["quantization_config"]
    return _config(path, values), stored


def load_model(
    path: str, dtype: Dtype = "auto", device: str = "auto", quantize: Quantization | None = None
) -> tuple[IlladaForMaskedLM, Any]:
    """Load a model for inference, and its tokenizer; weights are read into their type without a second copy.

    Its configuration gets the mask id and every end-of-turn id that the folder's files name (see `complete_ids`). An
    adapter is merged into the weights of its base, or lies beside them where they are quantised. What `illada export
    --quantize` wrote is loaded as it is; the model then says how in `config.quantization_config`.

    Args:
        path: model, adapter or run folder, or hub name; iLLaDA's, LLaDA's or our own files.
        dtype: type of the weights; auto is the checkpoint's own.
        device: device to run on; auto takes a GPU where there is one.
        quantize: way to make the weights smaller while loading (see `illada.weights.quantize`); None leaves them.

    Raises:
        IlladaError: when there is no such model, or its weights or tokenizer are missing, damaged or do not fit; when
            they are quantised already and `quantize` or another `dtype` is asked for.
    """
    folder = model_folder(path)
    adapter = None if (folder / "config.json").is_file() else folder
    if adapter is not None:
        check_weights(adapter)
        folder = model_folder(adapter_base(adapter))
    config, stored = _read_config(folder)
    if stored is not None:
        _refuse_other(folder, config, stored, DTYPES[dtype], choose_device(device), quantize)
    files = check_shards(folder)
    check_sizes(config, files, quantized=stored is not None)
    if stored is not None:
        check_packed(stored, config, files)
    tokenizer = load_tokenizer(folder)
    complete_ids(config, folder, tokenizer)
    way = stored or quantize
    model = _load_weights(folder, config, DTYPES[dtype], choose_device(device), way, stored is not None)
    if adapter is not None:
        model = attach(model, adapter, merge=way is None)
    return model.eval(), tokenizer


def _refuse_other(
    folder: Path,
    config: IlladaConfig,
    stored: Quantization,
    dtype: torch.dtype | str,
    device: torch.device,
    quantize: Quantization | None,
) -> None:
    """Raise an IlladaError if quantised weights are to be loaded otherwise than they are."""
    if quantize is not None:
        raise IlladaError(f"the weights in {folder} are {stored} already: leave out --quantize")
    if dtype not in ("auto", config.dtype):
        raise IlladaError(
            f"the weights in {folder} are {stored}, made to run in {str(config.dtype).removeprefix('torch.')}: leave "
            "out --dtype; to train or to convert, take the model that they were made of"
        )
    if stored == "int4" and device.type != "cpu":
        raise IlladaError(
            f"the int4 weights in {folder} run on a CPU: add --device cpu (for a GPU, add --quantize "
            "int4 to the model that they were made of)"
        )


def _load_weights(
    folder: Path,
    config: IlladaConfig,
    dtype: torch.dtype | str,
    device: torch.device,
    quantize: Quantization | None,
    stored: bool,
) -> IlladaForMaskedLM:
    """Load the weights in `folder` onto the device; `stored` says whether they are quantised there already."""
    options = {} if quantize is None else quantized_loading(quantize, config, device, dtype)
    if stored:
        # Ours, not the file's: of a stranger's file only the name of the way counts.
        config.quantization_config = options.pop("quantization_config").to_dict()
    try:
        model: IlladaForMaskedLM = IlladaForMaskedLM.from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, **options
        )
        if quantize is None:
            return model.to(device)
        check_shapes(model)
        return model
    except IlladaError:
        raise
    except Exception as error:
        raise IlladaError(f"the weights in {folder} cannot be loaded: {first_line(error)}") from error


def complete_ids(config: IlladaConfig, folder: Path, tokenizer: Any) -> None:
    """Complete the special ids in `config` from the folder's own files (spec §1, §8).

    The mask id comes from config.json, else from the tokenizer, else from a token with a released model's name for the
    mask, else from the family. Generation ends at every id that config.json or generation_config.json calls
    eos_token_id, and at the tokens that end a turn in the released chat templates.

    Raises:
        IlladaError: when the tokenizer has more tokens than the embedding has rows, or an end is no id of the model.
    """
    vocabulary = tokenizer.get_vocab()
    known = max(len(tokenizer), 1 + max(vocabulary.values(), default=0))
    if known > config.vocab_size:
        raise IlladaError(
            f"the tokenizer in {folder} has {known} tokens but the model only {config.vocab_size}: "
            "it belongs to another model"
        )
    if "mask_token_id" not in read_json(folder / "config.json"):
        named = (vocabulary[token] for token in MASK_TOKENS if token in vocabulary)
        mask_id = tokenizer.mask_token_id
        config.mask_token_id = next(named, config.mask_token_id) if mask_id is None else mask_id
    if config.bos_token_id is None:
        config.bos_token_id = tokenizer.bos_token_id
    generation = folder / "generation_config.json"
    generation_ids = read_json(generation).get("eos_token_id") if generation.is_file() else None
    generation_ids = token_ids(generation_ids, config.vocab_size, generation)
    turn_ends = [vocabulary[token] for token in TURN_ENDS if token in vocabulary]
    if ends := list(dict.fromkeys([*_as_list(config.eos_token_id), *generation_ids, *turn_ends])):
        config.eos_token_id = ends[0] if len(ends) == 1 else ends


def check_shards(folder: Path) -> list[Path]:
    """Return the files of weights, after checking that each is there and whole.

    Where the folder keeps checksums, every byte is read for it; else only the headers are.

    Raises:
        IlladaError: when a file is missing, unreadable or damaged, naming it.
    """
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise IlladaError(f"{folder / INDEX} names no files: fetch it again")
        names = sorted(set(map(str, weight_map.values())))
    else:
        names = [WEIGHTS]
    if missing := [name for name in names if not (folder / name).is_file()]:
        others = [path.name for kind in ("*.safetensors", "*.bin", "*.pt", "*.gguf") for path in folder.glob(kind)]
        hint = f" (there is {', '.join(others[:3])}; only safetensors are read)" if others and len(names) == 1 else ""
        raise IlladaError(f"{folder} lacks {', '.join(missing)}{hint}: fetch the missing files")
    for name in names:
        if not os.access(folder / name, os.R_OK):  # safetensors would say that there is no such file
            raise IlladaError(f"{folder / name} may not be read by this user: chmod it, or run as its owner")
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except Exception as error:
            raise IlladaError(
                f"{folder / name} is damaged or incomplete ({first_line(error)}): fetch it again"
            ) from error
    check_weights(folder)
    return [folder / name for name in names]


def check_weights(folder: Path) -> None:
    """Check the weights in a folder against the checksums in it, if there are any; its texts may be edited.

    Raises:
        DamagedError: when a file is not as it was written.
    """
    if faults := damage(folder, lambda name: name.endswith(".safetensors") and "/" not in name):
        raise DamagedError(f"{faults[0]}: write or fetch it again (or delete {folder / SUMS}, if you made the change)")


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
