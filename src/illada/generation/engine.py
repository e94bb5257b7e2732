"""Generation of many requests at once: who takes part in a pass, steps and blocks, where an answer ends (spec §5)."""

from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from illada.errors import IlladaError
from illada.generation.denoise import denoise
from illada.generation.request import Proposals, Request
from illada.generation.settings import GenerationSettings
from illada.model import IlladaForMaskedLM, PagePool

MAX_BATCH_TOKENS = 2048
"""Most positions of one forward pass unless told otherwise."""


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
    """Forward passes this row took part in; guidance counts two a step, speculation one for all it computes at once."""
    log_probs: list[float] = field(compare=False)
    """Natural log of the confidence at which each id was committed: its softmax probability, over the full vocabulary,
    under the (guided, penalised, boosted) logits of the step that committed it, whatever temperature, top_k and top_p
    did to the draw. Each is conditioned on what was visible at its own step, and ids committed in one step not on each
    other, so their sum is no likelihood of the answer: see `illada.scoring` for those. Of a causal model it is."""
    text: str | None = None
    """Decoded answer, special tokens included, cut before the stop string; None without a tokenizer."""
    positions: int = field(default=0, compare=False)
    """Positions that the passes computed for this row, drafts included; those a cache gave are not among them."""


@dataclass(frozen=True)
class StepEvent:
    """An answer as it stands after one step."""

    row: int
    """Index of the request."""
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
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> list[Generation]:
    """Answer every prompt; each answer is the one the prompt would get alone.

    Rows of all lengths share packed forward passes, stand at any step of any block, and leave when they end. A causal
    model takes one token a pass, left to right.

    Args:
        model: the network; evaluated in inference mode, its training flag restored afterwards.
        prompts: token ids of each prompt; an empty one generates unconditionally (not from a causal model).
        settings: for all prompts, or one per prompt.
        tokenizer: needed for stop strings, the `</think>` boost and `Generation.text`.
        on_step: called once per row and step, after the commit.
        max_batch_tokens: most positions of one forward pass, see `Engine`.

    Returns:
        one `Generation` per prompt, in order.

    Raises:
        IlladaError: when a prompt does not fit the context or the vocabulary, when the budget is below one block, when
            settings need a tokenizer and none is given, or when they are about masks and the model is causal.
    """
    engine = Engine(model, tokenizer, on_step, max_batch_tokens)
    for prompt, one in zip(prompts, _settings_each(settings, len(prompts), "prompts"), strict=True):
        engine.submit(prompt, one)
    return engine.run()


