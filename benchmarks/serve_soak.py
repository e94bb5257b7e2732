"""Do 200 clients at once all get their own answers, and does the server's memory stay flat? Numbers for RESULTS.md:

    OMP_NUM_THREADS=1 python benchmarks/serve_soak.py --model FOLDER [--clients 200] [--seconds 120]

Clients ask in turns for problems of many kinds: whole, streaming or with diffusion events, and some go away before the
end. A third of the problems ask for a form: an expression, a schema, choices, calls of tools. Before, every problem was
answered alone; every answer under load must be that one, and have its form. --model is a trained demo's.
"""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np

from illada.bench.load import Request, Run, drive, get_json, mixed_up, started_server
from illada.rng import uniform_int
from illada.toy_tasks import TASKS, held_out

LEAVING = 0.2
"""Share of the clients that may go away before the end, at any moment of about an answer's time."""
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"decoding": "fast"},
    {"temperature": 0.8, "seed": 5},
    {"temperature": 1.0, "seed": 2**40, "top_p": 0.9, "n": 3},
    {"decoding": {"steps_per_block": 2}},
    {"decoding": {"cache": "frozen", "entropy_bound": 0.2}, "n": 2, "temperature": 0.5, "seed": 1},
    {"decoding": {"speculate": 2}},
    {"stop": ["3", "e"]},
)
"""How problems are answered: one token a step and several, drawn, cached, speculative, several answers at once."""


SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["letters", "digits"]},
        "sure": {"type": "boolean"},
        "counts": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        "word": {"type": "string", "maxLength": 8},
    },
    "required": ["kind", "sure", "counts"],
    "additionalProperties": False,
}
DIGITS = "[0-9]( [0-9]){0,5}"
TOOL = {"type": "function", "function": {"name": "look", "description": "Look closer.", "parameters": SCHEMA}}
FORMS: tuple[dict[str, Any], ...] = (
    {"guided_regex": DIGITS},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "look", "schema": SCHEMA}}},
    {"guided_choice": ["yes", "no", "perhaps not"]},
    {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
    {"tools": [TOOL]},
)
"""What a third of the problems ask for."""
FIELDS = set().union(*FORMS)


def has_its_form(body: dict[str, Any], said: str) -> bool:
    """Say whether an answer, its calls written as name and arguments, is what its request allows."""
    if "guided_regex" in body:
        return re.fullmatch(DIGITS, said) is not None
    if "guided_choice" in body:
        return said in body["guided_choice"]
    if "response_format" in body:
        return is_valid(said)
    if "tools" in body:
        text, called, arguments = said.partition('look{"kind"')
        return is_valid('{"kind"' + arguments) if called and not text else body.get("tool_choice") != "required"
    return True


