"""Parsers on hard cases, and running programs.

`answers.json` holds constructed answers and what the authors' task files read in them, written by running their code
once; `minerva` and `normal` come from lm-evaluation-harness 0.4.10.
"""

import ast
import json
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from lm_eval.api.instance import Instance
from lm_eval.filters import build_filter_ensemble
from lm_eval.utils import apply_template

from illada.evaluation import answers, programs, task_files
from illada.evaluation.answers import hash_answer, hash_number, letter, math_answer
from illada.evaluation.formulas import boxed, same_formula
from illada.evaluation.programs import block_program, clean, marks_program
from illada.evaluation.sandbox import passes
from illada.evaluation.tasks import minerva

CASES = json.loads(Path(__file__).with_name("answers.json").read_text(encoding="utf-8"))


def test_numbers_are_read_as_the_authors_read_them():
    for text, want in CASES["gsm8k"]:
        assert hash_number(text) == (None if want == "[invalid]" else Fraction(want)), text


def test_letters_are_read_as_the_authors_read_them():
    for text, want in CASES["mmlu_pro"]:
        assert (letter(text) or "[invalid]") == want, text


def test_formulas_are_read_as_the_authors_read_them():
    for text, want in CASES["math"]:
        assert minerva.reasoning_answer(text) == want, text
    for text, want in CASES["normal"]:
        assert minerva.normalise(text) == want, text


def test_programs_are_read_as_the_authors_read_them():
    for text, want in CASES["humaneval"]:
        assert block_program(text, CASES["prompt"], "f").strip() == want.strip(), text
    for text, want in CASES["mbpp"]:
        assert marks_program(text, ["assert f(2) == [0, 1]"]) == want, text
    for text, tests, want in CASES["mbpp_tests"]:
        assert marks_program(text, tests) == want, tests


@pytest.mark.slow
def test_formulas_are_compared_as_in_version_0_4_10():
    # 0.4.13 takes equal texts for equal formulas, keeps the comma of 0,1, and finds no unit ft in \left.
    for gold, said, exact, verified in CASES["minerva"]:
        doc = {"solution": f"$\\boxed{{{gold}}}$", "answer": minerva.normalise(gold)}
        answer = f"Final Answer: The final answer is ${said}$. I hope it is correct."
        assert minerva.process_results(doc, [answer]) == {"exact_match": exact, "math_verify": verified}, gold
    for gold, said, *want in CASES["reasoning"]:
        doc = {"solution": f"$\\boxed{{{gold}}}$", "answer": minerva.normalise(gold)}
        found = minerva.reasoning_results(doc, [said])
        assert [found[name] for name in ("answer_match", "exact_match", "math_verify")] == want, gold


def test_the_shots_have_the_slips_of_version_0_4_10():
    first, _, third, fourth = minerva.shots()
    assert first["problem"].endswith("{5-x}}$.}")
    assert "30n&=480\\\n\\Rightarrow" in third["solution"]
    assert "6x-4y&=a,\\\n6y" in fourth["problem"]
    assert "\\\\" not in third["solution"] + fourth["problem"]


def range_by_range(lines):
    """The rule in plain words: of all ranges of lines that can be parsed, the first with most lines not blank."""
    most, best = 0, ""
    for start in range(len(lines)):
        for end in range(start + 1, len(lines) + 1):
            text, filled = "\n".join(lines[start:end]), sum(bool(line.strip()) for line in lines[start:end])
            try:
                ast.parse(text)
            except SyntaxError:
                continue
            if filled > most:
                most, best = filled, text
    return best


@pytest.mark.parametrize("text", [text for text, _ in CASES["mbpp"][::3]])
def test_the_longest_range_is_that_of_a_plain_search(text):
    lines = f'x = 1\n{text}\n"""\ny = (\n\n'.split("\n")[:30]
    found = programs._longest(lines)
    assert [ast.dump(node) for node in found] == [ast.dump(node) for node in ast.parse(range_by_range(lines)).body]


def test_cleaning_parses_few_ranges(monkeypatch):
    calls = []
    parse = programs._parse
    monkeypatch.setattr(programs, "_parse", lambda *arguments: calls.append(1) or parse(*arguments))
    prose = "This solution is right, is it not?\n" * 60
    assert clean(f"def f(x):\n    return x\n{prose}", "f") == "def f(x):\n    return x"
    assert len(calls) < 600  # of 1,953 ranges


@pytest.mark.parametrize("terms", [500, 1000, 2000, 4000])
def test_what_is_nested_too_deep_is_no_program(terms):
    code = "def f(x):\n    return x" + "+1" * terms
    assert clean(code, "f") in ("", code.replace("+", " + "))


class Loader(yaml.SafeLoader):
    """Task files without their functions."""


Loader.add_constructor("!function", lambda loader, node: node.value)


def task(name):
    """A task file with what it includes."""
    found = yaml.load((task_files.TASKS / f"{name}.yaml").read_text(), Loader)
    return (task(found.pop("include").removesuffix(".yaml")) if "include" in found else {}) | found


QUESTIONS = {
    "gsm8k": {"question": "Q1?"},
    "math": {"problem": "Q1?"},
    "mmlu_pro": {"question": "Q1?", "options": ["x", "y"], "category": "law"},
    "humaneval_chat": {"prompt": "def f():\n"},
    "mbpp_chat": {"text": "Q1?", "test_list": ["assert f(1)", "assert f(2)", "assert f(3)"]},
}


