"""What is compared: our engine under every mode and rule, the paper's loop written plainly, and outside samplers.

Shape letters: P prompt tokens · G answer budget · B block length · L tokens in view · V vocabulary.
"""

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from illada.errors import IlladaError, first_line
from illada.generation import GenerationSettings, generate
from illada.model import IlladaForMaskedLM

EXACT = "1 token"
PLAIN = "plain loop"

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Sampler:
    """One row of the table: a name, and a function from prompts to the ids of their answers, cut before the end."""

    name: str
    answer: Callable[[Prompts], list[list[int]]]
    settings: GenerationSettings | None = None
    """Of our engine; None for another sampler."""


def rules(block: int, budget: int) -> dict[str, dict[str, Any]]:
    """Return what each rule changes in the settings of exact decoding; a new variant is one more line."""
    return {
        EXACT: {},
        **{f"{k} tokens": {"steps_per_block": -(-block // k)} for k in (2, 4, 8) if k <= block},
        **{f"threshold {p}": {"threshold": p} for p in (0.99, 0.95, 0.9)},
        **{f"entropy {nats}": {"entropy_bound": nats} for nats in (0.05, 0.2, 0.5)},
        "one block": {"block_length": budget},
        "later masks": {"later_masks": True},
    }


def modes() -> dict[str, dict[str, Any]]:
    """Return what each mode changes in the settings: every cache that they accept, none first."""
    caches = sorted(get_args(get_type_hints(GenerationSettings)["cache"]), key=lambda cache: cache != "none")
    return {"" if cache == "none" else f" ({cache} cache)": {"cache": cache} for cache in caches}


def engine_samplers(
    model: IlladaForMaskedLM, exact: GenerationSettings, batch: int
) -> tuple[list[Sampler], dict[str, str]]:
    """Return our engine under every mode and rule, and by name why the settings refuse the others."""
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
    def answer(prompts: Prompts) -> list[list[int]]:
        groups = [prompts[first : first + batch] for first in range(0, len(prompts), batch)]
        return [answer.ids for group in groups for answer in generate(model, group, settings)]

    return Sampler(name, answer, settings)


def plain_sampler(model: IlladaForMaskedLM, exact: GenerationSettings) -> Sampler:
    """Return the paper's variable-length decoding as its text describes it (spec §5): one request at a time.

    Every step computes the logits and the softmax of all positions in view, prompt included, and commits one token.
    """
    block, budget = exact.block_length, exact.max_new_tokens

    @torch.inference_mode()
    def answer_one(prompt: Sequence[int]) -> list[int]:
        mask_id = model.config.mask_token_id
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
        return cut(ids_L[len(prompt) :].tolist(), exact.eos_ids)

    return Sampler(PLAIN, lambda prompts: [answer_one(prompt) for prompt in prompts])


def outside_sampler(path: str, model: IlladaForMaskedLM, exact: GenerationSettings) -> Sampler:
    """Return the sampler in a Python file of the user's, which is run: one request at a time, one token a forward.

    The file defines `generate(model, prompt [1, P], steps=, gen_length=, block_length=, ...)`, as LLaDA's authors'
    does, and returns ids [1, P + G], alone or first in a tuple. It gets the same model object, whose call with
    `(x, attention_mask=...)` has `.logits` [1, L, V], and those of the named arguments that it accepts.

    Raises:
        IlladaError: when there is no such file or function, or it fails.
    """
    file = Path(path)
    spec = importlib.util.spec_from_file_location(f"outside_{file.stem}", file) if file.is_file() else None
    if spec is None or spec.loader is None:
        raise IlladaError(f"no Python file {path}: --outside takes a file that defines generate(model, prompt, ...)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise IlladaError(f"{path} cannot be run: {first_line(error)}") from error
    function = getattr(module, "generate", None)
    if not callable(function):
        raise IlladaError(f"{path} defines no function generate(model, prompt, ...)")
    wanted = {
        "steps": exact.max_new_tokens,
        "gen_length": exact.max_new_tokens,
        "block_length": exact.block_length,
        "temperature": 0.0,
        "cfg_scale": 0.0,
        "remasking": "low_confidence",
        "mask_id": model.config.mask_token_id,
    }
    parameters = inspect.signature(function).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        wanted = {name: value for name, value in wanted.items() if name in parameters}

    @torch.inference_mode()
    def answer_one(prompt: Sequence[int]) -> list[int]:
        try:
            out = function(model, torch.tensor([prompt], dtype=torch.long, device=model.device), **wanted)
            ids: list[int] = (out[0] if isinstance(out, tuple) else out)[0, len(prompt) :].tolist()
        except Exception as error:
            raise IlladaError(f"generate of {path} failed: {first_line(error)}") from error
        return cut(ids, exact.eos_ids)

    return Sampler(f"outside {file.name}", lambda prompts: [answer_one(prompt) for prompt in prompts])


def cut(ids: list[int], eos_ids: Sequence[int]) -> list[int]:
    """Return the ids before the first end-of-sequence id."""
    return next((ids[:i] for i, token in enumerate(ids) if token in eos_ids), ids)
