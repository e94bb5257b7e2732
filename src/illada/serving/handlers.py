"""What the endpoints do: requests become answers of the engine, answers become objects or streams of events."""

import asyncio
import copy
import json
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from illada.errors import IlladaError
from illada.generation.settings import GenerationSettings
from illada.model import IlladaForMaskedLM
from illada.serving.detokenize import AnswerText, Pieces
from illada.serving.protocol import FAILED, LATE, ChatRequest, CompletionRequest, GenerationRequest
from illada.serving.responses import ChatForm, Form, TextForm, usage
from illada.serving.settings import ServerSettings
from illada.serving.streams import (
    READING,
    Call,
    Choice,
    EventStream,
    LostError,
    TimeoutPassedError,
    UnknownModelError,
    unless_gone,
)
from illada.serving.worker import Step, Worker
from illada.text.chat import encode_prompt
from illada.text.prompts import SLOT_SIGN, encode_plain, encode_template

log = logging.getLogger("illada.serving")


class EncodedPrompt(NamedTuple):
    """A prompt in ids, with None for each token that is to be filled in."""

    ids: list[int | None]
    gap: int = 0
    """Tokens of the gap before a suffix."""
    slot: int = 0
    """Tokens of each slot, where the answer is all of a text."""


class Api:
    """What the endpoints do.

    Args:
        model: the network.
        tokenizer: of the model.
        name: of the model in the API.
        server: limits.
        defaults: how to generate where a request does not say.
    """

    def __init__(
        self,
        model: IlladaForMaskedLM,
        tokenizer: Any,
        name: str,
        server: ServerSettings,
        defaults: GenerationSettings,
    ):
        self.worker = Worker(model, tokenizer, server)
        self.name, self._server, self._defaults = name, server, defaults
        self._tokenizer, self._pieces = tokenizer, Pieces(tokenizer)
        # Encoding changes a tokenizer's state for a moment, so its thread has one of its own.
        self._encoding = copy.deepcopy(tokenizer)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="illada-encode")
        eos = model.config.eos_token_id
        self._eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        self._context, self._causal = model.config.max_position_embeddings, model.config.causal
        self._begun = int(time.time())

    def describe(self) -> dict[str, Any]:
        """Return the model as `/v1/models` shows it."""
        defaults = {name: value for name, value in asdict(self._defaults).items() if name != "eos_token_id"}
        return {
            "id": self.name,
            "object": "model",
            "created": self._begun,
            "owned_by": "illada",
            "context_length": self._context,
            "chat": bool(self._tokenizer.chat_template),
            "defaults": defaults,
        }

    async def answer(self, request: HttpRequest, asked: ChatRequest | CompletionRequest) -> Response:
        """Answer a request of either kind."""
        if asked.model not in (None, self.name):
            raise UnknownModelError(asked.model, self.name)
        end = time.monotonic() + min(asked.timeout or self._server.request_timeout, self._server.request_timeout)
        with self.worker.entering():
            loop = asyncio.get_running_loop()
            choices, prompt_tokens = await loop.run_in_executor(self._thread, self._choices, asked)
        seconds = end - time.monotonic()
        if self._server.log_prompts:
            log.info("asked %s", asked.model_dump_json(exclude_none=True))
        kind = ChatForm if isinstance(asked, ChatRequest) else TextForm
        form = kind(self.name, asked.logprobs not in (None, False))
        call = Call(self.worker, choices, bool(asked.stream), seconds)
        if asked.stream:
            events = self._events(form, asked, call, prompt_tokens)
            return EventStream(events, call, seconds + READING)
        done = await unless_gone(request, call.finish())
        if not done:
            return Response(status_code=499)  # nobody reads it
        if self._server.log_prompts:
            log.info("answered %s", json.dumps([choice.content for choice in choices], ensure_ascii=False))
        return JSONResponse(form.whole(choices, usage(choices, prompt_tokens)))

    def _choices(self, asked: ChatRequest | CompletionRequest) -> tuple[list[Choice], int]:
        """Check a request and return its answers to be, and the tokens of its prompts; runs in the encoding thread."""
        settings = asked.settings(self._defaults, self._eos_ids)
        count = 1 if asked.n is None else asked.n
        if count > self._server.max_choices:
            raise IlladaError(f"n is {count}: this server gives at most {self._server.max_choices} answers to a prompt")
        seed = settings.seed
        if asked.seed is not None:
            seed = asked.seed % 2**63
        elif settings.temperature or settings.remasking == "random":
            seed = secrets.randbits(63)
        prompts: Sequence[Any] = [None] if isinstance(asked, ChatRequest) else asked.prompts()
        if len(prompts) * count > self._server.max_requests:
            raise IlladaError(f"{len(prompts) * count} answers asked for: at most {self._server.max_requests} at once")
        choices: list[Choice] = []
        prompt_tokens = 0
        for prompt in prompts:
            given = self._given(asked, prompt)
            for number in range(count):
                own = replace(settings, seed=(seed + number) % 2**63)
                choices.append(self._choice(given, own, len(choices)))
                choices[-1].row.watched = asked.diffusion
            prompt_tokens += sum(token is not None for token in given.ids)
        return choices, prompt_tokens

    def _given(self, asked: ChatRequest | CompletionRequest, prompt: Any) -> EncodedPrompt:
        """Encode one prompt."""
        if isinstance(asked, ChatRequest):
            return EncodedPrompt([*encode_prompt(self._encoding, [message.plain() for message in asked.messages])])
        if not (asked.slot_tokens or asked.suffix):
            return EncodedPrompt([*(encode_plain(self._encoding, prompt) if isinstance(prompt, str) else prompt)])
        if not isinstance(prompt, str):
            raise IlladaError("gaps can be filled in text only: give the prompt as text")
        if asked.stop is not None:
            raise IlladaError("stop does nothing where gaps are filled: leave it out")
        if asked.slot_tokens and asked.max_tokens is not None:
            raise IlladaError("max_tokens does nothing beside slot_tokens: leave it out")
        if asked.suffix and asked.max_tokens is None:
            raise IlladaError("suffix needs max_tokens: the number of tokens between the prompt and it")
        gap = asked.slot_tokens or asked.max_tokens or 0
        gaps = gap * prompt.count(SLOT_SIGN) if asked.slot_tokens else gap
        if gaps > self._context:
            raise IlladaError(f"the gaps have {gaps} tokens but the context is {self._context}: make them shorter")
        if asked.slot_tokens:
            return EncodedPrompt(encode_template(self._encoding, prompt, gap), slot=gap)
        assert asked.suffix is not None
        ids: list[int | None] = [*encode_plain(self._encoding, prompt), *[None] * gap]
        ids += self._encoding.encode(asked.suffix, add_special_tokens=False)
        end = self._encoding.eos_token_id
        return EncodedPrompt(ids if end is None else [*ids, end], gap)

    def _choice(self, given: EncodedPrompt, own: GenerationSettings, at: int) -> Choice:
        """Check one answer to be with the engine."""
        engine = self.worker.engine
        if given.slot or given.gap:
            row = engine.request_template(given.ids, replace(own, think_boost=0.0), "the text with its gaps")
            lead = row.prompt_P.tolist() if given.slot else []
            return Choice(at, row, AnswerText(self._tokenizer), given.gap or row.budget, lead, given.slot)
        if self._causal:
            own = own.left_to_right()
        ids = [token for token in given.ids if token is not None]
        room = self._context - len(ids)
        if room < 1:
            raise IlladaError(f"the prompt has {len(ids)} tokens but the context is {self._context}: shorten it")
        limit = min(own.max_new_tokens, room)
        block = min(own.block_length, limit)
        # Answers are computed in whole blocks and cut.
        budget = -(-limit // block) * block
        if budget > room:
            limit = budget = room // block * block
        steps = own.steps_per_block and min(own.steps_per_block, block)
        own = replace(own, max_new_tokens=budget, block_length=block, steps_per_block=steps)
        return Choice(at, engine.request(ids, own), AnswerText(self._tokenizer, own.stop), limit)

    async def _events(self, form: Form, asked: GenerationRequest, call: Call, prompt_tokens: int) -> AsyncIterator[str]:
        """Yield the stream of a request."""
        try:
            for choice in call.choices:
                if (opening := form.opening(choice)) is not None:
                    yield _event(opening)
            async for found in call.follow():
                if found is None:
                    yield ": wait\n\n"
                    continue
                choice, news = found
                for step in news.steps:
                    yield f"event: diffusion\n{_event(self._picture(choice, step))}"
                text, tokens = choice.take(news)
                if text or (tokens and form.log_probs):
                    yield _event(form.chunk(choice, text, tokens))
                if choice.finish is not None:
                    yield _event(form.closing(choice))
            if asked.stream_options is not None and asked.stream_options.include_usage:
                yield _event(form.usage_chunk(usage(call.choices, prompt_tokens)))
            if self._server.log_prompts:
                log.info("answered %s", json.dumps([choice.content for choice in call.choices], ensure_ascii=False))
            yield "data: [DONE]\n\n"
        except TimeoutPassedError:
            yield _event(LATE)
        except LostError:
            yield _event(FAILED)

    def _picture(self, choice: Choice, step: Step) -> dict[str, Any]:
        """Return one step as the page draws it: the active block, or the whole of a text with slots."""
        event, row = step.event, choice.row
        start = 0 if row.template else event.block
        size = min(len(event.ids), choice.limit - start)
        slots = row.slot_G[start : start + size].tolist()
        committed, confidence = event.committed[:size], event.confidence[:size]
        states = "".join(
            "f" if not slot else "c" if sure else "m" if math.isnan(p) else "p"
            for slot, sure, p in zip(slots, committed, confidence, strict=True)
        )
        ids = [None if state == "m" else i for state, i in zip(states, event.ids[:size], strict=True)]
        over = [at for at, i in enumerate(ids) if i in row.settings.eos_ids and states[at] == "c"]
        if over:
            ids[over[0] :] = [None] * (len(ids) - over[0])
        texts = self._pieces(ids)
        confidences = [round(p, 4) if state in "pc" else None for state, p in zip(states, confidence, strict=True)]
        if choice.slot:
            texts, states = [self._show(row.prompt_P.tolist()), *texts], "f" + states
            confidences = [None, *confidences]
        return {
            "object": "diffusion.step",
            "index": choice.index,
            "block": event.block,
            "step": event.step,
            "forwards": step.forwards,
            "start": start,
            "texts": texts,
            "states": states,
            "confidences": confidences,
        }

    def _show(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'), allow_nan=False)}\n\n"
