"""`illada bench generate`: every way to generate, on one model in one run, as a table, JSON and a picture."""

import difflib
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from illada.bench.external import outside_samplers
from illada.bench.measure import Measurement, agreement, measure
from illada.bench.options import BenchGenerateOptions
from illada.bench.samplers import EXACT, PLAIN, Answer, Sampler, engine_samplers, plain_sampler, steps_of_rule
from illada.devices import DTYPES, choose_device
from illada.errors import IlladaError, needs
from illada.evaluation.compare import mcnemar
from illada.files import parse_json, read_json, read_lines
from illada.generation.settings import GenerationSettings, settings_for
from illada.model.config import IlladaConfig
from illada.model.transformer import IlladaForMaskedLM
from illada.reporting import COLOURS, MUTED, accuracy, aligned, environment_of, figure, rendered, write_results
from illada.rng import bits, uniform_int
from illada.text.chat import encode_prompt
from illada.text.prompts import show_ids
from illada.toy_tasks import TASKS, held_out_mix
from illada.weights.load import load_model


@dataclass(frozen=True)
class Problem:
    """A question as ids, with its right answer if there is one."""

    prompt: list[int]
    answer: str | None = None


def bench_generate(options: BenchGenerateOptions, on_run: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure every mode and rule; return the content of results.json. `on_run` gets the name of what runs next.

    Raises:
        IlladaError: when an option cannot be used.
    """
    exact = GenerationSettings(
        max_new_tokens=options.max_new_tokens, block_length=options.block_length, seed=options.seed, eos_token_id=None
    )
    tokenizer: Any = None
    if options.model is None:
        network = _random_model(options)
        problems = _random_problems(network, options)
    else:
        network, tokenizer = load_model(options.model, options.dtype, options.device)
        network.config.refuse_causal("bench generate is", "it has one way to generate")
        exact = settings_for(network, exact)
        problems = (_read_problems if options.tasks else _demo_problems)(tokenizer, options)
    exact = _fit(exact, problems, network.config.max_position_embeddings)
    samplers, refused = _samplers(network, exact, options)
    prompts = [problem.prompt for problem in problems]
    measurements = measure(network, samplers, prompts, options.repeats, on_run)
    steps = {}
    for threshold in sorted({sampler.threshold for sampler in samplers if sampler.threshold is not None}):
        on_run(f"steps of threshold {threshold}")
        steps[threshold] = steps_of_rule(network, prompts, replace(exact, threshold=threshold))
    results = {
        "arguments": asdict(options),
        "environment": environment_of(network),
        "problems": len(problems),
        "rows": _rows(measurements, problems, tokenizer, steps),
        "refused": refused,
    }
    if options.output is not None:
        write_results(Path(options.output), results, table(results), "frontier.png", frontier)
    return results


def _samplers(
    network: IlladaForMaskedLM, exact: GenerationSettings, options: BenchGenerateOptions
) -> tuple[list[Sampler], dict[str, str]]:
    """Return the samplers to run, and by name why the settings refuse others."""
    engine, refused = engine_samplers(network, exact, options.batch)
    samplers = [plain_sampler(network, exact), *engine]
    if options.only:
        names = [sampler.name for sampler in samplers]
        if unknown := [name for name in options.only if name not in names]:
            close = " or ".join(difflib.get_close_matches(unknown[0], names, n=3, cutoff=0.4))
            hint = f"did you mean {close}?" if close else "a table made without --only names them all"
            raise IlladaError(f"no variant {unknown[0]!r}: {hint}")
        # The others are compared with exact decoding and timed against the plain loop.
        samplers = [sampler for sampler in samplers if sampler.name in (EXACT, PLAIN, *options.only)]
    return samplers + outside_samplers(options.outside or (), network, exact), refused


def _random_model(options: BenchGenerateOptions) -> IlladaForMaskedLM:
    changes = {} if options.vocab_size is None else {"vocab_size": options.vocab_size}
    config = IlladaConfig.preset(str(options.random), **changes)
    dtype = torch.float32 if options.dtype == "auto" else DTYPES[options.dtype]
    device = choose_device(options.device)
    # fork_rng keeps the seed out of the caller's random state.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        network: IlladaForMaskedLM = IlladaForMaskedLM._from_config(config, dtype=dtype)
    return network.to(device).eval()


def _random_problems(network: IlladaForMaskedLM, options: BenchGenerateOptions) -> list[Problem]:
    """Return prompts of 8 to 64 random ids, or fewer where the context is short."""
    longest = max(8, min(64, network.config.max_position_embeddings - options.max_new_tokens))
    problems = []
    for number in range(options.limit):
        ids = torch.arange(8 + int(uniform_int(options.seed, number) * (longest - 7)))
        problems.append(Problem((bits(options.seed, number, ids) % network.config.vocab_size).tolist()))
    return problems


def _read_problems(tokenizer: Any, options: BenchGenerateOptions) -> list[Problem]:
    problems, file = [], str(options.tasks)
    for number, line in itertools.islice(read_lines(file), options.limit):
        try:
            record = parse_json(line)
            prompt, answer = record["prompt"], record["answer"]
        except (ValueError, KeyError, TypeError) as error:
            raise IlladaError(f'{file} line {number} is not {{"prompt": ..., "answer": ...}}') from error
        problems.append(_problem(tokenizer, str(prompt), str(answer), f"{file} line {number}"))
    return problems


def _demo_problems(tokenizer: Any, options: BenchGenerateOptions) -> list[Problem]:
    """Return held-out problems of all tasks in turn; for a demo's model, of the tasks that it was taught."""
    folder = Path(str(options.model))
    markers = [place / "demo.json" for place in (folder, folder.parent)]
    marker = next((place for place in markers if place.is_file()), None)
    tasks = list(TASKS) if marker is None else read_json(marker).get("tasks")
    if not isinstance(tasks, list) or not set(map(str, tasks)) <= set(TASKS):
        raise IlladaError(f"{marker} does not name tasks of the demo: give --tasks FILE")
    mix = held_out_mix(tasks, options.limit, options.seed)
    return [_problem(tokenizer, example.prompt, example.answer, "demo task") for example in mix]


def _problem(tokenizer: Any, prompt: str, answer: str, record: str) -> Problem:
    return Problem(encode_prompt(tokenizer, [{"role": "user", "content": prompt}], record), answer.strip())


def _fit(exact: GenerationSettings, problems: Sequence[Problem], context: int) -> GenerationSettings:
    """Return the settings with a budget of whole blocks that fits into the context after every prompt."""
    longest = max(len(problem.prompt) for problem in problems)
    block = exact.block_length
    budget = min(exact.max_new_tokens, context - longest) // block * block
    if budget < block:
        raise IlladaError(
            f"max_new_tokens {exact.max_new_tokens} and context {context} - longest prompt {longest} leave no room for "
            f"one block of {block}: lower --block_length or shorten the prompts"
        )
    return replace(exact, max_new_tokens=budget)


def _rows(
    measurements: Sequence[Measurement], problems: Sequence[Problem], tokenizer: Any, steps: dict[float, int]
) -> list[dict[str, Any]]:
    by_name = {measurement.sampler.name: measurement for measurement in measurements}
    exact, plain = by_name[EXACT].answers, by_name[PLAIN]
    rights = {name: _right(m.answers, problems, tokenizer) for name, m in by_name.items()}
    rows = []
    for m in measurements:
        same_answers, same_tokens = agreement(m.answers, exact)
        right = rights[m.sampler.name]
        row = {
            "name": m.sampler.name,
            "threshold": m.sampler.threshold,
            "tokens_per_second": m.tokens_per_second,
            # Paired: the median of each repeat's quotient of tokens per second, because answers may differ in length.
            "speedup": statistics.median(
                a / b * m.tokens / max(1, plain.tokens) for a, b in zip(plain.seconds, m.seconds, strict=True)
            ),
            **asdict(m.work),
            # Summed over the answers, each as if alone; the threshold itself implies the minimum.
            "answer_forwards": sum(answer.forwards for answer in m.answers),
            "forwards_minimum": steps.get(m.sampler.threshold) if m.sampler.threshold is not None else None,
            "peak_bytes": m.peak_bytes,
            "same_answers": same_answers,
            "same_tokens": same_tokens,
            "accuracy": None,
            "standard_error": None,
            **(accuracy(right) if right else {}),
            "right": right,
            "against_exact": compared(right, rights[EXACT]),
            "answer_tokens": m.tokens,
            "seconds": m.seconds,
            "cpu_seconds": m.cpu_seconds,
            "settings": None if m.sampler.settings is None else asdict(m.sampler.settings),
        }
        rows.append(row)
    return rows


def _right(answers: Sequence[Answer], problems: Sequence[Problem], tokenizer: Any) -> list[bool] | None:
    if tokenizer is None:
        return None
    return [show_ids(tokenizer, a.ids).strip() == p.answer for a, p in zip(answers, problems, strict=True)]


def compared(right: Sequence[bool] | None, base: Sequence[bool] | None) -> dict[str, float] | None:
    """Return on how many problems the base alone is right, on how many it alone is not, and the p of McNemar's test."""
    if right is None or base is None:
        return None
    lost = sum(b and not a for a, b in zip(right, base, strict=True))
    won = sum(a and not b for a, b in zip(right, base, strict=True))
    return {"lost": lost, "won": won, "p": mcnemar(lost, won)}


def shown(comparison: dict[str, float] | None) -> str:
    """Return a comparison in a table's cell; nothing where there is none."""
    return "" if comparison is None else "{lost}, {won}, {p:.2g}".format(**comparison)


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        {
            "variant": row["name"],
            "tokens/s": f"{row['tokens_per_second']:.1f}",
            "× plain": f"{row['speedup']:.2f}",
            "forwards": f"{row['forwards']:,}",
            "per answer": f"{row['answer_forwards'] / results['problems']:.1f}",
            "positions": f"{row['positions']:,}",
            "head pos.": f"{row['head_positions']:,}",
            "peak MB": "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
            "same answers": f"{row['same_answers']:.1%}",
            "same tokens": "" if row["same_tokens"] is None else f"{row['same_tokens']:.1%}",
            "accuracy": "" if row["accuracy"] is None else f"{row['accuracy']:.1%} ± {row['standard_error']:.1%}",
            "lost, won, p": shown(row["against_exact"]),
        }
        for row in results["rows"]
    ]
    refused: dict[str, list[str]] = {}
    for name, reason in results["refused"].items():
        refused.setdefault(reason, []).append(name)
    environment, arguments = results["environment"], results["arguments"]
    text = [
        aligned([list(lines[0]), *(list(line.values()) for line in lines)]),
        "",
        f"{results['problems']} problems, engine in batches of {arguments['batch']}, the others one at a time; "
        f"median of {arguments['repeats']} paired repeats; {environment['dtype']}, {environment['device']}, "
        f"{environment['threads']} of {environment['cores']} cores, torch {environment['versions']['torch']}, commit "
        f'{environment["commit"] or "unknown"}. Tokens: of answers, without their end. Same: as in the row "{EXACT}". '
        f'Lost, won: problems that only "{EXACT}" solves, and that only this row solves; p: McNemar\'s exact test.',
        *(f"Left out, because {reason}: {'; '.join(names)}." for reason, names in refused.items()),
    ]
    return "\n".join(text)


