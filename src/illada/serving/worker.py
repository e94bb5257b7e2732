"""The thread that owns the engine: requests go in from the event loop, news of their answers comes back to it."""

import asyncio
import ctypes
import logging
import math
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from illada.generation.engine import Engine, Generation, StepEvent
from illada.generation.request import Request
from illada.generation.settings import GenerationSettings
from illada.model import IlladaForMaskedLM
from illada.serving.metrics import Metrics
from illada.serving.settings import ServerSettings

log = logging.getLogger(__name__)


TRIM_SECONDS = 1.0
"""Of work between two returns of freed memory to the system, each of about 10 ms."""


def _give_back_memory() -> None:
    """Return what is free inside glibc's heaps: passes of ever other sizes leave holes that would add up."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class DrainingError(Exception):
    """The server is about to end."""


class BusyError(Exception):
    """Too many requests are under way."""

    def __init__(self, retry_after: int):
        super().__init__(f"the server is busy: try again in {retry_after} seconds")
        self.retry_after = retry_after


@dataclass(frozen=True)
class Step:
    """What one step made of an answer's active block."""

    event: StepEvent
    """From where the active block begins, or of all of a text with slots."""
    forwards: int


@dataclass(frozen=True)
class Update:
    """What has become of an answer since the last news."""

    ids: list[int]
    """Newly committed tokens in order, none missing before them; without the end-of-sequence token."""
    log_probs: list[float | None]
    """Of each, at its commit; None for given text."""
    forwards: int
    """Of the answer so far."""
    steps: list[Step]
    """Every step since, for answers that are watched."""
    finish: Literal["stop", "length", "error"] | None = None
    """Why it ended, in the last news."""


@dataclass(eq=False)
class Ticket:
    """One answer on its way to a client.

    Args:
        row: the request, checked by the engine.
        tell: called in the event loop with each news.
        limit: most tokens wanted; the answer may be computed in whole blocks beyond it.
        stream: whether news are wanted before the end.
        lead: ids of given text to tell before those of the answer.
    """

    row: Request
    tell: Callable[[Update], None]
    limit: int
    stream: bool
    lead: Sequence[int] = ()
    arrived: float = field(default_factory=time.monotonic)
    begun: bool = False
    seen: int = 0
    """Tokens that the engine's thread told of."""
    told: int = 0
    """Generated ones that arrived in the event loop."""


