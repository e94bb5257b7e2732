"""Results as a Markdown table and, for several variants, as a picture."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from illada.evaluation.results import Result, Row
from illada.reporting import COLOURS

AVERAGES = {"base": 63.9, "instruct": 67.1}
"""iLLaDA's, of the paper's tables (spec §7)."""
NO_SHARES = ("bits_per_byte", "perplexity", "byte_perplexity", "word_perplexity")


def shown(metric: str, value: float, error: float | None) -> str:
    """Return a value with its standard error, shares in percent."""
    scale = 1 if metric.partition(",")[0] in NO_SHARES else 100
    return f"{scale * value:.{1 if scale == 100 else 3}f}" + ("" if error is None else f" ± {scale * error:.1f}")


def markdown(results: Sequence[Result], rows: Sequence[Row], title: str = "") -> str:
    """Return a Markdown table of results; with a title, the paper's "base" or "instruct", beside its numbers.

    The average is of the first metric of each row, and only of a complete table without limits.
    """
    variants = len({result.variant for result in results}) > 1
    paper = bool(title)
    others = list(dict.fromkeys(name for row in rows for name in row.others)) if paper else []
    head = ["variant"] * variants + ["task", "metric", "here"]
    head += (["iLLaDA", "difference", *others] if paper else []) + ["documents", "forwards", "seconds"]
    lines = [head]
    by_name = {row.name: row for row in rows}
    for result in results:
        first = [result.variant] * variants + [result.row]
        if not result.metrics:
            known = [_number(result.paper), "", *(_number(by_name[result.row].others.get(o)) for o in others)]
            lines.append([*first, "", result.status, *(known if paper else []), "", "", ""])
        for place, (metric, (value, error)) in enumerate(result.metrics.items()):
            cells = [
                *(first if not place else [""] * len(first)),
                metric.removesuffix(",none"),
                shown(metric, value, error),
            ]
            if paper:
                gap = "" if result.paper is None else f"{100 * value - result.paper:+.1f}"
                known = [_number(by_name[result.row].others.get(o)) if not place else "" for o in others]
                cells += [_number(result.paper) if not place else "", gap, *known]
            work = [f"{result.documents:,}", f"{result.forwards:,}", f"{result.seconds:.1f}"]
            lines.append(cells + (work if not place else [""] * 3))
    if paper:
        counted = [result for result in results if by_name[result.row].average]
        whole = all(r.metrics and r.settings.get("limit") is None for r in counted) and len(counted) == (
            8 if title == "base" else 7
        )
        here = 100 * sum(next(iter(r.metrics.values()))[0] for r in counted) / len(counted) if whole else None
        gap = "" if here is None else f"{here - AVERAGES[title]:+.1f}"
        lines.append(["average", "", _number(here), _number(AVERAGES[title]), gap, *[""] * (len(head) - 5)])
    reasons = dict.fromkeys(f"{r.row}: {r.status} ({r.reason})." for r in results if r.reason)
    return "\n".join([aligned(lines), *([""] if reasons else []), *reasons])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its first line the head, legible as it is; numbers stand on the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw the first metric of every row over the variants, with standard errors, as PNG; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path.name}: it needs matplotlib (pip install 'illada[report]')", file=sys.stderr)
        return
    labels = list(dict.fromkeys(result.variant for result in results))
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes: Any = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    for number, row in enumerate(dict.fromkeys(result.row for result in results)):
        points = [r for r in results if r.row == row and r.metrics]
        values = [next(iter(r.metrics.values())) for r in points]
        axes.errorbar(
            [labels.index(r.variant) for r in points],
            [value for value, _ in values],
            yerr=[error or 0.0 for _, error in values],
            marker="o",
            capsize=2,
            color=COLOURS[number % len(COLOURS)],
            label=f"{row}, {next(iter(points[0].metrics)).removesuffix(',none')}" if points else row,
        )
    axes.set_xticks(range(len(labels)), labels)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
