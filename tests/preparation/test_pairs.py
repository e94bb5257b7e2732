"""`prepare --kind preference`: pairs of answers in TRL's forms become two documents each, with the same prompt."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from illada import cli
from illada.data.batches import Batches
from illada.data.shards import Shards
from illada.errors import IlladaError
from illada.preparation import prepare as preparing
from illada.preparation.options import PrepareSettings
from illada.preparation.train_tokenizer import train_tokenizer_from_files
from illada.text.chat import encode_conversation
from illada.training.setup import open_validation


def prepare(*arguments, **options):
    return preparing.prepare(PrepareSettings(*arguments, **options))


@pytest.fixture(scope="module")
def tokens(tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


def say(role, content):
    return {"role": role, "content": content}


def write(path: Path, records) -> str:
    text = "".join(f"{json.dumps(record)}\n" for record in records).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def pairs_of(shards: Shards):
    """The (ids, prompt tokens) of both sides of each pair, after checking that their prompts are the same."""
    assert shards.kind == "preference"
    assert shards.documents % 2 == 0
    spans = [shards.document_span(i) for i in range(shards.documents)]
    sides = [(shards.read(start, end - start).tolist(), prompt) for start, end, prompt in spans]
    pairs = list(zip(sides[::2], sides[1::2], strict=True))
    for (chosen, prompt), (rejected, same) in pairs:
        assert chosen[:prompt] == rejected[:same]
        assert chosen != rejected
    return pairs


def encoded(tokenizer, prompt, chosen, rejected):
    return tuple(encode_conversation(tokenizer, [*prompt, say("assistant", answer)]) for answer in (chosen, rejected))


def odd(shards):
    return {name: count for name, count in shards.index["odd"].items() if count}


FORMS = {
    "texts": lambda prompt, a, b: {"prompt": prompt[-1]["content"], "chosen": a, "rejected": b},
    "messages": lambda prompt, a, b: {
        "prompt": prompt, "chosen": [say("assistant", a)], "rejected": [say("assistant", b)],
    },
    "messages and texts": lambda prompt, a, b: {"prompt": prompt, "chosen": a, "rejected": b},
    "field messages": lambda prompt, a, b: {"messages": prompt, "chosen": a, "rejected": [say("assistant", b)]},
    "implicit": lambda prompt, a, b: {
        "chosen": [*prompt, say("assistant", a)], "rejected": [*prompt, say("assistant", b)],
    },
    "implicit, with a name": lambda prompt, a, b: {
        "prompt": prompt[-1]["content"],  # as in ultrafeedback_binarized
        "messages": [*prompt, say("assistant", a)],
        "chosen": [*prompt, say("assistant", a)],
        "rejected": [*prompt, say("assistant", b)],
        "score_chosen": 9.0,
    },
    "both": lambda prompt, a, b: {
        "prompt": prompt, "chosen": [*prompt, say("assistant", a)], "rejected": [*prompt, say("assistant", b)],
    },
}  # fmt: skip
"""The same pair as TRL's users write it. https://huggingface.co/docs/trl/dataset_formats"""

spoken = st.text("ab \n<|eos>é漢", min_size=1, max_size=6)
answer = spoken.filter(str.strip)
turns = st.lists(spoken, min_size=1, max_size=5).filter(lambda texts: len(texts) % 2)
pair = st.tuples(st.none() | spoken, turns, answer, answer, st.sampled_from(sorted(FORMS)))


