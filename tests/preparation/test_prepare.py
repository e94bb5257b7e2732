import gzip
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from illada.data.shards import Shards
from illada.errors import IlladaError
from illada.folders import SUMS, damage, read_sums
from illada.preparation import executors
from illada.preparation import prepare as preparing
from illada.preparation import readers as reading
from illada.preparation.options import PATTERNS, PrepareSettings
from illada.preparation.train_tokenizer import train_tokenizer, train_tokenizer_from_files
from illada.text.chat import encode_conversation
from illada.text.tokenizer import encode_texts, load_tokenizer, tokenizer_sha256


def prepare(*arguments, **settings):
    return preparing.prepare(PrepareSettings(*arguments, **settings))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["some words of text, some other words\n"] * 9, 290).save_pretrained(folder)
    return str(folder)


def texts(shards: Shards) -> list[str]:
    """What the documents say, after checking that each is <bos> … <eos>."""
    tokenizer = load_tokenizer(shards.path / "tokenizer")
    found = []
    for i in range(shards.documents):
        start, end, prompt = shards.document_span(i)
        ids = shards.read(start, end - start).tolist()
        assert (ids[0], ids[-1], prompt) == (0, 2, 0)
        assert not set(ids[1:-1]) & set(range(8))
        found.append(tokenizer.decode(ids[1:-1]))
    return found


def content(folder: Path) -> dict[str, bytes]:
    files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    index = json.loads(files["index.json"])
    del index["provenance"]["date"]
    sums = re.sub(rb"\w+  index.json\n", b"", files[SUMS])
    return files | {"index.json": json.dumps(index).encode(), SUMS: sums}


def odd(shards: Shards) -> dict[str, int]:
    return {name: count for name, count in shards.index["odd"].items() if count}


def write_jsonl(path: Path, *records: object) -> None:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))


def test_every_kind_of_file_in_a_folder(tmp_path, tokenizer_folder):
    source = tmp_path / "in"
    (source / "sub").mkdir(parents=True)
    (source / ".hidden").mkdir()
    (source / ".hidden" / "x.txt").write_text("hidden")
    (source / "a.txt").write_bytes(b"\xef\xbb\xbffirst\r\n <|eos|> text\n")
    (source / "b.txt").write_bytes(b"broken \xff\xfe caf\xc3")
    (source / "c.md").write_text(" \n\t")
    (source / "d.jsonl").write_text('{"text": "one"}\n\n{"text": ""}\nnot json\n{"text": 5}\n{"text": "two \\ud800"}')
    with gzip.open(source / "e.jsonl.gz", "wt") as file:
        file.write('{"text": "zipped"}\n')
    pq.write_table(pa.table({"n": [1, 2], "text": ["row one", "row two"]}), source / "sub" / "f.parquet")
    (source / "g.bin").write_text("not text")
    (source / "sub" / "skipped.txt").write_text("excluded")
    shards = prepare([str(source)], str(tmp_path / "out"), tokenizer_folder, exclude=["skip*"])
    expected = [
        "first\r\n <|eos|> text\n",
        "broken \ufffd\ufffd caf\ufffd",
        "one",
        "two \ufffd",
        "zipped",
        "row one",
        "row two",
    ]
    assert texts(shards) == expected
    assert shards.bytes == sum(len(text.encode()) for text in expected)
    assert odd(shards) == {
        "broken_utf8_documents": 2,
        "replaced_characters": 4,
        "empty_documents": 2,
        "unusable_records": 2,
    }
    assert shards.tokenizer_sha256 == tokenizer_sha256(load_tokenizer(tokenizer_folder))
    assert shards.vocab_size == len(load_tokenizer(tokenizer_folder))
    assert not (tmp_path / "out" / "work").exists()


