"""The official `openai` package on `illada serve`: a chat, a stream, an infill, the steps of the denoising, an error.

    illada serve --model runs/demo/model
    python examples/openai_client.py [http://127.0.0.1:8000]

A key of the server, if it has any, is read from OPENAI_API_KEY.
"""

import os
import sys

from openai import BadRequestError, OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))
model = client.models.list().data[0].id
question = {"role": "user", "content": "Reverse: l o a d"}

print("# A whole answer")
answer = client.chat.completions.create(model=model, messages=[question], max_tokens=32, logprobs=True)
usage = answer.usage.to_dict()
print(answer.choices[0].message.content)
print(f"{answer.choices[0].finish_reason}: {usage['completion_tokens']} tokens in {usage['forwards']} forward passes")

print("\n# A stream, decoded fast: several tokens a pass where the model is sure")
stream = client.chat.completions.create(
    model=model,
    messages=[question],
    max_tokens=32,
    stream=True,
    stream_options={"include_usage": True},
    extra_body={"decoding": "fast"},
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    elif chunk.usage:
        print(f"\n{chunk.usage.to_dict()['tokens_per_forward']} tokens a pass")

print("\n# Gaps, each filled with three tokens")
filled = client.completions.create(model=model, prompt="import ___\n\ndef ___(self):", extra_body={"slot_tokens": 3})
print(filled.choices[0].text)
print("filled in:", filled.choices[0].to_dict()["fills"])

print("\n# What is between a prompt and a suffix")
between = client.completions.create(model=model, prompt="def add(a, b):\n    return", suffix="\n\n", max_tokens=6)
print(repr(between.choices[0].text))

print("\n# Text out of noise: each step's tokens, ░ where nothing is decided, those in ( ) may still change")
stream = client.chat.completions.create(
    model=model, messages=[question], max_tokens=32, stream=True, extra_body={"diffusion": True}
)
tokens: list[str] = []
for chunk in stream:
    if chunk.object != "diffusion.step":
        continue
    shown = {"m": "░", "p": "({})", "c": "{}", "g": "{}", "f": "{}"}
    step = chunk.to_dict()
    new = zip(step["states"], step["texts"], strict=True)
    tokens[step["start"] :] = [shown[state].format(text) if text or state == "m" else "" for state, text in new]
    print(f"{step['forwards']:3} {''.join(tokens)!r}")

print("\n# An error")
try:
    client.chat.completions.create(model=model, messages=[question], tools=[{"type": "web_search"}])
except BadRequestError as error:
    print(f"{error.status_code} {error.body['type']}: {error.body['message']}")
