"""Find the number, letter, box or program in a generated text, and say whether it is right.

The functions named `*_results` serve as `process_results` of task files. They take the document and [the answer].
"""

import ast
import cmath
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from illada.evaluation.sandbox import passes

Document = dict[str, Any]
LETTER_PATTERNS = (
    r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-J])\)?",
    r"####\s*\(?([A-J])\b",
    r"(?i:answer|option|choice)\s*(?i:is|would be|must be)?\s*:?\s*(?:\*\*|\$)*\s*\(?([A-J])\b",
    r"^\s*(?:\*\*)?\(?([A-J])\)?(?:\*\*)?\s*[.:)]?\s*$",
    r"\(([A-J])\)",
    r"\b([B-HJ])\b",  # A and I are also words
)
"""Signs of a letter, the surest first; the last match of the first pattern that matches counts (ours)."""


def after_thinking(text: str) -> str:
    """Return what follows the last `</think>`; all of the text when there is none."""
    return text.rpartition("</think>")[2]


# Numbers


def hash_answer(text: str) -> str | None:
    """Return the rest of the line after the last `####`, after the thinking (authors' evaluation code)."""
    lines = re.findall(r"####[ \t]*(\S[^\n]*)", after_thinking(text))
    return lines[-1].strip() if lines else None


def number(text: str) -> Fraction | None:
    """Return the first number, after the last `=` if there is one: 1,234.50 · $7 · -3/4 · 20% (as 20)."""
    text = re.sub(r"(?<=\d)(?:,|\\,|\{,\})(?=\d{3}(?!\d))", "", text.rpartition("=")[2])
    match = re.search(r"(-?)\s*\$?\s*(-?)(\d+\.?\d*|\.\d+)(?:\s*/\s*(\d+))?", text)
    if match is None or not int(match[4] or 1):
        return None
    return Fraction(match[3].rstrip(".")) / int(match[4] or 1) * (-1 if match[1] or match[2] else 1)


def hash_results(doc: Document, results: list[str]) -> dict[str, float]:
    """Score GSM8K: the numbers after `####` in the answer and in doc["answer"] are equal."""
    answer, truth = hash_answer(results[0]), hash_answer(doc["answer"]) or doc["answer"]
    return {"exact_match": float(answer is not None and number(answer) is not None and number(answer) == number(truth))}


# Formulas


def boxed(text: str) -> str | None:
    r"""Return the content of the last complete \boxed{...} or \fbox{...}, nested braces included, or of `\boxed 7`."""
    for box in reversed(list(re.finditer(r"\\f?box(?:ed)?\s*", text))):
        inside = _braces(text, box.end())
        if inside is not None:
            return inside
        if bare := re.match(r"[^\s{}$\\][^\s{}$]*", text[box.end() :]):
            return bare[0].rstrip(".")
    return None


def _braces(text: str, start: int) -> str | None:
    """Return the content of the braces that open at `start`, or None when none open there or they never close."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start + 1 : place] if place > start else None
    return None


def math_answer(text: str) -> str | None:
    """Return the answer to a MATH problem: after the last `####` after the thinking, else in the last box."""
    line = hash_answer(text)
    return (boxed(line) or line) if line else boxed(after_thinking(text)) or boxed(text)


def math_results(doc: Document, results: list[str]) -> dict[str, float]:
    """Score MATH: the answer equals the box in doc["solution"]."""
    answer, truth = math_answer(results[0]), boxed(doc["solution"])
    return {"exact_match": float(answer is not None and truth is not None and same_formula(answer, truth))}


def plain_formula(text: str) -> str:
    """Return a formula without spacing, units, decoration and a leading `x =`, which do not change its value."""
    text = re.sub(r"\$|\\[()\[\]]|\\(?:left|right|displaystyle|big|Big)(?![a-z])", "", text.replace(r"\$", ""))
    text = re.sub(r"\\[,;:! ]|\\quad|~|\{,\}", lambda m: "," if m[0] == "{,}" else "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\^\{?\\circ\}?|\\degree|\\?%", "", text).strip().rstrip(".")
    if whole := re.fullmatch(r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}", text):
        text = whole[1]
    # Words after a number are its unit, with the unit's exponent.
    text = re.sub(r"(?<=[\d}])\s*\\(?:text|mbox|mathrm|textbf)\{[^{}]*\}(?:\^\{?\d\}?)?", "", text)
    text = re.sub(r"(?<=\d)\s+[a-zA-Z]{2,}.*$", "", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text) else text
    text = re.sub(r"^\s*[a-zA-Z](?:\([a-z]\))?\s*(?:=|\\in)\s*", "", text)
    return re.sub(r"\s+", "", text)


def same_formula(one: str, other: str) -> bool:
    """Return whether two formulas are equal as text, part by part (tuples, intervals, sets), or in value.

    Values are compared at a few points for every letter, so that x(x+1) equals x^2+x without computer algebra. Parts of
    a set, and of a bare list such as `1, 2`, may come in any order (ours).
    """
    one, other = plain_formula(one), plain_formula(other)
    if one.casefold() == other.casefold():
        return bool(one)
    parts, others = _parts(one), _parts(other)
    if len(parts) > 1 or len(others) > 1:
        # Half-open and closed intervals differ, and so do (1, 2) and a bare 1, 2.
        if len(parts) != len(others) or _ends(one) != _ends(other):
            return False
        if _ends(one) in (("", ""), (r"\{", r"\}")):
            for part in parts:
                match = next((o for o in others if same_formula(part, o)), None)
                if match is None:
                    return False
                others.remove(match)
            return True
        return all(same_formula(*pair) for pair in zip(parts, others, strict=True))
    values = [_values(text) for text in (one, other)]
    return all(values) and all(cmath.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9) for a, b in zip(*values, strict=True))


def _ends(text: str) -> tuple[str, str]:
    match = re.fullmatch(r"(\\\{|[\[(])(.*)(\\\}|[\])])", text)
    return (match[1], match[3]) if match else ("", "")


def _parts(text: str) -> list[str]:
    """Take off the outermost brackets and split at the commas outside the others."""
    left, right = _ends(text)
    inside = text[len(left) : len(text) - len(right)]
    parts, depth = [""], 0
    for sign in inside:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


POINTS = (0.7310585, 1.6487213, 2.4142136)
OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
MOST = 1e6
"""Largest exponent that is computed."""


def _values(formula: str) -> list[complex]:
    """Return the values of a formula at the points, or nothing when it cannot be read."""
    text = formula
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\d.])(\d+)(\\frac\{\d+\}\{\d+\})", r"(\1+\2)", text)  # a mixed number
    for _ in range(8):  # innermost first
        text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
        text = re.sub(r"\\sqrt\[(\d+)\]\{([^{}]*)\}", r"((\2)**(1/\1))", text)
        text = re.sub(r"\\sqrt\{([^{}]*)\}", r"((\1)**(1/2))", text)
        text = re.sub(r"\^\{([^{}]*)\}", r"**(\1)", text)
    text = text.replace("^", "**").replace(r"\cdot", "*").replace(r"\times", "*").replace(r"\pi", "p")
    if re.search(r"\\|[{}_]|[a-zA-Z]{3}", text):
        return []
    text = re.sub(r"(?<=[\da-zA-Z)])(?=[a-zA-Z(])|(?<=\))(?=[\d])", "*", text)
    try:
        tree = ast.parse(text, mode="eval").body
        names = sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - {"p"})
        return [complex(_value(tree, {"p": cmath.pi} | {name: x + i for i, name in enumerate(names)})) for x in POINTS]
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return []


def _value(node: ast.expr, letters: dict[str, float]) -> complex:
    """Compute a formula of numbers, letters, the four operations and powers; raise ValueError on anything else."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return complex(value)
        case ast.Name(id=name) if name in letters:
            return complex(letters[name])
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner, letters)
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):
            return _value(inner, letters)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            a, b = _value(left, letters), _value(right, letters)
            if isinstance(op, ast.Pow) and abs(b) > MOST:
                raise ValueError("exponent too large")
            return complex(OPERATORS[type(op)](a, b))
    raise ValueError("no formula")


