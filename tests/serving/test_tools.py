"""Calls of tools through the server: with the openai package's own helpers, in streams, in both APIs."""

import json
from types import SimpleNamespace

import httpx
import pytest

from illada import Tools
from illada.generation.optional.call_format import OURS, CallReader
from illada.serving.answer import Answer, Update
from illada.serving.detokenize import Detokenizer
from illada.serving.protocol import ResponseRequest
from illada.serving.responses import ItemResponses

CHAT, ITEMS = "/v1/chat/completions", "/v1/responses"
HELLO = [{"role": "user", "content": "one two"}]
SCHEMA = {
    "type": "object",
    "properties": {"town": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["town"],
    "additionalProperties": False,
}
WEATHER = {"name": "weather", "description": "The weather of a town.", "parameters": SCHEMA, "strict": True}
NOW = {"name": "now", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": one} for one in (WEATHER, NOW)]
FLAT = [{"type": "function", **one} for one in (WEATHER, NOW)]


@pytest.fixture(scope="module")
def tools_server(serve_model, served_model, build_model):
    model, tokenizer = served_model
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("mask", "bos", "eos", "pad")}
    model = build_model(tie=True, seed=3, vocab_size=len(tokenizer), max_position_embeddings=2048, **ids)
    with serve_model(model=model, max_new_tokens=160, block_length=16) as (address, _):
        yield address


def ask(server, path=CHAT, **body):
    given = {"messages": HELLO, "tools": TOOLS} if path == CHAT else {"input": "one two", "tools": FLAT}
    return httpx.post(server + path, json={**given, **body}, timeout=60)


def checked(calls):
    """Check calls, as (name, arguments) each, against the tools."""
    for name, arguments in calls:
        found = json.loads(arguments)
        if name == "now":
            assert found == {}
        else:
            assert name == "weather"
            assert found["town"] in ("Rome", "Oslo")
            assert found.keys() <= {"town", "days"}
            assert found.get("days", 0) <= 9
    return [*calls]


def calls_of(answer):
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    calls = choice["message"].get("tool_calls", [])
    assert (choice["finish_reason"] == "tool_calls") == bool(calls)
    assert len({call["id"] for call in calls}) == len(calls)
    return checked([(call["function"]["name"], call["function"]["arguments"]) for call in calls])


@pytest.mark.slow
def test_the_choice_says_what_may_be_called(tools_server):
    for seed in range(3):
        more = {"temperature": 1, "seed": seed}
        assert calls_of(ask(tools_server, tool_choice="required", **more))
        assert len(calls_of(ask(tools_server, tool_choice="required", parallel_tool_calls=False, **more))) == 1
        named = {"type": "function", "function": {"name": "weather"}}
        assert [name for name, _ in calls_of(ask(tools_server, tool_choice=named, **more))] == ["weather"]
        only = {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]}
        allowed = ask(tools_server, tool_choice={"type": "allowed_tools", "allowed_tools": only}, **more)
        assert {name for name, _ in calls_of(allowed)} == {"now"}
        calls_of(ask(tools_server, **more))
        assert not calls_of(ask(tools_server, tool_choice="none", **more))


def test_a_form_beside_tools_is_for_answers_without_calls(tools_server):
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["yes", "no"]}}}
    for seed in range(6):
        answer = ask(tools_server, response_format=form, temperature=2, seed=seed)
        calls, text = calls_of(answer), answer.json()["choices"][0]["message"]["content"]
        assert calls or text in ('"yes"', '"no"')
        assert not (calls and text)


def streamed(server, **body):
    text, calls, reason = "", {}, None
    with httpx.stream(
        "POST", server + CHAT, json={"messages": HELLO, "tools": TOOLS, "stream": True, **body}
    ) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            choice = json.loads(line[6:])["choices"][0]
            text += choice["delta"].get("content") or ""
            reason = choice["finish_reason"] or reason
            for piece in choice["delta"].get("tool_calls", []):
                call = calls.setdefault(piece["index"], {"id": piece.get("id"), "name": None, "arguments": ""})
                call["name"] = piece["function"].get("name", call["name"])
                call["arguments"] += piece["function"]["arguments"]
    return text, calls, reason


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_stream_of_calls_is_the_whole_in_pieces(tools_server, choice):
    for seed in range(3):
        body = {"tool_choice": choice, "temperature": 1, "seed": seed}
        answer = ask(tools_server, **body)
        message = answer.json()["choices"][0]["message"]
        text, calls, reason = streamed(tools_server, **body)
        assert text == (message["content"] or "")
        assert [(call["name"], call["arguments"]) for call in calls.values()] == calls_of(answer)
        assert reason == answer.json()["choices"][0]["finish_reason"]
        assert all(call["id"].startswith("call_") for call in calls.values())


