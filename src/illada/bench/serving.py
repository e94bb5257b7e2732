"""`illada bench serve`: load on a server from this process, beside one request at a time on the same weights."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from illada.bench.external import outside_samplers
from illada.bench.load import Request, Run, drive, get_json, mixed_up, percentiles, poisson, queued, started_server
from illada.bench.samplers import PLAIN, Sampler, plain_sampler
from illada.errors import IlladaError
from illada.generation.settings import GenerationSettings, settings_for
from illada.model import IlladaForMaskedLM
from illada.reporting import COLOURS, MUTED, aligned, environment_of, write_results
from illada.rng import shuffled_index, uniform_int
from illada.text.chat import encode_prompt
from illada.text.prompts import encode_plain, read_prompts
from illada.toy_tasks import TASKS, held_out
from illada.weights.load import load_model
from illada.weights.options import Dtype

SHARES_OF_MOST = (0.5, 0.8, 1.2)
"""Rates when none are given: these shares of the most answers a second under any number of clients."""
SHARE_OF_ALONE = 0.8
"""And this share of what the plain loop can do, so that the queue before it would not grow for ever."""
TEMPLATE_TOKENS = 32
"""Tokens that a chat template may add to a prompt, about."""
TEXT, TOKENS, WHICH, KIND, STAY, ARRIVAL = range(6)
"""Streams of random numbers."""


@dataclass(frozen=True)
class Mix:
    """What clients ask for; a third of them wants the answer whole, a third streams, a third also diffusion events."""

    long: bool = False
    """Every second prompt is several of the prompts in one, as many as the context allows."""
    short_answers: bool = False
    """max_tokens is anything from one block to the server's own, not the latter."""
    leaving: float = 0.0
    """Share of the clients that may go away before the end."""


MIXES = {
    "short": Mix(),
    "long": Mix(long=True),
    "mixed": Mix(long=True, short_answers=True),
    "cancels": Mix(long=True, short_answers=True, leaving=0.5),
}


@dataclass
class Alone:
    """A sampler that answers one request at a time, without a server before it."""

    seconds: dict[int, list[float]] = field(default_factory=dict)
    """Of each problem, one for each time that it was answered."""
    cpu_seconds: float = 0.0
    """Of all these together: processor time, which other work on the machine hardly changes."""
    tokens: int = 0

    @property
    def services(self) -> dict[int, float]:
        """Mean seconds of each problem."""
        return {problem: statistics.mean(each) for problem, each in self.seconds.items()}

    @property
    def answers_per_second(self) -> float:
        """The most that can be served this way."""
        return 1 / statistics.mean(self.services.values())


@dataclass(frozen=True)
class Plan:
    """What is done with every mix."""

    clients: list[int]
    rates: list[float]
    """Requests a second; none to take those of `SHARES_OF_MOST` and `SHARE_OF_ALONE`."""
    requests: int
    seconds: float
    seed: int
    on_run: Callable[[str], None]


Work = list[tuple[list[int], list[Sampler]]]
"""Of each problem its ids and the samplers that answer it alone."""