def frontier(rows: Sequence[dict[str, Any]]) -> bytes:
    """Draw speed against accuracy, or against agreement where there is none, as PNG; a line joins the unbeaten rows.

    Rows on the line, exact decoding and samplers other than our engine have names; the others are dots.

    Raises:
        MissingExtraError: when matplotlib is not installed.
    """
    with needs("report", "a picture"):
        from matplotlib.ticker import LogLocator, NullLocator

    judged = rows[0]["accuracy"] is not None
    quality = "accuracy" if judged else "same_answers"
    points = [(row["tokens_per_second"], 100 * row[quality]) for row in rows]
    best = sorted(p for p in points if not any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points))
    drawing, axes = figure(9, 5)
    axes.plot(*zip(*best, strict=True), color=MUTED, lw=1, zorder=0)
    kinds = [_mode(row) for row in rows]
    colours = dict(zip(dict.fromkeys(kinds), COLOURS, strict=False))
    handles, names = [], []
    for row, point, kind in zip(rows, points, kinds, strict=True):
        colour = colours.get(kind, MUTED)
        if point not in best and row["name"] != EXACT and row["settings"] is not None:
            axes.plot(*point, "o", color=colour, ms=3, alpha=0.6)
            continue
        # A number is the marker, because names beside the points would cover one another.
        names.append(row["name"])
        style: dict[str, Any] = {"marker": f"${len(names)}$", "ms": 5 * len(str(len(names))) + 2, "ecolor": "#d5dbe1"}
        error = None if row["standard_error"] is None else 100 * row["standard_error"]
        handles.append(axes.errorbar(*point, yerr=error, ls="", color=colour, elinewidth=0.8, **style)[0])
    for kind, colour in colours.items():
        names.append(kind)
        handles += axes.plot([], [], "o", color=colour, ms=3)
    label = "exact match, %" if judged else "answers equal to exact decoding's, %"
    axes.set(xscale="log", xlabel="tokens per second", ylabel=label)
    axes.margins(0.06)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    drawing.legend(handles, names, loc="outside right upper", frameon=False, fontsize=7)
    return rendered(drawing)


def _mode(row: dict[str, Any]) -> str:
    """Return the kind of a row, which gives it its colour: the cache of our engine, or another sampler."""
    if row["settings"] is None:
        return "other samplers"
    cache = row["settings"]["cache"]
    return "no cache" if cache == "none" else f"{cache} cache"