@pytest.mark.parametrize(
    ("name", "demands", "stops"),
    [
        ("gsm8k", ["Q1?", "step by step", "\n#### "], ["Q:", "</s>", "<|im_end|>"]),
        ("math", ["Q1?", "step by step", "\n#### ", "nothing but the answer"], ["Problem:"]),
        ("mmlu_pro", ["law", "Q1?", "A. x\nB. y\n", "step by step", "the answer is (X)"], ["Question:"]),
        (
            "humaneval_chat",
            ["<think>", "</think>", "briefly", "one ```python block", "def f():"],
            ["\nTest the above solution", "\nNow test the solution", "\nThe above solution"],
        ),
        (
            "mbpp_chat",
            ["Q1?", "assert f(1)\nassert f(2)\nassert f(3)\n", "[BEGIN]\n", "\n[DONE]", "no ``` fences", "no tests"],
            ["[DONE]"],
        ),
    ],
)
def test_prompts_demand_what_the_authors_demand(name, demands, stops):
    found = task(name)
    text = apply_template(found.get("description", "") + found["doc_to_text"], QUESTIONS[name])
    assert all(demand in text for demand in demands)
    assert ("<think>" in text) == (name == "humaneval_chat")
    assert found["generation_kwargs"]["until"] == stops


def test_stops_of_the_base_rows():
    assert task("humaneval")["generation_kwargs"]["until"] == ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
    assert task("mbpp")["generation_kwargs"]["until"] == ["[DONE]"]
    subjects, problems = task("minerva_math"), task("minerva_math500")
    assert subjects["generation_kwargs"]["until"] == ["Problem:"]
    names = subjects.keys() & problems.keys() - {"task", "dataset_path"}
    assert {"process_docs", "doc_to_text", "process_results", "fewshot_config"} < names
    assert all(subjects[name] == problems[name] for name in names)


def test_mmlu_is_read_by_its_leading_capital():
    (pipeline,) = task("mmlu_generative")["filter_list"]
    ensemble = build_filter_ensemble(
        pipeline["name"],
        [[step.pop("function"), step] for step in pipeline["filter"]],
    )
    said = ["B", "B. since", "Because", " B", "b", "(B)", "B\nC", ""]
    requests = [Instance("generate_until", {}, (), i, resps=[text]) for i, text in enumerate(said)]
    ensemble.apply(requests)
    found = [request.filtered_resps["get_response"] for request in requests]
    assert found == ["B", "B", "B", "[invalid]", "[invalid]", "[invalid]", "B", "[invalid]"]


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
        ("#### 3\nwait, let me check again\n#### $5$", "5"),
        ("#### 3</think>\n#### 8 dollars\n", "8 dollars"),
        ("#### 3</think>nothing", None),
        ("so it is #### 12", None),
        ("####\n7", "7"),
    ],
)
def test_hash_answer(text, want):
    assert hash_answer(text) == want


def test_gsm8k_compares_numbers():
    doc = {"answer": "3000 + 400 = 3400\n#### 3,400"}
    assert answers.hash_results(doc, ["<think>#### 1</think> #### $3400.00"]) == {"exact_match": 1.0}
    assert answers.hash_results(doc, ["#### 3401"]) == {"exact_match": 0.0}
    assert answers.hash_results(doc, ["#### none"]) == {"exact_match": 0.0}
    assert answers.hash_results(doc, ["3,400"]) == {"exact_match": 0.0}
    assert answers.hash_results({"answer": "3,400"}, ["####\n3400"]) == {"exact_match": 1.0}


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
    assert math_answer("\\boxed{1}\n#### 2") == "2"
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
        (r"\pi 2 p", r"2p\pi"),
        ("m^2n", "nm^2"),
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
        ("x", "y"),
        ("n^2", "m^2"),
        ("p", r"\pi"),
        ("2b", "a+c"),
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


def test_letters_of_documents():
    assert answers.letter_results({"answer": "J"}, ["the answer is J"]) == {"exact_match": 1.0}
    assert answers.choice_results({"answer": 2}, ["C."]) == {"exact_match": 1.0}
    assert answers.choice_results({"answer": 2}, ["I think it is A, but the answer is (C)"]) == {"exact_match": 1.0}
    assert answers.choice_results({"answer": 2}, ["A"]) == {"exact_match": 0.0}


def test_programs_are_run_with_their_tests():
    human = {"prompt": "def f(x):\n", "entry_point": "f", "test": "def check(g):\n    assert g(2) == 4"}
    assert answers.continuation_results(human, ["    return x * 2"])["pass_at_1"] == 1
    assert answers.continuation_results(human, ["    return x"])["pass_at_1"] == 0
    assert answers.block_results(human, ["```python\ndef f(x):\n    return x + 2\n```"])["pass_at_1"] == 1
    assert answers.block_results(human, ["```python\n    return x ** 2\n```"])["pass_at_1"] == 1
    mbpp = {"test_list": ["assert f(1) == 3", "assert f(2) == 4"]}
    assert answers.program_results(mbpp, ["def f(x):\n    return x + 2\n"])["pass_at_1"] == 1
    assert answers.program_results(mbpp, ["```python\ndef f(x):\n    return x + 2\n```"])["pass_at_1"] == 0
    assert answers.marks_results(mbpp, ["```python\ndef f(x):\n    return x + 2\n```"])["pass_at_1"] == 1
    assert answers.marks_results(mbpp, ["[BEGIN]def f(x):\n    return 3\n[DONE]"])["pass_at_1"] == 0


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
