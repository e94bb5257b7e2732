"""A load generator: send requests over HTTP, at given times or by so many clients, and record the outcome of each.

It uses aiohttp, which costs a tenth of httpx a request: the generator takes its time from the server beside it.
"""

import asyncio
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from operator import itemgetter
from typing import Any, TextIO

import numpy as np

from illada.errors import IlladaError, first_line, needs
from illada.rng import uniform_int

with needs("serve", "a load generator"):
    import aiohttp

PATIENCE = 600.0
"""Seconds after which a client gives an answer up."""
WATCH_EVERY = 0.5
"""Seconds between two looks at the server's /metrics."""
GAUGES = {
    "memory": "process_resident_memory_bytes",
    "waiting": "illada_waiting",
    "cpu": "process_cpu_seconds_total",
}
"""Names of the figures that are watched, and their names in /metrics."""
DONE, DIFFUSION = b"data: [DONE]", b"event: diffusion"


@dataclass(frozen=True)
class Request:
    """A client's request, and whether the client stays to the end."""

    path: str
    body: dict[str, Any]
    problem: int
    """Number of the problem; requests for the same problem have the same answer, streamed or not."""
    hang_up: float | None = None
    """Seconds after which the client goes away; None if it stays."""


@dataclass
class Outcome:
    """The outcome of a request; times are seconds since the run began."""

    request: Request
    due: float
    """When it should have been sent, so that waiting in the generator counts as latency."""
    ended: float = math.nan
    committed: float | None = None
    """When the first token was committed, known from diffusion events."""
    text: float | None = None
    """When a stream's first piece of text came."""
    status: str = "lost"
    """"ok", "cancelled" by the client, an HTTP status, "error TYPE" in a stream, or "lost" with the reason."""
    answer: tuple[tuple[str, str | None], ...] = ()
    """Text and finish_reason of each choice."""
    tokens: int = 0
    forwards: int = 0

    @property
    def latency(self) -> float:
        """Seconds from `due` to the end."""
        return self.ended - self.due


@dataclass
class Run:
    """A stretch of load."""

    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    """Seconds from the first request to the last answer."""
    watched: list[dict[str, float]] = field(default_factory=list)
    """The server's `GAUGES` at several times; "at" is seconds since the run began."""

    def summary(self) -> dict[str, Any]:
        """Return counts, rates and percentiles; percentiles are of complete answers."""
        whole = [outcome for outcome in self.outcomes if outcome.status == "ok"]
        figures: dict[str, Any] = {
            "sent": len(self.outcomes),
            "statuses": dict(sorted(Counter(outcome.status for outcome in self.outcomes).items())),
            "seconds": self.seconds,
            "answers_per_second": len(whole) / self.seconds if self.seconds else 0.0,
            "tokens_per_second": sum(outcome.tokens for outcome in whole) / self.seconds if self.seconds else 0.0,
            "tokens_per_forward": sum(o.tokens for o in whole) / max(1, sum(o.forwards for o in whole)),
            "latency": percentiles([outcome.latency for outcome in whole]),
            "first_committed": percentiles([o.committed - o.due for o in whole if o.committed is not None]),
            "first_text": percentiles([o.text - o.due for o in whole if o.text is not None]),
        }
        for name in GAUGES:
            values = [sample[name] for sample in self.watched if name in sample]
            figures[name] = {"first": values[0], "most": max(values), "last": values[-1]} if values else None
        return figures


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """Return p50, p90 and p99, each a value that occurred; None without values."""
    if not seconds:
        return None
    values = np.quantile(seconds, (0.5, 0.9, 0.99), method="inverted_cdf")
    return dict(zip(("p50", "p90", "p99"), values.tolist(), strict=True))


def poisson(rate: float, count: int, *key: int) -> list[float]:
    """Return `count` arrival times in seconds, independent of one another and `rate` a second on average."""
    return list(accumulate(-math.log(uniform_int(*key, number)) / rate for number in range(count)))


