"""Train a small dictionary that talks: real English, 6M parameters, some hours on two cores, minutes on a GPU.

    make dictionary                                # or: python examples/dictionary/make.py --output runs/dictionary
    illada chat --model runs/dictionary/model --block_length 32 --max_new_tokens 64

Everything is done by the product's own commands: a tokenizer for texts from Debian packages (WordNet, GCIDE, the King
James Bible: `studies/texts.py`), pre-training, fine-tuning on questions about words (`instructions.py`), and a report
with samples, likelihoods and a picture of a sentence forming. Interrupted, the same command continues.
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import illada
from illada.cli import main as main_of_illada
from illada.data.shards import Shards
from illada.demo.stages import record_steps
from illada.files import write_json
from illada.generation.optional.picture import draw_steps
from illada.generation.settings import GenerationSettings, settings_for
from illada.reporting import accuracy, aligned
from illada.scoring.optional.candidates import Item, right_choices, score_candidates
from illada.text.prompts import SLOT_SIGN, encode_template, show_ids
from illada.training.optional.likelihood import text_likelihood
from illada.training.optional.ngrams import ngram_baselines
from illada.training.validation import bits_per_byte

HERE = Path(__file__).parent
STUDIES = HERE.parents[1] / "studies"
TEXTS = ("glosses", "definitions", "verses")
WORDNET = Path("files", "wordnet-base", "usr", "share", "wordnet")
DECODING = GenerationSettings(block_length=32, max_new_tokens=64)
TALK = (
    *("Hello", "What is a dog?", "What is a river?", "Define happy.", "What does whisper mean?"),
    *("Which word means: a building where people live?", "What kind of thing is a violin?", "Name a kind of bird."),
    *("What is the opposite of cold?", "What is another word for big?", "Use walk in a sentence."),
)
"""What the report asks first; after these come words that no conversation of training asked for."""
TEMPLATES = ("A ___ is a person who ___ ___ ___.", "The ___ of a tree.", "And the LORD said unto ___, ___ ___ ___ ___.")
"""Texts to fill in; every ___ is a word of one token."""
GROUPS = ("kind", "opposite", "synonym", "word", "meaning")


def script(*words: object) -> None:
    """Run a program in Python; stop where it fails, with its exit code."""
    done = subprocess.run([sys.executable, *map(str, words)], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def command(*words: object) -> None:
    """Run a command of illada in this process; it exits where it fails."""
    print("illada", *words, file=sys.stderr)
    main_of_illada([str(word) for word in words])


def train(output: Path, data: Path, settings: list[str]) -> None:
    """Make data, tokenizer and model below the output, as far as they are not there."""
    if not all((data / text).is_dir() for text in TEXTS):
        script(STUDIES / "texts.py", "--output", data)
    if not (output / "chats" / "train.jsonl").is_file():
        script(HERE / "instructions.py", data / WORDNET, output / "chats")
    files = {part: [data / text / f"{part}.jsonl" for text in TEXTS] for part in ("train", "held-out")}
    tokenizer = output / "tokenizer"
    if not tokenizer.is_dir():
        command("tokenizer", *files["train"], "--output", tokenizer, "--vocab_size", 4096)
    for part, texts in files.items():
        command("prepare", *texts, "--tokenizer", tokenizer, "--output", output / "data" / f"text-{part}")
        chats = output / "chats" / f"{part}.jsonl"
        command("prepare", chats, "--tokenizer", tokenizer, "--output", output / "data" / f"chats-{part}")
    start: list[object] = []
    for name, kind in (("pretrain", "text"), ("sft", "chats")):
        train_on, held_out = output / "data" / f"{kind}-train", output / "data" / f"{kind}-held-out"
        data_words = ["--data.train", train_on, "--data.validation", held_out]
        command(name, HERE / f"{name}.yaml", *data_words, *start, "--output", output / name, *settings)
        start = ["--model.start", output / name / "model"]
    if not (output / "model").exists():
        (output / "model").symlink_to(Path("sft", "model"))


def measure(output: Path, windows: int, base: Any, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return what the base model makes of held-out text, and what the tuned one of words it was never asked for."""
    data = output / "data"
    held_out = Shards.open(data / "text-held-out")
    text = text_likelihood(base, held_out, 256, windows)
    baselines = ngram_baselines(Shards.open(data / "text-train"), held_out)
    figures: dict[str, Any] = {name: figure["mean"] for name, figure in text.figures.items()}
    for name, nats in (("unigram", baselines.unigram), ("bigram", baselines.bigram)):
        figures[name] = bits_per_byte(nats, held_out.tokens, held_out.bytes)
    items = [Item(c["context"], c["candidates"], c["answer"]) for c in records(output / "chats" / "choices.jsonl")]
    scores = score_candidates(model, tokenizer, items, "confidence", 1, 0, chat=True)
    right = right_choices(items, scores)
    answers = {}
    asked = records(output / "chats" / "held-out.jsonl")
    for group in GROUPS:
        own = list(itertools.islice((record for record in asked if record["group"] == group), 200))
        texts = ask(model, tokenizer, [record["prompt"] for record in own])
        answers[group] = accuracy([text == record["response"] for text, record in zip(texts, own, strict=True)])
    return {
        "parameters": model.num_parameters(),
        "bits_per_byte": figures,
        "windows": text.windows,
        "choice": {**accuracy(right), "questions": len(right)},
        "answers": answers,
    }


