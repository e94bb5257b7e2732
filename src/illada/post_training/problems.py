"""Problems to answer: drawn without end by tasks of ours, or read from a file; a function of seed and number."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from illada import rng
from illada.errors import IlladaError
from illada.files import parse_json, read_lines
from illada.toy_tasks import TASKS as TOYS
from illada.toy_tasks import sudoku_grids, sudoku_is_held_out, sudoku_rows, sudoku_solutions

Problem = dict[str, Any]
"""A record {"prompt" | "messages", ...}; what else it holds is for its reward."""


def _sudoku(draw: random.Random) -> Problem:
    """Return a 4x4 sudoku of 4 to 12 empty cells with one solution in the demo's words, none of its held-out ones."""
    while True:
        grid = draw.choice(sudoku_grids())
        if sudoku_is_held_out(grid):
            continue
        hidden = draw.sample(range(16), draw.randint(4, 12))
        puzzle = "".join("0" if i in hidden else digit for i, digit in enumerate(grid))
        if len(sudoku_solutions(puzzle)) == 1:
            return sudoku_problem(puzzle)


def sudoku_problem(puzzle: str) -> Problem:
    """Return a 4x4 sudoku (16 digits, 0 is empty) as a problem; all its solutions are right."""
    first, *others = map(sudoku_rows, sudoku_solutions(puzzle))
    return {"prompt": f"Solve\n{sudoku_rows(puzzle)}", "puzzle": puzzle, "answer": first, "accepted": others}


def _countdown(draw: random.Random) -> Problem:
    """Return three numbers to 100 and a target to 100 that an expression of all of them reaches."""
    while True:
        numbers = [draw.randint(1, 100) for _ in range(3)]
        text, target = _expression(draw, numbers)
        if target.denominator == 1 and 0 < target <= 100:
            return countdown_problem(numbers, int(target)) | {"answer": text}


def countdown_problem(numbers: Sequence[int], target: int) -> Problem:
    """Return a problem of Countdown in words."""
    return {
        "prompt": f"Make {target} from {' '.join(map(str, numbers))}.",
        "numbers": list(numbers),
        "target": target,
    }


def _expression(draw: random.Random, numbers: Sequence[int]) -> tuple[str, Fraction]:
    """Return an expression of all numbers, in some order, and its value; division by zero gives 0."""
    parts = [(str(number), Fraction(number)) for number in draw.sample(list(numbers), len(numbers))]
    while len(parts) > 1:
        place = draw.randrange(len(parts) - 1)
        (left, one), (right, other) = parts[place : place + 2]
        sign = draw.choice("+-*/")
        if sign == "/" and not other:
            return str(numbers), Fraction(0)
        value = {"+": one + other, "-": one - other, "*": one * other}.get(sign) if sign != "/" else one / other
        assert value is not None
        inner = f"{left} {sign} {right}"
        parts[place : place + 2] = [(f"({inner})" if len(parts) > 2 else inner, value)]
    return parts[0]


def _toy(task: str) -> Callable[[random.Random], Problem]:
    def make(draw: random.Random) -> Problem:
        while True:
            example, held_out = TOYS[task][0](draw)
            if not held_out:
                return {"prompt": example.prompt, "answer": example.answer}

    return make


TASKS: dict[str, tuple[Callable[[random.Random], Problem], str]] = {
    **{name: (_toy(name), "exact") for name in TOYS},
    "sudoku": (_sudoku, "sudoku"),
    "countdown": (_countdown, "countdown"),
}
"""Tasks by name: what draws a problem, and its reward. Those of the demo leave out its held-out problems."""


class Problems:
    """Problems by number, from 0 without end; a file's come again in another order every epoch.

    Attributes:
        count: how many a file holds; None for tasks, which never end.
        fingerprint: hash of what they are made from.
        rewards: names of the rewards of the tasks, with weight 1; empty for a file.

    Args:
        tasks: names in `TASKS`, taken in turn; empty to read a file.
        file: jsonl file of problems.
        seed: of the draws, and of the order.
        excluded: files of problems that are never drawn: those to test on.

    Raises:
        IlladaError: when a task is unknown or a file cannot be used.
    """

    def __init__(self, tasks: Sequence[str], file: str, seed: int, excluded: Sequence[str] = ()):
        if unknown := [name for name in tasks if name not in TASKS]:
            raise IlladaError(f"no task {unknown[0]!r}: choose from {', '.join(TASKS)}")
        self.tasks, self.seed, self.name = list(tasks), seed, file or " and ".join(tasks)
        self._excluded = {prompt_of(record) for name in excluded for record in read_problems(name)}
        self._records = [record for record in (read_problems(file) if file else ()) if not self._is_excluded(record)]
        if file and not self._records:
            raise IlladaError(f"{file} holds no problem that is not excluded")
        self.count = len(self._records) if file else None
        content = json.dumps([self.tasks, self._records, sorted(self._excluded)], sort_keys=True)
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()
        self.rewards = list(dict.fromkeys(TASKS[name][1] for name in tasks))

    def __getitem__(self, number: int) -> Problem:
        """Return a problem; of several tasks it names its own as "task", of an own reward as "reward"."""
        if self.count is not None:
            epoch, place = divmod(number, self.count)
            return self._records[rng.shuffled_index(place, self.count, self.seed, rng.ORDER, epoch)]
        turn, place = divmod(number, len(self.tasks))
        name = self.tasks[place]
        make, reward = TASKS[name]
        draw = random.Random(f"{self.seed} {name} {turn}")
        for _ in range(1000):
            problem = make(draw)
            if not self._is_excluded(problem):
                return {**problem, "task": name, "reward": reward}
        raise IlladaError(f"the task {name} draws nothing that is not excluded")

    def _is_excluded(self, problem: Problem) -> bool:
        return prompt_of(problem) in self._excluded


def prompt_of(problem: Problem) -> str:
    """Return what a problem says, as one text."""
    return problem["prompt"] if "prompt" in problem else json.dumps(problem["messages"], sort_keys=True)


def messages_of(problem: Problem) -> list[dict[str, str]]:
    """Return a problem as the beginning of a conversation."""
    return problem["messages"] if "messages" in problem else [{"role": "user", "content": problem["prompt"]}]


def read_problems(path: str) -> list[Problem]:
    """Return the problems of a jsonl file.

    Raises:
        IlladaError: when there is no such file, or a line is no problem.
    """
    if not Path(path).is_file():
        raise IlladaError(f'no problems at {path}: give a jsonl file of {{"prompt", "answer", ...}}')
    return list(_lines(path))


def _lines(path: str) -> Iterator[Problem]:
    for number, line in read_lines(path):
        try:
            record = parse_json(line)
        except ValueError as error:
            raise IlladaError(f"{path}: line {number} is no JSON ({error})") from None
        asked = record.get("prompt", record.get("messages")) if isinstance(record, dict) else None
        texts = [asked] if isinstance(asked, str) else asked if isinstance(asked, list) else []
        if not texts or not all(isinstance(one, str) or _is_message(one) for one in texts):
            raise IlladaError(f'{path}: line {number} has no "prompt" (a text) or "messages" (a conversation so far)')
        yield record


def _is_message(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("role"), str) and isinstance(part.get("content"), str)
