"""OpenAI's API as its clients are today: the Responses API, alternatives, echo, prefill, biases, what has no effect."""

import json
import threading

import httpx
import pytest

from illada import GenerationSettings
from illada.errors import IlladaError
from illada.generation.engine import Engine, generate
from illada.serving.about import read_about
from illada.serving.options import ServerSettings
from illada.text.chat import encode_prompt
from illada.text.prompts import encode_plain

CHAT, TEXT, ITEMS = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HELLO = [{"role": "user", "content": "one two"}]


def ask(server, path, **body):
    return httpx.post(server + path, json=body, timeout=60)


def stream(server, **body):
    """The events of a response, each with the name that it was sent under."""
    found = []
    with httpx.stream("POST", server + ITEMS, json={**body, "stream": True}, timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        for block in answer.read().decode().split("\n\n"):
            lines = dict(line.split(": ", 1) for line in block.splitlines())
            if lines:
                found.append(json.loads(lines["data"]))
                assert lines["event"] == found[-1]["type"]
    return found


def test_a_response_is_the_answer_to_the_same_chat(server):
    types = pytest.importorskip("openai.types.responses")
    chat = ask(server, CHAT, messages=[{"role": "system", "content": "brief"}, *HELLO], max_tokens=9).json()
    forms = [
        {"input": "one two", "instructions": "brief"},
        {"input": [{"role": "developer", "content": "brief"}, {"type": "message", **HELLO[0]}]},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "one two"}]}], "instructions": "brief"},
    ]
    for form in forms:
        found = ask(server, ITEMS, **form, max_output_tokens=9, store=False).json()
        response = types.Response.model_validate(found, strict=True)
        assert response.output_text == chat["choices"][0]["message"]["content"]
        assert response.usage.input_tokens == chat["usage"]["prompt_tokens"]
        assert response.usage.output_tokens == chat["usage"]["completion_tokens"]
    cut = chat["choices"][0]["finish_reason"] == "length"
    assert response.status == ("incomplete" if cut else "completed")
    # What came can be sent back as it is.
    again = [*forms[1]["input"], *found["output"], {"role": "user", "content": "three"}]
    assert ask(server, ITEMS, input=again, max_output_tokens=4).status_code == 200


