"""`illada demo`: raw text to a tuned, scored, talking model, stage after stage, each resumable."""

import itertools
import json
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import track

from illada.data.shards import Shards
from illada.demo import align
from illada.demo.report import best_accuracies, write_report
from illada.demo.task_files import evaluate_in_harness
from illada.errors import IlladaError
from illada.files import read_json, write_json, write_text
from illada.folders import new_folder
from illada.generation.engine import StepEvent, generate
from illada.generation.optional.picture import recorded
from illada.generation.settings import GenerationSettings
from illada.preparation.options import PrepareSettings
from illada.preparation.prepare import prepare
from illada.preparation.train_tokenizer import train_tokenizer
from illada.reporting import accuracy
from illada.scoring.optional.candidates import Item, right_choices, score_candidates
from illada.text.prompts import show_ids
from illada.toy_tasks import TASKS, examples, held_out, library_choices, standard_library
from illada.training.optional.likelihood import text_likelihood
from illada.training.optional.ngrams import ngram_baselines
from illada.training.recipe import DataRecipe, ModelRecipe, Recipe, TrainingRecipe
from illada.training.trainer import Trainer, train
from illada.training.validation import bits_per_byte, validation_bound
from illada.weights.load import load_model
from illada.weights.runs import read_metrics


@dataclass(frozen=True)
class Scale:
    """The size of every stage of the demo."""

    tasks: tuple[str, ...]
    vocab_size: int
    window: int
    samples_per_step: int
    pretrain_steps: int
    pretrain_learning_rate: float
    sft_examples: int
    warmup_steps: int
    sft_steps: int
    test_problems: int
    steps_per_block: tuple[int, ...]
    block_length: int = 16
    max_new_tokens: int = 48
    likelihood_samples: int = 64


FULL = Scale(tuple(TASKS), 2048, 128, 16, 3600, 3e-3, 80_000, 1600, 2700, 200, (1, 2, 4, 8, 16))
QUICK = Scale(("shift", "capitals", "library"), 2048, 128, 16, 400, 2e-3, 20_000, 1100, 700, 50, (1, 4, 16))
LIKELIHOOD_WINDOWS = 16
"""Windows of held-out text whose exact likelihood is computed; 0 leaves it out."""
LEARNED = 0.5
"""Share of right answers from which on a task counts as learned."""
SHAPE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def run_demo(output: Path, quick: bool = False, seed: int = 0, further: bool = False) -> dict[str, Any]:
    """Run all stages and return the numbers of the report; `further` adds rewards and training for fewer passes.

    Raises:
        IlladaError: when `output` holds something else, or a demo with other settings.
        SystemExit: when a signal stops the training; the same command continues it.
    """
    scale = QUICK if quick else FULL
    console = Console(stderr=True)
    started = time.monotonic()
    _claim(output, {"quick": quick, "seed": seed, **asdict(scale)})

    def stage(title: str) -> None:
        console.rule(f"[bold]{title}", align="left")

    stage("1/7  Tokenizer and token shards from this Python's standard library")
    data = _prepare(output, scale, seed)
    pretrain, warmup, sft = _recipes(output, scale, seed)
    stage("2/7  Pre-training on text")
    _train(pretrain, "pre-training")
    stage("3/7  Fine-tuning on instructions: by LLaDA's rule, then by the paper's")
    _train(warmup, "LLaDA's rule")
    _train(sft, "paper's rule")
    if not (output / "model").exists():
        with new_folder(output / "model") as folder:
            shutil.copytree(output / "sft" / "model", folder, dirs_exist_ok=True)
    stage("4/7  Text: bits per byte on held-out files (a minute or two)")
    results: dict[str, Any] = {"settings": {"quick": quick, "seed": seed, **asdict(scale)}}
    results["text"] = _measure_text(output, data, scale)
    stage("5/7  Answers: accuracy on held-out problems, and how few passes suffice")
    results.update(_measure_answers(output, scale, seed, console))
    write_json(output / "model" / "suggestions.json", suggestions(results))
    stage("6/7  The same problems through lm-evaluation-harness")
    results["harness"] = evaluate_in_harness(
        output,
        {task: held_out(task, scale.test_problems, seed) for task in scale.tasks},
        library_choices(scale.test_problems, seed),
        {"max_new_tokens": scale.max_new_tokens, "block_length": scale.block_length},
        seed,
    )
    results["align"] = None
    if further:
        stage("Further: rewards of its own answers, then the same answers in fewer passes")
        results["align"] = _align(output, scale, seed, results)
    stage("7/7  Report")
    results["seconds"] = round(time.monotonic() - started)
    write_report(output, results)
    _print_summary(output, results)
    return results


