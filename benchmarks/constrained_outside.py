"""Answers of a given form: ours beside the public code of constrained-diffusion, on the same weights and prompts.

    python benchmarks/constrained_outside.py --model runs/demo/model --constrained CHECKOUT --python VENV/bin/python

Theirs (eth-sri/constrained-diffusion, arXiv 2508.10111) proposes a token, asks whether a context-free grammar still has
a word that fits, and takes another token where it has none; after 100 refusals (`WAYS`) it stops, and its evaluation
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

TOKENS, BLOCK, END = 48, 16, object()
WAYS = {
    "as it is": {"max_resamples": 100},
    "up to 2000 refusals": {"max_resamples": 2000},
    "up to 2000 refusals, no white space": {"max_resamples": 2000, "strip_chars": ""},
}
"""How constrained-diffusion is asked: by itself it allows white space anywhere between lexemes, and gives up at 100."""
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


def theirs(model, tokenizer, prompts, way):
    """Do the same with constrained-diffusion; this is what their interpreter runs.

    `way` is of `WAYS`. The word that fits after a stop is "completed"; a grammar is compiled once for a form, in the
    time of its first answer.
    """
    from constrained_diffusion.eval.dllm.models.llada.generate_constrained import generate as sample

    mask, end = model.config.mask_token_id, tokenizer.eos_token_id
    counts = {}

    def counted(ids):
        counts["passes"] += 1
        counts["idle"] += not bool((ids == mask).any())
        return model(ids)

    counted.device = model.device
    # As transformers 4, which they pin, reads a row of ids: each its own word.
    tokenizer.batch_decode = lambda row: [tokenizer.decode([token]) for token in row.tolist()]
    sizes = {"steps": TOKENS, "gen_length": TOKENS, "block_length": BLOCK}
    found = []
    for form in FORMS:
        language = None
        for prompt in prompts:
            counts.update(passes=0, idle=0)
            begun = time.process_time()
            language = language or compiled(form)
            given = {"constraint_lang": language[0], "lex_map": language[1], "subtokens": language[3], **sizes}
            asked = {"prompt_len": len(prompt), "mask_id": mask, **way}
            *_, (ids, refused, ended) = sample(counted, torch.tensor([prompt]), tokenizer, **given, **asked)
            answer = ids[0, len(prompt) :].tolist()
            text = tokenizer.decode(answer[: answer.index(end)] if end in answer else answer)
            known = [{mask: None, end: END}.get(token, tokenizer.decode([token])) for token in answer]
            completed = text if ended else a_word_that_fits(known, way.get("strip_chars"), *language)
            seconds = time.process_time() - begun
            found.append(
                {"sampled": text, "completed": completed, "refused": len(refused), "seconds": seconds, **counts}
            )
    return found


def compiled(form):
    """Return a form in their terms: grammar, automata of its lexemes, their expressions, which are parts of which."""
    from constrained_diffusion.cfgs.jsonschema import schema_to_cfg
    from constrained_diffusion.constrain_utils import compile_lex_map
    from rustformlang.cfg import CFG

    if "regex" in form:
        grammar, lexemes, parts = CFG.from_text("S -> answer", "S"), {"answer": form["regex"]}, {}
    else:
        grammar, lexemes, parts = schema_to_cfg(form["json_schema"])
    return grammar.to_normal_form(), compile_lex_map(lexemes, subtokens=parts), lexemes, parts


def a_word_that_fits(known, white, grammar, automata, lexemes, parts):
    """Return some word of a grammar with these tokens in it, as their evaluation does after a stop; "" for none.

    Args:
        known: the answer's tokens as texts, None for a mask, END for the end.
        white: characters that may stand between lexemes, None for all white space.
        grammar, automata, lexemes, parts: what `compiled` returns.
    """
    from constrained_diffusion import constrain_utils as constraints

    known = [constraints.EOS if word is END else word for word in known]
    pieces, gap_first, ended = constraints.partial_output_from_tokens(known)
    fitting = constraints.generated_language(
        known,
        automata,
        grammar.get_terminals(),
        subtokens=parts,
        supertokens=constraints.derive_supertokens(parts),
        strip_chars=white,
    )
    return constraints.autocomplete_valid(pieces, gap_first, ended, fitting, lexemes, parts, grammar) or ""


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
        for name, way in WAYS.items():
            asked = {"random": random, "prompts": prompts, "way": way, "sum": _sum(model)}
            ways[f"constrained-diffusion, {name}"] = _elsewhere(options, asked)
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
    print(json.dumps(theirs(model, tokenizer, asked["prompts"], asked["way"])))


if __name__ == "__main__":
    main()
