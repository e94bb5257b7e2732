"""The command line: one command per public function, the same names, one line per error, exit code 2 for bad input."""

import dataclasses
import difflib
import os
import re
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

# Keeps tokenizers from advising about processes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from illada.errors import IlladaError

if TYPE_CHECKING:
    from illada.generation.settings import GenerationSettings

SETTINGS_FROM_MODEL = {"eos_token_id"}


def tokenizer(sources: list[str], output: str, vocab_size: int = 4096, max_bytes: int = 50_000_000) -> None:
    """Train a byte-level BPE tokenizer on text files, jsonl, parquet or folders of them.

    Args:
        sources: files and folders to read.
        output: folder to write the tokenizer to.
        vocab_size: number of tokens, special ones included.
        max_bytes: bytes of text to train on, from the first.
    """
    from illada.preparation.train_tokenizer import train_tokenizer_from_files

    train_tokenizer_from_files(sources, vocab_size=vocab_size, output=output, max_bytes=max_bytes)
    print(f"tokenizer of {vocab_size} tokens written to {output}")


def score(
    model: str,
    context: str | None = None,
    candidates: list[str] | None = None,
    file: str | None = None,
    method: Literal["confidence", "likelihood", "both"] = "confidence",
    samples: int = 128,
    seed: int = 0,
    chat: bool = False,
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    device: str = "auto",
    quantize: Literal["int8", "int4", "int8-bnb", "nf4"] | None = None,
) -> None:
    """Score candidate continuations by confidence (paper Eq. 2) or Monte-Carlo likelihood (LLaDA Eq. 6), in nats.

    Args:
        model: model or run folder, or a hub name (GSAI-ML/iLLaDA-8B-Base).
        context: text before the candidates.
        candidates: texts to compare.
        file: jsonl with {"context": str, "candidates": [str], "answer": int (optional)} on each line, instead.
        method: which scorer.
        samples: Monte-Carlo samples of the likelihood.
        seed: of the Monte-Carlo samples.
        chat: wrap each context in the chat template as a user's question.
        dtype: of the weights; auto is the checkpoint's own.
        device: to run on; auto takes a GPU where there is one.
        quantize: weights of the blocks in 8 or 4 bits, made while loading; int8 and int4 are torchao's, int8-bnb and
            nf4 bitsandbytes'.
    """
    from illada.commands.score import read_items, score_items
    from illada.weights.load import load_model

    items = read_items(context, candidates, file)
    network, text_tokenizer = load_model(model, dtype, device, quantize)
    score_items(network, text_tokenizer, items, method, samples, seed, chat, sys.stdout)


def evaluate(
    output: str,
    model: str | None = None,
    run: str | None = None,
    paper: Literal["base", "instruct"] | None = None,
    task_files: str | None = None,
    tasks: list[str] | None = None,
    limit: int | None = None,
    decode: Literal["exact", "fast"] = "exact",
    lengths: Literal["3-4", "4-3"] = "3-4",
    scoring: Literal["confidence", "likelihood"] | None = None,
    samples: int = 128,
    shots: int | None = None,
    chat: bool = False,
    settings: dict[str, Any] | None = None,
    ablate: Literal["scoring", "block_length", "steps", "threshold"] | None = None,
    values: list[str] | None = None,
    allow_code: bool = False,
    download: bool = False,
    seed: int = 0,
    max_batch_tokens: int = 16_384,
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    device: str = "auto",
    quantize: Literal["int8", "int4", "int8-bnb", "nf4"] | None = None,
) -> None:
    """Evaluate a model with lm-evaluation-harness: the paper's tables, any tasks. Interrupted, it continues.

    Args:
        output: folder for results.json, table.md, samples/ and the journal that an interrupted evaluation continues.
        model: model, adapter or run folder, or a hub name (GSAI-ML/iLLaDA-8B-Base).
        run: instead, a training run, each of whose checkpoints is evaluated, with a picture.
        paper: the rows of the paper's table, with its shots, lengths, blocks and prompts, beside its numbers.
        task_files: folder of the harness's task files (YAML) to evaluate; data files in it may be relative to it.
        tasks: which rows or tasks; alone, any of the harness's by name.
        limit: most documents of each task.
        decode: "fast" decodes the paper's rows by threshold 0.95 with an adaptive cache: not the paper's.
        lengths: answer tokens of MMLU and MMLU-Redux (instruct), where the paper and the authors' script disagree.
        scoring: how choices are scored, where the paper's row does not say: null for confidence, and for the exact
            likelihood of a causal model.
        samples: Monte-Carlo samples of the likelihood.
        shots: examples before each question; null for the task's own number.
        chat: use the chat template, with each example as a turn of its own.
        settings: of generation, before the tasks' own: --settings.block_length 16, --settings.threshold 0.9, ...
        ablate: evaluate several values of this, in one table (scoring: the paper's Table 4).
        values: of the ablation, instead of the usual ones.
        allow_code: run the programs that the model writes, in a limited process of their own.
        download: fetch data sets that are not in the local cache.
        seed: of the choice of examples, of likelihood masks and of sampling.
        max_batch_tokens: most positions of one forward pass when scoring.
        dtype: of the weights; auto is the checkpoint's own.
        device: to run on; auto takes a GPU where there is one.
        quantize: weights of the blocks in 8 or 4 bits, made while loading.
    """
    arguments: dict[str, Any] = dict(locals())
    from illada.evaluation import run as evaluation
    from illada.evaluation.options import EvalOptions

    if table := evaluation.evaluate(EvalOptions(**arguments)):  # of several processes one has it
        print(table)