def records(file: Path) -> list[dict[str, Any]]:
    """Return the records of a file of lines."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def ask(model: Any, tokenizer: Any, questions: list[str]) -> list[str]:
    """Return the model's answers."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    found = illada.generate(model, chats, settings_for(model, DECODING), tokenizer=tokenizer)
    return [show_ids(tokenizer, answer.ids) for answer in found]


def talk(output: Path, base: Any, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return answers, texts filled in, and every step of one answer."""
    questions = [*TALK, *(record["context"] for record in records(output / "chats" / "choices.jsonl")[:10])]
    filled = []
    for template in TEMPLATES:
        ids = encode_template(tokenizer, template.replace(f" {SLOT_SIGN}", SLOT_SIGN), slot_tokens=1)
        filled.append(illada.infill(base, [ids], tokenizer=tokenizer)[0].text)
    chat = [{"role": "user", "content": "What is a river?"}]
    _, steps = record_steps(model, tokenizer, chat, settings_for(model, DECODING))
    return {
        "answers": [*zip(questions, ask(model, tokenizer, questions), strict=True)],
        "trained": len(TALK),
        "filled": [*zip(TEMPLATES, filled, strict=True)],
        "steps": steps,
    }


def report(output: Path, found: dict[str, Any], said: dict[str, Any]) -> str:
    """Return the report as Markdown, and draw its picture."""
    (output / "forming.png").write_bytes(draw_steps(said["steps"]))
    bits = found["bits_per_byte"]
    lines = [["bits per byte of held-out text", ""], *([name, f"{value:.3f}"] for name, value in bits.items())]
    groups = [["exact answers about words never asked for in training", "%"]]
    groups += [
        [name, f"{100 * r['accuracy']:.1f} ± {100 * r['standard_error']:.1f}"] for name, r in found["answers"].items()
    ]
    choice = found["choice"]
    answers = [f"- **{question}** {answer or '(nothing)'}" for question, answer in said["answers"]]
    return "\n".join(
        [
            f"# A dictionary of {found['parameters'] / 1e6:.1f}M parameters\n",
            "![An answer forming](forming.png)\n",
            "*What is a river? Each row is a forward pass; blue cells are committed, darker where it was surer.*\n",
            "## It says\n",
            *answers[: said["trained"]],
            "\nOf words that no conversation of training asked for (the texts before may have had them):\n",
            *answers[said["trained"] :],
            "\nIt fills in:\n",
            *(f"- {template} → {text}" for template, text in said["filled"]),
            "\n## It measures\n",
            aligned(lines),
            f"\nbound and path (exact): of {found['windows']} windows of 256 tokens; n-grams: of all held-out text.\n",
            f"The meaning of a word it was never asked for, among four: {100 * choice['accuracy']:.1f} ± "
            f"{100 * choice['standard_error']:.1f} % of {choice['questions']} by confidence (chance 25 %).\n",
            aligned(groups),
            "\n## It cannot\n",
            "know: what it says about rare words reads like a definition and is mostly of another thing. It cannot "
            "count, reason, or keep to a subject for more than a sentence, and knows nothing of what was said before.",
        ]
    )


def main() -> None:
    """Train, measure and write report.md; what follows `--` goes to both trainings: `-- --training.device cuda`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/dictionary"))
    parser.add_argument("--data", type=Path, default=STUDIES / "data", help="folder of the texts, fetched if missing")
    parser.add_argument("--windows", type=int, default=64, help="windows of held-out text to measure")
    parser.add_argument("settings", nargs="*", help="settings of both trainings, behind --")
    options = parser.parse_args()
    train(options.output, options.data, options.settings)
    base, _ = illada.load_model(str(options.output / "pretrain" / "model"))
    model, tokenizer = illada.load_model(str(options.output / "model"))
    found = measure(options.output, options.windows, base, model, tokenizer)
    said = talk(options.output, base, model, tokenizer)
    write_json(options.output / "results.json", {**found, **said})
    text = report(options.output, found, said)
    (options.output / "report.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
