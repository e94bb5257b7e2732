"""The answers to one HTTP request, from the engine's news to the last byte."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from illada.generation.request import Request
from illada.serving.detokenize import AnswerText, Token
from illada.serving.worker import Ticket, Update, Worker

log = logging.getLogger("illada.serving")
SIGN_OF_LIFE = 10.0
"""Seconds of silence after which a stream says that it is still there."""
READING = 30.0
"""Seconds beyond an answer's time in which a client may read the last of its stream."""


class UnknownModelError(Exception):
    """A request for a model that is not served."""

    def __init__(self, asked: str, served: str):
        super().__init__(f"there is no model {asked[:80]!r} here, only {served!r}")


class TimeoutPassedError(Exception):
    """An answer was not finished in time."""


class LostError(Exception):
    """The engine failed under an answer."""


@dataclass
class Choice:
    """One answer as it is put together."""

    index: int
    row: Request
    text: AnswerText
    limit: int
    lead: list[int] = field(default_factory=list)
    """Ids of given text that belongs to the answer: what stands before the first slot."""
    slot: int = 0
    """Tokens of each slot where this is a text with slots, of which all is the answer."""
    content: str = ""
    tokens: list[tuple[str, Token]] = field(default_factory=list)
    forwards: int = 0
    finish: str | None = None

    def fills(self) -> list[str]:
        """Return what was written into each slot of a text."""
        ids: list[int] = self.row.ids_G[self.row.slot_G].tolist()
        return [self.text.show(ids[at : at + self.slot]) for at in range(0, len(ids), self.slot)]

    def take(self, news: Update) -> tuple[str, list[tuple[str, Token]]]:
        """Take news and return what can be told of them: text, and tokens with the text of each."""
        text, tokens = self.text.add(news.ids, news.log_probs, last=news.finish is not None)
        self.content += text
        self.tokens += tokens
        self.forwards = news.forwards
        self.finish = "stop" if self.text.stopped else news.finish
        return text, tokens


class Call:
    """The answers to one HTTP request, from the engine's news to its end; cancelled when it is left early."""

    def __init__(self, worker: Worker, choices: Sequence[Choice], stream: bool, seconds: float):
        self._worker, self.choices = worker, choices
        self._news: asyncio.Queue[tuple[Choice, Update]] = asyncio.Queue()
        self._end = time.monotonic() + seconds
        worker.take(len(choices))
        self._tickets = {}
        for choice in choices:
            tell = self._hear(choice)
            self._tickets[choice.index] = Ticket(choice.row, tell, choice.limit, stream, choice.lead)
            worker.submit(self._tickets[choice.index])

    def _hear(self, choice: Choice) -> Callable[[Update], None]:
        return lambda news: self._news.put_nowait((choice, news))

    def cancel(self) -> None:
        """Forget what is still under way."""
        for ticket in self._tickets.values():
            self._worker.cancel(ticket)

    async def follow(self) -> AsyncIterator[tuple[Choice, Update] | None]:
        """Yield news until every answer has ended, and None after a while without any.

        Raises:
            TimeoutPassedError: when the time is over.
            LostError: when the engine failed.
        """
        try:
            while any(choice.finish is None for choice in self.choices):
                left = self._end - time.monotonic()
                try:
                    choice, news = await asyncio.wait_for(self._news.get(), min(left, SIGN_OF_LIFE))
                except TimeoutError:
                    if left > SIGN_OF_LIFE:
                        yield None
                        continue
                    raise TimeoutPassedError from None
                if news.finish == "error":
                    raise LostError
                if choice.finish is None:
                    yield choice, news
                    if choice.finish is not None:
                        # A stop string may end the answer before the engine looks for it.
                        self._worker.cancel(self._tickets[choice.index], "stop")
        finally:
            self.cancel()

    async def finish(self) -> None:
        """Wait until every answer has ended; errors as in `follow`."""
        async for found in self.follow():
            if found is not None:
                found[0].take(found[1])


class EventStream(StreamingResponse):
    """A stream of events that lets go of its answers however it ends, and of a client that does not read."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], call: Call, seconds: float):
        super().__init__(events, headers={"x-accel-buffering": "no"})
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


async def unless_gone(request: HttpRequest, work: Coroutine[Any, Any, None]) -> bool:
    """Do some work; return whether the client was still there when it ended."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
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
