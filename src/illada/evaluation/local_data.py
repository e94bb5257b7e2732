"""Data sets from a folder in the hub's layout instead of the hub (`illada eval --local_data`)."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from illada.errors import IlladaError, first_line, needs

with needs("eval", "evaluation"):
    import datasets

SAME_DATA = {"gsm8k": "openai/gsm8k", "hails/mmlu_no_train": "cais/mmlu"}
"""Names under which older tasks know a data set; the second is a copy of the first without a split for training."""


def check_folder(folder: str) -> Path:
    """Return the folder.

    Raises:
        IlladaError: when there is none, or it holds no OWNER/NAME.
    """
    place = Path(folder).resolve()
    if not any(path.is_dir() for path in place.glob("*/*")):
        raise IlladaError(f"{folder} holds no data sets: it must be a folder with OWNER/NAME as on the hub")
    return place


def _read(load: Any, place: Path, name: str | None = None, **options: Any) -> Any:
    """Read a data set's folder, under a cache of its own for its files as they are now.

    The cache of the library's own goes by names alone: a file that changed, or another folder, would give the old rows.
    """
    files = sorted(path for path in place.rglob("*") if path.is_file())
    state = repr([(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files])
    cache = str(Path(datasets.config.HF_DATASETS_CACHE, "local", hashlib.sha256(state.encode()).hexdigest()[:16]))
    options.pop("trust_remote_code", None)  # plain files have no code
    try:
        return load(str(place), name, cache_dir=cache, **options)
    except datasets.exceptions.DatasetGenerationError:
        # Each parquet split has its own types, which differ where a column is empty in one of them (MBPP).
        builder = datasets.load_dataset_builder(str(place), name, cache_dir=cache)
        splits = {str(split): [str(file) for file in found] for split, found in builder.config.data_files.items()}
        read = datasets.Dataset.from_parquet
        return datasets.DatasetDict({split: read(found, cache_dir=cache) for split, found in splits.items()})


@contextlib.contextmanager
def reading_from(folder: Path | None, download: bool) -> Iterator[None]:
    """Let tasks find data sets in the folder, where it has them; None changes nothing.

    What is not there is fetched if `download`, and else a FileNotFoundError that says so, as is what cannot be read.
    Files that a task names
    itself (json, csv, parquet, a path) are read as always.
    """
    if folder is None:
        yield
        return
    load = datasets.load_dataset

    def load_here(path: str, *arguments: Any, **options: Any) -> Any:
        names = [name for name in (path, SAME_DATA.get(path)) if name and "/" in name]
        place = next((folder / name for name in names if (folder / name).is_dir()), None)
        if place is not None:
            try:
                return _read(load, place, *arguments, **options)
            except Exception as error:
                raise FileNotFoundError(f"{place} cannot be read: {first_line(error)}") from error
        if download or "/" not in path or Path(path).exists():
            return load(path, *arguments, **options)
        raise FileNotFoundError(f"{path} is not in {folder}")

    datasets.load_dataset = load_here
    try:
        yield
    finally:
        datasets.load_dataset = load