def bench_serve(
    model: str | None = None,
    url: str | None = None,
    mixes: Sequence[str] | None = None,
    clients: Sequence[int] | None = None,
    rates: Sequence[float] | None = None,
    requests: int = 200,
    seconds: float = 60.0,
    limit: int = 24,
    file: str | None = None,
    decoding: str | None = None,
    outside: Sequence[str] | None = None,
    block_length: int = 16,
    max_new_tokens: int = 48,
    output: str | None = None,
    seed: int = 0,
    dtype: Dtype = "auto",
    device: str = "auto",
    on_run: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Load a server and return what results.json holds; arguments as in `illada bench serve`.

    Raises:
        IlladaError: when an argument cannot be used, or there is no such server.
    """
    arguments = {name: value for name, value in locals().items() if name != "on_run"}
    for name, number in (("limit", limit), ("requests", requests), ("clients", min(clients or (1,)))):
        if number < 1:
            raise IlladaError(f"{name} must be at least 1, got {number}")
    for name, value in (("seconds", seconds), ("rates", min(rates or (1,)))):
        if value <= 0:
            raise IlladaError(f"{name} must be above 0, got {value}")
    if unknown := [mix for mix in mixes or () if mix not in MIXES]:
        raise IlladaError(f"no mix {unknown[0]!r}: there are {', '.join(MIXES)}")
    if model is None and (url is None or outside):
        raise IlladaError("give --model FOLDER to serve and to compare with, or --url of a server alone")
    if output is not None and (Path(output) / "results.json").exists():
        raise IlladaError(f"{output} holds the results of another run: choose another --output")

    network, tokenizer = (None, None) if model is None else load_model(model, dtype, device)
    plan = Plan(list(clients or (1, 8, 32)), list(rates or ()), requests, seconds, seed, on_run)
    flags = ["--block_length", block_length, "--max_new_tokens", max_new_tokens, "--dtype", dtype, "--device", device]
    with nullcontext(url) if url else started_server(str(model), [str(flag) for flag in flags]) as base:
        card, rows = _card(base), []
        texts = read_prompts(None, file)[:limit] if file else _demo_texts(limit, seed)
        for name in mixes or MIXES:
            problems = _problems(texts, MIXES[name], card, decoding, seed)
            work: Work = []
            if network is not None and not MIXES[name].leaving:  # a sampler alone does not learn that a client has left
                work = _work(problems, network, tokenizer, card["defaults"]["block_length"], outside or ())
            rows += _load_of_mix(name, base, problems, work, plan)
    results = {
        "arguments": arguments,
        "environment": environment_of(network),
        "server": {"url": url, **card},
        "rows": rows,
    }
    if output is not None:
        write_results(Path(output), results, table(results), "load.png", draw)
    return results


def _card(url: str) -> dict[str, Any]:
    """Return what the server says about its model."""
    try:
        card: dict[str, Any] = get_json(f"{url.rstrip('/')}/v1/models")["data"][0]
        if {"defaults", "context_length", "chat"} <= card.keys():
            return card
    except (LookupError, TypeError):
        pass
    raise IlladaError(f"{url} is no server of this package: its /v1/models has another form")


def _demo_texts(count: int, seed: int) -> list[str]:
    each = [held_out(task, -(-count // len(TASKS)), seed) for task in TASKS]
    return [example.prompt for examples in zip(*each, strict=False) for example in examples][:count]


def _problems(texts: Sequence[str], mix: Mix, card: dict[str, Any], decoding: str | None, seed: int) -> list[Request]:
    """Return what is asked, each answered whole and at temperature 0."""
    block, most = card["defaults"]["block_length"], card["defaults"]["max_new_tokens"]
    room = card["context_length"] - most - TEMPLATE_TOKENS  # in bytes: no token is less than one
    problems = []
    for number, text in enumerate(texts):
        if mix.long and number % 2:
            parts = [text, *(texts[shuffled_index(i, len(texts), seed, TEXT, number)] for i in range(len(texts)))]
            ends = accumulate(len(part.encode()) + 1 for part in parts)
            asked = "\n".join(part for part, end in zip(parts, ends, strict=True) if end <= room) or text
        else:
            asked = text
        blocks = max(1, most // block)
        if mix.short_answers:
            blocks = 1 + int(uniform_int(seed, TOKENS, number) * blocks)
        body: dict[str, Any] = {"model": card["id"], "max_tokens": blocks * block, "temperature": 0}
        body |= {"messages": [{"role": "user", "content": asked}]} if card["chat"] else {"prompt": asked}
        if decoding is not None:
            body["decoding"] = decoding
        problems.append(Request("/v1/chat/completions" if card["chat"] else "/v1/completions", body, number))
    return problems


def _work(
    problems: Sequence[Request], model: IlladaForMaskedLM, tokenizer: Any, block: int, outside: Sequence[str]
) -> Work:
    """Return what answers each problem alone: the paper's loop written plainly, and samplers of others."""
    samplers: dict[int, list[Sampler]] = {}
    work = []
    for problem in problems:
        budget, messages = problem.body["max_tokens"], problem.body.get("messages")
        ids = encode_prompt(tokenizer, messages) if messages else encode_plain(tokenizer, problem.body["prompt"])
        if budget not in samplers:
            exact = settings_for(model, GenerationSettings(max_new_tokens=budget, block_length=block))
            samplers[budget] = [plain_sampler(model, exact), *outside_samplers(outside, model, exact)]
            for sampler in samplers[budget]:
                sampler.answer([ids])  # the first time is not measured
        work.append((ids, samplers[budget]))
    return work


def _answer_alone(work: Work, alone: dict[str, Alone]) -> None:
    """Answer every problem by every sampler, one after the other, and add what it took."""
    for number, (ids, samplers) in enumerate(work):
        for sampler in samplers:
            started, cpu_started = time.perf_counter(), time.process_time()
            (answer,) = sampler.answer([ids])
            found = alone.setdefault(sampler.name, Alone())
            found.seconds.setdefault(number, []).append(time.perf_counter() - started)
            found.cpu_seconds += time.process_time() - cpu_started
            found.tokens += len(answer.ids)


def _load_of_mix(name: str, url: str, problems: list[Request], work: Work, plan: Plan) -> list[dict[str, Any]]:
    """Return a row for every number of clients and every rate.

    What answers one request at a time is timed before and after, while the server has nothing to do.
    """
    alone: dict[str, Alone] = {}
    plan.on_run(f"{name}, one at a time")
    _answer_alone(work, alone)
    plan.on_run(f"{name}, each problem alone")
    reference = drive(url, problems)
    if statuses := {o.status for o in reference.outcomes if o.status != "ok"}:
        raise IlladaError(f"{url} does not answer the problems of mix {name}: {', '.join(sorted(statuses))}")
    stay = 2 * statistics.mean(outcome.latency for outcome in reference.outcomes)

    runs: list[tuple[dict[str, Any], Run]] = []

    def load(clients: int | None, rate: float | None) -> None:
        title = f"{rate:.3g} a second" if rate else f"{clients} client{'s' * (clients != 1)}"
        plan.on_run(f"{name}, {title}")
        key = (plan.seed, *name.encode(), len(runs))
        sent = [_sent(problems, MIXES[name], stay, *key, number) for number in range(plan.requests)]
        arrivals = poisson(rate, len(sent), *key, ARRIVAL) if rate else None
        run = drive(url, sent, clients=clients, arrivals=arrivals, seconds=plan.seconds)
        wrong = len(mixed_up(run.outcomes, reference.outcomes))
        row = {"mix": name, "load": title, "clients": clients, "rate": rate, **run.summary(), "mixed_up": wrong}
        runs.append((row, run))

    for clients in plan.clients:
        load(clients, None)
    if not (most := max(row["answers_per_second"] for row, _ in runs)):
        raise IlladaError(f"{url} answered nothing of mix {name} under load: {runs[-1][0]['statuses']}")
    rates = plan.rates or [share * most for share in SHARES_OF_MOST]
    if alone and not plan.rates:
        rates = sorted([*rates, SHARE_OF_ALONE * alone[PLAIN].answers_per_second])
    for rate in rates:
        load(None, rate)
    plan.on_run(f"{name}, one at a time")
    _answer_alone(work, alone)
    for row, run in runs:
        row["alone"] = {sampler: _beside(row, run, found) for sampler, found in alone.items()}
        row["watched"] = run.watched
    return [row for row, _ in runs]


def _sent(problems: list[Request], mix: Mix, stay: float, *key: int) -> Request:
    """Return one of the problems as some client asks for it; one that leaves does within `stay` seconds."""
    problem = problems[int(uniform_int(*key, WHICH) * len(problems))]
    kind, leaving = int(uniform_int(*key, KIND) * 3), uniform_int(*key, STAY)
    stream = {"stream": True, "stream_options": {"include_usage": True}, "diffusion": kind == 2}
    hang_up = stay * leaving / mix.leaving if leaving < mix.leaving else None
    return replace(problem, body=problem.body | (stream if kind else {}), hang_up=hang_up)


def _beside(row: dict[str, Any], run: Run, alone: Alone) -> dict[str, Any]:
    """Return what serving one at a time gives for the same load, and how many times that the server did.

    Under a rate the latencies are those of a queue with one worker, given the same arrivals and the measured times.
    """
    spent = sum(sum(each) for each in alone.seconds.values())
    answers, cpu = sum(map(len, alone.seconds.values())), row["cpu"]
    found: dict[str, Any] = {
        "answers_per_second": alone.answers_per_second,
        "tokens_per_second": alone.tokens / spent,
        "answers_per_cpu_second": answers / alone.cpu_seconds,
        "times": row["answers_per_second"] / alone.answers_per_second,
    }
    if cpu is not None and cpu["last"] > cpu["first"]:
        served = row["statuses"].get("ok", 0) / (cpu["last"] - cpu["first"])
        found["cpu_times"] = served / found["answers_per_cpu_second"]
    if row["rate"] is not None:
        services = alone.services
        due = [outcome.due for outcome in run.outcomes]
        found["latency"] = percentiles(queued(due, [services[o.request.problem] for o in run.outcomes]))
    return found


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    others = list(dict.fromkeys(name for row in results["rows"] for name in row["alone"]))
    head = ["load", "answers/s", "tokens/s", *(f"× {name}" for name in others), "committed p50", "text p50"]
    head += ["p50", "p90", "p99", *(f"{name} p50 / p99" for name in others), "waiting", "MB", "else"]
    lines = [head]
    for row in results["rows"]:
        alone = [row["alone"].get(name, {}) for name in others]
        odd = {name: count for name, count in row["statuses"].items() if name != "ok"}
        odd |= {"mixed up": row["mixed_up"]} if row["mixed_up"] else {}
        lines.append(
            [
                f"{row['mix']}, {row['load']}",
                f"{row['answers_per_second']:.1f}",
                f"{row['tokens_per_second']:.1f}",
                *(_times(found) if row["rate"] is None else "" for found in alone),
                *(_shown(row[name], "p50") for name in ("first_committed", "first_text", "latency")),
                *(_shown(row["latency"], name) for name in ("p90", "p99")),
                *(f"{_shown(found.get('latency'), 'p50', 'p99')}" for found in alone),
                "" if row["waiting"] is None else f"{row['waiting']['most']:.0f}",
                "" if row["memory"] is None else f"{row['memory']['last'] / 1e6:.0f}",
                ", ".join(f"{count} {name}" for name, count in odd.items()),
            ]
        )
    environment, arguments = results["environment"], results["arguments"]
    return "\n".join(
        [
            aligned(lines),
            "",
            f"Seconds; at most {arguments['requests']} requests and {arguments['seconds']:g} s for each row. Committed "
            "and text: until the first token is committed and until the first text comes, of answers that stream. "
            "×: answers a second against one at a time (in brackets: against processor time, the server's whole "
            "process); under a rate, one at a time is a queue before one worker with the same arrivals. "
            f"{environment['device']}, {environment['cores']} cores, commit {environment['commit'] or 'unknown'}.",
        ]
    )


def _times(found: dict[str, Any]) -> str:
    cpu = f" ({found['cpu_times']:.2f})" if "cpu_times" in found else ""
    return f"{found['times']:.2f}{cpu}" if found else ""


def _shown(values: dict[str, float] | None, *names: str) -> str:
    return "" if values is None else " / ".join(f"{values[name]:.3f}" for name in names)


def draw(rows: Sequence[dict[str, Any]]) -> bytes:
    """Draw answers a second by clients, latency by rate, queue and memory over time, as PNG.

    Raises:
        ImportError: when matplotlib is missing.
    """
    from io import BytesIO

    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    (many, late), (queue, memory) = figure.subplots(2, 2)
    many.set(xlabel="clients", ylabel="answers per second", xscale="log")
    late.set(xlabel="requests per second", ylabel="latency, s: p50 to p99", xscale="log", yscale="log")
    queue.set(xlabel="seconds of load", ylabel="requests waiting")
    memory.set(xlabel="seconds of load", ylabel="server's resident memory, MB")
    colours = dict(zip(dict.fromkeys(row["mix"] for row in rows), COLOURS, strict=False))
    begun = 0.0
    for mix, colour in colours.items():
        closed = [row for row in rows if row["mix"] == mix and row["rate"] is None]
        many.plot(
            [r["clients"] for r in closed], [r["answers_per_second"] for r in closed], "o-", color=colour, label=mix
        )
        for style, name in zip((":", "--", "-."), closed[0]["alone"], strict=False):
            many.axhline(closed[0]["alone"][name]["answers_per_second"], color=colour, ls=style, lw=1)
        at_rate = sorted((r for r in rows if r["mix"] == mix and r["rate"] and r["latency"]), key=lambda r: r["rate"])
        lines = [("-", [(r["rate"], r["latency"]) for r in at_rate])]
        for style, name in zip((":", "--", "-."), closed[0]["alone"], strict=False):
            lines.append((style, [(r["rate"], r["alone"][name]["latency"]) for r in at_rate]))
        for style, points in lines:
            x, low, high = [p[0] for p in points], [p[1]["p50"] for p in points], [p[1]["p99"] for p in points]
            late.plot(x, low, style, marker="o", ms=3, color=colour)
            late.fill_between(x, low, high, color=colour, alpha=0.12 if style == "-" else 0.04, lw=0)
        for row in (row for row in rows if row["mix"] == mix):
            for axes, name, scale in ((queue, "waiting", 1), (memory, "memory", 1e-6)):
                points = [(begun + sample["at"], scale * sample[name]) for sample in row["watched"] if name in sample]
                axes.plot(*zip(*points, strict=True), color=colour, lw=1) if points else None
            begun += row["seconds"]
    for style, name in zip((":", "--", "-."), dict.fromkeys(n for row in rows for n in row["alone"]), strict=False):
        many.plot([], [], style, color=MUTED, label=f"one at a time: {name}")
    many.legend(frameon=False, fontsize=8)
    for axes, marks in ((many, "clients"), (late, "rate")):
        axes.set_xticks(ticks := sorted({row[marks] for row in rows if row[marks]}), [f"{tick:.3g}" for tick in ticks])
        axes.minorticks_off()
    for axes in (many, queue, memory):
        axes.set_ylim(0)
    for axes in (many, late, queue, memory):
        axes.spines[["top", "right"]].set_visible(False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
