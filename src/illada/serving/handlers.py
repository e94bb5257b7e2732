"""What the endpoints do: an HTTP request becomes requests to the engine, their answers become an object or a stream."""

import asyncio
import copy
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from illada.errors import IlladaError, needs
from illada.generation.request import Request
from illada.generation.settings import GenerationSettings, settings_for
from illada.model.transformer import IlladaForMaskedLM
from illada.serving.answer import Answer
from illada.serving.detokenize import Detokenizer, TokenTexts
from illada.serving.options import ServerSettings
from illada.serving.protocol import ApiError, ChatRequest, CompletionRequest
from illada.serving.responses import ChatResponses, CompletionResponses, Responses, diffusion_step
from illada.serving.streams import READING, Call, EventStream, unless_disconnected
from illada.serving.worker import Worker
from illada.text.chat import encode_prompt
from illada.text.prompts import SLOT_SIGN, encode_plain, encode_template

with needs("serve", "serving"):
    from starlette.requests import Request as HttpRequest
    from starlette.responses import JSONResponse, Response

log = logging.getLogger("illada.serving")


class EncodedPrompt(NamedTuple):
    """A prompt in ids, with None for each token that is to be filled in."""

    ids: list[int | None]
    gap: int = 0
    """Tokens of the gap before a suffix."""
    slot: int = 0
    """Tokens of each slot, where the answer is a whole text with slots."""


