"""What a server counts, in Prometheus's text format."""

from collections.abc import Callable
from functools import partial

from illada.errors import needs

with needs("serve", "serving"):
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """The counters of one server, separate from those of any other server in the process.

    Args:
        running: returns how many answers are under way.
        waiting: returns how many answers wait to begin.
    """

    def __init__(self, running: Callable[[], int], waiting: Callable[[], int]):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, buckets=SECONDS, registry=self.registry)
        self.requests = counter("illada_requests", "HTTP requests answered", ["route", "status"])
        self.ended = counter("illada_answers", "Answers ended, by how", ["how"])
        self.tokens = counter("illada_tokens", "Tokens committed in finished answers")
        self.passes = counter("illada_passes", "Forward passes")
        self.forwards = counter("illada_forwards", "Forward passes, counted once for every answer in them")
        self.positions = counter("illada_positions", "Positions that the passes computed")
        self.first = histogram("illada_first_commit_seconds", "From arrival to the first committed token")
        self.whole = histogram("illada_answer_seconds", "From arrival to the end of the answer")
        Gauge("illada_running", "Answers under way", registry=self.registry).set_function(running)
        Gauge("illada_waiting", "Answers that wait to begin", registry=self.registry).set_function(waiting)

    def text(self) -> bytes:
        """Return all counters in Prometheus's text format."""
        return generate_latest(self.registry)
