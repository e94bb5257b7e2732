"""Patterns of JSON Schema, which are ECMA-262's, as expressions of what JSON writes without a backslash."""

import json
import math
import re
from collections.abc import Iterable
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

from illada.generation.optional.byte_automaton import Ranges, others

NO_CHARS: Ranges = [(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0xD800, 0xDFFF)]
"""What stands in JSON's strings only behind a backslash, or never."""

_DIGITS: Ranges = [(48, 57)]
_WORDS: Ranges = [(48, 57), (65, 90), (95, 95), (97, 122)]
_SPACES: Ranges = [(9, 13), (32, 32), (160, 160), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029)]
_SPACES += [(0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)]
CATEGORIES = {"CATEGORY_DIGIT": _DIGITS, "CATEGORY_WORD": _WORDS, "CATEGORY_SPACE": _SPACES}
CATEGORIES |= {name.replace("_", "_NOT_"): others(ranges) for name, ranges in CATEGORIES.items()}
"""Those of ECMA-262."""

_OTHER = re.compile(r"(\[\^?[\]\[]|\[(?=[^\]]*(?:--|&&|~~|\|\|))|\(\?(?!:)|\{,)|\[[^\]]*\]")
"""What Python and ECMA-262 read in different ways, once escapes are gone; whole classes are skipped."""


def pattern_regex(pattern: str, anything: str) -> str:
    """Return the expression of the strings in which a pattern is found, with `anything` where it is not anchored.

    Raises:
        re.error: when Python and ECMA-262 do not read it alike, or it is more than an expression.
    """
    return _search(_parsed(pattern), anything, anything)


def _parsed(pattern: str) -> list[Any]:
    """Return the tree of a pattern if Python and ECMA-262 read it alike."""
    escapes = re.finditer(r"\\(?:u[dD][89a-fA-F]|[\w\W]?)", pattern)
    odd = [escape[0] for escape in escapes if not re.fullmatch(r"\\[dDwWsSnrtfvxu\W]", escape[0])]
    odd += [found[1] for found in _OTHER.finditer(re.sub(r"\\[\w\W]", "x", pattern)) if found[1]]
    if odd:
        raise re.error(f"{odd[0]!r} has no place in it")
    return list(_parser.parse(pattern))


def _search(items: list[Any], before: str, after: str) -> str:
    """Return the expression of what a pattern finds, with `before` and `after` where it is not anchored."""
    if items and items[0] == (_constants.AT, _constants.AT_BEGINNING):
        items, before = items[1:], ""
    if items and items[-1] == (_constants.AT, _constants.AT_END):
        items, after = items[:-1], ""
    if len(items) == 1 and items[0][0] is _constants.BRANCH:
        return f"({'|'.join(_search(list(branch), before, after) for branch in items[0][1][1])})"
    return before + _sequence(items) + after


def _sequence(items: Iterable[Any]) -> str:
    """Return the expression of a row of a pattern's nodes."""
    return "".join(_item(str(name), value) for name, value in items)


def _item(name: str, value: Any) -> str:
    """Return the expression of one node of a pattern."""
    if name == "LITERAL":
        return escaped(json.dumps(chr(value), ensure_ascii=False)[1:-1])
    if name == "NOT_LITERAL":
        return _class(others([(value, value)]))
    if name == "ANY":
        return _class(others([(10, 10), (13, 13), (0x2028, 0x2029)]))
    if name == "IN":
        negated = str(value[0][0]) == "NEGATE"
        ranges: Ranges = []
        for kind, member in value[negated:]:
            one = [member if str(kind) == "RANGE" else (member, member)]
            ranges += CATEGORIES[str(member)] if str(kind) == "CATEGORY" else one
        return _class(others(ranges) if negated else ranges)
    if name == "BRANCH":
        return f"({'|'.join(map(_sequence, value[1]))})"
    if name == "SUBPATTERN":
        return f"({_sequence(value[3])})"
    if name in ("MAX_REPEAT", "MIN_REPEAT"):
        low, high, inner = value
        return f"({_sequence(inner)}){times(low, math.inf if high == _constants.MAXREPEAT else high)}"
    raise re.error("^ and $ stand elsewhere" if name == "AT" else f"{name.lower()} has no place in it")


def _class(ranges: Ranges) -> str:
    """Return the expression of the characters of some ranges that need no backslash in JSON."""
    kept = others(others(ranges) + NO_CHARS)
    if not kept:
        raise re.error("a class has no character that JSON writes without a backslash")
    return f"[{''.join(f'{_code(low)}-{_code(high)}' if high > low else _code(low) for low, high in kept)}]"


def _code(point: int) -> str:
    char = chr(point)
    if char.isascii():
        return char if char.isalnum() else f"\\x{point:02X}"
    return f"\\u{point:04X}" if point < 0x10000 else f"\\U{point:08X}"


def escaped(text: str) -> str:
    """Return the expression of a text."""
    return re.sub(r"[\\.+*?()|\[\]{}^$]", r"\\\g<0>", text)


def times(low: int, high: float) -> str:
    """Return the repetition of what stands before it."""
    if high == math.inf:
        return f"{{{low},}}" if low else "*"
    return f"{{{low},{high}}}"
