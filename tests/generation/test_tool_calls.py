"""Calls of tools: what a template writes is read off it, an answer's form holds the calls, and what comes is read."""

import copy
import io
import itertools
import json
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from illada import GenerationSettings, Tools, cli, generate
from illada.commands import terminal
from illada.errors import IlladaError
from illada.generation.optional.call_format import OURS, CallReader
from illada.generation.optional.tool_calls import _without
from illada.preparation.train_tokenizer import train_tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town.",
        "parameters": {"properties": {"town": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "maximum": 9}}},
    },
}
NOW = {"name": "now"}
TURN = "{% for m in messages %}{{ '\n@' + m.role + ': ' }}"
SECTION = "{% for t in tools or [] %}{{ t.function | tojson }}{% endfor %}"
END = (
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n@assistant: ' }}{% endif %}"
)
HERMES = (
    SECTION + TURN + "{{ m.content }}{% for c in m.tool_calls or [] %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    '{{ \'<call>\n{"name": "\' + c.function.name }}'
    "{{ '\", \"arguments\": ' + c.function.arguments | tojson + '}\n</call>' }}{% endfor %}" + END
)
ONE_CALL = (
    SECTION + TURN + "{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one') }}{% endif %}"
    '{% set c = m.tool_calls[0].function %}{{ \'{"name": "\' + c.name }}'
    "{{ '\", \"parameters\": ' + c.arguments | tojson + '}' }}{% else %}{{ m.content }}{% endif %}" + END
)
THINKING = HERMES.replace("'<call>", "('<think>\n\n</think>\n\n' if loop.first else '') + '<call>")
NO_JSON = HERMES.replace("c.function.arguments | tojson", "c.function.arguments | length | string")
SPECIAL = HERMES.replace("'<call>", "bos_token + '<call>")
NO_RESULTS = HERMES.replace(TURN, TURN.replace("messages", "messages if m.role != 'tool'"))
NO_SECTION = HERMES.replace(SECTION, "")


@pytest.fixture
def with_template(tiny_tokenizer):
    def change(template):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    return change


@pytest.mark.parametrize(
    ("template", "opening", "middle", "between", "closing"),
    [
        (HERMES, '<call>\n{"name": "', '", "arguments": ', '}\n</call>\n<call>\n{"name": "', "}\n</call>"),
        (THINKING, '<call>\n{"name": "', '", "arguments": ', '}\n</call>\n<call>\n{"name": "', "}\n</call>"),
        (ONE_CALL, '{"name": "', '", "parameters": ', None, "}"),
    ],
)
def test_the_way_of_a_template_is_read_off_it(with_template, template, opening, middle, between, closing):
    found = Tools([], with_template(template)).format
    assert found == (opening, middle, between, closing, True)


@pytest.mark.parametrize("template", [NO_JSON, SPECIAL, NO_RESULTS, NO_SECTION])
def test_ours_where_a_template_has_none_that_a_form_can_hold(with_template, tiny_tokenizer, template):
    assert Tools([], with_template(template)).format == OURS
    assert Tools([], tiny_tokenizer).format == OURS


