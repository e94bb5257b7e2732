"""`illada report`: the curves of one run or several as one picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from illada.errors import IlladaError
from illada.files import read_json, write_bytes
from illada.reporting import COLOURS, INK, figure, moving_mean, picture_path, rendered
from illada.weights.runs import read_metrics

SMOOTH_SHARE = 20
"""A curve is the mean over this share of its points (one in so many), beside the points themselves, faintly."""


@dataclass(frozen=True)
class Curves:
    """The records of a run, as curves over its steps."""

    folder: Path
    name: str
    records: list[dict[str, Any]]

    def draw(self, axes: Any, values: Sequence[Any], label: str, smooth: bool = False, **style: Any) -> None:
        """Draw the values of all steps that have one; where they are noisy, as a mean with the points behind it."""
        points = [(r["step"], value) for r, value in zip(self.records, values, strict=True) if value is not None]
        if not points:
            return
        steps, found = np.array(points, dtype=float).T
        if smooth:
            (line,) = axes.plot(steps, smoothed(found), label=label, linewidth=1.6, **style)
            axes.plot(steps, found, color=line.get_color(), linewidth=0.5, alpha=0.25, zorder=1)
        else:
            axes.plot(steps, found, label=label, **style)

    def column(self, name: str) -> list[Any]:
        """Return what the records say of a name; None where they say nothing."""
        return [record.get(name) for record in self.records]


def smoothed(values: Any) -> Any:
    """Return the mean of each value and its neighbours on both sides, a share of all [N]."""
    half = len(values) // SMOOTH_SHARE // 2
    return moving_mean(values, half, half)


def draw_runs(runs: Sequence[str], output: str | None = None) -> Path:
    """Draw bits per byte, loss by mask ratio, gradient norm, learning rate and speed; return the picture's path.

    Beside the loss of a single run stand the figures of RUN/likelihood.json, where `illada report --windows` has
    written them. Several runs have a colour each, and no curves by mask ratio; nor has the run of a causal model.

    Raises:
        IlladaError: when a folder holds no metrics, the output cannot be written, or matplotlib is not installed.
    """
    given = None if output is None else picture_path(Path(output))
    for run in runs:
        if not Path(run).is_dir():
            raise IlladaError(f"no run at {run}: the folder does not exist")
    target = given or picture_path(Path(runs[0]) / "report.png")
    found, alike = [], len({Path(run).name for run in runs}) < len(runs)
    for run in runs:
        records = read_metrics(Path(run) / "metrics.jsonl")
        if not records:
            raise IlladaError(f"{run} holds no metrics: give the folder of a run that has made a step")
        found.append(Curves(Path(run), run if alike else Path(run).name, records))
    drawing, ((loss, ratio), (norm, speed)) = figure(11, 7, 2, 2)
    bound = any(curves.column("loss_by_mask_ratio")[-1] for curves in found)
    if len(found) == 1:
        _draw_one(found[0], loss, ratio, norm)
        _draw_preferences(found[0], loss, ratio)
        _draw_rewards(found[0], loss, ratio)
        _draw_frontier(found[0], loss, ratio)
    else:
        _draw_several(found, loss, ratio, norm)
    for number, curves in enumerate(found):
        colour = COLOURS[number % len(COLOURS)]
        label = "last ten seconds" if len(found) == 1 else curves.name
        curves.draw(speed, curves.column("tokens_per_second"), label, smooth=True, color=colour)
    if not loss.get_ylabel():
        loss.set_ylabel("bits per byte" + " (upper bound)" * bound)
    norm.set_yscale("log")
    norm.set_ylabel("gradient norm")
    speed.set_ylim(bottom=0)
    speed.set_ylabel("tokens a second")
    for axes in (loss, ratio, norm, speed):
        axes.set_xlabel(axes.get_xlabel() or "step")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    drawing.suptitle(", ".join(curves.name for curves in found))
    write_bytes(target, rendered(drawing, target.suffix.removeprefix("."), dpi=120))
    return target


def _draw_one(curves: Curves, loss: Any, ratio: Any, norm: Any) -> None:
    curves.draw(loss, curves.column("bits_per_byte"), "training", smooth=True)
    raw = curves.column("raw_validation_bits_per_byte")
    label = "held out, average of the weights" if any(raw) else "held out"
    curves.draw(loss, curves.column("validation_bits_per_byte"), label, marker=".", color=INK)
    curves.draw(loss, raw, "held out, without the average", marker=".", color="tab:gray", linestyle="--")
    if (figures := curves.folder / "likelihood.json").exists():
        _draw_likelihoods(loss, figures)
    buckets = [bucket or [] for bucket in curves.column("loss_by_mask_ratio")]
    parts = max(map(len, buckets))
    ratio.set_visible(bool(parts))
    ratio.set_ylabel("cross-entropy of masked tokens, nats")
    for part in range(parts):
        label = f"{100 * part // parts} to {100 * (part + 1) // parts} % masked"
        curves.draw(ratio, [bucket[part] if bucket else None for bucket in buckets], label, smooth=True)
    curves.draw(norm, curves.column("gradient_norm"), "gradient norm", smooth=True)
    rate = norm.twinx()
    curves.draw(rate, curves.column("learning_rate"), "learning rate", color=COLOURS[1])
    rate.set_ylabel("learning rate", color=COLOURS[1])


def _draw_preferences(curves: Curves, loss: Any, share: Any) -> None:
    """Draw what a run on pairs has in place of bits per byte: its loss, accuracies and gaps to the start."""
    if not any(value is not None for value in curves.column("margin")):
        return
    curves.draw(loss, curves.column("loss"), "training", smooth=True)
    curves.draw(loss, curves.column("validation_loss"), "held out", marker=".", color=INK)
    loss.set_ylabel("loss, nats a pair")
    share.set_visible(True)
    curves.draw(share, curves.column("accuracy"), "pairs in order, training", smooth=True)
    curves.draw(share, curves.column("validation_accuracy"), "pairs in order, held out", marker=".", color=INK)
    share.set_ylabel("share of pairs")
    share.set_ylim(0, 1.02)
    gaps = share.twinx()
    for name, colour in (("chosen_gap", COLOURS[2]), ("rejected_gap", COLOURS[1])):
        label = f"{name.replace('_gap', '')}, right axis"
        curves.draw(gaps, curves.column(name), label, smooth=True, color=colour)
        share.plot([], [], color=colour, label=label)  # for the legend
    gaps.set_ylabel("bound minus the start's, nats")


def _draw_rewards(curves: Curves, reward: Any, rest: Any) -> None:
    """Draw what a run on rewards has in place of bits per byte."""
    if not any(value is not None for value in curves.column("reward")):
        return
    curves.draw(reward, curves.column("reward"), "training", smooth=True)
    curves.draw(reward, curves.column("validation_reward"), "held out, without sampling", marker=".", color=INK)
    reward.set_ylabel("mean reward of an answer")
    rest.set_visible(True)
    for name, label in (
        ("zero_groups", "problems with equal rewards"),
        ("clipped", "clipped"),
        ("passes_per_token", "passes a token"),
        ("kl", "distance to the start, nats a token"),
    ):
        curves.draw(rest, curves.column(name), label, smooth=True)
    rest.set_ylabel("shares, passes, nats")


def _draw_frontier(curves: Curves, loss: Any, frontier: Any) -> None:
    """Draw what a run of certainty training has in place of bits per byte: its loss, and accuracy against passes."""
    if not any(value is not None for value in curves.column("entropy")):
        return
    for name, label in (("cross_entropy", "cross-entropy"), ("entropy", "entropy of what is right")):
        curves.draw(loss, curves.column(name), label, smooth=True)
    loss.set_ylabel("nats a view")
    file = curves.folder / "frontier.json"
    if not file.exists():
        return
    first = read_json(file).get("points", [])
    latest: dict[str, Any] = next((record for record in reversed(curves.records) if frontier_of(record)), {})
    frontier.set_visible(True)
    for points, name in ((first[1:], "start"), (frontier_of(latest), f"step {latest.get('step')}")):
        for key, marker, what in (("reward", "o", "reward"), ("same", "s", "same as the start's careful answer")):
            if drawn := [(point["tokens_per_pass"], point[key]) for point in points if key in point]:
                x, y = zip(*drawn, strict=True)
                style = "--" if name == "start" else "-"
                frontier.plot(x, y, style, marker=marker, markersize=4, label=f"{name}: {what}")
    if first and "reward" in first[0]:
        careful = first[0]
        frontier.plot(careful["tokens_per_pass"], careful["reward"], "*", color=INK, label="start, careful")
    frontier.set_ylim(0, 1.02)
    frontier.set_ylabel("share of held-out answers")
    frontier.set_xlabel("tokens a pass, by threshold")


def frontier_of(record: dict[str, Any]) -> list[dict[str, float]]:
    """Return what a record of certainty training says of its validation, a point for each threshold; [] without one."""
    points: dict[float, dict[str, float]] = {}
    for name, value in record.items():
        key, at, threshold = name.removeprefix("validation_").rpartition("_at_")
        if at:
            points.setdefault(float(threshold), {})[key] = value
    return [{"threshold": threshold, **points[threshold]} for threshold in sorted(points)]


def _draw_several(found: Sequence[Curves], loss: Any, rate: Any, norm: Any) -> None:
    for number, curves in enumerate(found):
        colour = COLOURS[number % len(COLOURS)]
        curves.draw(loss, curves.column("bits_per_byte"), f"{curves.name}, training", smooth=True, color=colour)
        held_out = curves.column("validation_bits_per_byte")
        curves.draw(loss, held_out, f"{curves.name}, held out", marker=".", linestyle="--", color=colour)
        curves.draw(norm, curves.column("gradient_norm"), curves.name, smooth=True, color=colour)
        curves.draw(rate, curves.column("learning_rate"), curves.name, color=colour)
    rate.set_ylabel("learning rate")


def _draw_likelihoods(axes: Any, file: Path) -> None:
    """Draw the means and standard errors of likelihood.json at the step of the weights that were measured."""
    found = read_json(file)
    if "step" not in found:  # written by an earlier version, which did not say of which weights
        return
    try:
        step = int(found["step"])
        for name, figures in found["models"].items():
            for kind in sorted(figures.keys() - {"path - bound"}):
                mean, error = float(figures[kind]["mean"]), float(figures[kind]["standard_error"] or 0)
                label = f"{kind} on {found['tokens']:,} tokens, {Path(name).name}"
                axes.errorbar(step, mean, error, marker="_", capsize=3, label=label)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise IlladaError(f"{file} is not what `illada report --windows` writes: delete it") from error
