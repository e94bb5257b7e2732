"""Answers of a given form: are they valid, what do they cost, how many passes do they save.

    OMP_NUM_THREADS=1 python benchmarks/structured.py valid --models runs/demo/model [--random]
    OMP_NUM_THREADS=1 python benchmarks/structured.py cost --tokenizer FOLDER [--vocabulary 155136]
    OMP_NUM_THREADS=1 python benchmarks/structured.py passes --model runs/demo/model

`valid` draws schemas and regular expressions of mixed kind, answers each in every way to decode, and checks the answers
with `jsonschema` and `re`. `cost` times a model of 15M parameters with random weights in pairs: processor seconds of a
pass with a form and without one, on the same ids and masks, and the making of automata, cold and warm. `passes` counts
the passes and tokens of answers with a schema, beside the same answers without its form.
"""

import argparse
import copy
import itertools
import json
import random
import re
import statistics
import time
from dataclasses import replace

import jsonschema
import numpy as np
import torch
from common import machine

from illada.errors import IlladaError
from illada.generation.denoise import denoise
from illada.generation.engine import generate
from illada.generation.optional import forms
from illada.generation.optional.token_automaton import vocabulary_bytes
from illada.generation.request import Request
from illada.generation.settings import GenerationSettings, settings_for
from illada.model.config import IlladaConfig
from illada.model.kv_cache import PagePool
from illada.model.transformer import IlladaForMaskedLM
from illada.text.tokenizer import load_tokenizer
from illada.weights.load import load_model

WAYS = [
    {},
    {"threshold": 0.6},
    {"steps_per_block": 4},
    {"remasking": "margin"},
    {"remasking": "random"},
    {"entropy_bound": 0.5},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.9},
    {"later_masks": True},
    {"guidance_scale": 1.0},
    {"repetition_penalty": 1.2},
    {"speculate": 3},
    {"cache": "prefix"},
    {"cache": "frozen", "threshold": 0.6},
    {"cache": "adaptive"},
]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["student", "teacher", "other"]},
        "active": {"type": "boolean"},
    },
    "required": ["name", "age", "kind", "active"],
}
TYPICAL = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "date": {"type": "string", "format": "date"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "author": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "id": {"type": "integer"}},
            "required": ["name"],
        },
        "score": {"anyOf": [{"type": "number"}, {"type": "null"}]},
    },
    "required": ["title", "date", "author"],
}


def a_schema(draw, depth=2):
    """Return a schema of mixed kind whose shortest answer is short."""
    kinds = ["enum", "boolean", "integer", "number", "string", "pattern", "date", "null", "anyOf"]
    kind = draw.choice(kinds if not depth else [*kinds, "object", "object", "array"])
    if kind == "object":
        names = draw.sample(["a", "name", "id", "x y", "ok", "é", "list"], draw.randint(1, 3))
        required = [name for name in names if draw.random() < 0.6]
        return {"type": "object", "properties": {n: a_schema(draw, depth - 1) for n in names}, "required": required}
    if kind == "array":
        return {"type": "array", "items": a_schema(draw, depth - 1), "minItems": draw.randint(0, 1), "maxItems": 3}
    return {
        "enum": {"enum": draw.sample(["red", "green", 1, 2.5, None, True, 'a"b'], 3)},
        "boolean": {"type": "boolean"},
        "integer": {"type": "integer", "minimum": draw.randint(-50, 5), "maximum": draw.randint(6, 500)},
        "number": {"type": "number"},
        "string": {"type": "string", "minLength": draw.randint(0, 2), "maxLength": draw.randint(3, 12)},
        "pattern": {"type": "string", "pattern": draw.choice(["^[a-c]{1,4}$", "^\\d{2}-\\d{2}$", "^(ab|cd)+e?$"])},
        "date": {"type": "string", "format": draw.choice(["date", "uuid", "ipv4"])},
        "null": {"type": "null"},
        "anyOf": {"anyOf": [{"type": "null"}, {"type": "integer"}, {"enum": ["yes", "no"]}]},
    }[kind]


def a_regex(draw, depth=3):
    """Return a regular expression of mixed kind."""
    if not depth or draw.random() < 0.2:
        return draw.choice(["a", "yes", "[a-f]", r"\d", r"\w", " ", "é", '[^a-z"]', "x?", "(?:no|yes)"])
    parts = [a_regex(draw, depth - 1) for _ in range(2)]
    return draw.choice(
        [f"(?:{parts[0]}|{parts[1]})", "".join(parts), f"(?:{parts[0]}){draw.choice(['*', '+', '?', '{2}', '{1,3}'])}"]
    )


