"""The rows of peers.py: each function runs one peer beside ours, on the same weights, and returns the lines it fills.

Ways take turns in every round; a line has the processor seconds of each round, and its ratio is the median of rounds.
"""

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import rl_step
import torch
import trainer
from quantize import PLAIN, random_model, sample

from illada.bench.external import outside_samplers
from illada.bench.measure import Measurement, agreement, measure
from illada.bench.samplers import Answer, Prompts, Sampler, cut
from illada.generation.engine import generate
from illada.generation.settings import GenerationSettings, settings_for
from illada.model.transformer import IlladaForMaskedLM
from illada.scoring.layout import Pair
from illada.scoring.likelihood import likelihood_scores
from illada.text.chat import encode_prompt
from illada.toy_tasks import TASKS, held_out_mix
from illada.weights.export import export_model
from illada.weights.gguf import export_gguf
from illada.weights.load import load_config, load_model

BLOCK, BUDGET, THRESHOLD = 16, 48, 0.95  # blocks and answers of the demo
SAMPLES, ROWS = 128, 16  # of LLaDA's likelihood
LENGTHS = (64, 256)
VOCABULARY = 2048  # of the 8B shape with few layers, which a large head would drown
BESIDE = {"bf16": PLAIN, "q8_0": "int8-bnb", "Q4_K_M": "int4"}
"""Types of llama.cpp's weights, and our nearest."""

Line = dict[str, Any]


def line(what: str, theirs: Sequence[float], ours: Sequence[float], agree: str) -> Line:
    """Return a line of the table, with the seconds of each round."""
    ratio = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
    return {"what": what, "theirs": list(theirs), "ours": list(ours), "ratio": ratio, "agree": agree}


def demo_problems(tokenizer: Any, limit: int) -> list[Pair]:
    """Return (prompt, answer) of held-out problems of the demo's tasks, as ids."""
    problems = held_out_mix(list(TASKS), limit)
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": each.prompt}]) for each in problems]
    answers = [tokenizer.encode(each.answer, add_special_tokens=False) for each in problems]
    return list(zip(prompts, answers, strict=True))


# Generation


def engine(model: IlladaForMaskedLM, settings: GenerationSettings, batch: int, ends: Sequence[int]) -> Sampler:
    """Return our engine with so many prompts at once; answers are cut at these ends, as those of others are."""

    def answer(prompts: Prompts) -> list[Answer]:
        groups = [prompts[first : first + batch] for first in range(0, len(prompts), batch)]
        rows = [row for group in groups for row in generate(model, group, settings)]
        return [Answer(cut(row.ids, ends), row.forwards) for row in rows]

    return Sampler("ours", answer, settings=settings)


def generation(args: argparse.Namespace, spec: str, what: str, ends: bool = False, **rule: Any) -> list[Line]:
    """Answer problems by a sampler of others and by our engine under the same rule, in up to three ways.

    Args:
        args: the command line.
        spec: of the other sampler, as `illada bench generate --outside` takes it.
        what: the rule in words.
        ends: whether the other looks for the end of an answer, so that going on behind it would be other work.
        rule: the same in our settings.
    """
    model, tokenizer = load_model(args.model, "fp32", "cpu")
    prompts = [prompt for prompt, _ in demo_problems(tokenizer, args.limit)]
    plain = GenerationSettings(max_new_tokens=BUDGET, block_length=BLOCK, later_masks=True, eos_token_id=None, **rule)
    settings = settings_for(model, plain)
    ways = {
        **({} if ends else {"ours, on behind the end as theirs": (plain, 1)}),
        "ours to the end of an answer": (settings, 1),
        f"ours {args.limit} at once, to the end": (settings, args.limit),
    }
    (other,) = outside_samplers([spec], model, settings)
    samplers = [other, *(engine(model, *way, settings.eos_ids) for way in ways.values())]
    theirs, *ours = measure(model, samplers, prompts, args.rounds)

    def shown(found: Measurement) -> str:
        equal = round(agreement(found.answers, theirs.answers)[0] * len(prompts))
        passes = "{:.1f} and {:.1f}".format(
            *(sum(answer.forwards for answer in each.answers) / len(prompts) for each in (theirs, found))
        )
        return f"{equal} of {len(prompts)} answers equal; passes an answer {passes}"

    return [
        line(f"{what}; {name}", theirs.cpu_seconds, found.cpu_seconds, shown(found))
        for name, found in zip(ways, ours, strict=True)
    ]


