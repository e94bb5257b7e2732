"""Reinforcement learning from rewards: the run and the trainer of `illada rl`.

A rollout serves rl.inner_steps steps: problems are answered by the model as it is, answers are judged, and in each step
their log-probabilities are moved by their advantages (`policy`) under new masks.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from illada.data.batches import Segment
from illada.data.shards import Shards
from illada.post_training.answering import AnsweringTrainer, ProblemsRun, gathered
from illada.post_training.bounds import Views
from illada.post_training.options import RlRecipe, RlSection
from illada.post_training.policy import MASKS, advantages, objective
from illada.post_training.rollouts import Rollout, as_tensor, no_difference, summary, thin_out
from illada.post_training.shared import measuring, share_of
from illada.training.parallel import Objective, Processes
from illada.weights.adapters import without_adapter
from illada.weights.runs import checkpoints

ALIKE = 5
"""After so many rollouts of which nothing could be learnt the run says so."""


class RlRun(ProblemsRun):
    """A run on problems whose answers are judged."""

    recipe: RlRecipe
    command, temperature = "rl", 1.0

    def __init__(self, recipe: RlRecipe, processes: Processes):
        self.section: RlSection = recipe.rl
        super().__init__(recipe, processes)
        if recipe.rl.beta and recipe.rl.method != "gdsd":
            self.open_copy()


class RlTrainer(AnsweringTrainer):
    """Takes the steps of `illada rl`."""

    opens = RlRun
    run: RlRun

    def __init__(self, run: RlRun, title: str):
        super().__init__(run, title)
        self.section = run.recipe.rl
        self.rollout: Rollout | None = None
        self.alike = 0  # rollouts in a row of which nothing could be learnt

    # The batches of a step

    def plan(self, step: int) -> list[list[Segment]]:
        """Return the segments of every answer that a step passes over: once for every view."""
        rollout = self.rollout_of(step)
        views = self.section.samples * (2 if self.is_complementary else 1)
        lengths = {place: len(rollout.records[place]["ids"]) for place in self.pulled(rollout)}
        return [[Segment(place, step, 0, 0, length, 0)] * views for place, length in lengths.items()]

    @property
    def is_complementary(self) -> bool:
        """Whether views have complements, which a wholly masked answer has not."""
        return self.section.complementary and self.section.method != "diffu-grpo"

    def micro_batches(self, step: int) -> Iterator[Any]:  # noqa: ARG002
        """Make nothing ahead: the answers of the next step may depend on this one."""
        return iter(())

    def views(self, rollout: Rollout, inner_step: int) -> Iterator[tuple[list[int], Views, bool]]:
        """Yield the places of answers, their views, and whether they count, for this process's share of a step."""
        section, pulled = self.section, self.pulled(rollout)
        hide = section.hide_prompt if section.method == "diffu-grpo" else 0.0
        for numbers, counts in share_of(len(pulled), self.settings.samples_per_batch, *self.run.processes.share):
            places = [pulled[number] for number in numbers]
            answers = [rollout.answer(place, self.settings.seed, inner_step) for place in places]
            yield places, Views.of(answers, section.samples, self.is_complementary, MASKS[section.method], hide), counts

    def pulled(self, rollout: Rollout) -> list[int]:
        """Return the places of the answers that pull on the weights: without rl.beta those of no advantage do not."""
        if self.section.beta or self.section.method == "gdsd":
            return [*range(len(rollout.records))]
        return rollout.figures["advantage"].nonzero()[:, 0].tolist() or [0]

    # A rollout

    def rollout_of(self, step: int) -> Rollout:
        """Return the answers that a step learns from: in memory, in the run folder, or made now."""
        number, run = step // self.section.inner_steps, self.run
        if self.rollout is None or self.rollout.number != number:
            with run.processes.raise_together():
                self.rollout = Rollout.read(run.folder, number)
            if self.rollout is None:
                self.rollout = self.make_rollout(number)
                if run.processes.first:
                    self.rollout.write(run.folder)
                    kept = [int(path.name.removeprefix("step-")) for path in checkpoints(run.folder)] or [0]
                    thin_out(run.folder, kept[0] // self.section.inner_steps, self.section.keep_every)
        return self.rollout

    def make_rollout(self, number: int) -> Rollout:
        """Answer the problems of a rollout, judge the answers, and note what the model and its start say of them."""
        section, run = self.section, self.run
        count = self.settings.samples_per_step // section.answers
        drawn = [run.problems[number * count + place] for place in range(count)]
        problems = [problem for problem in drawn for _ in range(section.answers)]
        records = self.answer(problems, run.decoding, number)
        rewards_A = as_tensor([record["rewards"]["reward"] for record in records])
        rollout = Rollout(number, records, {"advantage": advantages(rewards_A, section.answers)})
        old, reference = [], []
        for inner_step in range(section.inner_steps):
            old.append(self.sums(rollout, inner_step, run.objective))
            if section.beta and section.method != "gdsd":
                with nullcontext() if run.copy is not None else without_adapter(run.model):
                    reference.append(self.sums(rollout, inner_step, run.copy or run.objective))
        rollout.figures["old"] = torch.cat(old)
        rollout.figures["reference"] = torch.cat(reference) if reference else torch.zeros(0)
        return rollout

    @torch.no_grad()
    def sums(self, rollout: Rollout, inner_step: int, network: Objective) -> Tensor:
        """Return what `objective` compares with: the sums of all answers [A], or of diffu-grpo their tokens [M].

        Those of answers that do not pull are 0.
        """
        found: dict[int, list[float]] = {}
        with measuring(network):
            for places, batch, counts in self.views(rollout, inner_step):
                values = log_p_M = network(batch)
                if self.section.method != "diffu-grpo":
                    values = batch.sums(log_p_M)
                parts = values.split([self.numbers(rollout, place) for place in places])
                if counts:
                    found |= {place: part.tolist() for place, part in zip(places, parts, strict=True)}
        pairs = dict(gathered(self.run.processes, [*found.items()]))
        every = (pairs.get(place, [0.0] * self.numbers(rollout, place)) for place in range(len(rollout.records)))
        return as_tensor([number for numbers in every for number in numbers])

    def numbers(self, rollout: Rollout, place: int) -> int:
        """Return how many numbers `sums` has for an answer."""
        record = rollout.records[place]
        by_token = self.section.method == "diffu-grpo"
        return self.section.samples * (len(record["ids"]) - record["prompt"]) if by_token else 1

    # A step

    def compute_gradients(self, batches: list[Any]) -> tuple[float, dict[str, Any]]:  # noqa: ARG002
        """Add up the gradients of this process's share of the step; return the loss and the figures of the step."""
        step, device = self.state.step, self.run.processes.device
        rollout, inner_step = self.rollout_of(step), step % self.section.inner_steps
        sizes = [self.numbers(rollout, place) for place in range(len(rollout.records))]
        every_A = as_tensor(sizes) / sum(sizes)  # all answers alike, or under diffu-grpo all tokens

        def of(name: str, places: list[int]) -> Tensor | None:
            every = rollout.figures[name]
            if not len(every):
                return None
            own = every.view(self.section.inner_steps, -1)[inner_step].split(sizes)
            return torch.cat([own[place] for place in places]).to(device)

        losses, parts = [], [*self.views(rollout, inner_step)]
        for number, (places, batch, counts) in enumerate(parts):
            log_p_M = self.pass_over(batch, number, len(parts))
            old = of("old", places)
            assert old is not None
            weight_A = every_A[places].to(device) * float(counts)
            advantage_A = rollout.figures["advantage"][places].to(device)
            losses.append(objective(self.section, batch, log_p_M, old, of("reference", places), advantage_A, weight_A))
            losses[-1].loss.backward()
        loss, figures = self.total(losses)
        record = figures | summary(rollout.records, self.section.answers)
        if inner_step == 0:
            self.remark(record)
        return loss, record

    def remark(self, record: dict[str, Any]) -> None:
        """Say when nothing has been learnt for some rollouts."""
        self.alike = self.alike + 1 if record["zero_groups"] == 1 else 0
        if self.alike == ALIKE:
            self.log.say(f"warning: for {ALIKE} rollouts {no_difference(record['reward'])}")

    # Validation

    def validate(self, held_out: Shards) -> dict[str, float]:  # noqa: ARG002 (problems, not tokens)
        """Answer held-out problems without sampling, and return their mean rewards for the log."""
        records = self.answer(self.held_out_problems, self.greedy, 0)
        found = summary(records, 1)
        wrong = sum(record["rewards"]["reward"] < 1 for record in records) / len(records)
        self.log.say(f"step {self.state.step}  held out: reward {found['reward']:.4f}  of 1: {1 - wrong:.1%}")
        names = {name: value for name, value in found.items() if name != "zero_groups"}
        return {f"validation_{name}": value for name, value in names.items()} | {"validation_full": 1 - wrong}
