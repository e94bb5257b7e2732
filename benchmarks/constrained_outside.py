"""Answers of a given form: ours beside the public code of constrained-diffusion, on the same weights and prompts.

    python benchmarks/constrained_outside.py --model runs/demo/model --constrained CHECKOUT --python VENV/bin/python

Theirs (eth-sri/constrained-diffusion, arXiv 2508.10111) proposes a token, asks whether a context-free grammar still has
a word that fits, and takes another token where it has none; after `--resamples` refusals it stops, and its evaluation
then puts some word of the grammar that fits what is there. Its answers are counted with that word and without. It runs
in an interpreter of its own, which needs their packages and ours; both sides run our network. Every answer is made
alone, at temperature 0, one token a pass, in blocks of 16 of 48 tokens, with the masks of later blocks in view.
Answers are judged by `re` and `jsonschema`, theirs without the white space around them.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time

import torch
from common import machine

from illada.generation.engine import generate
from illada.generation.settings import GenerationSettings, settings_for
from illada.model.transformer import IlladaForMaskedLM
from illada.weights.load import load_model

TOKENS, BLOCK = 48, 16
PROMPTS = ["Sort 415710.", "Which module defines b32encode?", "Shift: k d a q m z"]
REGEXES = [
    "[0-9]{6}",
    "yes|no|maybe",
    "[0-9]{4}-[0-9]{2}-[0-9]{2}",
    r"-?(0|[1-9][0-9]*)(\.[0-9]+)?",
    "[A-Z][a-z]+ [A-Z][a-z]+",
    "#[0-9a-f]{6}",
    "[a-z]+(, [a-z]+){2}",
    "(red|green|blue)-[1-9]",
    r"[a-z0-9]+@[a-z0-9]+\.(com|org)",
    r"\([0-9]{3}\) [0-9]{3}-[0-9]{4}",
]


def an_object(**properties):
    """Return the schema of an object with all of these keys and no others."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


NAME = {"type": "string", "pattern": "^[A-Z][a-z]{1,11}$"}  # their grammar of minLength and maxLength does not parse
AGE = {"type": "integer", "minimum": 0, "maximum": 120}
KIND = {"type": "string", "enum": ["student", "teacher", "other"]}
DATE = {"type": "string", "format": "date"}
FLAG = {"type": "boolean"}
SCHEMAS = [
    FLAG,
    AGE,
    KIND,
    DATE,
    NAME,
    {"type": "string", "pattern": "^[a-c]{1,4}$"},
    {"type": "array", "items": AGE},
    an_object(name=NAME, age=AGE),
    an_object(kind=KIND, active=FLAG),
    an_object(day=DATE, tags={"type": "array", "items": KIND}),
]
FORMS = [{"regex": regex} for regex in REGEXES] + [{"json_schema": schema} for schema in SCHEMAS]


def network(path, random):
    """Return a model that both interpreters make alike, and its tokenizer."""
    model, tokenizer = load_model(path, "fp32", "cpu")
    if random:
        torch.manual_seed(0)
        model = IlladaForMaskedLM(model.config).eval()
    return model, tokenizer


def ours(model, tokenizer, prompts):
    """Return for each form and prompt the answer, its passes and processor seconds."""
    found = []
    for form in FORMS:
        settings = GenerationSettings(max_new_tokens=TOKENS, block_length=BLOCK, later_masks=True, **form)
        for prompt in prompts:
            begun = time.process_time()
            [answer] = generate(model, [prompt], settings_for(model, settings), tokenizer)
            seconds = time.process_time() - begun
            found.append({"sampled": answer.text, "passes": answer.forwards, "seconds": seconds})
    return found


