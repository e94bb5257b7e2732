"""The demo's report: plots, and one text as Markdown (with image files) and as a single HTML page."""

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from illada.errors import IlladaError
from illada.reporting import ACCENT, COLOURS, INK, MUTED
from illada.weights.runs import read_metrics

EOS_TEXT = "<|eos|>"


def write_report(output: Path, results: dict[str, Any]) -> None:
    """Write results.json, report.md with images/, and report.html into `output`.

    Raises:
        IlladaError: when matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise IlladaError("the report needs matplotlib: pip install 'illada[report]'") from error
    matplotlib.use("Agg")
    (output / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False, default=str))
    pictures = {
        "text-loss": _plot_text(output, results["text"]["nats_per_token"], results["text"]["bits_per_byte"]),
        "answers-loss": _plot_sft(output),
        "accuracy": _plot_accuracy(results["frontier"]),
        "frontier": _plot_frontier(results["frontier"]),
        "denoising": _plot_denoising(results["denoising"]),
    }
    (output / "images").mkdir(exist_ok=True)
    for name, picture in pictures.items():
        (output / "images" / f"{name}.png").write_bytes(picture)
    parts = _parts(output, results)
    (output / "report.md").write_text(_markdown(parts))
    (output / "report.html").write_text(_html(parts, pictures))


Part = tuple[str, Any]
"""("heading" | "text" | "code", str), ("image", (name, caption)) or ("table", rows with a header)."""


def _parts(output: Path, results: dict[str, Any]) -> list[Part]:
    settings, text, choice = results["settings"], results["text"], results["choice"]
    bits, best = text["bits_per_byte"], best_accuracies(results)
    weak = [task for task, row in best.items() if row["accuracy"] < 0.5]
    below = [name for name in ("unigram", "bigram") if bits["model"] < bits[name]]
    beaten = f"below the {' and the '.join(below)} model" if below else "not below the unigram model"
    parts: list[Part] = [
        ("heading", "What this machine just learned"),
        (
            "text",
            f"A masked diffusion language model of {text['parameters']:,} parameters, trained from random weights in "
            f"{results['seconds'] / 60:.0f} minutes: {text['training_tokens']:,} tokens of the Python standard "
            f"library, then {settings['sft_examples']:,} generated instructions, {settings['warmup_steps']:,} steps by "
            f"LLaDA's rule (prompts visible) and {settings['sft_steps']:,} by the paper's (everything may be masked). "
            f"Seed {settings['seed']}, {'quick' if settings['quick'] else 'full'} demo.",
        ),
        ("heading", "Text"),
        (
            "text",
            f"On {text['validation_bytes']:,} bytes of library files that were held out, the diffusion bound is "
            f"{bits['model']:.3f} bits per byte, {beaten}. The bound is an upper bound on the model's true figure, "
            "with fixed noise. A model of this size does not write fluent text; the loss is what to look at.",
        ),
        ("table", [["", "bits per byte"], *[[name, f"{bits[name]:.3f}"] for name in ("unigram", "bigram", "model")]]),
        ("image", ("text-loss", "Loss while pre-training")),
        ("heading", "Answers"),
        (
            "text",
            "Exact matches on held-out problems: no test problem occurs in training, not even with its operands "
            "swapped, its list reordered, its string mirrored or its digits renamed. One token a pass is the paper's "
            "setting; fewer steps a block commit several tokens at once.",
        ),
        ("table", _accuracy_table(results["frontier"])),
        ("image", ("accuracy", "Accuracy by task at one token a pass, with standard errors")),
        ("image", ("frontier", "What fewer forward passes cost")),
        ("image", ("answers-loss", "Loss while fine-tuning")),
        ("heading", "What it has not learned"),
        (
            "text",
            (
                f"Below half right: {', '.join(weak)}. "
                if weak
                else "Every task is at least half right on its held-out problems. "
            )
            + "The library questions are facts: a held-out name's module can only be guessed from its spelling.",
        ),
        ("heading", "Multiple choice"),
        (
            "text",
            f"{choice['problems']} held-out names, the right module among four, scored by confidence (paper Eq. 2) and "
            f"by Monte-Carlo likelihood (LLaDA Eq. 6, {settings['likelihood_samples']} samples). Chance is 25 %.",
        ),
        (
            "table",
            [
                ["scorer", "accuracy", "seconds"],
                *[
                    [
                        method,
                        f"{choice[method]['accuracy']:.1%} ± {choice[method]['standard_error']:.1%}",
                        f"{choice[method]['seconds']:.1f}",
                    ]
                    for method in ("confidence", "likelihood")
                ],
            ],
        ),
        ("heading", "In lm-evaluation-harness"),
        *_harness(results["harness"]),
        ("heading", "One answer, denoised step by step"),
        (
            "text",
            "Each row is a forward pass. Grey: masked, with the present proposal; coloured: committed, darker where "
            "the model was surer; pale: behind the end, cut off. Blocks of masks are appended until an end-of-sequence "
            "token is committed.",
        ),
        ("image", ("denoising", f"{results['denoising']['task']}: {results['denoising']['prompt']!r}")),
        ("heading", "Sample answers"),
        ("table", _sample_table(results["samples"])),
        ("heading", "Go on"),
        ("code", f"illada chat --model {output / 'model'} --block_length 16 --max_new_tokens 48"),
    ]
    return parts


def _harness(found: Sequence[dict[str, Any]] | None) -> list[Part]:
    """Return what the harness found, or how to have it look."""
    if found is None:
        return [("text", "Left out, as it is not installed: pip install 'illada[eval]', then the same command again.")]
    rows = [["task", "metric", "value", "documents", "forward passes of rows", "seconds"]]
    for one in found:
        error = "" if one["standard_error"] is None else f" ± {one['standard_error']:.1%}"
        work = [f"{one['documents']:,}", f"{one['forwards']:,}", f"{one['seconds']:.1f}"]
        rows.append([one["task"], one["metric"], f"{one['value']:.1%}{error}", *work])
    text = (
        "The same problems as task files of the unmodified harness (folder tasks), as `illada eval --chat` evaluates "
        "them: answers at one token a pass, choices by confidence, ± one standard error. What was said to each is in "
        "the folder evaluation."
    )
    return [("text", text), ("table", rows)]


def _accuracy_table(frontier: Sequence[dict[str, Any]]) -> list[list[str]]:
    tasks = list(dict.fromkeys(row["task"] for row in frontier))
    steps = sorted({row["steps_per_block"] for row in frontier})
    rows = [["task", *[f"{n} step{'s' * (n > 1)} a block" for n in steps], "problems"]]
    for task in tasks:
        mine = {row["steps_per_block"]: row for row in frontier if row["task"] == task}
        cells = [f"{mine[n]['accuracy']:.1%} ± {mine[n]['standard_error']:.1%}" for n in steps]
        rows.append([task, *cells, str(mine[steps[-1]]["problems"])])
    per_token = [
        sum(row["forwards_per_token"] for row in frontier if row["steps_per_block"] == n) / len(tasks) for n in steps
    ]
    return [*rows, ["forward passes per token (mean)", *[f"{value:.2f}" for value in per_token], ""]]


def _sample_table(samples: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    rows = [["task", "prompt", "answer", "", "forward passes"]]
    for task, answers in samples.items():
        for sample in answers[:3]:
            verdict = "right" if sample["right"] else f"wrong, expected {_flat(sample['expected'])}"
            rows.append([task, _flat(sample["prompt"]), _flat(sample["answer"]), verdict, str(sample["forwards"])])
    return rows


def _flat(text: str) -> str:
    return text.replace("\n", " / ").replace("|", "\\|")


def _markdown(parts: Sequence[Part]) -> str:
    lines: list[str] = []
    for kind, content in parts:
        if kind == "heading":
            lines += [f"{'##' if lines else '#'} {content}", ""]
        elif kind == "text":
            lines += [content, ""]
        elif kind == "code":
            lines += ["```", content, "```", ""]
        elif kind == "image":
            lines += [f"![{content[1]}](images/{content[0]}.png)", ""]
        else:
            head, *rows = content
            lines += ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]
    return "\n".join(lines)


_STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100%; background: #fff; border-radius: 6px }
figure { margin: 1.5rem 0 }
figcaption { opacity: .7; font-size: .9rem }
div.wide { overflow-x: auto }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
td, th { padding: .3rem .8rem; border-bottom: 1px solid #8884; text-align: left }
pre { background: #8882; padding: .8rem; overflow-x: auto }
"""