def is_valid(text: str) -> bool:
    """Say whether a text is JSON that is valid under the schema."""
    try:
        jsonschema.validate(json.loads(text), SCHEMA)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def problems(texts: Sequence[str], card: dict[str, Any]) -> list[Request]:
    """Return requests of every text by every second way: as a question, to be continued, or with gaps to fill.

    Every third one asks for a form; calls of tools are for questions.
    """
    most, requests = card["defaults"]["max_new_tokens"], []
    for (number, text), (place, way) in itertools.product(enumerate(texts), enumerate(WAYS)):
        if (number + place) % 2:
            continue
        body: dict[str, Any] = {"model": card["id"], "temperature": 0, **way}
        form = (number // 2 + place) % 4
        if form < 2 and card["chat"]:
            body |= {"messages": [{"role": "user", "content": text}], "max_tokens": most // (1 + form)}
        elif form < 3 or "stop" in way:
            body |= {"prompt": [text, text[::-1]], "max_tokens": most // 3}
        else:
            body |= {"prompt": f"{text} ___ and ___", "slot_tokens": 3 + number % 5}
        if not len(requests) % 3 and "stop" not in way:
            calls = "messages" in body and card["context_length"] > 512  # the tools take most of that
            body |= FORMS[len(requests) // 3 % (len(FORMS) if calls else 3)] | {"max_tokens": 96}
            body.pop("slot_tokens", None)
        requests.append(Request(f"/v1/{'chat/' if 'messages' in body else ''}completions", body, len(requests)))
    return requests


def asked(of: Sequence[Request], stay: float, seed: int) -> Iterator[Request]:
    """Yield the requests of clients, without end."""
    for number in itertools.count():
        problem, kind, leaving = (uniform_int(seed, number, word) for word in range(3))
        stream = {"stream": True, "stream_options": {"include_usage": True}, "diffusion": kind > 0.7}
        request = of[int(problem * len(of))]
        hang_up = stay * leaving / LEAVING if leaving < LEAVING else None
        yield replace(request, body=request.body | (stream if kind > 0.3 else {}), hang_up=hang_up)


def memory(run: Run) -> tuple[list[float], float]:
    """Return the server's mean memory in each quarter of the time in MB, and its growth after the first in MB a minute.

    Buffers and the allocator's pools fill in the first quarter.
    """
    at, size = np.array([(sample["at"], sample["memory"] / 1e6) for sample in run.watched if "memory" in sample]).T
    quarter = np.minimum(4 * at // run.seconds, 3)
    growth = 60 * np.polyfit(at[quarter > 0], size[quarter > 0], 1)[0]
    return [size[quarter == place].mean() for place in range(4)], growth


def main() -> None:
    """Print the figures; exit with 1 where an answer or a status is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--texts", type=int, default=21)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    texts = [example.prompt for task in TASKS for example in held_out(task, -(-args.texts // len(TASKS)))]
    # A request may ask for six answers, each of which counts.
    flags = ["--block_length", "16", "--max_new_tokens", "48", "--max_requests", str(6 * args.clients)]
    with started_server(args.model, flags) as url:
        pool = problems(texts[: args.texts], get_json(f"{url}/v1/models")["data"][0])
        alone = drive(url, pool)
        # So many share the server that an answer takes about so many times as long.
        stay = args.clients * alone.seconds / len(pool)
        run = drive(url, asked(pool, stay, args.seed), clients=args.clients, seconds=args.seconds)
    summary, wrong = run.summary(), mixed_up(run.outcomes, alone.outcomes)
    quarters, growth = memory(run)
    print(f"{len(pool)} problems alone: {alone.summary()['statuses']}, p50 {alone.summary()['latency']['p50']:.3f} s")
    print(f"{args.clients} clients, {run.seconds:.0f} s: {summary['sent']} requests, {summary['statuses']}")
    print(f"{summary['answers_per_second']:.1f} answers/s, {summary['tokens_per_second']:.0f} tokens/s")
    print(f"latency {summary['latency']}\nfirst committed {summary['first_committed']}")
    print(f"first text {summary['first_text']}")
    cpu = summary["cpu"]["last"] - summary["cpu"]["first"]
    print(f"server: {cpu / run.seconds:.2f} of a core, {summary['statuses']['ok'] / cpu:.1f} requests a second of it")
    formed = [outcome for outcome in run.outcomes if outcome.status == "ok" and FIELDS & outcome.request.body.keys()]
    invalid = [one for one in formed if not all(has_its_form(one.request.body, said) for said, _ in one.answer)]
    print(f"{len(formed)} whole answers to requests for a form, {len(invalid)} of them without it")
    print(f"waiting at most {summary['waiting']['most']:.0f}; answers that are not those given alone: {len(wrong)}")
    print(f"memory {' '.join(f'{size:.1f}' for size in quarters)} MB in each quarter, {growth:+.2f} MB a minute")
    right = {outcome.request.problem: outcome.answer for outcome in alone.outcomes}
    for outcome in [*wrong[:5], *invalid[:5]]:
        print(f"{outcome.request}\n  alone {right[outcome.request.problem]}\n  now   {outcome.answer}")
    statuses = summary["statuses"].keys() | alone.summary()["statuses"].keys()
    sys.exit(bool(wrong or invalid) or not statuses <= {"ok", "cancelled"})


if __name__ == "__main__":
    main()
