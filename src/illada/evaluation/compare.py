"""`illada compare`: the same documents under two runs, paired (ours; the paper gives no variance)."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from illada.errors import IlladaError
from illada.reporting import aligned

RESAMPLES, SEED = 10_000, 0


@dataclass(frozen=True)
class Difference:
    """B minus A over the documents both have, in the metric's units."""

    task: str
    metric: str
    documents: int
    a: float
    b: float
    low: float
    high: float
    """A 95 % confidence interval of b - a by paired bootstrap over documents (percentiles of 10 000 resamples)."""
    p: float | None
    """Of McNemar's exact test, two-sided, where every document is right or wrong; None for other metrics."""


def differences(one: str, other: str) -> list[Difference]:
    """Return the differences of two output folders of `illada eval`, task by task.

    Raises:
        IlladaError: when a folder has no samples, the two share no document, or their answers differ in kind.
    """
    samples = [_samples(Path(folder)) for folder in (one, other)]
    shared = sorted(samples[0].keys() & samples[1].keys())
    found = []
    for task, metric in shared:
        a, b = (run[task, metric] for run in samples)
        documents = sorted(a.keys() & b.keys())
        if documents:
            pairs = np.array([(a[doc], b[doc]) for doc in documents])
            found.append(_difference(task, metric, pairs))
    if not found:
        raise IlladaError(f"{one} and {other} share no task, metric and document: were the same tasks evaluated?")
    return found


def _difference(task: str, metric: str, pairs: np.ndarray) -> Difference:
    gaps = pairs[:, 1] - pairs[:, 0]
    # A generator of its own, the same for every task, so that the interval can be repeated.
    picks = np.random.default_rng(SEED)
    means = np.array([gaps[picks.integers(0, len(gaps), len(gaps))].mean() for _ in range(RESAMPLES)])
    low, high = np.quantile(means, (0.025, 0.975))
    p = mcnemar(int((gaps < 0).sum()), int((gaps > 0).sum())) if np.isin(pairs, (0.0, 1.0)).all() else None
    a, b = pairs.mean(0).tolist()
    return Difference(task, metric, len(pairs), a, b, float(low), float(high), p)


def mcnemar(lost: int, won: int) -> float:
    """Return the two-sided p of so many changes one way and so many the other, if both were equally likely."""
    changed, fewer = lost + won, min(lost, won)
    tail: int = sum(math.comb(changed, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**changed)


def _samples(folder: Path) -> dict[tuple[str, str], dict[str, float]]:
    """Return by task and metric the value of every document; metrics of other kinds than numbers are left out."""
    files = sorted((folder / "samples").rglob("*.jsonl"))
    if not files:
        raise IlladaError(f"no samples in {folder}: give the output folder of `illada eval`")
    found: dict[tuple[str, str], dict[str, float]] = {}
    for path in files:
        task = str(path.relative_to(folder / "samples").with_suffix(""))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                sample = json.loads(line)
                document, kind = str(sample["doc_id"]), sample["filter"]
                values = {name: sample[name] for name in sample["metrics"]}
            except (ValueError, KeyError, TypeError) as error:
                raise IlladaError(f"{path} line {number} is no sample of `illada eval`: evaluate again") from error
            for metric, value in values.items():
                if isinstance(value, bool | int | float):
                    found.setdefault((task, f"{metric},{kind}".removesuffix(",none")), {})[document] = float(value)
    return found


def compare(one: str, other: str) -> str:
    """Return a Markdown table of the differences between two runs."""
    lines = [["task", "metric", "documents", "A", "B", "B - A", "95 % interval", "McNemar p"]]
    for d in differences(one, other):
        values = [f"{value:.4f}" for value in (d.a, d.b)]
        interval = f"[{d.low:+.4f}, {d.high:+.4f}]"
        p = "" if d.p is None else f"{d.p:.3g}"
        lines.append([d.task, d.metric, str(d.documents), *values, f"{d.b - d.a:+.4f}", interval, p])
    return (
        f"{aligned(lines)}\n\nA: {one} · B: {other}. Paired over documents: percentile bootstrap with {RESAMPLES:,} "
        "resamples; McNemar's exact test, two-sided, where answers are right or wrong."
    )
