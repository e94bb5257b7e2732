"""Slow clients and the end of a server, over plain sockets; time is what the test says it is."""

import asyncio
import contextlib
import socket
import threading
from types import SimpleNamespace

import httpx
import pytest
from test_api import CHAT, HELLO, Gate, post

from illada.generation.engine import StepEvent
from illada.serving.answer import Answer, Step, Update
from illada.serving.connections import HEADER_SECONDS, STALLED_SECONDS, Connections
from illada.serving.options import ServerSettings
from illada.serving.protocol import ApiError
from illada.serving.streams import Call


class Connection:
    """As much of uvicorn's as is looked at."""

    def __init__(self, busy=False, unsent=0, kept=False):
        self.cycle = SimpleNamespace(response_complete=not busy)
        self.timeout_keep_alive_task = kept or None
        self.unsent, self.closed = unsent, False
        self.transport = SimpleNamespace(get_write_buffer_size=lambda: self.unsent, abort=self.abort)

    def abort(self):
        self.closed = True


def test_a_header_must_come_in_time():
    watch, new, busy, kept = Connections(9), Connection(), Connection(busy=True), Connection(kept=True)
    for now in (0.0, HEADER_SECONDS):
        watch.check([new, busy, kept], now)
    assert [one.closed for one in (new, busy, kept)] == [False] * 3
    watch.check([new, busy, kept], HEADER_SECONDS + 1)
    assert (new.closed, busy.closed, kept.closed) == (True, False, False)
    kept.timeout_keep_alive_task = None  # a next request has begun to come
    watch.check([kept], HEADER_SECONDS + 2)
    assert kept.closed


def test_an_answer_must_be_read():
    watch, still, slow = Connections(9), Connection(busy=True, unsent=9000), Connection(busy=True, unsent=9000)
    for second in range(int(STALLED_SECONDS) + 2):
        slow.unsent -= 100
        watch.check([still, slow], float(second))
    assert (still.closed, slow.closed) == (True, False)


def test_a_crowd_of_silent_connections_is_thinned_the_oldest_first():
    watch, busy = Connections(3), Connection(busy=True)
    silent = [Connection() for _ in range(4)]
    watch.check([busy, *silent[:3]], 0.0)
    watch.check([busy, *silent], 1.0)  # they have just come
    assert not any(one.closed for one in [busy, *silent])
    watch.check([busy, *silent], 1.5)
    assert [one.closed for one in [busy, *silent]] == [False, True, True, False, False]


def checked(app, now):
    """Look at the server's connections at a time of its own, in its event loop."""
    server, done = app.state.server, threading.Event()

    def check():
        server.connections.check(server.server_state.connections, now)
        done.set()

    app.state.worker._loop.call_soon_threadsafe(check)
    assert done.wait(60)


def test_half_a_header_is_cut_off_and_others_are_served(serve_model):
    with serve_model() as (address, app):
        app.state.server.connections = Connections(9)
        app.state.server.on_tick = lambda _: asyncio.sleep(0, app.state.server.should_exit)  # only the test's clock
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as slow:
            slow.sendall(b"GET /health HTTP/1.1\r\nHost: ")
            assert httpx.get(f"{address}/health").status_code == 200
            checked(app, 0.0)
            checked(app, HEADER_SECONDS + 1)
            with contextlib.suppress(ConnectionResetError):
                assert slow.recv(1) == b""
        assert post(address, max_tokens=2).status_code == 200
        app.state.server.should_exit = True


def test_health_can_be_asked_until_the_last_answer_is_out(serve_model):
    with serve_model() as (address, app):
        gate, found = Gate(app), []
        thread = threading.Thread(target=lambda: found.append(post(address, max_tokens=8)))
        thread.start()
        assert gate.reached.wait(60)
        app.state.server.handle_exit(15, None)
        for _ in range(3):  # by new connections
            answer = httpx.get(f"{address}/health")
            assert (answer.status_code, answer.json()) == (503, {"status": "draining"})
        assert post(address).status_code == 503
        gate.open.set()
        thread.join(60)
        assert found[0].status_code == 200
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{address}/health")


def test_an_upgrade_is_no_websocket(serve_model):
    with serve_model() as (address, _):
        headers = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
        assert httpx.get(f"{address}/health", headers={**headers, "sec-websocket-key": "YQ=="}).status_code == 200
        assert httpx.get(f"{address}/health").status_code == 200


def test_a_second_signal_ends_at_once(serve_model):
    with serve_model() as (address, app):
        gate, server = Gate(app), app.state.server
        thread = threading.Thread(target=lambda: post(address, max_tokens=8))
        thread.start()
        assert gate.reached.wait(60)
        server.handle_exit(15, None)
        assert not server.should_exit
        server.handle_exit(15, None)
        assert server.should_exit
        gate.open.set()
        thread.join(60)


def test_a_crowd_beyond_the_limit_is_refused(serve_model):
    with serve_model(ServerSettings(max_connections=1)) as (address, app):
        gate = Gate(app)
        threads = [threading.Thread(target=post, args=(address,), kwargs={"max_tokens": 4}) for _ in "1"]
        threads[0].start()
        assert gate.reached.wait(60)
        with httpx.Client() as client:
            assert client.get(f"{address}/health").status_code == 503
        gate.open.set()
        threads[0].join(60)


def test_steps_that_nobody_reads_do_not_pile_up(monkeypatch):
    monkeypatch.setattr("illada.serving.streams.MOST_UNREAD", 100)
    notify, cancelled = [], []
    worker = SimpleNamespace(submit=lambda _, take: notify.append(take), cancel=cancelled.append)
    answer = Answer(0, SimpleNamespace(), None, 8, stream=True)
    step = Step(StepEvent(0, 0, 0, [1] * 8, [True] * 8, [1.0] * 8, False), 1)

    async def follow():
        call = Call(worker, [answer], 60.0)
        for _ in range(12):
            notify[0]((answer, Update([], [], 1, [step])))
        assert not cancelled
        notify[0]((answer, Update([], [], 1, [step])))
        assert cancelled == [answer]
        assert call._updates.qsize() == 1
        with pytest.raises(ApiError, match="not read while it grew"):
            await call.finish()

    asyncio.run(follow())


@pytest.mark.parametrize("path", ["/page/app.js/", "/page/nothing", "/page/", "/page"])
def test_paths_near_the_pages_files_are_plain_errors(server, path):
    answer = httpx.get(server + path)
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "Not Found"


def test_every_path_but_the_pages_own_wants_the_key(serve_model, monkeypatch):
    monkeypatch.setenv("ILLADA_API_KEYS", "one")
    with serve_model() as (address, _):
        for path in ("/tokenize", "/detokenize", "/v1/responses", CHAT, "/nothing"):
            assert httpx.post(address + path, json={"messages": HELLO}).status_code == 401, path
        for path in ("/", "/health", "/page/app.js", "/openapi.json"):
            assert httpx.get(address + path).status_code == 200, path
