"""Write `docs/study.md` and its pictures from the questions and the numbers in `studies/results`.

    python studies/report.py

A question's `finding`, written by a person who has read the numbers, stands under its table.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from illada.reporting import aligned, figure, png

STUDIES = Path(__file__).parent
DOCS = STUDIES.parent / "docs"
HEAD = """# The study

Questions about training choices and the paper's claims, asked of small models: what was expected before anything ran,
what came out, over how many seeds. `studies/README.md` says how to repeat or enlarge one. Numbers are means ± standard
errors over seeds; differences are paired by seed. Bits per byte of held-out text: bound is training's upper bound, path
the exact likelihood of decoding in blocks, exact a causal model's own. `python studies/report.py` writes this page.
"""

Values = dict[int, float]
"""A figure by seed."""


def results_of(name: str) -> list[dict[str, Any]]:
    """Return the numbers of a question's finished arms."""
    return [json.loads(path.read_text()) for path in sorted((STUDIES / "results" / name).glob("*.json"))]


def values_of(results: Sequence[dict[str, Any]], arm: str, window: str, figure_name: str) -> Values:
    """Return a figure of an arm by seed; empty where it was not measured."""
    return {
        result["seed"]: result["bits_per_byte"][window][figure_name]["mean"]
        for result in results
        if result["arm"] == arm and figure_name in result["bits_per_byte"].get(window, {})
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, which is no number for a single value."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def differences(one: Values, other: Values) -> list[float]:
    """Return the differences of two arms, seed by seed."""
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def cell(values: Sequence[float], sign: str = "") -> str:
    """Return mean ± standard error and the number of seeds."""
    if not values:
        return ""
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}") + f" ({len(values)})"


def section(name: str, question: dict[str, Any]) -> str:
    """Return a question's part of the page, and draw its picture."""
    results = results_of(name)
    parts = [
        f"## {question['question']}",
        f"**Expected.** {' '.join(question['hypothesis'].split())}",
        f"**Would be refuted by.** {' '.join(question['refuted_by'].split())}",
    ]
    if not results:
        return "\n\n".join([*parts, "Not run yet."])
    windows = [str(length) for length in question["windows"]]
    names = [n for n in ("bound", "path", "exact") if any(n in r["bits_per_byte"][w] for r in results for w in windows)]
    lines = [["bits per byte (seeds)", *(f"{n}, windows of {w}" for w in windows for n in names)]]
    columns = [(w, n) for w in windows for n in names]
    for arm in question["arms"]:
        lines.append([arm, *(cell([*values_of(results, arm, *column).values()]) for column in columns)])
    for one, other in question["pairs"]:
        paired = [differences(values_of(results, one, *c), values_of(results, other, *c)) for c in columns]
        lines.append([f"{one} − {other}", *(cell(values, "+") for values in paired)])
    tokens = {result["tokens"] for result in results}
    parts += [aligned(lines), f"Tokens an arm: {', '.join(f'{count:,}' for count in sorted(tokens))}."]
    parts.append(f"![{question['question']}](images/study-{name}.png)")
    draw(name, question, results, windows, names[0])
    parts.append(f"`python studies/run.py studies/questions/{name}.yaml`")
    return "\n\n".join([*parts, f"**Found.** {' '.join(question.get('finding', 'not written yet.').split())}"])


def draw(name: str, question: dict[str, Any], results: list[dict[str, Any]], windows: list[str], of: str) -> None:
    """Draw the paired differences over the lengths of windows, with a bar of two standard errors."""
    drawing, axes = figure(7, 3.6)
    for one, other in question["pairs"]:
        points = [(w, differences(values_of(results, one, w, of), values_of(results, other, w, of))) for w in windows]
        made = [(w, *mean_and_error(values)) for w, values in points if values]
        bars = [0.0 if math.isnan(error) else 2 * error for _, _, error in made]
        axes.errorbar(
            [w for w, *_ in made], [m for _, m, _ in made], yerr=bars, marker="o", capsize=3, label=f"{one} − {other}"
        )
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("tokens of a window")
    axes.set_ylabel(f"bits per byte ({of}), ± 2 standard errors")
    axes.legend(frameon=False)
    (DOCS / "images" / f"study-{name}.png").write_bytes(png(drawing))


def main() -> None:
    """Write the page."""
    sections = [
        section(path.stem, yaml.safe_load(path.read_text())) for path in sorted((STUDIES / "questions").glob("*.yaml"))
    ]
    (DOCS / "study.md").write_text("\n\n".join([HEAD.strip(), *sections]) + "\n")


if __name__ == "__main__":
    main()
