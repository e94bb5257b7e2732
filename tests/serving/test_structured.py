"""Answers of a given form from the server: OpenAI's response formats with its own client, and the fields of others."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import httpx
import pytest

from illada.generation import engine

CHAT, TEXT, ITEMS = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HELLO = [{"role": "user", "content": "one two"}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}, "n": {"type": "integer", "maximum": 20}},
    "required": ["ok", "kind"],
    "additionalProperties": False,
}


def ask(server, path, **body):
    return httpx.post(server + path, json={"max_tokens": 64, **body}, timeout=60)


def text_of(answer):
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"]


def is_valid(text):
    found = json.loads(text)
    assert isinstance(found["ok"], bool)
    assert found["kind"] in "ab"
    assert found.get("n", 0) <= 20
    assert found.keys() <= {"ok", "kind", "n"}


@pytest.mark.slow
def test_openai_parses_what_it_asked_for(server):
    openai = pytest.importorskip("openai")
    pydantic = pytest.importorskip("pydantic")

    class Reply(pydantic.BaseModel):
        ok: bool
        kind: Literal["a", "b"]
        more: list[bool] | None

    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    for temperature in (0, 1):
        given = {"model": "tiny", "temperature": temperature}
        chat = client.chat.completions.parse(messages=HELLO, response_format=Reply, max_tokens=120, **given)
        assert isinstance(chat.choices[0].message.parsed, Reply)
        response = client.responses.parse(input="one two", text_format=Reply, max_output_tokens=120, **given)
        assert isinstance(response.output_parsed, Reply)
    with client.chat.completions.stream(model="tiny", messages=HELLO, response_format=Reply, max_tokens=120) as events:
        final = events.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Reply)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA, "strict": True}}},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
    ],
    ids=lambda fields: next(iter(fields)),
)
@pytest.mark.parametrize("decoding", ["exact", "fast", {"block_length": 16, "speculate": 2}], ids=str)
def test_schemas_by_every_name(server, fields, decoding):
    is_valid(text_of(ask(server, CHAT, messages=HELLO, decoding=decoding, **fields)))
    is_valid(text_of(ask(server, TEXT, prompt="one", temperature=1, seed=3, decoding=decoding, **fields)))


def test_the_other_forms(server):
    found = text_of(ask(server, CHAT, messages=HELLO, guided_regex="(?:one|two){2,3}"))
    assert re.fullmatch("(?:one|two){2,3}", found)
    assert text_of(ask(server, CHAT, messages=HELLO, structured_outputs={"choice": ["yes", "no"]})) in ("yes", "no")
    assert text_of(ask(server, CHAT, messages=HELLO, guided_choice=["certainly"])) == "certainly"
    assert isinstance(
        json.loads(text_of(ask(server, CHAT, messages=HELLO, response_format={"type": "json_object"}))), dict
    )
    plain = text_of(ask(server, CHAT, messages=HELLO))
    assert text_of(ask(server, CHAT, messages=HELLO, response_format={"type": "text"})) == plain
    item = ask(server, ITEMS, input="one", text={"format": {"type": "json_schema", "name": "it", "schema": SCHEMA}})
    is_valid(item.json()["output"][0]["content"][0]["text"])


def test_a_gap_has_a_form_too(server):
    found = text_of(ask(server, TEXT, prompt="one ___ two", slot_tokens=3, guided_regex=r"[0-9]{3,5}", max_tokens=None))
    assert re.search(r"one [0-9]{3,5} two", found)


def test_a_stream_gives_the_same(server):
    body = {"messages": HELLO, "max_tokens": 64, "guided_json": SCHEMA}
    whole = text_of(ask(server, CHAT, **body))
    pieces = []
    with httpx.stream("POST", server + CHAT, json={**body, "stream": True}, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                pieces += [json.loads(line[6:])["choices"][0]["delta"].get("content") or ""]
    assert "".join(pieces) == whole


def test_steps_show_what_the_form_gave(server):
    """Of every block, those included that no pass was needed for: first, between and last."""
    regex = "(?:abcdefgh){4}[0-9]{2}(?:hgfedcba){4}[0-9](?:hgfedcba){4}"
    body = {"messages": HELLO, "max_tokens": 120, "guided_regex": regex, "stream": True, "diffusion": True}
    texts, states, confidences, forwards = [], "", [], 0
    with httpx.stream("POST", server + CHAT, json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {") and (step := json.loads(line[6:]))["object"] == "diffusion.step":
                start, forwards = step["start"], step["forwards"]
                texts[start:], states = step["texts"], states[:start] + step["states"]
                confidences[start:] = step["confidences"]
    assert re.fullmatch(regex, "".join(texts))
    assert set(states.rstrip("m")) == {"c", "g"}  # behind the end nothing is decided
    assert states.count("c") == forwards  # each pass decides one token
    assert all(p == 1 for p, state in zip(confidences, states, strict=True) if state == "g")


@pytest.mark.slow
def test_company_changes_nothing(server):
    """A third of the requests have a form; each answer is the one that its request gets alone."""
    bodies = [
        {"messages": [{"role": "user", "content": f"one {n}"}], "seed": n, "temperature": n % 2}
        | ({"guided_json": SCHEMA} if n % 3 == 0 else {"max_tokens": 24})
        for n in range(24)
    ]
    alone = [text_of(ask(server, CHAT, **body)) for body in bodies]
    with ThreadPoolExecutor(12) as pool:
        together = [*pool.map(lambda body: text_of(ask(server, CHAT, **body)), bodies)]
    assert together == alone
    for text in together[::3]:
        is_valid(text)


def test_what_cannot_fit_is_refused_with_both_numbers(server):
    answer = ask(server, CHAT, messages=HELLO, guided_json=SCHEMA, max_tokens=4)
    assert answer.status_code == 400
    assert re.search(r"has \d+ tokens, the answer at most 4", answer.json()["error"]["message"])


def test_an_answer_may_use_all_the_tokens_it_is_given(server):
    found = ask(
        server, CHAT, messages=HELLO, guided_regex="[0-9]{30,200}", max_tokens=60, decoding={"block_length": 32}
    )
    assert re.fullmatch("[0-9]{30,200}", text_of(found))


def test_gaps_that_no_text_fills_are_refused(server):
    answer = ask(server, TEXT, prompt="x = ___ y", slot_tokens=4, guided_choice=["a"], max_tokens=None)
    assert answer.status_code == 400
    assert "has exactly 4 tokens" in answer.json()["error"]["message"]


def test_two_forms_are_refused_and_a_response_names_its_own(server):
    text = {"format": {"type": "json_object"}}
    both = ask(server, ITEMS, input="x", guided_regex="[0-9]{2}", text=text)
    assert both.status_code == 400
    assert ask(server, ITEMS, input="x", text=text).json()["text"] == text


def test_a_server_may_have_a_form_of_its_own(serve_model):
    with serve_model(regex="[0-9]{3}") as (address, _):
        assert re.fullmatch("[0-9]{3}", text_of(ask(address, CHAT, messages=HELLO)))
        plain = text_of(ask(address, CHAT, messages=HELLO, response_format={"type": "text"}))
        assert not re.fullmatch("[0-9]{3}", plain)


def test_each_slot_has_its_own_expression(server):
    body = {"prompt": "one ___ two ___", "slot_tokens": 3, "slot_regex": ["[a-c]{2,9}", "[0-9]+"]}
    letters, digits = ask(server, TEXT, **{**body, "max_tokens": None}).json()["choices"][0]["fills"]
    assert re.fullmatch("[a-c]{2,9}", letters)
    assert re.fullmatch("[0-9]+", digits)
    for path, more, words in (
        (TEXT, {"prompt": "one ___"}, "slot_regex has 2"),
        (CHAT, {"messages": HELLO}, "0 slots"),
    ):
        sent = {"slot_regex": body["slot_regex"], **more} if path == CHAT else {**body, **more, "max_tokens": None}
        error = ask(server, path, **sent).json()["error"]
        assert error["param"] == "slot_regex"
        assert words in error["message"]


def test_who_wants_no_form_waits_for_none(serve_model, monkeypatch):
    begun, go_on, give = threading.Event(), threading.Event(), engine.give_form

    def slow(request, *more):
        if request.settings.forms:
            begun.set()
            assert go_on.wait(60)
        give(request, *more)

    monkeypatch.setattr(engine, "give_form", slow)
    with serve_model() as (address, _), ThreadPoolExecutor() as pool:
        formed = pool.submit(ask, address, CHAT, messages=HELLO, guided_regex="a")
        try:
            assert begun.wait(60)
            body = {"messages": HELLO, "max_tokens": 8}
            assert httpx.post(address + CHAT, json=body, timeout=30).status_code == 200
            assert not formed.done()
        finally:
            go_on.set()
        assert text_of(formed.result()) == "a"
