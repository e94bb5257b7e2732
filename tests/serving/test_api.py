import asyncio
import copy
import importlib
import json
import socket
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

from illada import GenerationSettings
from illada.errors import MissingExtraError
from illada.generation.engine import generate, infill
from illada.serving.answer import Answer, Update
from illada.serving.detokenize import Detokenizer
from illada.serving.options import ServerSettings
from illada.serving.protocol import ApiError, CompletionRequest
from illada.serving.streams import Call, EventStream
from illada.serving.worker import Worker
from illada.text.chat import encode_prompt
from illada.text.prompts import encode_plain, encode_template

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "one two"}]


def post(server, path=CHAT, headers=None, **body):
    if path == CHAT:
        body = {"messages": HELLO, **body}
    headers = {"content-type": "application/json", **(headers or {})}
    return httpx.post(server + path, content=json.dumps(body), headers=headers, timeout=60)


def events(server, path=CHAT, **body):
    """Return the stream of a request as [(event, data)], without its end."""
    if path == CHAT:
        body = {"messages": HELLO, **body}
    found = []
    with httpx.stream("POST", server + path, json={**body, "stream": True}, timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        for block in answer.read().decode().split("\n\n"):
            lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
            if "data" in lines:
                found.append((lines.get("event"), lines["data"]))
    assert found[-1] == (None, "[DONE]")
    return [(event, json.loads(data)) for event, data in found[:-1]]


@pytest.fixture(scope="module")
def alone(served_model):
    """Return a function that answers a prompt without a server."""
    model, tokenizer = served_model

    def answer(messages=HELLO, text=None, **change):
        ids = encode_plain(tokenizer, text) if text is not None else encode_prompt(tokenizer, messages)
        values = {"max_new_tokens": 32, "block_length": 8, "eos_token_id": tokenizer.eos_token_id, **change}
        return generate(model, [ids], GenerationSettings(**values), tokenizer=tokenizer)[0]

    return answer


def test_a_chat_answer_is_that_of_generate_in_openais_form(server, alone, served_model):
    expected = alone()
    found = post(server, logprobs=True).json()
    assert found["object"] == "chat.completion"
    choice = found["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == served_model[1].decode(expected.ids, skip_special_tokens=True)
    assert choice["finish_reason"] == expected.finish_reason
    assert [token["logprob"] for token in choice["logprobs"]["content"]] == pytest.approx(expected.log_probs, abs=1e-4)
    prompt = len(encode_prompt(served_model[1], HELLO))
    assert found["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": len(expected.ids),
        "total_tokens": prompt + len(expected.ids),
        "forwards": expected.forwards,
        "tokens_per_forward": round(len(expected.ids) / expected.forwards, 3),
    }


@pytest.mark.parametrize(
    ("decoding", "same"),
    [
        ({"block_length": 4, "threshold": 0.5}, {"block_length": 4, "threshold": 0.5}),
        ({"steps_per_block": 2, "cache": "prefix"}, {"steps_per_block": 2, "cache": "prefix"}),
        ({"cache": "dual", "later_masks": True, "speculate": 1}, {"cache": "dual", "later_masks": True}),
        ("fast", {"threshold": 0.95, "cache": "adaptive"}),
        ("exact", {}),
        ({"speculate": 2, "guidance_scale": 0.5}, {"guidance_scale": 0.5}),
    ],
)
def test_the_way_of_decoding_is_the_requests(server, alone, decoding, same):
    found = post(server, TEXT, prompt="three four", decoding=decoding, logprobs=1).json()["choices"][0]
    expected = alone(text="three four", **same)
    assert found["logprobs"]["token_logprobs"] == pytest.approx(expected.log_probs, abs=1e-4)
    assert found["text"] == "".join(found["logprobs"]["tokens"])
    starts = found["logprobs"]["text_offset"]
    ends = [*starts, len(found["text"])][1:]
    assert [found["text"][a:b] for a, b in zip(starts, ends, strict=True)] == found["logprobs"]["tokens"]


def test_the_word_exact_undoes_what_the_server_was_started_with(serve_model, alone):
    with serve_model(threshold=0.3, cache="prefix") as (address, _):
        usual = post(address, max_tokens=16).json()["usage"]["forwards"]
        exact = post(address, max_tokens=16, decoding="exact").json()["usage"]["forwards"]
        undone = {"threshold": None, "cache": None}
        assert post(address, max_tokens=16, decoding=undone).json()["usage"]["forwards"] == exact
    assert exact == alone(max_new_tokens=16).forwards > usual


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 5, 8, 11, 300])
def test_an_answer_has_at_most_max_tokens(server, alone, limit):
    found = post(server, max_tokens=limit, logprobs=True).json()
    expected = alone(max_new_tokens=256, eos_token_id=None, block_length=min(8, limit))
    tokens = [token["logprob"] for token in found["choices"][0]["logprobs"]["content"]]
    assert len(tokens) <= limit
    assert tokens == pytest.approx(expected.log_probs[: len(tokens)], abs=1e-4)
    if found["choices"][0]["finish_reason"] == "length":
        room = 256 - found["usage"]["prompt_tokens"]
        assert len(tokens) == min(limit, room // 8 * 8)
    # Nothing is computed beyond the tokens that were asked for.
    assert found["usage"]["forwards"] <= (len(tokens) // 8 + 1) * 8


def test_seeds_make_answers_repeatable_and_choices_different(server, alone):
    once, again = (
        post(server, TEXT, prompt="one", temperature=2, seed=-7, n=3, max_tokens=8).json()["choices"] for _ in "12"
    )
    texts = [choice["text"] for choice in once]
    assert texts == [choice["text"] for choice in again]
    assert len(set(texts)) == 3
    assert [choice["index"] for choice in once] == [0, 1, 2]
    unseeded = {
        post(server, TEXT, prompt="one", temperature=2, max_tokens=8).json()["choices"][0]["text"] for _ in "123"
    }
    assert len(unseeded) > 1


def test_prompts_may_be_ids_and_several(server, served_model):
    ids = encode_plain(served_model[1], "one two")
    by_text = post(server, TEXT, prompt=["one two", "three"], max_tokens=8).json()
    by_ids = post(server, TEXT, prompt=[ids, encode_plain(served_model[1], "three")], max_tokens=8).json()
    single = post(server, TEXT, prompt=ids, max_tokens=8).json()
    texts = [choice["text"] for choice in by_text["choices"]]
    assert texts == [choice["text"] for choice in by_ids["choices"]]
    assert texts[0] == single["choices"][0]["text"]


def test_top_p_without_a_temperature_means_nothing(server):
    plain, with_top = post(server, max_tokens=8), post(server, max_tokens=8, temperature=0, top_p=0.5)
    assert plain.json()["choices"] == with_top.json()["choices"]


def test_a_stop_string_ends_the_answer_before_it(server, alone):
    whole = post(server, decoding={"repetition_penalty": 2.0}).json()["choices"][0]["message"]["content"]
    stop = whole[5:8]
    found = post(server, stop=stop, decoding={"repetition_penalty": 2.0}).json()["choices"][0]
    assert found["message"]["content"] == whole[: whole.find(stop)]
    assert found["finish_reason"] == "stop"
    pieces = events(server, stop=[stop, "never"], decoding={"repetition_penalty": 2.0})
    text = "".join(c["delta"].get("content", "") for _, e in pieces for c in e["choices"])
    assert text == whole[: whole.find(stop)]


def test_places_of_streamed_tokens_are_those_in_the_whole_text(server):
    ask = {"prompt": "one", "logprobs": 1, "decoding": {"repetition_penalty": 2.0}}
    whole = post(server, TEXT, **ask).json()["choices"][0]
    long = max(whole["logprobs"]["tokens"][:-1], key=len)
    assert len(long) > 1
    # A stop string may begin inside a token; then the token's first characters are sent before the token.
    parts = [c for _, e in events(server, TEXT, **ask, stop=[long[-1] + "\0"]) for c in e["choices"]]
    for name in ("tokens", "text_offset", "token_logprobs"):
        assert [x for part in parts if part["logprobs"] for x in part["logprobs"][name]] == whole["logprobs"][name]


def test_every_object_has_openais_types(server):
    types, chat = pytest.importorskip("openai.types"), pytest.importorskip("openai.types.chat")
    ask = {"max_tokens": 4, "logprobs": True, "user": "u", "safety_identifier": "s", "prompt_cache_key": "k"}
    chat.ChatCompletion.model_validate(post(server, **ask).json(), strict=True)
    for _, event in events(server, **ask, stream_options={"include_usage": True}):
        chat.ChatCompletionChunk.model_validate(event, strict=True)
    whole = post(server, TEXT, prompt="one", max_tokens=4, logprobs=1).json()
    types.Completion.model_validate(whole, strict=True)
    parts = [event for _, event in events(server, TEXT, prompt="one", max_tokens=4, logprobs=1)]
    types.Completion.model_validate(parts[-1], strict=True)  # before the last, finish_reason is null as OpenAI's is
    assert all(part["choices"][0]["finish_reason"] is None for part in parts[:-1])
    for model in httpx.get(server + "/v1/models").json()["data"]:
        types.Model.model_validate(model, strict=True)


def test_an_answer_can_be_sent_back_as_it_came(server):
    types = pytest.importorskip("openai.types.chat")
    message = types.ChatCompletion.model_validate(post(server, max_tokens=4).json()).choices[0].message
    for given in (message.model_dump(), message.to_dict()):
        assert post(server, messages=[*HELLO, given, *HELLO], max_tokens=4).status_code == 200


def test_a_causal_model_is_served_token_by_token(serve_model, served_model, build_model):
    tokenizer = served_model[1]
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("mask", "bos", "eos", "pad")}
    model = build_model(tie=True, seed=5, vocab_size=len(tokenizer), max_position_embeddings=256, causal=True, **ids)
    settings = GenerationSettings(max_new_tokens=5, eos_token_id=tokenizer.eos_token_id)
    expected = generate(model, [encode_plain(tokenizer, "one")], settings, tokenizer=tokenizer)[0]
    with serve_model(model=model, block_length=32) as (address, _):
        found = post(address, TEXT, prompt="one", max_tokens=5, logprobs=1).json()
        assert found["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(expected.log_probs, abs=1e-4)
        refused = post(address, decoding="fast").json()["error"]["message"]
        assert "one token at a time" in refused


def test_a_stream_gives_the_same_answer_in_order(server):
    whole = post(server, logprobs=True, n=2, temperature=1.5, seed=3).json()
    found = events(server, logprobs=True, n=2, temperature=1.5, seed=3, stream_options={"include_usage": True})
    assert found[-1][1]["choices"] == []
    assert found[-1][1]["usage"] == whole["usage"]
    assert {event["object"] for _, event in found} == {"chat.completion.chunk"}
    for choice in whole["choices"]:
        parts = [c for _, e in found for c in e["choices"] if c["index"] == choice["index"]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        tokens = [token for part in parts for token in (part["logprobs"] or {"content": []})["content"]]
        assert tokens == choice["logprobs"]["content"]
        assert len(parts) > 3  # more than all at once


def test_every_step_is_told_to_those_who_ask(server, alone):
    found = events(server, max_tokens=20, diffusion=True, temperature=1.0, seed=2, stop=["zzz"])
    steps = [data for event, data in found if event == "diffusion"]
    text = "".join(c["delta"].get("content", "") for event, e in found if event is None for c in e["choices"])
    expected = alone(max_new_tokens=24, temperature=1.0, seed=2)
    assert [step["forwards"] for step in steps] == list(range(1, len(steps) + 1))
    shown: list[str] = []
    states = ""
    committed_before = set()
    for step in steps:
        assert step["object"] == "diffusion.step"
        assert len(step["texts"]) == len(step["states"]) == len(step["confidences"])
        shown[step["start"] :] = step["texts"]
        states = states[: step["start"]] + step["states"]
        committed = {at for at, state in enumerate(states) if state == "c"}
        assert committed >= committed_before
        committed_before = committed
        for state, confidence in zip(step["states"], step["confidences"], strict=True):
            assert (confidence is None) == (state == "m")
    assert text
    assert "".join(shown).startswith(text)
    assert committed_before >= set(range(len(shown))) or len(shown) < 20
    assert len(shown) <= 20
    assert len(steps) <= expected.forwards


def test_nothing_is_shown_behind_the_end_of_an_answer(serve_model, served_model, build_model, alone):
    tokenizer = served_model[1]
    ids = alone(text="one", eos_token_id=None, steps_per_block=2, repetition_penalty=2.0).ids
    place = next(at for at in range(3, len(ids)) if ids[at] not in ids[:at] and at % 8 not in (0, 7))
    names = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("mask", "bos", "pad")}
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "eos_token_id": ids[place]}
    model = build_model(tie=True, seed=3, **shape, **names)
    with serve_model(model=model, steps_per_block=2, repetition_penalty=2.0) as (address, _):
        found = events(address, TEXT, prompt="one", diffusion=True, logprobs=1)
    assert found[-1][1]["choices"][0]["finish_reason"] == "stop"
    tokens = [e["choices"][0]["logprobs"]["tokens"] for event, e in found if event is None]
    assert sum(map(len, tokens)) == place
    last = [data for event, data in found if event == "diffusion"][-1]
    assert last["states"][place - last["start"]] == "c"
    assert "".join(last["texts"][place - last["start"] :]) == ""


def test_gaps_are_filled_and_shown_in_place(server, served_model):
    model, tokenizer = served_model
    expected = infill(
        model,
        [encode_template(tokenizer, "one ___ three ___", 3)],
        GenerationSettings(eos_token_id=None),
        tokenizer=tokenizer,
    )[0]
    choice = post(server, TEXT, prompt="one ___ three ___", slot_tokens=3, logprobs=1).json()
    assert choice["usage"]["completion_tokens"] == 6
    choice = choice["choices"][0]
    assert choice["text"] == tokenizer.decode(expected.ids, skip_special_tokens=True)
    assert len(choice["fills"]) == 2
    assert choice["text"] == "one {} three {}".format(*choice["fills"])
    given = [value for value in choice["logprobs"]["token_logprobs"] if value is not None]
    assert given == pytest.approx(expected.log_probs, abs=1e-4)
    found = events(server, TEXT, prompt="one ___ three ___", slot_tokens=3, diffusion=True)
    assert "".join(c["text"] for event, e in found if event is None for c in e["choices"]) == choice["text"]
    last = [data for event, data in found if event == "diffusion"][-1]
    assert "".join(last["texts"]) == choice["text"]
    assert last["states"].count("c") == 6
    assert last["states"][0] == "f"
    assert found[-1][1]["choices"][0]["fills"] == choice["fills"]


def test_gaps_side_by_side_at_the_edges_and_several_times(server):
    found = post(server, TEXT, prompt="______ two ___", slot_tokens=2, n=2, temperature=1, seed=4).json()
    assert found["usage"]["completion_tokens"] == 12
    for choice in found["choices"]:
        assert len(choice["fills"]) == 3
    assert found["choices"][0]["fills"] != found["choices"][1]["fills"]


def test_a_suffix_is_seen_from_the_start(server, served_model):
    model, tokenizer = served_model
    template = [*encode_plain(tokenizer, "one"), None, None, None]
    template += [*tokenizer.encode(" six", add_special_tokens=False), tokenizer.eos_token_id]
    expected = infill(model, [template], GenerationSettings(eos_token_id=None), tokenizer=tokenizer)[0]
    found = post(server, TEXT, prompt="one", suffix=" six", max_tokens=3).json()
    begin = len(encode_plain(tokenizer, "one"))
    wanted = tokenizer.decode(expected.ids[begin : begin + 3], skip_special_tokens=True)
    assert found["choices"][0]["text"] == wanted
    assert found["usage"]["completion_tokens"] == 3
    pieces = events(server, TEXT, prompt="one", suffix=" six", max_tokens=3)
    assert "".join(c["text"] for _, e in pieces for c in e["choices"]) == wanted


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, "messages"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "message 0 is from 'tool'"),
        (CHAT, {"messages": [{"role": "assistant", "content": "x"}]}, "expected 'user'"),
        (CHAT, {"messages": [{"role": "user", "content": "a\ud800"}]}, "surrogate"),
        (CHAT, {"tools": [{"type": "function"}]}, "function is missing"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format needs json_schema"),
        (CHAT, {"response_format": {"type": "yaml"}}, "response_format"),
        (CHAT, {"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex and guided_choice each say"),
        (CHAT, {"guided_regex": "["}, "regex is no regular expression"),
        (CHAT, {"guided_regex": "(a|b)*a(a|b){30}"}, "regex needs too large an automaton"),
        (CHAT, {"guided_regex": "[ab]{900}", "max_tokens": 8}, "the shortest text that matches guided_regex has"),
        (CHAT, {"guided_json": "{"}, "guided_json is no JSON"),
        (CHAT, {"guided_json": {"not": {}}}, "not is not supported"),
        (CHAT, {"guided_choice": ["a"], "stop": "x"}, "guided_choice and stop cannot be used together"),
        (CHAT, {"presence_penalty": 2.5}, "presence_penalty"),
        (CHAT, {"top_logprobs": 3}, "top_logprobs needs logprobs"),
        (CHAT, {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        (CHAT, {"logit_bias": {"a": 1}}, "logit_bias: its keys must be token ids"),
        (CHAT, {"logit_bias": {"1": 101}}, "logit_bias"),
        (CHAT, {"logit_bias": {"99999999": 1}}, "logit_bias names ids outside the vocabulary"),
        (CHAT, {"logit_bias": {str(i): 1 for i in range(2000)}}, "at most 1024"),
        (CHAT, {"min_p": 2}, "min_p"),
        (CHAT, {f"x{i}": 1 for i in range(1000)}, "an object has 1001 fields"),
        (CHAT, {"decoding": {f"x{i}": 1 for i in range(1000)}}, "an object has 1000 fields"),
        (CHAT, {"colour": "red"}, "unknown field 'colour'"),
        (CHAT, {"x-y": 1}, "unknown field 'x-y'"),
        (CHAT, {"": 1}, "unknown field ''"),
        (CHAT, {"str": 1}, "unknown field 'str'"),
        (CHAT, {"messages": [{**HELLO[0], "tool_calls": [{"id": "a"}]}]}, "function is missing"),
        (CHAT, {"temperature": 3}, "temperature"),
        (CHAT, {"temperature": "hot"}, "temperature"),
        (CHAT, {"temperature": float("nan")}, "temperature"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
        (CHAT, {"n": 9}, "at most 8"),
        (CHAT, {"stop": ["a"] * 17}, "stop"),
        (CHAT, {"stop": ""}, "stop must hold"),
        (CHAT, {"diffusion": True}, "diffusion needs stream"),
        (CHAT, {"decoding": {"threshold": 2.0}}, "threshold must be"),
        (CHAT, {"decoding": {"cache": "dual"}}, "cache dual keeps the later masks too: give later_masks"),
        (CHAT, {"decoding": {"threshold": 0.5, "steps_per_block": 2}}, "give one of them"),
        (CHAT, {"decoding": {"steps_per_block": 20}}, "at most block_length 8"),
        (CHAT, {"decoding": {"seed": 3}}, "unknown field 'seed'"),
        (CHAT, {"decoding": {"a b": 3}}, "unknown field 'a b'"),
        (CHAT, {"decoding": "quick"}, "decoding"),
        (CHAT, {"messages": [{"role": "user", "content": "one " * 400}]}, "the context is 256"),
        (TEXT, {}, "prompt is missing"),
        (TEXT, {"prompt": [99999]}, "vocabulary"),
        (TEXT, {"prompt": [10**30]}, "prompt"),
        (TEXT, {"prompt": "a", "echo": True, "suffix": "b", "max_tokens": 3}, "echo and suffix"),
        (TEXT, {"prompt": "one two", "echo": True, "stop": "tw"}, "echo cannot repeat"),
        (TEXT, {"prompt": "a", "previous_response_id": "resp_1"}, "this server keeps nothing"),
        (TEXT, {"prompt": "a", "suffix": "b"}, "suffix needs max_tokens"),
        (TEXT, {"prompt": "a", "suffix": "b", "max_tokens": 10**18}, "the context is 256"),
        (TEXT, {"prompt": "a", "slot_tokens": 2}, "no ___"),
        (TEXT, {"prompt": "___" * 90, "slot_tokens": 3}, "the gaps have 270 tokens"),
        (TEXT, {"prompt": "a ___", "slot_tokens": 2, "stop": "x"}, "stop does nothing"),
        (TEXT, {"prompt": "a ___", "slot_tokens": 2, "max_tokens": 9}, "max_tokens does nothing"),
        (TEXT, {"prompt": ["a"] * 300}, "300 answers"),
        (TEXT, {"prompt": "a", "logprobs": 21}, "logprobs"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(server, path, body, said):
    answer = post(server, path, **body)
    assert answer.status_code == 400
    problem = answer.json()["error"]
    assert said in problem["message"]
    assert "\n" not in problem["message"]
    assert problem["type"] == "invalid_request_error"
    of_the_whole = said == "surrogate" or said.startswith("an object has 1001")
    assert of_the_whole or problem["param"] in {*body, "messages", "prompt"}


def test_other_refusals(server):
    for unknown in (post(server, model="gpt"), httpx.get(server + "/v1/models/gpt")):
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert post(server, model="tiny", max_tokens=8).status_code == 200
    text = httpx.post(server + CHAT, content="{}", headers={"content-type": "text/plain"})
    assert (text.status_code, text.json()["error"]["type"]) == (415, "invalid_request_error")
    broken = httpx.post(server + CHAT, content="{", headers={"content-type": "application/json"})
    assert (broken.status_code, "not JSON" in broken.json()["error"]["message"]) == (400, True)
    deep = httpx.post(server + CHAT, content="[" * 100_000, headers={"content-type": "application/json"})
    assert deep.status_code == 400
    nested: list[object] = []
    for _ in range(2000):
        nested = [nested]
    with pytest.raises(ValueError, match="nested too deeply"):  # it may just have been read
        CompletionRequest.model_validate({"prompt": "a", "metadata": {"a": nested}})
    empty = httpx.post(server + CHAT, headers={"content-type": "application/json"})
    assert (empty.status_code, empty.json()["error"]["message"]) == (400, "the body is missing")
    assert httpx.get(server + "/nothing").json()["error"]["message"] == "Not Found"
    assert httpx.put(server + CHAT).status_code == 405
    assert httpx.get(server + "/v1/models/", headers={"host": "localhost"}).status_code == 404  # no redirect
    late = post(server, timeout=1e-6)
    assert (late.status_code, late.json()["error"]["type"]) == (504, "timeout")
    assert late.headers["x-should-retry"] == "false"
    with httpx.stream("POST", server + CHAT, json={"messages": HELLO, "stream": True, "timeout": 1e-6}) as answer:
        assert '"type":"timeout"' in answer.read().decode()


def test_the_server_describes_itself(server):
    assert httpx.get(server + "/health").json() == {"status": "ok"}
    model = httpx.get(server + "/v1/models").json()["data"][0]
    assert (model["id"], model["context_length"], model["chat"], model["defaults"]["block_length"]) == (
        "tiny",
        256,
        True,
        8,
    )
    assert httpx.get(server + "/v1/models/tiny").json()["id"] == "tiny"
    assert httpx.get(server + "/v1/models/other").status_code == 404
    page = httpx.get(server + "/")
    assert page.headers["content-type"].startswith("text/html")
    for answer in (page, httpx.get(server + "/health"), httpx.get(server + "/nothing")):
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers
    assert httpx.get(server + "/page/../app.py").status_code == 404
    counts = httpx.get(server + "/metrics").text
    assert 'illada_requests_total{route="/health",status="200"}' in counts
    assert "illada_passes_total" in counts


def test_names_that_are_not_the_servers_are_refused(server):
    answer = httpx.get(server + "/health", headers={"host": "evil.example"})
    assert (answer.status_code, "--allowed_hosts" in answer.text) == (400, True)
    for host in ("localhost", "127.0.0.1:80", "[::1]:8000", "LOCALHOST:1"):
        assert httpx.get(server + "/health", headers={"host": host}).status_code == 200


def test_keys_bodies_and_origins(serve_model, tmp_path, monkeypatch, caplog):
    (tmp_path / "keys").write_text("first\n\nsécond\n")
    settings = ServerSettings(
        api_key_file=str(tmp_path / "keys"),
        max_body_bytes=300,
        cors_origins=("https://a.example",),
        allowed_hosts=("b",),
    )
    with serve_model(settings) as (address, _):
        base = httpx.Client(base_url=address, headers={"host": "b"})
        for wrong in ("", "Bearer nope", "Bearer", "first", "Basic first"):
            for path in ("/v1/models", "/metrics", "/%761/models", "/v1/nothing"):
                assert base.get(path, headers={"authorization": wrong}).status_code == 401, (path, wrong)
        assert base.get("/v1/models").headers["www-authenticate"] == "Bearer"
        assert base.get("/v1/models", headers={"authorization": "bearer first"}).status_code == 200
        assert base.get("/health").status_code == base.get("/").status_code == 200
        for key in ("first", "sécond"):
            bearer = f"Bearer {key}".encode()
            assert base.get("/v1/models", headers={"authorization": bearer}).status_code == 200
        key = {"authorization": "Bearer first", "content-type": "application/json"}
        large = json.dumps({"prompt": "x" * 400})
        assert base.post(TEXT, content=large, headers=key).status_code == 413
        assert base.post(TEXT, content=iter([large.encode()]), headers=key).status_code == 413
        assert base.post(TEXT, content=large).status_code == 401
        origin = {**key, "origin": "https://a.example"}
        answer = base.post(TEXT, json={"prompt": "a", "max_tokens": 8}, headers=origin)
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        refused = base.get("/v1/models", headers={"origin": "https://a.example"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://a.example")
        other = base.get("/v1/models", headers={**key, "origin": "https://c.example"})
        assert "access-control-allow-origin" not in other.headers
    monkeypatch.setenv("ILLADA_API_KEYS", "one, two")
    with serve_model() as (address, _):
        assert httpx.get(address + "/v1/models").status_code == 401
        assert httpx.get(address + "/v1/models", headers={"authorization": "Bearer two"}).status_code == 200


class Gate:
    """Holds the engine before a pass until `open` is set."""

    def __init__(self, app):
        self.worker = app.state.worker
        self.open = threading.Event()
        self.reached = threading.Event()
        self.step = self.worker.engine.step
        self.worker.engine.step = self.wait

    def wait(self):
        self.reached.set()
        assert self.open.wait(60)
        return self.step()


def test_defaults_of_the_server_give_way_to_requests(serve_model):
    server = ServerSettings(request_timeout=60)
    with serve_model(server, threshold=0.3, cache="adaptive", refresh_below=0.7) as (address, _):
        assert post(address, max_tokens=4, decoding={"steps_per_block": 2}).status_code == 200
        assert post(address, max_tokens=4, decoding={"cache": "prefix"}).status_code == 200
    with serve_model(ServerSettings(request_timeout=1e-6)) as (address, _):
        assert post(address, timeout=60).status_code == 504


def test_names_of_openais_fields(server):
    found = post(server, max_completion_tokens=3, messages=[{"role": "developer", "content": "a"}, *HELLO]).json()
    system = post(server, max_tokens=3, messages=[{"role": "system", "content": "a"}, *HELLO]).json()
    assert found["usage"] == system["usage"]
    assert found["usage"]["completion_tokens"] <= 3


def test_a_body_that_does_not_come_and_paths_that_are_not_there(server, monkeypatch):
    monkeypatch.setattr("illada.serving.middleware.BODY_SECONDS", 0.05)
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        head = f"POST {TEXT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{{"
        connection.sendall(head.encode())
        assert b" 408 " in connection.recv(100)
    httpx.get(server + "/made-up")
    counts = httpx.get(server + "/metrics").text
    assert "made-up" not in counts
    assert 'route="/v1/completions",status="408"' in counts or 'route="other",status="408"' in counts


def test_a_silent_stream_says_that_it_is_there(serve_model, monkeypatch):
    monkeypatch.setattr("illada.serving.streams.SIGN_OF_LIFE", 0.01)
    with serve_model() as (address, app):
        gate = Gate(app)
        with httpx.stream("POST", address + CHAT, json={"messages": HELLO, "stream": True, "max_tokens": 4}) as answer:
            lines = answer.iter_lines()
            assert ": wait" in lines
            gate.open.set()
            assert "data: [DONE]" in lines


def test_a_client_that_does_not_read_is_left(still, caplog):
    answer, _ = still.begin()
    call = SimpleNamespace(cancel=lambda: still.cancel(answer))

    async def endless():
        while True:
            yield "data: more"

    async def forever(*_):
        await asyncio.Event().wait()

    asyncio.run(EventStream(endless(), call, 0.05)({"type": "http", "asgi": {}}, forever, forever))
    assert "did not read" in caplog.text
    assert not still._open


def test_when_to_come_back_follows_from_how_fast_answers_end(still):
    assert still.retry_after() == 1
    for ends, seconds in (([0.0, 0.1, 0.2], 1), ([0.0, 3.0, 9.0], 5), ([0.0, 4000.0], 60)):
        still._ends.clear()
        still._ends.extend(ends)
        assert still.retry_after() == seconds


def test_passes_and_positions_are_counted_once(still):
    (answer, _), (other, _) = still.begin(), still.begin(guidance_scale=1.0)
    still.obey()
    for _ in range(8):
        still._pass()
    still.hear()
    value = still.metrics.registry.get_sample_value
    assert value("illada_passes_total") == 8
    assert value("illada_forwards_total") == answer.request.forwards + other.request.forwards == 8 + 16
    assert value("illada_positions_total") == answer.request.positions + other.request.positions
    assert value("illada_first_commit_seconds_count") == 2
    assert value("illada_tokens_total") == 16


def test_the_end_fails_what_is_under_way(serve_model, served_model):
    async def end():
        worker = Worker(*served_model, ServerSettings())
        await worker.start()
        updates = asyncio.Queue()
        request = worker.engine.request([1], GenerationSettings(200, 200, eos_token_id=None))
        worker.submit([Answer(0, request, Detokenizer(served_model[1]), 200)], updates.put_nowait)
        await worker.close()
        with pytest.raises(ApiError, match="about to end") as refused:
            worker.check_room(1)
        assert refused.value.status == 503
        return await updates.get()

    assert asyncio.run(end())[1].finish == "error"


def test_too_many_requests_are_sent_away_and_the_rest_is_served(serve_model):
    with serve_model(ServerSettings(max_requests=3, max_choices=3)) as (address, app):
        gate = Gate(app)
        found = []
        threads = [threading.Thread(target=lambda n=n: found.append(post(address, max_tokens=8, n=n))) for n in (2, 1)]
        threads[0].start()
        assert gate.reached.wait(60)
        refused = post(address, n=2)
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        threads[1].start()
        gate.open.set()
        for thread in threads:
            thread.join(60)
        assert [answer.status_code for answer in found] == [200, 200]
        assert post(address, n=3, max_tokens=8).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(serve_model, stream):
    with serve_model() as (address, app):
        gate = Gate(app)

        async def leave():
            async with httpx.AsyncClient(timeout=60) as client:
                ask = client.post(address + CHAT, json={"messages": HELLO, "stream": stream, "max_tokens": 200})
                task = asyncio.create_task(ask)
                await asyncio.to_thread(gate.reached.wait, 60)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

        asyncio.run(leave())
        gate.open.set()
        assert post(address, max_tokens=8).status_code == 200
        engine = app.state.worker.engine
        for _ in range(200):  # the disconnect has to reach the server
            if not engine.busy:
                break
            post(address, max_tokens=1)
        assert not engine.busy
        counts = httpx.get(address + "/metrics").text
        assert 'illada_answers_total{how="cancelled"} 1.0' in counts


def test_a_pass_that_fails_fails_its_answers_only(serve_model, caplog):
    with serve_model() as (address, app):
        worker = app.state.worker

        def fail():
            raise RuntimeError("out of memory")

        worker.engine.step = fail
        answer = post(address)
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert post(address, max_tokens=8).status_code == 200  # by a new engine
        worker.engine.step = fail
        with httpx.stream("POST", address + CHAT, json={"messages": HELLO, "stream": True}) as stream:
            assert '"type":"server_error"' in stream.read().decode()
        assert post(address, max_tokens=8).status_code == 200


def test_what_nobody_foresaw_is_an_error_as_clients_read_it(serve_model, monkeypatch, caplog):
    with serve_model() as (address, app):

        def fail(*_):
            raise RuntimeError("a secret")

        monkeypatch.setattr(app.state.worker, "submit", fail)
        answer = post(address)
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert "secret" not in answer.text
        assert "a secret" in caplog.text
        assert "x-frame-options" in answer.headers
        counts = httpx.get(address + "/metrics").text
        assert 'illada_requests_total{route="/v1/chat/completions",status="500"} 1.0' in counts


def test_requests_that_are_being_encoded_have_a_place_too(serve_model, monkeypatch):
    begun, go = threading.Event(), threading.Event()

    def slow(*arguments):
        begun.set()
        assert go.wait(60)
        return encode_prompt(*arguments)

    monkeypatch.setattr("illada.serving.handlers.encode_prompt", slow)
    with serve_model(ServerSettings(max_requests=1, max_choices=1)) as (address, _):
        found = []
        thread = threading.Thread(target=lambda: found.append(post(address, max_tokens=4)))
        thread.start()
        assert begun.wait(60)
        assert post(address, TEXT, prompt="one").status_code == 429
        go.set()
        thread.join(60)
        assert found[0].status_code == 200
        assert post(address, max_tokens=4).status_code == 200


class Still(Worker):
    """A worker without a thread or a loop, moved step by step."""

    def __init__(self, model, tokenizer, server=ServerSettings()):  # noqa: B008
        super().__init__(model, tokenizer, server)
        self._loop = SimpleNamespace(call_soon_threadsafe=lambda call, *values: self.calls.append((call, values)))
        self.calls = []

    def begin(self, limit=8, budget=8, stream=True, watched=False, **settings):
        updates = []
        values = {"max_new_tokens": budget, "block_length": 8, "eos_token_id": None, **settings}
        request = self.engine.request([1, 2], GenerationSettings(**values))
        request.watched = watched
        answer = Answer(0, request, Detokenizer(self._tokenizer), limit, stream)
        self.submit([answer], lambda pair: updates.append(pair[1]))
        return answer, updates

    def obey(self):
        while not self._commands.empty():
            self._commands.get()()

    def hear(self):
        calls, self.calls = self.calls, []
        for call, values in calls:
            call(*values)

    def counted(self, **labels):
        return self.metrics.registry.get_sample_value("illada_answers_total", labels)


@pytest.fixture
def still(served_model):
    return Still(*served_model)


def test_leaving_after_a_failure_does_not_end_another_answer(still):
    lost, none = still.begin()
    still.obey()
    still._pass()
    still._fail()
    still.engine = still._new_engine()
    _, updates = still.begin()
    still.cancel(lost)  # before it has heard of the failure
    still.obey()
    for _ in range(8):
        still._pass()
    still.hear()
    assert len(none) == 0
    assert updates[-1].finish == "length"
    assert not still._open
    assert not still._live


@pytest.mark.parametrize("passes", range(9))
def test_an_answer_can_be_left_after_any_pass(still, passes):
    answer, updates = still.begin(watched=True, cache="prefix", speculate=2)
    if passes:
        still.obey()
    for _ in range(passes):
        still._pass()
    for _ in "twice":
        still.cancel(answer)
    still.obey()
    still._pass()
    still.hear()
    assert updates == []
    assert not any((still._open, still._live, still.engine.busy))
    assert len(still.engine.pool.free) == still.engine.pool.pages
    assert still.counted(how="cancelled") == 1


def test_steps_that_wait_for_a_slow_client_hold_their_own_block_only(still):
    answer, updates = still.begin(limit=14, budget=16, watched=True)
    still.obey()
    for _ in range(16):
        still._pass()
    still.hear()
    steps = [step for update in updates for step in update.steps]
    assert [step.event.block for step in steps] == [0] * 8 + [8] * (len(steps) - 8)
    assert {len(step.event.ids) for step in steps} == {8}
    assert sum(len(update.ids) for update in updates) == 14
    assert not any((still._open, still._live, answer.steps, still.engine.busy))


def test_a_stop_string_ends_an_answer_before_the_engine_sees_it(still, served_model):
    tokenizer = served_model[1]
    ids = tokenizer.encode("one two", add_special_tokens=False)
    request = still.engine.request([1], GenerationSettings(8, 8, eos_token_id=None, stop=("tw",)))

    async def follow():
        answers = [Answer(at, copy.copy(request), Detokenizer(tokenizer, ("tw",)), 8, True) for at in range(2)]
        call = Call(still, answers, 60.0)
        still._deliver([(answer, Update(ids, [0.0] * len(ids), 1, [])) for answer in answers])
        await call.finish()
        assert [(answer.content, answer.finish) for answer in answers] == [("one ", "stop")] * 2

    asyncio.run(follow())
    assert (still.counted(how="stop"), still.counted(how="cancelled")) == (2, None)


def test_an_answer_that_a_stop_string_ends_is_counted_as_any_other(serve_model):
    with serve_model(repetition_penalty=2.0) as (address, _):
        whole = post(address).json()["choices"][0]["message"]["content"]
        events(address, stop=whole[3:5])
        lines = dict(line.rsplit(" ", 1) for line in httpx.get(address + "/metrics").text.splitlines())
        assert lines['illada_answers_total{how="stop"}'] == "1.0"
        assert lines["illada_answer_seconds_count"] == "2.0"


def test_answers_under_way_are_finished_before_the_end(serve_model):
    with serve_model() as (address, app):
        gate = Gate(app)
        found = []
        thread = threading.Thread(target=lambda: found.append(post(address, max_tokens=8)))
        thread.start()
        assert gate.reached.wait(60)
        app.state.worker.draining = True
        assert httpx.get(address + "/health").status_code == 503
        refused = post(address)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        gate.open.set()
        thread.join(60)
    assert found[0].status_code == 200


def test_an_answer_does_not_depend_on_the_load(server):
    asks = [
        {"temperature": 1.0, "seed": 11, "max_tokens": 24},
        {"temperature": 0.7, "top_p": 0.9, "seed": 12, "max_tokens": 17, "decoding": {"threshold": 0.4}},
        {"temperature": 0, "decoding": {"cache": "adaptive", "speculate": 2}},
    ]
    expected = [post(server, **ask).json()["choices"] for ask in asks]
    rng = np.random.default_rng(0)
    others = [
        {"temperature": 1.5, "seed": int(rng.integers(1000)), "max_tokens": int(rng.integers(1, 60))} for _ in range(30)
    ]

    async def crowd():
        async with httpx.AsyncClient(timeout=60) as client:
            bodies = [*others[:15], *asks, *others[15:]]
            answers = await asyncio.gather(
                *(client.post(server + CHAT, json={"messages": HELLO, **body}) for body in bodies)
            )
            return [answer.json()["choices"] for answer in answers[15 : 15 + len(asks)]]

    assert asyncio.run(crowd()) == expected


@pytest.mark.parametrize(
    ("module", "package"),
    [("app", "fastapi"), ("server", "uvicorn"), ("metrics", "prometheus_client"), ("protocol", "pydantic")],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, module, package):
    importlib.import_module(f"illada.serving.{module}")
    monkeypatch.delitem(sys.modules, f"illada.serving.{module}")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"^serving needs {package}: pip install 'illada\[serve\]'$"):
        importlib.import_module(f"illada.serving.{module}")


def test_prompts_are_logged_only_when_asked(serve_model, caplog):
    for asked in (False, True):
        caplog.clear()
        with caplog.at_level("INFO"), serve_model(replace(ServerSettings(), log_prompts=asked)) as (address, _):
            post(address, max_tokens=8, messages=[{"role": "user", "content": "secret words"}])
            events(address, max_tokens=8, messages=[{"role": "user", "content": "secret words"}])
        assert ("secret words" in caplog.text) == asked
        assert ("answered" in caplog.text) == asked


def test_times_are_counted(server):
    post(server, max_tokens=8)
    lines = dict(line.rsplit(" ", 1) for line in httpx.get(server + "/metrics").text.splitlines() if line[0] != "#")
    assert float(lines["illada_first_commit_seconds_count"]) >= 1
    assert float(lines["illada_first_commit_seconds_sum"]) <= float(lines["illada_answer_seconds_sum"])
