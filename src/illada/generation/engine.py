"""Generation of many requests at once: who takes part in a pass, steps and blocks, where an answer ends (spec §5)."""

from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from illada.errors import IlladaError
from illada.generation.denoise import denoise
from illada.generation.optional.drafts import draft_ahead, has_come_true
from illada.generation.optional.forms import give_form
from illada.generation.request import Proposals, Request
from illada.generation.settings import GenerationSettings, settings_for
from illada.model.kv_cache import PagePool
from illada.model.transformer import IlladaForMaskedLM, evaluating
from illada.text.chat import Prompt, encode_any, encoded_ids, is_encoding
from illada.text.prompts import show_ids

MAX_BATCH_TOKENS = 2048
"""Most positions of one forward pass, by default."""


@dataclass(frozen=True)
class Generation:
    """One answer."""

    ids: list[int]
    """Generated ids, cut before the first end-of-sequence id or stop string."""
    finish_reason: Literal["stop", "length"]
    forwards: int
    """Forward passes that the request took part in. Guidance counts two a step; speculation counts one for a request
    and its drafts."""
    log_probs: list[float] = field(compare=False)
    """Natural log of the confidence at which each id was committed: its softmax probability, over the full vocabulary,
    under the (guided, penalised, boosted) logits of the step that committed it, whatever temperature, top_k and top_p
    did to the draw. Each is conditioned on what was visible at its own step, and ids committed in one step are not
    conditioned on each other, so their sum is no likelihood of the answer: `illada.scoring` has likelihoods. For a
    causal model it is the log-likelihood, MASK's probability (next to none) included, which scores leave out."""
    text: str | None = None
    """The decoded ids without special tokens, cut before the stop string; None without a tokenizer."""
    positions: int = field(default=0, compare=False)
    """Positions that the passes computed for the request and its drafts; what came from a cache does not count."""
    forced: int = field(default=0, compare=False)
    """Tokens that the answer's form left no choice, decided without a pass."""


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
    """The answer so far, in whole blocks: committed ids, or the present proposal where still masked."""
    committed: list[bool]
    confidence: list[float]
    """Probability of each id when it was last proposed."""
    done: bool
    """Whether the answer is complete; its `Generation` may be shorter than `ids`."""
    forced: list[bool] = field(default_factory=list)
    """Which ids the answer's form left no choice, so that they were committed without a pass."""


