"""What a request may say of the form of its answer: OpenAI's response formats, and the fields of guided decoding that
other servers take."""

from typing import Annotated, Any, Literal

from illada.errors import needs
from illada.files import parse_json

with needs("serve", "serving"):
    from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_FIELDS = 100
"""Most fields of one object of a request: each unknown one would be an error of its own."""

Schema = dict[str, Any] | bool
Choices = Annotated[list[str], Field(min_length=1, max_length=1024)]

NO_FORM: dict[str, Any] = {"regex": None, "json_schema": None, "choices": (), "slot_regex": ()}
"""The settings of an answer that may be anything."""


class Strict(BaseModel):
    """Takes nothing that it does not know, and converts nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _bound_fields(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > MOST_FIELDS:
            raise ValueError(f"an object has {len(data)} fields: at most {MOST_FIELDS} are read")
        return data


class NamedSchema(Strict):
    """A schema as OpenAI's clients send it; an answer always follows it, with `strict` or without."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """The form of an answer, as in OpenAI's chat API."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    def schema_of_answer(self) -> Schema | None:
        """Return what JSON the answer must be; None for any text."""
        return _schema(self.type, None if self.json_schema is None else self.json_schema.schema_)

    @model_validator(mode="after")
    def _complete(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('response_format needs json_schema with type "json_schema", and with no other')
        return self


class TextFormat(NamedSchema):
    """The form of a response, as in OpenAI's Responses API."""

    type: Literal["text", "json_object", "json_schema"]

    def schema_of_answer(self) -> Schema | None:
        """Return what JSON the answer must be; None for any text."""
        return _schema(self.type, self.schema_)


def _schema(kind: str, given: Schema | None) -> Schema | None:
    if kind == "text":
        return None
    return {"type": "object"} if kind == "json_object" or given is None else given


class StructuredOutputs(Strict):
    """The form of an answer as vLLM's clients ask for it."""

    regex: str | None = None
    json_: Annotated[Schema | str | None, Field(alias="json")] = None
    choice: Choices | None = None
    json_object: bool | None = None


class FormFields(Strict):
    """Fields that ask for a form, at most one of them."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_regex: str | None = None
    guided_json: Schema | str | None = None
    guided_choice: Choices | None = None
    slot_regex: Choices | None = None

    def asked(self) -> dict[str, tuple[str, Any]]:
        """Return the field that asks for a form, if any, with the setting that says the same and its value."""
        other = self.structured_outputs or StructuredOutputs()
        wanted: dict[str, tuple[str, Any]] = {
            "response_format": ("json_schema", self.response_format and self.response_format.schema_of_answer()),
            "guided_regex": ("regex", self.guided_regex),
            "guided_json": ("json_schema", _read(self.guided_json, "guided_json")),
            "guided_choice": ("choices", self.guided_choice and tuple(self.guided_choice)),
            "slot_regex": ("slot_regex", self.slot_regex and tuple(self.slot_regex)),
            "structured_outputs.regex": ("regex", other.regex),
            "structured_outputs.json": ("json_schema", _read(other.json_, "structured_outputs.json")),
            "structured_outputs.choice": ("choices", other.choice and tuple(other.choice)),
            "structured_outputs.json_object": ("json_schema", {"type": "object"} if other.json_object else None),
        }
        found = {field: setting for field, setting in wanted.items() if setting[1] is not None}
        if len(found) > 1:
            raise ValueError(f"{' and '.join(found)} each say what an answer must match: give one of them")
        return found

    def form(self) -> dict[str, Any]:
        """Return the settings that say what the answer must match."""
        return NO_FORM | dict(self.asked().values())

    @model_validator(mode="after")
    def _one_form(self) -> "FormFields":
        self.asked()
        return self


def _read(schema: Schema | str | None, name: str) -> Schema | None:
    """Return a schema that may be written as a text."""
    if not isinstance(schema, str):
        return schema
    try:
        found = parse_json(schema)
    except ValueError as error:
        raise ValueError(f"{name} is no JSON ({error})") from None
    if not isinstance(found, dict | bool):
        raise ValueError(f"{name} must hold a schema: an object, true or false")
    return found
