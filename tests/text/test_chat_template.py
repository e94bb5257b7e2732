import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from illada.errors import IlladaError
from illada.preparation.train_tokenizer import SPECIAL_TOKENS, train_tokenizer
from illada.text.chat import check_messages, encode_conversation, encode_prompt, split_turns, without_system
from illada.text.tokenizer import encode_texts

BOS, _, EOS, USER, ASSISTANT, _, SYSTEM, END = range(8)


@pytest.fixture(scope="module")
def ours():
    return train_tokenizer(["hello there, how are you? fine thanks\n"] * 9, 300)


@pytest.fixture
def foreign(ours):
    """The same tokens under a template of the common kind; a test sets it."""
    original = ours.chat_template
    yield ours
    ours.chat_template = original


def say(*contents, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system is not None else []) + turns


# Pieces of special tokens, so that they also arise where two contents or a content and the template meet.
# Two private characters are the markers of transformers, which it removes from messages.
content = st.lists(
    st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "eos", "<", "\n", " ", ""])
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\U000f0000\U000f0001"), max_size=5),
    max_size=5,
).map("".join)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(content, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0), st.none() | content)
def test_only_the_template_writes_special_tokens(ours, turns, system):
    messages = say(*turns, system=system)
    ids, prompt_tokens = encode_conversation(ours, messages)
    frame = [BOS]
    for message in messages:
        frame += {"system": [SYSTEM, END], "user": [USER, END], "assistant": [ASSISTANT, EOS]}[message["role"]]
    assert [i for i in ids if i < 8] == frame
    assert ids[:prompt_tokens] == encode_prompt(ours, messages[:-1])
    assert ours.decode(ids[prompt_tokens:-1]) == turns[-1]
    plain = [i for i in ids if i >= 8]
    assert ours.decode(plain) == "".join(message["content"] for message in messages)


def test_the_layout_of_our_template(ours):
    hello, there, fine = encode_texts(ours, ["hello", " there", "fine"])
    ids, prompt_tokens = encode_conversation(ours, say("hello", "fine", system=" there"))
    assert ids == [BOS, SYSTEM, *there, END, USER, *hello, END, ASSISTANT, *fine, EOS]
    assert prompt_tokens == len(ids) - len(fine) - 1


@pytest.mark.parametrize(
    "ending", ["", "\n", "{{ eos_token }}", "{{ eos_token }}\n", "{{ eos_token }}{{ eos_token }} \n"]
)
def test_an_answer_ends_with_one_eos_whatever_the_template(foreign, ending):
    foreign.chat_template = (
        "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}"
        "{% if m.role == 'assistant' %}" + ending + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    ids, prompt_tokens = encode_conversation(foreign, say("hello", "fine"))
    assert ids[-1] == EOS
    assert ids.count(EOS) == 1
    assert foreign.decode(ids[:prompt_tokens]) == "[user]hello[assistant]"
    assert foreign.decode(ids[prompt_tokens:-1]).rstrip() == "fine"


def test_a_template_without_system_role_gets_it_in_the_first_turn(foreign):
    foreign.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ '[' + m.role + ']' + m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    ids = encode_prompt(foreign, say("hello", system=" be kind\n"))
    assert foreign.decode(ids) == "[user]be kind\n\nhello[assistant]"
    foreign.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(IlladaError, match="line 3: the chat template refuses it: never"):
        encode_prompt(foreign, say("hello"), "line 3")


def message(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("messages", "merged"),
    [
        # Stripped, one blank line; what the user says stays as it is.
        ([message("system", "\n be kind \n"), message("user", " hi ")], [message("user", "be kind\n\n hi ")]),
        (
            [message("system", "a "), message("system", " b"), message("user", "c"), message("assistant", "d")],
            [message("user", "a\n\nb\n\nc"), message("assistant", "d")],
        ),
        (
            [message("user", "a"), message("system", "late"), message("user", "b")],
            [message("user", "late\n\na"), message("user", "b")],
        ),
        (
            [message("system", "a"), message("assistant", "b"), message("user", "c")],
            [message("user", "a"), message("assistant", "b"), message("user", "c")],
        ),
        ([message("system", " a")], [message("user", "a")]),
        ([message("system", " \n"), message("user", "b")], [message("user", "b")]),
    ],
)
def test_what_systems_say_goes_before_the_first_user_message(messages, merged):
    before = [dict(m) for m in messages]
    assert without_system(messages) == merged
    assert messages == before
    assert without_system(merged) is merged


def test_a_template_that_rewrites_the_prompt_is_refused(foreign):
    foreign.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(IlladaError, match="renders the prompt differently"):
        encode_conversation(foreign, say("hello", "fine"))


def test_a_tokenizer_without_template_is_refused(foreign):
    foreign.chat_template = None
    with pytest.raises(IlladaError, match="no chat template"):
        encode_prompt(foreign, say("hello"))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        (["hello"], "message 0 is not an object"),
        ([{"role": "user"}], "message 0 needs a role and a content"),
        ([{"role": "user", "content": 3}], "message 0 needs a role and a content"),
        (say("a", "b")[1:], "message 0 is from 'assistant', expected 'user'"),
        (say("a") + say("b"), "message 1 is from 'user', expected 'assistant'"),
        (say("a", "b") + say("c", system="late"), "message 2 is from 'system', expected 'user'"),
        (say("a"), "the last message is from 'user', it must be from 'assistant'"),
        (say(system="only"), "the last message is from 'system'"),
        ([{"role": "tool", "content": "a"}], "message 0 is from 'tool'"),
    ],
)
def test_a_bad_conversation_is_named(messages, message):
    with pytest.raises(IlladaError, match=f"record 7: .*{message}"):
        check_messages(messages, "assistant", "record 7")


def test_split_turns_gives_one_example_per_answer():
    messages = say("a", "b", "c", "d", system="s")
    assert split_turns(messages) == [messages[:3], messages]
