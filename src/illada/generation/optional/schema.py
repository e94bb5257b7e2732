"""A JSON Schema becomes a regular expression: every text that it matches is JSON which is valid under the schema.

The whole text has to match. Not every valid instance is
there: only one layout (that of `json.dumps`), keys in the order of the schema, no keys beside those of `properties`,
recursion and free values to a stated depth. A keyword that restricts instances and is not here is refused by name.
The standard is JSON Schema 2020-12; `definitions` and lists of `items` of older drafts are understood too.

Every piece of an expression that has alternatives stands in brackets, so pieces can be put side by side.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from functools import cache
from itertools import combinations
from typing import Any, NamedTuple, NoReturn
from urllib.parse import unquote

from illada.errors import IlladaError
from illada.generation.optional.schema_pattern import escaped, pattern_regex, times

LIMIT = 200_000
"""Characters of an expression with its bounded repetitions written out; also those of a schema."""

LONGEST_PATTERN = 2_000

NESTING = 64
"""How deep schemas may stand in schemas, recursion unrolled."""

GROUPS = 60
"""How deep groups may stand in groups: what parses the expression goes down a few calls for each."""

_ESCAPE = r'\\["\\/bfnrt]'
CHAR = rf'([^"\\\x00-\x1F]|{_ESCAPE})'
STRING = f'"{CHAR}*"'
INTEGER = "-?(0|[1-9][0-9]*)"
NUMBER = rf"{INTEGER}(\.[0-9]+)?([eE][+-]?[0-9]+)?"

_LEAP = "(0[48]|[2468][048]|[13579][26])"
_YEAR = "(000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_DAY = "((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
_DATE = f"({_YEAR}-{_DAY}|([0-9]{{2}}{_LEAP}|{_LEAP}00)-02-29)"
_MINUTE = "([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_MINUTE}:[0-5][0-9](\.[0-9]{{1,9}})?(Z|[+-]{_MINUTE})"
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_WORD = "[A-Za-z0-9]{1,20}(-[A-Za-z0-9]{1,20}){0,2}"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
    "email": rf"[A-Za-z0-9_+-]{{1,31}}(\.[A-Za-z0-9_+-]{{1,31}})?@({_WORD}\.){{1,3}}[A-Za-z]{{2,20}}",
}
"""RFC 3339 without leap seconds, RFC 4122, and mail addresses within the lengths of RFC 5321."""

Kinds = frozenset[str]
KIND_OF = {type(None): "null", bool: "boolean", int: "integer", float: "number"}
KIND_OF |= {str: "string", list: "array", dict: "object"}
"""Whole numbers are ints here, even those written 1.0; where "number" is allowed, "integer" is too."""
KINDS: Kinds = frozenset(KIND_OF.values())

ANNOTATIONS = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator"}
ANNOTATIONS |= {"$comment", "$schema", "$id", "$anchor", "$dynamicAnchor", "$defs", "definitions"}
COUNTS = {f"{end}{what}" for end in ("min", "max") for what in ("Length", "Items", "Properties")}
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
RULES_OF = {
    "number": {*BOUNDS, "multipleOf"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "array": {"items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems"},
    "object": {"properties", "required", "additionalProperties", "minProperties", "maxProperties"},
}
COMBINERS = ("$ref", "enum", "const", "anyOf", "oneOf", "allOf")
KNOWN = ANNOTATIONS.union({"type"}, COMBINERS, *RULES_OF.values())
REFUSED = {"if", "then", "else", "not", "contains", "minContains", "maxContains", "patternProperties", "propertyNames"}
REFUSED |= {"dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems"}
REFUSED |= {"$dynamicRef", "$recursiveRef", "$vocabulary", "contentEncoding", "contentMediaType", "contentSchema"}


def schema_regex(schema: dict[str, Any] | bool, depth: int = 3) -> str:
    """Return an expression whose matches are all valid under a schema.

    `depth` says how often a definition may stand inside itself, and how deep lists and objects of free values nest.

    Raises:
        IlladaError: The schema is not one, has a keyword that is not supported, is too large, or nothing is valid.
    """
    if not isinstance(schema, dict | bool):
        raise IlladaError("json_schema must be an object, true or false")
    if depth < 1:
        raise IlladaError("json_schema: the depth must be at least 1")
    try:
        text = json.dumps(schema, allow_nan=False, ensure_ascii=False)
        text.encode()
        schema = json.loads(text, parse_float=_whole)
    except (TypeError, ValueError, RecursionError) as error:
        raise IlladaError(_shown(f"json_schema must be JSON: {error}")) from error
    if len(text) > LIMIT:
        raise IlladaError(f"json_schema has more than {LIMIT:,} characters; give a smaller one")
    builder = _Builder(schema, depth)
    regex = builder.node(schema, _Place())
    if regex is None:
        why = f"; a definition ends only deeper than {depth} levels: give a larger depth" if builder.cut else ""
        raise IlladaError(f"json_schema: nothing is valid under it{why or '; look for false and empty ranges'}")
    return regex


@cache
def any_json(depth: int = 3) -> str:
    """Return an expression for any JSON value in which lists and objects nest up to `depth` deep."""
    scalars = f"null|true|false|{NUMBER}|{STRING}"
    value = f"({scalars})"
    for _ in range(depth):
        value = _bounded(f"({scalars}|{_listed('[]', [], value)}|{_listed('{}', [], f'{STRING}: {value}')})")
    return value


def any_object(depth: int = 3) -> str:
    """Return an expression for any JSON object in which lists and objects nest up to `depth` deep, itself included."""
    return _listed("{}", [], f"{STRING}: {any_json(depth - 1)}") or ""


class _Place(NamedTuple):
    """Where in a schema a node stands, and on which way it was reached."""

    pointer: str = "#"
    nesting: int = 0
    level: int = 0
    """How many lists and objects are around the value."""
    open: tuple[str, ...] = ("#",)
    """Targets of the references on the way."""
    loop: tuple[str, ...] = ("#",)
    """Those of them since the last list or object began."""

    def beside(self, *tokens: object) -> "_Place":
        """Return the place of a schema for the same value."""
        return self._replace(pointer=self.pointer + _pointer(map(str, tokens)), nesting=self.nesting + 1)

    def inside(self, *tokens: object) -> "_Place":
        """Return the place of a schema for a value inside this one."""
        return self.beside(*tokens)._replace(level=self.level + 1, loop=())

    def behind(self, target: str) -> "_Place":
        """Return the place that a reference leads to."""
        return _Place(target, self.nesting + 1, self.level, (*self.open, target), (*self.loop, target))

    def refuse(self, keyword: str, why: str) -> NoReturn:
        raise IlladaError(_shown(f"json_schema: {keyword} is not supported, at {self.pointer}: {why}"))


class _Facts(NamedTuple):
    """What is known of all instances of a schema: a superset of their kinds, their values, values of required keys."""

    kinds: Kinds
    values: frozenset[str] | None
    tags: dict[str, frozenset[str]]

    def apart(self, other: "_Facts") -> bool:
        """Return whether no instance can be valid under both."""
        both = self.kinds & other.kinds
        if not both or (self.values is not None and other.values is not None and not self.values & other.values):
            return True
        shared = self.tags.keys() & other.tags.keys()
        return both == {"object"} and any(not self.tags[key] & other.tags[key] for key in shared)


class _Builder:
    """What builds an expression, schema by schema; None stands for a schema under which nothing is valid."""

    def __init__(self, root: Any, depth: int) -> None:
        self.root = root
        self.depth = depth
        self.work = 0
        self.cut = False
        """Whether a branch was left out because it is too deep."""

    def spend(self, work: int) -> None:
        """Count work, about one unit a character, so that a small schema cannot ask for hours."""
        self.work += work
        if self.work > 10 * LIMIT:
            raise IlladaError("json_schema asks for too large an expression; give a smaller one or a smaller depth")

    def node(self, schema: Any, at: _Place, kinds: Kinds = KINDS) -> str | None:
        """Return the expression of a schema for values of some kinds."""
        if at.nesting > NESTING:
            raise IlladaError(f"json_schema nests deeper than {NESTING} levels; give a flatter one or a smaller depth")
        if schema is False:
            return None
        schema = {} if schema is True else schema
        self.check(schema, at)
        kinds &= _declared(schema)
        combiner = next((name for name in COMBINERS if name in schema), None)
        regex = self.combined(combiner, schema, at, kinds) if combiner else self.plain(schema, at, kinds)
        self.spend(100 + len(regex or ""))
        return None if regex is None else _bounded(regex)

    def check(self, schema: Any, at: _Place) -> None:
        """Raise if this is no schema, has a keyword that is not supported, or one with a value of the wrong type."""
        if not isinstance(schema, dict):
            raise IlladaError(_shown(f"json_schema: a schema must be an object, true or false, at {at.pointer}"))
        self.spend(len(schema))
        for keyword, value in schema.items():
            if keyword in REFUSED:
                at.refuse(keyword, "it restricts answers; leave it out and check them yourself")
            if keyword not in KNOWN and not keyword.startswith("x-"):
                at.refuse(keyword, "it is unknown; leave it out, or begin its name with x- to have it ignored")
            if words := _wanted(keyword, value):
                raise IlladaError(_shown(f"json_schema: {keyword} must be {words}, at {at.pointer}"))
        if "$id" in schema and at.pointer != "#":
            at.refuse("$id", "below the root it changes what pointers mean; leave it out")

    def combined(self, name: str, schema: dict[str, Any], at: _Place, kinds: Kinds) -> str | None:
        """Return the expression of a schema whose keyword refers to values or to other schemas; `type` filters."""
        beside = next((other for other in _rules(schema) if other not in (name, "type")), None)
        if beside:
            at.refuse(f"{beside} beside {name}", "say both in one schema")
        if name == "$ref":
            return self.reference(schema[name], at, kinds)
        if name in ("enum", "const"):
            values = schema[name] if name == "enum" else [schema[name]]
            self.spend(len(values))
            return _either(_literal(value) for value in values if KIND_OF[type(value)] in kinds)
        places = [(branch, at.beside(name, n)) for n, branch in enumerate(schema[name])]
        if name == "allOf":
            places = [(branch, place) for branch, place in places if branch is not True and branch != {}] or places[:1]
            if len(places) > 1:
                at.refuse("allOf of several schemas", "say all in one schema")
        pieces = [self.node(branch, place, kinds) for branch, place in places]
        if name == "oneOf":
            for one, other in combinations([self.facts(branch, place) for branch, place in places], 2):
                self.spend(10)
                if not one.apart(other):
                    at.refuse("oneOf", "branches may overlap; use anyOf, or tell them apart by type or required const")
        return _either(pieces)

    def reference(self, pointer: str, at: _Place, kinds: Kinds) -> str | None:
        """Return the expression of what a reference leads to."""
        target, schema = self.resolve(pointer, at)
        if target in at.loop:
            at.refuse("$ref", "it leads back to itself with no list or object in between")
        if at.open.count(target) >= self.depth:
            self.cut = True
            return None
        return self.node(schema, at.behind(target), kinds)

    def resolve(self, pointer: str, at: _Place) -> tuple[str, Any]:
        """Return the one spelling of a pointer, and the schema there."""
        if not re.match(r"#(/|\Z)", pointer):
            at.refuse("$ref", "only pointers into the same schema (# or #/...) are followed")
        tokens = [token.replace("~1", "/").replace("~0", "~") for token in unquote(pointer).split("/")[1:]]
        here: Any = self.root
        for token in tokens:
            if isinstance(here, list) and re.fullmatch("0|[1-9][0-9]{0,5}", token) and int(token) < len(here):
                here = here[int(token)]
            elif isinstance(here, dict) and token in here:
                here = here[token]
            else:
                raise IlladaError(_shown(f"json_schema: $ref leads to nothing, at {at.pointer}: {pointer}"))
            if isinstance(here, dict) and isinstance(here.get("$id"), str):
                at.refuse("$id", "below the root it changes what pointers mean; leave it out")
        return "#" + _pointer(tokens), here

    def facts(self, schema: Any, at: _Place) -> _Facts:
        """Return what all instances of a schema have in common."""
        schema = self.followed(schema, at)
        values = _values(schema)
        found = {KIND_OF[type(json.loads(value))] for value in values} if values is not None else KINDS
        members = schema.get("properties", {})
        tags = {key: _values(self.followed(members.get(key, {}), at)) for key in schema.get("required", [])}
        known = {key: values for key, values in tags.items() if values is not None}
        return _Facts(_declared(schema) & found, values, known)

    def followed(self, schema: Any, at: _Place) -> dict[str, Any]:
        """Return the schema behind references, as far as they lead; {} stands for true, and for false to be safe."""
        for _ in range(NESTING):
            if not isinstance(schema, dict) or "$ref" not in schema:
                break
            self.check(schema, at)
            schema = self.resolve(schema["$ref"], at)[1]
        schema = {} if isinstance(schema, bool) else schema
        self.check(schema, at)
        return schema

    def plain(self, schema: dict[str, Any], at: _Place, kinds: Kinds) -> str | None:
        """Return the expression of a schema that says itself what its values are."""
        if kinds == KINDS and not _rules(schema):
            return any_json(max(0, self.depth - at.level))
        if "type" not in schema:  # keywords say which kinds are meant
            hinted = {kind for kind, rules in RULES_OF.items() if rules & schema.keys()}
            kinds = kinds & (hinted | {"integer"} if "number" in hinted else hinted) or kinds
        makers: dict[str, Callable[[dict[str, Any], _Place], str | None]] = {
            "null": lambda *_: "null",
            "boolean": lambda *_: "(true|false)",
            "number": _number,
            "integer": lambda rules, place: None if "number" in kinds else _integer(rules, place),
            "string": _string,
            "array": self.array,
            "object": self.object,
        }
        return _either(make(schema, at) for kind, make in makers.items() if kind in kinds)

    def array(self, schema: dict[str, Any], at: _Place) -> str | None:
        """Return the expression of a list."""
        low, high = schema.get("minItems", 0), schema.get("maxItems", math.inf)
        if schema.get("uniqueItems") and high > 1:
            at.refuse("uniqueItems", "an expression cannot compare items; leave it out or set maxItems to 1")
        name, first, rest = "items", schema.get("prefixItems", []), schema.get("items", True)
        if isinstance(rest, list):
            if "prefixItems" in schema:
                at.refuse("prefixItems beside a list of items", "say both in prefixItems")
            name, first, rest = "additionalItems", rest, schema.get("additionalItems", True)
        prefix = []
        for n, one in enumerate(first[: min(high, len(first))]):
            item = self.node(one, at.inside("prefixItems" if name == "items" else "items", n))
            if item is None:
                high = n
                break
            prefix.append(item)
        return _listed("[]", prefix, self.node(rest, at.inside(name)) if high > len(prefix) else None, low, high)

    def object(self, schema: dict[str, Any], at: _Place) -> str | None:
        """Return the expression of an object: of the keys that the schema names, or of any keys if it names none."""
        members, required = schema.get("properties", {}), dict.fromkeys(schema.get("required", []))
        others = schema.get("additionalProperties", True)
        if "properties" not in schema and not required:
            return self.map(schema, at)
        for name in ("minProperties", "maxProperties"):
            if name in schema:
                at.refuse(f"{name} beside properties or required", "say it by required")
        pairs = []
        for key in {**members, **required}:
            if key not in members and others is False:
                at.refuse("required", f"additionalProperties is false and properties lacks {key}")
            way = ("properties", key) if key in members else ("additionalProperties",)
            value = self.node(members.get(key, others), at.inside(*way))
            if value is None and key in required:
                return None
            if value is not None:
                pairs.append((f"{_literal(key)}: {value}", key in required))
        return rf"\{{{self.chosen(pairs)}\}}"

    def map(self, schema: dict[str, Any], at: _Place) -> str | None:
        """Return the expression of an object with any keys; they may repeat, so more than one cannot be promised."""
        low, high = schema.get("minProperties", 0), schema.get("maxProperties", math.inf)
        if low > 1:
            at.refuse("minProperties above 1", "keys could repeat; name them in properties and required")
        value = self.node(schema.get("additionalProperties", True), at.inside("additionalProperties"))
        return _listed("{}", [], None if value is None else f"{STRING}: {value}", low, high)

    def chosen(self, pairs: list[tuple[str, bool]]) -> str:
        """Return the expression of pairs in order, of which those that are not required may be left out."""
        first = next((n for n, (_, required) in enumerate(pairs) if required), None)
        if first is None:
            return f"({self.some([pair for pair, _ in pairs])})?" if pairs else ""
        before = "".join(f"({pair}, )?" for pair, _ in pairs[:first])
        after = "".join(f", {pair}" if required else f"(, {pair})?" for pair, required in pairs[first + 1 :])
        return before + pairs[first][0] + after

    def some(self, pairs: list[str]) -> str:
        """Return the expression of one or more of some pairs in order; by halves, it is shorter than pair by pair."""
        if len(pairs) == 1:
            return pairs[0]
        half = len(pairs) // 2
        first, rest = self.some(pairs[:half]), self.some(pairs[half:])
        return _bounded(f"({first}(, {rest})?|{rest})")


def _rules(schema: dict[str, Any]) -> list[str]:
    """Return the keywords of a schema that restrict instances."""
    return [keyword for keyword in schema if keyword not in ANNOTATIONS and not keyword.startswith("x-")]


def _declared(schema: dict[str, Any]) -> Kinds:
    """Return the kinds that `type` allows."""
    names = schema.get("type", list(KINDS))
    kinds = frozenset([names] if isinstance(names, str) else names)
    return kinds | {"integer"} if "number" in kinds else kinds


def _values(schema: dict[str, Any]) -> frozenset[str] | None:
    """Return the values that `enum` or `const` allow, in one spelling, or None where any may come."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return None if values is None else frozenset(json.dumps(value, sort_keys=True) for value in values)


