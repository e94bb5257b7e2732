"""What a request may say, and errors: OpenAI's fields and a few of ours; every other field is refused by name."""

import json
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from illada.errors import IlladaError, needs
from illada.generation.settings import GenerationSettings
from illada.serving.forms import NO_FORM, FormFields, Strict, TextFormat
from illada.serving.messages import ITEMS, AnyItem, ChatMessage, Item, joined
from illada.serving.tools import ChatToolFields, ItemToolFields

with needs("serve", "serving"):
    from pydantic import BeforeValidator, Field, model_validator
    from starlette.responses import JSONResponse

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "access_programs": (),
    "audio": (),
    "background": (False,),
    "background_options": (),
    "best_of": (1,),
    "context_management": ([],),
    "conversation": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "image": (),
    "modalities": (["text"],),
    "moderation": (),
    "previous_response_id": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncation": ("disabled",),
    "web_search_options": (),
}
"""OpenAI's fields that this server cannot serve, and the values besides null that ask for nothing."""

REASONS = {
    "tools": "a text has no calls; ask /v1/chat/completions",
    "background": "ask for a stream, or use `illada batch`",
    "conversation": "this server keeps nothing: send the whole conversation as input",
    "previous_response_id": "this server keeps nothing: send the whole conversation as input",
    "truncation": "nothing is cut in silence: send what fits the context",
}

NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "max_tool_calls": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning": ({},),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": (),
}
"""OpenAI's fields that change no answer here, and the values besides null that ask for nothing. A header names those
that asked for something."""

MOST_BIASES = 1024

FAST = {"threshold": 0.95, "cache": "adaptive"}
"""What `decoding: "fast"` means, as in `illada eval`."""


class JsonBody(Strict):
    """The whole body of a request."""

    @model_validator(mode="before")
    @classmethod
    def _check_text(cls, data: Any) -> Any:
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half of a surrogate pair, which is no character") from None
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        return data


class Decoding(Strict):
    """Decoding options, as in `illada generate`. A missing option keeps the server's value; null takes the default."""

    block_length: Annotated[int, Field(ge=1)] | None = None
    steps_per_block: Annotated[int, Field(ge=1)] | None = None
    threshold: float | None = None
    entropy_bound: float | None = None
    remasking: Literal["low_confidence", "margin", "random"] | None = None
    repetition_penalty: float | None = None
    guidance_scale: float | None = None
    later_masks: bool | None = None
    think_boost: float | None = None
    think_boost_power: float | None = None
    cache: Literal["none", "prefix", "dual", "frozen", "adaptive"] | None = None
    refresh_below: float | None = None
    speculate: Annotated[int, Field(ge=0, le=16)] | None = None


