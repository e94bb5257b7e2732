"""Answers of a given form from `illada serve`, with the `openai` package: an expression, a class, a call of a tool.

    illada serve --model runs/demo/model
    python examples/structured.py [http://127.0.0.1:8000]

Every answer has its form, whatever the model knows. A key of the server, if it has any, is read from OPENAI_API_KEY.
"""

import os
import sys
from typing import Literal

from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))
model = client.models.list().data[0].id

print("# Six digits")
question = {"role": "user", "content": "Sort: 4 1 5 7 1 0"}
answer = client.chat.completions.create(
    model=model, messages=[question], max_tokens=32, extra_body={"guided_regex": "[0-9]( [0-9]){5}"}
)
print(answer.choices[0].message.content)

print("\n# A class, written as JSON and read again; what the form fixes costs no pass")


class Reply(BaseModel):
    """What is known of a module."""

    language: Literal["Python", "C", "unknown"]
    documented: bool


question = {"role": "user", "content": "What is the module json written in?"}
reply = client.chat.completions.parse(model=model, messages=[question], response_format=Reply, max_tokens=64)
usage = reply.usage.to_dict()
print(repr(reply.choices[0].message.parsed))
print(f"{usage['completion_tokens']} tokens in {usage['forwards']} forward passes")

print("\n# A tool that must be called, and the answer to its result")


class Weather(BaseModel):
    """The weather of a town."""

    town: Literal["Rome", "Oslo"]
    days: Literal[1, 2, 3]


question = {"role": "user", "content": "How will the weather be in Rome tomorrow?"}
tools = [pydantic_function_tool(Weather)]
called = client.chat.completions.parse(
    model=model, messages=[question], tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=96
)
message = called.choices[0].message
call = message.tool_calls[0]
print(f"{called.choices[0].finish_reason}: {call.function.parsed_arguments!r}")
result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
calls = [
    {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": call.function.arguments}}
]
asked = [question, {"role": "assistant", "content": message.content, "tool_calls": calls}, result]
answer = client.chat.completions.create(model=model, messages=asked, tools=tools, tool_choice="none", max_tokens=16)
print(repr(answer.choices[0].message.content))
