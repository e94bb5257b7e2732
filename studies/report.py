"""Write `docs/study.md` and its pictures from the questions and the numbers in `studies/results`.

    python studies/report.py

A question's `finding`, written by a person who has read the numbers, stands under its table, and its `answer`, one
sentence, at the head of the page.
"""

import argparse
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from illada.reporting import aligned, figure, rendered

STUDIES = Path(__file__).parent
HEAD = """# The study

Questions about training choices and the paper's claims, asked of small models: what was expected before anything ran,
what came out, over how many seeds. `studies/README.md` says how to repeat or enlarge one; `python studies/report.py`
writes this page.

Numbers are means ± standard errors over seeds, three where nothing else is said, and differences are paired by seed.
With three seeds chance alone exceeds two standard errors in one case of six, and the errors leave out that problems
and texts are samples too (500 problems: about two points). The text is WordNet's glosses, 4.3M tokens of a vocabulary
of 2,048, if a question names no other. Bits per byte of held-out text: *bound* is training's upper bound, *path* the
exact likelihood of decoding in blocks, *exact* a causal model's own; the number behind is the tokens of a window.
*Mtokens to 2.5*: millions of training tokens until validation has fallen to 2.5 bits. *Drawn* texts are sampled at
temperature 1, *surest* ones take the likeliest token. Arms are named in the questions' files, with all their
settings.
"""

Values = dict[int, float]
"""A figure by seed."""


def results_of(name: str, question: dict[str, Any], results: Path) -> list[dict[str, Any]]:
    """Return the numbers of a question's finished arms, by the names that the question gives them."""
    found = []
    for arm, own in question["arms"].items():
        where = (own or {}).get("same", f"{name}/{arm}")
        for seed in question["seeds"]:
            path = results / f"{where}-{seed}.json"
            if path.is_file():
                result = json.loads(path.read_text())
                reached = tokens_to(result.get("curve", []), question["reach"]) if "reach" in question else None
                if reached is not None:
                    result["figures"][f"Mtokens to {question['reach']}"] = reached / 1e6
                found.append({**result, "arm": arm})
    return found


def tokens_to(curve: Sequence[tuple[int, float]], level: float) -> float | None:
    """Return the tokens after which a curve first lies below a level, between two points by a line; None if never."""
    for (before, high), (after, low) in itertools.pairwise([(0, math.inf), *curve]):
        if low <= level:
            return after if math.isinf(high) else before + (after - before) * (high - level) / (high - low)
    return None


def values_of(results: Sequence[dict[str, Any]], arm: str, name: str) -> Values:
    """Return a figure of an arm by seed; empty where it was not measured."""
    return {r["seed"]: r["figures"][name] for r in results if r["arm"] == arm and name in r["figures"]}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, which is no number for a single value."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def differences(one: Values, other: Values) -> list[float]:
    """Return the differences of two arms, seed by seed."""
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def cell(values: Sequence[float], sign: str = "") -> str:
    """Return mean ± standard error to four digits, and the number of seeds where they are not three."""
    if not values:
        return ""
    mean, error = mean_and_error(values)
    decimals = max(0, 3 - math.floor(math.log10(max(abs(mean), 1.0))))
    count = "" if len(values) == 3 else f" ({len(values)})"
    return f"{mean:{sign}.{decimals}f}" + ("" if math.isnan(error) else f" ± {error:.{decimals}f}") + count


def section(name: str, question: dict[str, Any], results: list[dict[str, Any]], images: Path) -> str:
    """Return a question's part of the page, and draw its picture."""
    parts = [
        f"## {question['number']}. {question['question']}",
        f"**Expected.** {' '.join(question['hypothesis'].split())}",
        f"**Would be refuted by.** {' '.join(question['refuted_by'].split())}",
    ]
    if not results:
        return "\n\n".join([*parts, "Not run yet."])
    shown = [figure for figure in question["show"] if any(figure in result["figures"] for result in results)]
    lines = [["", *shown]]
    for arm in question["arms"]:
        lines.append([arm, *(cell([*values_of(results, arm, figure).values()]) for figure in shown)])
    for one, other in question["pairs"]:
        paired = [differences(values_of(results, one, f), values_of(results, other, f)) for f in shown]
        lines.append([f"{one} − {other}", *(cell(values, "+") for values in paired)])
    parts.append(aligned(lines))
    tokens = sorted({result["tokens"] for result in results if "tokens" in result})
    if tokens:
        ends = dict.fromkeys([tokens[0], tokens[-1]])
        parts.append(f"Tokens of training an arm: {' to '.join(f'{count:,}' for count in ends)}.")
    parts.append(f"![{question['question']}](images/study-{name}.png)")
    drawing, axes = figure(7, 3.6)
    PLOTS[question["plot"]["kind"]](axes, question, results)
    if question["plot"]["kind"] == "bars":  # they leave no room within the axes
        axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    else:
        axes.legend(frameon=False, fontsize=8)
    (images / f"study-{name}.png").write_bytes(rendered(drawing))
    parts.append(f"`python studies/run.py studies/questions/{name}.yaml`")
    return "\n\n".join([*parts, f"**Found.** {' '.join(question.get('finding', 'Not written yet.').split())}"])