def compare(run_a: str, run_b: str) -> None:
    """Compare two outputs of `illada eval`, document by document: differences with confidence intervals.

    Args:
        run_a: output folder.
        run_b: output folder.
    """
    from illada.evaluation.compare import compare as compared

    print(compared(run_a, run_b))


def export(
    model: str,
    output: str,
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    layout: Literal["illada", "released"] = "illada",
    max_shard_size: str = "5GB",
) -> None:
    """Write a model as a folder that transformers loads, in our layout or the released one: weights to model card.

    Args:
        model: model or run folder, or a hub name (GSAI-ML/LLaDA-8B-Instruct).
        output: new folder to write.
        dtype: of the weights written; auto is the checkpoint's own.
        layout: "illada" loads in transformers after `import illada`; "released" is also what the authors' code reads.
        max_shard_size: largest file of weights; more are written in several, with an index.
    """
    from illada.weights.export import export_model

    export_model(model, output, dtype, layout, max_shard_size)
    print(f"written to {output}: load it with AutoModelForMaskedLM.from_pretrained({output!r}) after `import illada`")


def convert(
    source: str,
    output: str,
    mask_token: str | None = None,
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    max_shard_size: str = "5GB",
) -> None:
    """Make a starting point for training out of a causal llama-like checkpoint; an extra, not the paper's way.

    Args:
        source: model folder or hub name of type llama, or of another type with the same network.
        output: new folder to write.
        mask_token: what stands for a masked token; null takes the tokenizer's own, else an unused reserved token, else
            adds <[MASK]>.
        dtype: of the weights written; auto is the checkpoint's own.
        max_shard_size: largest file of weights; more are written in several, with an index.
    """
    from illada.weights.convert import convert_model

    print(convert_model(source, output, mask_token, dtype, max_shard_size))


def demo(output: str = "runs/demo", quick: bool = False, seed: int = 0) -> None:
    """Walk the whole road on this machine: tokenizer, pre-training, SFT, generation, scoring, report.

    The text is the standard library of this Python; nothing is downloaded. Interrupted, the same command continues.

    Args:
        output: run folder.
        quick: 3 to 4 minutes instead of 10 to 15, with a model that has learned less.
        seed: of everything random.
    """
    from illada.demo.stages import run_demo

    run_demo(Path(output), quick, seed)