class StreamOptions(Strict):
    """OpenAI's options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


def _check_biases(biases: Any) -> Any:
    if isinstance(biases, dict):
        if len(biases) > MOST_BIASES:
            raise ValueError(f"it names {len(biases)} ids: at most {MOST_BIASES} are read")
        if not all(re.fullmatch("[0-9]{1,9}", token) for token in biases):
            raise ValueError("its keys must be token ids (`/tokenize` gives them)")
    return biases


Penalty = Annotated[float, Field(ge=-2, le=2)]
Alternatives = Annotated[int, Field(ge=0, le=20)]
Biases = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_check_biases)]


class GenerationRequest(JsonBody, FormFields):
    """The fields that all requests for answers share."""

    max_tool_calls: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    reasoning: Any = None
    reasoning_effort: Any = None
    service_tier: Any = None
    store: Any = None
    verbosity: Any = None
    safety_identifier: str | None = None
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Biases | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16, fail_fast=True)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    decoding: Literal["exact", "fast"] | Decoding | None = None
    diffusion: bool = False
    timeout: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        unknown = {name: neutral for name, neutral in NEUTRAL.items() if name not in cls.model_fields}
        for name, neutral in unknown.items():
            value = data.get(name)
            # True is 1, and False is 0, but not in JSON.
            if value is not None and not any(value == one and type(value) is type(one) for one in neutral):
                raise ValueError(f"{name} is not supported: {REASONS.get(name, 'leave it out')}")
        return {name: value for name, value in data.items() if name not in unknown}

    @model_validator(mode="after")
    def _check(self) -> "GenerationRequest":
        if self.diffusion and not self.stream:
            raise ValueError("diffusion needs stream: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.stop is not None and any(not 0 < len(text) <= 256 for text in self.stops() or ()):
            raise ValueError("stop must hold texts of 1 to 256 characters")
        return self

    def without_effect(self) -> list[str]:
        """Return the fields of the request that asked for something and change nothing."""
        return [
            name
            for name, neutral in NO_EFFECT.items()
            if (value := getattr(self, name)) is not None and value not in neutral
        ]

    @property
    @abstractmethod
    def log_probs(self) -> bool:
        """Whether log-probabilities are wanted."""

    @property
    @abstractmethod
    def alternatives(self) -> int:
        """How many of the most probable tokens are wanted beside each token."""

    def stops(self) -> tuple[str, ...] | None:
        """Return the stop strings, or None when the request has none."""
        return None if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def settings(self, defaults: GenerationSettings) -> GenerationSettings:
        """Return the defaults with the request's values; the seed of each choice and what fits the context come later.

        Raises:
            IlladaError: when the values contradict each other.
        """
        values = asdict(defaults)
        if self.decoding is not None:
            ours = {name: getattr(GenerationSettings, name) for name in Decoding.model_fields}
            if isinstance(self.decoding, str):
                # These are the model's habits; the words "exact" and "fast" say nothing about them.
                habits = ("block_length", "repetition_penalty", "think_boost", "think_boost_power")
                values |= {name: value for name, value in ours.items() if name not in habits}
                values |= FAST if self.decoding == "fast" else {}
            else:
                # null undoes what the server was started with.
                fields_set = self.decoding.model_dump(exclude_unset=True)
                changes = {name: ours[name] if value is None else value for name, value in fields_set.items()}
                if {"steps_per_block", "threshold", "entropy_bound"} & changes.keys():
                    values |= {"steps_per_block": None, "threshold": None, "entropy_bound": None}
                if changes.get("cache", values["cache"]) != "adaptive":
                    values["refresh_below"] = ours["refresh_below"]
                values |= changes
        same = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty")
        plain = {name: getattr(self, name) for name in same} | {"stop": self.stops()}
        if self.logit_bias is not None:
            plain["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()} or None
        values |= {name: value for name, value in plain.items() if value is not None}
        if not values["temperature"]:
            # Clients often send them beside temperature 0; without a draw there is nothing for them to limit.
            values |= {"top_p": 1.0, "top_k": None, "min_p": 0.0}
        if self.max_tokens is not None:
            values["max_new_tokens"] = self.max_tokens
        if (form := self.form()) != NO_FORM or self.response_format is not None:
            values |= form
        if values["steps_per_block"] is not None and values["steps_per_block"] > values["block_length"]:
            raise IlladaError(f"steps_per_block must be at most block_length {values['block_length']}")
        return GenerationSettings(**values)


class ChatRequest(ChatToolFields, GenerationRequest):
    """A conversation whose next message the model writes; a last message of the assistant is gone on with."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None

    @property
    def log_probs(self) -> bool:
        """Whether log-probabilities are wanted."""
        return bool(self.logprobs)

    @property
    def alternatives(self) -> int:
        """How many of the most probable tokens are wanted beside each token."""
        return self.top_logprobs or 0

    def conversation(self) -> list[dict[str, Any]]:
        """Return the messages as chat templates know them."""
        return [message.plain() for message in self.messages]

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
            self.max_tokens = self.max_completion_tokens
        return self


class TextOptions(Strict):
    """Options of a response's text."""

    format: TextFormat | None = None
    verbosity: Any = None