def _wanted(keyword: str, value: Any) -> str:
    """Return in words what the value of a keyword has to be, or "" if it is that."""
    number, strings = type(value) in (int, float), isinstance(value, list) and all(type(one) is str for one in value)
    fits, words = True, ""
    if keyword in COUNTS:
        fits, words = type(value) is int and value >= 0, "a whole number from 0 on"
    elif keyword in RULES_OF["number"]:
        fits, words = number and (keyword != "multipleOf" or value > 0), "a number (above 0 for multipleOf)"
    elif keyword in ("enum", "anyOf", "oneOf", "allOf", "prefixItems"):
        fits, words = isinstance(value, list) and value != [], "a list that is not empty"
    elif keyword in ("pattern", "format", "$ref"):
        fits, words = isinstance(value, str), "a string"
    elif keyword == "properties":
        fits, words = isinstance(value, dict), "an object"
    elif keyword == "required":
        fits, words = strings, "a list of strings"
    elif keyword == "uniqueItems":
        fits, words = isinstance(value, bool), "true or false"
    elif keyword == "type":
        fits = KINDS.issuperset(value if strings else [value] if isinstance(value, str) else [""])
        words = f"one of {', '.join(sorted(KINDS))}, or a list of them"
    return "" if fits else words


def _whole(text: str) -> int | float:
    """Return a number as JSON Schema sees it: 1.0 is the integer 1."""
    return int(float(text)) if float(text).is_integer() else float(text)