def infill(
    model: IlladaForMaskedLM,
    templates: Sequence[Sequence[int | None]],
    settings: GenerationSettings | Sequence[GenerationSettings],
    tokenizer: Tokenizer | None = None,
    on_step: Callable[[StepEvent], None] | None = None,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> list[Generation]:
    """Fill the slots of every template; each is filled as it would be alone, by the same steps as `generate`.

    All slots of a template are open at once, and everything fixed, before and behind them, is seen from the start.

    Args:
        model: as in `generate`.
        templates: token ids, with None for each token to fill in.
        settings: as in `generate`; one token a pass unless steps_per_block (for all slots together), threshold or
            entropy_bound is given; guidance is against a template with all that is fixed masked (ours). How much to
            generate follows from the template, so max_new_tokens, block_length, eos_token_id and stop are not used.
        tokenizer: needed for `Generation.text`.
        on_step: as in `generate`; the answer of an event begins at the first slot.
        max_batch_tokens: as in `generate`.

    Returns:
        one `Generation` per template: ids and text are the whole of it, log_probs those of the slots in order.

    Raises:
        IlladaError: when a template has no slot or does not fit the context or the vocabulary, when the settings ask
            for a boost, which is defined for answers only, or when the model is causal.
    """
    engine = Engine(model, tokenizer, on_step, max_batch_tokens)
    for template, one in zip(templates, _settings_each(settings, len(templates), "templates"), strict=True):
        engine.submit_template(template, one)
    return engine.run()


class Engine:
    """Requests under way on one model; they may enter and be cancelled between any two passes.

    A pass takes the oldest requests first, as many as fit into `max_batch_tokens` positions, and others enter as soon
    as there is room. Under exact decoding, whose passes see whole sequences, few requests are under way at a time and
    each ends soon; with a cache, whose passes see a block or two, many fill the positions that are free.

    Args:
        model: the network.
        tokenizer: needed for stop strings, the `</think>` boost and `Generation.text`.
        on_step: called once per row and step, after the commit.
        max_batch_tokens: most positions of one forward pass, the second branch of guidance and drafts included; a
            single row may exceed it.
        max_logits: most logits held at once: the head runs over pieces of the vocabulary or of the positions.
        max_past_tokens: most positions whose keys and values are kept; a single row may exceed it.

    Raises:
        IlladaError: when a limit is below 1.
    """

    def __init__(
        self,
        model: IlladaForMaskedLM,
        tokenizer: Tokenizer | None = None,
        on_step: Callable[[StepEvent], None] | None = None,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        max_logits: int = 2**24,
        max_past_tokens: int = 2**16,
    ):
        limits = {"max_batch_tokens": max_batch_tokens, "max_logits": max_logits, "max_past_tokens": max_past_tokens}
        for name, limit in limits.items():
            if limit < 1:
                raise IlladaError(f"{name} must be at least 1, got {limit}")
        self.model, self.tokenizer, self.on_step = model, tokenizer, on_step
        self.max_batch_tokens, self.max_logits, self.max_past_tokens = max_batch_tokens, max_logits, max_past_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.submitted = 0
        self.pool = PagePool()

    def submit(self, prompt: Sequence[int], settings: GenerationSettings) -> int:
        """Add a prompt and return its index: 0, 1, 2, ...; errors as in `generate`."""
        return self.enter(self.request(prompt, settings, f"prompt {self.submitted}"))

    def submit_template(self, template: Sequence[int | None], settings: GenerationSettings) -> int:
        """Add a template and return its index; errors as in `infill`."""
        return self.enter(self.request_template(template, settings, f"template {self.submitted}"))

    def request(self, prompt: Sequence[int], settings: GenerationSettings, name: str = "the prompt") -> Request:
        """Check a prompt, called `name` in errors, and return what `enter` takes; safe to call from any thread."""
        return _start(self.model, name, prompt, settings, self.tokenizer)

    def request_template(
        self, template: Sequence[int | None], settings: GenerationSettings, name: str = "the template"
    ) -> Request:
        """Check a template, called `name` in errors, and return what `enter` takes; safe to call from any thread."""
        return _open(self.model, name, template, settings)

    def enter(self, row: Request) -> int:
        """Add a request that was checked before and return its index."""
        row.index = self.submitted
        self.waiting.append(row)
        self.submitted += 1
        return row.index

    def cancel(self, index: int) -> None:
        """Forget a request, if it is still under way."""
        self.waiting = deque(row for row in self.waiting if row.index != index)
        self._retire({index})

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""
        return bool(self.waiting or self.running)

    def run(self) -> list[Generation]:
        """Advance until every request has ended; return the answers in the order of their requests."""
        ended: dict[int, Generation] = {}
        while self.busy:
            ended |= self.step()
        return [ended[index] for index in sorted(ended)]

    @torch.inference_mode()
    def step(self) -> dict[int, Generation]:
        """Run one forward pass, if a request is under way; return by index the answers that it ended."""
        ended: dict[int, Generation] = {}
        if not self.busy:
            return ended
        was_training = self.model.training
        if was_training:
            self.model.eval()
        try:
            rows = self._next_pass()
            states = [state for row in rows for state in (row, *row.drafts)]
            proposals = iter(denoise(self.model, states, self.pool, self.max_logits))
            for row in rows:
                generation = self._advance(row, [next(proposals) for _ in (row, *row.drafts)])
                if generation is not None:
                    ended[row.index] = generation
        finally:
            if was_training:
                self.model.train()
        self._retire(ended)
        return ended

    def _retire(self, indices: Container[int]) -> None:
        for row in self.running:
            if row.index in indices:
                row.release()
        self.running = [row for row in self.running if row.index not in indices]

    def _next_pass(self) -> list[Request]:
        """Let requests in and return those of the next pass, with drafts where there is room for them."""
        held, kept = sum(row.size for row in self.running), sum(row.kept for row in self.running)
        while self.waiting:
            row = self.waiting[0]
            held, kept = held + row.size, kept + row.kept
            if self.running and (held > self.max_batch_tokens or (row.kept and kept > self.max_past_tokens)):
                break
            self.running.append(self.waiting.popleft())
        rows = self.running[:1]
        room = self.max_batch_tokens - rows[0].size
        for row in self.running[1:]:
            if row.size > room:
                break
            rows.append(row)
            room -= row.size
        for row in rows:
            room -= row.expect(room)
        return rows

    def _advance(self, row: Request, each: Sequence[Proposals]) -> Generation | None:
        """Commit a step, and one more for every draft that came true; return the answer when the row has ended."""
        states = (row, *row.drafts)
        row.forwards += row.passes
        row.positions += sum(state.size for state in states)
        generation = None
        for state, proposals in zip(states, each, strict=True):
            if state is not row and (generation is not None or not row.is_at(state)):
                break
            step = (row.block, row.block_end, row.block_step)
            if row.commit(proposals):
                generation = _ended(row, self.tokenizer)
                if generation is None:
                    row.open_next_block()
            if self.on_step is not None and row.watched:
                self.on_step(_event(row, *step, generation is not None))
        return generation


def _settings_each(
    settings: GenerationSettings | Sequence[GenerationSettings], count: int, what: str
) -> list[GenerationSettings]:
    each = [settings] * count if isinstance(settings, GenerationSettings) else list(settings)
    if len(each) != count:
        raise IlladaError(f"{count} {what} but {len(each)} settings: give one for all or one for each")
    return each


def _start(
    model: IlladaForMaskedLM,
    name: str,
    prompt: Sequence[int],
    settings: GenerationSettings,
    tokenizer: Tokenizer | None,
) -> Request:
    """Check one request and mask its answer."""
    prompt_P = _checked_ids(model, name, prompt)
    causal = model.config.causal
    if causal:
        settings = settings.left_to_right()
        if not prompt_P.size:
            raise IlladaError(f"{name} is empty: a causal model goes on from a token, so begin with BOS")
    context = model.config.max_position_embeddings
    block = settings.block_length
    room = min(settings.max_new_tokens, context - len(prompt_P))
    if room < block:
        raise IlladaError(
            f"{name}: budget below one block: max_new_tokens {settings.max_new_tokens} and context {context} - "
            f"prompt {len(prompt_P)} leave {room} tokens for block_length {block}: "
            "lower block_length or shorten the prompt"
        )
    for needing in ("stop", "think_boost"):
        if getattr(settings, needing) and tokenizer is None:
            raise IlladaError(f"{needing} needs a tokenizer: give one to generate")
    think: tuple[int, ...] = ()
    if settings.think_boost and tokenizer is not None:
        think = tuple(tokenizer.encode("</think>", add_special_tokens=False))
    return Request(prompt_P, room // block * block, settings, think, causal=causal)


def _open(model: IlladaForMaskedLM, name: str, template: Sequence[int | None], settings: GenerationSettings) -> Request:
    """Check one template and mask its slots; what lies before the first is the prompt, the rest one block."""
    model.config.refuse_causal("infilling is", "it can only go on from a prompt")
    if settings.think_boost:
        raise IlladaError("think_boost cannot be used to fill slots: leave it out")
    slot_L = np.array([token is None for token in template], dtype=np.bool_)
    if not slot_L.any():
        raise IlladaError(f"{name} has no slot to fill: put None where a token is wanted")
    ids_L = _checked_ids(model, name, [0 if token is None else token for token in template])
    first = int(slot_L.argmax())
    budget = len(ids_L) - first
    whole = replace(
        settings,
        max_new_tokens=budget,
        block_length=budget,
        steps_per_block=settings.steps_per_block and min(settings.steps_per_block, budget),
        eos_token_id=None,
        stop=(),
        later_masks=False,
    )
    row = Request(ids_L[:first], budget, whole, template=True)
    row.ids_G[:] = ids_L[first:]
    row.masked_G[:] = row.slot_G[:] = slot_L[first:]
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


def _ended(row: Request, tokenizer: Tokenizer | None) -> Generation | None:
    """Return the answer if the block that has just been finished ends it."""
    if (stopped := _cut(row, tokenizer)) is not None or row.block_end < row.budget:
        return stopped
    ids: list[int] = [*(row.prompt_P.tolist() if row.template else ()), *row.ids_G.tolist()]
    return _generation(row, ids, "length", None if tokenizer is None else tokenizer.decode(ids))


def _cut(row: Request, tokenizer: Tokenizer | None) -> Generation | None:
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


def _generation(row: Request, ids: list[int], reason: Literal["stop", "length"], text: str | None) -> Generation:
    log_probs = row.log_prob_G[row.slot_G] if row.template else row.log_prob_G[: len(ids)]
    return Generation(ids, reason, row.forwards, log_probs.tolist(), text, row.positions)


def _event(row: Request, block: int, block_end: int, step: int, done: bool) -> StepEvent:
    return StepEvent(
        row.index,
        block,
        step,
        row.ids_G[:block_end].tolist(),
        (~row.masked_G[:block_end]).tolist(),
        np.exp(row.log_prob_G[:block_end]).tolist(),
        done,
    )