def _html(parts: Sequence[Part], pictures: dict[str, bytes]) -> str:
    body: list[str] = []
    for kind, content in parts:
        if kind == "heading":
            level = "h2" if body else "h1"
            body.append(f"<{level}>{html.escape(content)}</{level}>")
        elif kind == "text":
            body.append(f"<p>{html.escape(content)}</p>")
        elif kind == "code":
            body.append(f"<pre>{html.escape(content)}</pre>")
        elif kind == "image":
            data, caption = base64.b64encode(pictures[content[0]]).decode(), html.escape(content[1])
            image = f'<img src="data:image/png;base64,{data}" alt="{caption}">'
            body.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
        else:
            head, *rows = [[html.escape(cell.replace("\\|", "|")) for cell in row] for row in content]
            cells = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
            cells += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
            body.append(f'<div class="wide"><table>{"".join(cells)}</table></div>')
    title = html.escape(parts[0][1])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _smooth(values: Sequence[float], width: int) -> list[float]:
    sums, total = [0.0], 0.0
    for value in values:
        total += value
        sums.append(total)
    return [(sums[i + 1] - sums[max(0, i + 1 - width)]) / min(width, i + 1) for i in range(len(values))]


def _plot_text(output: Path, nats: dict[str, float], bits: dict[str, float]) -> bytes:
    """Draw training loss and validation bound in bits per byte against the n-gram baselines."""
    records = read_metrics(output / "pretrain" / "metrics.jsonl")
    scale = bits["model"] / nats["model"]
    figure, axes = _figure(8, 4.2)
    steps = [record["step"] for record in records]
    axes.plot(
        steps, _smooth([r["loss"] * scale for r in records], 25), color=MUTED, lw=1, label="training (mean of 25 steps)"
    )
    tested = [record for record in records if "validation_bits_per_byte" in record]
    axes.plot(
        [r["step"] for r in tested],
        [r["validation_bits_per_byte"] for r in tested],
        color=ACCENT,
        marker="o",
        label="held-out text (bound)",
    )
    for name, style in (("unigram", ":"), ("bigram", "--")):
        axes.axhline(bits[name], color=INK, ls=style, lw=1)
        axes.annotate(f"{name} {bits[name]:.2f}", (steps[-1], bits[name]), ha="right", va="bottom", color=INK)
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(None, bits["unigram"] * 1.6))
    axes.legend(frameon=False)
    return _png(figure)


