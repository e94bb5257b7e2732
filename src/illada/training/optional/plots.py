"""`illada report`: the curves of a run as one picture."""

from pathlib import Path
from typing import Any

from illada.errors import IlladaError, needs
from illada.files import read_json
from illada.weights.runs import read_metrics

PICTURES = (".png", ".svg", ".pdf")
"""What a picture's name may end in."""


def draw_run(run: str, output: str | None = None) -> Path:
    """Draw loss, loss by mask ratio, gradient norm with learning rate, and speed; return the picture's path.

    Beside the loss stand the figures of RUN/likelihood.json, where `illada report --windows` has written them.

    The run of a causal model has no mask ratios, and their place stays empty.

    Raises:
        IlladaError: when the folder holds no metrics, the output cannot be written, or matplotlib is not installed.
    """
    folder = Path(run)
    target = _checked(folder / "report.png" if output is None else Path(output))
    records = read_metrics(folder / "metrics.jsonl")
    if not records:
        raise IlladaError(f"{run} holds no metrics: give the folder of a run that has made a step")
    with needs("report", "a picture"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 7), layout="constrained")
    ((loss, ratio), (norm, speed)) = figure.subplots(2, 2)

    def curve(axes: Any, values: list[Any], label: str, **style: Any) -> None:
        points = [(r["step"], value) for r, value in zip(records, values, strict=True) if value is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)

    def column(name: str) -> list[Any]:
        return [record.get(name) for record in records]

    curve(loss, column("bits_per_byte"), "training: one noisy estimate a step", linewidth=0.6, alpha=0.7)
    raw = column("raw_validation_bits_per_byte")
    label = "held out, average of the weights" if any(raw) else "held out"
    curve(loss, column("validation_bits_per_byte"), label, marker=".", color="black")
    curve(loss, raw, "held out, without the average", marker=".", color="tab:gray", linestyle="--")
    if (figures := folder / "likelihood.json").exists():
        _draw_likelihoods(loss, figures)
    buckets = [record.get("loss_by_mask_ratio") or [] for record in records]
    parts = max(map(len, buckets))
    loss.set_title("bits per byte (upper bound)" if parts else "bits per byte")
    ratio.set_visible(bool(parts))
    for part in range(parts):
        label = f"{100 * part // parts} to {100 * (part + 1) // parts} % masked"
        curve(ratio, [bucket[part] if bucket else None for bucket in buckets], label, linewidth=0.6)
    ratio.set_title("cross-entropy of masked tokens, nats")
    curve(norm, column("gradient_norm"), "gradient norm", linewidth=0.6)
    norm.set_yscale("log")
    norm.set_title("gradient norm (left), learning rate (right)")
    curve(norm.twinx(), column("learning_rate"), "learning rate", color="tab:orange")
    curve(speed, column("tokens_per_second"), "mean since the start", linewidth=0.8)
    speed.set_ylim(bottom=0)
    speed.set_title("tokens a second")
    for axes in (loss, ratio, norm, speed):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.savefig(target, dpi=120)
    return target


def _checked(target: Path) -> Path:
    """Return where to write a picture; raises IlladaError, before anything is drawn, when none can be written there."""
    if target.suffix not in PICTURES:
        raise IlladaError(f"output {target} is no picture: its name must end in {', '.join(PICTURES)}")
    if not target.parent.is_dir():
        raise IlladaError(f"output {target} cannot be written: there is no folder {target.parent}")
    return target


def _draw_likelihoods(axes: Any, file: Path) -> None:
    """Draw the means and standard errors of likelihood.json at the step of the weights that were measured."""
    found = read_json(file)
    try:
        step = int(found["step"])
        for name, figures in found["models"].items():
            for kind in sorted(figures.keys() - {"path - bound"}):
                mean, error = float(figures[kind]["mean"]), float(figures[kind]["standard_error"] or 0)
                label = f"{kind} on {found['tokens']:,} tokens, {Path(name).name}"
                axes.errorbar(step, mean, error, marker="_", capsize=3, label=label)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise IlladaError(f"{file} is not what `illada report --windows` writes: delete it") from error
