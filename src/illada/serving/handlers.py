"""What the endpoints do: an HTTP request becomes requests to the engine, their answers become an object or a stream."""

import asyncio
import copy
import json
import logging
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

from illada.errors import IlladaError, needs
from illada.generation.optional.forms import regexes_of
from illada.generation.optional.tool_calls import Tools
from illada.generation.settings import GenerationSettings, settings_for
from illada.model.transformer import IlladaForMaskedLM
from illada.serving.answer import Answer
from illada.serving.detokenize import Detokenizer, TokenTexts
from illada.serving.forms import NO_FORM, FormFields
from illada.serving.options import ServerSettings
from illada.serving.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponseRequest,
    TokenizeRequest,
    named_field,
)
from illada.serving.responses import (
    Body,
    ChatResponses,
    CompletionResponses,
    ItemResponses,
    Responses,
    diffusion_step,
)
from illada.serving.streams import READING, Call, EventStream, unless_disconnected
from illada.serving.tools import Choice
from illada.serving.worker import Worker
from illada.text.chat import encode_prompt
from illada.text.prompts import SLOT_SIGN, encode_plain, encode_template
from illada.text.tokenizer import encode_texts

with needs("serve", "serving"):
    from pydantic import BaseModel
    from starlette.requests import Request as HttpRequest
    from starlette.responses import JSONResponse, Response

KINDS: dict[type[Body], type[Responses]] = {
    ChatRequest: ChatResponses,
    CompletionRequest: CompletionResponses,
    ResponseRequest: ItemResponses,
}
log = logging.getLogger("illada.serving")