def test_a_streamed_response_tells_the_same_in_typed_events(server):
    types = pytest.importorskip("openai.types.responses")
    adapter = pytest.importorskip("pydantic").TypeAdapter(types.ResponseStreamEvent)
    body = {"input": "one two", "max_output_tokens": 20, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = ask(server, ITEMS, **body).json()
    events = stream(server, **body)
    for event in events:
        adapter.validate_python(event, strict=True)
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    assert [event["type"] for event in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    part = whole["output"][0]["content"][0]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(event["delta"] for event in deltas) == part["text"]
    assert [token for event in deltas for token in event["logprobs"]] == part["logprobs"]
    assert all(len(token["top_logprobs"]) == 2 for token in part["logprobs"])
    assert events[-1]["type"] == f"response.{whole['status']}"
    assert events[-1]["response"]["output"][0]["content"] == [part]
    assert events[-1]["response"]["usage"] == whole["usage"]
    late = stream(server, input="one", timeout=1e-6)[-1]
    assert (late["type"], late["code"]) == ("error", "timeout")


def test_what_a_response_would_keep_is_refused(server):
    for name, value in {"previous_response_id": "resp_1", "conversation": "c", "background": True, "n": 2}.items():
        error = ask(server, ITEMS, input="one", **{name: value})
        assert (error.status_code, error.json()["error"]["param"]) == (400, name)
    assert httpx.get(f"{server}{ITEMS}/resp_1").status_code == 404


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_alternatives_are_the_engines(server, served_model, temperature):
    model, tokenizer = served_model
    engine = Engine(model, tokenizer)
    settings = GenerationSettings(16, 8, temperature=temperature, seed=3, eos_token_id=tokenizer.eos_token_id)
    request = engine.request(encode_prompt(tokenizer, HELLO), settings)
    request.alternatives = 5
    engine.enter(request)
    engine.run()
    body = {"max_tokens": 16, "temperature": temperature, "seed": 3}
    found = ask(server, CHAT, messages=HELLO, logprobs=True, top_logprobs=5, **body).json()["choices"][0]["logprobs"]
    assert found["content"]
    for at, token in enumerate(found["content"]):
        wanted = request.best_2KG[1, :, at].view("float32")
        assert [one["logprob"] for one in token["top_logprobs"]] == pytest.approx(wanted, abs=1e-4)
        assert token["logprob"] == pytest.approx(request.log_prob_G[at], abs=1e-4)
        best = tokenizer.decode([request.best_2KG[0, 0, at]], skip_special_tokens=True)
        assert token["top_logprobs"][0]["token"] == best
    plain = ask(server, CHAT, messages=HELLO, logprobs=True, **body).json()["choices"][0]
    assert [token["token"] for token in plain["logprobs"]["content"]] == [token["token"] for token in found["content"]]
    text = ask(server, TEXT, prompt="one", logprobs=3, **body).json()["choices"][0]["logprobs"]
    for token, value, best in zip(text["tokens"], text["token_logprobs"], text["top_logprobs"], strict=True):
        assert best[token] == value
        assert 1 <= len(best) <= 4


def test_echo_repeats_the_prompt_and_says_what_its_numbers_are(server):
    body = {"prompt": "one two", "max_tokens": 8, "logprobs": 1}
    plain = ask(server, TEXT, **body).json()
    found = ask(server, TEXT, **body, echo=True).json()
    choice, own = found["choices"][0], plain["choices"][0]
    assert choice["text"] == "one two" + own["text"]
    assert found["usage"] == plain["usage"]
    given = len(choice["logprobs"]["tokens"]) - len(own["logprobs"]["tokens"])
    assert choice["logprobs"]["token_logprobs"] == [None] * given + own["logprobs"]["token_logprobs"]
    assert choice["logprobs"]["top_logprobs"] == [None] * given + own["logprobs"]["top_logprobs"]
    assert "given text" in choice["logprobs"]["meaning"]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    with httpx.stream("POST", server + TEXT, json={**body, "echo": True, "stream": True}) as answer:
        parts = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert "".join(part["choices"][0]["text"] for part in parts) == choice["text"]


def test_an_answer_goes_on_with_what_the_assistant_began(server, served_model):
    model, tokenizer = served_model
    ids = [*encode_prompt(tokenizer, HELLO), *tokenizer.encode("three ", add_special_tokens=False)]
    settings = GenerationSettings(8, 8, eos_token_id=tokenizer.eos_token_id)
    expected = generate(model, [ids], settings, tokenizer=tokenizer)[0]
    begun = [*HELLO, {"role": "assistant", "content": "three "}]
    found = ask(server, CHAT, messages=begun, max_tokens=8).json()
    assert found["choices"][0]["message"]["content"] == tokenizer.decode(expected.ids, skip_special_tokens=True)
    assert found["usage"]["prompt_tokens"] == len(ids)
    # What looks like a special token there is text.
    special = [*HELLO, {"role": "assistant", "content": tokenizer.eos_token}]
    counted = ask(server, "/tokenize", messages=special).json()
    assert counted["count"] > len(encode_prompt(tokenizer, HELLO)) + 1


def test_penalties_and_biases_are_those_of_the_settings(server, served_model):
    model, tokenizer = served_model
    change = {"presence_penalty": 1.5, "frequency_penalty": -0.5, "logit_bias": {7: 4.0}}
    settings = GenerationSettings(16, 8, eos_token_id=tokenizer.eos_token_id, **change)
    expected = generate(model, [encode_plain(tokenizer, "one")], settings)[0]
    body = {**change, "logit_bias": {"7": 4.0}}
    found = ask(server, TEXT, prompt="one", max_tokens=16, logprobs=0, **body).json()["choices"][0]["logprobs"]
    assert found["token_logprobs"] == pytest.approx(expected.log_probs, abs=1e-4)
    warm = {"temperature": 1.2, "min_p": 0.02, "seed": 5}
    settings = GenerationSettings(16, 8, eos_token_id=tokenizer.eos_token_id, **warm)
    expected = generate(model, [encode_plain(tokenizer, "one")], settings)[0]
    found = ask(server, TEXT, prompt="one", max_tokens=16, logprobs=0, **warm).json()["choices"][0]["logprobs"]
    assert found["token_logprobs"] == pytest.approx(expected.log_probs, abs=1e-4)
    same = ask(server, TEXT, prompt="one", max_tokens=4, min_p=0.1, logit_bias={}).json()
    assert same["choices"] == ask(server, TEXT, prompt="one", max_tokens=4).json()["choices"]


def test_what_has_no_effect_is_accepted_and_named(server):
    asked = {"reasoning_effort": "low", "store": True, "service_tier": "flex", "prompt_cache_retention": "24h"}
    answer = ask(server, CHAT, messages=HELLO, max_tokens=2, **asked)
    assert answer.status_code == 200
    assert answer.headers["warning"].startswith("299 illada")
    assert all(name in answer.headers["warning"] for name in asked)
    nothing = {"reasoning_effort": None, "store": False, "service_tier": "auto", "parallel_tool_calls": True}
    assert "warning" not in ask(server, CHAT, messages=HELLO, max_tokens=2, **nothing).headers
    with httpx.stream(
        "POST", server + ITEMS, json={"input": "a", "stream": True, "reasoning": {"effort": "low"}}
    ) as it:
        assert "reasoning" in it.headers["warning"]


def test_tools_that_must_not_be_called_are_accepted(server):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert ask(server, CHAT, messages=HELLO, max_tokens=2, tools=tools, tool_choice="none").status_code == 200
    refused = ask(server, TEXT, prompt="one", max_tokens=2, tools=tools)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools")


def test_embeddings_are_refused_in_a_sentence(server):
    refused = ask(server, "/v1/embeddings", model="tiny", input="one")
    assert (refused.status_code, "no embeddings" in refused.json()["error"]["message"]) == (404, True)


def test_ids_of_texts_and_back(server, served_model):
    tokenizer = served_model[1]
    ids = encode_plain(tokenizer, "one two")
    found = ask(server, "/tokenize", prompt="one two").json()
    assert (found["tokens"], found["count"], found["max_model_len"]) == (ids, len(ids), 256)
    assert ask(server, "/tokenize", prompt="one two", add_special_tokens=False).json()["tokens"] == ids[1:]
    assert ask(server, "/tokenize", messages=HELLO).json()["tokens"] == encode_prompt(tokenizer, HELLO)
    assert ask(server, "/detokenize", tokens=ids[1:]).json() == {"prompt": "one two"}
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "b"}, "model"),
        ("/tokenize", {"messages": [{"role": "system", "content": "a"}]}, "messages"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
    ):
        refused = ask(server, path, **body)
        assert refused.status_code in (400, 404)
        assert refused.json()["error"]["param"] == param, refused.text


