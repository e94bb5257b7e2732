"""Which of several candidates a model believes, given as texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from illada.model import IlladaForMaskedLM
from illada.scoring.confidence import confidence_scores
from illada.scoring.layout import Pair, score_layout
from illada.scoring.likelihood import likelihood_scores
from illada.text.chat import encode_prompt


@dataclass(frozen=True)
class Item:
    """A context and its candidates; `answer` is the index of the right one, if it is known."""

    context: str
    candidates: list[str]
    answer: int | None = None


def score_candidates(
    model: IlladaForMaskedLM, tokenizer: Any, items: Sequence[Item], method: str, samples: int, seed: int, chat: bool
) -> list[list[float]]:
    """Return each item's scores, one per candidate, in nats; all candidates of all items advance together.

    In the chat layout the candidate answers a user's question; otherwise it continues the context (spec §6). One EOS
    follows it in both.
    """
    pairs: list[Pair] = []
    right: Sequence[int] = ()
    for item in items:
        if chat:
            prompt = encode_prompt(tokenizer, [{"role": "user", "content": item.context}])
            pairs += [(prompt, list(tokenizer.encode(c, add_special_tokens=False))) for c in item.candidates]
            right = (tokenizer.eos_token_id,)
        else:
            of_item, right = score_layout(tokenizer, item.context, item.candidates)
            pairs += of_item
    if method == "confidence":
        scores = confidence_scores(model, pairs, right_context=right)
    else:
        scores = likelihood_scores(model, pairs, samples=samples, seed=seed, right_context=right)
    flat = iter(scores)
    return [[next(flat) for _ in item.candidates] for item in items]