def _shown(text: str) -> str:
    """Return a text of others as one line that is not too long."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:400]) + ("..." if len(text) > 400 else "")


def _pointer(tokens: Iterable[str]) -> str:
    return "".join("/" + token.replace("~", "~0").replace("/", "~1") for token in tokens)


def _literal(value: Any) -> str:
    """Return the expression of one JSON value."""
    return escaped(json.dumps(value, ensure_ascii=False))


def _either(pieces: Iterable[str | None]) -> str | None:
    """Return the expression of one of some pieces, or None if all are impossible."""
    real = [piece for piece in pieces if piece is not None]
    return f"({'|'.join(real)})" if len(real) > 1 else real[0] if real else None


def _listed(ends: str, prefix: list[str], rest: str | None, low: int = 0, high: float = math.inf) -> str | None:
    """Return the expression of a list or map of `low` to `high` pieces: first those of `prefix`, then `rest`."""
    prefix = prefix or ([rest] if rest is not None else [])
    count = min(high, len(prefix)) if rest is None else high
    if low > count:
        return None
    first = prefix[: int(min(count, len(prefix)))]
    more = count > len(first)
    tail = f"(, {rest}){times(max(low - len(first), 0), count - len(first))}" if more else ""
    for n, piece in reversed(list(enumerate(first))):
        tail = (", " if n else "") + piece + tail
        tail = f"({tail})?" if n >= low else tail
    return _bounded(f"\\{ends[0]}{tail}\\{ends[1]}")


_UNIT = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\{(\d+)(?:,(\d*))?\}|.", re.DOTALL)


def _bounded(regex: str) -> str:
    """Return an expression if it is not too large with its bounded repetitions written out, and not too deep."""
    sizes, last, deepest = [0], 0, 1
    for unit in _UNIT.finditer(regex) if len(regex) <= LIMIT else ():
        if unit[0] == "(":
            sizes.append(2)
            deepest = max(deepest, len(sizes))
        elif unit[1]:
            sizes[-1] += last * (max(int(unit[2] or unit[1]), 1) - 1)
        else:
            last = sizes.pop() if unit[0] == ")" else len(unit[0])
            sizes[-1] += last
    if len(regex) > LIMIT or sizes[0] > LIMIT or deepest > GROUPS:
        raise IlladaError(
            f"this form of JSON needs an expression of over {LIMIT:,} characters or {GROUPS} groups in each other; "
            "give smaller bounds (maxLength, maxItems), fewer optional keys or a smaller depth"
        )
    return regex


def _number(schema: dict[str, Any], at: _Place) -> str:
    """Return the expression of any number."""
    for keyword in sorted(RULES_OF["number"] & schema.keys()):
        at.refuse(keyword, "numbers with a fraction have no bounds here; make the type integer or leave it out")
    return NUMBER


def _integer(schema: dict[str, Any], at: _Place) -> str | None:
    """Return the expression of a whole number within bounds."""
    if schema.get("multipleOf", 1) != 1:
        at.refuse("multipleOf", "leave it out and check the answer yourself")
    lows, highs = [], []
    for name in BOUNDS & schema.keys():
        open_, value = name.startswith("exclusive"), schema[name]
        if name.endswith("inimum"):
            lows.append(math.floor(value) + 1 if open_ else math.ceil(value))
        else:
            highs.append(math.ceil(value) - 1 if open_ else math.floor(value))
    if any(abs(bound) >= 10**18 for bound in lows + highs):
        at.refuse("a bound of more than 18 digits", "give a smaller one or none")
    if not lows and not highs:
        return INTEGER
    low, high = max(lows, default=None), min(highs, default=None)
    below = None if low is not None and low >= 0 else _natural(1 if high is None else max(1, -high), low and -low)
    above = None if high is not None and high < 0 else _natural(max(0, low or 0), high)
    return _either([below and f"-{below}", above])


def _natural(low: int, high: int | None) -> str | None:
    """Return the expression of the whole numbers from `low` to `high`, both not negative."""
    if high is not None and low > high:
        return None
    short, long = len(str(low)), len(str(high))
    if high is None:
        return f"({_digits(str(low), '9' * short)}|[1-9][0-9]{times(short, math.inf)})"
    if short == long:
        return _digits(str(low), str(high))
    middle = f"[1-9][0-9]{times(short, long - 2)}" if short < long - 1 else None
    return _either([_digits(str(low), "9" * short), middle, _digits("1" + "0" * (long - 1), str(high))])


def _digits(low: str, high: str) -> str:
    """Return the expression of the digits between two rows of the same length."""
    if low == high:
        return low
    if low[0] == high[0]:
        return low[0] + _digits(low[1:], high[1:])
    first, last, tail = int(low[0]), int(high[0]), len(low) - 1
    pieces = []
    if low[1:].strip("0"):
        pieces.append(low[0] + _digits(low[1:], "9" * tail))
        first += 1
    if high[1:].strip("9"):
        pieces.append(high[0] + _digits("0" * tail, high[1:]))
        last -= 1
    if first <= last:
        pieces.append(f"[{first}-{last}]" + "[0-9]" * min(tail, 1) + (f"{{{tail}}}" if tail > 1 else ""))
    return _either(pieces) or ""


def _string(schema: dict[str, Any], at: _Place) -> str | None:
    """Return the expression of a string."""
    for name in ("pattern", "format"):
        beside = next((other for other in sorted(RULES_OF["string"] & schema.keys()) if other != name), None)
        if name in schema and beside:
            at.refuse(f"{beside} beside {name}", "say both in one pattern")
    if len(schema.get("pattern", "")) > LONGEST_PATTERN:
        at.refuse("pattern", f"it has more than {LONGEST_PATTERN:,} characters")
    if "pattern" in schema:
        try:
            return f'"{pattern_regex(schema["pattern"], f"{CHAR}*")}"'
        except (re.error, OverflowError, RecursionError) as error:
            at.refuse("pattern", f"{error}; write it with classes, groups and repetition, ^ and $ at the ends")
    if "format" in schema:
        name = schema["format"]
        if name not in FORMATS:
            at.refuse(f"format {name}", f"those are {', '.join(FORMATS)}; use a pattern or leave it out")
        return f'"{FORMATS[name]}"'
    low, high = schema.get("minLength", 0), schema.get("maxLength", math.inf)
    return f'"{CHAR}{times(low, high)}"' if low <= high else None