@pytest.mark.slow
def test_the_conversation_goes_on_with_the_results(tools_server):
    message = ask(tools_server, tool_choice="required").json()["choices"][0]["message"]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "sunny"} for call in message["tool_calls"]]
    for more in ({}, {"tools": None}, {"tool_choice": "none"}):
        assert ask(tools_server, messages=[*HELLO, message, *results], **more).status_code == 200
    item = ask(tools_server, ITEMS, tool_choice="required").json()["output"]
    results = [{"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"} for call in item]
    again = ask(tools_server, ITEMS, input=[*HELLO, *item, *results])
    assert again.status_code == 200, again.text


def test_the_prompt_is_what_the_tools_make_of_it(tools_server, served_model):
    _, tokenizer = served_model
    messages = [*HELLO, {"role": "assistant", "content": "Look: "}]
    told = httpx.post(f"{tools_server}/tokenize", json={"messages": messages, "tools": TOOLS}).json()["tokens"]
    shown = [{name: value for name, value in one.items() if name != "strict"} for one in (WEATHER, NOW)]
    wanted = Tools(shown, tokenizer).encode(HELLO)
    assert told[: len(wanted)] == wanted
    assert tokenizer.decode(told[len(wanted) :]) == "Look: "
    assert ask(tools_server).json()["usage"]["prompt_tokens"] == len(wanted)


@pytest.mark.slow
def test_the_openai_packages_own_helpers(tools_server):
    openai = pytest.importorskip("openai")
    pydantic = pytest.importorskip("pydantic")

    class Weather(pydantic.BaseModel):
        """The weather of a town."""

        towns: list[bool]
        days: int | None

    client = openai.OpenAI(base_url=f"{tools_server}/v1", api_key="none", max_retries=0)
    given = {"model": "tiny", "tool_choice": "required", "parallel_tool_calls": False}
    tool = openai.pydantic_function_tool(Weather)
    (call,) = client.chat.completions.parse(messages=HELLO, tools=[tool], **given).choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    with client.chat.completions.stream(messages=HELLO, tools=[tool], **given) as events:
        kinds = {event.type for event in events}
        (call,) = events.get_final_completion().choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    flat = {"type": "function", **tool["function"]}
    (item,) = client.responses.parse(input="one two", tools=[flat], **given).output
    assert item.type == "function_call"
    Weather.model_validate_json(item.arguments)


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_response_tells_of_its_calls_in_typed_events(tools_server, choice):
    types = pytest.importorskip("openai.types.responses")
    adapter = pytest.importorskip("pydantic").TypeAdapter(types.ResponseStreamEvent)
    for seed in range(3):
        body = {"tool_choice": choice, "temperature": 1, "seed": seed}
        whole = ask(tools_server, ITEMS, **body).json()
        types.Response.model_validate(whole, strict=True)
        sent, arguments, added, done = {"input": "one two", "tools": FLAT, "stream": True, **body}, {}, [], []
        with httpx.stream("POST", tools_server + ITEMS, json=sent, timeout=60) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: "):
                    continue
                event = json.loads(line[6:])
                adapter.validate_python(event, strict=True)
                if event["type"] == "response.output_item.added":
                    added.append(event["item"]["id"])
                    assert event["output_index"] == len(added) - 1
                elif event["type"] == "response.function_call_arguments.delta":
                    assert event["item_id"] == added[-1]
                    arguments[added[-1]] = arguments.get(added[-1], "") + event["delta"]
                elif event["type"] == "response.output_item.done":
                    done.append(event["item"])
        output = event["response"]["output"]
        assert done == output
        assert [item["id"] for item in output] == added
        names = ("type", "name", "arguments", "content")
        plain = [[{name: item.get(name) for name in names} for item in items] for items in (output, whole["output"])]
        assert plain[0] == plain[1]
        called = [item for item in output if item["type"] == "function_call"]
        assert {item["id"]: item["arguments"] for item in called} == arguments
        checked([(item["name"], item["arguments"]) for item in called])
        assert called or choice == "auto"


