"""Calls of tools: how a model is told of its tools, what its answer may be, and the calls that are in it.

A chat template that has a section of tools is used as it is, and its way to write a call is read off by rendering two
calls. Where it has none, or writes calls in another form than JSON or with special tokens, the section and the calls
are ours (those of Hermes and Qwen). Either way an answer's calls match the tools' schemas, because its form says so.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from illada.errors import IlladaError
from illada.files import parse_json
from illada.generation.optional.call_format import OURS, CallReader, ToolCall, call_format
from illada.generation.optional.schema import schema_regex
from illada.text.chat import encode_prompt, render

MOST_TOOLS = 128

_SECTION = """# Tools

These functions can be called; each line describes one:
{tools}

To call functions, write for each its name and its arguments, as JSON between <tool_call> and </tool_call>:
<tool_call>
{{"name": "NAME", "arguments": {{}}}}
</tool_call>"""
"""What stands behind the system message where the template knows no tools."""

_NEXT = {"system": ("user",), "user": ("assistant",), "assistant": ("user",), "tool": ("assistant", "user")}
"""Who may speak after whom, where no call waits for its result."""

_RESULT = "<tool_response>\n{}\n</tool_response>"


class Tools:
    """Functions that a model may call.

    Args:
        definitions: the functions as OpenAI's APIs describe them, {"type": "function", "function": {"name",
            "description", "parameters"}} or without the inner object; parameters are a JSON Schema, none without.
        tokenizer: one of transformers, with a chat template.

    Raises:
        IlladaError: when a definition cannot be used.
    """

    def __init__(self, definitions: Sequence[Mapping[str, Any]], tokenizer: Any):
        if not isinstance(definitions, Sequence) or isinstance(definitions, str) or len(definitions) > MOST_TOOLS:
            raise IlladaError(f"tools must be a list of at most {MOST_TOOLS} functions")
        self._tokenizer = tokenizer
        self.format = call_format(tokenizer, str(tokenizer.chat_template))
        self._functions = [_function(definition, number) for number, definition in enumerate(definitions)]
        self.names = [function["name"] for function in self._functions]
        if twice := next((name for name in self.names if self.names.count(name) > 1), None):
            raise IlladaError(f"tools: two are named {twice!r}")
        if self.format.known and self._functions:
            try:
                self._rendered([{"role": "user", "content": "question"}], "template")
            except IlladaError:  # some templates know a few kinds of schemas only
                self.format = OURS

    def encode(self, messages: Sequence[Mapping[str, Any]], record: str = "conversation") -> list[int]:
        """Return the ids after which the answer is generated.

        Messages of the assistant may have `tool_calls`, each with an `id` and a `function` of `name` and `arguments`
        (an object, or its JSON), and messages of the role `tool` give the result of one, named by `tool_call_id`.

        Raises:
            IlladaError: when the messages come in another order, or the chat template refuses them.
        """
        turns = _checked(messages, record)
        if not self.format.known:
            try:
                written = self._written(turns)
            except RecursionError:  # what could just be read
                raise IlladaError(f"{record}: the arguments of a call are nested too deeply") from None
            return encode_prompt(self._tokenizer, written, record)
        return self._rendered(turns, record)

    def _rendered(self, turns: list[dict[str, Any]], record: str) -> list[int]:
        """Return what the template makes of a conversation and the tools."""
        # Templates of Hermes and Granite take it for granted that there is a description.
        described = [{"name": function["name"], "description": "", **function} for function in self._functions]
        shown = [{"type": "function", "function": function} for function in described]
        return render(self._tokenizer, turns, record, generation=True, tools=shown or None)

    def regex(
        self,
        choice: str = "auto",
        names: Sequence[str] | None = None,
        parallel: bool = True,
        content: str | None = None,
    ) -> str:
        """Return what an answer must match.

        Args:
            choice: "auto" for any text without calls, or calls behind some text; "required" for calls only.
            names: the functions that may be called, all of them by default.
            parallel: whether several calls may be in an answer.
            content: what an answer without calls must match, as a regular expression.

        Raises:
            IlladaError: when a function is not there, or its schema cannot be a form.
        """
        if choice not in ("auto", "required"):
            raise IlladaError(f"tool_choice must be auto or required, got {choice!r}")
        chosen = [function for function in self._functions if names is None or function["name"] in names]
        if unknown := [name for name in names or () if name not in self.names]:
            raise IlladaError(f"tool_choice names {unknown[0]!r}, which is none of the tools")
        if not chosen:
            raise IlladaError("tool_choice needs tools to choose from: give some")
        one = "|".join(
            f"{re.escape(function['name'] + self.format.middle)}{_arguments(function)}" for function in chosen
        )
        between = self.format.between if parallel else None
        more = f"({re.escape(between)}({one}))*" if between else ""
        calls = f"{re.escape(self.format.opening)}({one}){more}{re.escape(self.format.closing)}"
        if choice == "required":
            return calls
        if content is not None:
            return f"({calls}|{content})"
        # What begins as a call has to be one.
        return f"{_without(self.format.opening.lstrip().partition(chr(10))[0])}({calls})?"

    def reader(self) -> CallReader:
        """Return what reads one answer as it comes."""
        return CallReader(self.format)

    def read(self, text: str) -> tuple[str, list[ToolCall]]:
        """Return the text of an answer outside its calls, and the calls."""
        reader = self.reader()
        reader.take(text, last=True)
        return reader.content, reader.calls

    def _written(self, turns: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
        """Return a conversation in system, user and assistant messages alone, with our section of tools."""
        plain: list[dict[str, str]] = []
        for turn in turns:
            role, content = turn["role"], turn["content"]
            if role == "assistant" and "tool_calls" in turn:
                content += self._calls([call["function"] for call in turn["tool_calls"]])
            elif role == "tool":
                role, content = "user", _RESULT.format(content)
            if plain and plain[-1]["role"] == role == "user":
                plain[-1]["content"] += f"\n{content}"
            else:
                plain.append({"role": role, "content": content})
        if self._functions:
            tools = "\n".join(json.dumps(function, ensure_ascii=False) for function in self._functions)
            section = _SECTION.format(tools=tools)
            if plain[0]["role"] == "system":
                plain[0]["content"] += f"\n\n{section}"
            else:
                plain.insert(0, {"role": "system", "content": section})
        return plain

    def _calls(self, functions: Sequence[Mapping[str, Any]]) -> str:
        written = [
            f"{one['name']}{self.format.middle}{json.dumps(one['arguments'], ensure_ascii=False)}" for one in functions
        ]
        return self.format.opening + (self.format.between or "").join(written) + self.format.closing


def _function(definition: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return the name, description and parameters of a function."""
    inner = definition.get("function", definition) if isinstance(definition, Mapping) else None
    if not isinstance(inner, Mapping) or definition.get("type", "function") != "function":
        raise IlladaError(f"tools: tool {number} is no function: give an object with type function, and its name")
    name, description, parameters = (inner.get(key) for key in ("name", "description", "parameters"))
    if not isinstance(name, str) or not re.fullmatch("[a-zA-Z0-9_-]{1,64}", name):
        raise IlladaError(f"tools: the name of tool {number} must be 1 to 64 letters, digits, _ or -")
    if not isinstance(description, str | None):
        raise IlladaError(f"tools: the description of {name} must be a text")
    if not isinstance(parameters, Mapping | None):
        raise IlladaError(f"tools: the parameters of {name} must be a JSON Schema, an object")
    if parameters is not None and parameters.get("type", "object") != "object":
        raise IlladaError(f"tools: the parameters of {name} must be of type object")
    empty = {"type": "object", "properties": {}}
    described = {"name": name} if description is None else {"name": name, "description": description}
    return {**described, "parameters": empty if parameters is None else {"type": "object", **parameters}}