def summary(questions: dict[str, dict[str, Any]]) -> str:
    """Return the table of answers at the head of the page; a question without one says so."""
    rows = [["", "question", "answer"]]
    for question in questions.values():
        answer = " ".join(question.get("answer", "*not all of it has run*").split())
        rows.append([str(question["number"]), question["question"], answer])
    return aligned(rows, left=3)


def bars(axes: Any, label: str, points: Sequence[tuple[Any, Sequence[float]]], factor: float = 2) -> None:
    """Draw means over x, with a bar of so many standard errors."""
    made = [(x, *mean_and_error(values)) for x, values in points if values]
    errors = [0.0 if math.isnan(error) else factor * error for _, _, error in made]
    axes.errorbar([x for x, *_ in made], [m for _, m, _ in made], yerr=errors, marker="o", capsize=3, label=label)


def draw_differences(axes: Any, question: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Draw the paired differences in each figure."""
    for one, other in question["pairs"]:
        figures = question["plot"]["figures"]
        points = [
            (f.split()[-1], differences(values_of(results, one, f), values_of(results, other, f))) for f in figures
        ]
        bars(axes, f"{one} − {other}", points)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_ylabel("difference ± 2 standard errors")
    axes.set_xlabel(question["plot"]["label"])


def draw_curves(axes: Any, question: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Draw the validations of every arm over its tokens, the mean of the seeds and the range between them."""
    for arm in question["arms"]:
        own = [dict(map(tuple, result["curve"])) for result in results if result["arm"] == arm and result.get("curve")]
        points = {x: [curve[x] for curve in own] for x in (own[0] if own else {}) if all(x in curve for curve in own)}
        if points:
            millions = [x / 1e6 for x in points]
            (line,) = axes.plot(millions, [fmean(values) for values in points.values()], label=arm)
            low, high = ([of(values) for values in points.values()] for of in (min, max))
            axes.fill_between(millions, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel("million tokens")
    axes.set_ylabel("bits per byte of held-out text")
    axes.set(**{"yscale": "linear", **question["plot"].get("axes", {})})


def draw_lines(axes: Any, question: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Draw a figure over a quantity: each line names its arms by that quantity."""
    plot = question["plot"]
    for label, arms in plot["lines"].items():
        bars(axes, label, [(x, [*values_of(results, arm, plot["figure"]).values()]) for x, arm in arms.items()], 1)
    axes.set(ylabel=f"{plot['figure']} ± standard error", xlabel=plot["label"], **plot.get("axes", {}))
    ticks = sorted({x for arms in plot["lines"].values() for x in arms})
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()


def draw_bars(axes: Any, question: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Draw figures of every arm side by side."""
    figures, arms = question["plot"]["figures"], [*question["arms"]]
    for i, name in enumerate(figures):
        values = [[*values_of(results, arm, name).values()] or [math.nan] for arm in arms]
        places = [x + (i - (len(figures) - 1) / 2) * 0.8 / len(figures) for x in range(len(arms))]
        errors = [0.0 if math.isnan(error) else error for _, error in map(mean_and_error, values)]
        axes.bar(places, [fmean(v) for v in values], 0.8 / len(figures), yerr=errors, capsize=2, label=name)
    axes.set_xticks(range(len(arms)), [re.sub("[ -]", "\n", arm) for arm in arms], fontsize=7)
    axes.set_ylabel("mean ± standard error")


PLOTS = {"differences": draw_differences, "curves": draw_curves, "lines": draw_lines, "bars": draw_bars}


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=STUDIES / "results", help="folder of the files of numbers")
    parser.add_argument("--output", type=Path, default=STUDIES.parent / "docs", help="folder of study.md and images")
    options = parser.parse_args()
    (options.output / "images").mkdir(parents=True, exist_ok=True)
    sections = []
    questions = {path.stem: yaml.safe_load(path.read_text()) for path in (STUDIES / "questions").glob("*.yaml")}
    questions = dict(sorted(questions.items(), key=lambda pair: pair[1]["number"]))
    for name, question in questions.items():
        results = results_of(name, question, options.results)
        sections.append(section(name, question, results, options.output / "images"))
    page = "\n\n".join([HEAD.strip(), summary(questions), *sections])
    (options.output / "study.md").write_text(page + "\n")


if __name__ == "__main__":
    main()
