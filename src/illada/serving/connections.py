"""How long connections may wait for their client, so that a slow one costs nothing without a proxy in front."""

from collections.abc import Iterable
from typing import Any

HEADER_SECONDS = 15.0
"""How long a client may take to send the header of a request once it is connected or has begun one."""
CROWD_SECONDS = 1.0
"""How long it may take while there are too many connections."""
STALLED_SECONDS = 30.0
"""How long a client may take nothing of what was sent to it. (`middleware.py` has the time of a request's body.)"""


class Connections:
    """Closes connections whose client is too slow, and those that are too many.

    It reads three things of uvicorn's connections, which hold neither time: the request under way, the timer of a
    connection that is kept for a next request (30 s, uvicorn's own), and how much is written but not sent yet.

    Args:
        most: connections beyond which those that send no request are closed, the oldest first.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: dict[Any, float] = {}
        self._unsent: dict[Any, tuple[int, float]] = {}

    def check(self, connections: Iterable[Any], now: float) -> None:
        """Close what has waited too long; `now` is in seconds of any clock that goes on."""
        unsent: dict[Any, tuple[int, float]] = {}
        waiting: dict[Any, float] = {}
        count = 0
        for one in list(connections):
            count += 1
            if size := one.transport.get_write_buffer_size():
                last, since = self._unsent.get(one, (size, now))
                unsent[one] = (size, now if size < last else since)
            elif one.cycle is None or one.cycle.response_complete:
                waiting[one] = self._waiting.get(one, now)
        slow = [one for one, (_, since) in unsent.items() if now - since > STALLED_SECONDS]
        # A connection that is kept has a timer of its own until the next request begins to come.
        late = [
            one for one, since in waiting.items() if not one.timeout_keep_alive_task and now - since > HEADER_SECONDS
        ]
        idle = sorted((one for one in waiting if now - waiting[one] > CROWD_SECONDS), key=lambda one: waiting[one])
        crowd = idle[: max(0, count - self._most)]
        for one in {*slow, *late, *crowd}:
            one.transport.abort()
        self._unsent, self._waiting = unsent, waiting