def row_fast_dllm(args: argparse.Namespace) -> list[Line]:
    """Their loops with both caches."""
    file = f"{args.fast_dllm}/llada/generate.py"
    lines = []
    for cache in ("dual", "prefix"):
        spec = f"{file}:generate_with_{cache}_cache,threshold={THRESHOLD}"
        lines += generation(args, spec, f"{cache} cache, threshold {THRESHOLD}", cache=cache, threshold=THRESHOLD)
    return lines


def row_dinfer(args: argparse.Namespace) -> list[Line]:
    """Their decoder by blocks with both caches."""
    driver = f"{Path(__file__).with_name('dinfer.py')},dinfer={args.dinfer}/python/dinfer"
    lines = []
    for cache in ("dual", "prefix"):
        spec = f"{driver},cache={cache},threshold={THRESHOLD}"
        rule = {"cache": cache, "threshold": THRESHOLD}
        lines += generation(args, spec, f"{cache} cache, threshold {THRESHOLD}", ends=True, **rule)
    return lines


# The authors' code


def in_turns(ways: dict[str, Callable[[int], list[float]]], rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Call all ways in every round, with its number; return by way the seconds and what came back of each round."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    results: dict[str, list[list[float]]] = {way: [] for way in ways}
    for number in range(rounds):
        for way, run in ways.items():
            started = time.process_time()
            results[way].append(run(number))
            seconds[way].append(time.process_time() - started)
    return seconds, results


def noise(scores: list[list[float]]) -> float:
    """Return the standard deviation of a score between rounds of other masks; nan where there is one round."""
    if len(scores) < 2:
        return float("nan")
    return statistics.mean(statistics.variance(of_pair) for of_pair in zip(*scores, strict=True)) ** 0.5


@torch.inference_mode()
def likelihood(args: argparse.Namespace) -> list[Line]:
    """Score the right answers by `get_log_likelihood` and by ours."""
    model, tokenizer = load_model(args.model, "fp32", "cpu")
    pairs = demo_problems(tokenizer, args.limit)
    theirs = runpy.run_path(f"{args.authors}/get_log_likelihood.py", run_name="theirs")["get_log_likelihood"]
    mask = model.config.mask_token_id
    tensors = [tuple(torch.tensor(part) for part in pair) for pair in pairs]

    def by_theirs(seed: int) -> list[float]:
        torch.manual_seed(seed)
        return [theirs(model, *pair, mc_num=SAMPLES, batch_size=ROWS, mask_id=mask) for pair in tensors]

    ways = {
        "theirs": by_theirs,
        "ours one at a time": lambda seed: [likelihood_scores(model, [pair], SAMPLES, seed)[0] for pair in pairs],
        f"ours {len(pairs)} at once": lambda seed: likelihood_scores(model, pairs, SAMPLES, seed),
    }
    for run in ways.values():
        run(0)  # once, unmeasured
    seconds, scores = in_turns(ways, args.rounds)
    means = {way: statistics.mean(map(statistics.mean, found)) for way, found in scores.items()}
    what = f"likelihood of {len(pairs)} right answers, {SAMPLES} samples"
    return [
        line(
            f"{what}; {way}",
            seconds["theirs"],
            seconds[way],
            f"means {means['theirs']:.2f} and {means[way]:.2f} nats; a score's deviation from masks alone "
            f"{noise(scores['theirs']):.2f} and {noise(scores[way]):.2f}",
        )
        for way in list(ways)[1:]
    ]


def row_authors(args: argparse.Namespace) -> list[Line]:
    """LLaDA's published loop and likelihood."""
    return generation(args, f"{args.authors}/generate.py", "one token a pass, no cache") + likelihood(args)


# dllm


def row_dllm(args: argparse.Namespace) -> list[Line]:
    """Their trainers of masked diffusion and of GRPO."""
    names = ("dllm, windows", "dllm", "ours")  # theirs first: what cannot run there fails at once
    options = argparse.Namespace(
        dllm=args.dllm, dllm_python=args.dllm_python, dtype="bf16", steps=2, repeats=args.rounds
    )
    runs = trainer.timed(names, trainer.shape_of(args.preset, 32_000), options)
    of = {name: [run["seconds"] for run in found] for name, found in runs.items()}
    same = "the same documents; masks are drawn"
    kinds = {"dllm, windows": "on windows", "dllm": "on padded rows"}
    lines = [line(f"{args.preset}, bf16: two steps {kinds[way]}", of[way], of["ours"], same) for way in kinds]
    (theirs, cycles), *ours = rl_step.timed(
        args.model, args.dllm, args.dllm_python, ["diffu-grpo"], args.rounds
    ).items()
    return lines + [line(f"a cycle of {theirs}; {way}", cycles, found, "answers are drawn") for way, found in ours]


# llama.cpp


def said_by(command: list[str]) -> str:
    """Run a command on one thread and return its last line; raise RuntimeError with the last one of its errors."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise RuntimeError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
    return done.stdout.strip().rpartition("\n")[2]


def llama(args: argparse.Namespace, *words: str) -> str:
    """Run our script in the Python that has llama.cpp."""
    return said_by([args.llama_cpp, str(Path(__file__).with_name("llama_cpp_pass.py")), *words])


def passes(args: argparse.Namespace, folder: str, file: str, way: str, saved: str | None) -> list[list[Line]]:
    """Load and pass in new processes, theirs and ours in turns; return what both found in each round.

    Args:
        args: the command line.
        folder: our model.
        file: the same model for llama.cpp; its logits go into a file beside it.
        way: of our quantising.
        saved: folder of the quantised model, where it is another.
    """
    ids = sample(load_config(folder), folder, None, max(LENGTHS))[0].tolist()
    asked = {"ids": ids, "lengths": LENGTHS, "repeats": args.passes, "logits": f"{file}.npy"}
    ours = [sys.executable, str(Path(__file__).with_name("quantize.py")), "--way", way, "--model", folder]
    ours += ["--repeats", str(args.passes), "--lengths", *map(str, LENGTHS), "--head", str(max(LENGTHS))]
    ours += ["--reference", f"{folder}/../reference.pt", *(["--saved", saved] if saved else [])]
    return [
        [json.loads(llama(args, "pass", file, json.dumps(asked))), json.loads(said_by(ours))]
        for _ in range(args.rounds)
    ]


def lines_of_passes(what: str, found: list[list[Line]], agree: str) -> list[Line]:
    """Return the lines of loading with a first pass, and of passes of each length."""

    def times(of: Callable[[Line], float]) -> tuple[list[float], list[float]]:
        theirs, ours = ([of(one) for one in side] for side in zip(*found, strict=True))
        return theirs, ours

    first = times(lambda one: one["load_seconds"] + one["first_seconds"])
    kept = [name for name in found[0][0]["built"] if name.startswith(("AVX512", "AMX")) or "_" not in name]
    lines = [line(f"{what}: load, and first pass of {LENGTHS[0]}", *first, f"built with {' '.join(kept)}")]
    for length in LENGTHS:
        of_length = times(lambda one, key=f"seconds_{length}": statistics.median(one[key]))  # type: ignore[misc]
        lines.append(line(f"{what}: pass of {length}", *of_length, agree if length == max(LENGTHS) else ""))
    return lines


@torch.inference_mode()
def trained_passes(args: argparse.Namespace, work: str) -> list[Line]:
    """The given model in fp32, whose logits are compared."""
    file = f"{work}/trained.gguf"
    export_model(args.model, f"{work}/trained", "fp32")
    export_gguf(f"{work}/trained", file, "fp32")
    found = passes(args, f"{work}/trained", file, PLAIN, None)
    model, _ = load_model(args.model, "fp32", "cpu")
    ids = sample(model.config, args.model, None, max(LENGTHS))[0]
    ours, theirs = model(ids[None]).logits[0].numpy(), np.load(f"{file}.npy")
    most, equal = np.abs(ours - theirs).max(), np.mean(ours.argmax(1) == theirs.argmax(1))
    agree = f"logits differ by at most {most:.1e} of a spread of {ours.std():.1f}; top-1 equal at {equal:.1%}"
    return lines_of_passes("this model, fp32", found, agree)


def row_llama_cpp(args: argparse.Namespace) -> list[Line]:
    """Loading and whole passes: the given model in fp32, and layers of the 8B shape in three types."""
    with TemporaryDirectory() as work:
        lines = trained_passes(args, work)
        folder, plain = f"{work}/model", f"{work}/bf16.gguf"
        random_model(args.shape, args.layers, folder, vocab_size=VOCABULARY)
        torch.set_default_dtype(torch.float32)
        export_gguf(folder, plain, "bf16")
        for kind, way in BESIDE.items():
            file, saved = f"{work}/{kind}.gguf", None
            if kind == "q8_0":
                export_gguf(folder, file, "q8_0")
            elif kind == "Q4_K_M":
                llama(args, "quantise", plain, file)
            if way != PLAIN:
                saved = f"{work}/{way}"
                export_model(folder, saved, quantize=way)  # type: ignore[arg-type]
            what = f"{args.layers} layers of {args.shape}, {kind} beside {kind if way == PLAIN else way}"
            lines += lines_of_passes(what, passes(args, folder, file, way, saved), "random weights: not compared")
    return lines
