"""Runs on problems: what they open, and how the model as it is answers problems, by the project's own engine.

Answers are a function of weights, settings, seed and the number of the problem, on any number of processes.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from illada import rng
from illada.data.batches import Batches
from illada.data.shards import Shards
from illada.errors import IlladaError
from illada.evaluation.kinds import KINDS, read_value
from illada.generation.engine import StepEvent, generate
from illada.generation.settings import GenerationSettings, settings_for
from illada.model.config import IlladaConfig
from illada.model.transformer import IlladaForMaskedLM
from illada.post_training.options import ProblemsSection
from illada.post_training.problems import Problem, Problems, messages_of, read_problems
from illada.post_training.rewards import Judge
from illada.post_training.shared import AnswersRun, AnswersTrainer
from illada.text.chat import encode_any
from illada.text.tokenizer import load_tokenizer, tokenizer_sha256
from illada.training.parallel import Processes
from illada.training.recipe import Recipe
from illada.training.setup import build_model
from illada.training.trainer import Result
from illada.weights.runs import model_folder

SAMPLING = 22  # the random stream of answers' seeds


class ProblemData(Shards):
    """What a run on problems has in place of prepared tokens."""

    def __init__(self, problems: Problems, tokenizer: Any):
        self.kind, self.tokens, self.bytes, self.documents = "problems", 0, 0, 0
        self.tokenizer_sha256, self.vocab_size = tokenizer_sha256(tokenizer), len(tokenizer)
        self.index = {"provenance": {"source_fingerprint": problems.fingerprint}}
        self.sources, self.path = [], Path(problems.name)


class AnswerBatches(Batches):
    """What stands for answers that are known only once they are made."""

    def __post_init__(self) -> None:
        """Count an epoch as a step: problems have none."""
        self.samples = self.samples_per_step


class ProblemsRun(AnswersRun):
    """A run on problems.

    Attributes:
        section: what the recipe says of problems, rewards and decoding.
        problems: to train on.
        held_out_problems: to answer at validations.
        rewards: names and weights.
        decoding: settings of the answers.
    """

    command = ""
    """The name of the command, for errors."""
    temperature = 0.0
    """Of the answers, where the recipe does not say it."""
    batches_kind: type[Batches] = AnswerBatches
    section: ProblemsSection
    decoding: GenerationSettings

    def __init__(self, recipe: Recipe, processes: Processes):
        super().__init__(recipe, processes)
        self.decoding = settings_for(self.model, self.decoding)

    def open_data(self) -> list[str]:
        """Open the problems; the tokenizer is the start's."""
        data, section = self.recipe.data, self.section
        self.decoding = decoding_of(section, self.command, self.temperature)
        tasks, exclude = section.tasks or [], section.exclude or []
        self.problems = Problems(tasks, str(data.train), self.recipe.training.seed, exclude)
        held_out = data.validation
        self.held_out_problems = [] if held_out is None else read_problems(held_out)
        self.rewards = weights_of(section, self.problems)
        self.tokenizer = load_tokenizer(model_folder(self.recipe.model.start or ""))
        self.shards = ProblemData(self.problems, self.tokenizer)
        self.held_out = self.shards if self.held_out_problems else None
        return []

    def make_batches(self, config: IlladaConfig) -> Batches:
        """Return what stands for the answers."""
        recipe, window = self.recipe, self.recipe.data.window
        self.check_start(config, self.command)
        return self.batches_kind(
            self.shards, window, recipe.training.samples_per_step, recipe.training.seed, 0.0, rule="llada"
        )


def decoding_of(section: ProblemsSection, command: str, temperature: float) -> GenerationSettings:
    """Return the settings of the answers, with a temperature where the recipe says none.

    Raises:
        IlladaError: when one is unknown or out of range.
    """
    kinds = {**KINDS, "stop": str | list[str]}
    del kinds["seed"]
    given = dict(section.settings or {})
    if unknown := sorted(given.keys() - kinds.keys()):
        raise IlladaError(f"{command}.settings has no {unknown[0]!r}: choose from {', '.join(sorted(kinds))}")
    given = {name: read_value(f"{command}.settings.{name}", value, kinds[name]) for name, value in given.items()}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    return GenerationSettings(**{"temperature": temperature, **given})


def weights_of(section: ProblemsSection, problems: Problems) -> dict[str, float]:
    """Return the rewards and their weights: the recipe's, else those of the tasks."""
    if section.reward is None:
        return dict.fromkeys(problems.rewards, 1.0)
    return {section.reward: 1.0} if isinstance(section.reward, str) else dict(section.reward)


