"""Every command that README and docs show is one that the command line takes; the README's own road is walked."""

import functools
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from illada import cli
from illada.training.recipe import Recipe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED, INLINE = (
    re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL),
    re.compile(r"`((?:eval \"\$\()?illada [a-z][^`]*)`"),
)
BEFORE = re.compile(r"(?:^|do |eval \"\$\(|-m |evaluate: )illada (?=[a-z])")
# What stands for itself in a line with "...", or in a line of prose that names an option only.
REST = {
    "tokenizer": "texts --output tok",
    "prepare": "texts --tokenizer tok --output data",
    "pretrain": "tiny-cpu-pretrain --data.train data --output run",
    "sft": "tiny-cpu-sft --model.start model --data.train data --output run",
    "dpo": "dpo --model.start model --data.train data --output run",
    "rl": "rl --model.start model --rl.tasks sorting --output run",
    "distill": "distill --model.start model --distill.tasks sorting --distill.problems 9 --output run",
    "estimate": "tiny-cpu-pretrain --data.train data --output run",
    "generate": "--model model --prompt text",
    "chat": "--model model",
    "score": "--model model --context a --candidates b",
    "serve": "--model model",
    "eval": "--model model --output out",
    "export": "--model model --output out",
    "convert": "--from model --output out",
    "report": "run",
    "compare": "a b",
    "bench": "",
    "completion": "bash",
    "demo": "",
    "batch": "in.jsonl --model model --output out.jsonl",
    "verify": "folder",
    "doctor": "",
}


