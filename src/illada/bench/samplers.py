"""The samplers to compare: our engine under every mode and rule, and the paper's loop written plainly.

Shape letters: L tokens in view · V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple, get_args, get_type_hints

import torch

from illada.errors import IlladaError
from illada.generation.engine import generate
from illada.generation.settings import GenerationSettings
from illada.model.transformer import IlladaForMaskedLM

EXACT = "1 token"
PLAIN = "plain loop"
THRESHOLDS = (0.99, 0.95, 0.9)

Prompts = Sequence[Sequence[int]]


class Answer(NamedTuple):
    """A sampler's answer to one prompt."""

    ids: list[int]
    """Ids before the first end-of-sequence id."""
    forwards: int
    """Forward passes that the answer took part in."""


@dataclass(frozen=True)
class Sampler:
    """One row of the table: a name, and a function from prompts to their answers."""

    name: str
    answer: Callable[[Prompts], list[Answer]]
    threshold: float | None = None
    """Probability from which on the sampler commits tokens, if that is its rule."""
    settings: GenerationSettings | None = None
    """Settings of our engine; None for another sampler."""


def rules(block: int, budget: int) -> dict[str, dict[str, Any]]:
    """Return the changes that each rule makes to the settings of exact decoding; a new variant is one more line."""
    return {
        EXACT: {},
        **{f"{k} tokens": {"steps_per_block": -(-block // k)} for k in (2, 4, 8) if k <= block},
        **{f"threshold {p}": {"threshold": p} for p in THRESHOLDS},
        **{f"entropy {nats}": {"entropy_bound": nats} for nats in (0.05, 0.2, 0.5)},
        **{
            f"margin, {k} tokens": {"steps_per_block": -(-block // k), "remasking": "margin"}
            for k in (2, 4)
            if k <= block
        },
        **{f"speculate {k}": {"speculate": k} for k in (2, 4)},
        "threshold 0.9, speculate 2": {"threshold": 0.9, "speculate": 2},
        "one block": {"block_length": budget},
        "later masks": {"later_masks": True},
        **{f"later masks, threshold {p}": {"later_masks": True, "threshold": p} for p in THRESHOLDS},
    }


def modes() -> dict[str, dict[str, Any]]:
    """Return the changes that each mode makes to the settings, one mode for every cache that they accept."""
    caches = sorted(get_args(get_type_hints(GenerationSettings)["cache"]))
    return {"": {}, **{f" ({cache} cache)": {"cache": cache} for cache in caches if cache != "none"}}


def engine_samplers(
    model: IlladaForMaskedLM, exact: GenerationSettings, batch: int
) -> tuple[list[Sampler], dict[str, str]]:
    """Return our engine under every mode and rule, and by name the reasons why the settings refuse the others."""
    samplers, refused = [], {}
    for mode, of_mode in modes().items():
        for rule, of_rule in rules(exact.block_length, exact.max_new_tokens).items():
            try:
                settings = replace(exact, **of_mode, **of_rule)
            except IlladaError as error:
                refused[rule + mode] = str(error)
            else:
                samplers.append(_engine_sampler(rule + mode, model, settings, batch))
    return samplers, refused


def _engine_sampler(name: str, model: IlladaForMaskedLM, settings: GenerationSettings, batch: int) -> Sampler:
    def answer(prompts: Prompts) -> list[Answer]:
        groups = [prompts[first : first + batch] for first in range(0, len(prompts), batch)]
        return [Answer(row.ids, row.forwards) for group in groups for row in generate(model, group, settings)]

    return Sampler(name, answer, settings.threshold, settings)


def steps_of_rule(model: IlladaForMaskedLM, prompts: Prompts, settings: GenerationSettings) -> int:
    """Return how many steps commit something when every prompt is answered alone, as the rule itself implies."""
    committed = [0]
    for prompt in prompts:
        generate(model, [prompt], settings, on_step=lambda event: committed.append(sum(event.committed)))
        committed.append(0)
    return sum(later > earlier for earlier, later in pairwise(committed))


def plain_sampler(model: IlladaForMaskedLM, exact: GenerationSettings) -> Sampler:
    """Return the paper's variable-length decoding as its text describes it (spec §5): one request at a time.

    Every step computes the logits and the softmax of all positions in view, prompt included, and commits one token.
    """
    block, budget = exact.block_length, exact.max_new_tokens

    @torch.inference_mode()
    def answer_one(prompt: Sequence[int]) -> Answer:
        mask_id = model.config.mask_id
        ids_L = torch.tensor(prompt, dtype=torch.long, device=model.device)
        masked_L = torch.zeros_like(ids_L, dtype=torch.bool)
        for _ in range(0, budget, block):
            ids_L = torch.cat((ids_L, ids_L.new_full((block,), mask_id)))
            masked_L = torch.cat((masked_L, masked_L.new_ones(block)))
            for _ in range(block):
                logits_LV = model(ids_L[None]).logits[0]
                probability_LV = logits_LV.softmax(-1)
                logits_LV[:, mask_id] = -torch.inf  # as the engine does: MASK is never proposed
                proposal_L = logits_LV.argmax(-1)
                confidence_L = probability_LV.gather(-1, proposal_L[:, None])[:, 0]
                best = confidence_L.where(masked_L, -torch.inf).argmax()
                ids_L[best] = proposal_L[best]
                masked_L[best] = False
            if any(token in exact.eos_ids for token in ids_L[-block:].tolist()):
                break
        # A forward commits one token, so there are as many forwards as tokens before the cut.
        return Answer(cut(ids_L[len(prompt) :].tolist(), exact.eos_ids), len(ids_L) - len(prompt))

    return Sampler(PLAIN, lambda prompts: [answer_one(prompt) for prompt in prompts])


def cut(ids: list[int], eos_ids: Sequence[int]) -> list[int]:
    """Return the ids before the first end-of-sequence id."""
    return next((ids[:i] for i, token in enumerate(ids) if token in eos_ids), ids)