def theirs(model, tokenizer, prompts, resamples):
    """Do the same with constrained-diffusion; this is what their interpreter runs.

    The word that fits after a stop is "completed"; a grammar is compiled once for a form, in its first answer's time.
    """
    from constrained_diffusion import constrain_utils as constraints
    from constrained_diffusion.cfgs.jsonschema import schema_to_cfg
    from constrained_diffusion.eval.dllm.models.llada.generate_constrained import generate as sample
    from rustformlang.cfg import CFG

    counts = {}

    def counted(ids):
        counts["passes"] += 1
        counts["idle"] += not bool((ids == model.config.mask_token_id).any())
        return model(ids)

    counted.device = model.device
    # As transformers 4, which they pin, reads a row of ids: each its own word.
    tokenizer.batch_decode = lambda row: [tokenizer.decode([token]) for token in row.tolist()]
    found = []
    for form in FORMS:
        grammar = None
        for prompt in prompts:
            begun = time.process_time()
            counts.update(passes=0, idle=0)
            if grammar is None:
                if "regex" in form:
                    grammar, lexemes, inside = CFG.from_text("S -> answer", "S"), {"answer": form["regex"]}, {}
                else:
                    grammar, lexemes, inside = schema_to_cfg(form["json_schema"])
                grammar = grammar.to_normal_form()
                compiled = constraints.compile_lex_map(lexemes, subtokens=inside)
            given = {
                "constraint_lang": grammar,
                "lex_map": compiled,
                "subtokens": inside,
                "prompt_len": len(prompt),
                "mask_id": model.config.mask_token_id,
                "steps": TOKENS,
                "gen_length": TOKENS,
                "block_length": BLOCK,
                "max_resamples": resamples,
            }
            *_, (ids, refused, ended) = sample(counted, torch.tensor([prompt]), tokenizer, **given)
            answer = ids[0, len(prompt) :].tolist()
            end = tokenizer.eos_token_id
            text = tokenizer.decode(answer[: answer.index(end)] if end in answer else answer)
            completed = text
            if not ended:
                special = {model.config.mask_token_id: None, end: constraints.EOS}
                words = [special.get(token, tokenizer.decode([token])) for token in answer]
                parts = constraints.partial_output_from_tokens(words)
                fitting = constraints.generated_language(
                    words, compiled, grammar.get_terminals(), subtokens=inside,
                    supertokens=constraints.derive_supertokens(inside),
                )  # fmt: skip
                completed = constraints.autocomplete_valid(
                    *parts, generated_lang=fitting, lex_map=lexemes, subtokens=inside, constraint_lang=grammar
                )
            seconds = time.process_time() - begun
            found.append(
                {
                    "sampled": text,
                    "completed": completed or "",
                    "passes": counts["passes"],
                    "idle": counts["idle"],
                    "refused": len(refused),
                    "seconds": seconds,
                }
            )
    return found


def is_valid(form, text):
    """Return whether an answer is what was asked for."""
    import jsonschema

    if "regex" in form:
        return bool(re.fullmatch(form["regex"], text.strip()))
    try:
        jsonschema.validate(json.loads(text), form["json_schema"], format_checker=jsonschema.FormatChecker())
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def compare(options):
    """Answer with both, and print a table."""
    print(machine())
    print("| weights | way | answers | valid | with a word that fits | passes | refused | seconds |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for random in (False, True):
        model, tokenizer = network(options.model, random)
        chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
        ways = {"ours": ours(model, tokenizer, prompts)}
        for resamples in options.resamples:
            asked = {"random": random, "prompts": prompts, "resamples": resamples, "sum": _sum(model)}
            ways[f"constrained-diffusion, up to {resamples} refusals"] = _elsewhere(options, asked)
        for way, found in ways.items():
            forms = [form for form in FORMS for _ in prompts]
            sampled = sum(is_valid(form, one["sampled"]) for form, one in zip(forms, found, strict=True))
            completed = sum(
                is_valid(form, one.get("completed", one["sampled"])) for form, one in zip(forms, found, strict=True)
            )
            passes, idle = (sum(one.get(name, 0) for one in found) for name in ("passes", "idle"))
            refused = sum(one.get("refused", 0) for one in found)
            seconds = sum(one["seconds"] for one in found)
            print(
                f"| {'random' if random else 'trained'} | {way} | {len(found)} | {sampled} | {completed} "
                f"| {passes:,}{f' ({idle:,} after the end)' if idle else ''} | {refused:,} | {seconds:.1f} |",
                flush=True,
            )


def _elsewhere(options, asked):
    """Return what their interpreter says."""
    done = subprocess.run(
        [options.python, __file__, "--model", options.model, "--theirs"],
        input=json.dumps(asked), stdout=subprocess.PIPE, text=True, check=False,
        env={**os.environ, "PYTHONPATH": options.constrained, "RAYON_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        sys.exit("their interpreter failed; its words are above")
    return json.loads(done.stdout.splitlines()[-1])


def _sum(model):
    """Return a number that tells weights apart."""
    with torch.no_grad():
        return sum(tensor.double().sum().item() for tensor in model.parameters())


def main():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--constrained", help="a checkout of constrained-diffusion")
    parser.add_argument("--python", help="the interpreter of an environment with what it and illada need")
    parser.add_argument("--resamples", type=int, nargs="+", default=[100, 2000], help="refusals before it stops")
    parser.add_argument("--theirs", action="store_true", help=argparse.SUPPRESS)  # in their interpreter
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.theirs:
        compare(options)
        return
    asked = json.load(sys.stdin)
    model, tokenizer = network(options.model, asked["random"])
    if _sum(model) != asked["sum"]:
        sys.exit("these are not the same weights")
    print(json.dumps(theirs(model, tokenizer, asked["prompts"], asked["resamples"])))


if __name__ == "__main__":
    main()
