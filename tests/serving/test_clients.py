"""Clients made for OpenAI's API, unchanged, on `illada serve` in a separate process; and the files in examples/."""

import contextlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from illada.bench.load import started_server
from illada.errors import IlladaError
from illada.serving.options import ServerSettings

pytestmark = pytest.mark.slow

openai = pytest.importorskip("openai", reason="the client is among the packages for development")

EXAMPLES = Path(__file__).parents[2] / "examples"
KEY = "key-of-the-test"
HELLO = [{"role": "user", "content": "one two"}]


@pytest.fixture(scope="module")
def address(served_model, tmp_path_factory):
    """A server that asks for a key, started as a user starts it."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    for part in served_model:
        part.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))  # tools take room
    (folder / "suggestions.json").write_text('{"about": "A random model."}')
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ILLADA_API_KEYS", f"another,{KEY}")
            patch.setenv("OMP_NUM_THREADS", "1")
            url = stack.enter_context(started_server(str(folder), ["--block_length", "8", "--max_new_tokens", "32"]))
        yield url


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def run(address, *words, **environment):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OPENAI_API_KEY": KEY, **environment}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_openai_streams_what_it_gets_whole(client):
    ask = {"model": "tiny", "messages": HELLO, "max_tokens": 20, "temperature": 0.9, "seed": 4, "n": 2}
    whole = client.chat.completions.create(**ask)
    texts, reasons, usage = ["", ""], [None, None], None
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        usage = chunk.usage or usage
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    assert len(set(texts)) == 2
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_openai_completes_and_fills(client):
    several = client.completions.create(model="tiny", prompt=["one", "two"], max_tokens=9, logprobs=1)
    assert [choice.index for choice in several.choices] == [0, 1]
    assert len(several.choices[0].logprobs.token_logprobs) == len(several.choices[0].logprobs.tokens) <= 9
    filled = client.completions.create(model="tiny", prompt="one ___ three ___", extra_body={"slot_tokens": 2})
    text, (first, second) = filled.choices[0].text, filled.choices[0].to_dict()["fills"]
    assert text == f"one {first} three {second}"


def test_openai_reads_the_steps(client):
    ask = {"model": "tiny", "messages": HELLO, "max_tokens": 16, "stream": True}
    states, text = "", ""
    for chunk in client.chat.completions.create(**ask, extra_body={"diffusion": True}):
        if chunk.object == "diffusion.step":
            step = chunk.to_dict()
            states = states[: step["start"]] + step["states"]
            assert len(step["texts"]) == len(step["states"]) == len(step["confidences"])
        elif chunk.choices:
            text += chunk.choices[0].delta.content or ""
    assert set(states) == {"c"}
    assert text == client.chat.completions.create(**ask | {"stream": False}).choices[0].message.content


def test_openai_goes_away_from_a_stream(client):
    with client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=200, stream=True) as stream:
        next(iter(stream))
    assert client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4).choices[0].message


@pytest.mark.parametrize("stream", [False, True])
def test_openai_raises_its_own_errors(client, address, stream):
    def refused(kind, through=client, **body):
        with pytest.raises(kind) as caught:
            through.chat.completions.create(**{"model": "tiny", "messages": HELLO, "stream": stream, **body})
        return caught.value

    error = refused(openai.BadRequestError, temperature=7)
    assert (error.param, error.type) == ("temperature", "invalid_request_error")
    assert "\n" not in error.body["message"]
    assert "function is missing" in refused(openai.BadRequestError, tools=[{"type": "function"}]).body["message"]
    assert (
        "context is 1024" in refused(openai.BadRequestError, messages=[{"role": "user", "content": "x" * 1999}]).message
    )
    assert "there is no model 'big' here" in refused(openai.NotFoundError, model="big").body["message"]
    stranger = client.with_options(api_key="wrong")
    assert refused(openai.AuthenticationError, stranger).code == "invalid_api_key"
    nobody = client.with_options(base_url="http://127.0.0.1:9/v1")
    refused(openai.APIConnectionError, nobody)


@pytest.mark.parametrize(
    ("problem", "kind", "status"), [("busy", "RateLimitError", 429), ("draining", "InternalServerError", 503)]
)
def test_openai_is_told_to_come_again(serve_model, monkeypatch, problem, kind, status):
    with serve_model(ServerSettings(max_requests=1, max_choices=1)) as (url, app):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        if problem == "draining":
            app.state.worker.draining = True
        else:
            monkeypatch.setattr(app.state.worker, "_open", {None: None})  # one answer is under way
        with pytest.raises(getattr(openai, kind)) as caught:
            client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4)
        assert caught.value.status_code == status
        assert int(caught.value.response.headers["retry-after"]) >= 1
        monkeypatch.undo()
        app.state.worker.draining = False
        assert client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4).choices


def test_openai_uses_the_responses_api(client):
    ask = {"model": "tiny", "instructions": "brief", "input": "one two", "max_output_tokens": 12}
    whole = client.responses.create(**ask, store=True, reasoning={"effort": "low"})
    chat = [{"role": "system", "content": "brief"}, *HELLO]
    same = client.chat.completions.create(model="tiny", messages=chat, max_tokens=12)
    assert whole.output_text == same.choices[0].message.content
    with client.responses.stream(**ask) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == whole.output_text
    raw = client.responses.with_raw_response.create(**ask, store=True)
    assert "store" in raw.headers["warning"]
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**ask, previous_response_id=whole.id)
    assert refused.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError, match="no embeddings"):
        client.embeddings.create(model="tiny", input="one")


def test_the_model_is_described_as_its_folder_says(client):
    assert client.models.list().data[0].to_dict()["about"] == "A random model."


def test_openai_sends_every_setting(client):
    settings = {"presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"7": 5}, "logprobs": True}
    settings |= {"top_logprobs": 20, "service_tier": "flex", "store": True, "reasoning_effort": "high", "n": 2}
    settings |= {"metadata": {"a": "b"}, "prompt_cache_key": "k", "safety_identifier": "s", "verbosity": "low"}
    found = client.chat.completions.create(
        model="tiny", messages=HELLO, max_completion_tokens=6, temperature=1.0, **settings, extra_body={"min_p": 0.01}
    )
    assert all(len(token.top_logprobs) == 20 for token in found.choices[0].logprobs.content)
    echoed = client.completions.create(model="tiny", prompt="one", max_tokens=4, echo=True, logprobs=5)
    assert echoed.choices[0].text.startswith("one")
    begun = [*HELLO, {"role": "assistant", "content": "three"}]
    assert client.chat.completions.create(model="tiny", messages=begun, max_tokens=4).choices


def test_every_field_of_the_client_stands_in_the_table():
    """docs/serving.md says of each field of the client as it is installed what it does here, and of no other."""
    kinds = (
        "chat.completion_create_params.CompletionCreateParamsBase",
        "completion_create_params.CompletionCreateParamsBase",
        "responses.response_create_params.ResponseCreateParamsBase",
    )
    fields = {"stream"}
    for kind in kinds:
        module, name = kind.rsplit(".", 1)
        fields |= getattr(importlib.import_module(f"openai.types.{module}"), name).__annotations__.keys()
    table = (EXAMPLES.parent / "docs" / "serving.md").read_text().split("## Every field of OpenAI's client")[1]
    rows = [line.split("|")[1] for line in table.split("\n## ")[0].splitlines() if line.startswith("| `")]
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == sorted(fields)


def test_langchain_and_litellm(address):
    """They are many packages: a Python of their own may have them, which ILLADA_CLIENTS_PYTHON names."""
    python = os.environ.get("ILLADA_CLIENTS_PYTHON", sys.executable)
    there = subprocess.run([python, "-c", "import langchain_openai, litellm"], capture_output=True, check=False)
    if there.returncode:
        pytest.skip("langchain-openai and litellm are not installed (ILLADA_CLIENTS_PYTHON)")
    script = str(Path(__file__).with_name("other_clients.py"))
    offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONPATH": ""}
    assert run(address, python, script, address, KEY, **offline).endswith("both work\n")


def test_example_openai_client(address):
    shown = run(address, sys.executable, str(EXAMPLES / "openai_client.py"), address)
    parts = shown.split("\n# ")
    assert len(parts) == 6
    assert "tokens a pass" in parts[1]
    assert "filled in: [" in parts[2]
    assert parts[4].count("\n") > 16
    assert (
        parts[5]
        .splitlines()[1]
        .startswith("400 invalid_request_error: tools.0: only functions can be called here, no 'web_search'")
    )


def test_example_structured(address):
    digits, reply, tool = run(address, sys.executable, str(EXAMPLES / "structured.py"), address).split("\n# ")
    assert re.fullmatch("[0-9]( [0-9]){5}", digits.splitlines()[1])
    assert re.search(r"Reply\(language='(Python|C|unknown)', documented=(True|False)\)", reply)
    assert re.search(r"tool_calls: Weather\(town='(Rome|Oslo)', days=[123]\)", tool)


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_example_curl(address):
    lines = run(address, str(EXAMPLES / "curl.sh"), address).splitlines()
    whole, gaps, several, refused = (json.loads(line) for line in lines if line.startswith("{"))
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert lines.count("data: [DONE]") == 2
    assert {event["object"] for event in events} == {"chat.completion.chunk", "diffusion.step"}
    text = whole["choices"][0]["message"]["content"]
    streamed = "".join(e["choices"][0]["delta"].get("content", "") for e in events if "choices" in e)
    assert streamed.startswith(text)  # the second stream decodes otherwise
    assert len(gaps["choices"][0]["fills"]) == 2
    assert len(several["choices"]) == 2
    assert "best_of is not supported" in refused["error"]["message"]


def test_example_lm_eval(address, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra: pip install 'illada[eval]'")
    environment = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "home")}
    shown = run(address, str(EXAMPLES / "lm_eval.sh"), str(tmp_path / "out"), address, **environment)
    assert "|reversal|" in shown
    (samples,) = (tmp_path / "out").rglob("samples_reversal_*.jsonl")
    records = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(records) == 12
    assert all(isinstance(record["resps"][0][0], str) for record in records)


def test_a_server_that_cannot_start_says_why(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho about to load >&2\necho illada: error: no model $5 >&2\nexit 2\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(IlladaError, match=r"^the server did not start: no model here$"), started_server("here"):
        pass
