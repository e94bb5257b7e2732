"""Parsers on hard cases, and running programs."""

from fractions import Fraction

import pytest

from illada.evaluation import answers
from illada.evaluation.answers import boxed, hash_answer, letter, math_answer, number, same_formula
from illada.evaluation.sandbox import passes


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a </think> b </think> c", " c"),
        ("no thought at all", "no thought at all"),
        ("<think> cut off in the mid", "<think> cut off in the mid"),
        ("done</think>", ""),
    ],
)
def test_after_thinking(text, want):
    assert answers.after_thinking(text) == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("12 apples\n#### 12", "12"),
        ("#### 3\nwait, let me check again\n#### 5", "5"),
        ("#### 3</think>the end #### 8 dollars\n", "8 dollars"),
        ("#### 3</think>nothing", None),
        ("so it is 12", None),
        ("#### ", None),
        ("####7", "7"),
    ],
)
def test_hash_answer(text, want):
    assert hash_answer(text) == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("1,234.50 dollars", Fraction(2469, 2)),
        ("$1,000,000", 10**6),
        ("$-7", -7),
        ("-$7", -7),
        ("3/4 of a cup", Fraction(3, 4)),
        ("12 + 3 = 15", 15),
        ("x = 1,2", 1),
        ("20%", 20),
        ("5.", 5),
        (".5", Fraction(1, 2)),
        ("1{,}500", 1500),
        ("1/0", None),
        ("five", None),
        ("", None),
    ],
)
def test_number(text, want):
    assert number(text) == want


def test_gsm8k_compares_numbers():
    doc = {"answer": "3000 + 400 = 3400\n#### 3,400"}
    assert answers.hash_results(doc, ["<think>#### 1</think> #### $3400.00"]) == {"exact_match": 1.0}
    assert answers.hash_results(doc, ["#### 3401"]) == {"exact_match": 0.0}
    assert answers.hash_results(doc, ["#### none"]) == {"exact_match": 0.0}
    assert answers.hash_results(doc, ["3,400"]) == {"exact_match": 0.0}


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (r"so \boxed{\frac{1}{\sqrt{2}}} holds", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{3} and then \boxed{\frac{1}{", "3"),
        (r"$\boxed 7$.", "7"),
        (r"\fbox{x}", "x"),
        (r"\boxed{\text{(B)}}", r"\text{(B)}"),
        ("none", None),
    ],
)
def test_boxed(text, want):
    assert boxed(text) == want


def test_math_takes_the_hash_line_then_the_last_box():
    assert math_answer(r"\boxed{1} #### 2") == "2"
    assert math_answer(r"#### $\boxed{\frac{1}{2}}$") == r"\frac{1}{2}"
    assert math_answer(r"\boxed{1}</think>no box here") == "1"
    assert math_answer("nothing") is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\frac{1}{2}", "0.5"),
        (r"\dfrac12", "1/2"),
        (r"1\frac{1}{2}", r"\tfrac{3}{2}"),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt2}"),
        (r"x(x+1)", "x^2 + x"),
        (r"2\pi r", r"r \cdot 2\pi"),
        (r"10\text{ cm}^2", "10"),
        ("12 inches", "12"),
        (r"30^\circ", "30"),
        (r"\$5", "5"),
        (r"50\%", "50"),
        ("x = 5", "5"),
        ("1,000,000", "1000000"),
        (r"1{,}000", "1000"),
        (r"\left(1, \frac12\right)", "(1, 0.5)"),
        (r"\{1, 2\}", r"\{2, 1\}"),
        ("1, 2", "2,1"),
        ("x = 1, x = 2", "1, 2"),
        (r"\(5\)", "5"),
        (r"x \in [1, 2)", "[1,2)"),
        ("7.", "7"),
        (r"\text{Monday}", "monday"),
        ("(-\\infty, 3]", "(-\\infty,3]"),
        (r"2^{10}", "1024"),
        (r"\sqrt[3]{8}", "2"),
        (r"\frac{x+1}{\frac{1}{x}}", "x^2+x"),
    ],
)
def test_equal_formulas(one, other):
    assert same_formula(one, other)
    assert same_formula(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("(1, 2)", "(2, 1)"),
        ("[1, 2)", "(1, 2)"),
        (r"\{1, 1\}", r"\{1, 2\}"),
        ("1, 2", "1, 2, 3"),
        ("x", "y^2"),
        ("x+y", "x+z^2"),
        ("0.333", r"\frac{1}{3}"),
        ("", ""),
        ("", "1"),
        ("__import__('os')", "0"),
        ("9^{9^{9^{9}}}", "1"),
        (r"\text{Monday}", r"\text{Tuesday}"),
    ],
)
def test_unequal_formulas(one, other):
    assert not same_formula(one, other)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("The answer is (C).", "C"),
        ("A is wrong. B? The answer is (A). Wait. The answer is: **D**", "D"),
        (r"\boxed{\text{E}}", "E"),
        ("#### B", "B"),
        ("(A) is too small</think>\nJ", "J"),
        ("A", "A"),
        ("**F.**", "F"),
        ("I think that a good choice would be G", "G"),
        ("It must be (H), as a check shows", "H"),
        ("I do not know a thing", None),
        ("The answer is (A)</think>", None),
        ("", None),
    ],
)
def test_letter(text, want):
    assert letter(text) == want


