"""Rewards: plain functions of a problem and the text of an answer, and the process in which they run.

A problem is a record {"prompt" | "messages", ...}; what else it holds is for its reward, a number that usually lies
between 0 and 1. One's own is a function of the same two arguments, named as my_module:my_function.
"""

import ast
import importlib
import math
import multiprocessing
import operator
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from illada.errors import IlladaError, first_line
from illada.evaluation.formulas import boxed, same_formula
from illada.evaluation.programs import FENCE
from illada.evaluation.sandbox import passes

Problem = Mapping[str, Any]
Reward = Callable[[Problem, str], float]

NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
LONGEST_EXPRESSION = 200
"""Characters of an expression of Countdown; a longer one is none."""
_OPERATIONS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def exact(problem: Problem, answer: str) -> float:
    """Return 1 for the problem's `answer`, or one of its `accepted` answers, white space apart."""
    right = [problem["answer"], *problem.get("accepted", ())]
    return float(answer.split() in [text.split() for text in right])


def number(problem: Problem, answer: str) -> float:
    """Return 1 when the last number of an answer is the last one of the problem's `answer`."""
    wanted, given = (NUMBER.findall(str(text)) for text in (problem["answer"], answer))
    return float(bool(given) and float(given[-1].replace(",", "")) == float(wanted[-1].replace(",", "")))


def formula(problem: Problem, answer: str) -> float:
    r"""Return 1 when what stands in the last \boxed{} of an answer, or its last line, equals the problem's `answer`."""
    said = boxed(answer)
    lines = answer.strip().splitlines()
    return float(same_formula(said if said is not None else lines[-1] if lines else "", problem["answer"]))


def program(problem: Problem, answer: str) -> float:
    """Return the share of the problem's `tests` (lines of Python) that the last program of an answer passes."""
    blocks = FENCE.findall(answer)
    source = blocks[-1] if blocks else answer
    tests = problem["tests"]
    return sum(passes(f"{source}\n{test}", seconds=3) for test in tests) / len(tests)


def sudoku(problem: Problem, answer: str) -> float:
    """Return the share of the empty cells of `puzzle` (0 is empty) that are right; 0 when a given cell was changed.

    Right is what `answer` says, or the best of the `accepted` solutions.
    """
    puzzle, said = _digits(problem["puzzle"]), _digits(answer)[: len(_digits(problem["puzzle"]))]
    said += "0" * (len(puzzle) - len(said))
    empty = [i for i, digit in enumerate(puzzle) if digit == "0"]
    if not empty or any(said[i] != digit for i, digit in enumerate(puzzle) if digit != "0"):
        return 0.0
    solutions = map(_digits, [problem["answer"], *problem.get("accepted", ())])
    return max(sum(said[i] == solution[i] for i in empty) for solution in solutions) / len(empty)


def countdown(problem: Problem, answer: str) -> float:
    """Return 1 for an expression of all `numbers`, each once, that equals `target`; 0.1 for one with another value.

    The expression is the last line of an answer, up to an equals sign.
    """
    lines = answer.strip().splitlines()
    text = lines[-1].partition("=")[0].strip() if lines else ""
    if Counter(map(int, re.findall(r"\d+", text[:LONGEST_EXPRESSION]))) != Counter(problem["numbers"]):
        return 0.0
    value = _value(text)
    return 1.0 if value is not None and abs(value - problem["target"]) < 1e-6 else 0.1


def _value(text: str) -> float | None:
    """Return the value of an expression of whole numbers with + - * / and brackets, or None."""

    def of(node: ast.expr) -> float:
        if isinstance(node, ast.BinOp):
            return _OPERATIONS[type(node.op)](of(node.left), of(node.right))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        raise ValueError

    if len(text) > LONGEST_EXPRESSION:
        return None
    try:
        return of(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


def _digits(text: str) -> str:
    return "".join(filter(str.isdigit, text))


REWARDS: dict[str, Reward] = {
    "exact": exact,
    "number": number,
    "formula": formula,
    "program": program,
    "sudoku": sudoku,
    "countdown": countdown,
}
"""Rewards by their names in a recipe."""


def find_reward(name: str) -> Reward:
    """Return a reward by its name, or a function named as my_module:my_function, from the current folder as well.

    Raises:
        IlladaError: when there is none.
    """
    if name in REWARDS:
        return REWARDS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise IlladaError(f"no reward {name!r}: choose from {', '.join(REWARDS)}, or name your own as module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever somebody's module does
        raise IlladaError(
            f"the reward {name} cannot be imported: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not callable(found):
        raise IlladaError(f"the reward {name} is no function")
    return found


def reward_of(problem: Problem) -> str:
    """Return the reward that a problem names, else the one that its fields are for."""
    fields = {"puzzle": "sudoku", "numbers": "countdown"}
    return str(problem.get("reward") or next((name for field, name in fields.items() if field in problem), "exact"))


class Judge:
    """Computes rewards in a process of its own, so that a function that hangs can be stopped; use as a context manager.

    Args:
        weights: names of rewards and their weights; an answer's reward is the weighted sum.
        seconds: most seconds for one reward of one answer.
        own: judge each problem by its own reward among these alone: the one it names, else the one its fields are for.
    """

    def __init__(self, weights: Mapping[str, float], seconds: float, own: bool = False):
        self.weights, self.seconds, self.own = dict(weights), seconds, own
        # spawn: a fork of a process that has threads may hang.
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, list(self.weights)), daemon=True)

    def __enter__(self) -> "Judge":
        """Start the process, and wait until it has found the rewards.

        Raises:
            IlladaError: when one of them cannot be found.
        """
        self._process.start()
        if (problem := self._pipe.recv()) is not None:
            raise IlladaError(problem)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def __call__(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[dict[str, float]]:
        """Return the rewards of each answer by name, and their weighted sum as "reward".

        Raises:
            IlladaError: when a reward raises, is no number, or takes too long.
        """
        found = []
        for problem, answer in zip(problems, answers, strict=True):
            if self.own and self.weights:
                found.append({"reward": self._one(reward_of(problem), problem, answer)})
                continue
            parts = {name: self._one(name, problem, answer) for name in self.weights}
            found.append({**parts, "reward": sum(weight * parts[name] for name, weight in self.weights.items())})
        return found

    def _one(self, name: str, problem: Problem, answer: str) -> float:
        self._pipe.send((name, dict(problem), answer))
        about = f"the reward {name}, given the answer {answer[:60]!r},"
        try:
            if not self._pipe.poll(self.seconds):
                raise IlladaError(f"{about} took more than {self.seconds:g} seconds (reward_seconds)")
            value, error = self._pipe.recv()
        except EOFError:
            raise IlladaError(f"{about} ended its process") from None
        if error is not None:
            raise IlladaError(f"{about} {error}")
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise IlladaError(f"{about} is {value!r}, which is no finite number")
        return float(value)


def _serve(pipe: Connection, names: list[str]) -> None:
    """Answer with rewards until the other end is closed."""
    try:
        rewards = {name: find_reward(name) for name in names}
    except IlladaError as error:
        pipe.send(str(error))
        return
    pipe.send(None)
    while True:
        try:
            name, problem, answer = pipe.recv()
        except EOFError:
            return
        try:
            value = rewards[name](problem, answer)
            pipe.send((value if isinstance(value, int | float) else repr(value)[:80], None))
        except Exception as error:
            lacks = isinstance(error, KeyError) and name in REWARDS
            said = f"needs {error} in every problem" if lacks else f"raised {type(error).__name__}: {first_line(error)}"
            pipe.send((None, said))
