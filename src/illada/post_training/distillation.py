"""Fewer passes for the same answers: the run and the trainer of `illada distill`.

The start answers all problems once, carefully; the answers stay in the run folder. Every step takes some of them as
they stood while one of their blocks was written (`certainty`).
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from illada import rng
from illada.data.batches import Batches, Segment
from illada.data.shards import Shards
from illada.errors import IlladaError
from illada.files import read_json, write_text
from illada.generation.settings import GenerationSettings
from illada.model.config import IlladaConfig
from illada.post_training.answering import AnsweringTrainer, ProblemsRun
from illada.post_training.bounds import Views
from illada.post_training.certainty import CertaintyObjective, Written, certainty_loss
from illada.post_training.options import DistillRecipe, DistillSection
from illada.post_training.problems import Problem, messages_of
from illada.post_training.rollouts import Rollout, summary
from illada.post_training.shared import share_of
from illada.training.parallel import Processes
from illada.training.recipe import TrainingRecipe

ANSWERS, HELD_OUT = "answers", "held-out-answers"
"""Folders of a run with the start's answers."""
FRONTIER = "frontier.json"
"""The file in a run folder that says what the start reaches."""
AT_ONCE = 256
"""Problems of one folder of answers: as much as a run that is killed answers again."""
_VALIDATION = 2**40  # numbers of answers to held-out problems, far from those of the others


class OwnAnswers(Batches):
    """The start's answers as a function from step number to their views.

    Attributes:
        written: the answers, once there are some.
        section: how to hide.
        block_length: tokens of a block.
        steps: of the run, as the recipe plans it.
    """

    section: DistillSection
    block_length: int
    steps = 1

    def __post_init__(self) -> None:
        """Begin without answers."""
        self.written: list[Written] = []

    def take(self, written: list[Written], settings: TrainingRecipe) -> None:
        """Learn from these answers."""
        self.written, self.samples = written, len(written)
        self.steps = settings.count_steps(self.samples)

    def views(self, step: int) -> list[tuple[int, int, list[Any]]]:
        """Return number and epoch of each answer of a step, with its views; views are numbered from 0 for each."""
        low, high = self.section.mask_ratio
        ratio = low + (high - low) * min(1.0, step / max(1, self.steps - 1))
        found = []
        for number in range(step * self.samples_per_step, (step + 1) * self.samples_per_step):
            epoch, place = divmod(number, self.samples)
            place = rng.shuffled_index(place, self.samples, self.seed, rng.ORDER, epoch)
            answer, key = self.written[place], (self.seed, place, epoch)
            block = answer.block(self.block_length, key)
            found.append((place, epoch, answer.views(self.section, block, ratio, key)))
        return found

    def plan(self, step: int) -> list[list[Segment]]:
        """Return the segments of every answer of a step: one for each view."""
        return [
            [Segment(place, epoch, part, 0, len(view.ids), 0) for part, view in enumerate(views)]
            for place, epoch, views in self.views(step)
        ]


class DistillRun(ProblemsRun):
    """A run on the start's answers to problems."""

    recipe: DistillRecipe
    loss = CertaintyObjective
    command = "distill"
    batches_kind = OwnAnswers
    batches: OwnAnswers

    def __init__(self, recipe: DistillRecipe, processes: Processes):
        self.section: DistillSection = recipe.distill
        super().__init__(recipe, processes)
        assert isinstance(self.objective, CertaintyObjective)
        self.objective.temperature = recipe.distill.entropy_temperature

    def make_batches(self, config: IlladaConfig) -> Batches:
        """Return the answers, of which there are none yet."""
        batches = super().make_batches(config)
        assert isinstance(batches, OwnAnswers)
        batches.section, batches.samples = self.section, self.problem_count
        batches.block_length = self.section.block_length or self.decoding.block_length
        return batches

    @cached_property
    def problem_count(self) -> int:
        """How many problems the start answers."""
        count, most = self.section.problems, self.problems.count
        if most is None or (count is not None and count < most):
            assert count is not None
            return count
        return most


