"""Fetch real English from Debian packages and write it as texts to train on and texts held out.

    python studies/texts.py

Needs Debian or Ubuntu with `apt-get` and `dpkg-deb`; the packages are checked against the digests below. Nothing that
is fetched or written here belongs into the repository.

`glosses`: the entries of WordNet, one document each: "dwarf (noun): a plant or animal that is atypically small."
`definitions`: the entries of the GNU Collaborative International Dictionary of English.
`verses`: the chapters of the King James Bible.

`glosses` also gets choices-short.jsonl and choices-long.jsonl: which of four last words, or second halves, goes on with
a held-out entry.
"""

import argparse
import gzip
import hashlib
import json
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).with_name("data")
PACKAGES = {
    "wordnet-base": "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    "dict-gcide": "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
    "bible-kjv-text": "d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a",
    "bible-kjv": "75a49c032a6efa9faa2beb4a9acb70974380122906329d0e100de36cc88ff02d",
}
"""Debian packages and the SHA-256 digests of the versions measured: 1:3.0-37, 0.48.5+nmu2 and 4.38 (on amd64)."""
KINDS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
HELD_OUT = 20
"""Every twentieth document, by its digest, is held out, so that an entry stays on its side whatever is added."""


def fetch(folder: Path) -> Path:
    """Download and unpack the packages below the folder; return where their files lie."""
    files = folder / "files"
    for package, digest in PACKAGES.items():
        if (files / package).is_dir():
            continue
        files.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True)
        (found,) = folder.glob(f"{package}_*.deb")
        if hashlib.sha256(found.read_bytes()).hexdigest() != digest:
            raise SystemExit(f"{found} is another version than the one measured: take it away, or accept other numbers")
        subprocess.run(["dpkg-deb", "-x", found, files / f"{package}.part"], check=True)
        (files / f"{package}.part").rename(files / package)
    return files


def glosses(files: Path) -> Iterator[str]:
    """Yield an entry of WordNet a document: its words, its kind, its gloss with examples (format: wndb(5WN))."""
    for part, kind in KINDS.items():
        lines = (files / "wordnet-base/usr/share/wordnet" / f"data.{part}").read_text(encoding="utf-8").splitlines()
        for line in lines:
            if line.startswith(" "):  # the licence
                continue
            fields, _, gloss = line.partition(" | ")
            parts = fields.split()
            words = [parts[4 + 2 * i].split("(")[0].replace("_", " ") for i in range(int(parts[3], 16))]
            yield f"{', '.join(words)} ({kind}): {gloss.strip()}."


def definitions(files: Path) -> Iterator[str]:
    """Yield an entry of the dictionary a document, without pronunciation, origin, sources and marks of references."""
    text = gzip.decompress((files / "dict-gcide/usr/share/dictd/gcide.dict.dz").read_bytes()).decode("utf-8", "replace")
    for lines in re.split(r"\n\n(?=\S)", text):
        entry = " ".join(lines.split())
        for pattern in (r"\\[^\\]+\\", r"\([^()]*\[[^()]*\)?", r"\[[^\[\]]*\]", r"\[[^\[\]]*\]"):
            entry = re.sub(r"\s*" + pattern, "", entry)
        entry = re.sub(r"[{}]", "", entry)
        if 40 <= len(entry) <= 2000 and not entry.startswith("00-"):
            yield entry


def verses(files: Path) -> Iterator[str]:
    """Yield a chapter of the King James Bible a document, without its numbers; the package's own program reads it."""
    command = [files / "bible-kjv/usr/bin/bible", "-f", "-p", files / "bible-kjv-text/usr/lib", "ge1:1-re22:21"]
    lines = subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()
    chapters: dict[str, list[str]] = {}
    for line in lines:
        place, _, text = line.partition(" ")
        chapters.setdefault(place.partition(":")[0], []).append(text.strip())
    yield from (" ".join(chapter) for chapter in chapters.values())


def write_choices(folder: Path, count: int = 500) -> None:
    """Write choices among four endings of held-out entries of WordNet, of a word and of half an entry."""
    held_out = (folder / "glosses" / "held-out.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [words for line in held_out if 12 <= len(words := json.loads(line)["text"].split()) <= 40]
    rng = random.Random("choices")
    for kind in ("short", "long"):
        places = [len(words) - 1 if kind == "short" else len(words) // 2 for words in texts]
        endings = [" ".join(words[place:]) for words, place in zip(texts, places, strict=True)]
        records = []
        for words, place, ending in list(zip(texts, places, endings, strict=True))[:count]:
            candidates = [ending, *rng.sample([other for other in endings if other != ending], 3)]
            rng.shuffle(candidates)
            records.append(
                {"context": " ".join(words[:place]), "candidates": candidates, "answer": candidates.index(ending)}
            )
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_if_new(folder / "glosses" / f"choices-{kind}.jsonl", lines)


def write_if_new(path: Path, text: str) -> None:
    """Write a file unless it has this text already: data prepared from it are known by its date."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def write(name: str, documents: Iterator[str], folder: Path) -> None:
    """Write the documents of a text, in the order of their digests, as NAME/train.jsonl and NAME/held-out.jsonl."""
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    by_digest = sorted((hashlib.sha256(text.encode()).digest(), text) for text in set(documents))
    for part, held in (("train", False), ("held-out", True)):
        chosen = [text for digest, text in by_digest if (digest[0] % HELD_OUT == 0) == held]
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in chosen)
        write_if_new(place / f"{part}.jsonl", lines)
        print(f"{place / part}.jsonl: {len(chosen):,} documents, {len(lines):,} characters")


def main() -> None:
    """Fetch, unpack and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER)
    folder = parser.parse_args().output
    files = fetch(folder)
    write("glosses", glosses(files), folder)
    write("definitions", definitions(files), folder)
    write("verses", verses(files), folder)
    write_choices(folder)


if __name__ == "__main__":
    main()
