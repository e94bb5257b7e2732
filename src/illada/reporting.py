"""What the package shows of a measurement: its environment, tables, figures and result files."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from illada.errors import IlladaError, MissingExtraError, needs
from illada.files import write_bytes, write_json, write_text
from illada.model.transformer import IlladaForMaskedLM

INK, MUTED, ACCENT = "#1f2933", "#9aa5b1", "#2563eb"
COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#db2777")
PICTURES = (".png", ".svg", ".pdf")
"""What a picture's name may end in."""


PLAIN_EVERY = 10.0
"""Seconds between two lines of progress where there is no terminal to draw a bar on."""


def duration(seconds: float) -> str:
    """Return a time as 1:02:03, with days where there are any."""
    return str(timedelta(seconds=round(seconds)))


def environment_of(network: IlladaForMaskedLM | None) -> dict[str, Any]:
    """Return what a measurement depends on besides its settings: versions, commit, device and type of the weights.

    Without a network, because a server elsewhere holds it, only this process is described.
    """
    environment: dict[str, Any] = {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("illada", "torch", "transformers", "numpy")},
        },
        "commit": commit(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if network is None:
        return environment | {"device": "unknown"}
    cuda = network.device.type == "cuda"
    return environment | {
        "device": torch.cuda.get_device_name(network.device) if cuda else f"{network.device.type} {platform.machine()}",
        "dtype": str(network.dtype).removeprefix("torch."),
        "parameters": network.num_parameters(),
        "vocab_size": network.config.vocab_size,
    }


def commit() -> str | None:
    """Return the commit of this package's checkout, with "-dirty" if files have changed; None outside a checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed copy may lie inside somebody else's repository, which does not track it.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def accuracy(right: Sequence[bool]) -> dict[str, float]:
    """Return the share of right answers and its standard error."""
    share = sum(right) / len(right)
    return {"accuracy": share, "standard_error": (share * (1 - share) / len(right)) ** 0.5}


def aligned(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table whose first line is the head; `left` columns stand left, those after them right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = zip(line, widths, strict=True)
        padded = [cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(cells)]
        text.append(f"| {' | '.join(padded)} |")
    text.insert(1, "|" + "|".join("-" * (w + 1) + ("-" if i < left else ":") for i, w in enumerate(widths)) + "|")
    return "\n".join(text)


def figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """Return a matplotlib figure, its size in inches, and its axes (an array if there are several).

    Raises:
        MissingExtraError: when matplotlib is not installed.
    """
    with needs("report", "a picture"):
        from matplotlib.figure import Figure
    drawing = Figure(figsize=(width, height), layout="constrained")
    axes = drawing.subplots(rows, columns)
    for part in np.ravel(axes):
        part.spines[["top", "right"]].set_visible(False)
        part.tick_params(colors=INK)
        part.set_prop_cycle(color=COLOURS)
    return drawing, axes


def picture_path(target: Path, option: str = "output") -> Path:
    """Return where to write the picture that an option names.

    Raises:
        IlladaError: before anything is drawn, when none can be written there.
    """
    if target.suffix not in PICTURES:
        raise IlladaError(f"{option} {target} is no picture: its name must end in {', '.join(PICTURES)}")
    if not target.parent.is_dir():
        raise IlladaError(f"{option} {target} cannot be written: there is no folder {target.parent}")
    return target


def rendered(drawing: Any, form: str = "png", dpi: int = 110) -> bytes:
    """Return a figure as the bytes of a file: png, svg or pdf."""
    buffer = BytesIO()
    drawing.savefig(buffer, format=form, dpi=dpi)
    return buffer.getvalue()


def moving_mean(values: Sequence[float], before: int, behind: int) -> NDArray[np.float64]:
    """Return the mean of each value and so many of its neighbours on either side, as far as there are any [N]."""
    sums, at = np.concatenate([[0.0], np.cumsum(values)]), np.arange(len(values))
    first, end = np.maximum(at - before, 0), np.minimum(at + behind + 1, len(values))
    return np.asarray((sums[end] - sums[first]) / (end - first))


def write_picture(path: Path, draw: Callable[[], bytes]) -> None:
    """Write what `draw` returns; without matplotlib, say on stderr that there is no picture."""
    try:
        write_bytes(path, draw())
    except MissingExtraError as error:
        print(f"no {path.name}: {error}", file=sys.stderr)


def write_results(
    output: Path, results: dict[str, Any], text: str, picture: str, draw: Callable[[Sequence[dict[str, Any]]], bytes]
) -> None:
    """Write results.json, table.md and, where matplotlib is installed, a picture of the rows into a folder."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "results.json", results)
    write_text(output / "table.md", text + "\n")
    write_picture(output / picture, lambda: draw(results["rows"]))