def _claim(output: Path, settings: dict[str, Any]) -> None:
    """Make the demo's folder, or check that it is the folder of a demo with these settings."""
    settings = json.loads(json.dumps(settings))
    marker = output / "demo.json"
    if marker.exists():
        if read_json(marker) != settings:
            raise IlladaError(f"{output} holds a demo with other settings: choose another --output or delete it")
        return
    if output.exists() and any(output.iterdir()):
        raise IlladaError(f"{output} is not empty and holds no demo: choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    write_json(marker, settings)


def _text_files() -> tuple[list[str], list[str]]:
    """Return the library's files, without its tests, for training and for validation, which gets every twelfth."""
    folder = standard_library()
    skipped = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in (".py", ".txt", ".rst") and path.is_file() and not skipped & set(path.parts)
    )
    names = [str(path) for path in files if path.stat().st_size > 500]
    validation = names[7::12]
    del names[7::12]
    return names, validation


def _prepare(output: Path, scale: Scale, seed: int) -> dict[str, Shards]:
    """Train the tokenizer and write token shards of text and of instructions, for training and for validation."""
    training_files, validation_files = _text_files()
    if not training_files:
        raise IlladaError(f"no text in {standard_library()}: this Python has no standard library as files")
    folder = output / "data"
    folder.mkdir(exist_ok=True)
    tokenizer = output / "tokenizer"
    if not tokenizer.exists():
        # Some instructions too, so that their words and letters become tokens.
        instructions = itertools.islice(examples("train", seed, scale.tasks), 2000)
        texts = itertools.chain(
            (Path(f).read_text(encoding="utf-8", errors="replace") for f in training_files[::3]),
            (f"{example.prompt}\n {example.answer}" for example in instructions),
        )
        with new_folder(tokenizer) as partial:
            train_tokenizer(texts, scale.vocab_size).save_pretrained(partial)
    sources = {"text-train": training_files, "text-validation": validation_files}
    for split, count in (("train", scale.sft_examples), ("validation", 500)):
        file = folder / f"chat-{split}.jsonl"
        if not file.exists():
            # Validation examples are problems of the training split under another seed; the test split stays unseen.
            problems = itertools.islice(examples("train", seed + (split != "train"), scale.tasks), count)
            write_text(file, "".join(json.dumps({"messages": problem.messages}) + "\n" for problem in problems))
        sources[file.stem] = [str(file)]
    for name, files in sources.items():
        kind: Literal["text", "chat"] = "chat" if name.startswith("chat") else "text"
        prepare(PrepareSettings(files, str(folder / name), str(tokenizer), kind=kind))
    return {name: Shards.open(folder / name) for name in sources}


