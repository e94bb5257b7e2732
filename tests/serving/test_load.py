"""The load generator against a server that misbehaves on purpose, and the real server under load.

The full forms: `python benchmarks/serve_soak.py` (200 clients, two minutes) and `illada bench serve`.
"""

import contextlib
import importlib.util
import json
import socket
import threading
import urllib.request
from itertools import islice
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi import Request as Received
from fastapi.responses import JSONResponse, Response, StreamingResponse

from illada import cli
from illada.bench import serving
from illada.bench.load import Request, drive, get_json, mixed_up, percentiles, poisson, queued

pytestmark = pytest.mark.slow

SOAK = Path(__file__).parents[2] / "benchmarks" / "serve_soak.py"
STREAM = {"stream": True, "stream_options": {"include_usage": True}}


@contextlib.contextmanager
def listening(app):
    """The URL of an app that is served from a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


class Fake:
    """Says the prompt backwards; a prompt that begins with the name of a fault causes that fault."""

    def __init__(self):
        self.app = FastAPI()
        self.left = []
        self.waiting = 0
        self.app.post("/v1/chat/completions")(self.chat)
        self.app.get("/v1/models")(self.models)
        self.app.get("/metrics")(self.metrics)

    def models(self):
        defaults = {"block_length": 4, "max_new_tokens": 8}
        return {"data": [{"id": "fake", "context_length": 400, "chat": True, "defaults": defaults}]}

    def metrics(self):
        gauges = f"process_resident_memory_bytes 5e6\nillada_waiting {self.waiting}\nillada_waiting_x 9\n"
        return Response(gauges)

    async def chat(self, request: Received, body: dict):
        prompt = body["messages"][0]["content"]
        fault, answer = prompt.partition(" ")[0], prompt[::-1]
        if fault == "status":
            return JSONResponse({"error": {}}, int(prompt.split()[1]))
        if fault == "hang":
            self.left.append(prompt)
            await request.receive()  # until the client goes
        if fault == "swap" and body.get("stream"):
            answer = "somebody else's"
        usage = {"completion_tokens": 6, "forwards": 3}
        if body.get("stream"):
            return StreamingResponse(
                self.stream(fault, answer, usage, body.get("diffusion")), media_type="text/event-stream"
            )
        return {"choices": [{"index": 0, "message": {"content": answer}, "finish_reason": "stop"}], "usage": usage}

    async def stream(self, fault, answer, usage, diffusion):
        def event(**content):
            return f"data: {json.dumps(content)}\n\n"

        yield ": wait\n\n"
        for states in ("mm", "mc", "cc") if diffusion else ():
            yield f"event: diffusion\n{event(object='diffusion.step', states=states)}"
        yield event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        for half in (answer[:2], answer[2:]):
            yield event(choices=[{"index": 0, "delta": {"content": half}, "finish_reason": None}])
        if fault == "break":
            return
        if fault == "error":
            yield event(error={"type": "timeout", "message": "too late"})
            return
        yield event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
        yield event(choices=[], usage=usage)
        yield "data: [DONE]\n\n"


@pytest.fixture(scope="module")
def fake():
    server = Fake()
    with listening(server.app) as server.url:
        yield server


def ask(text, problem=0, hang_up=None, **more):
    body = {"messages": [{"role": "user", "content": text}], **more}
    return Request("/v1/chat/completions", body, problem, hang_up)


def statuses(run):
    return {outcome.request.body["messages"][0]["content"]: outcome.status for outcome in run.outcomes}


def test_every_outcome_has_its_name(fake):
    requests = [
        ask("whole"),
        ask("stream", **STREAM),
        ask("status 429"),
        ask("status 500", **STREAM),
        ask("break off", **STREAM),
        ask("error inside", **STREAM),
        ask("hang on", hang_up=0.05),
    ]
    run = drive(fake.url, requests, clients=3)
    assert statuses(run) == {
        "whole": "ok",
        "stream": "ok",
        "status 429": "429",
        "status 500": "500",
        "break off": "lost",
        "error inside": "error timeout",
        "hang on": "cancelled",
    }
    assert fake.left == ["hang on"]
    found = run.summary()
    assert found["sent"] == 7
    assert found["statuses"] == {"429": 1, "500": 1, "cancelled": 1, "error timeout": 1, "lost": 1, "ok": 2}
    assert found["tokens_per_forward"] == 2
    assert found["tokens_per_second"] == pytest.approx(6 * found["answers_per_second"])
    gone = drive("http://127.0.0.1:9", [ask("x")])
    assert [outcome.status for outcome in gone.outcomes] == ["lost: ClientConnectorError"]


def test_answers_are_read_alike_and_others_are_found(fake):
    alone = drive(fake.url, [ask("one", 0), ask("swap", 1)]).outcomes
    assert [outcome.answer for outcome in alone] == [(("eno", "stop"),), (("paws", "stop"),)]
    run = drive(fake.url, [ask("one", 0, **STREAM), ask("swap", 1, **STREAM), ask("swap", 1)], clients=2)
    assert [o.request.problem for o in mixed_up(run.outcomes, alone)] == [1]


def test_times_of_a_stream(fake):
    requests = [ask("a"), ask("b", **STREAM), ask("c", diffusion=True, **STREAM)]
    whole, stream, diffusion = drive(fake.url, requests).outcomes
    assert (whole.text, whole.committed, stream.committed) == (None, None, None)
    assert stream.due <= stream.text <= stream.ended
    assert diffusion.due <= diffusion.committed <= diffusion.text <= diffusion.ended


def test_open_loop_sends_whatever_becomes_of_others(fake):
    fake.left.clear()
    requests = [ask(f"hang {number}", hang_up=0.2) for number in range(5)]
    run = drive(fake.url, [*requests, ask("late")], arrivals=[0, 0, 0.01, 0.01, 0.02, 9], seconds=1)
    assert [outcome.due for outcome in run.outcomes] == [0, 0, 0.01, 0.01, 0.02]
    assert len(fake.left) == 5
    assert run.summary()["statuses"] == {"cancelled": 5}


def test_metrics_are_watched(fake):
    fake.waiting = 7
    found = drive(fake.url, [ask("hang", hang_up=0.1)]).summary()
    assert found["memory"] == {"first": 5e6, "most": 5e6, "last": 5e6}
    assert found["waiting"] == {"first": 7, "most": 7, "last": 7}
    assert found["cpu"] is None


def test_numbers_worked_out_by_hand():
    assert queued([0, 1, 10], [3, 2, 1]) == [3, 4, 1]
    assert percentiles(range(1, 101)) == {"p50": 50, "p90": 90, "p99": 99}
    assert percentiles([]) is None
    times = poisson(4.0, 2000, 7)
    assert times == poisson(4.0, 2000, 7)
    assert times != poisson(4.0, 2000, 8)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert min(gaps) > 0
    assert sum(gaps) / 2000 == pytest.approx(1 / 4, rel=0.1)
    assert sum(gap > 1 / 4 for gap in gaps) / 2000 == pytest.approx(0.368, abs=0.04)


def test_bench_of_a_server_by_its_address(fake, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"say {n}" for n in range(6)))
    words = f"bench serve --url {fake.url} --file {prompts} --clients 1 3 --requests 9 --output {tmp_path / 'out'}"
    cli.main([*words.split(), "--mixes", "short", "cancels"])
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["mix"], row["clients"]) for row in results["rows"]] == [
        (mix, clients) for mix in ("short", "cancels") for clients in (1, 3, None, None, None)
    ]
    assert all(row["sent"] == 9 and row["mixed_up"] == 0 and row["alone"] == {} for row in results["rows"])
    assert all(row["statuses"] == {"ok": 9} for row in results["rows"] if row["mix"] == "short")
    assert shown.count("short, 3 clients") == 1
    assert (tmp_path / "out" / "table.md").read_text() in shown
    assert (tmp_path / "out" / "load.png").read_bytes().startswith(b"\x89PNG")


def test_bench_problems_fit_the_context():
    card = {"id": "m", "chat": True, "context_length": 100, "defaults": {"block_length": 4, "max_new_tokens": 12}}
    texts = [f"number {n}" for n in range(9)]
    for name, mix in serving.MIXES.items():
        problems = serving._problems(texts, mix, card, "fast", 0)
        asked = [problem.body["messages"][0]["content"] for problem in problems]
        assert max(len(text.encode()) for text in asked) <= 100 - 12 - serving.TEMPLATE_TOKENS
        assert (max(map(len, asked)) > 40) == (name != "short")
        assert all(text.startswith(f"number {n}") for n, text in enumerate(asked))
        lengths = {problem.body["max_tokens"] for problem in problems}
        assert lengths == ({12} if name in ("short", "long") else {4, 8, 12})
    sent = [serving._sent(problems, serving.MIXES["cancels"], 2.0, 1, number) for number in range(300)]
    assert 100 < sum(request.hang_up is not None for request in sent) < 200
    assert all(0 < request.hang_up < 2 for request in sent if request.hang_up is not None)
    kinds = [(r.body.get("stream", False), r.body.get("diffusion", False)) for r in sent]
    assert all(70 < kinds.count(kind) < 130 for kind in ((False, False), (True, False), (True, True)))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "give --model FOLDER to serve"),
        ("--url http://127.0.0.1:9", "no answer from http://127.0.0.1:9/v1/models"),
        ("--url http://127.0.0.1:9 --mixes shrot", "no mix 'shrot': there are short, long"),
        ("--url http://127.0.0.1:9 --clients 0", "clients must be at least 1, got 0"),
        ("--url http://127.0.0.1:9 --clients x", "clients is 'x': it must be a whole number"),
        ("--url http://127.0.0.1:9 --rates 1 -1", "rates must be above 0, got -1"),
        ("--url http://127.0.0.1:9 --outside a.py", "give --model FOLDER to serve"),
    ],
)
def test_bad_input_is_one_line(words, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "serve", *words.split()])
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2
    assert expected in said
    assert said.count("\n") == 0


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("serve_soak", SOAK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TEXTS = ["one two", "two three four", "five six seven one two three", "seven"]


def nothing_under_way(server):
    """Return whether the server forgets clients that left; it is asked so often that it has time to."""
    for _ in range(300):
        text = urllib.request.urlopen(f"{server}/metrics").read().decode()
        if "illada_running 0.0" in text and "illada_waiting 0.0" in text:
            return True
    return False


def test_every_client_gets_its_own_answer_whoever_leaves(server, soak):
    pool = soak.problems(TEXTS, get_json(f"{server}/v1/models")["data"][0])
    alone = drive(server, pool)
    assert alone.summary()["statuses"] == {"ok": len(pool)}
    assert len({outcome.answer for outcome in alone.outcomes}) > 0.9 * len(pool)  # so that others' would be seen
    run = drive(server, islice(soak.asked(pool, 0.5, seed=3), 160), clients=20)
    found = run.summary()
    assert found["statuses"].keys() == {"ok", "cancelled"}
    assert found["statuses"]["ok"] > 120
    assert mixed_up(run.outcomes, alone.outcomes) == []
    assert all(outcome.status == "ok" for outcome in run.outcomes if outcome.request.hang_up is None)
    assert found["first_committed"]["p50"] <= found["latency"]["p99"]
    assert found["memory"]["last"] > 1e7
    assert nothing_under_way(server)
