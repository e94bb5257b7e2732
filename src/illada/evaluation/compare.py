"""`illada compare`: two evaluations of the same documents, paired (ours; the paper gives no variance)."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from illada.errors import IlladaError
from illada.files import parse_json
from illada.reporting import aligned

RESAMPLES, SEED = 10_000, 0
MOST = 2**63
"""Whole numbers beyond are no metric's; the largest do not fit a float."""


@dataclass(frozen=True)
class Difference:
    """B minus A over the documents that both runs have, in the metric's units."""

    task: str
    metric: str
    documents: int
    a: float
    b: float
    low: float
    high: float
    """95 % confidence interval of b - a by paired bootstrap over documents (percentiles of 10 000 resamples)."""
    p: float | None
    """p of McNemar's exact two-sided test where every document is right or wrong; None for other metrics."""


def differences(one: str, other: str) -> list[Difference]:
    """Return the differences of two output folders of `illada eval`, task by task.

    Raises:
        IlladaError: when a folder has no samples, the two share no document, or their answers differ in kind.
    """
    samples = [_samples(Path(folder)) for folder in (one, other)]
    shared = sorted(samples[0].keys() & samples[1].keys())
    results = []
    for task, metric in shared:
        a, b = (run[task, metric] for run in samples)
        documents = sorted(a.keys() & b.keys())
        if documents:
            pairs = np.array([(a[doc], b[doc]) for doc in documents])
            results.append(_difference(task, metric, pairs))
    if not results:
        raise IlladaError(f"{one} and {other} share no task, metric and document: were the same tasks evaluated?")
    return results


def _difference(task: str, metric: str, pairs: np.ndarray) -> Difference:
    gaps = pairs[:, 1] - pairs[:, 0]
    # Every task starts from the same seed, so that its interval can be computed again.
    generator = np.random.default_rng(SEED)
    means = np.array([generator.choice(gaps, len(gaps)).mean() for _ in range(RESAMPLES)])
    low, high = np.quantile(means, (0.025, 0.975))
    p = mcnemar(int((gaps < 0).sum()), int((gaps > 0).sum())) if np.isin(pairs, (0.0, 1.0)).all() else None
    a, b = pairs.mean(0).tolist()
    return Difference(task, metric, len(pairs), a, b, float(low), float(high), p)


def mcnemar(lost: int, won: int) -> float:
    """Return the two-sided p of `lost` changes one way and `won` the other, if both ways were equally likely."""
    changed, fewer = lost + won, min(lost, won)
    tail: int = sum(math.comb(changed, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**changed)


def _samples(folder: Path) -> dict[tuple[str, str], dict[str, float]]:
    """Return the value of every document by task and metric; metrics that are no numbers are left out."""
    files = sorted((folder / "samples").rglob("*.jsonl"))
    if not files:
        raise IlladaError(f"no samples in {folder}: give the output folder of `illada eval`")
    values: dict[tuple[str, str], dict[str, float]] = {}
    for path in files:
        task = str(path.relative_to(folder / "samples").with_suffix(""))
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                sample = parse_json(line)
                document, kind = str(sample["doc_id"]), str(sample["filter"])
                metrics = {str(name): sample[name] for name in sample["metrics"]}
                if any(isinstance(value, int) and abs(value) > MOST for value in metrics.values()):
                    raise ValueError("a metric is no number of this size")
            except (ValueError, KeyError, TypeError) as error:
                raise IlladaError(f"{path} line {number} is no sample of `illada eval`: evaluate again") from error
            for metric, value in metrics.items():
                if isinstance(value, bool | int | float) and abs(value) < math.inf:
                    values.setdefault((task, f"{metric},{kind}".removesuffix(",none")), {})[document] = float(value)
    return values


def compare(one: str, other: str) -> str:
    """Return a Markdown table of the differences between two runs."""
    lines = [["task", "metric", "documents", "A", "B", "B - A", "95 % interval", "McNemar p"]]
    for d in differences(one, other):
        line = [d.task, d.metric, str(d.documents), f"{d.a:.4f}", f"{d.b:.4f}", f"{d.b - d.a:+.4f}"]
        lines.append([*line, f"[{d.low:+.4f}, {d.high:+.4f}]", "" if d.p is None else f"{d.p:.3g}"])
    return (
        f"{aligned(lines, left=2)}\n\nA: {one} · B: {other}. Paired over documents: percentile bootstrap with "
        f"{RESAMPLES:,} resamples; McNemar's exact test, two-sided, where answers are right or wrong."
    )
