"""JSON Schema to expressions: what matches is valid, what is not supported is named, and nothing else comes out.

ILLADA_SCHEMA_SUITE names the folder `json/tests/draft2020-12` of jsonschema's source distribution, which holds the
public JSON-Schema-Test-Suite.
"""

import datetime
import itertools
import json
import os
import re
from collections import Counter
from pathlib import Path

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from illada.errors import IlladaError
from illada.generation.optional.schema import COMBINERS, COUNTS, RULES_OF, any_json, any_object, schema_regex

bounded = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
NODE = {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/n"}}, "required": ["v"]}
TREE = {"$defs": {"n": NODE}, "$ref": "#/$defs/n"}
TAGGED = [
    {"type": "object", "properties": {"k": {"const": k}, k: {"type": "null"}}, "required": ["k"]} for k in ("a", "b")
]


def matches(schema, text):
    return re.fullmatch(schema_regex(schema), text) is not None


def text(value):
    return json.dumps(value, ensure_ascii=False)


@pytest.mark.parametrize(
    ("schema", "yes", "no"),
    [
        (True, [None, True, -1.5e3, "é", [], {}, [1, [2, [3]]], {"a": [{"b": 1}]}], [[[[[]]]]]),
        ({"type": ["integer", "null"]}, [3, -12, 0, None], [1.5, True, "1"]),
        ({"type": "number"}, [0, -1, 1.5, 1e30], ["1", None]),
        ({"type": "boolean"}, [True, False], [None, 0, 1]),
        ({"type": "string"}, ["", 'a"b\\c\n', "😀"], [1, "\x01"]),
        ({"minLength": 2, "maxLength": 3}, ["ab", "a\\", "😀é\n"], ["a", "abcd", 12, None]),
        ({"maxLength": 0}, [""], ["a"]),
        ({"type": "integer", "exclusiveMinimum": 2.5, "maximum": 4.0, "multipleOf": 1}, [3, 4], [2, 5]),
        ({"enum": [1, "a.b", None, {"a": [1.5]}, True]}, [1, "a.b", None, {"a": [1.5]}, True], ["axb", False]),
        ({"enum": [1, 1.5, "x", True], "type": ["integer", "string"]}, [1, "x"], [1.5, True]),
        ({"const": {"a|b": "(c)?"}}, [{"a|b": "(c)?"}], ["a"]),
        ({"items": {"type": "null"}}, [[], [None], [None, None]], [[1], {}]),
        ({"type": "array", "minItems": 1, "maxItems": 2, "items": {"const": 1}}, [[1], [1, 1]], [[], [1, 1, 1]]),
        ({"prefixItems": [{"const": 1}, {"const": 2}], "items": False}, [[], [1], [1, 2]], [[2], [1, 2, 3]]),
        ({"items": [{"const": 1}], "additionalItems": {"const": 2}}, [[], [1], [1, 2, 2]], [[2], [1, 1]]),
        ({"prefixItems": [True, False, True], "minItems": 1}, [["x"]], [[], [1, 1]]),
        ({"prefixItems": [{"const": 1}], "items": {"const": 2}, "minItems": 3, "maxItems": 4}, [[1, 2, 2]], [[1, 2]]),
        ({"type": "array", "uniqueItems": True, "maxItems": 1}, [[], [5]], [[5, 5]]),
        (
            {"properties": {"a": {"const": 1}, "b": {"const": 2}}},
            [{}, {"a": 1}, {"b": 2}, {"a": 1, "b": 2}],
            [{"a": 2}],
        ),
        (
            {"properties": {x: {"const": x} for x in "abcde"}, "required": ["c"]},
            [{"c": "c"}, {"a": "a", "c": "c"}, {"b": "b", "c": "c", "e": "e"}, {x: x for x in "abcde"}],
            [{}, {"a": "a"}, {"c": "c", "a": "a"}],
        ),
        ({"properties": {'a.b"{': {"const": 1}}, "required": ['a.b"{']}, [{'a.b"{': 1}], [{'axb"{': 1}]),
        ({"required": ["z"], "additionalProperties": {"const": 1}}, [{"z": 1}], [{}, {"z": 2}]),
        (
            {"additionalProperties": {"const": 1}, "maxProperties": 2},
            [{}, {"x": 1, "": 1}],
            [{"x": 2}, dict.fromkeys("abc", 1)],
        ),
        ({"type": "object", "minProperties": 1}, [{"x": [1]}], [{}]),
        ({"type": "object", "properties": {}}, [{}], [{"a": 1}]),
        ({"anyOf": [{"const": "a"}, {"type": "integer"}, False]}, ["a", 5], ["b", None]),
        ({"type": "object", "anyOf": [{"type": "string"}, {"required": ["a"]}]}, [{"a": 1}], ["x", {}]),
        ({"oneOf": [{"type": "number"}, {"type": "string"}]}, [1.5, "x"], [None]),
        ({"oneOf": [{"const": "a", "title": "A"}, {"const": "b"}]}, ["a", "b"], ["c"]),
        ({"oneOf": TAGGED}, [{"k": "a"}, {"k": "a", "a": None}, {"k": "b"}], [{}, {"k": "a", "b": None}, {"k": "c"}]),
        (
            {"$defs": {"a": TAGGED[0], "b": TAGGED[1]}, "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]},
            [{"k": "b"}],
            [{}],
        ),
        ({"allOf": [{"type": "null"}, {}, True]}, [None], [1]),
        ({"definitions": {"a/b ~%": {"const": 1}}, "$ref": "#/definitions/a~1b%20~0%25"}, [1], [2]),
        ({"$ref": "#/$defs/0/1", "$defs": {"0": [True, {"const": 3}]}}, [3], [1]),
        ({"type": "object"}, [{"a{b": ["[]", "{x"]}, {"a": "["}], [1, []]),
        (TREE, [{"v": 1}, {"v": 1, "next": {"v": 2, "next": {"v": 3}}}], [{"v": 1, "next": {}}]),
        ({"type": "array", "items": {"$ref": "#"}}, [[], [[], [[]]]], [1, [1]]),
        ({"x-order": 3, "title": "t", "$comment": "c", "const": 1, "deprecated": True, "default": 5}, [1], [5]),
        ({"pattern": "^a|b$", "type": "string"}, ["ax", "xb", 'a"', '"b'], ["xax", "bx"]),
        (
            {"pattern": r"^\d{2,3}-[^a-c\s]+$"},
            ["12-x", "123-é"],
            ["1-x", "12-a", "12-x y", "12-", "١٢-x", "12-\u00a0", '12-"'],
        ),
        ({"pattern": "b"}, ["b", "abc", "\\b"], ["", "a"]),
        ({"pattern": r"^(?:\w\.)*?(x|\[|\u00e9)$"}, ["x", "a.b.[", "é"], ["ab.x", "", "x\n"]),
        ({"pattern": r'^"\\\n.$'}, ['"\\\nx'], ['"\\\n\u2028', '"\\nx']),
        ({"pattern": ""}, ["", "a"], [1]),
        (
            {"format": "date"},
            ["2024-02-29", "2000-02-29", "2023-12-31"],
            ["2023-02-29", "1900-02-29", "2023-04-31", "0000-01-01"],
        ),
        ({"format": "time"}, ["12:00:00Z", "23:59:59.5+05:30"], ["24:00:00Z", "12:00:00", "12:00:60Z"]),
        ({"format": "date-time"}, ["2024-02-29T12:00:00Z"], ["2024-02-29 12:00:00Z", "2024-02-30T12:00:00Z"]),
        ({"format": "uuid"}, ["00000000-0000-4000-8000-00000000000a"], ["00000000-0000-4000-8000-00000000000g"]),
        ({"format": "ipv4"}, ["0.0.0.0", "255.249.199.1"], ["256.0.0.1", "01.0.0.0", "1.1.1"]),
        ({"format": "email"}, ["a.b+c@x-y.example.org"], ["a..b@x.org", "@x.org", "a@-x.org", "a@x", "a@x--y.org"]),
    ],
    ids=lambda value: text(value)[:60],
)
def test_what_matches(schema, yes, no):
    assert [value for value in yes if not matches(schema, text(value))] == []
    assert [value for value in no if matches(schema, text(value))] == []


def test_one_layout():
    assert not matches({"type": "array"}, "[1,2]")
    assert not matches(True, '{"a":1}')
    assert not matches(True, " 1")
    assert not matches({"type": "string"}, r'"\u0041"')
    assert not matches({"type": "integer"}, "01")


def test_any_object_nests_to_its_depth():
    assert re.fullmatch(any_object(1), text({"a": 1, "b": None}))
    assert not re.fullmatch(any_object(1), text({"a": []}))
    assert re.fullmatch(any_object(2), text({"a": [1], "b": {}}))
    assert re.fullmatch(any_json(0), "1.5")
    with pytest.raises(IlladaError, match="smaller depth"):
        any_json(10**9)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"properties": {"a": {"not": {}}}}, "not is not supported, at #/properties/a: "),
        ({"propertyz": {}}, "propertyz is not supported, at #: it is unknown"),
        ({"type": "number", "minimum": 1}, "minimum"),
        ({"type": "integer", "multipleOf": 2}, "multipleOf"),
        ({"type": "integer", "minimum": 1e30}, "18 digits"),
        ({"patternProperties": {"a/~": {}}}, "patternProperties"),
        ({"type": "object", "minProperties": 2}, "minProperties above 1"),
        ({"properties": {"a": {}}, "minProperties": 1}, "minProperties beside"),
        ({"required": ["a"], "additionalProperties": False}, "required"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"enum": [1], "minimum": 0}, "minimum beside enum"),
        ({"$ref": "#/x", "x": {}, "x-a": 1}, "x is not supported"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {}}, "minLength": 1}, r"minLength beside \$ref"),
        ({"anyOf": [True], "properties": {}}, "properties beside anyOf"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
        ({"oneOf": [{"const": 1}, {"enum": [1.0, 2]}]}, "oneOf"),
        ({"oneOf": [{**TAGGED[0], "required": []}, TAGGED[1]]}, "oneOf"),
        ({"oneOf": [{"required": ["k"], "properties": {"k": {"const": n}}} for n in "ab"]}, "oneOf"),
        ({"allOf": [{"minLength": 1}, {"maxLength": 2}]}, "allOf"),
        ({"$ref": "http://x/y"}, r"\$ref is not supported"),
        ({"$ref": "#anchor"}, r"\$ref"),
        ({"$ref": "#/$defs/no"}, "leads to nothing, at #"),
        ({"$ref": "#/type", "type": "null"}, "must be an object"),
        ({"$ref": "#"}, "leads back to itself"),
        ({"$defs": {"a": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}, "leads back"),
        ({"properties": {"a": {"$id": "b", "const": 1}}}, r"\$id"),
        ({"$defs": {"a": {"$id": "b", "$defs": {"c": {}}}}, "$ref": "#/$defs/a/$defs/c"}, r"\$id"),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "larger depth"),
        (False, "nothing is valid"),
        ({"type": "string", "minLength": 2, "maxLength": 1}, "nothing is valid"),
        ({"enum": ["a"], "type": "null"}, "nothing is valid"),
        ({"pattern": "a", "maxLength": 3}, "maxLength beside pattern"),
        ({"format": "uri"}, "format uri"),
        ({"maxLength": 10**9}, "smaller bounds"),
        ({"pattern": "((a{1000}){1000}){1000}"}, "smaller bounds"),
        ({"properties": 3}, "properties must be an object, at #"),
        ({"required": "a"}, "required must be a list of strings"),
        ({"minLength": -1}, "minLength must be a whole number"),
        ({"maxItems": True}, "maxItems must be"),
        ({"enum": []}, "enum must be a list that is not empty"),
        ({"type": "text"}, "type must be one of"),
        ({"items": 3}, "a schema must be an object, true or false, at #/items"),
        ({"exclusiveMinimum": True}, "exclusiveMinimum must be a number"),
        ({"const": float("nan")}, "must be JSON"),
        ({"const": "\ud800"}, "must be JSON"),
        ({"a\nb": 1}, r"a\\nb is not supported"),
        ([], "must be an object"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_refused(schema, says):
    with pytest.raises(IlladaError, match=says) as caught:
        schema_regex(schema)
    assert len(str(caught.value).splitlines()) == 1


NOT_ALIKE = (
    r"(?=a) (?!a)b (?<=a)b (a)\1 \bword (?i)a (?i:a) (?P<n>a) (?<n>a) a^b (a$)* \Aa a\Z \a \0 \p{L} \cA \U0001F600"
)
NOT_ALIKE += (
    r" \ud83d\ude00 [^\ud83d\ude00] []a] [^]a] [[a] [a--b] a{,3} a++ (?>a) (?#c) ( [ \ [\\\"] a{2,1} a** [\w-.] [\b]"
)


@pytest.mark.parametrize(
    "pattern", [*NOT_ALIKE.split(), "(" * 5000, "a{99999999999999999999}"], ids=lambda text: text[:20]
)
def test_patterns_that_are_refused(pattern):
    with pytest.raises(IlladaError, match="pattern is not supported, at #: ") as caught:
        schema_regex({"pattern": pattern})
    assert len(str(caught.value).splitlines()) == 1


pieces = st.sampled_from(
    ["a", "b", "[ab]", "[^a]", "(a|b)", "(", ")", "|", "^", "$", "*", "+?", "{1,2}", "\\d", "\\W", ".", '"', "-"]
)


@given(st.lists(pieces, max_size=6).map("".join), st.lists(st.text('ab0"\\n é', max_size=5), min_size=8))
@settings(bounded, max_examples=200)
def test_patterns_find_what_python_finds(pattern, answers):
    """Whatever a pattern is made of: it is refused, or what matches is found by Python too."""
    try:
        found = re.compile(schema_regex({"pattern": pattern})).fullmatch
    except IlladaError:
        return
    for answer in answers:
        plain = re.search(pattern, answer, re.ASCII) is not None
        assert plain or not found(text(answer))
        if answer.isalnum():  # nothing that JSON writes with a backslash
            assert plain == bool(found(text(answer)))


@pytest.mark.slow
def test_work_is_bounded():
    """Small schemas whose expressions, or the ways through which, are 2 ** 60."""
    ways = {f"a{n}": {"anyOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(30)}
    lists = {f"a{n}": {"items": {"$ref": f"#/$defs/a{n + 1}"}} for n in range(60)}
    for defs, last in ((ways, False), (ways, {"type": "null"}), (lists, {"type": "null"})):
        end = {f"a{len(defs)}": last}
        with pytest.raises(IlladaError):
            schema_regex({"$defs": {**defs, **end}, "$ref": "#/$defs/a0"})
    deep = {}
    for _ in range(5000):
        deep = {"items": deep}
    with pytest.raises(IlladaError):
        schema_regex(deep)
    with pytest.raises(IlladaError):
        schema_regex({"oneOf": [{"const": n} for n in range(9000)]})
    assert schema_regex({"oneOf": [{"const": n} for n in range(300)]})


@pytest.mark.slow
def test_integer_ranges():
    """Every bound around powers of ten, against all integers nearby."""
    texts = [str(n) for n in range(-1300, 1301)]
    bounds = [
        None,
        *range(-1200, 1201, 171),
        *(s * p + d for s in (-1, 1) for p in (1, 10, 100, 1000) for d in (-1, 0, 1)),
    ]
    for low in bounds:
        for high in bounds:
            schema = {"type": "integer"}
            schema |= {"minimum": low} if low is not None else {}
            schema |= {"maximum": high} if high is not None else {}
            wanted = {s for s in texts if (low is None or int(s) >= low) and (high is None or int(s) <= high)}
            if low is not None and high is not None and low > high:
                with pytest.raises(IlladaError, match="nothing is valid"):
                    schema_regex(schema)
                continue
            found = re.compile(schema_regex(schema)).fullmatch
            assert {s for s in texts if found(s)} == wanted, schema
            assert not any(map(found, ("01", "00", "-", "-01", "", "1.0", "-1300x")))


@given(st.integers(-(10**17), 10**17), st.integers(0, 10**17), st.integers(-(10**17), 2 * 10**17))
@bounded
def test_wide_integer_ranges(low, width, n):
    regex = schema_regex({"type": "integer", "minimum": low, "maximum": low + width})
    for value in (n, low, low + width, low - 1, low + width + 1):
        assert bool(re.fullmatch(regex, str(value))) == (low <= value <= low + width)


def test_every_day():
    found = re.compile(schema_regex({"format": "date"})).fullmatch
    for year in (1, 4, 100, 400, 1900, 1999, 2000, 2023, 2024, 2100, 9999):
        for month in range(14):
            for day in range(33):
                try:
                    real = bool(datetime.date(year, month, day))
                except ValueError:
                    real = False
                assert bool(found(f'"{year:04}-{month:02}-{day:02}"')) == real
    assert not found('"0000-02-29"')


names = st.sampled_from(["a", "b.c", 'd"', "é", "f\\"])
scalars = st.none() | st.booleans() | st.integers(-50, 50) | st.sampled_from([1.0, 2.5, "", "x|y", "😀"])
few = st.integers(0, 3)
leaves = st.one_of(
    st.sampled_from([True, False, {}, {"type": "null"}, {"type": ["number", "string"]}, {"format": "date"}]),
    st.fixed_dictionaries({"type": st.just("integer")}, optional={"minimum": scalars.filter(lambda v: type(v) is int)}),
    st.fixed_dictionaries({"type": st.just("string")}, optional={"minLength": few, "maxLength": few}),
    st.sampled_from(["^a+$", "b", "^[^x-z]{2}", r"\d$", "^(a|b.)*$"]).map(lambda p: {"pattern": p}),
    st.fixed_dictionaries(
        {"enum": st.lists(scalars, min_size=1)}, optional={"type": st.sampled_from(["integer", "string"])}
    ),
    st.just({"$ref": "#/$defs/r"}),
)


def larger(inner):
    """Return schemas around schemas."""
    members = st.dictionaries(names, inner, max_size=3)
    some = {"required": st.lists(names, max_size=2), "additionalProperties": inner}
    return st.one_of(
        st.fixed_dictionaries({"properties": members}, optional=some),
        st.fixed_dictionaries(
            {"type": st.just("object")}, optional={**some, "maxProperties": few, "minProperties": few}
        ),
        st.fixed_dictionaries(
            {"type": st.sampled_from(["array", ["array", "null"]])},
            optional={
                "items": inner,
                "prefixItems": st.lists(inner, min_size=1, max_size=2),
                "minItems": few,
                "maxItems": few,
            },
        ),
        st.fixed_dictionaries(
            {}, optional={name: st.lists(inner, min_size=1, max_size=3) for name in ("anyOf", "oneOf", "allOf")}
        ),
    )


schemas = st.recursive(leaves, larger, max_leaves=5).map(
    lambda schema: (
        {**schema, "$defs": {"r": {"items": {"$ref": "#/$defs/r"}, "maxItems": 2}}}
        if isinstance(schema, dict)
        else schema
    )
)


@pytest.mark.slow
@given(schemas, st.data())
@settings(bounded, max_examples=40)
def test_what_matches_is_valid(schema, data):
    """Any text that an expression matches, against the library that implements the standard."""
    try:
        regex = schema_regex(schema, depth=2)
    except IlladaError:
        return
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    answer = json.loads(data.draw(st.from_regex(regex, fullmatch=True)))
    assert validator.is_valid(answer), answer


odd = [-1, 10**30, float("inf"), "\ud800", "#", "#/a", "[", "(?=", "date", "string", "integer", "object", "array"]
keywords = ["type", "not", "x-a", "a", "$id", *COUNTS, *COMBINERS, *itertools.chain(*RULES_OF.values())]
values = st.recursive(
    scalars | st.sampled_from(odd),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(keywords), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.slow
@given(values)
@settings(bounded, max_examples=300)
def test_any_json_as_a_schema(schema):
    """Only an expression or one line of an error comes out."""
    said = ""
    try:
        re.compile(schema_regex(schema))
    except IlladaError as error:
        said = str(error)
    assert len(said.splitlines()) <= 1


def outcome(group):
    """Return what becomes of a group of the suite: the keyword that is refused, or how many instances matched."""
    try:
        found = re.compile(schema_regex(group["schema"])).fullmatch
    except IlladaError as error:
        return str(error), 0, 0
    yes = [test for test in group["tests"] if found(text(test["data"]))]
    wrong = [test for test in yes if not test["valid"]]
    assert not wrong, (group["schema"], wrong)
    return "", len(yes), sum(test["valid"] for test in group["tests"])


@pytest.mark.slow
def test_public_suite(capsys):
    """No instance that the suite calls invalid may match; the table says what is refused, file by file."""
    if not os.environ.get("ILLADA_SCHEMA_SUITE"):
        pytest.skip("set ILLADA_SCHEMA_SUITE to the folder json/tests/draft2020-12 of jsonschema's source distribution")
    folder = Path(os.environ["ILLADA_SCHEMA_SUITE"])
    files = [
        *sorted(folder.glob("*.json")),
        *(
            folder / "optional/format" / f"{name}.json"
            for name in ("date", "time", "date-time", "uuid", "ipv4", "email")
        ),
    ]
    lines = ["| file | groups accepted | valid instances matched | refused |", "|---|---|---|---|"]
    for file in files:
        results = [outcome(group) for group in json.loads(file.read_text())]
        refused = Counter(
            re.sub(r"^json_schema: (.*?)( is not supported.*|: .*|;.*|, at .*)$", r"\1", why)
            for why, *_ in results
            if why
        )
        lines.append(
            f"| {file.stem} | {sum(not why for why, *_ in results)} of {len(results)} | "
            f"{sum(yes for _, yes, _ in results)} of {sum(of for _, _, of in results)} | "
            f"{', '.join(f'{why} {n}' for why, n in refused.most_common())} |"
        )
    with capsys.disabled():
        print("\n" + "\n".join(lines))
