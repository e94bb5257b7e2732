"""What is evaluated and what comes out."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Row:
    """One row of a table: a task and how to evaluate it; None and empty leave the task's own settings."""

    name: str
    task: str
    shots: int | None = None
    scoring: Literal["confidence", "likelihood"] | None = None
    samples: int | None = None
    chat: bool = False
    metrics: tuple[str, ...] = ()
    """Those shown, the row's number first; empty for all."""
    generation: dict[str, Any] = field(default_factory=dict)
    paper: float | None = None
    others: dict[str, float] = field(default_factory=dict)
    average: bool = True
    """Whether it is part of the paper's average."""


@dataclass
class Result:
    """What came out of a row."""

    row: str
    task: str
    variant: str
    status: str = "ok"
    """Or why there is no number, in short."""
    reason: str = ""
    """And at length."""
    metrics: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    """Value and standard error of each, shares from 0 to 1 for accuracies."""
    paper: float | None = None
    documents: int = 0
    forwards: int = 0
    """Row-forwards: passes each request took part in, summed; what requests share counts for each."""
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