T = TypeVar("T")


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
        about: Mapping[str, Any] | None = None,
    ):
        self.worker = Worker(model, tokenizer, server)
        self.names, self._server, self._defaults = (name, *server.alias), server, defaults
        self._about = about or {}
        self._tokenizer, self._token_texts = tokenizer, TokenTexts(tokenizer)
        self._own = threading.local()
        self._plain, self._formed = self._thread("illada-encode"), self._thread("illada-forms")
        self._model, self._context = model, model.config.max_position_embeddings
        self._created = int(time.time())

    def _thread(self, name: str) -> ThreadPoolExecutor:
        """Return a thread that checks requests; encoding changes a tokenizer for a moment, so it has one of its own."""
        own = (self._own, "tokenizer", copy.deepcopy(self._tokenizer))
        return ThreadPoolExecutor(1, thread_name_prefix=name, initializer=setattr, initargs=own)

    @property
    def _encoding(self) -> Any:
        """The tokenizer of the thread that asks."""
        return self._own.tokenizer

    def check_name(self, name: str) -> None:
        """Check that a request names this model.

        Raises:
            ApiError: 404 when it names another.
        """
        if name not in self.names:
            message = f"there is no model {name[:80]!r} here, only {' and '.join(map(repr, self.names))}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def describe(self, name: str) -> dict[str, Any]:
        """Return the model as `/v1/models` shows it under one of its names."""
        defaults = {name: value for name, value in asdict(self._defaults).items() if name != "eos_token_id"}
        return {
            "id": name,
            "root": self.names[0],
            "object": "model",
            "created": self._created,
            "owned_by": "illada",
            "context_length": self._context,
            "chat": bool(self._tokenizer.chat_template),
            "causal": bool(self._model.config.causal),
            "parameters": self._model.num_parameters(),
            "defaults": defaults,
            **self._about,
        }

    async def answer(self, request: HttpRequest, body: Body) -> Response:
        """Answer a request of any kind."""
        call, responses, seconds = await self._begin(body)
        ignored = body.without_effect()
        headers = {"warning": f'299 illada "without effect here: {", ".join(ignored)}"'} if ignored else {}
        if body.stream:
            return EventStream(self._events(call, responses), call, seconds + READING, headers)
        if not await unless_disconnected(request, call.finish()):
            return Response(status_code=499)  # nobody reads it
        self._log_answers(call.answers)
        return JSONResponse(responses.whole(call.answers), headers=headers)

    async def complete(self, body: Body) -> dict[str, Any]:
        """Answer a request that came by no connection; errors as in `Call`."""
        call, responses, _ = await self._begin(body)
        await call.finish()
        return responses.whole(call.answers)

    async def _begin(self, body: Body) -> tuple[Call, Responses, float]:
        """Check a request and begin its answers; return them, what writes them, and the seconds that they have."""
        name = self.names[0] if body.model is None else body.model
        self.check_name(name)
        end = time.monotonic() + min(body.timeout or self._server.request_timeout, self._server.request_timeout)
        with self.worker.reserved_place():
            loop = asyncio.get_running_loop()
            # An automaton may take seconds, for which only those wait that want one.
            thread = self._formed if body.asked() or getattr(body, "tools", None) else self._plain
            try:
                answers, prompt_tokens = await loop.run_in_executor(thread, self._answers, body)
            except IlladaError as error:
                raise _refusal(error, body) from error
        seconds = end - time.monotonic()
        if self._server.log_prompts:
            log.info("asked %s", body.model_dump_json(exclude_none=True))
        responses = KINDS[type(body)](name, body, prompt_tokens, self._show)
        return Call(self.worker, answers, seconds), responses, seconds

    def _show(self, token_id: int) -> str:
        return self._token_texts([token_id])[0]

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        """Return the ids of a text or of a conversation, as a prompt of either kind has them."""

        def encode() -> list[int]:
            if body.messages is not None:
                return self._encode_chat(body.conversation(), self._tools(body))
            text = body.prompt or ""
            if body.add_special_tokens:
                return encode_plain(self._encoding, text)
            return [*self._encoding.encode(text, add_special_tokens=False)]

        def encode_and_show() -> tuple[list[int], list[str]]:
            # A megabyte has a million tokens: each is shown once, and not in the event loop.
            ids = encode()
            texts = {token: self._encoding.decode([token]) for token in set(ids)}
            return ids, [texts[token] for token in ids]

        ids, texts = await self._in_encoding_thread(body, encode_and_show)
        return {"count": len(ids), "max_model_len": self._context, "tokens": ids, "token_strs": texts}

    async def detokenize(self, body: DetokenizeRequest) -> dict[str, Any]:
        """Return the text of ids, special tokens included."""
        if (most := max(body.tokens, default=0)) >= len(self._tokenizer):
            raise ApiError(400, f"tokens: {most} is outside the vocabulary", param="tokens")
        return {"prompt": await self._in_encoding_thread(body, lambda: self._encoding.decode(body.tokens))}

    async def _in_encoding_thread(self, body: TokenizeRequest | DetokenizeRequest, work: Callable[[], T]) -> T:
        if body.model is not None:
            self.check_name(body.model)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._plain, work)
        except IlladaError as error:
            raise _refusal(error, body) from error

    def _answers(self, body: Body) -> tuple[list[Answer], int]:
        """Check a request; return its answers, not begun yet, and the tokens of its prompts. Runs in a thread."""
        settings, tools = settings_for(self._model, body.settings(self._defaults)), self._tools(body)
        if tools is not None and tools.names and not isinstance(body, CompletionRequest):
            settings = _with_calls(settings, tools, body.choice())
        count = body.n or 1
        if count > self._server.max_choices:
            raise IlladaError(f"n is {count}: this server gives at most {self._server.max_choices} answers to a prompt")
        seed = settings.seed
        if body.seed is not None:
            seed = body.seed % 2**63
        elif settings.temperature or settings.remasking == "random":
            seed = secrets.randbits(63)
        prompts: Sequence[Any] = body.prompts() if isinstance(body, CompletionRequest) else [None]
        # The most probable token of a draw without chance is the token itself.
        alternatives = 0 if body.alternatives == 1 and not settings.temperature else body.alternatives
        if len(prompts) * count > self._server.max_requests:
            raise IlladaError(f"{len(prompts) * count} answers asked for: at most {self._server.max_requests} at once")
        answers: list[Answer] = []
        prompt_tokens = 0
        for prompt in prompts:
            encoded = self._encode(body, prompt, tools)
            for number in range(count):
                answer = self._answer(encoded, replace(settings, seed=(seed + number) % 2**63), len(answers))
                answer.stream, answer.request.watched = bool(body.stream), body.diffusion
                answer.reader = tools.reader() if tools is not None and tools.names else None
                answer.request.alternatives = alternatives
                if isinstance(body, CompletionRequest) and body.echo:
                    answer.echo = True
                    self._check_echo(encoded, settings)
                answers.append(answer)
            prompt_tokens += sum(token is not None for token in encoded.ids)
        return answers, prompt_tokens

    def _check_echo(self, prompt: EncodedPrompt, settings: GenerationSettings) -> None:
        text = self._tokenizer.decode([token for token in prompt.ids if token is not None])
        if any(stop in text for stop in settings.stop):
            raise IlladaError("echo cannot repeat a prompt that holds a stop text: leave one of them out")

    def _tools(self, body: Body | TokenizeRequest) -> Tools | None:
        """Return the tools of a conversation that has some, or calls of some."""
        if isinstance(body, CompletionRequest):
            return None
        functions = body.functions()
        called = any("tool_calls" in message or message["role"] == "tool" for message in body.conversation())
        return Tools(functions, self._encoding) if functions or called else None

    def _encode_chat(self, messages: list[dict[str, Any]], tools: Tools | None) -> list[int]:
        """Return the ids of a conversation; the answer goes on with the assistant's last message, if it is the last."""
        encode = partial(encode_prompt, self._encoding) if tools is None else tools.encode
        if messages[-1]["role"] != "assistant" or "tool_calls" in messages[-1] or len(messages) == 1:
            return encode(messages)
        (begun,) = encode_texts(self._encoding, [messages[-1]["content"]])
        return [*encode(messages[:-1]), *begun]

    def _encode(self, body: Body, prompt: Any, tools: Tools | None) -> EncodedPrompt:
        """Encode one prompt; `prompt` means nothing for a conversation, `tools` for anything else."""
        if not isinstance(body, CompletionRequest):
            return EncodedPrompt([*self._encode_chat(body.conversation(), tools)])
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
            request = engine.template(prompt.ids, settings, "the text with its gaps")
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
        # Answers are computed in whole blocks and cut; one that has a form is not cut.
        budget = -(-limit // block) * block
        if settings.forms:
            blocks = budget // block
            block = limit // blocks
            limit = budget = block * blocks
        elif budget > room:
            limit = budget = room // block * block
        steps = settings.steps_per_block and min(settings.steps_per_block, block)
        settings = replace(settings, max_new_tokens=budget, block_length=block, steps_per_block=steps)
        return Answer(index, engine.request(ids, settings), Detokenizer(self._tokenizer, settings.stop), limit)

    async def _events(self, call: Call, responses: Responses) -> AsyncIterator[str]:
        """Yield the server-sent events of a stream."""
        try:
            for answer in call.answers:
                for event in responses.opening(answer):
                    yield _event(event)
            async for progress in call.follow():
                if progress is None:
                    yield ": wait\n\n"
                    continue
                answer, steps, text, tokens = progress
                for step in steps:
                    yield f"event: diffusion\n{_event(diffusion_step(answer, step, self._token_texts))}"
                if text or answer.pieces or (tokens and responses.log_probs):
                    for event in responses.chunks(answer, text, tokens):
                        yield _event(event)
                if answer.finish is not None:
                    for event in responses.ending(answer):
                        yield _event(event)
            for event in responses.closing(call.answers):
                yield _event(event)
            self._log_answers(call.answers)
            if responses.end is not None:
                yield f"data: {responses.end}\n\n"
        except ApiError as error:
            yield _event(responses.failure(error))

    def _log_answers(self, answers: Sequence[Answer]) -> None:
        if self._server.log_prompts:
            log.info("answered %s", json.dumps([answer.content for answer in answers], ensure_ascii=False))


def _with_calls(settings: GenerationSettings, tools: Tools, choice: Choice) -> GenerationSettings:
    """Return settings under which the answer may, or must, call tools; a form that they have is for other answers."""
    if settings.stop:
        raise IlladaError("tools and stop cannot be used together: leave one of them out")
    if settings.slot_regex:
        raise IlladaError("tools and slot_regex cannot be used together: leave one of them out")
    content = regexes_of(settings)
    regex = tools.regex(*choice, content=None if content is None else content[0][0])
    return replace(settings, **NO_FORM | {"regex": regex})


def _refusal(error: IlladaError, body: BaseModel) -> ApiError:
    """Return what a client is told of an error: what it calls a form by its own field's name, and the field."""
    text, fields = str(error)[:400], type(body).model_fields
    asked = body.asked() if isinstance(body, FormFields) else {}
    if getattr(body, "tools", None) and not asked:
        asked = {"tools": ("regex", None)}
    for field, (setting, _) in asked.items():
        if re.search(rf"\b{setting}\b", text):
            return ApiError(400, re.sub(rf"\b{setting}\b", field, text), param=field.partition(".")[0])
    if (name := named_field(text)) in fields:
        return ApiError(400, text, param=name)
    param = next(name for name in ("messages", "input", "prompt", "tokens") if name in fields)
    return ApiError(400, text, param=param)


def _event(content: dict[str, Any]) -> str:
    """Return a server-sent event; what has a type is named after it."""
    name = f"event: {content['type']}\n" if "type" in content else ""
    return f"{name}data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'), allow_nan=False)}\n\n"