def test_broken_utf8_in_parquet_is_replaced(tmp_path, tokenizer_folder):
    text = pa.array([b"fine", b"bro\xffken", None], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": text.dictionary_encode()}), tmp_path / "a.parquet")
    shards = prepare([str(tmp_path / "a.parquet")], str(tmp_path / "out"), tokenizer_folder)
    assert texts(shards) == ["fine", "bro\ufffdken"]
    assert odd(shards) == {"broken_utf8_documents": 1, "replaced_characters": 1, "unusable_records": 1}


line = st.text("ab \r\ufffdé漢", max_size=12)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(line, max_size=8), st.booleans(), st.integers(1, 9), st.sampled_from(["line", "jsonl"]))
def test_a_file_may_be_divided_anywhere(tmp_path_factory, lines, newline_at_end, unit_bytes, kind):
    path = tmp_path_factory.mktemp("divide") / ("a.txt" if kind == "line" else "a.jsonl")
    rows = lines if kind == "line" else [json.dumps({"text": text}, ensure_ascii=False) for text in lines]
    path.write_bytes(("\n".join(rows) + "\n" * newline_at_end).encode())
    options = reading.Options(documents="line")
    (file,) = reading.find_files([str(path)], PATTERNS)
    units = reading.divide(file, options, unit_bytes)
    assert len(units) == max(1, -(-file.size // unit_bytes))
    found = [piece.text for unit in units for piece in reading.read_unit(unit, options, reading.ReadStats())]
    wanted = [text[:-1] if kind == "line" and text.endswith("\r") and (i + 1 < len(lines) or newline_at_end) else text
              for i, text in enumerate(lines)]  # fmt: skip
    assert found == [text for text in wanted if text.strip()]


def pieces(text: str, chunk: int, limit: int) -> tuple[list[reading.Piece], reading.ReadStats]:
    stats = reading.ReadStats()
    chunks = (text[i : i + chunk] for i in range(0, len(text), chunk))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "PIECE_CHARACTERS", limit)
        return list(reading._pieces(chunks, "x", reading.Options(), stats)), stats


# Words of at most 4 and gaps of at most 3 characters: the last eighth of 56 characters holds a gap.
word = st.tuples(st.sampled_from(["some", "of", "text", "漢", "1'"]), st.sampled_from([" ", "   ", "\n\n\n", "\r\n"]))


@pytest.fixture(scope="session")
def merging():
    """A tokenizer that has learned these words and gaps, so that a cut in the wrong place changes the ids."""
    return train_tokenizer(["some of text   some of text\n\n\nsome\r\nof\r\ntext   of some\n\n\n"] * 9, 300)


@pytest.mark.slow
@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(word.map("".join), min_size=20, max_size=80).map("".join), st.integers(56, 80), st.integers(1, 90))
def test_pieces_of_a_huge_document_give_the_ids_of_the_whole(merging, text, limit, chunk):
    found, stats = pieces(text, chunk, limit)
    assert "".join(piece.text for piece in found) == text
    assert all(len(piece.text) <= limit for piece in found)
    assert [piece.last for piece in found] == [False] * (len(found) - 1) + [True]
    assert stats.split_documents == (len(found) > 1)
    whole = encode_texts(merging, [text])[0]
    assert [i for ids in encode_texts(merging, [piece.text for piece in found]) for i in ids] == whole


def test_a_document_without_spaces_is_cut_and_one_of_spaces_only_is_empty():
    assert [piece.text for piece in pieces("x" * 25, 7, 10)[0]] == ["x" * 10, "x" * 10, "x" * 5]
    found, stats = pieces(" " * 99, 7, 10)
    assert (found, stats.empty_documents, stats.split_documents) == ([], 1, 0)
    assert "".join(piece.text for piece in pieces(" " * 99 + "x  ", 7, 10)[0]).strip() == "x"


