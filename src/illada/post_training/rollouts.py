"""Rollouts: answers of the model as it is to problems, their rewards, and what the steps on them need to know.

A rollout is a function of weights, seed and number. It is written before the first step on it, so that a run killed
between two steps on the same answers goes on with these answers.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from illada.errors import IlladaError
from illada.files import parse_json
from illada.folders import damage, new_folder
from illada.post_training.bounds import Answer, noise_seed

FOLDER = "rollouts"
ANSWERS, FIGURES = "answers.jsonl", "figures.safetensors"
SHOWN, LONGEST_SHOWN = 3, 200
"""Answers on either end of a sample, and characters of each."""


@dataclass(frozen=True)
class Rollout:
    """Answers to the problems of one or more steps, those to one problem beside each other.

    Attributes:
        number: of the rollout, from 0.
        records: of each answer: problem (its text), text, ids, prompt (its tokens), rewards (by name), passes,
            finished (whether it ended by itself).
        figures: for rl advantage [A]; old and reference, of each inner step one after another (reference is empty where
            nothing keeps the model near its start).
    """

    number: int
    records: list[dict[str, Any]]
    figures: dict[str, Tensor]

    def answer(self, place: int, seed: int, inner_step: int) -> Answer:
        """Return an answer with its noise in an inner step."""
        record = self.records[place]
        own = noise_seed(seed, self.number * len(self.records) + place, inner_step)
        return Answer(np.array(record["ids"], dtype=np.int64), record["prompt"], own)

    def write(self, run: Path, name: str = FOLDER) -> None:
        """Write it into a run folder, below a folder of this name."""
        with new_folder(run / name / f"{self.number:08d}") as folder:
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in self.records)
            (folder / ANSWERS).write_text("".join(lines), encoding="utf-8")
            save_file(self.figures, folder / FIGURES)

    @classmethod
    def read(cls, run: Path, number: int, name: str = FOLDER) -> "Rollout | None":
        """Return what a run folder holds of a rollout; None when it was not made yet.

        Raises:
            IlladaError: when it is damaged.
        """
        folder = run / name / f"{number:08d}"
        if not folder.is_dir():
            return None
        if faults := damage(folder):
            raise IlladaError(f"{faults[0]}: delete {folder}, and its answers are made again")
        lines = (folder / ANSWERS).read_text(encoding="utf-8").splitlines()
        return cls(number, [parse_json(line) for line in lines], load_file(folder / FIGURES))


def numbers_of(run: Path) -> list[int]:
    """Return the numbers of the rollouts in a run folder, in order."""
    return sorted(int(path.name) for path in (run / FOLDER).glob("[0-9]*") if path.name.isdigit())


def thin_out(run: Path, before: int, every: int) -> None:
    """Delete the rollouts below a number, except every so manyth, which are there to be read."""
    for number in numbers_of(run):
        if number < before and number % every:
            shutil.rmtree(run / FOLDER / f"{number:08d}")


def samples(run: Path) -> list[str]:
    """Return the best and the worst answers of the latest rollout in a run folder as lines to read; [] without any."""
    numbers = numbers_of(run)
    rollout = Rollout.read(run, numbers[-1]) if numbers else None
    if rollout is None:
        return []
    ranked = sorted(rollout.records, key=lambda record: -record["rewards"]["reward"])
    lines = [f"answers of rollout {rollout.number}, best and worst of {len(ranked)}, all in {run / FOLDER}:"]
    for record in [*ranked[:SHOWN], *ranked[max(SHOWN, len(ranked) - SHOWN) :]]:
        problem, text = (json.dumps(record[name], ensure_ascii=False)[:LONGEST_SHOWN] for name in ("problem", "text"))
        lines.append(f"  {record['rewards']['reward']:6.3g}  {problem} -> {text}")
    return lines


def summary(records: Sequence[dict[str, Any]], answers: int) -> dict[str, float]:
    """Return the means over answers for the log: each reward, answer_tokens, passes a token, and zero_groups.

    zero_groups is the share of problems whose answers all have the same reward, so that nothing can be learnt of them.
    """
    count = len(records)
    names = list(records[0]["rewards"])
    found = {name: sum(record["rewards"][name] for record in records) / count for name in names}
    if len(names) == 2:  # one reward, and the sum of it alone
        found = {"reward": found["reward"]}
    tokens = sum(len(record["ids"]) - record["prompt"] for record in records)
    groups = [records[first : first + answers] for first in range(0, count, answers)]
    alike = sum(len({record["rewards"]["reward"] for record in group}) == 1 for group in groups)
    return {
        **found,
        "answer_tokens": tokens / count,
        "passes_per_token": sum(record["passes"] for record in records) / tokens,
        "zero_groups": alike / len(groups),
    }


def no_difference(reward: float) -> str:
    """Say what to do when no problem's answers differ in their reward."""
    return (
        f"all answers to each problem had the same reward (mean {reward:.3g}), so nothing is learnt: take problems of "
        "another difficulty, a finer reward, more rl.answers or a higher rl.settings.temperature"
    )


def as_tensor(values: Sequence[float]) -> Tensor:
    """Return numbers as fp32."""
    return torch.tensor(values, dtype=torch.float32)