class Handlers:
    """Answers the requests to one model; takes the arguments of `create_app`."""

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
        self._tokenizer, self._token_texts = tokenizer, TokenTexts(tokenizer)
        # Encoding changes a tokenizer's state for a moment, so the encoding thread has its own copy.
        self._encoding = copy.deepcopy(tokenizer)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="illada-encode")
        self._model, self._context = model, model.config.max_position_embeddings
        self._created = int(time.time())

    def check_name(self, name: str) -> None:
        """Check that a request names this model.

        Raises:
            ApiError: 404 when it names another.
        """
        if name != self.name:
            message = f"there is no model {name[:80]!r} here, only {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def describe(self) -> dict[str, Any]:
        """Return the model as `/v1/models` shows it."""
        defaults = {name: value for name, value in asdict(self._defaults).items() if name != "eos_token_id"}
        return {
            "id": self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "illada",
            "context_length": self._context,
            "chat": bool(self._tokenizer.chat_template),
            "defaults": defaults,
        }

    async def answer(self, request: HttpRequest, body: ChatRequest | CompletionRequest) -> Response:
        """Answer a request of either kind."""
        if body.model is not None:
            self.check_name(body.model)
        end = time.monotonic() + min(body.timeout or self._server.request_timeout, self._server.request_timeout)
        with self.worker.reserved_place():
            loop = asyncio.get_running_loop()
            answers, prompt_tokens = await loop.run_in_executor(self._thread, self._answers, body)
        seconds = end - time.monotonic()
        if self._server.log_prompts:
            log.info("asked %s", body.model_dump_json(exclude_none=True))
        kind = ChatResponses if isinstance(body, ChatRequest) else CompletionResponses
        responses = kind(self.name, body.logprobs not in (None, False), prompt_tokens)
        call = Call(self.worker, answers, seconds)
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return EventStream(self._events(call, responses, include_usage), call, seconds + READING)
        if not await unless_disconnected(request, call.finish()):
            return Response(status_code=499)  # nobody reads it
        self._log_answers(answers)
        return JSONResponse(responses.whole(answers))

    def _answers(self, body: ChatRequest | CompletionRequest) -> tuple[list[Answer], int]:
        """Check a request; return its answers, not begun yet, and the tokens of its prompts. Runs in its own thread."""
        settings = settings_for(self._model, body.settings(self._defaults))
        count = body.n or 1
        if count > self._server.max_choices:
            raise IlladaError(f"n is {count}: this server gives at most {self._server.max_choices} answers to a prompt")
        seed = settings.seed
        if body.seed is not None:
            seed = body.seed % 2**63
        elif settings.temperature or settings.remasking == "random":
            seed = secrets.randbits(63)
        prompts: Sequence[Any] = [None] if isinstance(body, ChatRequest) else body.prompts()
        if len(prompts) * count > self._server.max_requests:
            raise IlladaError(f"{len(prompts) * count} answers asked for: at most {self._server.max_requests} at once")
        answers: list[Answer] = []
        prompt_tokens = 0
        for prompt in prompts:
            encoded = self._encode(body, prompt)
            for number in range(count):
                answer = self._answer(encoded, replace(settings, seed=(seed + number) % 2**63), len(answers))
                answer.stream, answer.request.watched = bool(body.stream), body.diffusion
                answers.append(answer)
            prompt_tokens += sum(token is not None for token in encoded.ids)
        return answers, prompt_tokens

    def _encode(self, body: ChatRequest | CompletionRequest, prompt: Any) -> EncodedPrompt:
        """Encode one prompt; `prompt` means nothing for a conversation."""
        if isinstance(body, ChatRequest):
            return EncodedPrompt([*encode_prompt(self._encoding, [message.plain() for message in body.messages])])
        if not (body.slot_tokens or body.suffix):
            return EncodedPrompt([*(encode_plain(self._encoding, prompt) if isinstance(prompt, str) else prompt)])
        if not isinstance(prompt, str):
            raise IlladaError("gaps can be filled in text only: give the prompt as text")
        if body.stop is not None:
            raise IlladaError("stop does nothing where gaps are filled: leave it out")
        if body.slot_tokens and body.max_tokens is not None:
            raise IlladaError("max_tokens does nothing beside slot_tokens: leave it out")
        if body.suffix and body.max_tokens is None:
            raise IlladaError("suffix needs max_tokens: the number of tokens between the prompt and it")
        gap = body.slot_tokens or body.max_tokens or 0
        gaps = gap * prompt.count(SLOT_SIGN) if body.slot_tokens else gap
        if gaps > self._context:
            raise IlladaError(f"the gaps have {gaps} tokens but the context is {self._context}: make them shorter")
        if body.slot_tokens:
            return EncodedPrompt(encode_template(self._encoding, prompt, gap), slot=gap)
        assert body.suffix is not None
        ids: list[int | None] = [*encode_plain(self._encoding, prompt), *[None] * gap]
        ids += self._encoding.encode(body.suffix, add_special_tokens=False)
        end = self._encoding.eos_token_id
        return EncodedPrompt(ids if end is None else [*ids, end], gap)

    def _answer(self, prompt: EncodedPrompt, settings: GenerationSettings, index: int) -> Answer:
        """Make the engine's request for one choice, and the answer that will hold what comes of it."""
        engine = self.worker.engine
        if prompt.slot or prompt.gap:
            settings = replace(settings, think_boost=0.0)
            request = Request.of_template(engine.model.config, prompt.ids, settings, "the text with its gaps")
            limit = prompt.gap or request.budget
            return Answer(index, request, Detokenizer(self._tokenizer), limit, slot=prompt.slot)
        if self._model.config.causal:
            settings = settings.left_to_right()
        ids = [token for token in prompt.ids if token is not None]
        room = self._context - len(ids)
        if room < 1:
            raise IlladaError(f"the prompt has {len(ids)} tokens but the context is {self._context}: shorten it")
        limit = min(settings.max_new_tokens, room)
        block = min(settings.block_length, limit)
        # Answers are computed in whole blocks and cut.
        budget = -(-limit // block) * block
        if budget > room:
            limit = budget = room // block * block
        steps = settings.steps_per_block and min(settings.steps_per_block, block)
        settings = replace(settings, max_new_tokens=budget, block_length=block, steps_per_block=steps)
        return Answer(index, engine.request(ids, settings), Detokenizer(self._tokenizer, settings.stop), limit)

    async def _events(self, call: Call, responses: Responses, include_usage: bool) -> AsyncIterator[str]:
        """Yield the server-sent events of a stream."""
        try:
            for answer in call.answers:
                if (opening := responses.opening(answer)) is not None:
                    yield _event(opening)
            async for progress in call.follow():
                if progress is None:
                    yield ": wait\n\n"
                    continue
                answer, steps, text, tokens = progress
                for step in steps:
                    yield f"event: diffusion\n{_event(diffusion_step(answer, step, self._token_texts))}"
                if text or (tokens and responses.log_probs):
                    yield _event(responses.chunk(answer, text, tokens))
                if answer.finish is not None:
                    yield _event(responses.chunk(answer, "", [], last=True))
            if include_usage:
                yield _event(responses.usage_chunk(call.answers))
            self._log_answers(call.answers)
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body)

    def _log_answers(self, answers: Sequence[Answer]) -> None:
        if self._server.log_prompts:
            log.info("answered %s", json.dumps([answer.content for answer in answers], ensure_ascii=False))


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'), allow_nan=False)}\n\n"
