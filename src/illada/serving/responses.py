"""How answers are written, whole or in chunks: the JSON objects of each kind of request."""

import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

from illada.generation.optional.call_format import CallPiece
from illada.serving.answer import Answer, Step
from illada.serving.detokenize import Token, TokenTexts
from illada.serving.forms import Strict
from illada.serving.protocol import ApiError, ChatRequest, CompletionRequest, ResponseRequest

Body = ChatRequest | CompletionRequest | ResponseRequest
"""A request for answers, of any kind."""

GIVEN = "null: given text; else the log-probability in the pass that committed the token, given what was visible then"
"""What the log-probabilities of an echoed prompt and its answer are."""


class Responses(ABC):
    """Writes the answers to one HTTP request, with log-probabilities if they are wanted.

    Args:
        model: name of the model, as the request gave it.
        body: the request.
        prompt_tokens: tokens of its prompts.
        show: returns the text of a token by itself.
    """

    prefix: str
    whole_object: str
    chunk_object: str
    end: str | None = "[DONE]"
    """What follows the last event of a stream."""

    def __init__(self, model: str, body: Body, prompt_tokens: int, show: Callable[[int], str]):
        self.log_probs, self._prompt_tokens, self._show = body.log_probs, prompt_tokens, show
        self._alternatives = body.alternatives
        self._echo = isinstance(body, CompletionRequest) and bool(body.echo)
        self._include_usage = body.stream_options is not None and body.stream_options.include_usage
        self._head: dict[str, Any] = {
            "id": f"{self.prefix}{uuid.uuid4().hex}",
            "object": self.whole_object,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"illada-{version('illada')}",
        }

    @abstractmethod
    def content(self, text: str, tokens: Sequence[Token], chunk: bool) -> dict[str, Any]:
        """Return the fields that hold the text of a choice or of a chunk of it, and the log-probabilities."""

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the object that holds all answers."""
        choices = [
            self._choice(answer, self.content(answer.content, answer.tokens, chunk=False), last=True)
            for answer in answers
        ]
        return {**self._head, "choices": choices, "usage": self._usage(answers)}

    def opening(self, answer: Answer) -> Iterator[dict[str, Any]]:  # noqa: ARG002
        """Yield the events before an answer's text."""
        yield from ()

    def chunks(self, answer: Answer, text: str, tokens: Sequence[Token]) -> Iterator[dict[str, Any]]:
        """Yield the events with the next text and tokens of an answer."""
        yield self._chunk([self._choice(answer, self.content(text, tokens, chunk=True), last=False)])

    def ending(self, answer: Answer) -> Iterator[dict[str, Any]]:
        """Yield the events after an answer's text, which say why it ended."""
        yield self._chunk([self._choice(answer, self.content("", [], chunk=True), last=True)])

    def closing(self, answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
        """Yield the events after all answers."""
        if self._include_usage:
            yield {**self._chunk([]), "usage": self._usage(answers)}

    def failure(self, error: ApiError) -> dict[str, Any]:
        """Return the event that ends a stream which failed."""
        return error.body

    def _choice(self, answer: Answer, content: dict[str, Any], last: bool) -> dict[str, Any]:
        fills = {"fills": answer.fills()} if answer.slot and last else {}
        return {"index": answer.index, **content, "finish_reason": answer.finish if last else None, **fills}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_object, "choices": choices}

    def _usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the tokens as OpenAI counts them, and the forward passes that each answer took part in."""
        tokens = sum(answer.generated for answer in answers)
        forwards = sum(answer.forwards for answer in answers)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self._prompt_tokens + tokens,
            "forwards": forwards,
            "tokens_per_forward": round(tokens / forwards, 3) if forwards else 0.0,
        }


class CompletionResponses(Responses):
    """Writes the answers of `/v1/completions`."""

    prefix, whole_object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def content(self, text: str, tokens: Sequence[Token], chunk: bool) -> dict[str, Any]:  # noqa: ARG002
        """Return text and log-probabilities."""
        if not self.log_probs:
            return {"text": text, "logprobs": None}
        log_probs = {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.log_prob for token in tokens],
            "top_logprobs": [None if token.log_prob is None else self._best(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }
        if self._echo:
            log_probs["meaning"] = GIVEN
        return {"text": text, "logprobs": log_probs}

    def _best(self, token: Token) -> dict[str, float | None]:
        """Return the most probable tokens at a place and the token itself; of equal texts the first counts."""
        best: dict[str, float | None] = {}
        for token_id, log_prob in token.alternatives:
            best.setdefault(self._show(token_id), log_prob)
        return {**best, token.text: token.log_prob}


def listed(tokens: Sequence[Token], show: Callable[[int], str]) -> list[dict[str, Any]]:
    """Return tokens with their log-probabilities as the chat and responses APIs write them."""

    def entry(text: str, log_prob: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": log_prob, "bytes": [*text.encode()]}

    return [
        {
            **entry(token.text, token.log_prob),
            "top_logprobs": [entry(show(token_id), log_prob) for token_id, log_prob in token.alternatives],
        }
        for token in tokens
    ]


class ChatResponses(Responses):
    """Writes the answers of `/v1/chat/completions`."""

    prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def opening(self, answer: Answer) -> Iterator[dict[str, Any]]:
        """Yield the chunk that says who speaks."""
        content = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
        yield self._chunk([self._choice(answer, content, last=False)])

    def content(self, text: str, tokens: Sequence[Token], chunk: bool) -> dict[str, Any]:
        """Return message or delta, and log-probabilities."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if chunk:
            message = {"content": text} if text else {}
        log_probs = None
        if self.log_probs:
            log_probs = {"content": listed(tokens, self._show), "refusal": None}
        return {"delta" if chunk else "message": message, "logprobs": log_probs}

    def _choice(self, answer: Answer, content: dict[str, Any], last: bool) -> dict[str, Any]:
        if answer.reader is not None and "message" in content and answer.reader.calls:
            message = content["message"]
            calls = [
                {"id": name, "type": "function", "function": call._asdict()}
                for name, call in zip(answer.call_ids, answer.reader.calls, strict=True)
            ]
            content["message"] = {**message, "content": message["content"] or None, "tool_calls": calls}
        elif answer.pieces and not last:
            content["delta"]["tool_calls"] = [self._call_delta(answer, piece) for piece in answer.pieces]
        return super()._choice(answer, content, last)

    def _call_delta(self, answer: Answer, piece: CallPiece) -> dict[str, Any]:
        if piece.name is None:
            return {"index": piece.number, "function": {"arguments": piece.arguments}}
        function = {"name": piece.name, "arguments": piece.arguments}
        return {"index": piece.number, "id": answer.call_ids[piece.number], "type": "function", "function": function}