def measure_valid(options):
    """Print how many answers are valid, by kind of model."""
    print(machine())
    models = [(name, *load_model(name, "fp32", "cpu")) for name in options.models]
    if options.random:
        _, model, tokenizer = models[0]
        torch.manual_seed(0)
        models.append(("the same with random weights", IlladaForMaskedLM(model.config).eval(), tokenizer))
    draw = random.Random(options.seed)
    wanted = [{"json_schema": a_schema(draw)} if n % 2 else {"regex": a_regex(draw)} for n in range(options.count)]
    print("| model | forms | ways | answers | valid | refused as too long | passes | tokens, of them without a pass |")
    print("|---|---|---|---|---|---|---|---|")
    for name, model, tokenizer in models:
        valid = refused = answers = passes = tokens = forced = 0
        prompt = [{"role": "user", "content": "Sort 415710."}]
        for way in WAYS:
            every = []
            for form in wanted:
                settings = GenerationSettings(max_new_tokens=64, block_length=16, **form, **way)
                every.append(settings_for(model, settings))
            taken, found = [], []
            for settings in every:
                try:
                    forms.give_form(_request(model, settings), tokenizer, model.config.vocab_size, "it")
                    taken.append(settings)
                except IlladaError as error:
                    refused += 1
                    if "shortest text" not in str(error):
                        raise
            found = generate(model, [prompt] * len(taken), taken, tokenizer)
            for settings, answer in zip(taken, found, strict=True):
                answers += 1
                valid += is_valid(settings, answer.text)
                passes, tokens, forced = passes + answer.forwards, tokens + len(answer.ids), forced + answer.forced
        counts = (len(wanted), len(WAYS), answers, valid, refused, passes, f"{tokens}, {forced}")
        print(f"| {name} | {' | '.join(map(str, counts))} |", flush=True)


def _request(model, settings):
    return Request.of_prompt(model.config, [model.config.bos_token_id or 0], settings, "it")


def is_valid(settings, text):
    """Return whether an answer is what its settings ask for."""
    if settings.regex is not None:
        return bool(re.fullmatch(settings.regex, text, re.ASCII))
    try:
        jsonschema.validate(json.loads(text), settings.json_schema, format_checker=jsonschema.FormatChecker())
    except (ValueError, jsonschema.ValidationError):
        print("invalid:", text, settings.json_schema)
        return False
    return True


def measure_cost(options):
    """Print processor seconds of passes with and without forms, on the same states, and of the making of automata."""
    print(machine())
    tokenizer = load_tokenizer(options.tokenizer)
    size = options.vocabulary or len(tokenizer)
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6}
    config = IlladaConfig(
        **shape, vocab_size=size, num_key_value_heads=6, max_position_embeddings=1024, tie_word_embeddings=True
    )
    config.mask_token_id, config.eos_token_id = 5, 2
    model = IlladaForMaskedLM(config).eval()
    weights = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)
    print(f"{weights / 1e6:.1f}M weights without the embedding, {size:,} ids, blocks of 32, prompt of 64 tokens\n")
    print(
        "| form | automaton cold, s | warm, ms | masks a pass | a pass without, ms | with, ms | more | least to most |"
    )
    print("|---|---|---|---|---|---|---|---|")
    kinds = {
        "(?s).*": {"regex": "(?s).*"},
        "a string": {"regex": '"[^"]*"'},
        "typical schema": {"json_schema": TYPICAL},
    }
    forms.vocabulary_bytes = all_bytes
    forms._Words.of(tokenizer, size)
    for (name, form), way in itertools.product(kinds.items(), ({}, {"temperature": 1.0})):
        own = GenerationSettings(max_new_tokens=128, block_length=32, eos_token_id=2, steps_per_block=8, **form, **way)
        making = []
        for _ in range(2):
            begun = time.process_time()
            forms.give_form(_request(model, own), tokenizer, size, "it")
            making.append(time.process_time() - begun)
        taken = [timed_passes(model, replace(own, seed=seed), tokenizer) for seed in range(options.rounds)]
        more = [own_s / free_s - 1 for free_s, own_s, _ in taken]
        free_ms, own_ms, masks = [statistics.median(column) for column in zip(*taken, strict=True)]
        print(
            f"| {name}{', drawn' if way else ''} | {making[0]:.3f} | {1000 * making[1]:.1f} | {masks:.1f} "
            f"| {1000 * free_ms:.1f} | {1000 * own_ms:.1f} | {statistics.median(more):+.1%} "
            f"| {min(more):+.1%} to {max(more):+.1%} |",
            flush=True,
        )