class Worker:
    """Answers requests until it is closed; everything but the engine's thread runs in one event loop.

    Args:
        model: the network.
        tokenizer: of the model.
        server: limits.
    """

    def __init__(self, model: IlladaForMaskedLM, tokenizer: Any, server: ServerSettings):
        self.server = server
        self.draining = False
        self.metrics = Metrics(running=lambda: len(self.engine.running), waiting=self._waiting)
        self._model, self._tokenizer = model, tokenizer
        self.engine = self._new_engine()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._live: dict[int, Ticket] = {}
        self._steps: dict[int, list[Step]] = defaultdict(list)
        self._open: set[Ticket] = set()
        self._entering = 0
        self._ends: deque[float] = deque(maxlen=64)
        self._changed = threading.Condition()
        self._orders: list[Callable[[], None]] = []
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="illada-engine", daemon=True)

    def _new_engine(self) -> Engine:
        server = self.server
        return Engine(
            self._model,
            self._tokenizer,
            self._note,
            max_batch_tokens=server.max_batch_tokens,
            max_past_tokens=server.max_past_tokens,
        )

    @property
    def alive(self) -> bool:
        """Whether the engine's thread is running."""
        return self._thread.is_alive()

    def _waiting(self) -> int:
        return max(0, len(self._open) - len(self.engine.running))

    async def start(self) -> None:
        """Warm up with one short answer, then take requests."""
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._warm_up)
        self._thread.start()

    def _warm_up(self) -> None:
        engine = Engine(self._model)
        engine.submit([0], GenerationSettings(max_new_tokens=1, block_length=1, eos_token_id=None))
        engine.run()

    async def close(self) -> None:
        """End the thread; answers that are still under way fail."""
        self.draining = True
        with self._changed:
            self._closing = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    def take(self, count: int) -> None:
        """Make sure that so many more answers may be begun.

        Raises:
            BusyError: when they may not.
            DrainingError: when the server is about to end.
        """
        if self.draining:
            raise DrainingError
        if len(self._open) + self._entering + count > self.server.max_requests:
            raise BusyError(self.retry_after())

    @contextmanager
    def entering(self) -> Iterator[None]:
        """Keep a place for a request while it is encoded; errors as in `take`."""
        self.take(1)
        self._entering += 1
        try:
            yield
        finally:
            self._entering -= 1

    def retry_after(self) -> int:
        """Return the seconds in which an answer's place will probably be free, from how fast others ended."""
        if len(self._ends) < 2:
            return 1
        pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return min(60, max(1, math.ceil(pace)))

    def submit(self, ticket: Ticket) -> None:
        """Begin an answer as soon as there is room."""
        self._open.add(ticket)
        self._order(lambda: self._enter(ticket))

    def cancel(self, ticket: Ticket, how: Literal["cancelled", "stop"] = "cancelled") -> None:
        """Forget an answer, if it is under way."""
        if ticket in self._open:
            self._end(ticket, how)
            self._order(lambda: self._forget(ticket))

    def _end(self, ticket: Ticket, how: Literal["stop", "length", "cancelled", "error"]) -> None:
        self._open.discard(ticket)
        self.metrics.ended.labels(how).inc()
        now = time.monotonic()
        self._ends.append(now)
        if how in ("stop", "length"):
            self.metrics.whole.observe(now - ticket.arrived)
            self.metrics.tokens.inc(ticket.told)

    def _order(self, action: Callable[[], None]) -> None:
        with self._changed:
            self._orders.append(action)
            self._changed.notify()

    # From here on: the engine's thread.

    def _enter(self, ticket: Ticket) -> None:
        self._live[self.engine.enter(ticket.row)] = ticket

    def _forget(self, ticket: Ticket) -> None:
        # After a failure a new engine counts from 0, so that the number alone may be another's.
        if self._live.get(ticket.row.index) is ticket:
            del self._live[ticket.row.index]
            self.engine.cancel(ticket.row.index)
            self._steps.pop(ticket.row.index, None)

    def _note(self, event: StepEvent) -> None:
        row = self._live[event.row].row
        start = 0 if row.template else event.block
        # A client may read slowly: a whole answer for each of its steps would be quadratic in memory.
        ids, committed, confidence = event.ids[start:], event.committed[start:], event.confidence[start:]
        event = replace(event, ids=ids, committed=committed, confidence=confidence)
        self._steps[event.row].append(Step(event, row.forwards))

    def _work(self) -> None:
        trimmed = time.monotonic()
        while True:
            with self._changed:
                while not (self._orders or self.engine.busy or self._closing):
                    self._changed.wait()
                orders, self._orders = self._orders, []
                closing = self._closing
            try:
                for order in orders:
                    order()
                if closing:
                    self._fail()
                    return
                self._pass()
                if time.monotonic() - trimmed > TRIM_SECONDS:
                    _give_back_memory()
                    trimmed = time.monotonic()
            except Exception:
                # Whatever went wrong (memory, a kernel), the requests under way are lost and the server goes on.
                log.exception("a forward pass failed; the answers under way are given up")
                self._fail()
                self.engine = self._new_engine()

    def _pass(self) -> None:
        if not self.engine.busy:
            return
        before = {index: (ticket.row.forwards, ticket.row.positions) for index, ticket in self._live.items()}
        ended = self.engine.step()
        news: list[tuple[Ticket, Update]] = []
        for index, ticket in list(self._live.items()):
            row = ticket.row
            forwards, positions = row.forwards - before[index][0], row.positions - before[index][1]
            if not forwards:
                continue
            self.metrics.rows.inc(forwards)
            self.metrics.positions.inc(positions)
            if not ticket.begun:
                ticket.begun = True
                self.metrics.first.observe(time.monotonic() - ticket.arrived)
            if (found := self._look(ticket, ended.get(index))) is None:
                continue
            if found.finish is not None:
                self._forget(ticket)
            news.append((ticket, found))
        self.metrics.passes.inc()
        self._tell(news)

    def _look(self, ticket: Ticket, generation: Generation | None) -> Update | None:
        """Return what is new about an answer after a pass, if its client is to know now."""
        row = ticket.row
        steps = self._steps.pop(row.index, []) if row.watched else []
        masked = row.masked_G[ticket.seen : ticket.limit]
        count = int(masked.argmax()) if masked.any() else len(masked)
        known = slice(ticket.seen, ticket.seen + count)
        ids = row.ids_G[known].tolist()
        finish: Literal["stop", "length"] | None = None
        if ends := [place for place, token_id in enumerate(ids) if token_id in row.settings.eos_ids]:
            ids, finish = ids[: ends[0]], "stop"
        elif count == len(masked):
            finish = "length"
        if generation is not None and finish is None:
            finish = generation.finish_reason
        if finish is None and not (ticket.stream and (ids or steps)):
            return None
        log_probs = row.log_prob_G[known][: len(ids)].tolist()
        given = row.slot_G[known][: len(ids)]
        lead, ticket.lead = [*ticket.lead], ()
        each: list[float | None] = [None] * len(lead)
        each += [value if slot else None for value, slot in zip(log_probs, given, strict=True)]
        ticket.seen += count
        return Update([*lead, *ids], each, row.forwards, steps, finish)

    def _fail(self) -> None:
        news = [(ticket, Update([], [], ticket.row.forwards, [], "error")) for ticket in self._live.values()]
        for ticket, _ in news:
            ticket.row.release()
        self._live.clear()
        self._steps.clear()
        self._tell(news)

    def _tell(self, news: list[tuple[Ticket, Update]]) -> None:
        if news:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._hear, news)

    # Back in the event loop.

    def _hear(self, news: list[tuple[Ticket, Update]]) -> None:
        for ticket, found in news:
            if ticket not in self._open:  # cancelled meanwhile
                continue
            ticket.told += sum(value is not None for value in found.log_probs)
            if found.finish is not None:
                self._end(ticket, found.finish)
            ticket.tell(found)
