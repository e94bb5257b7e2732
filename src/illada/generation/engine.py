"""Generation of many requests at once: rows, the loop over steps and blocks, and where an answer ends (spec §5)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from illada.errors import IlladaError
from illada.generation.settings import GenerationSettings
from illada.generation.step import Row, denoise
from illada.generation.unmask import positions_to_commit
from illada.model import IlladaForMaskedLM


class Tokenizer(Protocol):
    """What generation asks of a tokenizer; those of transformers fit."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of a text."""
        ...

    def decode(self, ids: list[int], /) -> str:
        """Return the text of ids, special tokens included."""
        ...


@dataclass(frozen=True)
class Generation:
    """One answer."""

    ids: list[int]
    """Generated ids, cut before the first end-of-sequence id or stop string."""
    finish_reason: Literal["stop", "length"]
    forwards: int
    """Forward passes this row took part in; guidance counts two a step."""
    log_probs: list[float] = field(compare=False)
    """Natural log of the confidence at which each id was committed: its softmax probability, over the full vocabulary,
    under the (guided, penalised, boosted) logits of the step that committed it, whatever temperature, top_k and top_p
    did to the draw. Each is conditioned on what was visible at its own step, and ids committed in one step not on each
    other, so their sum is no likelihood of the answer: see `illada.scoring` for those."""
    text: str | None = None
    """Decoded answer, special tokens included, cut before the stop string; None without a tokenizer."""
    positions: int = field(default=0, compare=False)
    """Positions that the passes computed for this row; those a cache gave are not among them."""


@dataclass(frozen=True)
class StepEvent:
    """An answer as it stands after one step."""

    row: int
    """Index of the prompt."""
    block: int
    """Where in the answer the active block begins."""
    step: int
    """Step within the block, from 0."""
    ids: list[int]
    """The answer up to the end of the active block: committed ids, or the present proposal where still masked."""
    committed: list[bool]
    confidence: list[float]
    """Probability of each id when it was last proposed."""
    done: bool
    """Whether the row has ended; its `Generation` may be shorter than `ids`."""


def generate(
    model: IlladaForMaskedLM,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings | Sequence[GenerationSettings],
    tokenizer: Tokenizer | None = None,
    on_step: Callable[[StepEvent], None] | None = None,
    max_batch_tokens: int = 16_384,
) -> list[Generation]:
    """Answer every prompt; each answer is the one the prompt would get alone.

    Rows of all lengths share packed forward passes, stand at any step of any block, and leave when they end.

    Args:
        model: the network; evaluated in inference mode, its training flag restored afterwards.
        prompts: token ids of each prompt; an empty one generates unconditionally.
        settings: for all prompts, or one per prompt.
        tokenizer: needed for stop strings, the `</think>` boost and `Generation.text`.
        on_step: called once per row and step, after the commit.
        max_batch_tokens: most positions of one forward pass, the second branch of guidance included; a single row may
            exceed it.

    Returns:
        one `Generation` per prompt, in order.

    Raises:
        IlladaError: when a prompt does not fit the context or the vocabulary, when the budget is below one block, or
            when settings need a tokenizer and none is given.
    """
    each = _settings_each(settings, len(prompts), "prompts")
    rows = [_start(model, i, *pair, tokenizer) for i, pair in enumerate(zip(prompts, each, strict=True))]
    return _decode(model, rows, tokenizer, on_step, max_batch_tokens)