def commands(page: Path) -> list[list[str]]:
    """Return the words of every command on a page, without `illada` and without what stands around it."""
    text = page.read_text()
    lines = [line for block in FENCED.findall(text) for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    lines += [" ".join(words.split()) for words in INLINE.findall(FENCED.sub("", text))]
    found = []
    for line in lines:
        if match := BEFORE.search(line):
            words = shlex.split(re.split(r"; done|\)\"$|\|fast", line[match.end() :])[0], comments=True)
            # Prose may name an option without its value.
            found.append([word for word in words if word not in ("...", "--paper" if words[-1] == "--paper" else "")])
    return found


ALL = [(page.relative_to(ROOT).as_posix(), words) for page in PAGES for words in commands(page)]


def completed(words: list[str]) -> list[str]:
    """Add what a shortened command leaves out."""
    name, given = words[0], {word.partition("=")[0] for word in words}
    rest = shlex.split(REST[name])
    bare = [word for i, word in enumerate(rest) if not word.startswith("-") and (i == 0 or rest[i - 1][:1] != "-")]
    options = [(word, rest[i + 1]) for i, word in enumerate(rest) if word.startswith("--")]
    if name == "eval" and "--run" in given:
        options = options[1:]
    if name == "eval" and not given & {"--paper", "--task_files", "--tasks"}:
        options.append(("--paper", "base"))
    if name in ("rl", "distill") and "--data.train" in given:
        options = [option for option in options if option[0] != f"--{name}.tasks"]
    if name in ("generate", "score") and "--file" in given:
        options = options[:1]
    if name == "pretrain" and "--model.start" in given:
        bare, options = [], [*options, ("--training.steps", "9")]
    elif name == "sft" and bare and "--training.epochs" in given:
        bare = []
    has_bare = len(words) > 1 and not words[1].startswith("-")
    more = [] if has_bare else bare
    return [name, *more, *words[1:], *(word for option in options if option[0] not in given for word in option)]


@pytest.fixture
def taken(monkeypatch, tmp_path):
    """Let commands be parsed and checked, and return instead of what they do the name of the command."""
    names = []

    def stub(command):
        @functools.wraps(command)
        def check(*words, **named):
            for value in (*words, *named.values()):
                if isinstance(value, Recipe):
                    value.check()
            names.append(command.__name__)

        return check

    tree = {
        name: {part: stub(function) for part, function in command.items()}
        if isinstance(command, dict)
        else stub(command)
        for name, command in cli.COMMANDS.items()
    }
    monkeypatch.setattr(cli, "COMMANDS", tree)
    monkeypatch.chdir(tmp_path)
    for name in ("recipe.yaml", "chat.yaml"):  # the reader's own
        Path(name).write_text("model: {preset: 1m}\ntraining: {steps: 9}\noutput: run\n")
    return names


@pytest.mark.parametrize(("page", "words"), ALL, ids=[f"{page}: {' '.join(words)[:60]}" for page, words in ALL])
def test_a_command_of_a_page_is_taken(page, words, taken):
    if "--help" in words:
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.main(words)
    else:
        cli.main(completed(words))
        assert len(taken) == 1


# A run of seconds, and answers of two blocks.
TRAINING = "--data.window 32 --training.steps 2 --training.decay_steps 1 --training.warmup_steps 1"
SHAPE = "--model.hidden_size 32 --model.intermediate_size 48 --model.num_hidden_layers 2"
SHORT = {
    "tokenizer": "--vocab_size 300",
    "pretrain": f"{SHAPE} {TRAINING}",
    "sft": TRAINING,
    "dpo": f"{TRAINING} --training.samples_per_step 4",
    "rl": f"{TRAINING} --data.window 96 --training.samples_per_step 4 --rl.answers 2 --rl.inner_steps 1",
    "generate": "--max_new_tokens 8 --block_length 4",
    "chat": "--max_new_tokens 8 --block_length 4",
    "score": "--samples 2",
}
TESTED_ELSEWHERE = {"demo", "distill", "eval", "compare", "serve", "bench", "completion", "convert"}


def test_the_road_of_the_readme_is_walked(tmp_path, monkeypatch, capsys):
    """Its commands in their order, shortened: from folders of text and chats to answers of a model of one's own."""
    for package in ("datatrove", "matplotlib", "peft", "torchao"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    for folder in ("corpus", "held-out", "web"):
        Path(folder).mkdir()
        Path(folder, "a.txt").write_text("import one as two; def three four five\n" * 200)
    chats = [{"prompt": f"Shift: {n}", "response": str(n + 1)} for n in range(200)]
    Path("chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    pairs = [{"prompt": f"Shift: {n}", "chosen": str(n + 1), "rejected": str(n)} for n in range(20)]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    Path("questions.jsonl").write_text(json.dumps({"context": "one", "candidates": [" two", " three"], "answer": 0}))
    Path("schema.json").write_text(json.dumps({"enum": ["a", 1]}))
    Path("runs").mkdir()
    Path("runs/demo").symlink_to(tmp_path / "runs/chat")
    Path("runs/other").symlink_to(tmp_path / "runs/base")
    body = {"model": "demo", "messages": [{"role": "user", "content": "Shift: 1"}], "max_tokens": 8}
    asked = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    Path("requests.jsonl").write_text(json.dumps(asked) + "\n")
    places = {"model": "runs/chat/model", "data": "data/chat", "FOLDER": "runs/base"}
    walked = []
    for number, words in enumerate(commands(ROOT / "README.md")):
        if words[0] in TESTED_ELSEWHERE or {"ray", "1b-pretrain"} & {*words} or any("GSAI" in word for word in words):
            continue
        more = SHORT.get(words[0], "").split()
        if words[0] == "sft" and words[1] != "tiny-cpu-sft":
            more += ["--output", f"runs/{number}"]
        cli.main([*(places.get(word, word) for word in completed(words)), *more])
        walked.append(words[0])
    assert {*walked} >= {*SHORT, "prepare", "estimate", "report", "doctor"}
    said = capsys.readouterr().out
    assert said.count("next: ") >= 6


def test_the_commands_are_found():
    assert len(ALL) > 80
    assert {words[0] for _, words in ALL} >= cli.COMMANDS.keys() - {"demo"}