@dataclass(frozen=True)
class Batch:
    """Views for one forward pass, on the host."""

    views: Views
    weight_N: torch.Tensor
    """Weights of the views in the loss of the step, fp32: 1 divided by its answers, 0 for what does not count."""
    share_N: torch.Tensor
    """Weights in the figures of the step, fp32: 1 divided by its views, or 0."""


class DistillTrainer(AnsweringTrainer):
    """Takes the steps of `illada distill`."""

    opens = DistillRun
    run: DistillRun

    def __init__(self, run: DistillRun, title: str):
        super().__init__(run, title)
        self.section = run.section

    # The start's answers

    def load_newest(self) -> bool:
        """Let the start answer while its weights are at hand, then load the newest checkpoint."""
        run = self.run
        problems = [run.problems[number] for number in range(run.problem_count)]
        self.held_out = self.start_answers(HELD_OUT, self.held_out_problems, _VALIDATION)
        if self.held_out:
            self.start_frontier()
        answers = self.start_answers(ANSWERS, problems, 0)
        if not self.stopped():
            with run.processes.raise_together():
                self.learn_from(answers)
        return super().load_newest()

    def stopped(self) -> bool:
        """Return whether a signal to stop has reached any process."""
        return bool(self.run.processes.highest(max(self.signals, default=0))[0])

    def start_answers(self, name: str, problems: list[Problem], first: int) -> list[dict[str, Any]]:
        """Return the start's answers to problems, read from the run folder or made now; none after a signal to stop.

        Raises:
            IlladaError: when what is there is damaged, or of other problems.
        """
        run, found = self.run, list[dict[str, Any]]()
        for place in range(0, len(problems), AT_ONCE):
            number, own = place // AT_ONCE, problems[place : place + AT_ONCE]
            with run.processes.raise_together():
                rollout = Rollout.read(run.folder, number, name)
                texts = [messages_of(problem)[-1]["content"] for problem in own]
                if rollout is not None and [record["problem"] for record in rollout.records] != texts:
                    raise IlladaError(f"{run.folder / name} has answers to other problems: choose another --output")
            if rollout is None:
                if self.stopped():
                    return []
                rollout = Rollout(number, self.answer(own, run.decoding, first + number, orders=True), {})
                if run.processes.first:
                    rollout.write(run.folder, name)
                    self.say(f"the start has answered {place + len(own):,} of {len(problems):,} problems")
            found += rollout.records
        return found

    def say(self, *messages: str) -> None:
        """Print lines before the log is there."""
        for message in messages:
            print(f"{self.title}: {message}", file=sys.stderr, flush=True)

    def learn_from(self, records: list[dict[str, Any]]) -> None:
        """Keep the answers that ended by themselves and are right.

        Raises:
            IlladaError: when there are none.
        """
        run = self.run
        ended = [record for record in records if record["finished"]]
        right = [record for record in ended if not run.rewards or record["rewards"]["reward"] >= 1 - 1e-9]
        if not right:
            raise IlladaError(
                f"of {len(records):,} answers of the start {len(ended):,} ended by themselves, none of these is right"
                ": take problems that it solves, or raise distill.settings.max_new_tokens"
            )
        run.batches.take([self.written(record) for record in right], self.settings)
        if run.processes.first:
            self.say(
                f"learning from {len(right):,} of {len(records):,} answers: {len(ended):,} ended by themselves"
                + (f", {len(right):,} of them are right" if run.rewards else "")
            )

    def written(self, record: dict[str, Any]) -> Written:
        """Return a record as what steps learn from."""
        settings, room = self.run.decoding, self.run.recipe.data.window - record["prompt"] - 1
        budget = min(settings.max_new_tokens, room) // settings.block_length * settings.block_length
        ids = [*record["ids"][: record["prompt"]], *record["written"]]
        tail = budget if settings.later_masks else 0
        return Written(np.array(ids, dtype=np.int64), record["prompt"], np.array(record["order"], dtype=np.int64), tail)

    # A step

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """Make this process's share of a step."""
        answers = self.run.batches.views(step)
        for places, counts in share_of(len(answers), self.settings.samples_per_batch, *self.run.processes.share):
            own = [view for place in places for view in answers[place][2]]
            rows = [view._replace(answer=number) for number, view in enumerate(own)]
            weight_N = torch.full((len(rows),), 1 / len(answers) if counts else 0.0)
            share_N = weight_N * len(answers) / sum(len(views) for _, _, views in answers)
            yield Batch(Views.pack(rows, [int(row.asked.sum()) for row in rows]), weight_N, share_N)

    def compute_gradients(self, batches: list[Batch]) -> tuple[float, dict[str, Any]]:
        """Add up the gradients of this process's share of the step; return the loss and the figures of the step."""
        losses = []
        for number, batch in enumerate(batches):
            said = self.pass_over(batch.views, number, len(batches))
            losses.append(certainty_loss(batch.views, said, self.section.entropy_weight, batch.weight_N, batch.share_N))
            losses[-1].loss.backward()
        return self.total(losses)

    # Validation: accuracy against passes

    def start_frontier(self) -> None:
        """Note in the run folder what the start reaches, if that has not been done and no signal comes before."""
        file = self.run.folder / FRONTIER
        if self.run.processes.from_first(file.is_file):
            return
        points = [self.point(None, self.held_out)]
        for threshold in self.section.thresholds:
            if self.stopped():
                return
            points.append(self.point_at(threshold))
        if self.run.processes.first:
            write_text(file, json.dumps({"points": points}, indent=1) + "\n")
            self.say(*map(told, points))

    def point_at(self, threshold: float) -> dict[str, Any]:
        """Answer held-out problems with a threshold, and return accuracy and passes."""
        return self.point(threshold, self.answer(self.held_out_problems, under(self.greedy, threshold), _VALIDATION))

    def point(self, threshold: float | None, records: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what answers to the held-out problems are like; threshold None for the start's careful ones."""
        same = [record["text"] == first["text"] for record, first in zip(records, self.held_out, strict=True)]
        found = summary(records, 1)
        judged = {"reward": found["reward"]} if self.run.rewards else {}
        passes = 1 / found["passes_per_token"]
        return {"threshold": threshold, **judged, "same": sum(same) / len(same), "tokens_per_pass": passes}

    def validate(self, held_out: Shards) -> dict[str, float]:  # noqa: ARG002 (problems, not tokens)
        """Answer held-out problems with each threshold, and return what came of it for the log."""
        points = [self.point_at(threshold) for threshold in self.section.thresholds]
        self.log.say(*(f"step {self.state.step}  {told(point)}" for point in points))
        return {
            f"validation_{name}_at_{point['threshold']:g}": value
            for point in points
            for name, value in point.items()
            if name != "threshold"
        }


def under(settings: GenerationSettings, threshold: float) -> GenerationSettings:
    """Return settings that commit whatever is surer than a threshold."""
    return replace(settings, steps_per_block=None, entropy_bound=None, remasking="low_confidence", threshold=threshold)


def told(point: dict[str, Any]) -> str:
    """Return a point of the frontier as a line for people."""
    at = "carefully" if point["threshold"] is None else f"threshold {point['threshold']:g}"
    judged = f"reward {point['reward']:.4f}  " if "reward" in point else ""
    return (
        f"held out {at}: {judged}same as the start's {point['same']:.1%}  tokens a pass {point['tokens_per_pass']:.2f}"
    )


def read_frontier(run: Path) -> list[dict[str, Any]]:
    """Return what the start of a run reaches; empty where the run has no held-out problems."""
    file = run / FRONTIER
    return list(read_json(file)["points"]) if file.is_file() else []