def test_the_log_probabilities_of_a_message_are_of_its_tokens_only(served_model):
    _, tokenizer = served_model
    text = 'a <two <tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    body = ResponseRequest(input="one", tools=FLAT, include=["message.output_text.logprobs"])
    responses = ItemResponses("tiny", body, 3, lambda token: tokenizer.decode([token]))
    answer = Answer(0, SimpleNamespace(alternatives=0), Detokenizer(tokenizer), 99, reader=CallReader(OURS))
    events = [*responses.opening(answer)]
    for token in tokenizer.encode(text, add_special_tokens=False):
        events += responses.chunks(answer, *answer.take(Update([token], [-0.5], 1, [])))
    events += responses.chunks(answer, *answer.take(Update([], [], 1, [], finish="stop")))
    events += [*responses.ending(answer), *responses.closing([answer])]
    message, call = events[-1]["response"]["output"]
    assert (message["content"][0]["text"], call["name"]) == ("a <two ", "now")
    own = message["content"][0]["logprobs"]
    assert "".join(token["token"] for token in own) == "a <two "
    deltas = [event["logprobs"] for event in events if event["type"] == "response.output_text.delta"]
    assert [token for delta in deltas for token in delta] == own
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == [message, call]


def called(arguments, call_id="a"):
    call = {"id": call_id, "type": "function", "function": {"name": "now", "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": "a", "content": "noon"}
    return [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}, result]


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (CHAT, {"tools": [{"type": "function"}]}, "tools", "function is missing"),
        (CHAT, {"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools", "only functions"),
        (CHAT, {"tools": [TOOLS[0], TOOLS[0]]}, "tools", "two are named 'weather'"),
        (CHAT, {"tools": None, "tool_choice": "required"}, "tool_choice", "needs tools"),
        (CHAT, {"tool_choice": "always"}, "tool_choice", '"none", "auto", "required"'),
        (CHAT, {"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "'f', which is none"),
        (CHAT, {"tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice", "or name a function"),
        (CHAT, {"tool_choice": {"type": "function", "function": 3}}, "tool_choice", "tool_choice.function: Input"),
        (CHAT, {"tool_choice": {"type": "allowed_tools"}}, "tool_choice", "allowed_tools is missing"),
        (CHAT, {"stop": ["x"]}, "tools", "tools and stop"),
        (CHAT, {"tool_choice": "required", "max_tokens": 3}, "tools", "shortest text that matches tools has"),
        (CHAT, {"messages": [{**HELLO[0], "tool_calls": [{"id": "a"}]}]}, "messages", "function is missing"),
        (CHAT, {"messages": [*HELLO, {"role": "tool", "content": "x"}]}, "messages", "expected 'assistant'"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "tool_call_id": "a"}]}, "messages", "of the role tool"),
        (CHAT, {"messages": called("[" * 9999)}, "messages", "must be a JSON object"),
        (CHAT, {"messages": called('{"a": "\\ud800"}')}, "messages", "must be a JSON object"),
        (CHAT, {"messages": called("{}", "x" * 9999)}, "messages", "message 2 has the tool_call_id 'a'"),
        (ITEMS, {"tools": [{"type": "web_search"}]}, "tools", "only functions"),
        (ITEMS, {"tool_choice": {"type": "allowed_tools"}}, "tool_choice", "mode is missing"),
        (ITEMS, {"tools": TOOLS}, "tools", "name is missing"),
        (ITEMS, {"input": [{"type": "function_call", "name": "f"}]}, "input", "input.0.call_id|call_id is missing"),
        (ITEMS, {"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "'f', which is none"),
    ],
)
def test_what_cannot_be_called_is_refused_by_name(tools_server, path, body, param, words):
    answer = ask(tools_server, path, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert any(word in error["message"] for word in words.split("|")), error["message"]
    assert len(error["message"]) <= 400


def test_a_call_without_arguments_may_be_written_as_nothing(tools_server):
    assert ask(tools_server, messages=called("")).status_code == 200


def test_a_schema_that_is_refused_is_named(tools_server):
    bad = {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}
    for path, tool in ((CHAT, {"type": "function", "function": bad}), (ITEMS, {"type": "function", **bad})):
        error = ask(tools_server, path, tools=[tool]).json()["error"]
        assert error["param"] == "tools"
        assert "parameters of f" in error["message"]
        assert "not" in error["message"]
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}
    error = ask(tools_server, tools=None, response_format=form).json()["error"]
    assert error["param"] == "response_format"
    assert error["message"].startswith("response_format")