def test_a_huge_document_stays_one(tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.setattr(reading, "_CHUNK", 50)
    monkeypatch.setattr(reading, "PIECE_CHARACTERS", 100)
    text = "some words of text " * 40
    (tmp_path / "a.txt").write_text(text)
    write_jsonl(tmp_path / "b.jsonl", {"text": text + "é"}, {"text": "short"})
    shards = prepare([str(tmp_path)], str(tmp_path / "out"), tokenizer_folder)
    assert texts(shards) == [text, text + "é", "short"]
    assert odd(shards) == {"split_documents": 2}
    assert shards.bytes == 2 * len(text) + 2 + 5


CHAT = [
    {"messages": [{"role": "user", "content": "some?"}, {"role": "assistant", "content": "words"}] * 2},
    {"prompt": "other", "response": "text <|eos|>"},
]


@pytest.mark.parametrize("split", [False, True])
def test_conversations(tmp_path, tokenizer_folder, split):
    bad = {"messages": [{"role": "assistant", "content": "no"}]}
    write_jsonl(
        tmp_path / "a.jsonl", CHAT[0], bad, {"prompt": 1, "response": "x"}, {"prompt": "empty", "response": " "}
    )
    pq.write_table(pa.Table.from_pylist(CHAT[1:]), tmp_path / "b.parquet")
    pq.write_table(pa.Table.from_pylist(CHAT[:1]), tmp_path / "c.parquet")
    shards = prepare([str(tmp_path)], str(tmp_path / "out"), tokenizer_folder, kind="chat", split_turns=split)
    tokenizer, first = load_tokenizer(tokenizer_folder), CHAT[0]["messages"]
    second = [{"role": "user", "content": "other"}, {"role": "assistant", "content": "text <|eos|>"}]
    conversations = [first[:2], first, second, first[:2], first] if split else [first, second, first]
    assert shards.kind == "chat"
    assert shards.documents == len(conversations)
    for i, messages in enumerate(conversations):
        start, end, prompt = shards.document_span(i)
        assert (shards.read(start, end - start).tolist(), prompt) == encode_conversation(tokenizer, messages)
    assert shards.bytes == sum(len(m["content"]) for messages in conversations for m in messages)
    assert odd(shards) == {"empty_documents": 1, "unusable_records": 2}


def corpus(folder: Path) -> Path:
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"some text number {i} " * 5)
    write_jsonl(folder / "lines.jsonl", *({"text": f"line {i}"} for i in range(20)))
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, tokenizer_folder):
    """The corpus prepared without interruption, in several tasks and shards."""
    root = tmp_path_factory.mktemp("prepared")
    settings = {"sources": [str(corpus(root / "in"))], "tokenizer": tokenizer_folder}
    settings |= {"task_bytes": 150, "tokens_per_shard": 100}
    shards = prepare(output=str(root / "out"), **settings)
    assert len(shards.index["shards"]) > 6
    assert texts(shards) == [f"some text number {i} " * 5 for i in range(6)] + [f"line {i}" for i in range(20)]
    return settings, content(root / "out")


