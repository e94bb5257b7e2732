"""Measure a trained model as a question asks: held-out text, answers to problems, choices, what it writes.

Each kind has its own settings under `measure` in a question:

    text: {tokens of a window: how many windows}
    answers: {problems: how many, settings of generation}
    choices: {problems: how many, files: names, method: confidence | likelihood | path, samples: of the likelihood,
        chat: whether the candidates answer a user}
    writing: {texts: how many of held-out.jsonl, given: tokens of each that are given, judge: the causal arm whose model
        of the same seed judges what is written behind them, ways: {name: settings of generation}}

The figures are named by what they are of, such as "bound 128" and "accuracy"; of the groups of problems, "accuracy
GROUP". Of what is written each way, and of the texts themselves ("text"): "judged", the causal model's bits a token,
the end included; "distinct" and "varied", the share of pairs of neighbouring tokens that are new in their answer, and
in all answers; "tokens". Positions are what the forward passes compute for a problem. Seconds are shares of a time in
which other arms may run on the same machine.
"""

import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

import illada
from illada.data.shards import Shards
from illada.generation.settings import GenerationSettings, settings_for
from illada.reporting import environment_of
from illada.scoring.likelihood import likelihood_scores
from illada.scoring.optional.candidates import Item, right_choices, score_candidates
from illada.text.prompts import encode_plain, show_ids
from illada.training.optional.likelihood import text_likelihood

Figures = dict[str, float]


def measure(
    model: Path, problems: Path, held_out: Path | None, asked: dict[str, Any], judge: Path | None = None
) -> tuple[Figures, dict[str, Any]]:
    """Return the figures asked for and the environment.

    Args:
        model: folder of the model.
        problems: folder with held-out.jsonl, problems.jsonl and choices.jsonl, where these are asked for.
        held_out: prepared held-out text.
        asked: the kinds and their settings.
        judge: folder of the causal model that judges writing.
    """
    disable_progress_bar()
    network, tokenizer = illada.load_model(str(model), device="cpu")
    figures: Figures = {}
    if "text" in asked:
        assert held_out is not None
        figures |= text(network, Shards.open(held_out), asked["text"])
    if "answers" in asked:
        figures |= answers(network, tokenizer, problems / "problems.jsonl", **asked["answers"])
    if "choices" in asked:
        figures |= choices(network, tokenizer, problems, **asked["choices"])
    if "writing" in asked:
        assert judge is not None
        judging, _ = illada.load_model(str(judge), device="cpu")
        own = {name: value for name, value in asked["writing"].items() if name != "judge"}
        figures |= writing(network, judging, tokenizer, problems / "held-out.jsonl", **own)
    return figures, environment_of(network)


def text(network: Any, shards: Shards, windows: dict[int, int]) -> Figures:
    """Return bits per byte of held-out text in windows of each length, by bound and path, or exactly if causal."""
    figures: Figures = {}
    for length, count in windows.items():
        found = text_likelihood(network, shards, int(length), count).figures
        figures |= {f"{name} {length}": figure["mean"] for name, figure in found.items() if figure["mean"] is not None}
    return figures


