"""What a conversation is made of, as in OpenAI's two APIs: messages, calls of tools and their results."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from illada.errors import needs
from illada.serving.forms import Strict
from illada.serving.tools import Named

with needs("serve", "serving"):
    from pydantic import Discriminator, Field, Tag, model_validator

EMPTY = ("annotations", "audio", "function_call", "refusal", "tool_calls")
"""Fields of an answer that clients send back unchanged: null, or an empty list."""


class CalledFunction(Named):
    """A function with the arguments of a call."""

    arguments: str


class ChatCall(Strict):
    """A call in a message of the assistant."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """What one side says; the content is a text or a list of parts."""

    role: Any
    content: Any

    def plain(self) -> dict[str, Any]:
        """Return the role and content that chat templates know."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatMessage(Message):
    """A turn of a conversation; one of the role `tool` gives the result of a call."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None
    type: Literal["text", "message"] | None = None
    tool_calls: Annotated[list[ChatCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {name: value for name, value in data.items() if name not in EMPTY or value not in (None, [])}
        return {**data, "content": ""} if "tool_calls" in data and data.get("content") is None else data

    @model_validator(mode="after")
    def _of_its_role(self) -> "ChatMessage":
        for field, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, field) is not None and self.role != role:
                raise ValueError(f"{field} is for messages of the role {role}")
        return self

    def plain(self) -> dict[str, Any]:
        """Return the message as chat templates know it."""
        calls = {} if self.tool_calls is None else {"tool_calls": [call.model_dump() for call in self.tool_calls]}
        result = {} if self.tool_call_id is None else {"tool_call_id": self.tool_call_id}
        return {**super().plain(), **calls, **result}


class ItemPart(Strict):
    """A part of an item of a response's input."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Any = None
    logprobs: Any = None


class Item(Message):
    """A message among a response's input."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ItemPart], Field(fail_fast=True)]
    type: Literal["message"] | None = None
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class CallItem(Strict):
    """A call among a response's input."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None

    def plain(self) -> dict[str, Any]:
        """Return the call as a message of the assistant that chat templates know."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"role": "assistant", "content": "", "tool_calls": [{"id": self.call_id, "function": function}]}


class ResultItem(Strict):
    """The result of a call among a response's input."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | Annotated[list[ItemPart], Field(fail_fast=True)]
    id: str | None = None
    status: str | None = None

    def plain(self) -> dict[str, Any]:
        """Return the result as the message that chat templates know."""
        text = self.output if isinstance(self.output, str) else "".join(part.text for part in self.output)
        return {"role": "tool", "content": text, "tool_call_id": self.call_id}


ITEMS = {"function_call": CallItem, "function_call_output": ResultItem}
"""Items of a response's input that are no messages, by their types."""


def _kind_of_item(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) and kind in ITEMS else "message"


AnyItem = Annotated[
    Annotated[Item, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")],
    Discriminator(_kind_of_item),
]


def joined(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages in which the calls of one turn, items of their own before, stand in one message."""
    found: list[dict[str, Any]] = []
    for message in messages:
        if found and "tool_calls" in message and found[-1]["role"] == "assistant":
            calls = [*found[-1].get("tool_calls", ()), *message["tool_calls"]]
            found[-1] = {**found[-1], "tool_calls": calls}
        else:
            found.append(message)
    return found
