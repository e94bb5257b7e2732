"""How calls of tools are written in an answer: read off a chat template, and read again from an answer as it comes."""

import json
import re
from functools import lru_cache
from typing import Any, NamedTuple

from illada.errors import IlladaError
from illada.text.chat import render


class ToolCall(NamedTuple):
    """A call that an answer holds."""

    name: str
    arguments: str
    """A JSON object as the model wrote it."""


class CallPiece(NamedTuple):
    """What has come of a call since the last piece of it."""

    number: int
    """Of the call in its answer, from 0."""
    name: str | None
    """In the first piece of a call."""
    arguments: str


class CallFormat(NamedTuple):
    """How calls are written: opening, name, middle, arguments, closing, with `between` from one to the next name."""

    opening: str
    middle: str
    between: str | None
    """None where a template writes one call at most."""
    closing: str
    known: bool
    """Whether the chat template writes the section of tools, the calls and their results by itself."""


OURS = CallFormat(
    opening='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    between='}\n</tool_call>\n<tool_call>\n{"name": "',
    closing="}\n</tool_call>",
    known=False,
)


class CallReader:
    """Reads an answer as it comes: its text, and the calls in it.

    Args:
        form: how the calls are written.
    """

    def __init__(self, form: CallFormat):
        self._form, self._left, self._read = form, "", self._read_text
        self._depth, self._quoted, self._escaped = 0, False, False
        self.content = ""
        self.calls: list[ToolCall] = []

    def take(self, text: str, last: bool = False) -> tuple[str, list[CallPiece]]:
        """Take more text; return the text outside the calls, and the pieces of calls, that are known by now."""
        self._left += text
        before, pieces = len(self.content), []
        while (piece := self._read(last)) is not None:
            if piece.name is not None:
                self.calls.append(ToolCall(piece.name, ""))
            if piece.name is not None or piece.arguments:
                pieces.append(piece)
                self.calls[-1] = ToolCall(self.calls[-1].name, self.calls[-1].arguments + piece.arguments)
        return self.content[before:], pieces

    # Each reads from what is left; None when it waits for more.

    def _read_text(self, last: bool) -> CallPiece | None:
        opening = self._form.opening
        text, found, rest = self._left.partition(opening)
        kept = 0
        if not found and not last:  # what may be the beginning of a call
            kept = next(size for size in range(min(len(opening), len(text)), -1, -1) if text.endswith(opening[:size]))
        self.content += text[: len(text) - kept]
        self._left = rest if found else text[len(text) - kept :]
        if not found:
            return None
        self._read = self._read_name
        return self._read_name(last)

    def _read_name(self, last: bool) -> CallPiece | None:
        name, found, rest = self._left.partition(self._form.middle)
        if not found:
            if last:  # it was no call: another form may begin alike
                self.content, self._left = self.content + self._form.opening + self._left, ""
            return None
        self._left, self._read = rest, self._read_arguments
        return CallPiece(len(self.calls), name, "")

    def _read_arguments(self, last: bool) -> CallPiece | None:  # noqa: ARG002
        for place, letter in enumerate(self._left):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._quoted, self._escaped = letter != '"', letter == "\\"
            else:
                self._quoted = letter == '"'
                self._depth += (letter in "{[") - (letter in "}]")
                if not self._depth:
                    self._read = self._read_behind
                    return self._piece(place + 1)
        return self._piece(len(self._left)) if self._left else None

    def _piece(self, size: int) -> CallPiece:
        piece, self._left = self._left[:size], self._left[size:]
        return CallPiece(len(self.calls) - 1, None, piece)

    def _read_behind(self, last: bool) -> CallPiece | None:
        between = self._form.between
        if between and self._left.startswith(between):
            self._left, self._read = self._left.removeprefix(between), self._read_name
            return self._read_name(last)
        return None


# How a template writes calls

_PROBES = (("probe_one", {"first key": "one"}), ("probe_two", {"second key": "two"}))


@lru_cache(maxsize=8)
def call_format(tokenizer: Any, _template: str) -> CallFormat:
    """Return how a tokenizer's chat template writes calls, ours where it does not or in no way that a form can hold."""
    try:
        return _probed(tokenizer) or OURS
    except IlladaError:
        return OURS


def _probed(tokenizer: Any) -> CallFormat | None:
    parameters = {"type": "object", "properties": {}}
    tools = [
        {"type": "function", "function": {"name": name, "description": "probe", "parameters": parameters}}
        for name, _ in _PROBES
    ]
    question = {"role": "user", "content": "question"}
    section = tokenizer.decode(render(tokenizer, [question], "template", generation=True, tools=tools))
    if not all(name in section for name, _ in _PROBES):
        return None
    first = _calls_of(tokenizer, question, tools, 1)
    if first is None or not first[0].strip():
        return None
    opening, middle, closing = first
    between = None
    try:
        two = _calls_of(tokenizer, question, tools, 2)
    except IlladaError:  # a template may allow one call only
        two = None
    if two is not None and two[1] == two[3] == middle and two[4] == closing:
        between = two[2]
    if "</think>" in opening:  # thoughts that are left out of what was answered
        opening = opening.rpartition("</think>")[2].lstrip()
    return CallFormat(opening, middle, between, closing, known=True) if opening.strip() else None


def _calls_of(tokenizer: Any, question: dict[str, Any], tools: list[Any], count: int) -> tuple[str, ...] | None:
    """Return what the template writes around the names and arguments of some calls; None where they are not there."""
    calls: list[dict[str, Any]] = [
        {"id": f"call{number:05}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(_PROBES[:count])
    ]
    turn = {"role": "assistant", "content": "", "tool_calls": calls}
    results = [
        {
            "role": "tool",
            "content": f"result {call['id']}",
            "tool_call_id": call["id"],
            "name": call["function"]["name"],
        }
        for call in calls
    ]
    prompt = render(tokenizer, [question], "template", generation=True, tools=tools)
    answered = render(tokenizer, [question, turn], "template", generation=False, tools=tools)
    whole = tokenizer.decode(render(tokenizer, [question, turn, *results], "template", generation=True, tools=tools))
    if not all(result["content"] in whole for result in results):
        return None
    # Where the answer begins is seen in the texts: a token may hold the prompt's end and what follows it.
    begun = tokenizer.decode(prompt)
    same = next((at for at, pair in enumerate(zip(prompt, answered, strict=False)) if pair[0] != pair[1]), len(prompt))
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    end = next((at for at in range(same, len(answered)) if answered[at] in special), len(answered))
    text = tokenizer.decode(answered[:end])
    if not text.startswith(begun):
        return None
    written = [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in _PROBES[:count]]
    pattern = "(.*?)".join(re.escape(part) for pair in written for part in pair)
    found = re.fullmatch(f"(.*?){pattern}(.*)", text.removeprefix(begun), re.DOTALL)
    return None if found is None else found.groups()
