"""Seven tasks whose answers can be checked, with held-out problems; the demo teaches them.

A hash of what makes a problem the *same* problem decides whether it is held out, so that no test problem appears in
training under another name: 12+34 and 34+12 are one problem; a list in another order, a string's mirror image and a
sudoku with its digits exchanged are no new problems either.
"""

import ast
import hashlib
import itertools
import random
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Split = Literal["train", "test"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Example:
    """A question with its only right answer."""

    task: str
    prompt: str
    answer: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The example as a conversation of two messages."""
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.answer}]


def _held_out(*identity: object) -> bool:
    """Return whether a problem is in the test split, as a tenth of all problems are."""
    digest = hashlib.blake2b(repr(identity).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 10 == 0


def _addition(rng: random.Random) -> tuple[Example, bool]:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return Example("addition", f"Add {a} and {b}.", str(a + b)), _held_out("addition", *sorted((a, b)))


def _sorting(rng: random.Random) -> tuple[Example, bool]:
    digits = [rng.choice("0123456789") for _ in range(6)]
    ordered = "".join(sorted(digits))
    return Example("sorting", f"Sort {''.join(digits)}.", ordered), _held_out("sorting", ordered)


def _letters(rng: random.Random, count: int) -> list[str]:
    return [rng.choice(LETTERS) for _ in range(count)]


def _reversal(rng: random.Random) -> tuple[Example, bool]:
    letters = _letters(rng, 4)
    forward, backward = " ".join(letters), " ".join(reversed(letters))
    return Example("reversal", f"Reverse: {forward}", backward), _held_out("reversal", min(forward, backward))


def _capitals(rng: random.Random) -> tuple[Example, bool]:
    letters = " ".join(_letters(rng, 10))
    return Example("capitals", f"Capitals: {letters}", letters.upper()), _held_out("capitals", letters)


def _shift(rng: random.Random) -> tuple[Example, bool]:
    letters = _letters(rng, 6)
    shifted = [LETTERS[(LETTERS.index(letter) + 1) % 26] for letter in letters]
    # Letters that all move by one distance round the alphabet stay the same problem.
    steps = tuple((ord(b) - ord(a)) % 26 for a, b in itertools.pairwise(letters))
    return Example("shift", f"Shift: {' '.join(letters)}", " ".join(shifted)), _held_out("shift", steps)


def _relabelled(grid: str) -> str:
    """Return the grid with digits renamed in order of first appearance, equal for all relabellings of one pattern."""
    names: dict[str, str] = {}
    return "".join(names.setdefault(digit, str(len(names) + 1)) for digit in grid)


@cache
def sudoku_grids() -> tuple[str, ...]:
    """Return all 288 solved 4x4 sudokus, row after row."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    units = [[r * 4 + c for r in range(4)] for c in range(4)]
    units += [[r * 4 + c, r * 4 + c + 1, r * 4 + c + 4, r * 4 + c + 5] for r in (0, 2) for c in (0, 2)]
    grids = ("".join(four) for four in itertools.product(rows, repeat=4))
    return tuple(grid for grid in grids if all(len({grid[i] for i in unit}) == 4 for unit in units))


@cache
def _sudoku_patterns() -> list[str]:
    """Return the 12 patterns of the 288 grids; each occurs under the 24 namings of the digits."""
    return sorted({_relabelled(grid) for grid in sudoku_grids()})


def sudoku_is_held_out(grid: str) -> bool:
    """Return whether a solved grid has one of the three patterns of the 12 that are for testing."""
    return _sudoku_patterns().index(_relabelled(grid)) % 4 == 3


def sudoku_solutions(puzzle: str) -> list[str]:
    """Return the solved grids that agree with a puzzle of 16 digits, where 0 is empty."""
    return [grid for grid in sudoku_grids() if all(p in ("0", g) for p, g in zip(puzzle, grid, strict=True))]


def sudoku_rows(cells: str) -> str:
    """Return 16 cells in four lines."""
    return "\n".join(cells[i : i + 4] for i in range(0, 16, 4))


def _sudoku(rng: random.Random) -> tuple[Example, bool]:
    grid = rng.choice(sudoku_grids())
    hidden = rng.sample(range(16), rng.randint(6, 9))
    puzzle = "".join("0" if i in hidden else digit for i, digit in enumerate(grid))
    # Draw again until the clues leave one solution.
    if len(sudoku_solutions(puzzle)) > 1:
        return _sudoku(rng)
    return Example("sudoku", f"Solve\n{sudoku_rows(puzzle)}", sudoku_rows(grid)), sudoku_is_held_out(grid)


def standard_library() -> Path:
    """Return the folder of this Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


@cache
def library_names() -> tuple[tuple[str, str], ...]:
    """Return (name, module) for public top-level classes and functions that exactly one module of the library defines.

    Modules with fewer than ten such names are left out, so that every module is seen in training and in test.
    """
    where: dict[str, set[str]] = {}
    folder = standard_library()
    for module in sorted(sys.stdlib_module_names):
        path = next((p for p in (folder / f"{module}.py", folder / module / "__init__.py") if p.is_file()), None)
        if module.startswith("_") or path is None:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                where.setdefault(node.name, set()).add(module)
    pairs = [(name, next(iter(modules))) for name, modules in sorted(where.items()) if len(modules) == 1]
    size = Counter(module for _, module in pairs)
    return tuple((name, module) for name, module in pairs if size[module] >= 10)


def _library(rng: random.Random) -> tuple[Example, bool]:
    name, module = rng.choice(library_names())
    return Example("library", f"Which module defines {name}?", module), _held_out("library", name)


TASKS: dict[str, tuple[Callable[[random.Random], tuple[Example, bool]], float]] = {
    "shift": (_shift, 0.12),
    "capitals": (_capitals, 0.08),
    "reversal": (_reversal, 0.16),
    "sorting": (_sorting, 0.16),
    "addition": (_addition, 0.16),
    "sudoku": (_sudoku, 0.24),
    "library": (_library, 0.08),
}
"""Each task's generator and its share of the training mixture."""


def examples(split: Split, seed: int, tasks: Sequence[str]) -> Iterator[Example]:
    """Yield examples of a split without end; the tasks are mixed in their shares."""
    rng = random.Random(f"{split} {seed} {' '.join(tasks)}")
    shares = [TASKS[task][1] for task in tasks]
    while True:
        name = rng.choices(tasks, shares)[0]
        example, held_out = TASKS[name][0](rng)
        if held_out == (split == "test"):
            yield example


def held_out(task: str, count: int, seed: int = 0) -> list[Example]:
    """Return up to `count` different held-out problems of a task."""
    problems: dict[str, Example] = {}
    for example in itertools.islice(examples("test", seed, [task]), 40 * count):
        problems.setdefault(example.prompt, example)
        if len(problems) == count:
            break
    return list(problems.values())


def held_out_mix(tasks: Sequence[str], count: int, seed: int = 0) -> list[Example]:
    """Return up to `count` different held-out problems, of all tasks in turn."""
    columns = [held_out(task, -(-count // len(tasks)), seed) for task in tasks]
    return [example for row in itertools.zip_longest(*columns) for example in row if example is not None][:count]


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question; the right candidate is the one at `answer`."""

    prompt: str
    candidates: tuple[str, ...]
    answer: int


def library_choices(count: int, seed: int = 0) -> list[Choice]:
    """Return held-out library questions, each with the right module and three others that occur as answers."""
    rng = random.Random(f"choices {seed}")
    modules = sorted({module for _, module in library_names()})
    choices = []
    for example in held_out("library", count, seed):
        candidates = [example.answer, *rng.sample([m for m in modules if m != example.answer], 3)]
        rng.shuffle(candidates)
        choices.append(Choice(example.prompt, tuple(candidates), candidates.index(example.answer)))
    return choices
