"""What a server counts, in the form that Prometheus reads."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """The counters of one server, apart from those of any other in the process.

    Args:
        running: tells how many answers are under way.
        waiting: tells how many wait to begin.
    """

    def __init__(self, running: Callable[[], int], waiting: Callable[[], int]):
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        labels = ["route", "status"]
        self.requests = Counter("illada_requests", "HTTP requests answered", labels, registry=registry)
        self.ended = Counter("illada_answers", "Answers ended, by how", ["how"], registry=registry)
        self.tokens = Counter("illada_tokens", "Tokens committed in finished answers", registry=registry)
        self.passes = Counter("illada_passes", "Forward passes", registry=registry)
        self.rows = Counter(
            "illada_forwards", "Forward passes, counted once for every answer in them", registry=registry
        )
        self.positions = Counter("illada_positions", "Positions that the passes computed", registry=registry)
        self.first = Histogram(
            "illada_first_commit_seconds",
            "From arrival to the first committed token",
            buckets=SECONDS,
            registry=registry,
        )
        self.whole = Histogram(
            "illada_answer_seconds", "From arrival to the end of the answer", buckets=SECONDS, registry=registry
        )
        Gauge("illada_running", "Answers under way", registry=registry).set_function(running)
        Gauge("illada_waiting", "Answers that wait to begin", registry=registry).set_function(waiting)

    def text(self) -> bytes:
        """Return all of it in Prometheus's text format."""
        return generate_latest(self.registry)