def _arguments(function: Mapping[str, Any]) -> str:
    """Return the expression of a function's arguments."""
    try:
        return schema_regex(function["parameters"])
    except IlladaError as error:
        text = str(error).removeprefix("json_schema").lstrip(" :")
        raise IlladaError(f"tools: the parameters of {function['name']}: {text}") from None


def _without(word: str) -> str:
    """Return an expression of the texts without a word, or without its beginning up to where its first letter recurs.

    After each first letter comes a text that has no other one and does not go on with the rest of the word.
    """
    first, rest = word[0], word[1 : word.find(word[0], 1) if word[0] in word[1:] else None]
    tail = None
    for letter in reversed(rest):
        more = f"[^{_in_class(first + letter)}][^{_in_class(first)}]*"
        tail = f"({more}|{re.escape(letter)}{tail})?" if tail else f"({more})?"
    other = f"[^{_in_class(first)}]*"
    return f"{other}({re.escape(first)}{tail})*" if tail else other


def _in_class(letters: str) -> str:
    return "".join(rf"\{letter}" if letter in r"\]^-[" else letter for letter in letters)


def _checked(messages: Sequence[Mapping[str, Any]], record: str) -> list[dict[str, Any]]:
    """Return the messages as chat templates know them: after calls come their results, the last is to be answered.

    Calls get ids of our own: Mistral's templates take nine letters and digits and no other id.
    """
    turns: list[dict[str, Any]] = []
    open_calls: list[tuple[str, dict[str, Any]]] = []
    count = 0
    for number, message in enumerate(messages):
        name = f"{record}: message {number}"
        if not isinstance(message, Mapping):
            raise IlladaError(f"{name} is not an object with role and content")
        role, content = message.get("role"), message.get("content")
        wanted = ("tool",) if open_calls else _NEXT[turns[-1]["role"] if turns else "system"]
        if role not in wanted and not (number == 0 and role == "system"):
            raise IlladaError(f"{name} is from {role!r}, expected {' or '.join(map(repr, wanted))}")
        calls = message.get("tool_calls") if role == "assistant" else None
        if content is None and calls:
            content = ""
        if not isinstance(content, str):
            raise IlladaError(f"{name} needs a content, a text")
        turn: dict[str, Any] = {"role": role, "content": content}
        if role == "tool":
            turn |= _result(message.get("tool_call_id"), open_calls, name)
        elif calls:
            open_calls = [_call(call, f"call{count + at:05}", name) for at, call in enumerate(calls)]
            turn["tool_calls"] = [call for _, call in open_calls]
            count += len(open_calls)
        turns.append(turn)
    if open_calls:
        raise IlladaError(f"{record}: the result of the call {open_calls[0][0]!r} is missing")
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        raise IlladaError(f"{record}: the last message must be from 'user' or 'tool', to be answered")
    return turns


