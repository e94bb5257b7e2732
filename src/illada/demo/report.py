"""The demo's report: pictures, and one text as Markdown (with image files) and as a single HTML page."""

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from illada.demo.align import FEWER_PASSES, REWARDS
from illada.errors import needs
from illada.files import write_bytes, write_text
from illada.generation.optional.picture import draw_steps
from illada.reporting import ACCENT, INK, MUTED, figure, moving_mean, rendered
from illada.training.optional.plots import draw_runs
from illada.weights.runs import read_metrics

with needs("report", "the report"):
    from markdown_it import MarkdownIt
    from markdown_it.renderer import RendererHTML


def write_report(output: Path, results: dict[str, Any]) -> None:
    """Write results.json, report.md with images/, and report.html into `output`."""
    write_text(output / "results.json", json.dumps(results, indent=1, allow_nan=False, default=str))
    text = results["text"]
    pictures = {
        "text-loss": _plot_text(output / "pretrain", text["nats_per_token"], text["bits_per_byte"]),
        "answers-loss": _plot_sft(output / "sft"),
        "accuracy": _plot_accuracy(results),
        "frontier": _plot_frontier(results["frontier"]),
        "denoising": draw_steps(results["denoising"]["steps"]),
    }
    (output / "images").mkdir(exist_ok=True)
    if results["align"]:
        for name in (REWARDS, FEWER_PASSES):
            pictures[name] = draw_runs([str(output / name)], str(output / "images" / f"{name}.png")).read_bytes()
    for name, picture in pictures.items():
        write_bytes(output / "images" / f"{name}.png", picture)
    report = report_markdown(output, results)
    write_text(output / "report.md", report)
    write_text(output / "report.html", _page(report, pictures))


def _templates() -> Environment:
    """Return the templates beside this file; `as` formats a number, `plain` escapes a text for Markdown."""
    templates = Environment(
        loader=PackageLoader("illada.demo", ""),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    templates.filters |= {"as": format, "plain": _plain}
    return templates


def _plain(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|~$&])", r"\\\1", text.replace("\n", " / "))


def report_markdown(output: Path, results: dict[str, Any]) -> str:
    """Return the report of the demo in `output`; its pictures are files in images/."""
    bits, best = results["text"]["bits_per_byte"], best_accuracies(results)
    frontier = {(row["task"], row["steps_per_block"]): row for row in results["frontier"]}
    steps = sorted({steps for _, steps in frontier})
    return (
        _templates()
        .get_template("report.md.jinja")
        .render(
            results,
            model=output / "model",
            below=[name for name in ("unigram", "bigram") if bits["model"] < bits[name]],
            weak=[task for task, row in best.items() if row["accuracy"] < 0.5],
            best=best,
            rows=frontier,
            steps=steps,
            forwards=[sum(frontier[task, n]["forwards_per_token"] for task in best) / len(best) for n in steps],
        )
    )


def _page(text: str, pictures: dict[str, bytes]) -> str:
    """Return Markdown as one HTML page that holds its pictures."""

    def image(renderer: RendererHTML, tokens: Sequence[Any], index: int, options: Any, env: Any) -> str:
        name = Path(str(tokens[index].attrs["src"])).stem
        tokens[index].attrs["src"] = f"data:image/png;base64,{base64.b64encode(pictures[name]).decode()}"
        picture = renderer.image(tokens, index, options, env)
        return f"{picture}<small>{renderer.renderInline(tokens[index].children or [], options, env)}</small>"

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    markdown.add_render_rule("image", image)
    return _templates().get_template("report.html.jinja").render(body=markdown.render(text))


def _plot_losses(axes: Any, run: Path, key: str, label: str, width: int, scale: float = 1.0) -> None:
    """Draw the smoothed training loss, times `scale`, and the validation results called `key`."""
    records = read_metrics(run / "metrics.jsonl")
    smooth = moving_mean([record["loss"] * scale for record in records], width - 1, 0)
    axes.plot([r["step"] for r in records], smooth, color=MUTED, lw=1, label=f"training (mean of {width} steps)")
    validated = [(record["step"], record[key]) for record in records if key in record]
    axes.plot(*zip(*validated, strict=True), color=ACCENT, marker="o", label=label)
    axes.legend(frameon=False)


def _plot_text(run: Path, nats: dict[str, float], bits: dict[str, float]) -> bytes:
    """Draw training loss and validation bound in bits per byte against the n-gram baselines."""
    drawing, axes = figure(8, 4.2)
    _plot_losses(axes, run, "validation_bits_per_byte", "held-out text (bound)", 25, bits["model"] / nats["model"])
    for name, style in (("unigram", ":"), ("bigram", "--")):
        axes.axhline(bits[name], color=INK, ls=style, lw=1)
        axes.text(
            0.95, bits[name], f"{name} {bits[name]:.2f}", transform=axes.get_yaxis_transform(), ha="right", va="bottom"
        )
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(None, bits["unigram"] * 1.6))
    return rendered(drawing)


def _plot_sft(run: Path) -> bytes:
    drawing, axes = figure(8, 3.6)
    _plot_losses(axes, run, "validation_loss", "validation", 50)
    axes.set(xlabel="step", ylabel="nats per token (prompts included)")
    return rendered(drawing)


def _plot_accuracy(results: dict[str, Any]) -> bytes:
    rows = best_accuracies(results).values()
    drawing, axes = figure(7, 3.4)
    errors = [row["standard_error"] * 100 for row in rows]
    bars = axes.barh(
        [r["task"] for r in rows], [r["accuracy"] * 100 for r in rows], xerr=errors, color=ACCENT, height=0.6
    )
    axes.bar_label(bars, fmt="%.0f %%", padding=6)
    axes.set(xlim=(0, 112), xlabel="exact match on held-out problems, %")
    axes.set_xticks(range(0, 101, 20))
    axes.invert_yaxis()
    return rendered(drawing)


def _plot_frontier(frontier: Sequence[dict[str, Any]]) -> bytes:
    drawing, axes = figure(7, 4.2)
    for task in dict.fromkeys(row["task"] for row in frontier):
        rows = sorted((r for r in frontier if r["task"] == task), key=lambda r: r["forwards_per_token"])
        axes.errorbar(
            [r["forwards_per_token"] for r in rows],
            [r["accuracy"] * 100 for r in rows],
            yerr=[r["standard_error"] * 100 for r in rows],
            marker="o",
            capsize=2,
            label=task,
        )
    axes.set(xscale="log", xlabel="forward passes per token of the answer", ylabel="exact match, %", ylim=(-3, 105))
    ticks = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    all_x = [row["forwards_per_token"] for row in frontier]
    axes.set_xlim(min(all_x) / 1.3, max(all_x) * 1.3)
    axes.legend(frameon=False)
    return rendered(drawing)


def best_accuracies(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return each task's row at one token a pass, the paper's setting."""
    most = max(row["steps_per_block"] for row in results["frontier"])
    return {row["task"]: row for row in results["frontier"] if row["steps_per_block"] == most}
