"""The answers to one HTTP request, from the worker's updates to the last byte."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from illada.errors import needs
from illada.serving.answer import Answer, Step, Update
from illada.serving.detokenize import Token
from illada.serving.protocol import ApiError, FailedError
from illada.serving.worker import Worker

with needs("serve", "serving"):
    from starlette.requests import Request as HttpRequest
    from starlette.responses import StreamingResponse
    from starlette.types import Receive, Scope, Send

log = logging.getLogger("illada.serving")
SIGN_OF_LIFE = 10.0
"""Seconds of silence after which a stream says that it is still there."""
READING = 30.0
"""Seconds beyond an answer's time in which a client may read the rest of its stream."""
MOST_UNREAD = 200_000
"""Most tokens of steps and of text that wait for a client that reads slowly."""
UNREAD = Update([], [], 0, [], finish="error")
"""Takes the place of updates that nobody read."""


class Call:
    """The answers to one HTTP request while they form; they are cancelled when the call is left early.

    Args:
        worker: answers the requests.
        answers: the answers to begin, at once or not at all.
        seconds: time within which all must be finished.

    Raises:
        ApiError: 429 when too many answers are under way, 503 when the server is about to end.
    """

    def __init__(self, worker: Worker, answers: Sequence[Answer], seconds: float):
        self._worker, self.answers = worker, answers
        self._updates: asyncio.Queue[tuple[Answer, Update]] = asyncio.Queue()
        self._unread = 0
        self._end = time.monotonic() + seconds
        worker.submit(answers, self._take)

    def _take(self, update: tuple[Answer, Update]) -> None:
        """Keep an update until it is read; once too many wait, give up the answers and what waits."""
        self._unread += update[1].size
        self._updates.put_nowait(update)
        if update[0].stream and self._unread > MOST_UNREAD:
            self.cancel()
            while not self._updates.empty():
                self._updates.get_nowait()
            self._updates.put_nowait((update[0], UNREAD))

    def cancel(self) -> None:
        """Forget the answers that are still under way."""
        for answer in self.answers:
            self._worker.cancel(answer)

    async def follow(self) -> AsyncIterator[tuple[Answer, list[Step], str, list[Token]] | None]:
        """Yield an answer, its new steps, text and tokens until every answer has ended; None after a long silence.

        Raises:
            ApiError: 504 when the time is over, 500 when the engine failed.
        """
        try:
            while any(answer.finish is None for answer in self.answers):
                left = self._end - time.monotonic()
                try:
                    answer, update = await asyncio.wait_for(self._updates.get(), min(left, SIGN_OF_LIFE))
                except TimeoutError:
                    if left > SIGN_OF_LIFE:
                        yield None
                        continue
                    message = "the answer was not finished in time: ask for fewer tokens"
                    # The same request would take as long again, so clients should not repeat it by themselves.
                    raise ApiError(504, message, "timeout", headers={"x-should-retry": "false"}) from None
                self._unread -= update.size
                if update is UNREAD:
                    raise ApiError(408, "the stream was not read while it grew: read faster, or ask for less")
                if update.finish == "error":
                    raise FailedError
                if answer.finish is None:
                    text, tokens = answer.take(update)
                    if answer.finish is not None:
                        # A stop string may end the answer before the engine looks for it.
                        self._worker.cancel(answer, "stop")
                    yield answer, update.steps, text, tokens
        finally:
            self.cancel()

    async def finish(self) -> None:
        """Wait until every answer has ended; errors as in `follow`."""
        async for _ in self.follow():
            pass


class EventStream(StreamingResponse):
    """A stream of events. It cancels its answers however it ends, and leaves a client that does not read."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[str], call: Call, seconds: float, headers: Mapping[str, str] = MappingProxyType({})
    ):
        super().__init__(events, headers={"x-accel-buffering": "no", **headers})
        self._call, self._seconds = call, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            async with asyncio.timeout(self._seconds):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            log.warning("a client did not read its stream; the connection is closed")
        finally:
            self._call.cancel()


async def unless_disconnected(request: HttpRequest, work: Coroutine[Any, Any, None]) -> bool:
    """Do some work; return whether the client was still connected when it ended."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(disconnected())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            return False
        tasks[0].result()
        return True
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
