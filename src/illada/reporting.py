"""What every result carries and how it is shown: environment, tables, colours, result files."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from illada.files import write_json
from illada.model import IlladaForMaskedLM


def environment_of(network: IlladaForMaskedLM | None) -> dict[str, Any]:
    """Return what a number depends on besides settings: versions, commit, device and type of the weights.

    Without a network, which is then somewhere else, only what is known of this process.
    """
    found = {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("illada", "torch", "transformers", "numpy")},
        },
        "commit": _commit(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if network is None:
        return {**found, "device": "unknown"}
    device = network.device
    return {
        **found,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} {platform.machine()}",
        "dtype": str(network.dtype).removeprefix("torch."),
        "parameters": network.num_parameters(),
        "vocab_size": network.config.vocab_size,
    }


def _commit() -> str | None:
    """Return the commit of this package's checkout, "-dirty" behind it if changed; None when it is not in one."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed copy may lie inside somebody else's repository, which does not track it.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its first line the head, its first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        text.append(f"| {' | '.join(cells)} |")
    text.insert(1, "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|")
    return "\n".join(text)


def write_results(
    output: Path, results: dict[str, Any], text: str, picture: str, draw: Callable[[Sequence[dict[str, Any]]], bytes]
) -> None:
    """Write results.json, table.md and, where matplotlib is installed, a picture of the rows into a folder."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "results.json", results)
    (output / "table.md").write_text(text + "\n")
    try:
        drawn = draw(results["rows"])
    except ImportError:
        print(f"no {picture}: it needs matplotlib (pip install 'illada[report]')", file=sys.stderr)
        return
    (output / picture).write_bytes(drawn)


INK, MUTED, ACCENT = "#1f2933", "#9aa5b1", "#2563eb"


COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#db2777")
