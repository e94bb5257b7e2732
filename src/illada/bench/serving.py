"""`illada bench serve`: load on a server from this process, beside one request at a time on the same weights."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from illada.bench.external import outside_samplers
from illada.bench.load import Request, Run, drive, get_json, mixed_up, percentiles, poisson, queued, started_server
from illada.bench.options import MIXES, BenchServeOptions, Mix
from illada.bench.samplers import PLAIN, Sampler, plain_sampler
from illada.errors import IlladaError
from illada.generation.settings import GenerationSettings, settings_for
from illada.model.transformer import IlladaForMaskedLM
from illada.reporting import COLOURS, MUTED, aligned, environment_of, figure, rendered, write_results
from illada.rng import shuffled_index, uniform_int
from illada.text.chat import encode_prompt
from illada.text.prompts import encode_plain, read_prompts
from illada.toy_tasks import TASKS, held_out_mix
from illada.weights.load import load_model

SHARES_OF_MOST = (0.5, 0.8, 1.2)
"""Default rates: these shares of the most answers a second under any number of clients."""
SHARE_OF_ALONE = 0.8
"""Share of the plain loop's answers a second, one more default rate, at which a queue before the loop stays finite."""
TEMPLATE_TOKENS = 32
"""Tokens that a chat template may add to a prompt, roughly."""
TEXT, TOKENS, WHICH, KIND, STAY, ARRIVAL = range(6)
"""Streams of random numbers."""


@dataclass
class Alone:
    """Measurements of a sampler that answers one request at a time, without a server."""

    seconds: dict[int, list[float]] = field(default_factory=dict)
    """Seconds of every answer to each problem."""
    cpu_seconds: float = 0.0
    """Processor time of all answers together, which other work on the machine hardly changes."""
    tokens: int = 0

    @property
    def services(self) -> dict[int, float]:
        """Mean seconds of each problem."""
        return {problem: statistics.mean(seconds) for problem, seconds in self.seconds.items()}

    @property
    def answers_per_second(self) -> float:
        """Most answers a second that can be served this way."""
        return 1 / statistics.mean(self.services.values())


Work = list[tuple[list[int], list[Sampler]]]
"""For each problem its ids and the samplers that answer it alone."""


