"""How fast a run goes now, how its loss moves, and when it will end: for the line on the terminal."""

import time
from collections import deque
from typing import Any

from illada.reporting import duration

SPEED_SECONDS = 10.0
"""The present speed is that of the last so many seconds, or of the last step where it took longer."""

SMOOTH_STEPS = 20
"""The loss on the terminal is the mean of the last so many steps."""


class Pace:
    """Measures a run from now on.

    Args:
        step: steps that are done.
        tokens: tokens that were seen.
    """

    def __init__(self, step: int, tokens: int):
        self.first_step, self.started = step, time.monotonic()
        self._seen = deque([(self.started, tokens)])
        self._losses: deque[float] = deque(maxlen=SMOOTH_STEPS)

    def take(self, tokens: int) -> float:
        """Take the number of tokens seen after a step; return the present speed in tokens a second."""
        now = time.monotonic()
        self._seen.append((now, tokens))
        while len(self._seen) > 2 and now - self._seen[1][0] >= SPEED_SECONDS:
            self._seen.popleft()
        then, before = self._seen[0]
        return (tokens - before) / max(now - then, 1e-9)

    def line(self, step: int, total: int, record: dict[str, Any]) -> str:
        """Return what a person wants to know after a step of `total`, given its record."""
        if "trouble" not in record:
            self._losses.append(record["loss"])
        loss = sum(self._losses) / len(self._losses) if self._losses else record["loss"]
        elapsed = time.monotonic() - self.started
        left = elapsed / max(step - self.first_step, 1) * (total - step)
        more = "".join(f"{name} {record[name]:.3f}  " for name in ("reward", "accuracy") if name in record)
        return (
            f"loss {loss:.3f}  {more}lr {record['learning_rate']:.1e}  {record['tokens_per_second']:,} tokens/s  "
            f"{duration(elapsed)} elapsed, {duration(left)} left"
        )