class AnsweringTrainer(AnswersTrainer):
    """Takes steps on the model's own answers.

    Attributes:
        judge: gives the rewards.
        plain: the whole network in one process, where the trained one is divided or compiled.
    """

    run: ProblemsRun
    judge: Judge

    def __init__(self, run: ProblemsRun, title: str):
        super().__init__(run, title)
        self.plain: IlladaForMaskedLM | None = None

    def train(self) -> Result:
        """Take the remaining steps beside the process that judges answers."""
        section = self.run.section
        # The rewards are looked for before the run folder is claimed.
        with Judge(self.run.rewards, section.reward_seconds, own=section.reward is None) as self.judge:
            return super().train()

    @property
    def held_out_problems(self) -> list[Problem]:
        """The problems that validations answer."""
        return self.run.held_out_problems[: self.settings.validation_samples]

    @property
    def greedy(self) -> GenerationSettings:
        """The settings of the answers, without sampling."""
        return replace(self.run.decoding, temperature=0.0, top_k=None, top_p=1.0, min_p=0.0)

    def answer(
        self, problems: list[Problem], settings: GenerationSettings, number: int, orders: bool = False
    ) -> list[dict[str, Any]]:
        """Return a record of an answer to each problem, in every process; each process answers a share.

        A record has problem (its text), text, ids (of prompt, answer and its EOS), prompt (its tokens), rewards (by
        name), passes, finished (whether it ended by itself).

        Args:
            problems: to answer.
            settings: of the decoding.
            number: of these problems among all that are answered; with the seed it says what is drawn.
            orders: also record in which order the answer was written (`Order.record`).

        Raises:
            IlladaError: when a prompt leaves no room for an answer, or a reward does not work.
        """
        run, (rank, ranks) = self.run, self.run.processes.share
        network, share = self.whole_model(), -(-len(problems) // ranks)
        places = range(share * rank, min(share * (rank + 1), len(problems)))
        own = [problems[place] for place in places]
        order = Order() if orders else None
        with run.processes.raise_together():
            room = run.recipe.data.window
            prompts = [encode_any(messages_of(problem), run.tokenizer, "a problem") for problem in own]
            longest = max(map(len, prompts), default=0)
            if longest + settings.block_length + 1 > room:
                raise IlladaError(
                    f"a problem has {longest} tokens, which leaves no room for an answer in data.window {room}"
                )
            seeds = [int(rng.bits(self.settings.seed, SAMPLING, number, place)) & (2**62 - 1) for place in places]
            each = [
                replace(settings, seed=seed, max_new_tokens=min(settings.max_new_tokens, room - len(prompt) - 1))
                for seed, prompt in zip(seeds, prompts, strict=True)
            ]
            half = self.settings.dtype != "fp32"
            with torch.autocast(run.processes.device.type, torch.bfloat16, enabled=half):
                answers = generate(network, prompts, each, run.tokenizer, order)
            rewards = self.judge(own, [answer.text or "" for answer in answers])
        eos = run.tokenizer.eos_token_id
        records = [
            {
                "problem": messages_of(problem)[-1]["content"],
                "text": answer.text,
                "ids": [*prompt, *answer.ids, *([eos] if answer.finish_reason == "stop" or not answer.ids else [])],
                "prompt": len(prompt),
                "rewards": found,
                "passes": answer.forwards,
                "finished": answer.finish_reason == "stop",
                **(order.record(place) if order else {}),
            }
            for place, (problem, prompt, answer, found) in enumerate(zip(own, prompts, answers, rewards, strict=True))
        ]
        return gathered(run.processes, records)

    def whole_model(self) -> IlladaForMaskedLM:
        """Return the network with all its weights in this process; all processes call this together."""
        run = self.run
        if run.processes.count == 1 and not run.recipe.parallel.compile:
            return run.model
        if self.plain is None:
            start = model_folder(run.recipe.model.start or "")
            self.plain = build_model(run.recipe, start, run.model.config).to(run.processes.device)
        weights = dict(run.model.named_parameters())
        for name, parameter in self.plain.named_parameters():
            held = weights[name].detach()
            parameter.data.copy_(held.full_tensor() if isinstance(held, DTensor) else held)
        return self.plain


class Order:
    """Watches answers being written, and tells in which step each token was decided."""

    def __init__(self) -> None:
        self._ids: dict[int, list[int]] = {}
        self._steps: dict[int, list[int]] = {}
        self._taken: dict[int, int] = {}

    def __call__(self, event: StepEvent) -> None:
        """Take note of a step."""
        steps = self._steps.setdefault(event.row, [])
        steps += [-1] * (len(event.ids) - len(steps))
        now = self._taken[event.row] = self._taken.get(event.row, -1) + 1
        for place, committed in enumerate(event.committed):
            if committed and steps[place] < 0:
                steps[place] = now
        self._ids[event.row] = event.ids

    def record(self, row: int) -> dict[str, list[int]]:
        """Return written (ids up to the end of the last block) and order (their steps, -1 where still masked)."""
        return {"written": self._ids[row], "order": self._steps[row]}


def gathered(processes: Processes, items: list[Any]) -> list[Any]:
    """Return the items of all shares, in the shares' order, in every process."""
    if processes.count == 1:
        return items
    parts: list[Any] = [None] * processes.count
    dist.all_gather_object(parts, items)
    return [item for part in parts[:: processes.tensor] for item in part]