def _recipe(
    output: Path, scale: Scale, seed: int, name: str, model: ModelRecipe, kind: str, steps: int, **training: Any
) -> Recipe:
    """Return a recipe of the run `name` on data of a kind, with the settings that the demo's runs share."""
    data = output / "data"
    validation = str(data / f"{kind}-validation") if "validate_every" in training else None
    window = scale.window if kind == "text" else scale.window // 2
    return Recipe(
        output=str(output / name),
        model=model,
        data=DataRecipe(str(data / f"{kind}-train"), validation, window),
        training=TrainingRecipe(
            steps=steps,
            samples_per_batch=64,
            warmup_steps=100,
            final_learning_rate=2e-5,
            optimizer="muon",  # learns several times sooner than AdamW at this size (docs/log.md)
            beta2=0.98,
            dtype="fp32",  # bf16 is slower below a width of 256 on a CPU (benchmarks/RESULTS.md)
            seed=seed,
            checkpoint_every=max(100, steps // 4),
            keep_checkpoints=1,
            **training,
        ),
    )


def _recipes(output: Path, scale: Scale, seed: int) -> tuple[Recipe, Recipe, Recipe]:
    """Return the recipes of pre-training on text and of two fine-tunings, by LLaDA's rule and by the paper's."""
    recipe = partial(_recipe, output, scale, seed)
    pretrain = recipe(
        "pretrain",
        ModelRecipe(preset="1m", **SHAPE),
        "text",
        scale.pretrain_steps,
        samples_per_step=scale.samples_per_step,
        learning_rate=scale.pretrain_learning_rate,
        mask_range=[0.3, 0.8],  # paper: all levels; questions 6, 12 and 13 of docs/study.md
        decay="cosine",
        decay_steps=scale.pretrain_steps // 3,
        validate_every=max(50, scale.pretrain_steps // 10),
        validation_samples=128,
    )
    # By LLaDA's rule prompts stay visible, so that a tiny model learns the skills from far fewer tokens. It learns to
    # fill a canvas of known length; the paper's rule then teaches answers of any length (docs/log.md).
    warmup = recipe(
        "warmup",
        ModelRecipe(start=str(output / "pretrain" / "model")),
        "chat",
        scale.warmup_steps,
        samples_per_step=64,
        learning_rate=2e-3,
        rule="llada",
        decay="linear",
        decay_steps=scale.warmup_steps // 5,
    )
    # By the paper's rule windows are concatenated examples, in which everything may be masked.
    sft = recipe(
        "sft",
        ModelRecipe(start=str(output / "warmup" / "model")),
        "chat",
        scale.sft_steps,
        samples_per_step=2 * scale.samples_per_step,
        learning_rate=1e-3,  # a higher rate forgets what the warm-up taught
        decay="linear",
        decay_steps=scale.sft_steps // 3,
        validate_every=max(100, scale.sft_steps // 8),
        validation_samples=64,
    )
    return pretrain, warmup, sft


def _train(recipe: Recipe, title: str, trainer: type[Trainer] | None = None) -> None:
    result = train(recipe, title, trainer)
    if result.interrupted:
        print("stopped; the same command continues", file=sys.stderr)
        sys.exit(128 + signal.Signals(result.interrupted))


def _align(output: Path, scale: Scale, seed: int, results: dict[str, Any]) -> dict[str, Any]:
    """Go on with the model and return what came of it."""
    accuracies = {task: row["accuracy"] for task, row in best_accuracies(results).items()}
    learned = [task for task, share in accuracies.items() if share >= LEARNED]
    tasks = align.rewarded(accuracies), learned or [*accuracies]
    problems = {task: held_out(task, scale.test_problems, seed) for task in scale.tasks}
    decoding = {"max_new_tokens": scale.max_new_tokens, "block_length": scale.block_length}
    size = align.QUICK if results["settings"]["quick"] else align.FULL
    for recipe, title, trainer in align.recipes(output, size, seed, tasks, problems, decoding):
        _train(recipe, title, trainer)
    right = sum(accuracies[task] * len(problems[task]) for task in tasks[0])
    return align.figures(output, tasks, right / sum(len(problems[task]) for task in tasks[0]))


def _measure_text(output: Path, data: dict[str, Shards], scale: Scale) -> dict[str, Any]:
    """Return bits per byte of the pre-trained model and of the n-gram baselines on all held-out text."""
    model, _ = load_model(str(output / "pretrain"))
    shards = data["text-validation"]
    bound = validation_bound(model, shards, scale.window, None, 64)
    baselines = ngram_baselines(data["text-train"], shards)
    nats = {"model": bound, "unigram": baselines.unigram, "bigram": baselines.bigram}
    metrics = read_metrics(output / "pretrain" / "metrics.jsonl")
    exact = None
    if LIKELIHOOD_WINDOWS:
        exact = asdict(text_likelihood(model, shards, scale.window, LIKELIHOOD_WINDOWS, scale.block_length))
    return {
        "likelihood": exact,
        "bits_per_byte": {k: round(bits_per_byte(v, shards.tokens, shards.bytes), 4) for k, v in nats.items()},
        "nats_per_token": {k: round(v, 4) for k, v in nats.items()},
        "parameters": model.num_parameters(),
        "training_tokens": metrics[-1]["tokens"],
        "validation_bytes": shards.bytes,
        "bytes_per_token": round(shards.bytes / shards.tokens, 3),
    }


def _decoding(scale: Scale, tokenizer: Any) -> GenerationSettings:
    """Return settings of the paper's decoding, one token a pass."""
    return GenerationSettings(
        max_new_tokens=scale.max_new_tokens, block_length=scale.block_length, eos_token_id=tokenizer.eos_token_id
    )


def _measure_answers(output: Path, scale: Scale, seed: int, console: Console) -> dict[str, Any]:
    """Return accuracy and forward passes by task and steps per block, sample answers, choices, and one denoising."""
    model, tokenizer = load_model(str(output))
    problems = {task: held_out(task, scale.test_problems, seed) for task in scale.tasks}
    frontier: list[dict[str, Any]] = []
    samples: dict[str, list[dict[str, Any]]] = {}
    runs = [(steps, task) for steps in scale.steps_per_block for task in scale.tasks]
    for steps, task in track(runs, description="answering", console=console, disable=not console.is_terminal):
        if not console.is_terminal:
            print(f"answering: {task}, passes a block: {steps}", file=sys.stderr, flush=True)
        settings = replace(_decoding(scale, tokenizer), steps_per_block=steps)
        questions = [example.messages[:1] for example in problems[task]]
        answers = generate(model, questions, settings, tokenizer=tokenizer)
        texts = [show_ids(tokenizer, answer.ids) for answer in answers]
        right = [text == example.answer for text, example in zip(texts, problems[task], strict=True)]
        frontier.append(
            {
                "task": task,
                "steps_per_block": steps,
                "problems": len(right),
                **_rounded_accuracy(right),
                "forwards_per_token": round(sum(a.forwards for a in answers) / sum(len(a.ids) + 1 for a in answers), 3),
            }
        )
        if steps == max(scale.steps_per_block):
            samples[task] = [
                {"prompt": e.prompt, "expected": e.answer, "answer": t, "right": r, "forwards": a.forwards}
                for e, t, r, a in zip(problems[task], texts, right, answers, strict=True)
            ][:6]
    return {
        "frontier": frontier,
        "samples": samples,
        "choice": _measure_choices(model, tokenizer, scale, seed),
        "denoising": _record_denoising(model, tokenizer, scale, seed),
    }


def suggestions(results: dict[str, Any]) -> dict[str, Any]:
    """Return what the page of `illada serve` says of the model and offers: tasks that it does mostly right."""
    learned = {task: row["accuracy"] for task, row in best_accuracies(results).items() if row["accuracy"] >= LEARNED}
    offered = []
    for task in learned:
        if prompt := next((sample["prompt"] for sample in results["samples"][task] if sample["right"]), None):
            offered.append({"label": prompt if "\n" not in prompt else task.capitalize(), "text": prompt})
    done = ", ".join(f"{task} ({share:.0%} right)" for task, share in learned.items())
    about = f"Made by `illada demo` in minutes: it does {done} and little else." if done else "Made by `illada demo`."
    return {"about": about, "suggestions": offered}


def _rounded_accuracy(right: Sequence[bool]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in accuracy(right).items()}


def _measure_choices(model: Any, tokenizer: Any, scale: Scale, seed: int) -> dict[str, Any]:
    """Return the accuracy of both scorers on held-out library questions with four candidates."""
    choices = library_choices(scale.test_problems, seed)
    items = [Item(choice.prompt, list(choice.candidates), choice.answer) for choice in choices]
    results: dict[str, Any] = {"problems": len(items), "chance": 0.25}
    for method in ("confidence", "likelihood"):
        started = time.monotonic()
        scores = score_candidates(model, tokenizer, items, method, scale.likelihood_samples, seed, chat=True)
        right = right_choices(items, scores)
        results[method] = {**_rounded_accuracy(right), "seconds": round(time.monotonic() - started, 2)}
    return results


def record_steps(
    model: Any, tokenizer: Any, chat: list[dict[str, str]], settings: GenerationSettings
) -> tuple[str, list[dict[str, Any]]]:
    """Return the answer to a chat, and what stood there after each of its passes."""
    events: list[StepEvent] = []
    (answer,) = generate(model, [chat], settings, tokenizer=tokenizer, on_step=events.append)
    steps = [recorded(tokenizer, event, settings.eos_ids) for event in events]
    return show_ids(tokenizer, answer.ids), steps


def _record_denoising(model: Any, tokenizer: Any, scale: Scale, seed: int) -> dict[str, Any]:
    """Return every step of a right answer, of the task with the longest answers; a wrong one if none is right."""
    settings = _decoding(scale, tokenizer)
    recorded: list[dict[str, Any]] = []
    longest = [task for task in ("sudoku", "shift") if task in scale.tasks]
    for example in itertools.chain.from_iterable(held_out(task, 12, seed) for task in longest):
        text, steps = record_steps(model, tokenizer, example.messages[:1], settings)
        record = asdict(example) | {"expected": example.answer, "answer": text, "steps": steps}
        if text == example.answer:
            return record
        recorded.append(record)
    return recorded[0]


def _print_summary(output: Path, results: dict[str, Any]) -> None:
    bits = results["text"]["bits_per_byte"]
    lines = [
        "",
        f"held-out text     {bits['model']:.3f} bits/byte (bound)   unigram {bits['unigram']:.3f}   "
        f"bigram {bits['bigram']:.3f}",
        *(
            f"{task:<17} {row['accuracy']:6.1%} ± {row['standard_error']:.1%} of {row['problems']} held-out problems"
            for task, row in best_accuracies(results).items()
        ),
        f"library, 4 choices  confidence {results['choice']['confidence']['accuracy']:.1%}   "
        f"likelihood {results['choice']['likelihood']['accuracy']:.1%}   chance 25%",
        f"time              {results['seconds'] / 60:.1f} minutes",
        "",
        f"report            {output / 'report.html'}",
        f"talk to it        illada chat --model {output / 'model'} --block_length 16 --max_new_tokens 48",
        f"or on a page      illada serve --model {output / 'model'} --block_length 16 --max_new_tokens 48",
        f"continue text     illada generate --model {output / 'pretrain' / 'model'} --prompt 'import'",
    ]
    if results["settings"]["quick"]:
        lines.append("all seven tasks   make demo, without QUICK=1: a quarter of an hour")
    print("\n".join(lines))