def bench_generate(
    model: str | None = None,
    random: str | None = None,
    vocab_size: int | None = None,
    tasks: str | None = None,
    limit: int = 64,
    batch: int = 32,
    block_length: int = 16,
    max_new_tokens: int = 48,
    repeats: int = 3,
    only: list[str] | None = None,
    outside: list[str] | None = None,
    output: str | None = None,
    seed: int = 0,
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    device: str = "auto",
) -> None:
    """Measure every way to generate on one model: speed, work, memory, agreement with exact decoding, accuracy.

    Args:
        model: model or run folder, or a hub name.
        random: instead, a shape to fill with random weights: 1m, 5m, 15m, 50m, illada-8b or llada-8b.
        vocab_size: of the random model.
        tasks: jsonl with {"prompt": str, "answer": str} on each line; null takes the demo's held-out problems.
        limit: most problems to answer.
        batch: prompts given to the engine at once; the plain loop and outside samplers take one at a time.
        block_length: masks appended at a time.
        max_new_tokens: most tokens of an answer.
        repeats: timed runs of each variant; the median counts.
        only: variants to run, by their names in the table, beside the plain loop and "1 token".
        outside: others' samplers, to be run: FILE.py[:FUNCTION][,OPTION=VALUE...], called as LLaDA's or Fast-dLLM's.
        output: folder for results.json, table.md and frontier.png; null only prints the table.
        seed: of random weights and prompts, and of the choice of problems.
        dtype: of the weights; auto is the checkpoint's own, or fp32 for random ones.
        device: to run on; auto takes a GPU where there is one.
    """
    arguments: dict[str, Any] = dict(locals())
    from illada.bench import generation
    from illada.bench.options import BenchGenerateOptions

    results = generation.bench_generate(BenchGenerateOptions(**arguments), on_run=_show)
    _show("")
    print(generation.table(results))
    if output is not None:
        print(f"written to {output}")


def bench_serve(
    model: str | None = None,
    url: str | None = None,
    mixes: list[str] | None = None,
    clients: list[int] | None = None,
    rates: list[float] | None = None,
    requests: int = 200,
    seconds: float = 60.0,
    limit: int = 24,
    file: str | None = None,
    decoding: Literal["exact", "fast"] | None = None,
    outside: list[str] | None = None,
    block_length: int = 16,
    max_new_tokens: int = 48,
    output: str | None = None,
    seed: int = 0,
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    device: str = "auto",
) -> None:
    """Put load on a server, at several rates and mixes: speed, latency, queue and memory, beside one at a time.

    Args:
        model: model or run folder, or a hub name: served by a process of its own, and a copy here to compare with.
        url: instead, of a server that runs, as http://127.0.0.1:8000, with a key of its in ILLADA_API_KEYS; with
            --model too, that is only compared with.
        mixes: what clients ask for: short, long, mixed, cancels (they go away); all of them by default.
        clients: how many at once, each sending its next request when it has its answer; 1, 8 and 32 by default.
        rates: requests a second, sent whether or not others have been answered; by default shares of the most
            answers a second that clients got.
        requests: most of each row.
        seconds: after so many, no more are sent for a row.
        limit: different problems.
        file: with a prompt on each line (or jsonl with "prompt"); null takes the demo's held-out problems.
        decoding: of every request; null for the server's own.
        outside: others' samplers to compare with: FILE.py[:FUNCTION][,OPTION=VALUE...], called as LLaDA's or
            Fast-dLLM's.
        block_length: of the server that is started.
        max_new_tokens: of the server that is started.
        output: folder for results.json, table.md and load.png; null only prints the table.
        seed: of the choice of problems, kinds and times of arrival.
        dtype: of the weights; auto is the checkpoint's own.
        device: to run on; auto takes a GPU where there is one.
    """
    arguments: dict[str, Any] = dict(locals())
    from illada.bench import serving
    from illada.bench.options import BenchServeOptions

    results = serving.bench_serve(BenchServeOptions(**arguments), on_run=_show)
    _show("")
    print(serving.table(results))
    if output is not None:
        print(f"written to {output}")


