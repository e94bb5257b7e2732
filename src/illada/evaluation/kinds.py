"""The types of generation settings that somebody wrote into a file or on a command line, and what to say of others."""

from typing import Any, Literal, get_args, get_origin, get_type_hints

from illada.errors import IlladaError
from illada.generation.settings import GenerationSettings

KINDS = {
    name: kind
    for name, kind in get_type_hints(GenerationSettings).items()
    if name not in ("eos_token_id", "stop", "json_schema", "choices")
}
"""Types of the settings that a task or a user may give."""
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


def _fits(value: object, kind: Any) -> bool:
    """Say whether a value has a type; whole numbers are numbers, true and false are none."""
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return value in inner
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if inner:
        return any(_fits(value, one) for one in inner)
    return isinstance(value, float | int if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def _wanted(kind: Any) -> str:
    """Say in words what a value of a type is."""
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return " or ".join(inner)
    if get_origin(kind) is dict:
        return "an object of numbers by token id"
    if get_origin(kind) is list:
        return f"a list of {_wanted(inner[0])}"
    return " or ".join(map(_wanted, inner)) if inner else WORDS[kind]


def read_value(name: str, value: object, kind: Any) -> Any:
    """Return a value that has a type; keys of JSON's objects, which are texts, become the ids that they name.

    Raises:
        IlladaError: when it has another type.
    """
    if isinstance(value, dict):
        value = {int(key) if isinstance(key, str) and key.isdecimal() else key: one for key, one in value.items()}
    if not _fits(value, kind):
        raise IlladaError(f"{name} is {str(value)[:60]!r}: it must be {_wanted(kind)}")
    return value
