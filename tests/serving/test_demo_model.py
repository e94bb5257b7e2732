"""The openai package's structured outputs and calls of tools on `illada serve` with the demo's own model.

illada demo --quick --output runs/quick
ILLADA_DEMO=runs/quick pytest tests/serving/test_demo_model.py
"""

import json
import os
from typing import Literal

import pytest

from illada.bench.load import started_server

openai = pytest.importorskip("openai", reason="the client is among the packages for development")
pydantic = pytest.importorskip("pydantic")

pytestmark = [
    pytest.mark.weights,
    pytest.mark.skipif("ILLADA_DEMO" not in os.environ, reason="ILLADA_DEMO names no run of the demo"),
]

GIVEN = {"model": "demo", "max_tokens": 96}
QUESTION = [{"role": "user", "content": "Shift each letter by one: a b c"}]


class Reply(pydantic.BaseModel):
    """An answer with what it is."""

    kind: Literal["letters", "digits"]
    sure: bool
    counts: list[Literal[1, 2, 3]]


class Shift(pydantic.BaseModel):
    """Shift letters."""

    by: Literal[1, 2, 3]
    reverse: bool


@pytest.fixture(scope="module")
def client():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with started_server(os.path.join(os.environ["ILLADA_DEMO"], "model"), ["--alias", "[demo]"]) as url:
            yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("temperature", [0, 1])
def test_answers_are_parsed_into_classes(client, temperature):
    given = {**GIVEN, "temperature": temperature, "seed": 1}
    chat = client.chat.completions.parse(messages=QUESTION, response_format=Reply, **given)
    assert isinstance(chat.choices[0].message.parsed, Reply)
    assert chat.usage.to_dict()["forwards"] < chat.usage.completion_tokens  # what is fixed costs no pass
    with client.chat.completions.stream(messages=QUESTION, response_format=Reply, **given) as events:
        assert events.get_final_completion().choices[0].message.parsed == chat.choices[0].message.parsed
    given["max_output_tokens"] = given.pop("max_tokens")
    given.pop("seed")
    response = client.responses.parse(input=QUESTION, text_format=Reply, **given)
    assert isinstance(response.output_parsed, Reply)


@pytest.mark.parametrize("temperature", [0, 1])
def test_tools_are_called_and_answered(client, temperature):
    given = {**GIVEN, "temperature": temperature, "seed": 1, "tools": [openai.pydantic_function_tool(Shift)]}
    choice = {"type": "function", "function": {"name": "Shift"}}
    message = client.chat.completions.parse(messages=QUESTION, tool_choice=choice, **given).choices[0].message
    (call,) = message.tool_calls
    assert isinstance(call.function.parsed_arguments, Shift)
    with client.chat.completions.stream(messages=QUESTION, tool_choice=choice, **given) as events:
        (same,) = events.get_final_completion().choices[0].message.tool_calls
    assert same.function.arguments == call.function.arguments
    function = {"name": call.function.name, "arguments": call.function.arguments}
    said = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": call.id, "type": "function", "function": function}],
    }
    result = {"role": "tool", "tool_call_id": call.id, "content": "b c d"}
    free = client.chat.completions.create(messages=[*QUESTION, said, result], **given).choices[0]
    assert free.finish_reason in ("stop", "length", "tool_calls")
    for one in free.message.tool_calls or ():
        Shift.model_validate_json(one.function.arguments)


def test_a_required_call_may_be_several(client):
    tools = [openai.pydantic_function_tool(Shift)]
    answer = client.chat.completions.create(messages=QUESTION, tools=tools, tool_choice="required", **GIVEN).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert [Shift.model_validate(json.loads(call.function.arguments)) for call in answer.message.tool_calls]
