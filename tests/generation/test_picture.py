"""The picture of how an answer forms."""

import html
import math
import re

import pytest

from illada import GenerationSettings, cli
from illada.errors import IlladaError
from illada.generation.engine import StepEvent, generate
from illada.generation.optional.picture import END, MOST, Drawing, draw_steps, recorded


class Letters:
    """A tokenizer whose ids are letters."""

    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids)


def texts(picture):
    """Return the texts of an SVG picture with letters kept as text, without those of the axes."""
    found = map(html.unescape, re.findall(r"<!-- (.+?) -->", picture.decode()))
    return [text for text in found if not text.isdigit() and text not in {"step", "position in the answer"}]


def test_every_step_is_a_row_and_the_end_has_a_sign():
    steps = [
        StepEvent(0, 0, 0, [1, 2], [True, False], [0.9, math.nan], False, [False, False]),
        StepEvent(0, 0, 1, [1, 3, 4, 4], [True, True, False, False], [0.9, 0.5, 0.1, 0.1], False, [True, False] * 2),
        StepEvent(0, 2, 0, [1, 3, 0, 4], [True, True, True, False], [0.9, 0.5, 1.0, 0.1], True, [True, False] * 2),
    ]
    shown = [recorded(Letters(), step, (0,)) for step in steps]
    assert shown[2]["tokens"] == ["a", "c", END, "d"]
    assert texts(draw_steps(shown, "of $5", "svg")) == [*"ab", *"acdd", "a", "c", "END", "d", "of $5"]


def test_letters_that_no_font_has_do_no_harm(recwarn):
    step = {"tokens": ["\x12", "\U0010fffd", "漢字", "\n", " "], "committed": [True] * 5, "confidence": [1.0] * 5}
    assert texts(draw_steps([step], form="svg"))[0] == "·"
    assert not recwarn.list


@pytest.mark.parametrize(
    ("token", "sign"),
    [
        (" two", "two"),
        ("->", "->"),
        ("<=", "<="),
        ("<|user|>", "user"),
        ("\n\n", "↵↵"),
        ("  ", "␣"),
        ("x" * 40, "x" * 16),
        ("a$b", "a$b"),
    ],
)
def test_a_token_is_shown_as_it_is(token, sign):
    assert texts(draw_steps([{"tokens": [token], "committed": [True], "confidence": [1.0]}], form="svg")) == [sign]


@pytest.mark.slow
def test_of_a_long_answer_the_beginning_is_drawn():
    ids, late = [1] * (MOST + 9), [False] * 9
    events = [StepEvent(0, 0, i, ids, [True] * MOST + late, [1.0] * (MOST + 9), False) for i in range(5)]
    shown = draw_steps([recorded(Letters(), event, ()) for event in events], form="svg")
    assert texts(shown) == [f"position in the answer, the first {MOST} of {MOST + 9}"] + ["a"] * MOST
    many = [StepEvent(0, 0, i, [1, 2], [True, False], [1.0, i / 100], False) for i in range(MOST + 9)]
    assert texts(draw_steps([recorded(Letters(), event, ()) for event in many], form="svg")) == ["a", "b"] * MOST


def test_a_long_prompt_is_a_title_of_three_lines_at_most(tmp_path):
    step = {"tokens": ["a"], "committed": [True], "confidence": [1.0]}
    *title, token = texts(draw_steps([step], "one two\nthree " * 40, "svg"))[::-1]
    assert token == "a"
    assert len(title) <= 3
    with pytest.raises(IlladaError, match="was not drawn: the answer took no step"):
        Drawing(tmp_path / "a.png", ["one"]).write(Letters(), ())


def test_colours_say_what_a_form_forced():
    one = {"tokens": ["a"], "committed": [True], "confidence": [1.0]}  # as demos before 2026-11-29 recorded it
    kinds = ({}, {"forced": [True]}, {"confidence": [math.nan]}, {"committed": [False]})
    blue, *others = (re.sub(rb'id="[^"]*"|#[0-9a-z]{11}', b"", draw_steps([one | more], form="svg")) for more in kinds)
    assert len({blue, *others}) == 4


def test_the_command_draws_what_generate_does(model_folder, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("illada.generation.optional.picture.draw_steps", lambda *words: seen.append(words) or b"drawn")
    path = tmp_path / "forming.svg"
    words = ["--model", str(model_folder), "--prompt", "one two", "--max_new_tokens", "8", "--block_length", "4"]
    cli.main(["generate", *words, "--picture", str(path)])
    assert path.read_bytes() == b"drawn"
    ((steps, title, form),) = seen
    assert (title, form) == ("one two", "svg")
    assert all(steps[-1]["committed"])
    plain = capsys.readouterr().out
    cli.main(["generate", *words])
    assert capsys.readouterr().out == plain


def test_slots_are_drawn_too(model_folder, tmp_path):
    path = tmp_path / "forming.png"
    words = ["--model", str(model_folder), "--prompt", "one ___ two ___", "--slot_tokens", "2"]
    cli.main(["generate", *words, "--picture", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_causal_model_is_drawn_too(build_model, tiny_tokenizer, tmp_path):
    model = build_model(tie=True, causal=True, seed=1, vocab_size=len(tiny_tokenizer))
    drawing = Drawing(tmp_path / "a.pdf", ["one"])
    settings = GenerationSettings(max_new_tokens=32, eos_token_id=None)
    generate(model, ["one"], settings, tiny_tokenizer, drawing.events.append)
    drawing.write(tiny_tokenizer, ())
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("name", "prompts", "says"),
    [
        ("a.gif", ["one"], r"picture .*a.gif is no picture: its name must end in .png, .svg, .pdf"),
        ("none/a.png", ["one"], r"picture .* cannot be written: there is no folder"),
        ("a.png", ["one", "two"], "picture shows one answer, and there are 2 prompts: give one of them"),
    ],
)
def test_what_cannot_be_drawn_is_said_at_once(tmp_path, name, prompts, says):
    with pytest.raises(IlladaError, match=says):
        Drawing(tmp_path / name, prompts)