def _show(name: str) -> None:
    """Say on a terminal what is being measured: a line and no spinner, whose thread would take time from it."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{name}", end="", file=sys.stderr, flush=True)


def _train(command: str, arguments: Namespace) -> None:
    import signal

    from illada.training.recipe import Recipe
    from illada.training.trainer import train

    recipe = Recipe(**{f.name: arguments[f.name] for f in dataclasses.fields(Recipe)})
    result = train(recipe, title=command)
    if result.interrupted:
        sys.exit(128 + signal.Signals(result.interrupted))
    if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun started, one speaks
        print(f"{'adapter' if recipe.lora.rank else 'model'} written to {result.model}")


def _estimate(arguments: Namespace) -> None:
    """Say what a recipe will need."""
    import json

    from illada.training.estimate import estimate, table
    from illada.training.recipe import Recipe

    recipe = Recipe(**{f.name: arguments[f.name] for f in dataclasses.fields(Recipe)})
    names = ("gpus", "gpu", "mfu", "price", "vocab_size", "data_tokens")
    found = estimate(recipe, **{name: arguments[name] for name in names})
    print(json.dumps(dataclasses.asdict(found), indent=1) if arguments.json else table(found))


def _generate(arguments: Namespace) -> None:
    """Complete prompts."""
    from illada.commands.generate import generate_text
    from illada.text.prompts import read_prompts
    from illada.weights.load import load_model

    prompts = read_prompts(arguments.prompt, arguments.file)
    settings = _settings(arguments)
    model, text_tokenizer = load_model(arguments.model, arguments.dtype, arguments.device, arguments.quantize)
    generate_text(
        model, text_tokenizer, prompts, settings, arguments.chat, arguments.json, sys.stdout, arguments.slot_tokens
    )


def _chat(arguments: Namespace) -> None:
    """Talk to a tuned model in the terminal and watch each answer form."""
    from illada.commands.generate import chat
    from illada.weights.load import load_model

    settings = _settings(arguments)
    model, text_tokenizer = load_model(arguments.model, arguments.dtype, arguments.device, arguments.quantize)
    chat(model, text_tokenizer, settings, arguments.system)


def _serve(arguments: Namespace) -> None:
    """Serve a model: an OpenAI-compatible API and a page."""
    from illada.serving import cluster
    from illada.serving.server import serve
    from illada.serving.settings import Copies, ServerSettings

    server = ServerSettings(**{f.name: arguments[f.name] for f in dataclasses.fields(ServerSettings)})
    copies = Copies(**{f.name: arguments[f.name] for f in dataclasses.fields(Copies)})
    run = serve if copies == Copies() else partial(cluster.serve, copies)
    run(arguments.model, server, _settings(arguments), arguments.dtype, arguments.device, arguments.quantize)


def _report(arguments: Namespace) -> None:
    """Draw the curves of a run."""
    from illada.training.plots import draw_run

    print(f"written to {draw_run(arguments.run, arguments.output)}")


def _convert(arguments: Namespace) -> None:
    """Convert a causal checkpoint. Checked here, as jsonargparse would call what is missing by another name."""
    if arguments.source is None:
        raise IlladaError("missing: --from (--help explains them)")
    convert(**_given(arguments))


def _settings(arguments: Namespace) -> "GenerationSettings":
    from illada.generation.settings import GenerationSettings

    names = [f.name for f in dataclasses.fields(GenerationSettings) if f.name not in SETTINGS_FROM_MODEL]
    values: dict[str, Any] = {name: arguments[name] for name in names}
    return GenerationSettings(**values)


class _Parser(ArgumentParser):
    """Turns what jsonargparse says about bad input into one line for people."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        line = " ".join(str(message).split())
        raise IlladaError(self._plainly(line)[:400]) from ex

    def _plainly(self, line: str) -> str:
        if found := re.fullmatch(r"the following arguments are required: (.*)", line):
            names = [name.split(".", 1)[-1] for name in found[1].split(", ")]
            missing = ", ".join("files or folders to read" if n == "sources" else f"--{n.lstrip('-')}" for n in names)
            return f"missing: {missing} (--help explains them)"
        if found := re.fullmatch(r'Parser key "config": File does not exist: (.*)', line):
            return f"no recipe at {found[1]}"
        if found := re.fullmatch(r'Parser key "([^"]*)"(?: element \d+)?: (.*?)(?:Got value|Given value): (.*)', line):
            return f"{found[1]} is {found[3]!r}: it must be {_wanted(found[2])}"
        if found := re.fullmatch(r"unrecognized arguments: (\S+).*", line):
            return f"unknown option {found[1]}{self._nearest(found[1])}"
        if found := re.fullmatch(r"Subcommand '(\w+)' does not accept option '(\S+)'", line):
            return f"unknown key {found[2]} in the recipe{self._nearest(found[2])}"
        if line.startswith("Unexpected config"):
            return f"the recipe must hold lines of `key: value`; it begins with {line[18:60].strip()!r}"
        if line.startswith("Problems parsing config: "):
            return "the recipe is not YAML: " + line[25:].replace(' in "<unicode string>",', " at")
        if found := re.match(r'Parser key "([^"]*)": Unable to load config', line):
            return f"{found[1]} has keys of its own: give them one by one, as --{found[1]}.KEY VALUE (see --help)"
        if found := re.fullmatch(r'expected "(\w+)\.subcommand" to be one of \{(.*?)\}.*', line):
            return f"what to {found[1]} is missing or unknown: choose {found[2].replace(',', ' or ')}"
        if found := re.fullmatch(r"argument (\S+): expected (?:one|at least one) argument", line):
            return f"{found[1]} needs a value"
        return line

    def _nearest(self, name: str) -> str:
        """Return a hint at the option, of any command, that `name` was probably meant to be."""
        commands = next((action.choices for action in self._actions if isinstance(action.choices, dict)), {})
        parsers = [self, *commands.values()]
        options = {option for parser in parsers for action in parser._actions for option in action.option_strings}
        close = difflib.get_close_matches(f"--{name.lstrip('-')}", sorted(options), n=1, cutoff=0.7)
        return f": did you mean {close[0][0 if name.startswith('-') else 2 :]}?" if close else " (see --help)"