# Letters


def letter(text: str) -> str | None:
    """Return the letter, A to J, that a text decides on after the thinking, by `LETTER_PATTERNS`."""
    answer = after_thinking(text)
    for pattern in LETTER_PATTERNS:
        if matches := re.findall(pattern, answer, re.MULTILINE):
            return str(matches[-1])
    return None


def letter_results(doc: Document, results: list[str]) -> dict[str, float]:
    """Score MMLU-Pro: the letter is doc["answer"]."""
    return {"exact_match": float(letter(results[0]) == doc["answer"])}


def choice_results(doc: Document, results: list[str]) -> dict[str, float]:
    """Score MMLU and MMLU-Redux by generation: the letter is the one at the index doc["answer"]."""
    return {"exact_match": float(letter(results[0]) == "ABCD"[int(doc["answer"])])}


# Programs


def python_block(text: str) -> str | None:
    """Return the last block of Python, else of any code, after the thinking; the block at the end may be open."""
    answer = after_thinking(text)
    for opening in (r"```[ \t]*(?:python|py)[ \t]*\n", r"```[ \t]*\w*[ \t]*\n"):
        if blocks := re.findall(opening + r"(.*?)(?:\n```|\Z)", answer, re.DOTALL | re.IGNORECASE):
            return str(blocks[-1])
    return None


def between_marks(text: str) -> str:
    """Return the text from the last [BEGIN] to the [DONE] after it or to the end, without code fences."""
    inside = after_thinking(text).rpartition("[BEGIN]")[2].partition("[DONE]")[0]
    return python_block(inside) or inside.strip("\n")


def completes(doc: Document, program: str) -> str:
    """Return a HumanEval program: the text alone if it defines the function, else after the prompt it continues."""
    return program if re.search(rf"^def\s+{doc['entry_point']}\b", program, re.MULTILINE) else doc["prompt"] + program


def continuation_results(doc: Document, results: list[str]) -> dict[str, float]:
    """Score HumanEval by a base model: the answer continues the prompt."""
    return {"pass_at_1": _passes(doc["prompt"] + results[0], f"{doc['test']}\ncheck({doc['entry_point']})")}


def block_results(doc: Document, results: list[str]) -> dict[str, float]:
    """Score HumanEval by a chat model: the last Python block counts."""
    program = completes(doc, python_block(results[0]) or after_thinking(results[0]))
    return {"pass_at_1": _passes(program, f"{doc['test']}\ncheck({doc['entry_point']})")}


def marks_results(doc: Document, results: list[str]) -> dict[str, float]:
    """Score MBPP: the program between the marks passes doc["test_list"]."""
    tests = "\n".join([doc.get("test_setup_code") or "", *doc["test_list"]])
    return {"pass_at_1": _passes(between_marks(results[0]), tests)}


def mbpp_shots(documents: Any) -> Any:
    """Return the examples of MBPP's published format: tasks 2, 3 and 4 of the split "prompt"."""
    return documents.filter(lambda document: document["task_id"] in (2, 3, 4))


def _passes(program: str, tests: str) -> float:
    return float(passes(f"{program}\n\n{tests}\n"))
