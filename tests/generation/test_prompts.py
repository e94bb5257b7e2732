"""Texts, chats and ids as prompts of `illada.generate`, and the settings that nobody gave."""

import dataclasses

import pytest
import torch

import illada
from illada import GenerationSettings, IlladaError
from illada.generation.engine import Engine
from illada.generation.settings import settings_for
from illada.text.chat import encode_prompt
from illada.text.prompts import encode_plain, show_ids

CHAT = [{"role": "user", "content": "one two"}]
SMALL = GenerationSettings(max_new_tokens=8, block_length=4, eos_token_id=None)


@pytest.fixture(scope="module")
def model(build_model, tiny_tokenizer):
    return build_model(tie=True, seed=3, vocab_size=len(tiny_tokenizer))


@pytest.mark.parametrize("settings", [SMALL, None])
def test_texts_chats_and_ids_in_one_batch(model, tiny_tokenizer, settings):
    texts = ["one two", " three"]
    ids = [encode_plain(tiny_tokenizer, texts[0]), encode_prompt(tiny_tokenizer, CHAT), [0, 9, 10]]
    ids.append(encode_plain(tiny_tokenizer, texts[1]))
    prompts = [texts[0], CHAT, (0, 9, 10), texts[1]]
    answers = illada.generate(model, prompts, settings, tokenizer=tiny_tokenizer)
    assert answers == illada.generate(model, ids, settings, tokenizer=tiny_tokenizer)
    assert len({tuple(answer.ids) for answer in answers}) == 4
    assert all(answer.text == show_ids(tiny_tokenizer, answer.ids) for answer in answers)


@pytest.mark.parametrize("kind", [None, "pt", "np"])
def test_what_a_tokenizer_returns_is_a_prompt(model, tiny_tokenizer, kind):
    """`apply_chat_template` of transformers 5 returns a BatchEncoding, of one row or, with padding, of several."""
    chats = [CHAT, [{"role": "user", "content": "one two three four"}]]
    alone = [illada.generate(model, [chat], SMALL, tokenizer=tiny_tokenizer)[0] for chat in chats]
    words = {"add_generation_prompt": True, "return_dict": True, "return_tensors": kind}
    one = tiny_tokenizer.apply_chat_template(CHAT, **words)
    assert illada.generate(model, one, SMALL, tokenizer=tiny_tokenizer) == alone[:1]
    assert illada.generate(model, [one, "one"], SMALL, tokenizer=tiny_tokenizer)[0] == alone[0]
    both = tiny_tokenizer.apply_chat_template(chats, padding=True, **words)
    assert illada.generate(model, both, SMALL, tokenizer=tiny_tokenizer) == alone
    with pytest.raises(IlladaError, match="prompt 0 is an encoding of 2 rows"):
        illada.generate(model, [both], SMALL)


def test_an_empty_text_is_a_document_that_begins(model, tiny_tokenizer):
    (answer,) = illada.generate(model, [""], SMALL, tokenizer=tiny_tokenizer)
    assert [answer] == illada.generate(model, [[tiny_tokenizer.bos_token_id]], SMALL, tokenizer=tiny_tokenizer)
    assert answer.ids != illada.generate(model, [[]], SMALL)[0].ids


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (["one"], "prompt 0 is a text: give a tokenizer"),
        ([[0], CHAT], "prompt 1 is a chat: give a tokenizer"),
        ("one", "give a list of prompts, even for one"),
        (CHAT, "give a list of prompts, even for one"),
    ],
)
def test_prompts_that_cannot_be_encoded_are_refused(model, prompts, says):
    with pytest.raises(IlladaError, match=says):
        illada.generate(model, prompts, SMALL)


def test_a_chat_that_is_none_is_refused_by_its_number(model, tiny_tokenizer):
    with pytest.raises(IlladaError, match="prompt 1: the last message is from 'system', it must be from 'user'"):
        illada.generate(model, ["one", [{"role": "system", "content": "x"}]], SMALL, tokenizer=tiny_tokenizer)
    with pytest.raises(IlladaError, match="prompt 0 is not a list of token ids"):
        illada.generate(model, [[5, *CHAT]], SMALL, tokenizer=tiny_tokenizer)


class Ending(torch.nn.Module):
    """An LM head that writes `<|user|>` first and one end-of-sequence id after the other behind it."""

    def __init__(self, *ids):
        super().__init__()
        self.ids = ids

    def forward(self, hidden):
        logits = torch.zeros(len(hidden), 280)
        for at in range(1, len(hidden) + 1):
            logits[-at, self.ids[-at]] = 50.0 - at
        return logits


def test_without_settings_every_id_of_the_model_ends_an_answer(build_model, tiny_tokenizer):
    user = tiny_tokenizer.convert_tokens_to_ids("<|user|>")
    for eos in ([7, 9], 9, [2, 9]):
        model = build_model(tie=True, seed=3, vocab_size=len(tiny_tokenizer), eos_token_id=eos)
        model.lm_head = Ending(*[user] * 31, 9)
        (answer,) = illada.generate(model, ["one"], tokenizer=tiny_tokenizer)
        assert (answer.ids, answer.finish_reason) == ([user] * 31, "stop")
        assert answer.text == ""  # special tokens are no text
        engine = Engine(model, tiny_tokenizer, keep_special_tokens=True)
        engine.submit([0], settings_for(model, GenerationSettings()))
        assert engine.run()[0].text == "<|user|>" * 31  # but not the one that ended the answer
        # Settings that are given stay as they are.
        for settings in (GenerationSettings(32), [GenerationSettings(32, eos_token_id=2)]):
            (answer,) = illada.generate(model, ["one"], settings, tokenizer=tiny_tokenizer)
            assert (answer.ids, answer.finish_reason) == ([*[user] * 31, 9], "length")


def test_infill_needs_no_settings_either(model):
    template = [0, None, 9, None]
    assert illada.infill(model, [template]) == illada.infill(model, [template], GenerationSettings())


def test_settings_per_prompt_go_with_their_texts(model, tiny_tokenizer):
    settings = [SMALL, dataclasses.replace(SMALL, max_new_tokens=4)]
    answers = illada.generate(model, ["one", CHAT], settings, tokenizer=tiny_tokenizer)
    assert [len(answer.ids) for answer in answers] == [8, 4]
    with pytest.raises(IlladaError, match="1 prompts but 2 settings"):
        illada.generate(model, ["one"], settings, tokenizer=tiny_tokenizer)


def test_a_stop_string_and_special_tokens(build_model, tiny_tokenizer):
    """The ids and the text end before the stop string, which may be a special token; the text has none."""
    user, word = (tiny_tokenizer.encode(text, add_special_tokens=False) for text in ("<|user|>", "one"))
    model = build_model(tie=True, seed=3, vocab_size=len(tiny_tokenizer))
    written = [*user, *word, *user, *word]
    model.lm_head = Ending(*[9] * (32 - len(written)), *written)
    for stop, kept in (("<|user|>", 0), ("one<|user|>", 1)):
        settings = GenerationSettings(32, eos_token_id=None, stop=(stop,))
        for keep, text in ((False, ""), (True, "<|user|>" * kept)):
            engine = Engine(model, tiny_tokenizer, keep_special_tokens=keep)
            engine.submit([0], settings)
            (answer,) = engine.run()
            assert answer.text.endswith(text)
            assert ("<|user|>" in answer.text) == (keep and kept > 0)