class ResponseRequest(ItemToolFields, GenerationRequest):
    """A conversation in the form of OpenAI's Responses API; nothing of it is stored."""

    input: str | Annotated[list[AnyItem], Field(min_length=1, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    text: TextOptions | None = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], Field(fail_fast=True)] | None = None
    top_logprobs: Alternatives | None = None

    @property
    def log_probs(self) -> bool:
        """Whether log-probabilities are wanted."""
        return bool(self.include)

    @property
    def alternatives(self) -> int:
        """How many of the most probable tokens are wanted beside each token."""
        return self.top_logprobs or 0 if self.include else 0

    def conversation(self) -> list[dict[str, Any]]:
        """Return the messages as chat templates know them; the instructions come first."""
        given = [Item(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        messages = joined([item.plain() for item in given])
        if self.instructions is None:
            return messages
        if messages[0]["role"] == "system":
            return [{"role": "system", "content": f"{self.instructions}\n\n{messages[0]['content']}"}, *messages[1:]]
        return [{"role": "system", "content": self.instructions}, *messages]

    def asked(self) -> dict[str, tuple[str, Any]]:
        """Return the field that asks for a form; the text's format may."""
        wanted = None if self.text is None or self.text.format is None else self.text.format.schema_of_answer()
        found = super().asked()
        if wanted is not None and found:
            raise ValueError("text.format and another field each say what an answer must match: give one of them")
        return found if wanted is None else {"text.format": ("json_schema", wanted)}

    @model_validator(mode="after")
    def _one_limit(self) -> "ResponseRequest":
        if self.diffusion:
            raise ValueError("diffusion is for chat and completions: ask /v1/chat/completions")
        if self.max_output_tokens is not None:
            if self.max_tokens not in (None, self.max_output_tokens):
                raise ValueError("max_tokens and max_output_tokens differ: give one of them")
            self.max_tokens = self.max_output_tokens
        return self


TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class TokenizeRequest(ChatToolFields, JsonBody):
    """A text or a conversation whose ids are wanted."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_text(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give a prompt or messages")
        return self

    def conversation(self) -> list[dict[str, Any]]:
        """Return the messages as chat templates know them."""
        return [message.plain() for message in self.messages or []]


class DetokenizeRequest(JsonBody):
    """Ids whose text is wanted."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class CompletionRequest(GenerationRequest):
    """A text to continue, or a text with gaps to fill."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Annotated[list[TokenId], Field(fail_fast=True)]
        | Annotated[list[Annotated[list[TokenId], Field(fail_fast=True)]], Field(fail_fast=True)]
    )
    suffix: str | None = None
    slot_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Alternatives | None = None
    echo: bool | None = None

    @property
    def log_probs(self) -> bool:
        """Whether log-probabilities are wanted."""
        return self.logprobs is not None

    @property
    def alternatives(self) -> int:
        """How many of the most probable tokens are wanted beside each token."""
        return self.logprobs or 0

    @model_validator(mode="after")
    def _one_gap(self) -> "CompletionRequest":
        if self.suffix is not None and self.slot_tokens is not None:
            raise ValueError(
                "suffix and slot_tokens exclude each other: write ___ where something is missing, or a suffix"
            )
        if self.suffix is not None and self.echo:
            raise ValueError("echo and suffix exclude each other: the answer stands between two texts")
        return self

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, one or several, in text or ids."""
        prompt: Any = self.prompt
        one = isinstance(prompt, str) or not prompt or isinstance(prompt[0], int)
        return [prompt] if one else prompt


@dataclass(eq=False)
class ApiError(Exception):
    """Ends a request with an HTTP status and an error as OpenAI's clients read it."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] | None = None

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object that says what is wrong."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the error as a response."""
        return JSONResponse(self.body, self.status, self.headers)


class FailedError(ApiError):
    """The server failed while it answered."""

    def __init__(self) -> None:
        super().__init__(500, "the server failed while it answered: try again", "server_error")


def validation_error(errors: Sequence[Any]) -> ApiError:
    """Return pydantic's first error in one line; where several types were tried, the error that lies deepest."""

    def rank(error: Any) -> tuple[bool, int, bool]:
        return error["loc"][:2] == errors[0]["loc"][:2], len(error["loc"]), error["type"] == "value_error"

    error = max(errors, key=rank)
    # The names of the tried types say nothing to a client.
    place = [str(part) for part in error["loc"][1:] if str(part).isidentifier() or isinstance(part, int)]
    place = [part for part in place if part not in ("str", "Decoding", "message", *ITEMS)]
    text = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        text = f"unknown field {str(error['loc'][-1])[:80]!r}: leave it out"
    elif error["type"] == "missing":
        text = f"{place[-1] if place else 'the body'} is missing"
    elif error["type"] == "json_invalid":
        text, place = f"the body is not JSON: {error.get('ctx', {}).get('error', 'it cannot be read')}", []
    elif place:
        text = f"{'.'.join(place)}: {text}"
    if error["type"] == "extra_forbidden":
        param: str | None = str(error["loc"][1])[:80]
    else:
        param = place[0] if place else named_field(text)
    return ApiError(400, " ".join(text.split())[:400], param=param)


FIELDS = {
    *NEUTRAL,
    *(
        name
        for kind in (ChatRequest, CompletionRequest, ResponseRequest, TokenizeRequest)
        for name in kind.model_fields
    ),
    *DetokenizeRequest.model_fields,
}
"""Every field of the first level that some request may have."""


def named_field(message: str) -> str | None:
    """Return the field of a request that an error's message is about: the first that it names, if any."""
    words = (word for word in re.findall(r"[a-z_]+", message) if word in FIELDS or word in Decoding.model_fields)
    word = next(words, None)
    return "decoding" if word in Decoding.model_fields else word