def _wanted(types: str) -> str:
    """Say what a value must be, given how jsonargparse names its type."""
    if found := re.search(r"Subtypes: \[(.*?)\] Errors", types):
        types = found[1]
    if found := re.search(r"Literal\[(.*?)\]", types):
        words = [found[1].replace("'", "").replace(", ", " or ")]
    else:
        kinds = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
        kinds |= {"list": "a list, as [a, b]", "tuple": "a list, as [a, b]"}
        words = [text for kind, text in kinds.items() if re.search(rf"\b{kind}\b", types)] or [types.strip()]
    return " or ".join(words + ["null"] * ("NoneType" in types))


def _add_model_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=str, required=True, help="model or run folder, or a hub name (GSAI-ML/iLLaDA-8B-Instruct)"
    )
    dtypes = Literal["auto", "fp32", "bf16", "fp16"]
    parser.add_argument("--dtype", type=dtypes, default="auto", help="of the weights; auto is the checkpoint's own")
    parser.add_argument("--device", type=str, default="auto", help="to run on; auto takes a GPU where there is one")
    parser.add_argument(
        "--quantize",
        type=Literal["int8", "int4", "int8-bnb", "nf4"] | None,
        help="weights of the blocks in 8 or 4 bits, made while loading (the latter two by bitsandbytes)",
    )


