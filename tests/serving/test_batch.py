"""`illada batch`: the answers of a server without one, and a killed run that goes on."""

import json

import httpx
import pytest

from illada import GenerationSettings
from illada.errors import IlladaError
from illada.serving.batch import answer_batch
from illada.weights.options import ModelOptions

HELLO = [{"role": "user", "content": "one two"}]
BODIES = {
    "chat": ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 9, "stream": True}),
    "text": ("/v1/completions", {"prompt": ["one", "two"], "max_tokens": 5, "temperature": 1.0, "seed": 4}),
    "items": ("/v1/responses", {"input": "one two", "max_output_tokens": 7}),
    "wrong": ("/v1/chat/completions", {"messages": []}),
    "long": ("/v1/completions", {"prompt": "one " * 400}),
}


@pytest.fixture(scope="module")
def model(served_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch") / "tiny"
    for part in served_model:
        part.save_pretrained(folder)
    return ModelOptions(str(folder))


@pytest.fixture
def run(model, tmp_path):
    def run(records=None, output="out.jsonl", at_once=2):
        if records is None:
            records = [{"custom_id": key, "method": "POST", "url": u, "body": b} for key, (u, b) in BODIES.items()]
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
        settings = GenerationSettings(max_new_tokens=32, block_length=8)
        answer_batch(str(tmp_path / "in.jsonl"), str(tmp_path / output), model, settings, at_once)
        return (tmp_path / output).read_text().splitlines(keepends=True)

    return run


def by_id(lines):
    return {record["custom_id"]: record["response"] for record in map(json.loads, lines)}


def said(body):
    """What an answer says, without names and times."""
    return body.get("choices") or [item["content"] for item in body.get("output", ())] or body["error"]


def test_a_batch_gives_the_answers_of_a_server(run, server):
    found = by_id(run())
    assert found.keys() == BODIES.keys()
    for key, (url, body) in BODIES.items():
        answer = httpx.post(server + url, json={**body, "stream": False}, timeout=60)
        assert found[key]["status_code"] == answer.status_code
        assert said(found[key]["body"]) == said(answer.json())


def test_a_killed_batch_goes_on(run, tmp_path, capsys):
    whole = run()
    failed = json.loads(whole[1])
    failed["response"]["status_code"] = 500
    (tmp_path / "out.jsonl").write_text(whole[0] + json.dumps(failed) + "\n" + whole[2][:40])
    again = run()
    assert "5 requests, 1 answered before" in capsys.readouterr().err
    assert again[0] == whole[0]
    assert {key: said(one["body"]) for key, one in by_id(again).items()} == {
        key: said(one["body"]) for key, one in by_id(whole).items()
    }
    assert run() == again


def test_many_answers_wait_for_their_turn(run):
    body = {"prompt": ["one", "two"], "n": 8, "max_tokens": 1}
    records = [{"custom_id": str(i), "url": "/v1/completions", "body": body} for i in range(20)]  # 320 answers
    assert {one["status_code"] for one in by_id(run(records, at_once=20)).values()} == {200}


@pytest.mark.parametrize(
    ("records", "says"),
    [
        (["{"], "line 1 is not JSON"),
        (["[" * 100_000], "line 1 is not JSON"),
        ([[]], "line 1 is not"),
        ([{"custom_id": 3, "url": "/v1/completions", "body": {}}], "line 1 is not"),
        ([{"custom_id": "\ud800", "url": "/v1/completions", "body": {}}], "line 1 is not"),
        ([{"custom_id": "a", "url": "/v1/embeddings", "body": {}}], "line 1: method must be POST and url one of"),
        ([{"custom_id": "a", "url": ["/v1/completions"], "body": {}}], "line 1: method must be POST and url one of"),
        ([{"custom_id": "a", "url": "/v1/completions", "body": {}}] * 2, "line 2: its custom_id was there before"),
    ],
)
def test_an_input_of_another_form_is_refused_before_anything_is_loaded(run, records, says):
    with pytest.raises(IlladaError, match=says):
        run(records)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("nonsense\n", "line 1 is no answer of a batch"),
        ("a note without an end of line", "does not end in an answer of a batch"),
        ('{"custom_id": "chat", "response": {"status_code": true}}\n', "line 1 is no answer of a batch"),
        ('{"custom_id": "x", "response": {"status_code": 200}}\n', "answers 'x', which is not asked for"),
    ],
)
def test_an_output_of_something_else_is_left_as_it_is(run, tmp_path, content, says):
    (tmp_path / "out.jsonl").write_text(content)
    with pytest.raises(IlladaError, match=says):
        run()
    assert (tmp_path / "out.jsonl").read_text() == content
    for name in ("in.jsonl", "."):
        with pytest.raises(IlladaError, match="give another --output"):
            run(output=name)