def conversation(arguments):
    call = {"id": "a", "function": {"name": "weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "sunny"},
    ]


def test_a_known_section_is_the_templates_own(with_template):
    tokenizer = with_template(HERMES)
    tools = Tools([WEATHER, NOW], tokenizer)
    for arguments in ({"town": "Rome"}, '{"town":"Rome"}'):
        text = tokenizer.decode(tools.encode(conversation(arguments)))
        assert text.startswith('{"name": "weather", "description": "The weather of a town.", "parameters": {"type": ')
        assert text.endswith(
            '@assistant: <call>\n{"name": "weather", "arguments": {"town": "Rome"}}\n</call><|eos|>'
            "\n@tool: sunny\n@assistant: "
        )
    assert "weather" not in tokenizer.decode(Tools([], tokenizer).encode(conversation({})[:1]))


def test_calls_begin_where_the_prompt_ends_in_any_tokens(with_template):
    # The prompt ends with a token of two newlines, which are two tokens where a brace follows.
    tokenizer = train_tokenizer(["one\n\n two\n\n"] * 9, 280)
    tokenizer.chat_template = ONE_CALL.replace("@assistant: ", "@assistant\n\n").replace(
        "m.role + ': '", "m.role + ('\n\n' if m.role == 'assistant' else ': ')"
    )
    tools = Tools([NOW], tokenizer)
    assert tools.format == ('{"name": "', '", "parameters": ', None, "}", True)
    asked, answered = (tools.encode(turns) for turns in (conversation({})[:1], conversation({})))
    assert answered[: len(asked)] != asked
    text = tokenizer.decode(asked) + '{"name": "weather", "parameters": {}}'
    assert tokenizer.decode(answered).startswith(text)


def test_ours_where_calls_are_no_answer_of_the_assistant(with_template):
    other = HERMES.replace("'\n@' + m.role", "('\n@caller' if m.tool_calls else '\n@' + m.role)")
    assert Tools([], with_template(other)).format == OURS


def test_templates_that_are_strict_about_ids_and_descriptions(with_template):
    strict = HERMES.replace("t.function | tojson", "t.function.name + ': ' + t.function.description")
    strict = strict.replace(
        "{% for c", "{% for c in m.tool_calls or [] if c.id | length != 9 %}{{ 0 / 0 }}{% endfor %}{% for c"
    )
    strict = strict.replace("{{ m.content }}", "{{ m.tool_call_id or '' }}{{ m.content }}")
    messages = conversation({})
    messages[1]["tool_calls"][0]["id"] = messages[2]["tool_call_id"] = "call_of_an_api_with_a_long_name"
    tokenizer = with_template(strict)
    text = tokenizer.decode(Tools([NOW], tokenizer).encode([*messages, *messages]))
    assert text.startswith("now: \n@user")
    assert "@tool: call00000sunny" in text
    assert "@tool: call00001sunny" in text


def test_ours_where_a_template_refuses_the_schemas(with_template):
    odd = "{% if 'odd' in t.function.parameters.properties %}{{ raise_exception('odd') }}{% endif %}"
    refusing = HERMES.replace("{{ t.function", odd + "{{ t.function")
    tokenizer = with_template(refusing)
    assert Tools([WEATHER, NOW], tokenizer).format.known
    tools = Tools([NOW, {"name": "f", "parameters": {"properties": {"odd": {}}}}], tokenizer)
    assert tools.format == OURS
    assert "<tool_response>\nsunny" in tokenizer.decode(tools.encode(conversation({})))


def test_calls_of_one_id_are_answered_in_turn(tiny_tokenizer):
    calls = [{"id": "", "function": {"name": name, "arguments": {}}} for name in ("weather", "now")]
    results = [{"role": "tool", "tool_call_id": "", "content": text} for text in ("sunny", "noon")]
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": calls}, *results]
    assert "sunny\n</tool_response>\n<tool_response>\nnoon" in tiny_tokenizer.decode(
        Tools([NOW], tiny_tokenizer).encode(messages)
    )


def test_an_answer_that_begins_like_a_call_is_text(with_template):
    reader = Tools([NOW], with_template(ONE_CALL)).reader()
    said = '{"name": "Bob", "age": 3}'
    sent = [reader.take(letter)[0] for letter in said] + [reader.take("", last=True)[0]]
    assert "".join(sent) == reader.content == said
    assert reader.calls == []


def test_our_section_stands_behind_the_system_message(tiny_tokenizer):
    tools = Tools([WEATHER, NOW], tiny_tokenizer)
    for messages in (conversation({"town": "Rome"}), [{"role": "system", "content": "Brief."}, *conversation("{}")]):
        system, _, rest = tiny_tokenizer.decode(tools.encode(messages)).partition("<|user|>")
        assert ("Brief.\n\n# Tools" in system) == (len(messages) == 4)
        described = [
            json.loads(line) for line in system.splitlines() if line.startswith('{"name": "') and "NAME" not in line
        ]
        assert [one["name"] for one in described] == ["weather", "now"]
        assert described[1]["parameters"] == {"type": "object", "properties": {}}
        assert '<tool_call>\n{"name": "weather", "arguments": {' in rest
        assert rest.endswith("<|user|><tool_response>\nsunny\n</tool_response><|end|><|assistant|>")


def test_results_and_what_the_user_adds_are_one_message(tiny_tokenizer):
    calls = [{"id": key, "function": {"name": "now", "arguments": "{}"}} for key in "ab"]
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Look.", "tool_calls": calls}]
    messages += [{"role": "tool", "tool_call_id": key, "content": key} for key in "ba"]
    messages += [{"role": "user", "content": "and?"}]
    text = tiny_tokenizer.decode(Tools([NOW], tiny_tokenizer).encode(messages))
    assert "Look.<tool_call>" in text
    results = "<tool_response>\nb\n</tool_response>\n<tool_response>\na\n</tool_response>\nand?"
    assert text.endswith(f"<|user|>{results}<|end|><|assistant|>")


def test_text_that_looks_like_a_special_token_is_text(tiny_tokenizer):
    named = {"name": "f", "description": "<|end|>"}
    ids = Tools([named], tiny_tokenizer).encode([{"role": "user", "content": "x"}])
    assert ids.count(tiny_tokenizer.convert_tokens_to_ids("<|end|>")) == 2


ONE = '{"name": "weather", "arguments": {"town": "Oslo", "days": -3}}'
TWO = '{"name": "now", "arguments": {}}'


def written(*calls, text=""):
    return text + "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


@pytest.mark.parametrize(
    ("answer", "auto", "required", "single", "only_now"),
    [
        ("", True, False, False, False),
        ("Hello <b>you</b>, a <tool_cal is none", True, False, False, False),
        (written(ONE), True, True, True, False),
        (written(TWO), True, True, True, True),
        (written(ONE, TWO, ONE), True, True, False, False),
        (written(ONE, text="So:\n"), True, False, False, False),
        ("<tool_call>", False, False, False, False),
        (written(ONE) + "\n", False, False, False, False),
        (written(ONE.replace("Oslo", "Bonn")), False, False, False, False),
        (written(ONE.replace("-3", "10")), False, False, False, False),
        (written(TWO.replace("now", "then")), False, False, False, False),
    ],
)
def test_the_form_is_the_tools(tiny_tokenizer, answer, auto, required, single, only_now):
    tools = Tools([WEATHER, NOW], tiny_tokenizer)
    forms = [tools.regex(), tools.regex("required"), tools.regex("required", parallel=False)]
    forms.append(tools.regex("required", ["now"], parallel=False))
    assert [bool(re.fullmatch(form, answer)) for form in forms] == [auto, required, single, only_now]


def test_the_form_of_the_text_is_for_answers_without_calls(tiny_tokenizer):
    form = Tools([NOW], tiny_tokenizer).regex(content="yes|no")
    assert [bool(re.fullmatch(form, text)) for text in ("yes", "no", "other", written(TWO), "yes" + written(TWO))] == [
        True,
        True,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("word", ["<ab", "aba", '{"n', "]x", "^-a", "\\a"])
def test_texts_without_a_word(word):
    form = re.compile(_without(word))
    short = word[: word.find(word[0], 1)] if word[0] in word[1:] else word
    for size in range(6):
        for letters in itertools.product(sorted({*word, "z"}), repeat=size):
            text = "".join(letters)
            assert bool(form.fullmatch(text)) == (short not in text)


@given(
    st.lists(st.sampled_from([ONE, TWO, '{"name": "now", "arguments": {"a": "}{\\\\\\"]", "b": [{"c": "<"}]}}'])),
    st.sampled_from(["", "Well <tool", "a\n"]),
    st.data(),
)
def test_an_answer_is_read_the_same_in_any_pieces(calls, text, data):
    answer = written(*calls, text=text) if calls else text
    reader, got, pieces = CallReader(OURS), "", []
    while answer:
        size = data.draw(st.integers(1, len(answer)))
        content, found = reader.take(answer[:size])
        answer, got, pieces = answer[size:], got + content, pieces + found
    content, found = reader.take("", last=True)
    assert got + content == reader.content == text
    wanted = [json.loads(call) for call in calls]
    assert [call.name for call in reader.calls] == [call["name"] for call in wanted]
    assert [json.loads(call.arguments) for call in reader.calls] == [call["arguments"] for call in wanted]
    for number, call in enumerate(reader.calls):
        own = [piece for piece in pieces + found if piece.number == number]
        assert [piece.name for piece in own] == [call.name] + [None] * (len(own) - 1)
        assert "".join(piece.arguments for piece in own) == call.arguments


@pytest.mark.parametrize("template", [HERMES, ONE_CALL, None])
@pytest.mark.parametrize("way", [{}, {"temperature": 1.0, "seed": 4}, {"threshold": 0.5, "block_length": 32}])
def test_a_random_model_calls_as_asked(with_template, tiny_tokenizer, build_model, template, way):
    tokenizer = tiny_tokenizer if template is None else with_template(template)
    model = build_model(tie=True, seed=3, vocab_size=len(tokenizer), max_position_embeddings=1024)
    tools = Tools([WEATHER, NOW], tokenizer)
    ids = tools.encode([{"role": "user", "content": "one"}])
    for choice in ("required", "auto"):
        given = {"max_new_tokens": 128, "block_length": 16, "eos_token_id": tokenizer.eos_token_id, **way}
        (answer,) = generate(model, [ids], GenerationSettings(regex=tools.regex(choice), **given), tokenizer)
        content, calls = tools.read(answer.text)
        assert calls or choice == "auto"
        assert not (content and choice == "required")
        for call in calls:
            arguments = json.loads(call.arguments)
            assert call.name == "now" or arguments.keys() <= {"town", "days"}
            assert arguments.get("town", "Rome") in ("Rome", "Oslo")
            assert arguments.get("days", 0) <= 9


def test_a_talk_in_the_terminal_asks_for_the_results_of_calls(tiny_tokenizer, build_model, monkeypatch, capsys):
    ids = {"eos_token_id": tiny_tokenizer.eos_token_id}
    model = build_model(tie=True, seed=3, vocab_size=len(tiny_tokenizer), max_position_embeddings=1024, **ids)
    tools, seen = Tools([NOW], tiny_tokenizer), []
    monkeypatch.setattr(tools, "encode", lambda messages: seen.append([*messages]) or Tools.encode(tools, messages))

    def talk(*lines, choice="now", **settings):
        seen.clear()
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        given = GenerationSettings(max_new_tokens=64, block_length=16, **settings)
        terminal.chat(model, tiny_tokenizer, given, "Brief.", tools, choice)
        return capsys.readouterr().out

    shown = talk("one", "noon", "two", "midnight")
    assert shown.startswith(written(TWO) + "\n")
    called = [messages for messages in seen if messages[-1]["role"] == "tool"]
    assert [messages[-1]["content"] for messages in called[:1]] == ["noon"]
    assert called[0][2]["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
    assert called[0][-1]["tool_call_id"] == called[0][2]["tool_calls"][0]["id"]
    assert talk("one") == written(TWO) + "\n"  # the input ends before the result
    with pytest.raises(IlladaError, match="tools and choices cannot"):
        talk("one", choices=("a",))
    with pytest.raises(IlladaError, match="'then', which is none"):
        talk("one", choice="then")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[", "cannot be read"),
        ("{}", "holds no list of tools"),
        ('[{"name": "a b"}]', "name of tool 0"),
        ('{"tools": [{"name": "now"}]}', "'then', which is none of the tools"),
    ],
)
def test_files_of_tools_that_are_refused(tmp_path, write_tiny_model, capsys, content, words):
    file = tmp_path / "tools.json"
    file.write_text(content)
    arguments = ["chat", "--model", str(write_tiny_model(tmp_path / "model")), "--tool_choice", "then"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--tools", str(file)])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "nothing without tools" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("definition", "words"),
    [
        ("weather", "tool 0 is no function"),
        ({"type": "retrieval"}, "tool 0 is no function"),
        ({"name": "a b"}, "name of tool 0"),
        ({"name": "f", "description": 3}, "description of f"),
        ({"name": "f", "parameters": []}, "parameters of f must be"),
        ({"name": "f", "parameters": {"type": "string"}}, "parameters of f must be of type object"),
        ({"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}, r"parameters of f: .*not"),
    ],
)
def test_definitions_that_are_refused(tiny_tokenizer, definition, words):
    with pytest.raises(IlladaError, match=words):
        Tools([definition], tiny_tokenizer).regex()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop(), "result of the call 'a' is missing"),
        (lambda m: m.pop(1), "message 1 is from 'tool', expected 'assistant'"),
        (lambda m: m[2].update(tool_call_id="b"), r"tool_call_id 'b', but open calls are \['a'\]"),
        (lambda m: m[2].update(content=None), "message 2 needs a content"),
        (lambda m: m[1]["tool_calls"][0].update(id=3), "needs an id"),
        (lambda m: m[1]["tool_calls"][0].update(function={"name": "f", "arguments": "[1"}), "arguments of call a"),
        (lambda m: m.append({"role": "assistant", "content": "Sunny."}), "last message must be"),
        (lambda m: m.clear(), "last message must be"),
        (lambda m: m.insert(0, "Weather?"), "message 0 is not an object"),
    ],
)
def test_conversations_that_are_refused(tiny_tokenizer, change, words):
    messages = conversation({})
    change(messages)
    with pytest.raises(IlladaError, match=words):
        Tools([WEATHER], tiny_tokenizer).encode(messages)


@pytest.mark.slow
def test_arguments_as_deep_as_can_be_read_are_written_or_refused(tiny_tokenizer):
    tools = Tools([WEATHER], tiny_tokenizer)
    for deep in range(sys.getrecursionlimit() - 150, sys.getrecursionlimit()):
        try:
            tools.encode(conversation('{"a":' * deep + "1" + "}" * deep))
        except IlladaError as error:
            assert "nested too deeply" in str(error) or "arguments of call a" in str(error)  # noqa: PT017


def test_choices_that_are_refused(tiny_tokenizer):
    with pytest.raises(IlladaError, match="two are named 'now'"):
        Tools([NOW, NOW], tiny_tokenizer)
    with pytest.raises(IlladaError, match="at most 128"):
        Tools([{"name": f"f{i}"} for i in range(129)], tiny_tokenizer)
    with pytest.raises(IlladaError, match="auto or required"):
        Tools([NOW], tiny_tokenizer).regex("none")
    with pytest.raises(IlladaError, match="'then', which is none"):
        Tools([NOW], tiny_tokenizer).regex("required", ["then"])
    with pytest.raises(IlladaError, match="give some"):
        Tools([], tiny_tokenizer).regex()
