"""Compare formulas in LaTeX as text, part by part, and by value, without computer algebra."""

import ast
import cmath
import math
import operator
import re
import zlib
from collections.abc import Callable
from typing import Any


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

    Values are compared at a few points, where every letter has a value of its own, so that x(x+1) equals x^2+x without
    computer algebra and n^2 is not m^2. Parts of a set, and of a bare list such as `1, 2`, may come in any order
    (ours).
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
    text = text.replace("^", "**").replace(r"\cdot", "*").replace(r"\times", "*").replace(r"\pi", "π")
    if re.search(r"\\|[{}_]|[a-zA-Z]{3}", text):
        return []
    text = re.sub(r"(?<=[\da-zA-Zπ)])(?=[a-zA-Zπ(])|(?<=[π)])(?=\d)", "*", text)
    try:
        tree = ast.parse(text, mode="eval").body
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - {"π"}
        # What a letter stands for depends on its name alone, and no sum or product of letters is another letter.
        shifts = {name: math.sin(zlib.crc32(name.encode())) ** 2 for name in names}
        letters = [{"π": cmath.pi} | {name: x + shift for name, shift in shifts.items()} for x in POINTS]
        return [complex(_value(tree, values)) for values in letters]
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