def _plot_sft(output: Path) -> bytes:
    records = read_metrics(output / "sft" / "metrics.jsonl")
    figure, axes = _figure(8, 3.6)
    steps = [record["step"] for record in records]
    axes.plot(steps, _smooth([r["loss"] for r in records], 50), color=MUTED, lw=1, label="training (mean of 50 steps)")
    tested = [record for record in records if "validation_loss" in record]
    axes.plot(
        [r["step"] for r in tested],
        [r["validation_loss"] for r in tested],
        color=ACCENT,
        marker="o",
        label="validation",
    )
    axes.set(xlabel="step", ylabel="nats per token (prompts included)")
    axes.legend(frameon=False)
    return _png(figure)


def _plot_accuracy(frontier: Sequence[dict[str, Any]]) -> bytes:
    most = max(row["steps_per_block"] for row in frontier)
    rows = [row for row in frontier if row["steps_per_block"] == most]
    figure, axes = _figure(7, 3.4)
    errors = [row["standard_error"] * 100 for row in rows]
    bars = axes.barh(
        [r["task"] for r in rows], [r["accuracy"] * 100 for r in rows], xerr=errors, color=ACCENT, height=0.6
    )
    axes.bar_label(bars, fmt="%.0f %%", padding=6)
    axes.set(xlim=(0, 112), xlabel="exact match on held-out problems, %")
    axes.set_xticks(range(0, 101, 20))
    axes.invert_yaxis()
    return _png(figure)


def _plot_frontier(frontier: Sequence[dict[str, Any]]) -> bytes:
    figure, axes = _figure(7, 4.2)
    for number, task in enumerate(dict.fromkeys(row["task"] for row in frontier)):
        rows = sorted((r for r in frontier if r["task"] == task), key=lambda r: r["forwards_per_token"])
        axes.errorbar(
            [r["forwards_per_token"] for r in rows],
            [r["accuracy"] * 100 for r in rows],
            yerr=[r["standard_error"] * 100 for r in rows],
            color=COLOURS[number % len(COLOURS)],
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
    return _png(figure)


def _plot_denoising(record: dict[str, Any]) -> bytes:
    """Draw one answer as a grid: steps downwards, positions to the right."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    steps = record["steps"]
    # What lies behind the end is cut off: it is drawn pale.
    last = steps[-1]["tokens"]
    end = last.index(EOS_TEXT) if EOS_TEXT in last else len(last)
    width = max(len(step["tokens"]) for step in steps)
    figure, axes = _figure(0.46 * width + 1.2, 0.3 * len(steps) + 0.8)
    colours = colormaps["Blues"]
    for y, step in enumerate(steps):
        for x, (token, committed, confidence) in enumerate(
            zip(step["tokens"], step["committed"], step["confidence"], strict=True)
        ):
            sure = 0.0 if confidence is None or math.isnan(confidence) else float(confidence)
            face = colours(0.3 + 0.6 * sure) if committed else "#eceff3"
            alpha = 1.0 if x <= end else 0.25
            axes.add_patch(Rectangle((x, y), 0.94, 0.9, facecolor=face, edgecolor="none", alpha=alpha))
            ink = ("white" if sure > 0.6 else INK) if committed else "#a8b2bd"
            axes.text(x + 0.47, y + 0.47, _sign(token), ha="center", va="center", fontsize=8, color=ink, alpha=alpha)
    axes.set(xlim=(0, width), ylim=(len(steps), 0), ylabel="forward pass", xlabel="position in the answer")
    axes.set_xticks([])
    axes.set_yticks([y + 0.45 for y in range(0, len(steps), 4)], [str(y + 1) for y in range(0, len(steps), 4)])
    axes.spines[["left", "bottom"]].set_visible(False)
    return _png(figure)


def _sign(token: str) -> str:
    """Return a token short enough for its cell; a dollar sign would be read as mathematics."""
    short = {"\n": "↵", EOS_TEXT: "END"}.get(token, token.strip().strip("<|>") or "␣")
    return short[:5].replace("$", "\\$")


def best_accuracies(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return each task's row at one token a pass, the paper's setting."""
    most = max(row["steps_per_block"] for row in results["frontier"])
    return {row["task"]: row for row in results["frontier"] if row["steps_per_block"] == most}