def queued(arrivals: Sequence[float], services: Sequence[float]) -> list[float]:
    """Return each request's latency when one worker answers them in order, one at a time (Lindley's recursion)."""
    latencies, free = [], 0.0
    for arrival, service in zip(arrivals, services, strict=True):
        free = max(free, arrival) + service
        latencies.append(free - arrival)
    return latencies


def drive(
    url: str,
    requests: Iterable[Request],
    *,
    clients: int | None = None,
    arrivals: Sequence[float] | None = None,
    seconds: float = math.inf,
) -> Run:
    """Send requests to a server and wait for their answers; meanwhile read the server's metrics.

    Args:
        url: address of the server, without the path.
        requests: requests to send in this order, each once; they may be endless if `seconds` bounds them.
        clients: number of clients of a closed loop, in which each sends its next request when it has its answer.
        arrivals: times in seconds at which each request is due in an open loop, however the server fares.
        seconds: time after which no more requests are sent.
    """
    return asyncio.run(_drive(url.rstrip("/"), requests, clients, arrivals, seconds))


async def _drive(
    url: str, requests: Iterable[Request], clients: int | None, arrivals: Sequence[float] | None, seconds: float
) -> Run:
    run, left, started = Run(), iter(requests), time.perf_counter()
    timeout, connections = aiohttp.ClientTimeout(total=None, sock_connect=60), aiohttp.TCPConnector(limit=0)
    session = aiohttp.ClientSession(connector=connections, timeout=timeout, headers=_key(), read_bufsize=2**20)

    def now() -> float:
        return time.perf_counter() - started

    async def send(request: Request, due: float) -> None:
        outcome = Outcome(request, due)
        run.outcomes.append(outcome)
        await _send(session, url, outcome, now)

    async def client() -> None:
        while now() < seconds and (request := next(left, None)) is not None:
            await send(request, now())

    async def look() -> None:
        run.watched.append({**await _gauges(session, url), "at": now()})

    async def keep_looking() -> None:
        while True:
            await asyncio.sleep(WATCH_EVERY)
            await look()

    async with session:
        await look()
        started = time.perf_counter()
        watcher = asyncio.create_task(keep_looking())
        async with asyncio.TaskGroup() as group:
            if arrivals is None:
                for _ in range(clients or 1):
                    group.create_task(client())
            else:
                for request, due in zip(left, arrivals, strict=True):
                    if due >= seconds:
                        break
                    await asyncio.sleep(due - now())
                    group.create_task(send(request, due))
        run.seconds = now() - min((outcome.due for outcome in run.outcomes), default=0.0)
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        await look()
    return run


