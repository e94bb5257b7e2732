"""Preference optimisation on bounds (VRPO, arXiv 2505.19223): the batches, the loss, the trainer of `illada dpo`.

    loss = -log σ(β [(B_θ - B_ref)(chosen) - (B_θ - B_ref)(rejected)]) - anchor B_θ(chosen) / L

Model and reference see the same masks, and so do the two answers of a pair as far as both are long: what is left of the
noise is that of the difference. The second term, off by default, keeps the chosen answer probable (arXiv 2404.19733):
without it both answers may lose probability to others that stand in no pair.

Shape letters: P pairs · A = 2P answers, chosen and rejected in turn.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import logsigmoid

from illada.data.batches import Batches, Segment
from illada.data.shards import Shards
from illada.errors import IlladaError
from illada.files import write_bytes
from illada.model.config import IlladaConfig
from illada.post_training.bounds import Answer, Views, noise_seed
from illada.post_training.options import DpoRecipe, DpoSection
from illada.post_training.shared import AnswersRun, AnswersTrainer, Loss, measuring, share_of
from illada.training.parallel import Processes
from illada.training.validation import VALIDATION_SEED
from illada.weights.adapters import without_adapter

REFERENCE = "reference.safetensors"
"""The file in a run folder with the bounds of the start, "train" and "held_out", fp32 [A]."""


class PairBatches(Batches):
    """The pairs as a function from step number; a sample is a pair, its segments the views of its two answers."""

    views = 1
    """How often an answer is seen."""

    def __post_init__(self) -> None:
        """Count the pairs of each source, and check that each fits the window."""
        if self.shards.kind != "preference":
            raise IlladaError(
                f"{self.shards.path} holds no pairs, its kind is {self.shards.kind}: prepare chosen and rejected "
                "answers with --kind preference"
            )
        self._counts = [source.documents // 2 for source in self.shards.sources]
        self._first_sample = list(accumulate(self._counts, initial=0))
        self.samples = self._first_sample[-1]
        check_lengths(self.shards, self.window)

    def plan(self, step: int) -> list[list[Segment]]:
        """Return the segments of every pair of a step: each answer once for every view."""
        pairs = []
        for sample, epoch in self.chosen(step, self.samples_per_step):
            answers = [self._document(sample, epoch, part) for part in range(2)]
            pairs.append([answer for answer in answers for _ in range(self.views)])
        return pairs

    def _document(self, sample: int, epoch: int, part: int) -> Segment:
        start, end, prompt = self.shards.document_span(2 * sample + part)
        return Segment(sample, epoch, part, start, end - start, 0, visible=prompt)


def check_lengths(shards: Shards, window: int) -> None:
    """Check that no answer is longer than the window.

    Raises:
        IlladaError: when one is.
    """
    lengths = [end - start for start, end, _ in map(shards.document_span, range(shards.documents))]
    longer = sum(length > window for length in lengths)
    if longer:
        raise IlladaError(
            f"{longer:,} of {len(lengths):,} conversations in {shards.path} are longer than data.window {window}, "
            f"up to {max(lengths):,} tokens: raise data.window, or leave them out"
        )


@dataclass(frozen=True)
class PairBatch:
    """Pairs for one forward pass, on the host."""

    views: Views
    sample_P: Tensor
    """Number of each pair in the data, int64."""
    weight_P: Tensor
    """Weight of each pair in the loss of the step, fp32: 1 divided by the pairs of the step, or 0."""


def pair_batches(
    pairs: list[tuple[int, int]],
    per_batch: int,
    shards: Shards,
    seed: int,
    section: DpoSection,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[PairBatch]:
    """Yield the share of one of `ranks` processes of pairs (number, epoch), so many in a batch (`share_of`)."""
    for places, counts in share_of(len(pairs), per_batch, rank, ranks):
        own = [pairs[place] for place in places]
        answers = [
            read_answer(shards, 2 * number + part, noise_seed(seed, number, epoch))
            for number, epoch in own
            for part in range(2)
        ]
        weight_P = torch.full((len(own),), 1 / len(pairs) if counts else 0.0)
        numbers = torch.tensor([number for number, _ in own])
        yield PairBatch(Views.of(answers, section.samples, section.complementary), numbers, weight_P)


def read_answer(shards: Shards, document: int, seed: int) -> Answer:
    """Return a prepared conversation as an answer under noise."""
    start, end, prompt = shards.document_span(document)
    return Answer(shards.read(start, end - start), prompt, seed)


def preference(
    bounds_A: Tensor,
    reference_A: Tensor,
    lengths_A: Tensor,
    weight_P: Tensor,
    beta: float,
    normalise: bool = False,
    anchor: float = 0.0,
) -> Loss:
    """Return the loss of pairs of answers from the bounds of model and reference, each in nats [A].

    Its figures are accuracy (share of pairs whose margin is above 0), margin (argument of σ), chosen_gap and
    rejected_gap (bound of the model minus that of the start, in nats).

    Args:
        bounds_A: of the model, with gradient.
        reference_A: of the start, under the same masks.
        lengths_A: tokens of the answers.
        weight_P: weights of the pairs.
        beta: factor of the margin.
        normalise: divide each answer's bounds by its tokens.
        anchor: weight of the chosen answer's own bound, a token.
    """
    gap_A = bounds_A - reference_A
    scaled_A = gap_A / lengths_A if normalise else gap_A
    margin_P = beta * (scaled_A[0::2] - scaled_A[1::2])
    with torch.no_grad():
        values = {
            "accuracy": (margin_P > 0).float(),
            "margin": margin_P,
            "chosen_gap": gap_A[0::2],
            "rejected_gap": gap_A[1::2],
        }
        figures = {name: (weight_P * value_P).sum().detach() for name, value_P in values.items()}
    loss_P = -logsigmoid(margin_P)
    if anchor:
        loss_P = loss_P - anchor * (bounds_A / lengths_A)[0::2]
    return Loss((weight_P * loss_P).sum(), figures)


class PreferenceRun(AnswersRun):
    """A run on pairs."""

    recipe: DpoRecipe

    def __init__(self, recipe: DpoRecipe, processes: Processes):
        super().__init__(recipe, processes)
        with processes.raise_together():
            if self.held_out is not None:
                if self.held_out.kind != "preference":
                    raise IlladaError(f"{self.held_out.path} holds no pairs: prepare it with --kind preference")
                check_lengths(self.held_out, recipe.data.window)
        if recipe.dpo.reference == "live":
            self.open_copy()

    def make_batches(self, config: IlladaConfig) -> Batches:
        """Return the pairs as a function of the step."""
        recipe, data = self.recipe, self.recipe.data
        self.check_start(config, "dpo")
        numbers = (data.window, recipe.training.samples_per_step, recipe.training.seed, 0.0)
        batches = PairBatches(self.shards, *numbers, rule="llada")
        batches.views = recipe.dpo.samples * (1 + recipe.dpo.complementary)
        return batches


class PreferenceTrainer(AnswersTrainer):
    """Takes the steps of `illada dpo`."""

    opens = PreferenceRun
    run: PreferenceRun

    def load_newest(self) -> bool:
        """Compute the bounds of the start while its weights are at hand, then load the newest checkpoint."""
        if not hasattr(self, "reference"):
            self.reference = self._kept()
        return super().load_newest()

    def _kept(self) -> dict[str, Tensor]:
        """Return the bounds of the start by part of the data [A], from the run folder if they are there."""
        run = self.run
        parts = {"held_out": run.held_out} if run.held_out is not None else {}
        if run.recipe.dpo.reference == "kept":
            parts["train"] = run.shards
        file = run.folder / REFERENCE
        if run.processes.from_first(file.is_file):
            with run.processes.raise_together():
                return read_reference(file, {name: shards.documents for name, shards in parts.items()})
        found = {name: self._bounds(shards, name) for name, shards in parts.items()}
        if run.processes.first:
            write_bytes(file, save(found))
        return found

    @torch.no_grad()
    def _bounds(self, shards: Shards, part: str) -> Tensor:
        """Return the bounds of all answers by the network as it is, fp32 [A]; each process computes a share."""
        run = self.run
        bounds_A = torch.zeros(shards.documents)
        with measuring(run.objective):
            for batch in self._batches([(n, 0) for n in range(shards.documents // 2)], shards, part):
                found_A = batch.views.sums(run.objective(batch.views)).cpu()
                for number, pair_2, weight in zip(batch.sample_P, found_A.view(-1, 2), batch.weight_P, strict=True):
                    if weight:
                        bounds_A[2 * number : 2 * number + 2] = pair_2
        return torch.tensor(run.processes.total(*bounds_A.tolist()), dtype=torch.float32)

    def _batches(self, pairs: list[tuple[int, int]], shards: Shards, part: str) -> Iterator[PairBatch]:
        seed = VALIDATION_SEED if part == "held_out" else self.settings.seed
        share = self.run.processes.share
        return pair_batches(pairs, self.settings.samples_per_batch, shards, seed, self.run.recipe.dpo, *share)

    def micro_batches(self, step: int) -> Iterator[PairBatch]:
        """Make this process's share of a step."""
        live = self.run.recipe.dpo.reference == "live"
        pairs = [(parts[0].sample, parts[0].epoch if live else 0) for parts in self.plan(step)]
        return self._batches(pairs, self.run.shards, "train")

    def compute_gradients(self, batches: list[PairBatch]) -> tuple[float, dict[str, Any]]:
        """Add up the gradients of this process's share of the step; return the loss and the figures of the step."""
        losses = []
        for number, batch in enumerate(batches):
            reference_A = self._reference(batch, "train")
            bounds_A = batch.views.sums(self.pass_over(batch.views, number, len(batches)))
            losses.append(self._preference(bounds_A, reference_A, batch))
            losses[-1].loss.backward()
        return self.total(losses)

    def _preference(self, bounds_A: Tensor, reference_A: Tensor, batch: PairBatch) -> Loss:
        section, device = self.run.recipe.dpo, bounds_A.device
        parts = (reference_A.to(device), batch.views.lengths_A.to(device), batch.weight_P.to(device))
        return preference(bounds_A, *parts, section.beta, section.normalise, section.anchor)

    def _reference(self, batch: PairBatch, part: str) -> Tensor:
        """Return the start's bounds of a batch [A]."""
        if part in self.reference:
            return self.reference[part].view(-1, 2)[batch.sample_P].flatten()
        start = self.run.copy or self.run.objective
        beside = nullcontext() if self.run.copy is not None else without_adapter(self.run.model)
        with torch.no_grad(), measuring(start), beside:
            return batch.views.sums(start(batch.views))

    @torch.no_grad()
    def validation_loss(self, held_out: Shards) -> float:
        """Return the loss of held-out pairs under masks of their own; each process computes a share."""
        whole = held_out.documents // 2
        count = min(whole, self.settings.validation_samples or whole)
        losses = []
        with measuring(self.run.objective):
            for batch in self._batches([(i * whole // count, 0) for i in range(count)], held_out, "held_out"):
                bounds_A = batch.views.sums(self.run.objective(batch.views))
                losses.append(self._preference(bounds_A, self._reference(batch, "held_out"), batch))
        loss, self.held_out = self.total(losses)
        return loss

    def describe_validation(self, loss: float, own: float, held_out: Shards) -> dict[str, float]:  # noqa: ARG002 (the base has text)
        """Say what a validation showed; with an average of the weights, what the average showed."""
        figures = self.held_out
        self.log.say(
            f"step {self.state.step}  held out: loss {loss:.4f}  accuracy {figures['accuracy']:.1%}  "
            f"margin {figures['margin']:.3f}"
        )
        record = {f"validation_{name}": value for name, value in figures.items()}
        return record | ({"raw_validation_loss": own} if self.settings.average else {})


def read_reference(file: Path, answers: dict[str, int]) -> dict[str, Tensor]:
    """Return the start's bounds that a run has kept, for so many answers of each part of the data.

    Raises:
        IlladaError: when they are damaged.
    """
    try:
        found = load_file(file)
        complete = all(found[name].shape == (count,) for name, count in answers.items())
    except Exception as error:  # safetensors has an error of its own
        raise IlladaError(f"{file} is damaged ({error}): delete it and it is made again") from error
    if not complete or not all(bool(values.isfinite().all()) for values in found.values()):
        raise IlladaError(f"{file} does not fit the data or holds no numbers: choose another --output")
    return {name: found[name] for name in answers}
