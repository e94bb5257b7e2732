"""Time, work and memory of samplers on one model, paired: every repeat runs all samplers, one after the other."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from illada.bench.samplers import Answer, Prompts, Sampler
from illada.model.transformer import IlladaForMaskedLM


@dataclass
class Work:
    """Amount of work of the network."""

    forwards: int = 0
    """Calls of the trunk, whatever the number of rows in a call."""
    positions: int = 0
    """Tokens that went through the trunk."""
    head_positions: int = 0
    """Tokens whose logits were computed."""


@dataclass
class Measurement:
    """One sampler's runs over all prompts."""

    sampler: Sampler
    seconds: list[float] = field(default_factory=list)
    """Seconds of each repeat."""
    cpu_seconds: list[float] = field(default_factory=list)
    """Processor time of the process with all its threads, which other work on the machine hardly changes."""
    peak_bytes: int | None = None
    """Most memory in use, weights included: allocated on a GPU, else resident in the process; None if unknown."""
    answers: list[Answer] = field(default_factory=list)
    work: Work = field(default_factory=Work)
    """Work of the last repeat; answers and work are the same in all repeats."""

    @property
    def tokens(self) -> int:
        """Tokens of all answers, without end-of-sequence."""
        return sum(len(answer.ids) for answer in self.answers)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of the median time."""
        return self.tokens / statistics.median(self.seconds)


@contextmanager
def count_work(model: IlladaForMaskedLM) -> Iterator[Work]:
    """Count the network's work in the block.

    The hooks are on the embedding and on the last norm, which every way through the network passes: positions without
    logits are dropped before that norm, and the head may work in pieces of the vocabulary.
    """
    work = Work()

    def trunk(_: Any, inputs: tuple[torch.Tensor, ...], __: Any) -> None:
        work.forwards += 1
        work.positions += inputs[0].numel()

    def head(_: Any, inputs: tuple[torch.Tensor, ...], __: Any) -> None:
        work.head_positions += inputs[0].shape[:-1].numel()

    hooks = (model.model.embed_tokens.register_forward_hook(trunk), model.model.norm.register_forward_hook(head))
    try:
        yield work
    finally:
        for hook in hooks:
            hook.remove()


def measure(
    model: IlladaForMaskedLM,
    samplers: Sequence[Sampler],
    prompts: Prompts,
    repeats: int,
    on_run: Callable[[str], None] = lambda _: None,
) -> list[Measurement]:
    """Run every sampler over all prompts `repeats` times, interleaved; every second repeat goes backwards.

    Every sampler first runs on one prompt, unmeasured. `on_run` gets the name of the sampler that runs next.
    """
    measurements = [Measurement(sampler) for sampler in samplers]
    for sampler in samplers:
        on_run(sampler.name)
        sampler.answer(prompts[:1])
    for repeat in range(repeats):
        for measurement in measurements if repeat % 2 == 0 else measurements[::-1]:
            on_run(measurement.sampler.name)
            has_peak = _reset_peak(model.device)
            with count_work(model) as work:
                _synchronise(model.device)
                started, cpu_started = time.perf_counter(), time.process_time()
                answers = measurement.sampler.answer(prompts)
                _synchronise(model.device)
                measurement.seconds.append(time.perf_counter() - started)
                measurement.cpu_seconds.append(time.process_time() - cpu_started)
            if has_peak:
                measurement.peak_bytes = max(_peak(model.device), measurement.peak_bytes or 0)
            measurement.answers, measurement.work = answers, work
    return measurements


def agreement(answers: Sequence[Answer], exact: Sequence[Answer]) -> tuple[float, float | None]:
    """Return (share of identical answers, share of equal tokens up to the shorter length of each pair).

    The second share is None when every pair has an empty answer.
    """
    pairs = [(a.ids, b.ids) for a, b in zip(answers, exact, strict=True)]
    same = sum(a == b for a, b in pairs) / len(pairs)
    compared = sum(min(len(a), len(b)) for a, b in pairs)
    equal = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=False))
    return same, equal / compared if compared else None


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _reset_peak(device: torch.device) -> bool:
    """Reset the peak of memory; return whether that is possible here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory becomes the present
    except OSError:
        return False
    return device.type == "cpu"


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