async def _gauges(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """Return those of the `GAUGES` that the server has."""
    try:
        async with session.get(f"{url}/metrics") as response:
            text = await response.text() if response.status == 200 else ""
    except aiohttp.ClientError:
        text = ""
    return {name: value for name, gauge in GAUGES.items() if (value := _gauge(text, gauge)) is not None}


def _gauge(text: str, name: str) -> float | None:
    """Return the value of a gauge in Prometheus' text, or the sum over its labels; None when it is not there."""
    values = [float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    return sum(values) if values else None


async def _send(session: aiohttp.ClientSession, url: str, outcome: Outcome, now: Callable[[], float]) -> None:
    """Send a request and fill in its outcome."""
    request = outcome.request
    try:
        async with (
            asyncio.timeout(PATIENCE if request.hang_up is None else request.hang_up),
            session.post(url + request.path, json=request.body) as response,
        ):
            if response.status != 200:
                outcome.status = str(response.status)
            elif request.body.get("stream"):
                await _read_stream(response, outcome, now)
            else:
                answer = await response.json()
                outcome.answer = tuple(
                    (_said(choice, "message"), choice["finish_reason"])
                    for choice in sorted(answer["choices"], key=itemgetter("index"))
                )
                _use(outcome, answer["usage"])
                outcome.status = "ok"
    except TimeoutError:
        outcome.status = "lost: no end" if request.hang_up is None else "cancelled"
    except (aiohttp.ClientError, OSError, LookupError, TypeError, ValueError) as error:
        outcome.status = f"lost: {type(error).__name__}"
    outcome.ended = now()


def _said(choice: dict[str, Any], part: str) -> str:
    """Return what a choice, or a piece of it, says: its text and its calls of tools."""
    if part not in choice:
        return str(choice["text"])
    calls = [call["function"] for call in choice[part].get("tool_calls") or ()]
    written = [f"{call.get('name', '')}{call['arguments']}" for call in calls]
    return "".join([choice[part].get("content") or "", *written])


def _use(outcome: Outcome, usage: dict[str, int]) -> None:
    outcome.tokens, outcome.forwards = usage["completion_tokens"], usage["forwards"]


async def _read_stream(response: aiohttp.ClientResponse, outcome: Outcome, now: Callable[[], float]) -> None:
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    diffusion = False
    async for line in response.content:
        if line.startswith(DONE):
            outcome.answer = tuple((texts.get(index, ""), reasons[index]) for index in sorted(reasons))
            outcome.status = "ok"
        elif not line.startswith(b"data: "):
            diffusion = line.startswith(DIFFUSION) or (diffusion and bool(line.strip()))
        elif diffusion:
            # Parsing every event would cost the generator more than all else.
            if outcome.committed is None and {"c", "g"} & {*json.loads(line[6:])["states"]}:
                outcome.committed = now()
        else:
            event = json.loads(line[6:])
            if "error" in event:
                outcome.status = f"error {event['error']['type']}"
                return
            if event.get("usage"):
                _use(outcome, event["usage"])
            for choice in event["choices"]:
                piece = _said(choice, "delta")
                if piece and outcome.text is None:
                    outcome.text = now()
                texts[choice["index"]] = texts.get(choice["index"], "") + piece
                if choice.get("finish_reason"):
                    reasons[choice["index"]] = choice["finish_reason"]


def mixed_up(outcomes: Sequence[Outcome], alone: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes whose answers differ from those that the same problems got alone."""
    right = {outcome.request.problem: outcome.answer for outcome in alone}
    return [o for o in outcomes if o.status == "ok" and o.answer != right[o.request.problem]]


def get_json(url: str) -> dict[str, Any]:
    """Return the JSON object at a URL of a server.

    Raises:
        IlladaError: when there is no answer or it is no JSON.
    """
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=_key()), timeout=30) as answer:
            content: dict[str, Any] = json.load(answer)
            return content
    except (OSError, ValueError) as error:
        hint = ": set ILLADA_API_KEYS to a key of it" if getattr(error, "code", None) == 401 else ""
        raise IlladaError(f"no answer from {url} ({first_line(error)}){hint}") from error


def _key() -> dict[str, str]:
    key = os.environ.get("ILLADA_API_KEYS", "").split(",")[0].strip()
    return {"Authorization": f"Bearer {key}"} if key else {}


@contextmanager
def started_server(model: str, flags: Sequence[str] = (), wait: float = 600.0) -> Iterator[str]:
    """Run `illada serve` in a separate process while the block runs; yield its URL once it is ready.

    It listens on a free port of 127.0.0.1, with the keys of ILLADA_API_KEYS if there are any.

    Raises:
        IlladaError: when the server ends before it is ready, with its last line, or takes longer than `wait` seconds.
    """
    words = [sys.executable, "-m", "illada", "serve", "--model", model, "--port", "0", *flags]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output)
        try:
            yield _ready(process, output, time.monotonic() + wait)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ready(process: "subprocess.Popen[bytes]", output: TextIO, end: float) -> str:
    """Wait for a starting server and return the URL in its output."""
    while True:
        ended = process.poll() is not None
        output.seek(0)
        lines = output.read().splitlines()
        if ready := [line.split()[1] for line in lines if line.startswith("ready: ") and "(" in line]:
            return ready[0]
        if ended or time.monotonic() > end:
            last = lines[-1] if lines else "it said nothing"
            raise IlladaError(f"the server did not start: {last.removeprefix('illada: error: ')}")
        time.sleep(0.1)