@pytest.mark.slow
@settings(deadline=None, max_examples=12, derandomize=True)
@given(st.lists(pair.filter(lambda p: p[2] != p[3]), min_size=1, max_size=8), st.sampled_from([0, 200, 500]))
def test_every_form_of_a_pair_gives_both_whole_conversations(tmp_path_factory, tiny_tokenizer, tokens, pairs, bytes_):
    folder = tmp_path_factory.mktemp("pairs")
    records, wanted = [], []
    for system, contents, chosen, rejected, form in pairs:
        prompt = [say(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
        prompt = prompt[-1:] if form == "texts" else [say("system", system)] * (system is not None) + prompt
        records.append(FORMS[form](prompt, chosen, rejected))
        wanted.append(encoded(tiny_tokenizer, prompt, chosen, rejected))
    source = write(folder / "pairs.jsonl", records)
    shards = prepare([source], str(folder / "out"), tokens, task_bytes=bytes_, tokens_per_shard=40)
    assert pairs_of(shards) == wanted
    assert odd(shards) == {}


PROMPT = [say("system", "two"), say("user", "one?")]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz", "pairs.parquet"])
def test_pairs_are_recognised(tmp_path, tiny_tokenizer, tokens, capsys, form, name):
    prompt = PROMPT[1:] if form == "texts" else PROMPT
    records = [FORMS[form](prompt, "three", "four")] * 3
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(records), tmp_path / name)
        source = str(tmp_path / name)
    else:
        source = write(tmp_path / name, records)
    shards = prepare([source], str(tmp_path / "out"), tokens)
    assert capsys.readouterr().err == f"{source} holds preference pairs: prepared with --kind preference\n"
    assert pairs_of(shards) == [encoded(tiny_tokenizer, prompt, "three", "four")] * 3
    said = [*prompt, say("", "three")], [*prompt, say("", "four")]
    assert shards.bytes == 3 * sum(len(message["content"]) for side in said for message in side)
    assert prepare([source], str(tmp_path / "out"), tokens, kind="preference").index == shards.index


def test_a_parquet_file_may_leave_a_prompt_out(tmp_path, tiny_tokenizer, tokens):
    columns = {"prompt": ["one?", None], "chosen": ["three"] * 2, "rejected": ["four"] * 2}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    shards = prepare([str(tmp_path / "a.parquet")], str(tmp_path / "out"), tokens)
    assert pairs_of(shards) == [encoded(tiny_tokenizer, PROMPT[1:], "three", "four")]
    assert odd(shards) == {"unusable_records": 1}


GOOD = {"prompt": "one?", "chosen": "three", "rejected": "four"}
USER, ANSWER = say("user", "one?"), say("assistant", "three")


@pytest.mark.parametrize(
    ("record", "counted", "message"),
    [
        ({**GOOD, "rejected": "three"}, "refused_pairs", "line 1: the chosen and the rejected answer are the same"),
        ({**GOOD, "rejected": " \n"}, "empty_documents", r"1 empty documents"),
        ({**GOOD, "chosen": ""}, "empty_documents", r"1 empty documents"),
        ({"prompt": "one?", "chosen": "three"}, "unusable_records", "line 1: no rejected answer"),
        ({"prompt": "one?", "chosen": None, "rejected": None}, "unusable_records", "no chosen and no rejected answer"),
        ({"chosen": "one? three", "rejected": "one? four"}, "unusable_records", "texts without a prompt: add one"),
        ({**GOOD, "prompt": 5}, "unusable_records", "the prompt is neither text nor messages"),
        ({**GOOD, "chosen": 5}, "unusable_records", "chosen and rejected must be texts or messages"),
        ({**GOOD, "chosen": []}, "unusable_records", "chosen: messages must be a non-empty list"),
        ({**GOOD, "prompt": [ANSWER]}, "unusable_records", "chosen: message 0 is from 'assistant', expected 'user'"),
        ({**GOOD, "prompt": [USER, ANSWER]}, "unusable_records", "chosen: message 2 is from 'assistant', expected"),
        ({**GOOD, "rejected": [USER]}, "unusable_records", "rejected: the last message is from 'user'"),
        ({**GOOD, "rejected": [say("tool", "x")]}, "unusable_records", "rejected: message 0 is from 'tool'"),
        ({**GOOD, "rejected": [{"role": "assistant"}]}, "unusable_records", "rejected: message 1 needs a role and a"),
        (
            {"chosen": [USER, ANSWER], "rejected": [say("user", "two?"), ANSWER]},
            "unusable_records",
            "differ before their last message: they must answer the same prompt",
        ),
        (
            {"chosen": [USER, ANSWER], "rejected": [USER, say("assistant", "four"), USER, ANSWER]},
            "unusable_records",
            "differ before their last message",
        ),
        ({"prompt": [USER], "chosen": [say("user", "two?"), ANSWER], "rejected": "x"}, "unusable_records", "chosen: m"),
    ],
)  # fmt: skip
def test_broken_pairs_are_counted_and_alone_are_one_clear_line(tmp_path, tokens, record, counted, message):
    alone = write(tmp_path / "alone.jsonl", [record])
    with pytest.raises(IlladaError, match=message) as caught:
        prepare([alone], str(tmp_path / "nothing"), tokens, kind="preference")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "nothing").exists()
    among = write(tmp_path / "among.jsonl", [GOOD, record, GOOD])
    shards = prepare([among], str(tmp_path / "out"), tokens)
    assert len(pairs_of(shards)) == 2
    assert odd(shards) == {counted: 1}


def test_answers_that_a_template_makes_the_same_are_refused(tmp_path, tiny_tokenizer, tokens):
    template, folder = tiny_tokenizer.chat_template, tmp_path / "trimming"
    try:
        tiny_tokenizer.chat_template = template.replace("message['content']", "message['content'] | trim")
        tiny_tokenizer.save_pretrained(folder)
    finally:
        tiny_tokenizer.chat_template = template
    source = write(tmp_path / "a.jsonl", [GOOD, {**GOOD, "rejected": " three"}])
    assert odd(prepare([source], str(tmp_path / "out"), str(folder))) == {"refused_pairs": 1}
    assert odd(prepare([source], str(tmp_path / "as it is"), tokens)) == {}


