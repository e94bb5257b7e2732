"""What the runs of post-training share: a loss of answers, the start beside the model, passes and their sums."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from illada import rng
from illada.errors import IlladaError
from illada.model.config import IlladaConfig
from illada.model.transformer import evaluating
from illada.post_training.bounds import AnswersObjective, Views
from illada.training.parallel import Objective, before_pass, distribute, release
from illada.training.setup import Run
from illada.training.trainer import Trainer
from illada.weights.adapters import is_adapted
from illada.weights.load import load_model
from illada.weights.runs import model_folder


@dataclass(frozen=True)
class Loss:
    """The loss of a batch, and what of it is worth a look."""

    loss: Tensor
    """Weighted sum over the batch, with gradient."""
    figures: dict[str, Tensor]
    """Weighted sums by name."""


def share_of(count: int, size: int, rank: int, ranks: int) -> Iterator[tuple[list[int], bool]]:
    """Yield the places, of so many, that one of `ranks` processes takes in batches of a size, and whether they count.

    All processes get the same number of batches; one that runs out repeats the first place, which does not count then.
    """
    share = -(-count // ranks)
    end = min(share * (rank + 1), count)
    for first in range(share * rank, share * (rank + 1), size):
        yield [0] if first >= end else [*range(first, min(first + size, end))], first < end


@contextmanager
def measuring(objective: Objective) -> Iterator[None]:
    """Let an objective compute without dropout, and free its weights afterwards, as no backward pass follows."""
    with evaluating(objective):
        try:
            yield
        finally:
            release(objective)


class AnswersRun(Run):
    """A run that learns from answers.

    Attributes:
        copy: the start beside the model, where its figures are wanted in every step and no adapter can be left out;
            else None.
    """

    loss = AnswersObjective
    copy: Objective | None = None

    def open_copy(self) -> None:
        """Load the start beside the model, unless an adapter can be left out."""
        if is_adapted(self.model):
            return
        start = self.processes.from_first(lambda: model_folder(self.recipe.model.start or ""))
        model, _ = load_model(str(start), "fp32", "cpu")
        self.copy = distribute(model.requires_grad_(False), self.recipe, self.processes, loss=AnswersObjective).eval()

    def check_start(self, config: IlladaConfig, command: str) -> None:
        """Check that the start has masks, and context for a window.

        Raises:
            IlladaError: when it has not.
        """
        window = self.recipe.data.window
        if config.causal:
            start = self.recipe.model.start
            raise IlladaError(f"{start} is causal and has no masks: {command} tunes models of masked diffusion")
        if window > config.max_position_embeddings:
            raise IlladaError(
                f"data.window {window} is longer than the model's context {config.max_position_embeddings}: lower it"
            )


class AnswersTrainer(Trainer):
    """Takes steps on answers."""

    run: AnswersRun

    def pass_over(self, batch: Views, number: int, count: int) -> Any:
        """Return what the objective says of a batch, with gradient, in pass `number` of a step's `count`."""
        run = self.run
        before_pass(run.objective, last=number == count - 1)
        key = (self.settings.seed, rng.DROPOUT, self.state.step, run.processes.share[0] * count + number)
        with rng.seeded(run.processes.device, *key) if run.recipe.lora.dropout else nullcontext():
            return run.objective(batch)

    def total(self, losses: Iterable[Loss]) -> tuple[float, dict[str, Any]]:
        """Return the loss and the figures of the batches of all processes together."""
        sums: dict[str, float] = {}
        for one in losses:
            for name, value in {"loss": one.loss.detach(), **one.figures}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        loss, *figures = self.run.processes.total(*sums.values())
        return loss, dict(zip([*sums][1:], figures, strict=True))