def _result(given: Any, open_calls: list[tuple[str, dict[str, Any]]], name: str) -> dict[str, str]:
    """Return what a result says of the call that it is of, which is no longer open then."""
    found = next((pair for pair in open_calls if pair[0] == given), None)
    if found is None:
        open_ids = [call_id for call_id, _ in open_calls]
        raise IlladaError(f"{name} has the tool_call_id {given!r}, but open calls are {open_ids}")
    open_calls.remove(found)
    return {"tool_call_id": found[1]["id"], "name": found[1]["function"]["name"]}


def _call(call: Any, own_id: str, name: str) -> tuple[str, dict[str, Any]]:
    """Return the id of a call of a message, and the call with its arguments as an object and another id."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(call.get("id"), str):
        raise IlladaError(f"{name}: a call needs an id, and a function with a name and arguments")
    arguments = function.get("arguments")
    try:
        # Some clients write no arguments as nothing.
        arguments = parse_json(arguments or "{}") if isinstance(arguments, str) else arguments
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict) or not isinstance(function.get("name"), str):
        raise IlladaError(f"{name}: the arguments of call {call['id']} must be a JSON object, and its name a text")
    plain = {"name": function["name"], "arguments": arguments}
    return call["id"], {"id": own_id, "type": "function", "function": plain}
