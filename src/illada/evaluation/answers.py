"""Find the number, letter, formula or program in a generated text, and say whether it is right.

The functions named `*_results` serve as `process_results` of task files. They take the document and [the answer]. What
they read, and what they pass over, is what the authors' task files for the instruct model read (`eval_instruct/` of
their repository), so that equal answers get equal marks.
"""

import re
from fractions import Fraction
from typing import Any

from illada.evaluation.formulas import boxed, same_formula
from illada.evaluation.programs import block_program, marks_program
from illada.evaluation.sandbox import passes
from illada.evaluation.thinking import after_thinking

Document = dict[str, Any]

# Numbers


def hash_number(text: str) -> Fraction | None:
    """Return the number after the last `####` that has one, after the thinking: 1,234.50 · -$7 · a line further on."""
    found = re.findall(r"####\s*([+-]?)\$?(\d[\d,]*(?:\.\d+)?)", after_thinking(text))
    return Fraction("".join(found[-1]).replace(",", "")) if found else None


def hash_results(doc: Document, results: list[str]) -> dict[str, float]:
    """Score GSM8K: the numbers after `####` in the answer and in doc["answer"] are equal."""
    answer, truth = hash_number(results[0]), hash_number("#### " + doc["answer"].rpartition("####")[2].strip())
    return {"exact_match": float(answer is not None and answer == truth)}


# Formulas


def hash_answer(text: str) -> str | None:
    """Return the rest of the last line that begins with `####`, after the thinking, without dollars and a full stop."""
    lines = re.findall(r"^####\s*(.+?)\s*$", after_thinking(text), re.MULTILINE)
    return bare(lines[-1]) if lines else None


def bare(formula: str) -> str:
    """Return a formula without white space and dollars around it and a full stop behind it."""
    return formula.strip().strip("$").strip().rstrip(".。;；")


def math_answer(text: str) -> str | None:
    """Return the answer to a problem of MATH: after the last `####` after the thinking, else in the last box."""
    line = hash_answer(text)
    return (boxed(line) or line) if line else boxed(after_thinking(text)) or boxed(text)


def math_results(doc: Document, results: list[str]) -> dict[str, float]:
    """Score a formula without computer algebra: the answer equals the box in doc["solution"] (ours)."""
    answer, truth = math_answer(results[0]), boxed(doc["solution"])
    return {"exact_match": float(answer is not None and truth is not None and same_formula(answer, truth))}


# Letters

PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "（": "(", "）": ")", "\u200b": ""})
"""Typographic signs, which the patterns do not know."""
_LETTER = r"(?:\\?\(|\[|\{)?\s*(?<![A-Z])([A-J])(?![A-Z])\s*(?:\\?\)|\]|\})?"
LETTER_PATTERNS = tuple(
    re.compile(pattern.replace("@", _LETTER), re.IGNORECASE)
    for pattern in (
        r"\\boxed\{\s*(?:the\s+answer\s+is\s*)?@\s*\}",
        r"\banswer\s*(?:is|[:=])\s*(?:option|choice)?\s*@",
        r"\banswer\b\s*(?:[-:]|\r?\n)\s*@",
        r"\b(?:correct|best)\s+(?:answer|option|choice)\s*(?:is|[:=])\s*@",
        r"\b(?:option|choice)\s*@\s*(?:is|would\s+be|seems|looks|matches|fits)\s+(?:the\s+)?(?:best|correct|right|answer)",
        r"\b(?:choose|select|pick|go\s+with)\s*(?:option|choice)?\s*@",
        r"\b(?:therefore|thus|hence|so|finally|overall|in\s+conclusion)[^.\n]{0,160}?\b"
        r"(?:answer|option|choice)\s*(?:is|[:=])?\s*@",
    )
)
"""Ways to name a letter; whichever ends last counts, so `The answer is (C). Option A is too small.` says C."""


def letter(text: str) -> str | None:
    """Return the letter, A to J, that a text decides on, after the thinking or else within it, by `LETTER_PATTERNS`."""
    text = text.translate(PLAIN)
    for region in (after_thinking(text).strip() or text, text):
        found = [(match.end(), match[1].upper()) for pattern in LETTER_PATTERNS for match in pattern.finditer(region)]
        if found:
            return max(found)[1]
    return None


def letter_results(doc: Document, results: list[str]) -> dict[str, float]:
    """Score MMLU-Pro: the letter is doc["answer"]."""
    return {"exact_match": float(letter(results[0]) == doc["answer"])}


def choice_results(doc: Document, results: list[str]) -> dict[str, float]:
    """Score lettered choices: the letter, or the one with which the answer begins, is at the index doc["answer"]."""
    bare = re.match(r"\W*([A-J])\b", after_thinking(results[0]))
    found = letter(results[0]) or (bare and bare[1])
    return {"exact_match": float(found == "ABCDEFGHIJ"[int(doc["answer"])])}


# Programs


def continuation_results(doc: Document, results: list[str]) -> dict[str, float]:
    """Score HumanEval by a base model: the answer continues the prompt."""
    return {"pass_at_1": _passes(doc["prompt"] + results[0], f"{doc['test']}\ncheck({doc['entry_point']})")}


def block_results(doc: Document, results: list[str]) -> dict[str, float]:
    """Score HumanEval by a chat model: the last block of Python counts, cleaned, behind the prompt's own helpers."""
    program = block_program(results[0], doc["prompt"], doc["entry_point"])
    return {"pass_at_1": _passes(program, f"{doc['test']}\ncheck({doc['entry_point']})")}


def program_results(doc: Document, results: list[str]) -> dict[str, float]:
    """Score MBPP by a base model: the answer, as it is, passes doc["test_list"]."""
    return {"pass_at_1": _passes(results[0], "\n".join(doc["test_list"]))}


def marks_results(doc: Document, results: list[str]) -> dict[str, float]:
    """Score MBPP by a chat model: the program between the marks, cleaned, passes doc["test_list"]."""
    return {"pass_at_1": _passes(marks_program(results[0], doc["test_list"]), "\n".join(doc["test_list"]))}


def mbpp_shots(documents: Any) -> Any:
    """Return the examples of MBPP's published format: tasks 2, 3 and 4 of the split "prompt"."""
    return documents.filter(lambda document: document["task_id"] in (2, 3, 4))


def _passes(program: str, tests: str) -> float:
    return float(passes(f"{program}\n\n{tests}\n"))
