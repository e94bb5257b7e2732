"""`illada score`: which candidate does the model believe?"""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from illada.commands import heavy
from illada.errors import IlladaError
from illada.files import parse_json, read_lines
from illada.generation.settings import GenerationSettings
from illada.weights.options import ModelOptions


@dataclass(frozen=True)
class PathRule:
    """The decoding rule of `--method path`, as in `illada generate`.

    Args:
        block_length: tokens of a block: those of a later block are not revealed before it is finished.
        steps_per_block: forward passes per block; null for one token a pass.
        remasking: which tokens steps_per_block reveals first: low_confidence those at the positions whose best id is
            the most probable, margin those whose best id leads the second by the most.
        threshold: reveal every position whose best id has at least this probability, instead of steps_per_block.
        entropy_bound: reveal the positions of least entropy, as many as keep the sum of their entropies, less the
            largest of them, within this many nats, instead of steps_per_block.
    """

    block_length: int = 32
    steps_per_block: int | None = None
    remasking: Literal["low_confidence", "margin"] = "low_confidence"
    threshold: float | None = None
    entropy_bound: float | None = None

    def settings(self, method: str) -> GenerationSettings:
        """Return it as settings of generation.

        Raises:
            IlladaError: when they contradict each other, or the method has no use for them.
        """
        changed = [name for name, value in asdict(self).items() if value != getattr(PathRule, name)]
        if changed and method != "path":
            raise IlladaError(f"only --method path looks at {' and '.join(changed)}: give it, or leave them out")
        return GenerationSettings(**asdict(self))


def score(
    model: ModelOptions,
    rule: PathRule,
    context: str | None = None,
    candidates: list[str] | None = None,
    file: str | None = None,
    method: Literal["confidence", "likelihood", "both", "path"] = "confidence",
    samples: int = 128,
    seed: int = 0,
    chat: bool = False,
) -> None:
    """Score candidate continuations in nats: confidence (paper Eq. 2), Monte-Carlo likelihood, or an exact likelihood.

    Prints every item's scores and choice as a JSON line, then the accuracy where answers are known.

    Args:
        model: which model, and how to load it.
        rule: which positions are filled in when, for method path.
        context: text before the candidates.
        candidates: texts to compare.
        file: jsonl with {"context": str, "candidates": [str], "answer": int (optional)} on each line,
            instead; answer is the number of the right candidate, counted from 0.
        method: which scorer: confidence (paper Eq. 2, not a likelihood), likelihood (LLaDA Eq. 6, a bound; of a causal
            model log p itself), both of them, or path (log p itself under a deterministic decoding rule).
        samples: Monte-Carlo samples of the likelihood.
        seed: seed of the Monte-Carlo samples.
        chat: wrap each context in the chat template as a user's question.
    """
    settings = rule.settings(method)
    items = read_items(context, candidates, file)
    network, tokenizer = heavy.weights.load_model(model.model, model.dtype, model.device, model.quantize)
    methods = ("confidence", "likelihood") if method == "both" else (method,)
    scores = {
        name: heavy.scoring.score_candidates(network, tokenizer, items, name, samples, seed, chat, settings)
        for name in methods
    }
    for number, item in enumerate(items):
        record: dict[str, Any] = {"context": item.context, "candidates": item.candidates}
        for name in methods:
            values = scores[name][number]
            best = max(range(len(values)), key=values.__getitem__)
            record[name] = {"scores": [round(value, 4) for value in values], "choice": item.candidates[best]}
        print(json.dumps(record, ensure_ascii=False))
    known = [number for number, item in enumerate(items) if item.answer is not None]
    for name in methods if known else ():
        right = sum(max(scores[name][n]) == scores[name][n][items[n].answer or 0] for n in known)
        print(f"{name}: {right} of {len(known)} right ({right / len(known):.1%})")


def read_items(context: str | None, candidates: list[str] | None, file: str | None) -> "list[heavy.scoring.Item]":
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
        return [heavy.scoring.Item(context or "", list(candidates))]
    items = []
    for number, line in read_lines(file):
        try:
            record = parse_json(line)
            if not isinstance(record["candidates"], list):
                raise TypeError("candidates must be a list")
            item = heavy.scoring.Item(
                str(record["context"]), [str(c) for c in record["candidates"]], record.get("answer")
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IlladaError(f'{file} line {number} is not {{"context": ..., "candidates": [...]}}') from error
        if not item.candidates:
            raise IlladaError(f"{file} line {number} has no candidates")
        if item.answer is not None and item.answer not in range(len(item.candidates)):
            raise IlladaError(f"{file} line {number}: answer {item.answer} is not the index of a candidate (from 0 on)")
        items.append(item)
    return items
