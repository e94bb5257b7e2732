"""How answers are written: the fields around them, whole or in pieces, of each kind of request."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from illada.serving.detokenize import Token
from illada.serving.streams import Choice

Told = Sequence[tuple[str, Token]]
"""Tokens with the text of each."""


def usage(choices: Sequence[Choice], prompt_tokens: int) -> dict[str, Any]:
    """Return what answers took: tokens as OpenAI counts them, and the forward passes that each took part in."""
    # Given text has no log-probability.
    tokens = sum(token.log_prob is not None for choice in choices for _, token in choice.tokens)
    forwards = sum(choice.forwards for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
        "forwards": forwards,
        "tokens_per_forward": round(tokens / forwards, 3) if forwards else 0.0,
    }


class Form(ABC):
    """What both kinds share.

    Args:
        model: its name.
        log_probs: whether they were asked for.
    """

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, log_probs: bool):
        self.log_probs = log_probs
        self._head = {
            "id": f"{self.prefix}{uuid.uuid4().hex}",
            "object": self.whole_object,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"illada-{version('illada')}",
        }

    @abstractmethod
    def body(self, choice: Choice, text: str, tokens: Told, chunk: bool) -> dict[str, Any]:
        """Return the fields of an answer, or of a piece of it."""

    def _choice(self, choice: Choice, body: dict[str, Any], finish: str | None) -> dict[str, Any]:
        fills = {"fills": choice.fills()} if choice.slot and finish else {}
        return {"index": choice.index, **body, "finish_reason": finish, **fills}

    def whole(self, choices: Sequence[Choice], used: dict[str, Any]) -> dict[str, Any]:
        """Return all answers at once."""
        bodies = [self.body(choice, choice.content, choice.tokens, chunk=False) for choice in choices]
        each = [self._choice(choice, body, choice.finish) for choice, body in zip(choices, bodies, strict=True)]
        return {**self._head, "choices": each, "usage": used}

    def opening(self, choice: Choice) -> dict[str, Any] | None:  # noqa: ARG002
        """Return the chunk before an answer's text, if there is one."""
        return None

    def chunk(self, choice: Choice, text: str, tokens: Told) -> dict[str, Any]:
        """Return a piece of an answer."""
        return self._chunk([self._choice(choice, self.body(choice, text, tokens, chunk=True), None)])

    def closing(self, choice: Choice) -> dict[str, Any]:
        """Return the chunk behind an answer."""
        return self._chunk([self._choice(choice, self.body(choice, "", [], chunk=True), choice.finish)])

    def usage_chunk(self, used: dict[str, Any]) -> dict[str, Any]:
        """Return the chunk behind all answers."""
        return {**self._chunk([]), "usage": used}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_object, "choices": choices}


class TextForm(Form):
    """Of `/v1/completions`."""

    prefix, whole_object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def body(self, choice: Choice, text: str, tokens: Told, chunk: bool) -> dict[str, Any]:  # noqa: ARG002
        """Return text and log-probabilities."""
        if not self.log_probs:
            return {"text": text, "logprobs": None}
        # Text may be told before the token in which it ends, so places follow from the tokens before.
        offset = sum(len(piece) for piece, _ in choice.tokens[: len(choice.tokens) - len(tokens)])
        offsets = []
        for piece, _ in tokens:
            offsets.append(offset)
            offset += len(piece)
        each = [(piece, token.log_prob) for piece, token in tokens]
        found = {
            "tokens": [piece for piece, _ in each],
            "token_logprobs": [value for _, value in each],
            "top_logprobs": [None if value is None else {piece: value} for piece, value in each],
            "text_offset": offsets,
        }
        return {"text": text, "logprobs": found}


class ChatForm(Form):
    """Of `/v1/chat/completions`."""

    prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def opening(self, choice: Choice) -> dict[str, Any]:
        """Return the chunk that says who speaks."""
        body = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
        return self._chunk([self._choice(choice, body, None)])

    def body(self, choice: Choice, text: str, tokens: Told, chunk: bool) -> dict[str, Any]:  # noqa: ARG002
        """Return message or delta, and log-probabilities."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if chunk:
            message = {"content": text} if text else {}
        found = None
        if self.log_probs:
            each = [
                {"token": piece, "logprob": token.log_prob, "bytes": [*piece.encode()], "top_logprobs": []}
                for piece, token in tokens
            ]
            found = {"content": each, "refusal": None}
        return {"delta" if chunk else "message": message, "logprobs": found}
