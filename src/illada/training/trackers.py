"""TensorBoard and Weights & Biases, when a recipe asks for them; metrics.jsonl holds all they show."""

import hashlib
from importlib import import_module
from pathlib import Path
from typing import Any

from illada.errors import IlladaError
from illada.training.recipe import LogRecipe


class TensorBoard:
    """Writes event files into the folder tensorboard of a run; those of steps from `first` on are forgotten."""

    def __init__(self, run: Path, first: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise IlladaError("log.tensorboard needs TensorBoard: pip install 'illada[track]'") from error
        self._writer: Any = SummaryWriter(str(run / "tensorboard"), purge_step=first)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Write the numbers of a step."""
        for name, value in scalars(values).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WandB:
    """Sends to a project; the same run folder is the same run there, also after a restart."""

    def __init__(self, run: Path, project: str, recipe: dict[str, Any]):
        try:
            wandb = import_module("wandb")
        except ImportError as error:
            raise IlladaError("log.wandb needs Weights & Biases: pip install 'illada[track]'") from error
        identity = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:12]
        self._run: Any = wandb.init(
            project=project, name=run.name, id=identity, dir=str(run), config=recipe, resume="allow"
        )

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Send the numbers of a step."""
        self._run.log(scalars(values), step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


Tracker = TensorBoard | WandB


def make_trackers(run: Path, log: LogRecipe, first: int, recipe: dict[str, Any]) -> list[Tracker]:
    """Return the trackers that a recipe asks for, for steps from `first` on.

    Raises:
        IlladaError: when one is not installed.
    """
    found: list[Tracker] = [TensorBoard(run, first)] if log.tensorboard else []
    return [*found, WandB(run, log.wandb, recipe)] if log.wandb else found


def scalars(values: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a record by name; those of a list as name/0, name/1, …"""
    found = {}
    for name, value in values.items():
        for place, item in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(item, int | float):
                found[f"{name}/{place}" if isinstance(value, list) else name] = float(item)
    return found
