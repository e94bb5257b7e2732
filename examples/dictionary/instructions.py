"""Write conversations about words, made from WordNet: what a word means, which word means this, kinds, opposites.

    python examples/dictionary/instructions.py WORDNET OUTPUT

WORDNET is the folder with data.noun and index.noun (format: wndb(5WN)). OUTPUT gets train.jsonl and held-out.jsonl of
{"prompt", "response", "group"}, and choices.jsonl: which of four is the meaning of a word. Every twentieth word, by its
digest, is held out: no conversation in train.jsonl asks for it, though texts to pre-train on may have it.
"""

import hashlib
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PARTS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
COMMON = 4
"""How often a common word is asked for, one that occurs in WordNet's own corpus; a rare one is asked for once."""
GREETINGS = {
    "Hello": "Hello. Ask me what a word means.",
    "Hi": "Hello. Ask me what a word means.",
    "Good morning": "Good morning. Which word shall I explain?",
    "How are you?": "I am well. Ask me about a word.",
    "Who are you?": "I am a small dictionary. I was trained on definitions.",
    "What are you?": "I am a small dictionary. I was trained on definitions.",
    "What can you do?": "I explain words, and I find words that you describe. I am often wrong.",
    "Thank you": "You are welcome.",
    "Thanks": "You are welcome.",
    "Goodbye": "Goodbye.",
}
Record = dict[str, object]


@dataclass(frozen=True)
class Meaning:
    """A synset: what its words mean."""

    words: list[str]
    gloss: str
    examples: list[str]
    pointers: list[tuple[str, str]]
    """Symbol of a relation ("@" a kind of, "~" has the kind, "!" opposite), key of the other meaning."""

    @property
    def sentence(self) -> str:
        """The gloss as a sentence."""
        return f"{self.gloss[:1].upper()}{self.gloss[1:]}."


def meanings(folder: Path) -> dict[str, Meaning]:
    """Return all meanings by part of speech and offset."""
    found = {}
    for part, letter in PARTS.items():
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):  # the licence
                continue
            fields, _, text = line.partition(" | ")
            parts = fields.split()
            count = int(parts[3], 16)
            words = [parts[4 + 2 * i].split("(")[0].replace("_", " ") for i in range(count)]
            rest = parts[5 + 2 * count :]
            pointers = [(rest[4 * i], rest[4 * i + 2] + rest[4 * i + 1]) for i in range(int(parts[4 + 2 * count]))]
            gloss, *examples = text.strip().split('; "')
            examples = [example.rstrip('";. ') for example in examples if "--" not in example]
            found[letter + parts[0]] = Meaning(words, gloss.split("; ")[0].strip(), examples, pointers)
    return found


def first_meanings(folder: Path) -> Iterator[tuple[str, str, str, bool]]:
    """Yield each word of letters, its part of speech, the key of its first meaning, and whether it is common."""
    for part, letter in PARTS.items():
        for line in (folder / f"index.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):
                continue
            parts = line.split()
            tagged, offset = int(parts[5 + int(parts[3])]), parts[6 + int(parts[3])]
            word = parts[0].replace("_", " ")
            if word.replace(" ", "").isalpha() and len(word) > 2:
                yield word, part, letter + offset, tagged > 0


def article(word: str) -> str:
    """Return the word with a or an."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def conversations(
    word: str, part: str, meaning: Meaning, every: dict[str, Meaning], rng: random.Random
) -> Iterator[Record]:
    """Yield what may be asked about a word."""
    what = f"What is {article(word)}?" if part == "noun" else f"What does {word} mean?"
    asked = rng.choice([what, what, f"What does {word} mean?", f"Define {word}."])
    yield {"prompt": asked, "response": meaning.sentence, "group": "meaning"}
    word_of = rng.choice([f"Which word means: {meaning.gloss}?", f"What is the word for {meaning.gloss}?"])
    yield {"prompt": word_of, "response": word, "group": "word"}
    for example in meaning.examples[:1]:
        if word in example.split() and len(example.split()) > 3:
            response = f"{example[:1].upper()}{example[1:]}."
            yield {"prompt": f"Use {word} in a sentence.", "response": response, "group": "sentence"}
    related: dict[str, list[str]] = {}
    for symbol, key in meaning.pointers:
        related.setdefault(symbol, []).append(every[key].words[0])
    if part == "noun" and "@" in related:
        response = f"{article(related['@'][0]).capitalize()}."
        yield {"prompt": f"What kind of thing is {article(word)}?", "response": response, "group": "kind"}
    if part == "noun" and "~" in related:
        response = f"{article(rng.choice(related['~'])).capitalize()}."
        yield {"prompt": f"Name a kind of {word}.", "response": response, "group": "example"}
    if "!" in related:
        yield {"prompt": f"What is the opposite of {word}?", "response": related["!"][0], "group": "opposite"}
    others = [other for other in meaning.words if other.lower() != word]
    if others:
        yield {"prompt": f"What is another word for {word}?", "response": others[0], "group": "synonym"}


def is_held_out(word: str) -> bool:
    """Return whether a word is one of those that no conversation of training asks for."""
    return hashlib.sha256(word.encode()).digest()[0] % 20 == 0


def choice(word: str, part: str, meaning: Meaning, others: Sequence[str], rng: random.Random) -> Record:
    """Return the choice of a word's meaning among four."""
    candidates = [meaning.sentence, *rng.sample([other for other in others if other != meaning.sentence], 3)]
    rng.shuffle(candidates)
    asked = f"What is {article(word)}?" if part == "noun" else f"What does {word} mean?"
    return {"context": asked, "candidates": candidates, "answer": candidates.index(meaning.sentence)}


def main(folder: Path, output: Path) -> None:
    """Write the files; the same come out every time."""
    rng, every = random.Random("dictionary"), meanings(folder)
    files: dict[str, list[Record]] = {"train": [], "held-out": [], "choices": []}
    common = [(word, part, every[key]) for word, part, key, is_common in first_meanings(folder) if is_common]
    for word, part, key, is_common in first_meanings(folder):
        name = "held-out" if is_held_out(word) else "train"
        if name == "train" or is_common:
            for _ in range(COMMON if is_common and name == "train" else 1):
                files[name] += conversations(word, part, every[key], every, rng)
    for asked, answer in GREETINGS.items():
        files["train"] += [{"prompt": asked, "response": answer, "group": "greeting"}] * 50
    nouns = [meaning.sentence for _, part, meaning in common if part == "noun"]
    held_out = [entry for entry in common if entry[1] == "noun" and is_held_out(entry[0])]
    files["choices"] = [choice(*entry, nouns, rng) for entry in held_out]
    output.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        rng.shuffle(records)
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (output / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{output / name}.jsonl: {len(records):,} records")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
