"""Scores of candidates that are given as texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from illada.errors import IlladaError
from illada.generation.settings import GenerationSettings
from illada.model.transformer import IlladaForMaskedLM
from illada.scoring.confidence import confidence_scores
from illada.scoring.layout import Pair, score_layout
from illada.scoring.likelihood import likelihood_scores
from illada.scoring.path import path_log_likelihoods
from illada.text.chat import Prompt, encode_any

Method = Literal["confidence", "likelihood", "path"]


@dataclass(frozen=True)
class Item:
    """A context and its candidates."""

    context: Prompt
    candidates: list[str]
    answer: int | None = None
    """Index of the right candidate, if it is known."""


def score(
    model: IlladaForMaskedLM,
    context: Prompt,
    candidates: Sequence[str],
    tokenizer: Any,
    method: Method = "confidence",
    samples: int = 128,
    seed: int = 0,
    settings: GenerationSettings | None = None,
) -> list[float]:
    """Return the score of each candidate in nats: the higher, the better; one EOS follows each (spec §6).

    Args:
        model: the network.
        context: a text, which the candidates continue (a space at its end moves to them), a chat, which they answer in
            the tokenizer's chat template, or token ids: a list, or what the tokenizer returns.
        candidates: the texts to compare.
        tokenizer: one of transformers.
        method: "confidence" (paper Eq. 2), "likelihood" (LLaDA Eq. 6; for a causal model log p itself), or "path"
            (exact, under a decoding rule).
        samples: Monte-Carlo samples of the likelihood.
        seed: seed of these.
        settings: the rule of "path"; None takes one token a pass.

    Raises:
        IlladaError: when there is no candidate or one is empty, the method is unknown, the context is no prompt, or
            what is scored is longer than the model's context.
    """
    if isinstance(candidates, str) or not candidates:
        raise IlladaError('candidates must be a list of texts, as ["Paris", "Rome"]')
    if method not in get_args(Method):
        raise IlladaError(f"method is confidence, likelihood or path, not {method!r}")
    item = Item(context, list(candidates))
    return score_candidates(model, tokenizer, [item], method, samples, seed, chat=False, settings=settings)[0]


def right_choices(items: Sequence[Item], scores: Sequence[Sequence[float]]) -> list[bool]:
    """Return for each item whether its right candidate has the highest score, the first of equal ones."""
    return [values.index(max(values)) == item.answer for item, values in zip(items, scores, strict=True)]


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
        if chat or not isinstance(item.context, str):
            question = [{"role": "user", "content": item.context}] if isinstance(item.context, str) else item.context
            prompt = encode_any(question, tokenizer, "the context")
            pairs += [(prompt, list(tokenizer.encode(c, add_special_tokens=False))) for c in item.candidates]
            right = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
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
