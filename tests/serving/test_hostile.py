"""A server under hostile requests: each gets an answer or one line, none breaks it, and it answers as before."""

import json
import socket

import httpx
import pytest

from illada.serving.messages import ChatMessage, Item, ItemPart, TextPart
from illada.serving.protocol import (
    NEUTRAL,
    ChatRequest,
    CompletionRequest,
    Decoding,
    DetokenizeRequest,
    GenerationRequest,
    ResponseRequest,
    StreamOptions,
    TextOptions,
    TokenizeRequest,
)

pytestmark = pytest.mark.slow

CHAT, TEXT, ITEMS = "/v1/chat/completions", "/v1/completions", "/v1/responses"
KINDS = {
    CHAT: (ChatRequest, {"messages": [{"role": "user", "content": "one"}], "max_tokens": 2}),
    TEXT: (CompletionRequest, {"prompt": "one two", "max_tokens": 2}),
    ITEMS: (ResponseRequest, {"input": "one", "max_output_tokens": 2}),
    "/tokenize": (TokenizeRequest, {"prompt": "one"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [5, 6]}),
}
INSIDE = [
    (Decoding, TEXT, lambda part: {"prompt": "one", "max_tokens": 2, "decoding": part}),
    (StreamOptions, TEXT, lambda part: {"prompt": "one", "max_tokens": 2, "stream": True, "stream_options": part}),
    (TextOptions, ITEMS, lambda part: {"input": "one", "max_output_tokens": 2, "text": part}),
    (ChatMessage, CHAT, lambda part: {"messages": [{"role": "user", "content": "a"} | part], "max_tokens": 2}),
    (ChatMessage, "/tokenize", lambda part: {"messages": [{"role": "user", "content": "a"} | part]}),
    (
        TextPart,
        CHAT,
        lambda part: {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"} | part]}]},
    ),
    (Item, ITEMS, lambda part: {"input": [{"role": "user", "content": "a"} | part], "max_output_tokens": 2}),
    (
        ItemPart,
        ITEMS,
        lambda part: {
            "input": [{"role": "user", "content": [{"type": "text", "text": "a"} | part]}],
            "max_output_tokens": 2,
        },
    ),
]
ODD = [True, -1, "1e999", 10**30, '"\\ud83d"', [None], {"a": 1}, "[" * 2000 + "]" * 2000]
"""Values, as JSON where they are text."""
BODIES = [
    *(b"", b"null", b"[]", b"3", b"{", b"\xff\xfe", b"\0" * 100, b"{}", b"9" * 10_000),
    '{"prompt": "a"}'.encode("utf-16"),
    *(b"[" * 100_000, b'{"a":' * 50_000, b"[" * 50_000 + b"]" * 50_000, b" " * 900_000),
    b'{"prompt": "' + b"a" * 1_000_001 + b'"}',
    json.dumps({f"k{i}": 1 for i in range(50_000)}).encode(),
    json.dumps({"prompt": "a", "logit_bias": {str(i): 1 for i in range(50_000)}}).encode(),
    json.dumps({"prompt": [1] * 100_000}).encode(),
    json.dumps({"prompt": "a" * 20_000}).encode(),
    json.dumps({"prompt": [[1]] * 10_000}).encode(),
    json.dumps({"messages": [{"role": "user", "content": "a"}] * 10_000}).encode(),
    json.dumps({"tokens": [10**9]}).encode(),
    '{"prompt": "\ud83d"}'.encode("utf-8", "surrogatepass"),
]  # fmt: skip
TOGETHER = [
    *({"slot_tokens": n} for n in (1, 1000, 10**9, 2**63)),
    {"slot_tokens": 1, "prompt": "___" * 60, "logprobs": 20},
    {"slot_tokens": 1, "prompt": "___" * 100_000},
    {"slot_tokens": 1, "prompt": "a ___ b", "echo": True, "logprobs": 5, "n": 3, "temperature": 1},
    {"slot_tokens": 1, "prompt": "___", "stop": "x"},
    {"slot_tokens": 1, "prompt": "___", "suffix": "x"},
    {"suffix": " six", "max_tokens": 10**12},
    {"suffix": " six", "max_tokens": 2, "echo": True},
    {"suffix": "x" * 5000, "max_tokens": 2, "stream": True, "logprobs": 20, "n": 2, "temperature": 2},
    *({"stop": stop, "echo": True} for stop in ("x", [""], ["a" * 257], ["x"] * 17, ["\0"], ["one"])),
    *({"logit_bias": bias, "temperature": 1, "min_p": 1} for bias in ({"5": 100}, {"999999999": 1}, {"٣": 1})),
    *({"temperature": t, "top_p": p, "seed": -(2**63)} for t in (5e-324, 2) for p in (5e-324, 1)),
    *({"n": n, "temperature": 2} for n in (8, 9, 10**9)),
    *({"decoding": {"block_length": b}, "max_tokens": 10**30} for b in (1, 10**12)),
    *({"decoding": {name: 1e308}} for name in ("threshold", "entropy_bound", "guidance_scale", "think_boost")),
    {"decoding": {"speculate": 16, "cache": "adaptive", "remasking": "random"}, "logprobs": 20},
]  # fmt: skip
RAW = [
    b"x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /health HTTP/1.1\r\nX: %s\r\n\r\n" % (b"y" * 70_000),
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n X: folded\r\n\r\n",
    *(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n%s\r\n\r\n{}" % header
        for header in (
            b"Content-Length: -1",
            b"Content-Length: x",
            b"Content-Length: 2\r\nContent-Length: 3",
            b"Content-Length: 99999999999999999999999",
            b"Transfer-Encoding: gzip, chunked",
            b"Transfer-Encoding: chunked",  # no chunk follows
        )
    ),
]


def requests():
    """Yield (path, body) of every request."""
    for path, (kind, right) in KINDS.items():
        names = {*kind.model_fields, "nokey"}
        # What all requests for answers share is tried with one of them.
        names = names | NEUTRAL.keys() if path == TEXT else names - GenerationRequest.model_fields.keys()
        for name in sorted(names):
            for value in ODD:
                yield path, written(right | {name: "HERE"}, value)
        for body in BODIES:
            yield path, body
    for kind, path, around in INSIDE:
        for name in kind.model_fields:
            for value in ODD:
                yield path, written(around({name: "HERE"}), value)
    for values in TOGETHER:
        yield TEXT, json.dumps({"prompt": "one ___", "max_tokens": None if "slot_tokens" in values else 2} | values)


def written(body, value):
    return json.dumps(body).replace('"HERE"', value if isinstance(value, str) else json.dumps(value))


def usual(client):
    """What the server says to the plain request of each kind, without names and times."""
    seeded = {
        path: right | ({"temperature": 1, "seed": 5} if "/v1" in path else {}) for path, (_, right) in KINDS.items()
    }
    answers = [client.post(path, json=body).json() for path, body in seeded.items()]
    return [[answer.get(part) for part in ("choices", "tokens", "prompt")] for answer in answers]


def test_odd_requests_get_one_line_and_change_nothing(server, caplog):
    with httpx.Client(base_url=server, timeout=60, headers={"content-type": "application/json"}) as client:
        before = usual(client)
        assert before[0][0]
        count = 0
        for path, body in requests():
            answer = client.post(path, content=body)
            count += 1
            assert answer.status_code in (200, 400, 404, 413), (path, body[:200], answer.text[:300])
            if answer.status_code != 200:
                error = answer.json()["error"]
                assert 0 < len(error["message"]) < 500, (path, body[:200])
                assert "\n" not in error["message"], (path, body[:200])
        assert count > 1000
        for way in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"):
            for path in (
                *KINDS,
                "/v1/embeddings",
                "/v1/models",
                "/health",
                "/metrics",
                "/",
                "/page/%2e%2e/app.py",
                "/nope",
            ):
                assert client.request(way, path).status_code < 500, (way, path)
        for kind in ("", "text/plain", "application/x-www-form-urlencoded", "application/jsonx"):
            refused = client.post(TEXT, content=b"{}", headers={"content-type": kind})
            assert refused.status_code == 415, kind
        assert usual(client) == before
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.filterwarnings("ignore")
def test_what_is_no_http_is_refused_and_streams_may_be_left(server):
    host, port = server.removeprefix("http://").split(":")
    stream = json.dumps({"prompt": "one", "stream": True, "diffusion": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n"
    with httpx.Client(base_url=server, timeout=60) as client:
        before = usual(client)
        for data in RAW:
            with socket.create_connection((host, int(port)), timeout=30) as connection:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                assert connection.recv(1000).partition(b"\r\n")[0][9:10] in (b"4", b""), data[:100]
        for size in (0, 1, 500):
            with socket.create_connection((host, int(port)), timeout=30) as connection:
                connection.sendall(head % len(stream) + stream)
                connection.recv(size)
        assert usual(client) == before