def infill(
    model: IlladaForMaskedLM,
    templates: Sequence[Sequence[int | None]],
    settings: GenerationSettings | Sequence[GenerationSettings],
    tokenizer: Tokenizer | None = None,
    on_step: Callable[[StepEvent], None] | None = None,
    max_batch_tokens: int = 16_384,
) -> list[Generation]:
    """Fill the slots of every template; each is filled as it would be alone, by the same steps as `generate`.

    All slots of a template are open at once, and everything fixed, before and behind them, is seen from the start.

    Args:
        model: as in `generate`.
        templates: token ids, with None for each token to fill in.
        settings: as in `generate`; one token a pass unless threshold or entropy_bound is given. How much to generate
            follows from the template, so max_new_tokens, block_length, eos_token_id and stop are not used.
        tokenizer: needed for `Generation.text`.
        on_step: as in `generate`; the answer of an event begins at the first slot.
        max_batch_tokens: as in `generate`.

    Returns:
        one `Generation` per template: ids and text are the whole of it, log_probs those of the slots in order.

    Raises:
        IlladaError: when a template has no slot or does not fit the context or the vocabulary, or when the settings ask
            for steps_per_block, guidance or a boost, which are defined for answers only.
    """
    each = _settings_each(settings, len(templates), "templates")
    rows = [_open(model, i, *pair) for i, pair in enumerate(zip(templates, each, strict=True))]
    slots = [np.flatnonzero(row.masked_G) for row in rows]
    filled = []
    for row, slots_M, answer in zip(rows, slots, _decode(model, rows, None, on_step, max_batch_tokens), strict=True):
        ids = [*row.prompt_P.tolist(), *answer.ids]
        log_probs = row.log_prob_G[slots_M].tolist()
        text = None if tokenizer is None else tokenizer.decode(ids)
        filled.append(Generation(ids, "length", answer.forwards, log_probs, text, answer.positions))
    return filled


def _settings_each(
    settings: GenerationSettings | Sequence[GenerationSettings], count: int, what: str
) -> list[GenerationSettings]:
    each = [settings] * count if isinstance(settings, GenerationSettings) else list(settings)
    if len(each) != count:
        raise IlladaError(f"{count} {what} but {len(each)} settings: give one for all or one for each")
    return each


def _decode(
    model: IlladaForMaskedLM,
    rows: Sequence[Row],
    tokenizer: Tokenizer | None,
    on_step: Callable[[StepEvent], None] | None,
    max_batch_tokens: int,
) -> list[Generation]:
    """Advance all rows until each has ended; return their answers in order."""
    if max_batch_tokens < 1:
        raise IlladaError(f"max_batch_tokens must be at least 1, got {max_batch_tokens}")
    ended: dict[int, Generation] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            while active := [row for row in rows if row.index not in ended]:
                for group in _groups(active, max_batch_tokens):
                    for row, proposed in zip(group, denoise(model, group), strict=True):
                        step = (row.block, row.block_end, row.block_step)
                        generation = _advance(row, *proposed, tokenizer)
                        if generation is not None:
                            ended[row.index] = generation
                            row.past = None
                        if on_step is not None:
                            on_step(_event(row, *step, generation is not None))
    finally:
        model.train(was_training)
    return [ended[i] for i in range(len(rows))]


