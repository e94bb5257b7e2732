"""How answers are written, whole or in chunks: the JSON objects of each kind of request."""

import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from illada.serving.answer import Answer, Step
from illada.serving.detokenize import Token, TokenTexts


class Responses(ABC):
    """Writes the answers to one HTTP request, with log-probabilities if they are wanted."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, log_probs: bool, prompt_tokens: int):
        self.log_probs, self._prompt_tokens = log_probs, prompt_tokens
        self._head = {
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

    def opening(self, answer: Answer) -> dict[str, Any] | None:  # noqa: ARG002
        """Return the chunk before an answer's text, if there is one."""
        return None

    def chunk(self, answer: Answer, text: str, tokens: Sequence[Token], last: bool = False) -> dict[str, Any]:
        """Return the chunk with the next text and tokens of an answer; the last one says why it ended."""
        return self._chunk([self._choice(answer, self.content(text, tokens, chunk=True), last)])

    def usage_chunk(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the chunk after all answers."""
        return {**self._chunk([]), "usage": self._usage(answers)}

    def _choice(self, answer: Answer, content: dict[str, Any], last: bool) -> dict[str, Any]:
        fills = {"fills": answer.fills()} if answer.slot and last else {}
        return {"index": answer.index, **content, "finish_reason": answer.finish if last else None, **fills}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_object, "choices": choices}

    def _usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the tokens as OpenAI counts them, and the forward passes that each answer took part in."""
        # Given text has no log-probability.
        tokens = sum(token.log_prob is not None for answer in answers for token in answer.tokens)
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
            "top_logprobs": [None if token.log_prob is None else {token.text: token.log_prob} for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }
        return {"text": text, "logprobs": log_probs}


class ChatResponses(Responses):
    """Writes the answers of `/v1/chat/completions`."""

    prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def opening(self, answer: Answer) -> dict[str, Any]:
        """Return the chunk that says who speaks."""
        content = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
        return self._chunk([self._choice(answer, content, last=False)])

    def content(self, text: str, tokens: Sequence[Token], chunk: bool) -> dict[str, Any]:
        """Return message or delta, and log-probabilities."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if chunk:
            message = {"content": text} if text else {}
        log_probs = None
        if self.log_probs:
            content = [
                {"token": token.text, "logprob": token.log_prob, "bytes": [*token.text.encode()], "top_logprobs": []}
                for token in tokens
            ]
            log_probs = {"content": content, "refusal": None}
        return {"delta" if chunk else "message": message, "logprobs": log_probs}


def diffusion_step(answer: Answer, step: Step, token_texts: TokenTexts) -> dict[str, Any]:
    """Return one step as the page draws it: the active block, or the whole of a text with slots."""
    event, request = step.event, answer.request
    start = 0 if request.template else event.block
    size = min(len(event.ids), answer.limit - start)
    slots = request.slot_G[start : start + size].tolist()
    committed, confidence = event.committed[:size], event.confidence[:size]
    states = "".join(
        "f" if not slot else "c" if sure else "m" if math.isnan(p) else "p"
        for slot, sure, p in zip(slots, committed, confidence, strict=True)
    )
    ids = [None if state == "m" else token_id for state, token_id in zip(states, event.ids[:size], strict=True)]
    ends = [at for at, token_id in enumerate(ids) if token_id in request.settings.eos_ids and states[at] == "c"]
    if ends:
        ids[ends[0] :] = [None] * (len(ids) - ends[0])
    texts = token_texts(ids)
    confidences = [round(p, 4) if state in "pc" else None for state, p in zip(states, confidence, strict=True)]
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
