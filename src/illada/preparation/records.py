"""What a record of a file says: a text, a conversation, or a preference pair.

A pair is two answers to one prompt, in the forms that TRL's trainers take ("explicit" and "implicit" prompts of
https://huggingface.co/docs/trl/dataset_formats).
"""

from typing import Any, Literal

from illada.errors import IlladaError
from illada.text.chat import Message, check_messages

Kind = Literal["text", "chat", "preference"]
CONTENTS: dict[Kind, str] = {"preference": "preference pairs", "chat": "conversations", "text": "text"}
FIELDS: dict[Kind, tuple[str, ...]] = {
    "chat": ("messages", "prompt", "response"),
    "preference": ("prompt", "messages", "chosen", "rejected"),
}
"""The fields that are read; a text has one of its own choice."""


def kind_of_record(record: Any) -> Literal["chat", "preference"] | None:
    """Say what a record is by its fields, unless it is a text or something unknown."""
    if not isinstance(record, dict):
        return None
    if "chosen" in record and "rejected" in record:
        return "preference"
    return "chat" if "messages" in record or ("prompt" in record and "response" in record) else None


def text_of(record: dict[str, Any], text_field: str) -> str:
    """Return the text of a record.

    Raises:
        IlladaError: when there is none, saying what the record is instead.
    """
    text, kind = record.get(text_field), kind_of_record(record)
    if text_field not in record and kind:
        what = "a conversation" if kind == "chat" else "a preference pair"
        raise IlladaError(f"no field {text_field!r}, it is {what}: set kind {kind}")
    if text_field not in record:
        raise IlladaError(
            f"no field {text_field!r}; it has {', '.join(map(repr, list(record)[:8]))}: set text_field, or write "
            'conversations as {"messages": [...]} or {"prompt", "response"}, pairs as {"prompt", "chosen", "rejected"}'
        )
    if not isinstance(text, str):
        raise IlladaError(f"field {text_field!r} is not text")
    return text


def conversation_of(record: dict[str, Any]) -> list[dict[str, str]]:
    """Return the messages of a record {"messages": [...]} or {"prompt": ..., "response": ...}.

    Raises:
        IlladaError: when it has another form.
    """
    messages = record.get("messages")
    if messages is None:
        if kind_of_record(record) == "preference":
            raise IlladaError("neither messages nor response, it is a preference pair: set kind preference")
        if "prompt" not in record or "response" not in record:
            raise IlladaError("neither messages nor prompt and response")
        messages = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["response"]},
        ]
    return check_messages(messages, "assistant")


def pair_of(record: dict[str, Any]) -> list[dict[str, str]]:
    """Return the messages of a pair's prompt and, behind them, the chosen and the rejected answer.

    The record is {"prompt" or "messages", "chosen", "rejected"} or, where the prompt is the beginning of both
    conversations, {"chosen", "rejected"}; each is a text or messages.

    Raises:
        IlladaError: when it has another form, or the answers are not to the same prompt.
    """
    if missing := [side for side in ("chosen", "rejected") if record.get(side) is None]:
        raise IlladaError(f"no {' and no '.join(missing)} answer")
    prompt = record.get("messages") if record.get("prompt") is None else record["prompt"]
    chosen, rejected = (
        check_messages(_with_prompt(prompt, record[side]), "assistant", side) for side in ("chosen", "rejected")
    )
    if chosen[:-1] != rejected[:-1]:
        raise IlladaError("chosen and rejected differ before their last message: they must answer the same prompt")
    return [*chosen, rejected[-1]]


def both_sides(pair: list[Message]) -> list[list[Message]]:
    """Return the chosen and the rejected conversation of what `pair_of` returns."""
    return [pair[:-1], [*pair[:-2], pair[-1]]]


def _with_prompt(prompt: Any, answer: Any) -> list[Any]:
    """Return the messages of one side of a pair; `check_messages` has yet to check them."""
    if prompt is not None and not isinstance(prompt, str | list):
        raise IlladaError("the prompt is neither text nor messages")
    if isinstance(answer, str):
        if prompt is None:
            raise IlladaError("chosen and rejected are texts without a prompt: add one, or write them as messages")
        answer = [{"role": "assistant", "content": answer}]
    if not isinstance(answer, list):
        raise IlladaError("chosen and rejected must be texts or messages")
    answers_only = bool(answer) and isinstance(answer[0], dict) and answer[0].get("role") == "assistant"
    if isinstance(prompt, str):
        # As in TRL, a text beside whole conversations is a name for them, not part of them.
        return [{"role": "user", "content": prompt}, *answer] if answers_only else answer
    prompt = prompt or []
    return answer if answer[: len(prompt)] == prompt else [*prompt, *answer]