def generate(
    model: IlladaForMaskedLM,
    prompts: Sequence[Prompt] | Mapping[str, Any],
    settings: GenerationSettings | Sequence[GenerationSettings] | None = None,
    tokenizer: Any | None = None,
    on_step: Callable[[StepEvent], None] | None = None,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> list[Generation]:
    """Answer every prompt; each answer is the one that its prompt would get alone.

    Requests of all lengths share packed forward passes, stand at any step of any block, and leave when they end. A
    causal model takes one token a pass, left to right.

    Args:
        model: the network; evaluated in inference mode, its training flag restored afterwards.
        prompts: any mixture of texts, which the model continues, chats (lists of messages with role and content),
            which it answers in the tokenizer's chat template, and token ids, which are taken as they are: lists, or
            what the tokenizer or its `apply_chat_template` returns (also for several at once, in place of the list).
            An empty list of ids generates unconditionally (not from a causal model).
        settings: for all prompts, or one per prompt; taken as they are, `eos_token_id` included (`settings_for` puts
            the model's in). Without any, the defaults with the model's own end-of-sequence ids.
        tokenizer: one of transformers; needed for texts and chats, stop strings, the `</think>` boost and
            `Generation.text`.
        on_step: called once per request and step, after the commit.
        max_batch_tokens: most positions of one forward pass, see `Engine`.

    Returns:
        one `Generation` per prompt, in order.

    Raises:
        IlladaError: when prompts are not a list, when a prompt does not fit the context or the vocabulary, when the
            budget is below one block, when prompts or settings need a tokenizer and none is given, or when settings are
            about masks and the model is causal.
    """
    if is_encoding(prompts):
        prompts = encoded_ids(prompts)
    if isinstance(prompts, str) or any(isinstance(prompt, Mapping) and "role" in prompt for prompt in prompts):
        raise IlladaError("give a list of prompts, even for one: each is a text, a list of messages or a list of ids")
    engine = Engine(model, tokenizer, on_step, max_batch_tokens)
    for i, (prompt, own) in enumerate(_with_settings(model, prompts, settings, "prompts")):
        engine.submit(encode_any(prompt, tokenizer, f"prompt {i}"), own)
    return engine.run()


def infill(
    model: IlladaForMaskedLM,
    templates: Sequence[Sequence[int | None]],
    settings: GenerationSettings | Sequence[GenerationSettings] | None = None,
    tokenizer: Any | None = None,
    on_step: Callable[[StepEvent], None] | None = None,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> list[Generation]:
    """Fill the slots of every template; each is filled as it would be alone, by the same steps as in `generate`.

    All slots of a template are open at once, and the fixed ids before and behind them are seen from the start.

    Args:
        model: as in `generate`.
        templates: token ids, with None for each token to fill in.
        settings: for all templates, or one per template. One token a pass unless steps_per_block (for all slots
            together), threshold or entropy_bound is given; guidance is against a template with all fixed ids masked
            (ours). The template says how much to generate: max_new_tokens, block_length, eos_token_id and stop are
            not used.
        tokenizer: needed for `Generation.text`.
        on_step: as in `generate`; the answer of an event begins at the first slot.
        max_batch_tokens: as in `generate`.

    Returns:
        one `Generation` per template: ids and text are the whole template, log_probs belong to the slots in order.

    Raises:
        IlladaError: when a template has no slot or does not fit the context or the vocabulary, when the settings ask
            for a boost, which is defined for answers only, or when the model is causal.
    """
    engine = Engine(model, tokenizer, on_step, max_batch_tokens)
    for template, own in _with_settings(model, templates, settings, "templates"):
        engine.enter(engine.template(template, own, f"template {engine.submitted}"))
    return engine.run()


class Engine:
    """Requests under way on one model; they may enter and be cancelled between any two passes.

    A pass takes the oldest requests first, as many as fit into `max_batch_tokens` positions, and others enter as soon
    as there is room. Under exact decoding, whose passes see whole sequences, few requests are under way at a time and
    each ends soon; with a cache, whose passes see a block or two, many fill the positions that are free.

    Args:
        model: the network.
        tokenizer: needed for stop strings, the `</think>` boost and `Generation.text`.
        on_step: called once per request and step, after the commit.
        max_batch_tokens: most positions of one forward pass, the second branch of guidance and drafts included; a
            single request may exceed it.
        max_logits: most logits held at once: the head runs over pieces of the vocabulary or of the positions.
        max_past_tokens: most positions whose keys and values are kept; a single request may exceed it.
        keep_special_tokens: leave special tokens in `Generation.text`, but not the one that ended the answer.

    Raises:
        IlladaError: when a limit is below 1.
    """

    def __init__(
        self,
        model: IlladaForMaskedLM,
        tokenizer: Any | None = None,
        on_step: Callable[[StepEvent], None] | None = None,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        max_logits: int = 2**24,
        max_past_tokens: int = 2**16,
        keep_special_tokens: bool = False,
    ):
        limits = {"max_batch_tokens": max_batch_tokens, "max_logits": max_logits, "max_past_tokens": max_past_tokens}
        for name, limit in limits.items():
            if limit < 1:
                raise IlladaError(f"{name} must be at least 1, got {limit}")
        self.model, self.tokenizer, self.on_step = model, tokenizer, on_step
        self.keep_special_tokens = keep_special_tokens
        self.max_batch_tokens, self.max_logits, self.max_past_tokens = max_batch_tokens, max_logits, max_past_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.submitted = 0
        self.pool = PagePool()

    def submit(self, prompt: Sequence[int], settings: GenerationSettings) -> int:
        """Add a prompt and return its index: 0, 1, 2, ...; errors as in `generate`."""
        return self.enter(self.request(prompt, settings, f"prompt {self.submitted}"))

    def request(self, prompt: Sequence[int], settings: GenerationSettings, name: str = "the prompt") -> Request:
        """Check a prompt, called `name` in errors, and return what `enter` takes; safe to call from any thread."""
        request = Request.of_prompt(self.model.config, prompt, settings, name)
        for option in ("stop", "think_boost"):
            if getattr(settings, option) and self.tokenizer is None:
                raise IlladaError(f"{option} needs a tokenizer: give one to generate")
        if settings.think_boost and self.tokenizer is not None:
            request.think = tuple(self.tokenizer.encode("</think>", add_special_tokens=False))
        give_form(request, self.tokenizer, self.model.config.vocab_size, name)
        return request

    def template(self, template: Sequence[int | None], settings: GenerationSettings, name: str) -> Request:
        """Check a template, called `name` in errors, and return what `enter` takes; safe to call from any thread."""
        request = Request.of_template(self.model.config, template, settings, name)
        give_form(request, self.tokenizer, self.model.config.vocab_size, name)
        return request

    def enter(self, request: Request) -> int:
        """Add a request that was checked before and return its index."""
        request.index = self.submitted
        self.waiting.append(request)
        self.submitted += 1
        return request.index

    def cancel(self, index: int) -> None:
        """Forget a request, if it is still under way."""
        self.waiting = deque(request for request in self.waiting if request.index != index)
        self._retire({index})

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""
        return bool(self.waiting or self.running)

    def run(self) -> list[Generation]:
        """Advance until every request has ended; return the answers in the order of their requests."""
        answers: dict[int, Generation] = {}
        while self.busy:
            answers |= self.step()
        return [answers[index] for index in sorted(answers)]

    @torch.inference_mode()
    def step(self) -> dict[int, Generation]:
        """Run one forward pass, if a request is under way; return by index the answers that it completed."""
        answers: dict[int, Generation] = {}
        if not self.busy:
            return answers
        with evaluating(self.model):
            requests = self._next_pass()
            rows = [row for request in requests for row in request.rows]
            proposals = iter(denoise(self.model, rows, self.pool, self.max_logits))
            for request in requests:
                if (answer := self._advance(request, proposals)) is not None:
                    answers[request.index] = answer
        self._retire(answers)
        return answers

    def _retire(self, indices: Container[int]) -> None:
        for request in self.running:
            if request.index in indices:
                request.release()
        self.running = [request for request in self.running if request.index not in indices]

    def _next_pass(self) -> list[Request]:
        """Let waiting requests in; return those of the next pass, with drafts where there is room for them."""
        positions = sum(request.size for request in self.running)
        cached = sum(request.cache_size for request in self.running)
        while self.waiting:
            request = self.waiting[0]
            positions, cached = positions + request.size, cached + request.cache_size
            no_memory = request.cache_size and cached > self.max_past_tokens
            if self.running and (positions > self.max_batch_tokens or no_memory):
                break
            self.running.append(self.waiting.popleft())
        requests = self.running[:1]
        room = self.max_batch_tokens - requests[0].size
        for request in self.running[1:]:
            if request.size > room:
                break
            requests.append(request)
            room -= request.size
        for request in requests:
            room -= draft_ahead(request, room)
        return requests

    def _advance(self, request: Request, proposals: Iterator[Proposals]) -> Generation | None:
        """Commit a step, and one more for every draft that came true; return the answer once it is complete.

        The iterator gives the proposals for each of its rows next.
        """
        rows = [(row, next(proposals)) for row in request.rows]
        request.forwards += request.passes
        request.positions += sum(row.size for row, _ in rows)
        answer = None
        for row, of_row in rows:
            if row is not request and (answer is not None or not has_come_true(request, row)):
                break
            block, block_end, step = request.block, request.block_end, request.block_step
            if request.commit(of_row):
                answer = _finish(request, self.tokenizer, self.keep_special_tokens)
                while answer is None and request.open_next_block():
                    block_end = request.block_end
                    answer = _finish(request, self.tokenizer, self.keep_special_tokens)
            if self.on_step is not None and request.watched:
                told = (request.ids_G, ~request.masked_G, np.exp(request.log_prob_G), request.forced_G)
                ids, committed, confidence, forced = (x_G[:block_end].tolist() for x_G in told)
                done = answer is not None
                self.on_step(StepEvent(request.index, block, step, ids, committed, confidence, done, forced))
        return answer


def _with_settings(
    model: IlladaForMaskedLM,
    inputs: Any,
    settings: GenerationSettings | Sequence[GenerationSettings] | None,
    what: str,
) -> list[tuple[Any, GenerationSettings]]:
    """Return each prompt or template with its settings."""
    if settings is None:
        settings = settings_for(model, GenerationSettings())
    if isinstance(settings, GenerationSettings):
        settings = [settings] * len(inputs)
    if len(settings) != len(inputs):
        raise IlladaError(f"{len(inputs)} {what} but {len(settings)} settings: give one for all or one for each")
    return list(zip(inputs, settings, strict=True))


def _finish(request: Request, tokenizer: Any | None, keep_special_tokens: bool) -> Generation | None:
    """Return the answer if it ends with the finished block: at an end-of-sequence id, a stop string or the budget."""
    # Earlier blocks were searched when they were finished.
    ends = np.flatnonzero(np.isin(request.ids_G[request.block : request.block_end], request.settings.eos_ids))
    ids = request.ids_G[: request.block + ends[0] if ends.size else request.block_end].tolist()
    if request.template:
        ids = [*request.prompt_P.tolist(), *ids]
    complete = bool(ends.size) or request.block_end == request.budget
    reason: Literal["stop", "length"] = "stop" if ends.size else "length"
    text = None
    if tokenizer is not None and (complete or request.settings.stop):
        text = tokenizer.decode(ids)
        cuts = [at for at in (text.find(stop) for stop in request.settings.stop) if at >= 0]
        if cuts:
            complete, reason = True, "stop"
            text = text[: min(cuts)]
            # A stop string may begin inside a token, which is then left out of the ids but not out of the text.
            kept = next((n for n in range(len(ids), 0, -1) if text.startswith(tokenizer.decode(ids[:n]))), 0)
            partial = text[len(tokenizer.decode(ids[:kept])) :]
            ids = ids[:kept]
            if not keep_special_tokens:
                text = show_ids(tokenizer, ids) + partial
        elif not keep_special_tokens:
            text = show_ids(tokenizer, ids)
    if not complete:
        return None
    log_probs = request.log_prob_G[request.slot_G] if request.template else request.log_prob_G[: len(ids)]
    forced = int(request.forced_G.sum())
    return Generation(ids, reason, request.forwards, log_probs.tolist(), text, request.positions, forced)
