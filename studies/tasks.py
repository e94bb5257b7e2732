"""Write the studies' instructions: problems with one right answer each, to train on, to validate on and to test.

    python studies/tasks.py --sudokus 4x4_test_sudoku.csv

`lengths`: small skills whose answers have from one word to 32, so that an answer's length has to be found too.
`sudoku`: 4x4 sudokus with eight empty cells. With `--sudokus`, the file of the d1 repository (arXiv 2504.12216), the
test problems are the published ones; else others drawn like them. No test problem is in training; solved grids are,
since there are only 288.

Each folder of `studies/data` gets train.jsonl, held-out.jsonl and problems.jsonl of {"prompt", "response", "group"},
with `accepted` where other answers are right too, and `lengths` choices.jsonl of {"context", "candidates", "answer",
"group"}. The same files come out every time.
"""

import argparse
import csv
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from texts import write_if_new

from illada.toy_tasks import LETTERS, sudoku_grids, sudoku_solutions

FOLDER = Path(__file__).with_name("data")
Record = dict[str, Any]
TRAINING, HELD_OUT, TEST = 60_000, 500, 500


def count_up(rng: random.Random, length: int) -> tuple[str, list[str]]:
    """Return a task of counting."""
    first = rng.randint(1, 80)
    return f"Count from {first} to {first + length - 1}.", [str(first + i) for i in range(length)]


def capitals(rng: random.Random, length: int) -> tuple[str, list[str]]:
    """Return a task of writing letters large."""
    letters = rng.choices(LETTERS, k=length)
    return f"Capitals: {' '.join(letters)}", [letter.upper() for letter in letters]


def backwards(rng: random.Random, length: int) -> tuple[str, list[str]]:
    """Return a task of turning letters round."""
    letters = rng.choices(LETTERS, k=length)
    return f"Backwards: {' '.join(letters)}", letters[::-1]


def repeat(rng: random.Random, length: int) -> tuple[str, list[str]]:
    """Return a task of saying a letter many times."""
    letters = rng.choices(LETTERS, k=2)
    return f"Say {' and '.join(letters)} {length} times.", [*letters] * length


def last(rng: random.Random, length: int) -> tuple[str, list[str]]:
    """Return a task of finding the end of a list of letters."""
    letters = rng.choices(LETTERS, k=length + 1)
    return f"Which is last? {' '.join(letters)}", letters[-1:]


SKILLS: dict[Callable[[random.Random, int], tuple[str, list[str]]], int] = {
    **{count_up: 16, capitals: 24},
    **{backwards: 12, repeat: 16, last: 16},
}
"""Each skill and the largest number that its problems are drawn with."""
GROUPS = {1: "1", 4: "2 to 4", 12: "5 to 12", 32: "13 to 32"}
"""Most words of an answer: the name of its group."""


def is_test(prompt: str) -> bool:
    """Return whether a problem is one of the tenth that is never trained on, by its digest."""
    return hashlib.sha256(prompt.encode()).digest()[0] % 10 == 0


def length_problems(seed: str, test: bool) -> Iterator[tuple[Record, list[str]]]:
    """Yield problems of all skills without end, for test or for training, and their answers' words."""
    rng = random.Random(seed)
    while True:
        skill = rng.choice([*SKILLS])
        prompt, words = skill(rng, rng.randint(1, SKILLS[skill]))
        if is_test(prompt) == test:
            group = next(name for most, name in GROUPS.items() if len(words) <= most)
            yield {"prompt": prompt, "response": " ".join(words), "group": group}, words


def choice(rng: random.Random, problem: Record, words: list[str]) -> Record:
    """Return a choice between a right answer and three wrong ones: a word too few, too many, and another word."""
    place = rng.randrange(len(words))
    other = rng.choice([letter for letter in LETTERS.upper() + LETTERS if letter != words[place]])
    wrong = [words[:-1] or [other, other], [*words, words[-1]], [*words[:place], other, *words[place + 1 :]]]
    candidates = [" ".join(answer) for answer in [words, *wrong]]
    rng.shuffle(candidates)
    answer = candidates.index(problem["response"])
    return {"context": problem["prompt"], "candidates": candidates, "answer": answer, "group": problem["group"]}


def sudoku_problem(puzzle: str) -> Record:
    """Return a sudoku as a problem, its cells apart so that each is a token; `accepted` has all its solutions."""

    def rows(cells: str) -> str:
        return "\n".join(" ".join(cells[i : i + 4]) for i in range(0, 16, 4))

    accepted = [rows(grid) for grid in sudoku_solutions(puzzle)]
    group = "one solution" if len(accepted) == 1 else "several solutions"
    return {"prompt": rows(puzzle.replace("0", "_")), "response": accepted[0], "accepted": accepted, "group": group}


def sudokus(seed: str, excluded: set[str]) -> Iterator[str]:
    """Yield different puzzles of eight empty cells with one solution, and add each to the excluded ones."""
    rng = random.Random(seed)
    while True:
        grid, hidden = rng.choice(sudoku_grids()), set(rng.sample(range(16), 8))
        puzzle = "".join("0" if i in hidden else digit for i, digit in enumerate(grid))
        if puzzle not in excluded and len(sudoku_solutions(puzzle)) == 1:
            excluded.add(puzzle)
            yield puzzle


def write(name: str, files: dict[str, list[Record]], folder: Path) -> None:
    """Write the files of records of one kind of task."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    for part, records in files.items():
        path = folder / name / f"{part}.jsonl"
        write_if_new(path, "".join(json.dumps(record) + "\n" for record in records))
        print(f"{path}: {len(records):,} records")


def write_lengths(folder: Path) -> None:
    """Write the tasks of `lengths`."""
    files = {
        part: [record for record, _ in itertools.islice(length_problems(part, test=False), count)]
        for part, count in (("train", TRAINING), ("held-out", HELD_OUT))
    }
    test: dict[str, tuple[Record, list[str]]] = {}
    for record, words in itertools.islice(length_problems("problems", test=True), 20 * TEST):
        test.setdefault(record["prompt"], (record, words))
    problems = [*test.values()][:TEST]
    rng = random.Random("choices")
    files["problems"] = [record for record, _ in problems]
    files["choices"] = [choice(rng, *problem) for problem in problems]
    write("lengths", files, folder)


def write_sudokus(folder: Path, published: Path | None) -> None:
    """Write the sudokus, the published test problems where their file is given."""
    excluded: set[str] = set()
    if published is None:
        test = [*itertools.islice(sudokus("problems", excluded), TEST)]
    else:
        with published.open(newline="") as file:
            test = [row["Puzzle"] for row in csv.DictReader(file)]
        excluded |= set(test)
    parts = {"problems": test}
    for part, count in (("held-out", HELD_OUT), ("train", TRAINING)):
        parts[part] = [*itertools.islice(sudokus(part, excluded), count)]
    write("sudoku", {part: [sudoku_problem(puzzle) for puzzle in puzzles] for part, puzzles in parts.items()}, folder)


def main() -> None:
    """Write all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--sudokus", type=Path, help="4x4_test_sudoku.csv, as d1 published it")
    options = parser.parse_args()
    write_lengths(options.output)
    write_sudokus(options.output, options.sudokus)


if __name__ == "__main__":
    main()
