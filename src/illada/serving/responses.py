"""How answers are written, whole or in chunks: the JSON objects of each kind of request."""

import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

from illada.serving.answer import Answer, Step
from illada.serving.detokenize import Token, TokenTexts
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


class ItemResponses(Responses):
    """Writes the answer of `/v1/responses`: one message, or the typed events of its stream."""

    prefix, whole_object, chunk_object = "resp_", "response", "response"
    end = None

    def __init__(self, model: str, body: Body, prompt_tokens: int, show: Callable[[int], str]):
        super().__init__(model, body, prompt_tokens, show)
        assert isinstance(body, ResponseRequest)
        self._number = 0
        self._item_id = f"msg_{uuid.uuid4().hex}"
        form = body.text and body.text.format
        wanted = form and form.model_dump(by_alias=True, exclude_unset=True)
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
            "tools": [],
            "tool_choice": "none",
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
        }

    def content(self, text: str, tokens: Sequence[Token], chunk: bool) -> dict[str, Any]:  # noqa: ARG002
        """Return the part of the message that holds its text."""
        log_probs = listed(tokens, self._show) if self.log_probs else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": log_probs}

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the response with its one message."""
        (answer,) = answers
        return self._response(self._status(answer), [self._message(answer)], self._usage(answers))

    def opening(self, answer: Answer) -> Iterator[dict[str, Any]]:  # noqa: ARG002
        """Yield the events that open the response, its message and the message's text."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response("in_progress", [], None))
        message = {"id": self._item_id, "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        yield self._event("response.output_item.added", output_index=0, item=message)
        yield self._part_event("response.content_part.added", part=self.content("", [], chunk=True))

    def chunks(self, answer: Answer, text: str, tokens: Sequence[Token]) -> Iterator[dict[str, Any]]:  # noqa: ARG002
        """Yield the event with the next text and tokens."""
        log_probs = listed(tokens, self._show) if self.log_probs else []
        yield self._part_event("response.output_text.delta", delta=text, logprobs=log_probs)

    def ending(self, answer: Answer) -> Iterator[dict[str, Any]]:
        """Yield the events that close the text and the message."""
        part = self.content(answer.content, answer.tokens, chunk=False)
        yield self._part_event("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
        yield self._part_event("response.content_part.done", part=part)
        yield self._event("response.output_item.done", output_index=0, item=self._message(answer))

    def closing(self, answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
        """Yield the event with the whole response."""
        yield self._event(f"response.{self._status(answers[0])}", response=self.whole(answers))

    def failure(self, error: ApiError) -> dict[str, Any]:
        """Return the event that ends a stream which failed."""
        return self._event("error", code=error.code or error.kind, message=error.message, param=error.param)

    def _status(self, answer: Answer) -> str:
        return "incomplete" if answer.finish == "length" else "completed"

    def _message(self, answer: Answer) -> dict[str, Any]:
        content = [self.content(answer.content, answer.tokens, chunk=False)]
        status = self._status(answer)
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}

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
