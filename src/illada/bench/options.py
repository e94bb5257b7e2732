"""Options of `illada bench generate` and `illada bench serve`. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from illada.errors import IlladaError
from illada.weights.options import Dtype


@dataclass(frozen=True)
class BenchGenerateOptions:
    """Measure every way to generate on one model: speed, work, memory, agreement with exact decoding, accuracy.

    Args:
        model: model or run folder, or a hub name.
        random: shape to fill with random weights instead: 1m, 5m, 15m, 50m, illada-8b or llada-8b.
        vocab_size: vocabulary of the random model.
        tasks: jsonl with {"prompt": str, "answer": str} on each line; null takes the demo's held-out problems.
        limit: most problems to answer.
        batch: prompts given to the engine at once; the plain loop and outside samplers take one at a time.
        block_length: masks appended at a time.
        max_new_tokens: most tokens of an answer.
        repeats: timed runs of each variant; the median counts.
        only: variants to run, by their names in the table, beside the plain loop and "1 token".
        outside: samplers of others, which are run: FILE.py[:FUNCTION][,OPTION=VALUE...], called as LLaDA's or
            Fast-dLLM's.
        output: folder for results.json, table.md and frontier.png; null only prints the table.
        seed: seed of random weights and prompts, and of the choice of problems.
        dtype: type of the weights; auto takes the checkpoint's own, or fp32 for random ones.
        device: device to run on; auto takes a GPU where there is one.

    Raises:
        IlladaError: when an option cannot be used.
    """

    model: str | None = None
    random: str | None = None
    vocab_size: int | None = None
    tasks: str | None = None
    limit: int = 64
    batch: int = 32
    block_length: int = 16
    max_new_tokens: int = 48
    repeats: int = 3
    only: list[str] | None = None
    outside: list[str] | None = None
    output: str | None = None
    seed: int = 0
    dtype: Dtype = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        """Refuse options that cannot be used."""
        _check_counts(limit=self.limit, batch=self.batch, repeats=self.repeats)
        _check_output(self.output)
        if (self.model is None) == (self.random is None):
            raise IlladaError("give --model FOLDER, or --random SHAPE for random weights")
        if self.model is not None and self.vocab_size is not None:
            raise IlladaError("--vocab_size goes with --random: a trained model has its own")
        if self.model is None and self.tasks is not None:
            raise IlladaError("--tasks needs --model: random weights answer nothing")


@dataclass(frozen=True)
class Mix:
    """Kinds of requests; a third wants the answer whole, a third streams, and a third also gets diffusion events."""

    long: bool = False
    """Whether every second prompt is made of several prompts, as many as the context allows."""
    short_answers: bool = False
    """Whether max_tokens varies from one block to the server's own, instead of the latter alone."""
    leaving: float = 0.0
    """Share of the clients that may go away before the end."""


MIXES = {
    "short": Mix(),
    "long": Mix(long=True),
    "mixed": Mix(long=True, short_answers=True),
    "cancels": Mix(long=True, short_answers=True, leaving=0.5),
}


@dataclass(frozen=True)
class BenchServeOptions:
    """Put load on a server, at several rates and mixes: speed, latency, queue and memory, beside one at a time.

    Args:
        model: model or run folder, or a hub name; a process of its own serves it, and a copy in this process is
            compared with the server.
        url: address of a running server instead, as http://127.0.0.1:8000; ILLADA_API_KEYS may hold a key of the
            server. With --model too, the server is not started but compared with that model.
        mixes: kinds of requests: short, long, mixed, cancels (clients go away); all of them by default.
        clients: numbers of clients at once, each sending its next request when it has its answer; 1, 8 and 32 by
            default.
        rates: requests a second, sent whether or not others have been answered; by default shares of the most answers
            a second that clients got.
        requests: most requests of each row.
        seconds: time after which no more requests are sent for a row.
        limit: number of different problems.
        file: file with a prompt on each line (or jsonl with "prompt"); null takes the demo's held-out problems.
        decoding: decoding of every request; null takes the server's own.
        outside: samplers of others to compare with: FILE.py[:FUNCTION][,OPTION=VALUE...], called as LLaDA's or
            Fast-dLLM's.
        block_length: block length of the server that is started.
        max_new_tokens: most tokens of an answer of the server that is started.
        output: folder for results.json, table.md and load.png; null only prints the table.
        seed: seed of the choice of problems, kinds and times of arrival.
        dtype: type of the weights; auto takes the checkpoint's own.
        device: device to run on; auto takes a GPU where there is one.

    Raises:
        IlladaError: when an option cannot be used.
    """

    model: str | None = None
    url: str | None = None
    mixes: list[str] | None = None
    clients: list[int] | None = None
    rates: list[float] | None = None
    requests: int = 200
    seconds: float = 60.0
    limit: int = 24
    file: str | None = None
    decoding: Literal["exact", "fast"] | None = None
    outside: list[str] | None = None
    block_length: int = 16
    max_new_tokens: int = 48
    output: str | None = None
    seed: int = 0
    dtype: Dtype = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        """Refuse options that cannot be used."""
        _check_counts(limit=self.limit, requests=self.requests, clients=min(self.clients or (1,)))
        for name, value in (("seconds", self.seconds), ("rates", min(self.rates or (1,)))):
            if value <= 0:
                raise IlladaError(f"{name} must be above 0, got {value}")
        if unknown := [mix for mix in self.mixes or () if mix not in MIXES]:
            raise IlladaError(f"no mix {unknown[0]!r}: there are {', '.join(MIXES)}")
        if self.model is None and (self.url is None or self.outside):
            raise IlladaError("give --model FOLDER to serve and to compare with, or --url of a server alone")
        _check_output(self.output)


def _check_counts(**counts: int) -> None:
    for name, number in counts.items():
        if number < 1:
            raise IlladaError(f"{name} must be at least 1, got {number}")


def _check_output(output: str | None) -> None:
    if output is not None and (Path(output) / "results.json").exists():
        raise IlladaError(f"{output} holds the results of another run: choose another --output")
