"""`illada score`: which candidate does the model believe?"""

import json
from collections.abc import Sequence
from typing import Any, Literal, TextIO

from illada.errors import IlladaError
from illada.files import read_lines
from illada.model import IlladaForMaskedLM
from illada.scoring.candidates import Item, score_candidates

Method = Literal["confidence", "likelihood", "both"]
Pair = tuple[list[int], list[int]]


def read_items(context: str | None, candidates: Sequence[str] | None, file: str | None) -> list[Item]:
    """Return the one item given, or those of a jsonl file.

    Raises:
        IlladaError: when neither or both are given, or a record is not of the form.
    """
    given = context is not None or candidates is not None
    if given == (file is not None):
        raise IlladaError("give --context and --candidates, or --file")
    if file is None:
        if not candidates:
            raise IlladaError("--candidates is missing")
        return [Item(context or "", list(candidates))]
    items = []
    for number, line in read_lines(file):
        try:
            record = json.loads(line)
            if not isinstance(record["candidates"], list):
                raise TypeError("candidates must be a list")
            item = Item(str(record["context"]), [str(c) for c in record["candidates"]], record.get("answer"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IlladaError(f'{file} line {number} is not {{"context": ..., "candidates": [...]}}') from error
        if not item.candidates:
            raise IlladaError(f"{file} line {number} has no candidates")
        if item.answer is not None and item.answer not in range(len(item.candidates)):
            raise IlladaError(f"{file} line {number}: answer {item.answer} is not the index of a candidate")
        items.append(item)
    return items


def score_items(
    model: IlladaForMaskedLM,
    tokenizer: Any,
    items: Sequence[Item],
    method: Method,
    samples: int,
    seed: int,
    chat: bool,
    out: TextIO,
) -> None:
    """Print every item's scores and choice as a JSON line, then the accuracy where answers are known."""
    methods = ("confidence", "likelihood") if method == "both" else (method,)
    scores = {name: score_candidates(model, tokenizer, items, name, samples, seed, chat) for name in methods}
    for number, item in enumerate(items):
        record: dict[str, Any] = {"context": item.context, "candidates": item.candidates}
        for name in methods:
            values = scores[name][number]
            best = max(range(len(values)), key=values.__getitem__)
            record[name] = {"scores": [round(value, 4) for value in values], "choice": item.candidates[best]}
        print(json.dumps(record, ensure_ascii=False), file=out)
    known = [number for number, item in enumerate(items) if item.answer is not None]
    for name in methods if known else ():
        right = sum(max(scores[name][n]) == scores[name][n][items[n].answer or 0] for n in known)
        print(f"{name}: {right} of {len(known)} right ({right / len(known):.1%})", file=out)
