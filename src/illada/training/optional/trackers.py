"""TensorBoard and Weights & Biases, when a recipe names them; metrics.jsonl holds everything they show."""

import hashlib
from importlib import import_module
from pathlib import Path
from typing import Any

from illada.errors import IlladaError, first_line, needs
from illada.training.log import Tracker
from illada.training.recipe import LogRecipe


class TensorBoard:
    """Writes event files into the folder tensorboard of a run; the events of steps from `first` on are dropped."""

    def __init__(self, run: Path, first: int):
        with needs("track", "log.tensorboard"):
            tensorboard = import_module("torch.utils.tensorboard")
        self._writer: Any = tensorboard.SummaryWriter(str(run / "tensorboard"), purge_step=first)

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
        with needs("track", "log.wandb"):
            wandb = import_module("wandb")
        identity = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:12]
        try:
            self._run: Any = wandb.init(
                project=project, name=run.name, id=identity, dir=str(run), config=recipe, resume="allow"
            )
        except Exception as error:  # no key, no network, a name that it does not take
            raise IlladaError(
                f"log.wandb {project!r} cannot be used ({first_line(error)}): `wandb login` first, or set "
                "WANDB_MODE=offline, or leave it out"
            ) from error

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Send the numbers of a step."""
        self._run.log(scalars(values), step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def make_trackers(run: Path, log: LogRecipe, first: int, recipe: dict[str, Any]) -> list[Tracker]:
    """Return the trackers of a recipe, for steps from `first` on.

    Raises:
        IlladaError: when one is not installed, or wandb refuses.
    """
    trackers: list[Tracker] = [TensorBoard(run, first)] if log.tensorboard else []
    return [*trackers, WandB(run, log.wandb, recipe)] if log.wandb else trackers


def scalars(values: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a record by name; those of a list as name/0, name/1, …"""
    flat: dict[str, float] = {}
    for name, value in values.items():
        items = {f"{name}/{i}": item for i, item in enumerate(value)} if isinstance(value, list) else {name: value}
        flat |= {key: float(item) for key, item in items.items() if isinstance(item, int | float)}
    return flat
