"""Rows of a table and variants of an ablation: what is evaluated, and what comes out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from illada.errors import IlladaError
from illada.evaluation.options import Bos, Scoring, SpecialTokens

PAPER = Path(__file__).with_name("paper.yaml")
FAST = {"threshold": 0.95, "cache": "adaptive"}
"""Decoding of `--decode fast`, which is not the paper's."""
ABLATIONS: dict[str, list[Any]] = {
    "scoring": ["confidence", "likelihood", "path"],
    "block_length": [8, 16, 32, 64],
    "steps": [32, 16, 8, 4],
    "threshold": ["none", 0.95, 0.9, 0.8],
}
"""The usual values of each ablation."""


@dataclass(frozen=True)
class Row:
    """One row of a table: a task and how to evaluate it; None and empty leave the task's or the model's own."""

    name: str
    task: str
    shots: int | None = None
    scoring: Scoring | None = None
    samples: int | None = None
    chat: bool = False
    metrics: tuple[str, ...] = ()
    """Metrics to show; the first is the row's number. Empty for all."""
    generation: dict[str, Any] = field(default_factory=dict)
    bos: Bos | None = None
    special_tokens: SpecialTokens | None = None
    from_authors: bool = False
    """Whether the task is one of the files in the authors' checkout."""
    paper: float | None = None
    others: dict[str, float] = field(default_factory=dict)
    average: bool = True
    """Whether the row is part of the paper's average."""


@dataclass(frozen=True)
class Variant:
    """A column of an ablation: its label, and what it changes."""

    label: str = ""
    generation: dict[str, Any] = field(default_factory=dict)
    scoring: Scoring | None = None
    kinds: frozenset[str] = frozenset()
    """Output types of the tasks that the variant concerns; empty for all."""


@dataclass
class Result:
    """What came out of a row."""

    row: str
    task: str
    variant: str
    status: str = "ok"
    """"ok", or a few words why there is no number."""
    reason: str = ""
    """The same at length."""
    metrics: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    """Value and standard error of each metric; accuracies are shares from 0 to 1."""
    paper: float | None = None
    documents: int = 0
    forwards: int = 0
    """Row-forwards: passes each request took part in, summed; a pass that requests share counts for each of them."""
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)


def paper_rows(table: str, decode: str, lengths: str, authors: bool = False) -> list[Row]:
    """Return the rows of a table of the paper (spec §7); BOS and special tokens are treated as in the authors' script.

    Args:
        table: "base" or "instruct".
        decode: "exact" for the paper's decoding, "fast" for `FAST`.
        lengths: answer lengths of MMLU and MMLU-Redux in the table of the instruct model, "3-4" or "4-3": the paper and
            the authors' script disagree which has which.
        authors: whether to take the authors' own tasks where there are any.
    """
    instruct = zip(("MMLU", "MMLU-Redux"), map(int, lengths.split("-")), strict=True)
    answer_length = dict(instruct) if table == "instruct" else {}
    rows = []
    for name, values in yaml.safe_load(PAPER.read_text(encoding="utf-8"))[table].items():
        theirs = values.pop("authors", None)
        if authors and theirs is not None:
            values |= {**theirs, "from_authors": True}
        generation = values.get("generation", {})
        if name in answer_length:
            generation = {"max_gen_toks": answer_length[name], "block_length": answer_length[name]}
        if generation and decode == "fast":
            generation |= FAST
        values |= {"generation": generation, "metrics": tuple(values["metrics"])}
        rows.append(Row(name, **values, bos="scores", special_tokens="keep"))
    return rows


def select_rows(rows: Sequence[Row], names: Sequence[str] | None) -> list[Row]:
    """Return the rows called by name, or by the name of their task; all rows without names.

    Raises:
        IlladaError: when there is no such row.
    """
    if not names:
        return list(rows)
    known = {name.casefold(): row for row in rows for name in (row.task, row.name)}
    for name in names:
        if name.casefold() not in known:
            raise IlladaError(f"no task {name} here: choose from {', '.join(row.name for row in rows)}")
    return list({known[name.casefold()].name: known[name.casefold()] for name in names}.values())


def ablation(what: str, values: Sequence[Any] | None) -> list[Variant]:
    """Return the variants of an ablation: Table 4 (scoring), block length, steps per block, or threshold.

    Raises:
        IlladaError: when a value is not of its kind.
    """
    variants = []
    for value in values or ABLATIONS[what]:
        if what == "scoring":
            if value not in ABLATIONS["scoring"]:
                raise IlladaError(f"values of scoring are confidence, likelihood and path, got {value}")
            variants.append(Variant(value, scoring=value, kinds=frozenset(("multiple_choice", "loglikelihood"))))
            continue
        try:
            number = None if value == "none" else float(value) if what == "threshold" else int(value)
        except ValueError:
            raise IlladaError(f"values of {what} are numbers, got {value}") from None
        name = {"steps": "steps_per_block"}.get(what, what)
        # A rule of how many tokens to commit excludes the others.
        others = {} if what == "block_length" else {"threshold": None, "steps_per_block": None, "entropy_bound": None}
        variants.append(Variant(f"{what} {value}", {**others, name: number}, kinds=frozenset(("generate_until",))))
    return variants
