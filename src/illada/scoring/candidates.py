"""Scores of candidates that are given as texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from illada.generation.settings import GenerationSettings
from illada.model.transformer import IlladaForMaskedLM
from illada.scoring.confidence import confidence_scores
from illada.scoring.layout import Pair, score_layout
from illada.scoring.likelihood import likelihood_scores
from illada.scoring.path import path_log_likelihoods
from illada.text.chat import encode_prompt


@dataclass(frozen=True)
class Item:
    """A context and its candidates."""

    context: str
    candidates: list[str]
    answer: int | None = None
    """Index of the right candidate, if it is known."""


def score_candidates(
    model: IlladaForMaskedLM,
    tokenizer: Any,
    items: Sequence[Item],
    method: str,
    samples: int,
    seed: int,
    chat: bool,
    settings: GenerationSettings | None = None,
) -> list[list[float]]:
    """Return the scores of each item's candidates in nats; all candidates of all items advance together.

    In the chat layout a candidate answers the context, a user's question; otherwise it continues the context (spec §6).
    One EOS follows the candidate in both. `method` is "confidence", "likelihood", which alone looks at `samples` and
    `seed`, or "path", which alone looks at `settings` (None: one token a pass, the paper's decoding).
    """
    pairs: list[Pair] = []
    right: Sequence[int] = ()
    for item in items:
        if chat:
            prompt = encode_prompt(tokenizer, [{"role": "user", "content": item.context}])
            pairs += [(prompt, list(tokenizer.encode(c, add_special_tokens=False))) for c in item.candidates]
            right = (tokenizer.eos_token_id,)
        else:
            item_pairs, right = score_layout(tokenizer, item.context, item.candidates)
            pairs += item_pairs
    if method == "confidence":
        scores = confidence_scores(model, pairs, right_context=right)
    elif method == "path":
        scores = path_log_likelihoods(model, pairs, settings or GenerationSettings(), right_context=right)
    else:
        scores = likelihood_scores(model, pairs, samples=samples, seed=seed, right_context=right)
    remaining = iter(scores)
    return [[next(remaining) for _ in item.candidates] for item in items]
