"""`illada eval` and `illada compare`."""

from illada.commands import heavy
from illada.evaluation.options import EvalOptions


def evaluate(options: EvalOptions) -> None:
    """Evaluate a model with lm-evaluation-harness: the paper's tables, any tasks. Interrupted, it continues."""
    if table := heavy.evaluation.evaluate(options):  # one of several processes has it
        print(table)


def compare(run_a: str, run_b: str, /) -> None:
    """Compare two outputs of `illada eval`, document by document: differences with confidence intervals.

    Args:
        run_a: output folder of `illada eval`.
        run_b: another.
    """
    print(heavy.comparison.compare(run_a, run_b))
