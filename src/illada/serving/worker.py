"""The thread that owns the engine: requests go in from the event loop, updates of their answers come back to it."""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import Any, Literal

from illada.generation.engine import Engine, Generation, StepEvent
from illada.generation.settings import GenerationSettings
from illada.heap import trim_heap
from illada.model.transformer import IlladaForMaskedLM
from illada.serving.answer import Answer, Step, Update
from illada.serving.metrics import Metrics
from illada.serving.options import ServerSettings
from illada.serving.protocol import ApiError

log = logging.getLogger(__name__)
Notify = Callable[[tuple[Answer, Update]], None]

TRIM_SECONDS = 1.0
"""Seconds of work after which freed memory is returned to the system, which takes about 10 ms."""


class Worker:
    """Answers requests until it is closed; everything but the engine's thread runs in one event loop."""

    def __init__(self, model: IlladaForMaskedLM, tokenizer: Any, server: ServerSettings):
        self.server = server
        self.draining = False
        self.metrics = Metrics(running=lambda: len(self.engine.running), waiting=self._waiting)
        self._model, self._tokenizer = model, tokenizer
        self.engine = self._new_engine()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._live: dict[int, Answer] = {}
        self._open: dict[Answer, Notify] = {}
        self._reserved = 0
        self._ends: deque[float] = deque(maxlen=64)
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="illada-engine", daemon=True)

    def _new_engine(self) -> Engine:
        return Engine(
            self._model,
            self._tokenizer,
            self._record_step,
            max_batch_tokens=self.server.max_batch_tokens,
            max_past_tokens=self.server.max_past_tokens,
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
        self._commands.put(self._closing.set)
        await asyncio.to_thread(self._thread.join)

    def check_room(self, count: int) -> None:
        """Check that `count` more answers may begin.

        Raises:
            ApiError: 429 when too many are under way, 503 when the server is about to end.
        """
        if self.draining:
            message = "the server is about to end: ask another one, or later"
            raise ApiError(503, message, "server_error", code="draining", headers={"retry-after": "5"})
        if len(self._open) + self._reserved + count > self.server.max_requests:
            seconds = self.retry_after()
            message = f"the server is busy: try again in {seconds} seconds"
            raise ApiError(429, message, "rate_limit_error", code="busy", headers={"retry-after": str(seconds)})

    @contextmanager
    def reserved_place(self) -> Iterator[None]:
        """Keep a place for a request while it is encoded; errors as in `check_room`."""
        self.check_room(1)
        self._reserved += 1
        try:
            yield
        finally:
            self._reserved -= 1

    def retry_after(self) -> int:
        """Return the seconds until a place is probably free, from how fast the last answers ended."""
        if len(self._ends) < 2:
            return 1
        pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return min(60, max(1, math.ceil(pace)))

    def submit(self, answers: Sequence[Answer], notify: Notify) -> None:
        """Begin answers as soon as the engine has room; errors as in `check_room`.

        Args:
            answers: answers of one HTTP request.
            notify: called in the event loop with an answer and its update, until the last update.
        """
        self.check_room(len(answers))
        for answer in answers:
            answer.arrived = time.monotonic()
            self._open[answer] = notify
            self._commands.put(partial(self._enter, answer))

    def cancel(self, answer: Answer, how: Literal["cancelled", "stop"] = "cancelled") -> None:
        """Forget an answer, if it is under way."""
        if answer in self._open:
            self._end(answer, how)
            self._commands.put(partial(self._forget, answer))

    def _end(self, answer: Answer, how: Literal["stop", "length", "cancelled", "error"]) -> None:
        del self._open[answer]
        self.metrics.ended.labels(how).inc()
        now = time.monotonic()
        self._ends.append(now)
        if how in ("stop", "length"):
            self.metrics.whole.observe(now - answer.arrived)
            self.metrics.tokens.inc(answer.committed)

    # From here on: the engine's thread. It runs the commands, one after the other, before each pass.

    def _enter(self, answer: Answer) -> None:
        self._live[self.engine.enter(answer.request)] = answer

    def _forget(self, answer: Answer) -> None:
        # After a failure a new engine counts from 0, so the index alone may be another answer's.
        if self._live.get(answer.request.index) is answer:
            del self._live[answer.request.index]
            self.engine.cancel(answer.request.index)

    def _record_step(self, event: StepEvent) -> None:
        answer = self._live[event.row]
        # The first step tells of blocks that a form decided before it too.
        start = 0 if answer.request.template or answer.request.answer_step == 1 else event.block
        # A client may read slowly: a whole answer for each of its steps would be quadratic in memory.
        lists = {name: getattr(event, name)[start:] for name in ("ids", "committed", "confidence", "forced")}
        answer.steps.append(Step(replace(event, **lists), answer.request.forwards, start))

    def _run(self) -> None:
        trimmed = time.monotonic()
        while not self._closing.is_set():
            try:
                if not (self.engine.busy and self._commands.empty()):
                    self._commands.get()()
                    continue
                self._pass()
                if time.monotonic() - trimmed > TRIM_SECONDS:
                    trim_heap()
                    trimmed = time.monotonic()
            except Exception:
                # Whatever went wrong (memory, a kernel), the requests under way are lost and the server goes on.
                log.exception("a forward pass failed; the answers under way are given up")
                self._fail()
                self.engine = self._new_engine()
        self._fail()

    def _pass(self) -> None:
        before = {index: (answer.request.forwards, answer.request.positions) for index, answer in self._live.items()}
        ended = self.engine.step()
        updates: list[tuple[Answer, Update]] = []
        for index, answer in list(self._live.items()):
            forwards = answer.request.forwards - before[index][0]
            if not forwards:
                continue
            self.metrics.forwards.inc(forwards)
            self.metrics.positions.inc(answer.request.positions - before[index][1])
            if not before[index][0]:  # its first pass
                self.metrics.first.observe(time.monotonic() - answer.arrived)
            if (update := self._update(answer, ended.get(index))) is None:
                continue
            if update.finish is not None:
                self._forget(answer)
            updates.append((answer, update))
        self.metrics.passes.inc()
        self._publish(updates)

    def _update(self, answer: Answer, generation: Generation | None) -> Update | None:
        """Return what is new about an answer after a pass, if its client is to know now."""
        request = answer.request
        masked = request.masked_G[answer.reported : answer.limit]
        count = int(masked.argmax()) if masked.any() else len(masked)
        new = slice(answer.reported, answer.reported + count)
        ids = request.ids_G[new].tolist()
        finish: Literal["stop", "length"] | None = None
        if ends := [place for place, token_id in enumerate(ids) if token_id in request.settings.eos_ids]:
            ids, finish = ids[: ends[0]], "stop"
        elif count == len(masked):
            finish = "length"
        if generation is not None and finish is None:
            finish = generation.finish_reason
        steps, answer.steps = answer.steps, []
        if finish is None and not (answer.stream and (ids or steps)):
            return None
        size = len(ids)
        generated = zip(request.log_prob_G[new][:size].tolist(), request.slot_G[new][:size], strict=True)
        log_probs = [value if slot else None for value, slot in generated]
        alternatives: list[list[tuple[int, float]]] = []
        if request.best_2KG is not None:
            best_2KS = request.best_2KG[..., new][..., :size]
            best_ids, best_log_probs = best_2KS[0].T.tolist(), best_2KS[1].view("float32").T.tolist()
            alternatives = [
                [(token, value) for token, value in zip(*best, strict=True) if value > -math.inf]  # MASK has -inf
                for best in zip(best_ids, best_log_probs, strict=True)
            ]
        answer.reported += count
        return Update(ids, log_probs, request.forwards, steps, alternatives, finish)

    def _fail(self) -> None:
        updates = [
            (answer, Update([], [], answer.request.forwards, [], finish="error")) for answer in self._live.values()
        ]
        for answer, _ in updates:
            answer.request.release()
        self._live.clear()
        self._publish(updates)

    def _publish(self, updates: list[tuple[Answer, Update]]) -> None:
        if updates:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._deliver, updates)

    # Back in the event loop.

    def _deliver(self, updates: list[tuple[Answer, Update]]) -> None:
        for answer, update in updates:
            if (notify := self._open.get(answer)) is None:  # cancelled meanwhile
                continue
            answer.committed += sum(value is not None for value in update.log_probs)
            if update.finish is not None:
                self._end(answer, update.finish)
            notify((answer, update))