class ItemResponses(Responses):
    """Writes the answer of `/v1/responses`: a message, calls, or both, or the typed events of their stream."""

    prefix, whole_object, chunk_object = "resp_", "response", "response"
    end = None

    def __init__(self, model: str, body: Body, prompt_tokens: int, show: Callable[[int], str]):
        super().__init__(model, body, prompt_tokens, show)
        assert isinstance(body, ResponseRequest)
        self._number = 0
        self._item_id = f"msg_{uuid.uuid4().hex}"
        self._opened: list[int] = []
        """The items whose stream has begun: -1 is the message, the others are calls."""
        self._sent = 0
        """Tokens of the message that are in the stream."""
        form = body.text and body.text.format
        wanted = form and form.model_dump(by_alias=True, exclude_unset=True)
        choice = body.tool_choice
        self._head = {
            "id": self._head["id"],
            "object": "response",
            "created_at": float(self._head["created"]),
            "model": model,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_logprobs": body.alternatives,
            "user": body.user,
            "text": {"format": wanted or {"type": "text"}},
            "tools": [tool.model_dump() for tool in body.tools or []],
            "tool_choice": choice.model_dump() if isinstance(choice, Strict) else choice or "auto",
            "parallel_tool_calls": body.choice().parallel,
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
        }

    def content(self, text: str, tokens: Sequence[Token], chunk: bool) -> dict[str, Any]:  # noqa: ARG002
        """Return the part of the message that holds its text."""
        log_probs = listed(tokens, self._show) if self.log_probs else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": log_probs}

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the response with its message and its calls."""
        (answer,) = answers
        numbers = [*range(len(answer.call_ids))]
        items = [
            self._item(answer, number) for number in ([-1, *numbers] if answer.content or not numbers else numbers)
        ]
        return self._response(self._status(answer), items, self._usage(answers))

    def opening(self, answer: Answer) -> Iterator[dict[str, Any]]:
        """Yield the events that open the response, and its message where there can be nothing else."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response("in_progress", [], None))
        if answer.reader is None:
            yield from self._open(answer, -1)

    def chunks(self, answer: Answer, text: str, tokens: Sequence[Token]) -> Iterator[dict[str, Any]]:
        """Yield the events with the next text and its tokens, and with what came of calls."""
        if text or (answer.reader is None and tokens):
            if not self._opened:
                yield from self._open(answer, -1)
            log_probs = []
            if self.log_probs:
                said = self._said(answer)
                log_probs, self._sent = listed(said[self._sent :], self._show), len(said)
            yield self._part_event("response.output_text.delta", delta=text, logprobs=log_probs)
        for piece in answer.pieces:
            if piece.name is not None:
                yield from self._close(answer)
                yield from self._open(answer, piece.number)
            if piece.arguments:
                yield self._call_event(answer, "delta", delta=piece.arguments)

    def ending(self, answer: Answer) -> Iterator[dict[str, Any]]:
        """Yield the events that close what is open."""
        if not self._opened:
            yield from self._open(answer, -1)
        yield from self._close(answer)

    def closing(self, answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
        """Yield the event with the whole response."""
        yield self._event(f"response.{self._status(answers[0])}", response=self.whole(answers))

    def failure(self, error: ApiError) -> dict[str, Any]:
        """Return the event that ends a stream which failed."""
        return self._event("error", code=error.code or error.kind, message=error.message, param=error.param)

    def _open(self, answer: Answer, number: int) -> Iterator[dict[str, Any]]:
        """Yield the events that open an item."""
        self._opened.append(number)
        item = self._item(answer, number)
        empty: dict[str, Any] = {"content": []} if number < 0 else {"arguments": ""}
        item |= {"status": "in_progress"} | empty
        yield self._event("response.output_item.added", output_index=len(self._opened) - 1, item=item)
        if number < 0:
            yield self._part_event("response.content_part.added", part=self.content("", [], chunk=True))

    def _close(self, answer: Answer) -> Iterator[dict[str, Any]]:
        """Yield the events that close the last item, if there is one."""
        if not self._opened:
            return
        item = self._item(answer, self._opened[-1])
        if self._opened[-1] < 0:
            (part,) = item["content"]
            yield self._part_event("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
            yield self._part_event("response.content_part.done", part=part)
        else:
            yield self._call_event(answer, "done", name=item["name"], arguments=item["arguments"])
        yield self._event("response.output_item.done", output_index=len(self._opened) - 1, item=item)

    def _said(self, answer: Answer) -> Sequence[Token]:
        """Return the tokens of the message so far: those of calls are no part of it."""
        if answer.reader is None:
            return answer.tokens
        return [token for token in answer.tokens if token.offset < len(answer.content)]

    def _status(self, answer: Answer) -> str:
        return "incomplete" if answer.finish == "length" else "completed"

    def _item(self, answer: Answer, number: int) -> dict[str, Any]:
        """Return a call as it is now, or the message (-1)."""
        if number < 0:
            content = [self.content(answer.content, self._said(answer), chunk=False)]
            status = self._status(answer)
            return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}
        assert answer.reader is not None
        name = answer.call_ids[number]
        head = {"id": name.replace("call", "fc", 1), "call_id": name, "type": "function_call", "status": "completed"}
        return {**head, **answer.reader.calls[number]._asdict()}

    def _response(self, status: str, output: list[Any], usage: dict[str, Any] | None) -> dict[str, Any]:
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        state = {"status": status, "error": None, "incomplete_details": details, "output": output, "usage": usage}
        return {**self._head, **state}

    def _usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        usage = super()._usage(answers)
        return {
            "input_tokens": usage.pop("prompt_tokens"),
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": usage.pop("completion_tokens"),
            "output_tokens_details": {"reasoning_tokens": 0},
            **usage,
        }

    def _event(self, kind: str, **content: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **content}

    def _part_event(self, kind: str, **content: Any) -> dict[str, Any]:
        return self._event(kind, item_id=self._item_id, output_index=0, content_index=0, **content)

    def _call_event(self, answer: Answer, end: str, **content: Any) -> dict[str, Any]:
        kind, item = f"response.function_call_arguments.{end}", self._item(answer, self._opened[-1])
        return self._event(kind, item_id=item["id"], output_index=len(self._opened) - 1, **content)


def diffusion_step(answer: Answer, step: Step, token_texts: TokenTexts) -> dict[str, Any]:
    """Return one step as the page draws it: the active block, or the whole of a text with slots."""
    event, request, start = step.event, answer.request, step.start
    size = min(len(event.ids), answer.limit - start)
    slots = request.slot_G[start : start + size].tolist()
    committed, confidence, forced = event.committed[:size], event.confidence[:size], event.forced[:size]
    states = "".join(
        "f" if not slot else "g" if free else "c" if sure else "m" if math.isnan(p) else "p"
        for slot, free, sure, p in zip(slots, forced, committed, confidence, strict=True)
    )
    ids = [None if state == "m" else token_id for state, token_id in zip(states, event.ids[:size], strict=True)]
    ends = [at for at, token_id in enumerate(ids) if token_id in request.settings.eos_ids and states[at] in "cg"]
    if ends:
        ids[ends[0] :] = [None] * (len(ids) - ends[0])
    texts = token_texts(ids)
    confidences = [round(p, 4) if state in "pcg" else None for state, p in zip(states, confidence, strict=True)]
    if answer.slot:
        texts, states = [answer.detokenizer.show(request.prompt_P.tolist()), *texts], "f" + states
        confidences = [None, *confidences]
    return {
        "object": "diffusion.step",
        "index": answer.index,
        "block": event.block,
        "step": event.step,
        "forwards": step.forwards,
        "start": start,
        "texts": texts,
        "states": states,
        "confidences": confidences,
    }
