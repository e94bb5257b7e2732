"""The recipes that travel with the package: `illada pretrain tiny-cpu-pretrain`."""

from difflib import get_close_matches
from pathlib import Path

from illada.errors import IlladaError

_PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = (_PACKAGE / "recipes", _PACKAGE.parents[1] / "recipes")
"""In a wheel, and in a checkout."""


def recipe_file(name: str) -> str:
    """Return the file of a recipe: one that exists, else one of ours by its name, `recipes/` and `.yaml` or not.

    Raises:
        IlladaError: when there is neither, naming ours.
    """
    path = Path(name)
    if path.exists() and not path.is_dir():
        return name
    ours = {file.stem: file for folder in FOLDERS for file in sorted(folder.glob("*.yaml"))}
    stem = path.name.removesuffix(".yaml")
    if stem in ours and str(path.parent) in (".", "recipes"):
        return str(ours[stem])
    close = get_close_matches(stem, ours, n=1)
    hint = f"did you mean {close[0]}?" if close else f"give a file, or one of {', '.join(ours)}"
    raise IlladaError(f"no recipe at {name}: {hint}")
