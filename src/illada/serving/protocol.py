"""What a request may say, and errors: OpenAI's fields and a few of ours; every other field is refused by name."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from illada.errors import IlladaError, needs
from illada.generation.settings import GenerationSettings

with needs("serve", "serving"):
    from pydantic import BaseModel, ConfigDict, Field, model_validator
    from starlette.responses import JSONResponse

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
"""OpenAI's fields that this server cannot serve, and the values besides null that ask for nothing."""

REASONS = {
    "response_format": "use text: no slots of fixed length hold every JSON value, so it cannot be forced soundly",
    "top_logprobs": "only the chosen token's confidence is known",
    "echo": "score texts with `illada score` or `illada eval`",
    "frequency_penalty": "use decoding.repetition_penalty",
    "presence_penalty": "use decoding.repetition_penalty",
}

EMPTY = ("annotations", "audio", "function_call", "refusal", "tool_calls")
"""Fields of an answer that clients send back unchanged: null, or an empty list."""

FAST = {"threshold": 0.95, "cache": "adaptive"}
"""What `decoding: "fast"` means, as in `illada eval`."""


class Strict(BaseModel):
    """Takes nothing that it does not know, and converts nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


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
    cache: Literal["none", "prefix", "frozen", "adaptive"] | None = None
    refresh_below: float | None = None
    speculate: Annotated[int, Field(ge=0, le=16)] | None = None


class StreamOptions(Strict):
    """OpenAI's options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationRequest(Strict):
    """The fields that chat and completion requests share."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
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
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half of a surrogate pair, which is no character") from None
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        for name, neutral in NEUTRAL.items():
            if name in data and data[name] is not None and data[name] not in neutral:
                raise ValueError(f"{name} is not supported: {REASONS.get(name, 'leave it out')}")
        return {name: value for name, value in data.items() if name not in NEUTRAL}

    @model_validator(mode="after")
    def _check(self) -> "GenerationRequest":
        if self.diffusion and not self.stream:
            raise ValueError("diffusion needs stream: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.stop is not None and any(not 0 < len(text) <= 256 for text in self.stops() or ()):
            raise ValueError("stop must hold texts of 1 to 256 characters")
        return self

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
        plain = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "stop": self.stops()}
        values |= {name: value for name, value in plain.items() if value is not None}
        if not values["temperature"]:
            # Clients often send them beside temperature 0; without a draw there is nothing for them to limit.
            values |= {"top_p": 1.0, "top_k": None}
        if self.max_tokens is not None:
            values["max_new_tokens"] = self.max_tokens
        if values["steps_per_block"] is not None and values["steps_per_block"] > values["block_length"]:
            raise IlladaError(f"steps_per_block must be at most block_length {values['block_length']}")
        return GenerationSettings(**values)


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    type: Literal["text", "message"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if name not in EMPTY or value not in (None, [])}

    def plain(self) -> dict[str, str]:
        """Return the role and content that chat templates know."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(GenerationRequest):
    """A conversation whose next message the model writes."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
            self.max_tokens = self.max_completion_tokens
        return self


TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class CompletionRequest(GenerationRequest):
    """A text to continue, or a text with gaps to fill."""

    prompt: str | Annotated[list[str], Field(min_length=1)] | list[TokenId] | list[list[TokenId]]
    suffix: str | None = None
    slot_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=1)] | None = None

    @model_validator(mode="after")
    def _one_gap(self) -> "CompletionRequest":
        if self.suffix is not None and self.slot_tokens is not None:
            raise ValueError(
                "suffix and slot_tokens exclude each other: write ___ where something is missing, or a suffix"
            )
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
    error = max(errors, key=lambda error: (error["loc"][:2] == errors[0]["loc"][:2], len(error["loc"])))
    # The names of the tried types say nothing to a client.
    place = [str(part) for part in error["loc"][1:] if str(part).isidentifier() or isinstance(part, int)]
    place = [part for part in place if part not in ("str", "Decoding")]
    text = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        text = f"unknown field {str(error['loc'][-1])[:80]!r}: leave it out"
    elif error["type"] == "missing":
        text = f"{place[-1] if place else 'the body'} is missing"
    elif error["type"] == "json_invalid":
        text, place = f"the body is not JSON: {error.get('ctx', {}).get('error', 'it cannot be read')}", []
    elif place:
        text = f"{'.'.join(place)}: {text}"
    return ApiError(400, " ".join(text.split())[:400], param=place[0] if place else None)