def bench_serve(options: BenchServeOptions, on_run: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Load a server and return the content of results.json. `on_run` gets the name of what runs next.

    Raises:
        IlladaError: when an option cannot be used, or there is no such server.
    """
    network, tokenizer = None, None
    if options.model is not None:
        network, tokenizer = load_model(options.model, options.dtype, options.device)
    flags = [f"--{name}={getattr(options, name)}" for name in ("block_length", "max_new_tokens", "dtype", "device")]
    with nullcontext(options.url) if options.url else started_server(str(options.model), flags) as url:
        card, rows = _card(url), []
        if options.file:
            texts = read_prompts(None, options.file)[: options.limit]
        else:
            texts = [example.prompt for example in held_out_mix(list(TASKS), options.limit, options.seed)]
        for name in options.mixes or MIXES:
            problems = _problems(texts, MIXES[name], card, options.decoding, options.seed)
            work: Work = []
            if network is not None and not MIXES[name].leaving:  # a sampler alone does not learn that a client has left
                work = _work(problems, network, tokenizer, card["defaults"]["block_length"], options.outside or ())
            rows += _load_of_mix(name, url, problems, work, options, on_run)
    results = {
        "arguments": asdict(options),
        "environment": environment_of(network),
        "server": {"url": options.url, **card},
        "rows": rows,
    }
    if options.output is not None:
        write_results(Path(options.output), results, table(results), "load.png", draw)
    return results


def _card(url: str) -> dict[str, Any]:
    """Return the server's entry for its model."""
    try:
        card: dict[str, Any] = get_json(f"{url.rstrip('/')}/v1/models")["data"][0]
        if {"defaults", "context_length", "chat"} <= card.keys():
            return card
    except (LookupError, TypeError):
        pass
    raise IlladaError(f"{url} is no server of this package: its /v1/models has another form")


def _problems(texts: Sequence[str], mix: Mix, card: dict[str, Any], decoding: str | None, seed: int) -> list[Request]:
    """Return a request for each text, to be answered whole and at temperature 0."""
    block, most = card["defaults"]["block_length"], card["defaults"]["max_new_tokens"]
    room = card["context_length"] - most - TEMPLATE_TOKENS  # in bytes: no token is less than one
    problems = []
    for number, text in enumerate(texts):
        prompt = text
        if mix.long and number % 2:
            parts = [text, *(texts[shuffled_index(i, len(texts), seed, TEXT, number)] for i in range(len(texts)))]
            ends = accumulate(len(part.encode()) + 1 for part in parts)
            prompt = "\n".join(part for part, end in zip(parts, ends, strict=True) if end <= room) or text
        blocks = max(1, most // block)
        if mix.short_answers:
            blocks = 1 + int(uniform_int(seed, TOKENS, number) * blocks)
        body: dict[str, Any] = {"model": card["id"], "max_tokens": blocks * block, "temperature": 0}
        body |= {"messages": [{"role": "user", "content": prompt}]} if card["chat"] else {"prompt": prompt}
        if decoding is not None:
            body["decoding"] = decoding
        problems.append(Request("/v1/chat/completions" if card["chat"] else "/v1/completions", body, number))
    return problems


def _work(
    problems: Sequence[Request], model: IlladaForMaskedLM, tokenizer: Any, block: int, outside: Sequence[str]
) -> Work:
    """Return each problem with the samplers that answer it alone: the paper's loop written plainly, and others'."""
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
    """Answer every problem by every sampler, one after the other, and add up time and tokens."""
    for number, (ids, samplers) in enumerate(work):
        for sampler in samplers:
            started, cpu_started = time.perf_counter(), time.process_time()
            (answer,) = sampler.answer([ids])
            total = alone.setdefault(sampler.name, Alone())
            total.seconds.setdefault(number, []).append(time.perf_counter() - started)
            total.cpu_seconds += time.process_time() - cpu_started
            total.tokens += len(answer.ids)


def _load_of_mix(
    name: str,
    url: str,
    problems: list[Request],
    work: Work,
    options: BenchServeOptions,
    on_run: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Return a row for every number of clients and every rate.

    The samplers that answer one request at a time are timed before and after, while the server is idle.
    """
    alone: dict[str, Alone] = {}
    on_run(f"{name}, one at a time")
    _answer_alone(work, alone)
    on_run(f"{name}, each problem alone")
    reference = drive(url, problems)
    if statuses := {o.status for o in reference.outcomes if o.status != "ok"}:
        raise IlladaError(f"{url} does not answer the problems of mix {name}: {', '.join(sorted(statuses))}")
    stay = 2 * statistics.mean(outcome.latency for outcome in reference.outcomes)

    runs: list[tuple[dict[str, Any], Run]] = []

    def load(clients: int | None, rate: float | None) -> None:
        title = f"{rate:.3g} a second" if rate else f"{clients} client{'s' * (clients != 1)}"
        on_run(f"{name}, {title}")
        key = (options.seed, *name.encode(), len(runs))
        sent = [_sent(problems, MIXES[name], stay, *key, number) for number in range(options.requests)]
        arrivals = poisson(rate, len(sent), *key, ARRIVAL) if rate else None
        run = drive(url, sent, clients=clients, arrivals=arrivals, seconds=options.seconds)
        wrong = len(mixed_up(run.outcomes, reference.outcomes))
        row = {"mix": name, "load": title, "clients": clients, "rate": rate, **run.summary(), "mixed_up": wrong}
        runs.append((row, run))

    for clients in options.clients or (1, 8, 32):
        load(clients, None)
    if not (most := max(row["answers_per_second"] for row, _ in runs)):
        raise IlladaError(f"{url} answered nothing of mix {name} under load: {runs[-1][0]['statuses']}")
    rates = options.rates or [share * most for share in SHARES_OF_MOST]
    if alone and not options.rates:
        rates = sorted([*rates, SHARE_OF_ALONE * alone[PLAIN].answers_per_second])
    for rate in rates:
        load(None, rate)
    on_run(f"{name}, one at a time")
    _answer_alone(work, alone)
    for row, run in runs:
        row["alone"] = {sampler: _beside(row, run, total) for sampler, total in alone.items()}
        row["watched"] = run.watched
    return [row for row, _ in runs]


def _sent(problems: list[Request], mix: Mix, stay: float, *key: int) -> Request:
    """Return one of the problems as some client asks for it; a client that leaves does so within `stay` seconds."""
    problem = problems[int(uniform_int(*key, WHICH) * len(problems))]
    kind, leaving = int(uniform_int(*key, KIND) * 3), uniform_int(*key, STAY)
    stream = {"stream": True, "stream_options": {"include_usage": True}, "diffusion": kind == 2}
    hang_up = stay * leaving / mix.leaving if leaving < mix.leaving else None
    return replace(problem, body=problem.body | (stream if kind else {}), hang_up=hang_up)


def _beside(row: dict[str, Any], run: Run, alone: Alone) -> dict[str, Any]:
    """Return the figures of serving one request at a time under the same load, and the server's as multiples of them.

    Under a rate, latencies come from a queue before one worker, with the same arrivals and the measured times.
    """
    spent = sum(sum(seconds) for seconds in alone.seconds.values())
    answers, cpu = sum(map(len, alone.seconds.values())), row["cpu"]
    figures: dict[str, Any] = {
        "answers_per_second": alone.answers_per_second,
        "tokens_per_second": alone.tokens / spent,
        "answers_per_cpu_second": answers / alone.cpu_seconds,
        "times": row["answers_per_second"] / alone.answers_per_second,
    }
    if cpu is not None and cpu["last"] > cpu["first"]:
        served = row["statuses"].get("ok", 0) / (cpu["last"] - cpu["first"])
        figures["cpu_times"] = served / figures["answers_per_cpu_second"]
    if row["rate"] is not None:
        services = alone.services
        due = [outcome.due for outcome in run.outcomes]
        figures["latency"] = percentiles(queued(due, [services[o.request.problem] for o in run.outcomes]))
    return figures


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    others = list(dict.fromkeys(name for row in results["rows"] for name in row["alone"]))
    lines: list[dict[str, str]] = []
    for row in results["rows"]:
        alone = {name: row["alone"].get(name, {}) for name in others}
        odd = {name: count for name, count in row["statuses"].items() if name != "ok"}
        odd |= {"mixed up": row["mixed_up"]} if row["mixed_up"] else {}
        lines.append(
            {
                "load": f"{row['mix']}, {row['load']}",
                "answers/s": f"{row['answers_per_second']:.1f}",
                "tokens/s": f"{row['tokens_per_second']:.1f}",
                **{f"× {name}": _times(alone[name]) if row["rate"] is None else "" for name in others},
                "committed p50": _seconds(row["first_committed"], "p50"),
                "text p50": _seconds(row["first_text"], "p50"),
                **{name: _seconds(row["latency"], name) for name in ("p50", "p90", "p99")},
                **{f"{name} p50 / p99": _seconds(alone[name].get("latency"), "p50", "p99") for name in others},
                "waiting": "" if row["waiting"] is None else f"{row['waiting']['most']:.0f}",
                "MB": "" if row["memory"] is None else f"{row['memory']['last'] / 1e6:.0f}",
                "else": ", ".join(f"{count} {name}" for name, count in odd.items()),
            }
        )
    environment, arguments = results["environment"], results["arguments"]
    return "\n".join(
        [
            aligned([list(lines[0]), *(list(line.values()) for line in lines)]),
            "",
            f"Seconds; at most {arguments['requests']} requests and {arguments['seconds']:g} s for each row. Committed "
            "and text: until the first token is committed and until the first text comes, of answers that stream. "
            "×: answers a second against one at a time (in brackets: against processor time, the server's whole "
            "process); under a rate, one at a time is a queue before one worker with the same arrivals. "
            f"{environment['device']}, {environment['cores']} cores, commit {environment['commit'] or 'unknown'}.",
        ]
    )


def _times(figures: dict[str, Any]) -> str:
    cpu = f" ({figures['cpu_times']:.2f})" if "cpu_times" in figures else ""
    return f"{figures['times']:.2f}{cpu}" if figures else ""


def _seconds(values: dict[str, float] | None, *names: str) -> str:
    return "" if values is None else " / ".join(f"{values[name]:.3f}" for name in names)


def draw(rows: Sequence[dict[str, Any]]) -> bytes:
    """Draw answers a second by clients, latency by rate, queue and memory over time, as PNG.

    Raises:
        MissingExtraError: when matplotlib is not installed.
    """
    drawing, ((many, late), (queue, memory)) = figure(11, 7, 2, 2)
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
        at_rate = sorted((r for r in rows if r["mix"] == mix and r["rate"] and r["latency"]), key=lambda r: r["rate"])
        lines = [("-", [(r["rate"], r["latency"]) for r in at_rate])]
        for style, name in zip((":", "--", "-."), closed[0]["alone"], strict=False):
            many.axhline(closed[0]["alone"][name]["answers_per_second"], color=colour, ls=style, lw=1)
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
    return rendered(drawing)