def records(path: Path, count: int) -> list[dict[str, Any]]:
    """Return the first lines of a file of records."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


def shares(name: str, values: Sequence[bool | float], groups: Sequence[str]) -> Figures:
    """Return the mean of values, of all and of each group where there are several."""
    figures = {name: sum(values) / len(values)}
    for group in dict.fromkeys(groups) if len(set(groups)) > 1 else ():
        own = [value for value, of in zip(values, groups, strict=True) if of == group]
        figures[f"{name} {group}"] = sum(own) / len(own)
    return figures


def answers(network: Any, tokenizer: Any, path: Path, problems: int, **settings: Any) -> Figures:
    """Return the share of right answers and of right lengths, the mean error of length, forwards and seconds."""
    asked = records(path, problems)
    own = settings_for(network, GenerationSettings(**settings))
    started = time.monotonic()
    found = illada.generate(
        network, [[{"role": "user", "content": record["prompt"]}] for record in asked], own, tokenizer=tokenizer
    )
    seconds = time.monotonic() - started
    groups = [record.get("group", "") for record in asked]
    expected = [len(tokenizer.encode(record["response"], add_special_tokens=False)) for record in asked]
    errors = [len(answer.ids) - length for answer, length in zip(found, expected, strict=True)]
    texts = [show_ids(tokenizer, answer.ids) for answer in found]
    right = [text in record.get("accepted", [record["response"]]) for text, record in zip(texts, asked, strict=True)]
    return {
        **shares("accuracy", right, groups),
        **shares("length right", [error == 0 for error in errors], groups),
        "length error": sum(map(abs, errors)) / len(errors),
        "too long": sum(error > 0 for error in errors) / len(errors),
        "too short": sum(error < 0 for error in errors) / len(errors),
        "forwards a token": sum(a.forwards for a in found) / sum(len(a.ids) + 1 for a in found),
        "seconds a problem": seconds / len(asked),
    }


def choices(
    network: Any, tokenizer: Any, folder: Path, problems: int, files: Sequence[str], method: str, **options: Any
) -> Figures:
    """Return for each file the share of right choices, and positions and seconds of a problem."""
    figures: Figures = {}
    for file in files:
        asked = records(folder / f"{file}.jsonl", problems)
        items = [Item(record["context"], record["candidates"], record["answer"]) for record in asked]
        started = time.monotonic()
        with counted(network) as positions:
            scores = score_candidates(
                network, tokenizer, items, method, options.get("samples", 1), 0, options.get("chat", False)
            )
        seconds = time.monotonic() - started
        right = right_choices(items, scores)
        figures |= {
            **shares(f"accuracy {file}", right, [record.get("group", "") for record in asked]),
            f"positions {file}": sum(positions) / len(items),
            f"seconds {file}": seconds / len(items),
        }
    return figures


def writing(
    network: Any, judge: Any, tokenizer: Any, path: Path, texts: int, given: int, ways: dict[str, dict[str, Any]]
) -> Figures:
    """Return how a causal model judges what a model writes on behind beginnings of texts, and how varied it is."""
    encoded = [encode_plain(tokenizer, record["text"]) for record in records(path, texts)]
    given += len(encode_plain(tokenizer, ""))  # what begins a document, as in training
    contexts = [ids[:given] for ids in encoded]
    end, limit = [tokenizer.eos_token_id], max(settings["max_new_tokens"] for settings in ways.values())
    written = {"text": [(ids[given:] + end)[:limit] for ids in encoded]}
    for name, settings in ways.items():
        own = [replace(settings_for(network, GenerationSettings(**settings)), seed=i) for i in range(len(contexts))]
        found = illada.generate(network, contexts, own, tokenizer=tokenizer)
        written[name] = [answer.ids + end * (answer.finish_reason == "stop") for answer in found]
    figures: Figures = {}
    for name, continuations in written.items():
        nats = likelihood_scores(judge, [*zip(contexts, continuations, strict=True)])
        tokens = sum(map(len, continuations))
        neighbours = [[*itertools.pairwise(ids)] for ids in continuations]
        pairs = max(1, sum(map(len, neighbours)))
        figures |= {
            f"judged {name}": -sum(nats) / tokens / math.log(2),
            f"distinct {name}": sum(len(set(own)) for own in neighbours) / pairs,
            f"varied {name}": len(set(itertools.chain(*neighbours))) / pairs,
            f"tokens {name}": tokens / len(continuations),
        }
    return figures


@contextmanager
def counted(network: Any) -> Iterator[list[int]]:
    """Collect how many positions each forward pass computes."""
    found: list[int] = []
    hook = network.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].numel()))
    try:
        yield found
    finally:
        hook.remove()
