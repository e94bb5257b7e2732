"""`illada bench generate` and `illada bench serve`: measure this package."""

import sys

from illada.bench.options import BenchGenerateOptions, BenchServeOptions
from illada.commands import heavy


def generate(options: BenchGenerateOptions) -> None:
    """Measure every way to generate on one model: speed, work, memory, agreement with exact decoding, accuracy."""
    _finish(heavy.bench_generation.table(heavy.bench_generation.bench_generate(options, on_run=_show)), options.output)


def serve(options: BenchServeOptions) -> None:
    """Put load on a server, at several rates and mixes: speed, latency, queue and memory, beside one at a time."""
    _finish(heavy.bench_serving.table(heavy.bench_serving.bench_serve(options, on_run=_show)), options.output)


def _show(name: str) -> None:
    """Say on a terminal what is being measured: a line and no spinner, whose thread would take time from it."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{name}", end="", file=sys.stderr, flush=True)


def _finish(table: str, output: str | None) -> None:
    _show("")
    print(table)
    if output is not None:
        print(f"written to {output}")
