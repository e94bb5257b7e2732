"""Find and load a model: a local folder, a training run, or a name on the Hugging Face hub."""

import os
from pathlib import Path
from typing import Any

from safetensors import safe_open

from illada.devices import DTYPES, choose_device
from illada.errors import IlladaError, first_line
from illada.files import read_json
from illada.model import IlladaConfig, IlladaForMaskedLM
from illada.model.released import MASK_TOKENS, TURN_ENDS
from illada.text.tokenizer import load_tokenizer
from illada.weights import adapters
from illada.weights.options import Dtype, Quantization
from illada.weights.quantize import check_shapes, quantized_loading
from illada.weights.runs import model_folder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def load_config(folder: str | Path) -> IlladaConfig:
    """Read the configuration in a model folder, of any family that can be read.

    Raises:
        IlladaError: when it is damaged, of another family, or asks for what the network does not do.
    """
    path = Path(folder) / "config.json"
    values = read_json(path)
    try:
        return IlladaConfig.from_dict(values)
    except Exception as error:
        raise IlladaError(f"{path} cannot be used: {first_line(error)}") from error


def load_model(
    path: str, dtype: Dtype = "auto", device: str = "auto", quantize: Quantization | None = None
) -> tuple[IlladaForMaskedLM, Any]:
    """Load a model for inference, and its tokenizer; weights go straight into their type, without a second copy.

    Its configuration gets the mask id and every end-of-turn id that the folder's files name (see `settle_ids`). An
    adapter is put onto its base: merged into the weights, or beside them where those are quantised.

    Args:
        path: model, adapter or run folder, or hub name; iLLaDA's, LLaDA's or our own files.
        dtype: of the weights; auto is the checkpoint's own.
        device: to run on; auto takes a GPU where there is one.
        quantize: how to make the weights smaller while loading (see `illada.weights.quantize`); None for not at all.

    Raises:
        IlladaError: when there is no such model, or its weights or tokenizer are missing, damaged or do not fit.
    """
    folder = model_folder(path)
    adapter = None
    if not (folder / "config.json").is_file():
        adapter, folder = folder, model_folder(adapters.adapter_base(folder))
    config = load_config(folder)
    check_shards(folder)
    tokenizer = load_tokenizer(folder)
    settle_ids(config, folder, tokenizer)
    place = choose_device(device)
    options = {} if quantize is None else quantized_loading(quantize, config, place, DTYPES[dtype])
    try:
        model: IlladaForMaskedLM = IlladaForMaskedLM.from_pretrained(
            folder, config=config, dtype=DTYPES[dtype], local_files_only=True, **options
        )
        if quantize is None:
            model = model.to(place)
        else:
            check_shapes(model)
    except IlladaError:
        raise
    except Exception as error:
        raise IlladaError(f"the weights in {folder} cannot be loaded: {first_line(error)}") from error
    if adapter is not None:
        model = adapters.attach(model, adapter, merge=quantize is None)
    return model.eval(), tokenizer


def settle_ids(config: IlladaConfig, folder: Path, tokenizer: Any) -> None:
    """Complete the special ids in `config` from the folder's own files (spec §1, §8).

    The mask id is that of config.json, else the tokenizer's, else the id of a token with a released model's name for
    it, else the family's. Generation ends at every id that config.json or generation_config.json calls eos_token_id,
    and at the tokens that end a turn in the released chat templates.

    Raises:
        IlladaError: when the tokenizer has more tokens than the embedding has rows.
    """
    if len(tokenizer) > config.vocab_size:
        raise IlladaError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens but the model only {config.vocab_size}: "
            "it belongs to another model"
        )
    known = tokenizer.get_vocab()
    if "mask_token_id" not in read_json(folder / "config.json"):
        named = [known[token] for token in MASK_TOKENS if token in known]
        if tokenizer.mask_token_id is not None:
            named.insert(0, tokenizer.mask_token_id)
        config.mask_token_id = (named or [config.mask_token_id])[0]
    if config.bos_token_id is None:
        config.bos_token_id = tokenizer.bos_token_id
    generation = folder / "generation_config.json"
    written = read_json(generation).get("eos_token_id") if generation.is_file() else None
    ends = [*_ids(config.eos_token_id), *_ids(written), *(known[token] for token in TURN_ENDS if token in known)]
    ends = list(dict.fromkeys(ends))
    if ends:
        config.eos_token_id = ends[0] if len(ends) == 1 else ends


def check_shards(folder: Path) -> list[Path]:
    """Return the files of weights, after checking that each is there and whole, without reading the weights.

    Raises:
        IlladaError: naming the file.
    """
    if (folder / INDEX).is_file():
        places = read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise IlladaError(f"{folder / INDEX} names no files: fetch it again")
        names = sorted(set(map(str, places.values())))
    else:
        names = [WEIGHTS]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        others = [path.name for kind in ("*.safetensors", "*.bin", "*.pt", "*.gguf") for path in folder.glob(kind)]
        found = f" (there is {', '.join(others[:3])}; only safetensors are read)" if others and len(names) == 1 else ""
        raise IlladaError(f"{folder} lacks {', '.join(missing)}{found}: fetch the missing files")
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
    return [folder / name for name in names]


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