def test_a_long_text_is_shown_outside_the_event_loop_and_each_token_once(server, monkeypatch, served_model):
    kind = type(served_model[1])
    decode, shown = kind.decode, []

    def watched(self, ids, *arguments, **options):
        shown.append((threading.current_thread().name, tuple(ids)))
        return decode(self, ids, *arguments, **options)

    monkeypatch.setattr(kind, "decode", watched)
    found = httpx.post(server + "/tokenize", json={"prompt": "one two " * 50}).json()
    assert found["count"] == len(found["token_strs"]) > 50
    assert len(shown) == len(set(shown)) == len(set(found["tokens"]))
    assert all(name.startswith("illada-encode") for name, _ in shown)


def test_a_model_has_many_names(serve_model):
    with serve_model(ServerSettings(alias=["gpt-4o", "org/m"])) as (address, _):
        assert [m["id"] for m in httpx.get(f"{address}/v1/models").json()["data"]] == ["tiny", "gpt-4o", "org/m"]
        assert httpx.get(f"{address}/v1/models/org/m").json()["root"] == "tiny"
        assert ask(address, CHAT, model="gpt-4o", messages=HELLO, max_tokens=2).json()["model"] == "gpt-4o"
        refused = ask(address, CHAT, model="x", messages=HELLO)
        assert "only 'tiny' and 'gpt-4o' and 'org/m'" in refused.json()["error"]["message"]


def test_what_stands_beside_a_model_is_read_whole_or_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert read_about(str(tmp_path)) == {}
    good = {"about": "A toy.", "suggestions": [{"label": "a", "text": "b"}]}
    (tmp_path / "suggestions.json").write_text(json.dumps(good))
    assert read_about(str(tmp_path)) == good
    one = good["suggestions"][0]
    for bad in (
        [],
        {"about": 3},
        {"abuot": "x"},
        {"about": "\ud800"},
        {"suggestions": [one] * 13},
        {"suggestions": [{**one, "x": 1}]},
        {"suggestions": ["a"]},
        {"suggestions": [{"label": "a" * 201, "text": "b"}]},
    ):
        (tmp_path / "suggestions.json").write_text(json.dumps(bad))
        with pytest.raises(IlladaError, match=r"suggestions\.json (is not|cannot be read)"):
            read_about(str(tmp_path))


@pytest.mark.slow
def test_many_wrong_elements_are_one_error():
    protocol = pytest.importorskip("illada.serving.protocol")
    pydantic = pytest.importorskip("pydantic")
    unknown = {f"x{i}": 1 for i in range(100_000)}
    for kind, body in (
        (protocol.ChatRequest, {"messages": HELLO, **unknown}),
        (protocol.ChatRequest, {"messages": [unknown] * 3}),
        (protocol.ChatRequest, {"messages": [1] * 100_000}),
        (protocol.ChatRequest, {"messages": HELLO, "decoding": unknown}),
        (protocol.ChatRequest, {"messages": HELLO, "logit_bias": unknown}),
        (protocol.ChatRequest, {"messages": HELLO, "stop": [1] * 100_000}),
        (protocol.CompletionRequest, {"prompt": [None] * 100_000}),
        (protocol.CompletionRequest, {"prompt": [[None] * 100_000] * 3}),
        (protocol.ResponseRequest, {"input": [{"role": "user", "content": [1] * 100_000}] * 3}),
        (protocol.ResponseRequest, {"input": "a", "include": ["x"] * 100_000}),
        (protocol.DetokenizeRequest, {"tokens": [None] * 100_000}),
    ):
        with pytest.raises(pydantic.ValidationError) as refused:
            kind.model_validate(body)
        assert refused.value.error_count() < 10