def test_broken_characters_of_a_pair_are_replaced_on_both_sides(tmp_path, tiny_tokenizer, tokens):
    source = write(tmp_path / "a.jsonl", [{"prompt": "one \ud800", "chosen": "three", "rejected": "four \udfff"}])
    shards = prepare([source], str(tmp_path / "out"), tokens)
    assert pairs_of(shards) == [encoded(tiny_tokenizer, [say("user", "one \ufffd")], "three", "four \ufffd")]
    assert odd(shards) == {"broken_utf8_documents": 1, "replaced_characters": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_turns": True}, "split_turns is for kind chat"),
        ({"filters": ["c4"]}, "filters are for texts, .* leave them out with kind preference"),
        ({"kind": "text"}, "no field 'text', it is a preference pair: set kind preference"),
        ({"kind": "chat"}, "it is a preference pair: set kind preference"),
    ],
)
@pytest.mark.parametrize("kind", ["auto", "preference"])
def test_what_does_not_suit_pairs_is_refused(tmp_path, tokens, kind, options, message):
    source = write(tmp_path / "a.jsonl", [GOOD])
    with pytest.raises(IlladaError, match=message):
        prepare([source], str(tmp_path / "out"), tokens, **{"kind": kind} | options)
    assert not (tmp_path / "out").exists()


def test_pairs_go_neither_with_texts_nor_with_conversations(tmp_path, tokens):
    write(tmp_path / "a.jsonl", [GOOD])
    write(tmp_path / "b.jsonl", [{"prompt": "one", "response": "two"}])
    with pytest.raises(IlladaError, match=r"a\.jsonl holds preference pairs, .*b\.jsonl conversations: .*--kind chat"):
        prepare([str(tmp_path)], str(tmp_path / "out"), tokens)
    (tmp_path / "c.txt").write_text("one")
    with pytest.raises(IlladaError, match=r"c\.txt is plain text: preference pairs come from \.jsonl or \.parquet"):
        prepare([str(tmp_path / "c.txt")], str(tmp_path / "out"), tokens, kind="preference")


def test_a_tokenizer_learns_from_all_that_is_said_in_pairs(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"prompt": "qqqq" * 9, "chosen": "jjjj" * 9, "rejected": "zzzz" * 9}] * 9)
    learned = train_tokenizer_from_files([source], 300, tmp_path / "tok").get_vocab()
    assert {"qqqq", "jjjj", "zzzz"} <= set(learned)


@pytest.fixture
def data(make_data, tmp_path):
    pairs = [([5] * 4, 2), ([5, 5, 6, 6], 2)] * 20
    make_data(tmp_path / "pairs", pairs, kind="preference")
    make_data(tmp_path / "more", pairs, kind="preference")
    make_data(tmp_path / "text", [[7] * 90])
    return tmp_path


def test_other_training_says_what_pairs_are_for(data):
    pairs, text = Shards.open(data / "pairs"), Shards.open(data / "text")
    for rule in ("illada", "llada"):
        with pytest.raises(IlladaError, match="pairs holds preference pairs: they are data for `illada dpo`"):
            Batches(pairs, 8, 2, seed=0, rule=rule, eos_token_id=2)
    with pytest.raises(IlladaError, match="pairs holds preference pairs: they are data for `illada dpo`"):
        open_validation(str(data / "pairs"), text)
    assert open_validation(str(data / "more"), pairs).kind == "preference"


def test_pairs_mix_with_pairs_only(data):
    mixed = Shards.open({str(data / "pairs"): 1, str(data / "more"): 2})
    assert len(pairs_of(mixed)) == 40
    for names in (("pairs", "text"), ("text", "pairs")):
        with pytest.raises(IlladaError, match=r"does not mix with .*: one of them holds preference pairs"):
            Shards.open({str(data / name): 1 for name in names})


@pytest.mark.slow
def test_the_commands_know_pairs(tmp_path, tokens, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pairs.jsonl", [GOOD, GOOD, {**GOOD, "chosen": "four"}])
    cli.main(["prepare", "pairs.jsonl", "--kind", "preference", "--tokenizer", tokens, "--output", "data"])
    said = capsys.readouterr().out
    assert said.startswith("2 preference pairs, ")
    assert "(1 refused pairs)\nnext: illada dpo " in said
    cli.main(["verify", "data"])
    assert capsys.readouterr().out.startswith("whole: data ")
    with pytest.raises(SystemExit) as caught:
        cli.main(["pretrain", "tiny-cpu-pretrain", "--data.train", "data", "--output", "run"])
    assert caught.value.code == 2
    assert "data holds preference pairs: they are data for `illada dpo`" in capsys.readouterr().err
    assert not Path("run").exists()
