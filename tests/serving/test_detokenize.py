from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from illada.serving.detokenize import Detokenizer, TokenTexts


@given(data=st.data())
def test_pieces_given_away_are_the_text_up_to_the_first_stop_string(data, tiny_tokenizer):
    ids = data.draw(st.lists(st.integers(0, len(tiny_tokenizer) - 1), max_size=24))
    whole = tiny_tokenizer.decode(ids)
    inside = st.builds(lambda i, n: whole[i : i + n], st.integers(0, max(0, len(whole) - 1)), st.integers(1, 6))
    stops = [s for s in data.draw(st.lists(inside | st.text("ab\n", min_size=1, max_size=3), max_size=3)) if s]
    cuts = [at for at in (whole.find(stop) for stop in stops) if at >= 0]
    wanted = whole[: min(cuts)] if cuts else whole

    text = Detokenizer(tiny_tokenizer, stops)
    found, tokens, at = "", [], 0
    while at < len(ids):
        size = data.draw(st.integers(1, 5))
        part = ids[at : at + size]
        at += size
        piece, new = text.add(part, [0.0] * len(part))
        found, tokens = found + piece, tokens + new
        assert not text.stopped or cuts
    piece, new = text.add([], [], last=True)
    found, tokens = found + piece, tokens + new
    assert text.stopped == bool(cuts)

    # The pieces together are the wanted text without special tokens.
    special = {tiny_tokenizer.decode([i]) for i in tiny_tokenizer.all_special_ids}
    if not any(token in whole for token in special):
        assert found == wanted
    if not cuts:
        assert [token.id for token in tokens] == ids
        assert found == "".join(token.text for token in tokens)
        if not any(i in tiny_tokenizer.all_special_ids for i in ids):
            assert found == tiny_tokenizer.decode(ids)


def test_special_tokens_are_hidden_but_end_an_answer(tiny_tokenizer):
    word = tiny_tokenizer.encode("one", add_special_tokens=False)
    eos = tiny_tokenizer.eos_token_id
    text = Detokenizer(tiny_tokenizer)
    assert text.add([*word, eos, *word], [0.0] * (2 * len(word) + 1))[0] == "oneone"
    text = Detokenizer(tiny_tokenizer, [tiny_tokenizer.eos_token])
    assert text.add([*word, eos, *word], [0.0] * (2 * len(word) + 1))[0] == "one"
    assert text.stopped


def test_a_special_token_hides_itself_only(tiny_tokenizer):
    part = tiny_tokenizer.encode("é", add_special_tokens=False)[0]
    ids = [part, tiny_tokenizer.eos_token_id]
    text = Detokenizer(tiny_tokenizer)
    assert text.add(ids, [0.0, 0.0], last=True)[0] == tiny_tokenizer.decode(ids, skip_special_tokens=True) == "\ufffd"


def test_what_may_begin_a_stop_string_is_kept_back(tiny_tokenizer):
    text = Detokenizer(tiny_tokenizer, ["ne!"])
    encode = partial(tiny_tokenizer.encode, add_special_tokens=False)
    assert text.add(encode("one"), [0.0] * len(encode("one")))[0] == "o"
    assert text.add(encode("?"), [0.0])[0] == "ne?"
    assert text.add(encode("n"), [0.0])[0] == ""
    assert text.add([], [], last=True)[0] == "n"


@pytest.mark.parametrize(("end", "wanted"), [("!", ""), ("?", "!"), ("", "!")])
def test_of_stop_strings_that_overlap_the_first_counts(tiny_tokenizer, end, wanted):
    text = Detokenizer(tiny_tokenizer, ['!"!', '"'])
    pieces = []
    for character in '!"' + end:
        ids = tiny_tokenizer.encode(character, add_special_tokens=False)
        pieces.append(text.add(ids, [0.0] * len(ids))[0])
    pieces.append(text.add([], [], last=True)[0])
    assert "".join(pieces) == wanted
    assert text.stopped


@pytest.mark.parametrize("character", ["é", "語", "🙂"])
def test_a_character_of_several_tokens_stands_at_the_last(tiny_tokenizer, character):
    ids = tiny_tokenizer.encode(character, add_special_tokens=False)
    assert len(ids) > 1
    pieces = TokenTexts(tiny_tokenizer)
    assert pieces([None, *ids, None]) == [""] * len(ids) + [character, ""]
    assert pieces([*ids[:-1], None])[-2] == "\ufffd"
    text = Detokenizer(tiny_tokenizer)
    assert [text.add([i], [0.0])[0] for i in ids] == [""] * (len(ids) - 1) + [character]