def test_letters_of_documents():
    assert answers.letter_results({"answer": "J"}, ["the answer is J"]) == {"exact_match": 1.0}
    assert answers.choice_results({"answer": 2}, ["C."]) == {"exact_match": 1.0}
    assert answers.choice_results({"answer": 2}, ["A"]) == {"exact_match": 0.0}


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("```python\na\n```\nthen\n```python\nb\n```", "b"),
        ("```python\na\n```\n```text\nb\n```", "a"),
        ("```\nc\n```", "c"),
        ("```python\na\n```</think>```python\nd\nstill going", "d\nstill going"),
        ("no code", None),
    ],
)
def test_python_block(text, want):
    assert answers.python_block(text) == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("[BEGIN]\na\n[DONE]\n[BEGIN]\nb\n[DONE] rest", "b"),
        ("a = 1\n[DONE]\nmore", "a = 1"),
        ("<think>[BEGIN] x [DONE]</think>[BEGIN]\n```python\ny\n```\n[DONE]", "y"),
        ("[BEGIN]\ncut off", "cut off"),
    ],
)
def test_between_marks(text, want):
    assert answers.between_marks(text) == want


def test_programs_are_run_with_their_tests():
    human = {"prompt": "def f(x):\n", "entry_point": "f", "test": "def check(g):\n    assert g(2) == 4"}
    assert answers.continuation_results(human, ["    return x * 2"])["pass_at_1"] == 1
    assert answers.continuation_results(human, ["    return x"])["pass_at_1"] == 0
    assert answers.block_results(human, ["```python\ndef f(x):\n    return x + 2\n```"])["pass_at_1"] == 1
    assert answers.block_results(human, ["```python\n    return x ** 2\n```"])["pass_at_1"] == 1
    mbpp = {"test_setup_code": "k = 3", "test_list": ["assert f(1) == k", "assert f(2) == k + 1"]}
    assert answers.marks_results(mbpp, ["def f(x):\n    return x + 2\n[DONE]"])["pass_at_1"] == 1
    assert answers.marks_results(mbpp, ["def f(x):\n    return 3\n[DONE]"])["pass_at_1"] == 0


def test_the_sandbox_lets_work_through(tmp_path):
    assert passes(
        "import math, re, collections\nopen('here.txt', 'w').write('x')\nassert math.pi > 3\nprint('x' * 10**5)"
    )


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "def f(:",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.fork()",
        "import ctypes",
        "open('/tmp/illada-sandbox-test', 'w')",
        "x = bytearray(10**9)",
        "open('big', 'wb').write(b'x' * 2**22)",
    ],
)
def test_the_sandbox_refuses(program):
    assert not passes(program, memory=2**29)


@pytest.mark.slow
def test_the_sandbox_ends_what_does_not_end():
    assert not passes("while True: pass", seconds=0.5)
    assert not passes("import time; time.sleep(60)", seconds=0.5)