def all_bytes(tokenizer, size):
    """Return the bytes of each id; those behind the tokenizer's are pairs of its texts, as if it were as large."""
    known = vocabulary_bytes(tokenizer, size)
    texts, draw = [text for text in known if text], random.Random(0)
    return [*known[: len(tokenizer)], *(draw.choice(texts) + draw.choice(texts) for _ in known[len(tokenizer) :])]


@torch.inference_mode()
def timed_passes(model, settings, tokenizer):
    """Return over the passes of an answer the mean processor seconds without its form and with it, and of masks.

    At each pass the row without the form is a copy of the one with it: the same ids and the same masks, whose pass is
    timed to the commit and thrown away. Which of the two comes first alternates.
    """
    row = Request.of_prompt(model.config, [*range(100, 164)], settings, "it")
    forms.give_form(row, tokenizer, model.config.vocab_size, "it")
    seconds, masks, ended = [0.0, 0.0], [], False
    while not ended:
        masks.append(len(row.open_positions()))
        free = copy.copy(row)
        free.form = None
        free.ids_G, free.masked_G, free.log_prob_G = row.ids_G.copy(), row.masked_G.copy(), row.log_prob_G.copy()
        for which in (0, 1) if len(masks) % 2 else (1, 0):
            begun = time.process_time()
            over = one_pass(model, (free, row)[which])
            seconds[which] += time.process_time() - begun
            ended = over if which else ended
    return [*(total / len(masks) for total in seconds), statistics.mean(masks)]


def one_pass(model, row):
    """Take a row through a pass, as the engine does; return whether its answer is over."""
    [proposals] = denoise(model, [row], PagePool(), 2**24)
    finished = row.commit(proposals)
    while finished:
        ended = np.isin(row.ids_G[row.block : row.block_end], row.settings.eos_ids).any()
        if ended or row.block_end == row.budget:
            return True
        finished = row.open_next_block()
    return False


def measure_passes(options):
    """Print passes and tokens of answers with a schema, and of the same number of tokens without."""
    print(machine())
    model, tokenizer = load_model(options.model, "fp32", "cpu")
    prompts = [[{"role": "user", "content": f"Sort {n}."}] for n in range(100000, 100000 + 997 * 40, 997)]
    print("| decoding | passes with the form | tokens | of them without a pass | passes for as many without a form |")
    print("|---|---|---|---|---|")
    for way in ({}, {"threshold": 0.9}, {"threshold": 0.6}, {"speculate": 3}):
        own = settings_for(model, GenerationSettings(max_new_tokens=64, block_length=16, json_schema=PERSON, **way))
        found = generate(model, prompts, own, tokenizer)
        passes, forced = sum(a.forwards for a in found), sum(a.forced for a in found)
        tokens = sum(len(a.ids) + (a.finish_reason == "stop") for a in found)
        plain = GenerationSettings(max_new_tokens=64, block_length=16, eos_token_id=None, **way)
        free = generate(model, prompts, plain, tokenizer)
        rate = sum(a.forwards for a in free) / sum(len(a.ids) for a in free)
        print(f"| {way or 'one a pass'} | {passes} | {tokens} | {forced} | {rate * tokens:.0f} |")


def main():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parsers = parser.add_subparsers(required=True)
    valid = parsers.add_parser("valid")
    valid.set_defaults(run=measure_valid)
    valid.add_argument("--models", nargs="+", required=True)
    valid.add_argument("--random", action="store_true", help="also the first model's shape with random weights")
    valid.add_argument("--count", type=int, default=500)
    valid.add_argument("--seed", type=int, default=0)
    cost = parsers.add_parser("cost")
    cost.set_defaults(run=measure_cost)
    cost.add_argument("--tokenizer", required=True)
    cost.add_argument("--vocabulary", type=int, help="ids of the model; the tokenizer's texts in pairs fill it")
    cost.add_argument("--rounds", type=int, default=7)
    passes = parsers.add_parser("passes")
    passes.set_defaults(run=measure_passes)
    passes.add_argument("--model", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.run(options)


if __name__ == "__main__":
    main()