def _build(sft: bool = False) -> tuple[ArgumentParser, dict[str, Callable[[Namespace], None]]]:
    """Return the parser and what each command does; with `sft`, estimates are of a recipe of that command."""
    from illada.generation.settings import GenerationSettings
    from illada.preparation.prepare import prepare
    from illada.serving.settings import Copies, ServerSettings
    from illada.training.estimate import estimate
    from illada.training.recipe import SFT_DEFAULTS, Recipe

    parser = _Parser(
        prog="illada",
        version=version("illada"),
        description="Train, tune, run and score masked diffusion language models.",
    )
    commands = parser.add_subcommands(required=True, metavar="COMMAND")
    actions: dict[str, Callable[[Namespace], None]] = {}

    def add(name: str, action: Callable[[Namespace], None], text: str) -> ArgumentParser:
        command = _Parser(description=text)
        commands.add_subcommand(name, command, help=text)
        actions[name] = action
        return command

    def add_function(
        function: Callable[..., Any], many: dict[str, str], action: Callable[[Namespace], None] | None = None
    ) -> None:
        """Make a command of a function; `many` are its list arguments, with their help (positional if --less)."""
        text = " ".join((function.__doc__ or "").split("\n\n")[0].split())
        command = add(function.__name__, action or (lambda arguments: function(**_given(arguments))), text)
        for name, help_text in many.items():
            command.add_argument(name, type=str, nargs="+", help=help_text)
        command.add_function_arguments(function, as_positional=False, skip={name.lstrip("-") for name in many})

    def prepare_and_print(arguments: Namespace) -> None:
        shards = prepare(**_given(arguments))
        if isinstance(shards, str):
            print(f"Slurm job {shards} completes {arguments.output}; the same command continues what was interrupted")
            return
        odd = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in shards.index["odd"].items() if count)
        print(
            f"{shards.documents:,} documents, {shards.tokens:,} tokens, {shards.bytes:,} bytes of text in {shards.path}"
            + (f" ({odd})" if odd else "")
        )

    sources = {"sources": "text files, jsonl, parquet, or folders of them"}
    add_function(demo, {})
    add_function(tokenizer, sources)
    add_function(
        prepare,
        {
            **sources,
            "--patterns": "which files of a folder",
            "--exclude": "but not these",
            "--filters": "leave out poor text: gopher, gopher-repetition, c4, fineweb (made for English web pages)",
            "--slurm_options": "more of sbatch's, as account=NAME",
        },
        prepare_and_print,
    )
    of_sft = {f"training.{key}": value for key, value in SFT_DEFAULTS.items()}
    for name, text in (("pretrain", "Pre-train a model from a recipe."), ("sft", "Fine-tune a model from a recipe.")):
        command = add(name, partial(_train, name), text)
        command.add_argument(
            "--config", action=ActionConfigFile, help="recipe (YAML); may come first, without the flag"
        )
        command.add_class_arguments(Recipe)
        if name == "sft":
            command.set_defaults(of_sft)
    command = add("estimate", _estimate, "Say what a recipe will need: memory by kind, speed, days and cost.")
    command.add_argument("--config", action=ActionConfigFile, help="recipe (YAML); may come first, without the flag")
    command.add_function_arguments(estimate, as_positional=False, skip={"recipe"})
    command.add_argument("--json", type=bool, default=False, help="print a JSON object instead")
    command.add_argument("--sft", action="store_true", help="the recipe is for `illada sft`, whose defaults differ")
    command.add_class_arguments(Recipe)
    if sft:
        command.set_defaults(of_sft)
    command = add("generate", _generate, "Complete prompts by block-wise, variable-length diffusion.")
    _add_model_arguments(command)
    command.add_argument("--prompt", type=str, nargs="+", help="texts to complete")
    command.add_argument("--file", type=str, help='file with a prompt on each line (or jsonl with "prompt"), instead')
    command.add_argument("--chat", type=bool, default=False, help="put each prompt into the chat template")
    command.add_argument(
        "--slot_tokens",
        type=int | None,
        help="fill in each ___ of the prompts with so many tokens, instead of writing on",
    )
    command.add_argument("--json", type=bool, default=False, help="print one JSON object per prompt")
    command.add_class_arguments(GenerationSettings, skip=SETTINGS_FROM_MODEL)
    command = add("chat", _chat, "Talk to a tuned model in the terminal and watch each answer form.")
    _add_model_arguments(command)
    command.add_argument("--system", type=str, help="system message")
    command.add_class_arguments(GenerationSettings, skip=SETTINGS_FROM_MODEL)
    command = add("serve", _serve, "Serve a model: an OpenAI-compatible API, and a page to watch answers form.")
    _add_model_arguments(command)
    command.add_class_arguments(ServerSettings)
    command.add_class_arguments(Copies)
    command.add_class_arguments(GenerationSettings, skip=SETTINGS_FROM_MODEL)
    add_function(score, {"--candidates": "texts to compare"})
    text = " ".join((evaluate.__doc__ or "").split("\n\n")[0].split())
    command = add("eval", lambda arguments: evaluate(**_given(arguments)), text)
    for name, help_text in {"--tasks": "which rows or tasks", "--values": "of the ablation"}.items():
        command.add_argument(name, type=str, nargs="+", help=help_text)
    command.add_function_arguments(evaluate, as_positional=False, skip={"tasks", "values"})
    command = add("compare", lambda arguments: compare(**_given(arguments)), (compare.__doc__ or "").split("\n\n")[0])
    command.add_argument("run_a", type=str, help="output folder of `illada eval`")
    command.add_argument("run_b", type=str, help="another")
    add_function(export, {})
    command = add("report", _report, "Draw the curves of a training run: loss by mask ratio, speed and more.")
    command.add_argument("run", type=str, help="folder of the run, finished or not")
    command.add_argument("--output", type=str, help="picture to write (.png, .svg, .pdf); null for RUN/report.png")
    text = " ".join((convert.__doc__ or "").split("\n\n")[0].split())
    command = add("convert", _convert, text)
    command.add_argument(
        "--from", dest="source", type=str, help="causal llama-like model: folder or hub name (required)"
    )
    command.add_function_arguments(convert, as_positional=False, skip={"source"})
    measures: dict[str, Callable[..., None]] = {"generate": bench_generate, "serve": bench_serve}
    bench = add(
        "bench", lambda given: measures[given.subcommand](**_given(given[given.subcommand])), "Measure this package."
    )
    kinds = bench.add_subcommands(required=True, metavar="WHAT")
    outside = {
        "--outside": (str, "others' samplers, called as LLaDA's or Fast-dLLM's: FILE.py[:FUNCTION][,OPTION=VALUE...]")
    }
    lists: dict[str, dict[str, tuple[type, str]]] = {
        "generate": {
            "--only": (str, "variants to run, by their names in the table, beside the plain loop and 1 token")
        },
        "serve": {
            "--mixes": (str, "what clients ask for: short, long, mixed, cancels"),
            "--clients": (int, "how many at once, each sending its next request when it has its answer (1 8 32)"),
            "--rates": (float, "requests a second, sent whether or not others have been answered"),
        },
    }
    for name, function in measures.items():
        text = " ".join((function.__doc__ or "").split("\n\n")[0].split())
        command = _Parser(description=text)
        kinds.add_subcommand(name, command, help=text)
        many = lists[name] | outside
        for option, (kind, help_text) in many.items():
            command.add_argument(option, type=kind, nargs="+", help=help_text)
        command.add_function_arguments(function, as_positional=False, skip={option[2:] for option in many})
    return parser, actions


