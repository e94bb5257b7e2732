"""Data sets from a folder in the hub's layout instead of the hub (`illada eval --local_data`)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from illada.errors import IlladaError, needs

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


def _split_by_split(place: Path, name: str | None = None, **_: Any) -> Any:
    """Read each parquet split under its own types, which differ where a column is empty in one of them (MBPP)."""
    builder = datasets.load_dataset_builder(str(place), name)
    splits = {str(split): [str(file) for file in files] for split, files in builder.config.data_files.items()}
    return datasets.DatasetDict({split: datasets.Dataset.from_parquet(files) for split, files in splits.items()})


@contextlib.contextmanager
def reading_from(folder: Path | None, download: bool) -> Iterator[None]:
    """Let tasks find data sets in the folder, where it has them; None changes nothing.

    What is not there is fetched if `download`, and else a FileNotFoundError that says so. Files that a task names
    itself (json, csv, parquet, a path) are read as always.
    """
    if folder is None:
        yield
        return
    load = datasets.load_dataset

    def load_here(path: str, *arguments: Any, **options: Any) -> Any:
        place = folder / SAME_DATA.get(path, path)
        if "/" in str(SAME_DATA.get(path, path)) and place.is_dir():
            options.pop("trust_remote_code", None)  # plain files have no code
            try:
                return load(str(place), *arguments, **options)
            except datasets.exceptions.DatasetGenerationError:
                return _split_by_split(place, *arguments, **options)
        if download or "/" not in path or Path(path).exists():
            return load(path, *arguments, **options)
        raise FileNotFoundError(f"{path} is not in {folder}")

    datasets.load_dataset = load_here
    try:
        yield
    finally:
        datasets.load_dataset = load
