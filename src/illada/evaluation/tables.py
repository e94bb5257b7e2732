"""Results as a Markdown table and, for several variants, as a picture."""

from collections.abc import Sequence

from illada.evaluation.rows import Result, Row
from illada.reporting import aligned, figure, rendered

AVERAGES = {"base": (63.9, 8), "instruct": (67.1, 7)}
"""iLLaDA's averages in the paper's tables, and of how many rows they are (spec §7)."""
NO_SHARES = ("bits_per_byte", "perplexity", "byte_perplexity", "word_perplexity")


def format_value(metric: str, value: float, error: float | None) -> str:
    """Return a value with its standard error, shares in percent."""
    scale, digits = (1, 3) if metric.partition(",")[0] in NO_SHARES else (100, 1)
    return f"{scale * value:.{digits}f}" + ("" if error is None else f" ± {scale * error:.1f}")


def markdown(results: Sequence[Result], rows: Sequence[Row], title: str | None, conditions: str = "") -> str:
    """Return a Markdown table of results, the conditions below it.

    With a title, "base" or "instruct", that table's numbers from the paper stand beside ours.
    """
    variants = len({result.variant for result in results}) > 1
    by_name = {row.name: row for row in rows}
    others = list(dict.fromkeys(name for row in rows for name in row.others)) if title else []
    texts = ["variant"] * variants + ["task", "metric"]
    paper = ["iLLaDA", "difference", *others] if title else []
    columns = [*texts, "here", *paper, "documents", "forwards", "seconds"]
    lines: list[dict[str, str]] = []
    for result in results:
        first = {"variant": result.variant, "task": result.row, "iLLaDA": _number(result.paper)}
        first |= {name: _number(by_name[result.row].others.get(name)) for name in others}
        if not result.metrics:
            lines.append(first | {"here": result.status})
            continue
        first |= {"documents": f"{result.documents:,}", "forwards": f"{result.forwards:,}"}
        first |= {"seconds": f"{result.seconds:.1f}"}
        for metric, (value, error) in result.metrics.items():
            line = {"metric": metric.removesuffix(",none"), "here": format_value(metric, value, error)}
            if result.paper is not None:
                line["difference"] = f"{100 * value - result.paper:+.1f}"
            lines.append(first | line)
            first = {}
    if title:
        lines.append(_average([result for result in results if by_name[result.row].average], title))
    reasons = dict.fromkeys(f"{r.row}: {r.status} ({r.reason})." for r in results if r.reason)
    cells = [columns, *([line.get(name, "") for name in columns] for line in lines)]
    below = [*reasons, *filter(None, [conditions])]
    return "\n".join([aligned(cells, len(texts)), *([""] if below else []), *below])


def _average(results: Sequence[Result], title: str) -> dict[str, str]:
    """Return the line of the average of each row's first metric; only a complete table without limits has one."""
    average, rows = AVERAGES[title]
    line = {"task": "average", "here": _number(None), "iLLaDA": _number(average)}
    whole = all(result.metrics and result.settings.get("limit") is None for result in results)
    if whole and len(results) == rows:
        here = 100 * sum(next(iter(result.metrics.values()))[0] for result in results) / len(results)
        line |= {"here": _number(here), "difference": f"{here - average:+.1f}"}
    return line


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def draw(results: Sequence[Result]) -> bytes:
    """Draw the first metric of every row over the variants, with standard errors, as PNG.

    Raises:
        MissingExtraError: when matplotlib is not installed.
    """
    labels = list(dict.fromkeys(result.variant for result in results))
    drawing, axes = figure(8, 4.2)
    for row in dict.fromkeys(result.row for result in results):
        points = [result for result in results if result.row == row and result.metrics]
        values = [next(iter(result.metrics.values())) for result in points]
        axes.errorbar(
            [labels.index(result.variant) for result in points],
            [value for value, _ in values],
            yerr=[error or 0.0 for _, error in values],
            marker="o",
            capsize=2,
            label=f"{row}, {next(iter(points[0].metrics)).removesuffix(',none')}" if points else row,
        )
    axes.set_xticks(range(len(labels)), labels)
    axes.legend(frameon=False, fontsize=8)
    return rendered(drawing)