def _given(arguments: Namespace) -> dict[str, Any]:
    """Return the arguments that have a value; the function's own defaults serve for the others."""
    return {name: value for name, value in arguments.as_dict().items() if value is not None}


def _normalise(words: list[str], parser: ArgumentParser) -> list[str]:
    """Let a recipe stand without its flag (`pretrain recipe.yaml`), a switch without its value (`--quick`), and a list
    without brackets (`--lora.targets q_proj v_proj`).
    """
    if len(words) > 1 and words[0] in ("pretrain", "sft", "estimate") and not words[1].startswith("-"):
        words = [words[0], "--config", *words[1:]]
    commands = next((action.choices for action in parser._actions if action.choices), None) or {}
    command = commands.get(words[0]) if isinstance(commands, dict) else None
    hints = {} if command is None else {o: a for a in command._actions for o in a.option_strings}
    switches = {option for option, action in hints.items() if getattr(action, "_typehint", None) is bool}
    lists = {option for option, action in hints.items() if getattr(action, "_typehint", None) == list[str] | None}
    plain: list[str] = []
    for place, word in enumerate(words):
        if len(plain) > 1 and plain[-2] in lists and plain[-1].startswith("[") and not word.startswith("-"):
            plain[-1] = f"{plain[-1][:-1]}, {word}]"
            continue
        bare = place > 0 and words[place - 1] in lists and word != "null" and not word.startswith(("-", "["))
        plain.append(f"[{word}]" if bare else word)
        if word in switches and (place + 1 == len(words) or words[place + 1].startswith("--")):
            plain.append("true")
    return plain


def main(words: list[str] | None = None) -> None:
    """Run the command line; exits with 2 on bad input and 1 on a failed run."""
    warnings.filterwarnings("ignore")
    words = sys.argv[1:] if words is None else words
    try:
        from transformers.utils import logging

        from illada.hub import ban_network

        ban_network()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        parser, actions = _build(sft="--sft" in words)
        arguments = parser.parse_args(_normalise(words or ["--help"], parser))
        try:
            arguments = parser.instantiate(arguments)
        except TypeError as error:
            what = "model, lora, data, training, parallel and log must each hold lines of `key: value` in the recipe"
            raise IlladaError(what) from error
        actions[arguments.subcommand](arguments[arguments.subcommand])
    except IlladaError as error:
        sys.exit(_fail(error, 2))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except RuntimeError as error:
        from illada.errors import DivergedError

        if isinstance(error, DivergedError):
            sys.exit(_fail(error, 1))
        raise
    except OSError as error:  # a disk that is full, a folder one may not write to, a file in place of a folder
        sys.exit(_fail(IlladaError(f"{error.filename}: {error.strerror}" if error.strerror else error), 2))


def _fail(error: Exception, code: int) -> int:
    print(f"illada: error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
