import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from illada.errors import IlladaError
from illada.preparation.train_tokenizer import SPECIAL_TOKENS, train_tokenizer, train_tokenizer_from_files
from illada.text.tokenizer import encode_texts, load_tokenizer, tokenizer_sha256

TEXTS = ["The cat sat on the mat, didn't it? 1234 5678\n\n", "  Ein größerer Käse — 漢字 🙂\t\r\n"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 310)


def test_special_ids_are_those_of_the_released_layout(tokenizer):
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(8))
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (
        0,
        1,
        2,
        5,
    )
    assert set(SPECIAL_TOKENS) <= set(tokenizer.all_special_tokens)
    assert len(tokenizer) == 310


@settings(deadline=None, max_examples=80, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"])))
@example(" a  b\n\n \t c's 12 , .\r\n")
@example("<|eos|><[MASK]> <|bos|>")
def test_every_text_comes_back_and_nothing_in_it_is_special(tokenizer, text):
    (ids,) = encode_texts(tokenizer, [text])
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(range(8))
    # A tokenizer used for plain text still knows its special tokens afterwards.
    assert tokenizer("<|eos|>").input_ids == [2]


def test_every_digit_is_its_own_token(tokenizer):
    assert tokenizer.tokenize("a1234 5678") == ["a", "1", "2", "3", "4", "Ġ", "5", "6", "7", "8"]


def test_a_saved_tokenizer_is_the_same_and_use_does_not_change_its_hash(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    before = tokenizer_sha256(loaded)
    loaded(["a", "bbb"], padding=True, truncation=True, max_length=2)
    assert before == tokenizer_sha256(loaded) == tokenizer_sha256(tokenizer)
    assert loaded.chat_template == tokenizer.chat_template
    assert encode_texts(loaded, ["a", "the cat sat"]) == encode_texts(tokenizer, ["a", "the cat sat"])
    assert before != tokenizer_sha256(train_tokenizer(TEXTS, 311))


def test_training_needs_room_for_bytes():
    with pytest.raises(IlladaError, match="at least 264"):
        train_tokenizer([], 263)
    assert len(train_tokenizer([], 264)) == 264


def test_training_from_files_reads_each_file_in_proportion(tmp_path):
    (tmp_path / "a.txt").write_text("aaaa bbbb " * 100)
    (tmp_path / "b.jsonl").write_text('{"text": "hello hello"}\nnot json\n' * 50)
    made = train_tokenizer_from_files([str(tmp_path)], 300, tmp_path / "out")
    assert {"aaaa", "hello"} <= set(made.get_vocab())
    assert tokenizer_sha256(load_tokenizer(tmp_path / "out")) == tokenizer_sha256(made)
    with pytest.raises(IlladaError, match="exists already"):
        train_tokenizer_from_files([str(tmp_path)], 300, tmp_path / "out")
    small = train_tokenizer_from_files([str(tmp_path / "a.txt")], 300, tmp_path / "small", max_bytes=4)
    assert "aaaa" in small.get_vocab() or "aa" in small.get_vocab()
    assert "Ġbbbb" not in small.get_vocab()


def test_training_without_text_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(IlladaError, match="no text in"):
        train_tokenizer_from_files([str(tmp_path)], 300, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, {}, {"tokenizer.json": "{"}, {"tokenizer.json": "{}"}])
def test_what_is_not_a_tokenizer_is_one_line(tmp_path, content):
    folder = tmp_path / "tokenizer"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(IlladaError) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_hub_name_needs_permission():
    with pytest.raises(IlladaError, match="no tokenizer folder at some/name"):
        load_tokenizer("some/name")


def test_a_tokenizer_learns_what_is_said_in_conversations(tmp_path):
    said = "repeatedword " * 9
    record = {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": said}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "b.txt").write_text("otherthing " * 9)
    vocabulary = train_tokenizer_from_files([str(tmp_path)], 320, tmp_path / "tok").get_vocab()
    assert {"Ġrepeatedword", "Ġotherthing"} <= vocabulary.keys()
    assert not any("content" in token for token in vocabulary)