def _start(
    model: IlladaForMaskedLM,
    index: int,
    prompt: Sequence[int],
    settings: GenerationSettings,
    tokenizer: Tokenizer | None,
) -> Row:
    """Check one request and mask its answer."""
    prompt_P = _checked_ids(model, f"prompt {index}", prompt)
    context = model.config.max_position_embeddings
    block = settings.block_length
    room = min(settings.max_new_tokens, context - len(prompt_P))
    if room < block:
        raise IlladaError(
            f"prompt {index}: budget below one block: max_new_tokens {settings.max_new_tokens} and context {context} - "
            f"prompt {len(prompt_P)} leave {room} tokens for block_length {block}: "
            "lower block_length or shorten the prompt"
        )
    for name in ("stop", "think_boost"):
        if getattr(settings, name) and tokenizer is None:
            raise IlladaError(f"{name} needs a tokenizer: give one to generate")
    think: tuple[int, ...] = ()
    if settings.think_boost and tokenizer is not None:
        think = tuple(tokenizer.encode("</think>", add_special_tokens=False))
    return Row(index, prompt_P, room // block * block, settings, think)


def _open(model: IlladaForMaskedLM, index: int, template: Sequence[int | None], settings: GenerationSettings) -> Row:
    """Check one template and mask its slots; what lies before the first is the prompt, the rest one block."""
    name = f"template {index}"
    for setting in ("steps_per_block", "guidance_scale", "think_boost"):
        if getattr(settings, setting):
            raise IlladaError(f"{setting} cannot be used to fill slots: leave it out")
    slot_L = np.array([token is None for token in template], dtype=np.bool_)
    if not slot_L.any():
        raise IlladaError(f"{name} has no slot to fill: put None where a token is wanted")
    ids_L = _checked_ids(model, name, [0 if token is None else token for token in template])
    first = int(slot_L.argmax())
    budget = len(ids_L) - first
    whole = replace(settings, max_new_tokens=budget, block_length=budget, eos_token_id=None, stop=(), later_masks=False)
    row = Row(index, ids_L[:first], budget, whole)
    row.ids_G[:] = ids_L[first:]
    row.masked_G[:] = slot_L[first:]
    return row


def _checked_ids(model: IlladaForMaskedLM, name: str, ids: Sequence[int]) -> NDArray[np.int64]:
    config = model.config
    if not isinstance(ids, Iterable) or not all(isinstance(i, Integral) for i in ids):
        raise IlladaError(f"{name} is not a list of token ids: give one list of integers per prompt")
    ids_L = np.array(ids, dtype=np.int64)
    if ids_L.size and not 0 <= ids_L.min() <= ids_L.max() < config.vocab_size:
        raise IlladaError(f"{name} holds ids outside the vocabulary of {config.vocab_size}: check the tokenizer")
    context = config.max_position_embeddings
    if len(ids_L) > context:
        raise IlladaError(f"{name} has {len(ids_L)} tokens but the context is {context}: shorten it")
    return ids_L


def _groups(rows: Sequence[Row], max_batch_tokens: int) -> Iterator[list[Row]]:
    """Divide rows into forward passes, by length, so that equal lengths share attention calls."""
    group: list[Row] = []
    held = 0
    for row in sorted(rows, key=lambda row: row.size):
        if group and held + row.size > max_batch_tokens:
            yield group
            group, held = [], 0
        group.append(row)
        held += row.size
    if group:
        yield group


def _advance(
    row: Row,
    position_M: NDArray[np.int64],
    proposal_M: NDArray[np.int64],
    log_prob_M: NDArray[np.float32],
    score_M: NDArray[np.float32],
    tokenizer: Tokenizer | None,
) -> Generation | None:
    """Commit one step; return the answer when the row has ended."""
    row.ids_G[position_M] = proposal_M
    row.log_prob_G[position_M] = log_prob_M
    chosen_K = positions_to_commit(row.settings, score_M, position_M, row.block_step, row.answer_step)
    row.masked_G[position_M[chosen_K]] = False
    row.forwards += row.passes
    row.positions += row.size
    row.answer_step += 1
    row.block_step += 1
    if row.masked_G[row.block : row.block_end].any():
        return None
    stopped = _cut(row, tokenizer)
    if stopped is not None:
        return stopped
    if row.block_end == row.budget:
        ids = row.ids_G.tolist()
        return _generation(row, ids, "length", None if tokenizer is None else tokenizer.decode(ids))
    row.block, row.block_step = row.block_end, 0
    return None


def _cut(row: Row, tokenizer: Tokenizer | None) -> Generation | None:
    """Return the answer cut before the first end-of-sequence id or stop string, or None when there is neither."""
    ids: list[int] = row.ids_G[: row.block_end].tolist()
    # Earlier blocks were looked at when they ended.
    ends = [i for i in range(row.block, row.block_end) if ids[i] in row.settings.eos_ids]
    if ends:
        ids = ids[: ends[0]]
    if tokenizer is None:
        return _generation(row, ids, "stop", None) if ends else None
    if not ends and not row.settings.stop:
        return None
    text = tokenizer.decode(ids)
    cuts = [at for at in (text.find(stop) for stop in row.settings.stop) if at >= 0]
    if cuts:
        text = text[: min(cuts)]
        # A stop string may begin inside a token, which is then left out of the ids but not out of the text.
        ids = next((ids[:n] for n in range(len(ids), 0, -1) if text.startswith(tokenizer.decode(ids[:n]))), [])
    return _generation(row, ids, "stop", text) if ends or cuts else None


def _generation(row: Row, ids: list[int], reason: Literal["stop", "length"], text: str | None) -> Generation:
    return Generation(ids, reason, row.forwards, row.log_prob_G[: len(ids)].tolist(), text, row.positions)


def _event(row: Row, block: int, block_end: int, step: int, done: bool) -> StepEvent:
    return StepEvent(
        row.index,
        block,
        step,
        row.ids_G[:block_end].tolist(),
        (~row.masked_G[:block_end]).tolist(),
        np.exp(row.log_prob_G[:block_end]).tolist(),
        done,
    )