@pytest.fixture(scope="session")
def prepared_pairs(tmp_path_factory, tokenizer_folder):
    """Preference pairs prepared without interruption, in several tasks and shards, some ending inside a pair."""
    root = tmp_path_factory.mktemp("prepared")
    write_jsonl(root / "pairs.jsonl", *({"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(30)))
    settings = {"sources": [str(root / "pairs.jsonl")], "tokenizer": tokenizer_folder, "kind": "preference"}
    settings |= {"task_bytes": 150, "tokens_per_shard": 20}
    shards = prepare(output=str(root / "out"), **settings)
    assert shards.documents == 60
    assert any(shard["documents"] % 2 for shard in shards.index["shards"])
    return settings, content(root / "out")


@pytest.mark.slow
def test_a_killed_worker_is_one_clear_line(tmp_path, prepared, monkeypatch):
    settings, _ = prepared
    # Unpickled in the worker, the settings of a step call os._exit(9).
    monkeypatch.setattr(PrepareSettings, "__reduce__", lambda self: (os._exit, (9,)), raising=False)
    with pytest.raises(IlladaError, match="a worker was killed"):
        prepare(output=str(tmp_path / "out"), workers=2, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["prepared", "prepared_pairs"])
def test_the_number_of_workers_changes_nothing(tmp_path, what, request):
    settings, expected = request.getfixturevalue(what)
    prepare(output=str(tmp_path / "out"), workers=2, **settings)
    assert content(tmp_path / "out") == expected


KILLED = """
import json, os, signal, sys
from illada.preparation import shard_writer
from illada.preparation import prepare
from illada.preparation.options import PrepareSettings

def die_at_call_9(original):
    calls = []
    def call(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)
    return call

def finish(output, original=prepare.finish):
    os.replace = die_at_call_9(os.replace)
    return original(output)

if sys.argv[1] == "document":
    shard_writer.ShardWriter.end_document = die_at_call_9(shard_writer.ShardWriter.end_document)
else:
    prepare.finish = finish
prepare.prepare(PrepareSettings(**json.loads(sys.argv[2])))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "where"), [("prepared", "document"), ("prepared", "finish"), ("prepared_pairs", "document")]
)
def test_a_killed_preparation_continues(tmp_path, what, where, monkeypatch, request):
    settings, expected = request.getfixturevalue(what)
    settings = {**settings, "output": str(tmp_path / "out")}
    run = subprocess.run([sys.executable, "-c", KILLED, where, json.dumps(settings)], capture_output=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    with pytest.raises(IlladaError, match="interrupted"):
        Shards.open(tmp_path / "out")
    finished = list((tmp_path / "out" / "work").glob("task-*[0-9]/summary.json"))
    assert finished
    with pytest.raises(IlladaError, match="holds another preparation: add_eos was True, now False"):
        prepare(**settings, add_eos=False)
    made = {file.parent.name: file.stat().st_mtime_ns for file in finished}
    read = []
    original = preparing.finish

    def finish(output: str) -> Shards:
        for name, time in made.items():
            summary = tmp_path / "out" / "work" / name / "summary.json"
            read.append(summary.stat().st_mtime_ns == time)
        return original(output)

    monkeypatch.setattr(preparing, "finish", finish)
    prepare(**settings)
    assert content(tmp_path / "out") == expected
    assert read == [True] * len(made)  # finished tasks were not done again


def test_a_finished_preparation_returns_at_once_and_another_is_refused(tmp_path, prepared, monkeypatch):
    settings, expected = prepared
    settings = {**settings, "output": str(tmp_path / "out")}
    prepare(**settings)
    monkeypatch.setattr(preparing, "run_locally", None)
    prepare(**settings)
    assert content(tmp_path / "out") == expected
    with pytest.raises(IlladaError, match="text_field was text, now body"):
        prepare(**settings, text_field="body")
    source = Path(settings["sources"][0], "0.txt")
    os.utime(source, ns=(source.stat().st_atime_ns, source.stat().st_mtime_ns + 1))
    try:
        with pytest.raises(IlladaError, match="source_fingerprint"):
            prepare(**settings)
    finally:
        os.utime(source, ns=(source.stat().st_atime_ns, source.stat().st_mtime_ns - 1))


def _bad(path: Path, name: str, content: bytes = b"") -> str:
    (path / name).write_bytes(content)
    return str(path / name)


@pytest.mark.parametrize(
    ("source", "keywords", "message"),
    [
        (lambda p: str(p / "nowhere"), {}, "no such file or folder: .*nowhere"),
        (str, {}, "holds no file that matches"),
        (lambda p: _bad(p, "a.json"), {}, "name it .jsonl"),
        (
            lambda p: _bad(p, "a.jsonl", b"{}\n[1]\n"),
            {},
            "a.jsonl: none of its 2 records is usable; line 1: no field 'text'",
        ),
        (lambda p: _bad(p, "a.jsonl", b"\n{oops\n"), {}, "a.jsonl: none of its 1 records is usable; line 2: not JSON"),
        (
            lambda p: _bad(p, "a.jsonl", b"{\n" * 9),
            {"task_bytes": 4},
            "a.jsonl: none of its 9 records is usable; line 1",
        ),
        (lambda p: _bad(p, "a.txt", b"  "), {}, r"nothing to keep .*\(1 empty documents\)"),
        (lambda p: _bad(p, "a.txt.gz", b"not gzip"), {}, "cannot read .*a.txt.gz"),
        (lambda p: _bad(p, "b.txt.gz", gzip.compress(b"some text" * 99)[:-9]), {}, "cannot read .*b.txt.gz"),
        (lambda p: _bad(p, "a.parquet", b"not parquet"), {}, "cannot read .*a.parquet"),
        (lambda p: _bad(p, "a.txt", b"text"), {"kind": "chat"}, "is plain text"),
        (lambda p: _bad(p, "a.txt", b"text"), {"split_turns": True}, "kind chat"),
        (lambda p: _bad(p, "a.txt", b"text"), {"workers": 0}, "workers"),
        (lambda p: _bad(p, "a.txt", b"text"), {"tokenizer": "nowhere"}, "no tokenizer folder at nowhere"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, tokenizer_folder, capfd, source, keywords, message):
    (tmp_path / "in").mkdir()
    with pytest.raises(IlladaError, match=message) as caught:
        prepare([source(tmp_path / "in")], str(tmp_path / "out"), **{"tokenizer": tokenizer_folder} | keywords)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    if "no such" in message:
        assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_ours_is_refused(tmp_path, tokenizer_folder):
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(IlladaError, match="is not empty"):
        prepare([str(tmp_path / "a.txt")], str(tmp_path), tokenizer_folder)
    assert (tmp_path / "a.txt").read_text() == "some text"


# A full disk


def full(*_, **__):
    raise OSError(28, "No space left on device")


def full_after_half(self, folder, **_):
    """As the library in Rust does it, which names the cause in its text only."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "tokenizer.json").write_text("{")
    raise Exception("No space left on device (os error 28)")


def test_a_tokenizer_that_does_not_fit_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one two three")
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full_after_half)
    with pytest.raises(IlladaError, match=r"no room for .*/out: the disk is full: free some or choose"):
        train_tokenizer_from_files([str(tmp_path / "a.txt")], 280, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_plan_that_does_not_fit_leaves_nothing(tmp_path, tiny_tokenizer, monkeypatch, exists):
    (tmp_path / "a.txt").write_text("one two three")
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    if exists:
        (tmp_path / "out").mkdir()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full_after_half)
    wanted = PrepareSettings([str(tmp_path / "a.txt")], str(tmp_path / "out"), str(tmp_path / "tokenizer"))
    with pytest.raises(IlladaError, match=r"no room for .*/out: the disk is full: free some and run the same command"):
        preparing.prepare(wanted)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_task_that_does_not_fit_leaves_no_half_shard_and_is_done_later(tmp_path, tiny_tokenizer, monkeypatch):
    (tmp_path / "a.txt").write_text("one two three")
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr("illada.preparation.shard_writer.write_bytes", full)
    wanted = PrepareSettings([str(tmp_path / "a.txt")], str(tmp_path / "out"), str(tmp_path / "tokenizer"))
    with pytest.raises(IlladaError, match=r"no room for .*/out: the disk is full"):
        preparing.prepare(wanted)
    assert not list(tmp_path.rglob("*partial*"))
    monkeypatch.undo()
    preparing.prepare(wanted)
    assert damage(tmp_path / "out") == []
    assert read_sums(tmp_path / "out").keys() == {
        str(path.relative_to(tmp_path / "out"))
        for path in (tmp_path / "out").rglob("*")
        if path.is_file() and path.name != SUMS
    }


CHAT_RECORD = {"messages": [{"role": "user", "content": "some"}, {"role": "assistant", "content": "words"}]}


@pytest.mark.parametrize("record", [CHAT_RECORD, {"prompt": "some", "response": "words"}])
@pytest.mark.parametrize("name", ["chats.jsonl", "chats.jsonl.gz", "chats.parquet"])
def test_conversations_are_recognised(tmp_path, tokenizer_folder, capsys, record, name):
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist([record] * 3), path)
    else:
        text = "\nnot JSON\n" + f"{json.dumps(record)}\n" * 3
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    found = prepare([str(path)], str(tmp_path / "out"), tokenizer_folder)
    assert (found.kind, found.documents) == ("chat", 3)
    assert capsys.readouterr().err == f"{path} holds conversations: prepared with --kind chat\n"
    asked = prepare([str(path)], str(tmp_path / "asked"), tokenizer_folder, kind="chat")
    assert content(asked.path) == content(found.path)
    again = prepare([str(path)], str(tmp_path / "out"), tokenizer_folder)
    assert again.index == found.index


def test_a_record_with_the_text_field_is_a_text(tmp_path, tokenizer_folder, capsys):
    write_jsonl(tmp_path / "a.jsonl", {"text": "some words", **CHAT_RECORD})
    assert prepare([str(tmp_path)], str(tmp_path / "out"), tokenizer_folder).kind == "text"
    assert capsys.readouterr().err == ""
    shards = prepare([str(tmp_path)], str(tmp_path / "chat"), tokenizer_folder, text_field="content")
    assert shards.kind == "chat"


def test_texts_and_conversations_do_not_go_together(tmp_path, tokenizer_folder):
    write_jsonl(tmp_path / "a.jsonl", CHAT_RECORD)
    (tmp_path / "b.txt").write_text("some words")
    with pytest.raises(IlladaError, match=r"a\.jsonl holds conversations, .*b\.txt text: prepare them one at a time"):
        prepare([str(tmp_path)], str(tmp_path / "out"), tokenizer_folder)


def test_an_error_leaves_nothing_behind_and_the_right_command_works(tmp_path, tokenizer_folder):
    write_jsonl(tmp_path / "a.jsonl", CHAT_RECORD)
    out = tmp_path / "out"
    with pytest.raises(IlladaError, match="it is a conversation: set kind chat"):
        prepare([str(tmp_path)], str(out), tokenizer_folder, kind="text")
    assert not out.exists()
    assert prepare([str(tmp_path)], str(out), tokenizer_folder).kind == "chat"
    write_jsonl(tmp_path / "empty.jsonl", {"prompt": "some", "response": " "})
    with pytest.raises(IlladaError, match="nothing to keep"):
        prepare([str(tmp_path / "empty.jsonl")], str(tmp_path / "empty"), tokenizer_folder)
    assert not (tmp_path / "empty").exists()
    write_jsonl(tmp_path / "odd.jsonl", {"instruction": "some", "output": "words"})
    with pytest.raises(IlladaError, match=r'conversations as \{"messages"'):
        prepare([str(tmp_path / "odd.jsonl")], str(tmp_path / "odd"), tokenizer_folder)


def test_finished_tasks_survive_an_error(tmp_path, tokenizer_folder, monkeypatch):
    sources = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    for source in sources:
        Path(source).write_text("some words " * 9)
    arguments, real = (sources, str(tmp_path / "out"), tokenizer_folder), reading._open
    monkeypatch.setattr(reading, "_open", lambda path: real(path if path.endswith("a.txt") else "/nowhere"))
    with pytest.raises(IlladaError, match="cannot read"):
        prepare(*arguments, task_bytes=50)
    monkeypatch.setattr(reading, "_open", lambda path: real(path if path.endswith("b.txt") else "/nowhere"))
    assert prepare(*arguments, task_bytes=50).documents == 2  # a.txt is not read again


def test_without_a_terminal_progress_is_a_line_now_and_then(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(executors, "PLAIN_EVERY", 0.001)
    (tmp_path / "progress-0").write_text("3000000")
    with executors.progress(tmp_path, 12_000_000):
        said = ""
        while not said:
            said = capsys.readouterr().err
    assert said.startswith("preparing: 3 of 12 MB (25%), 0:00:00 elapsed\n")
