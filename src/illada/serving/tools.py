"""What a request may say of tools, as in OpenAI's two APIs: the functions, and which of them may be called."""

from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from illada.errors import needs
from illada.generation.optional.tool_calls import MOST_TOOLS
from illada.serving.forms import Strict

with needs("serve", "serving"):
    from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator


class Choice(NamedTuple):
    """Which functions an answer may call."""

    mode: str
    """auto, required, or none."""
    names: tuple[str, ...] | None = None
    """Those that may be called; None for all."""
    parallel: bool = True
    """Whether several calls may be in one answer."""


class Named(Strict):
    """The name of a function."""

    name: str


class Function(Named):
    """A function that may be called; the arguments always match its parameters, with `strict` or without."""

    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def plain(self) -> dict[str, Any]:
        """Return it without what the model is not told."""
        shown = {name: getattr(self, name) for name in ("name", "description", "parameters")}
        return {name: value for name, value in shown.items() if value is not None}


def _of_functions(tool: Any) -> Any:
    """Refuse tools of other kinds in one sentence; otherwise their fields would be what is wrong."""
    if isinstance(tool, dict) and tool.get("type", "function") != "function":
        raise ValueError(f"only functions can be called here, no {str(tool['type'])[:80]!r}")
    return tool


class ChatTool(Strict):
    """A tool of the chat API."""

    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """Return its function without what the model is not told."""
        return self.function.plain()


class ItemTool(Function):
    """A tool of the Responses API."""

    type: Literal["function"]


class ChatReference(Strict):
    """Names a function, as the chat API does."""

    type: Literal["function"]
    function: Named

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.name


class ItemReference(Named):
    """Names a function, as the Responses API does."""

    type: Literal["function"]


class _Allowed(Strict):
    mode: Literal["auto", "required"]


class ChatSubset(_Allowed):
    """Some of the functions, as the chat API names them."""

    tools: Annotated[list[ChatReference], Field(min_length=1, max_length=MOST_TOOLS)]


class ChatAllowed(Strict):
    """Allows some of the functions, as the chat API does."""

    type: Literal["allowed_tools"]
    allowed_tools: ChatSubset

    def choice(self) -> Choice:
        """Return what it allows."""
        return Choice(self.allowed_tools.mode, tuple(tool.name for tool in self.allowed_tools.tools))


class ItemAllowed(_Allowed):
    """Allows some of the functions, as the Responses API does."""

    type: Literal["allowed_tools"]
    tools: Annotated[list[ItemReference], Field(min_length=1, max_length=MOST_TOOLS)]

    def choice(self) -> Choice:
        """Return what it allows."""
        return Choice(self.mode, tuple(tool.name for tool in self.tools))


def _one_kind(choice: Any) -> Any:
    """Refuse what is no choice in one sentence."""
    kind = choice.get("type") if isinstance(choice, dict) else choice
    if kind not in (None, "none", "auto", "required", "function", "allowed_tools"):
        raise ValueError('it must be "none", "auto", "required", or name a function')
    return choice


def _tag(choice: Any) -> str:
    """Return which of the types below a choice has to be; errors do not show what is no identifier."""
    kind = choice.get("type", "function") if isinstance(choice, dict) else getattr(choice, "type", "a word")
    return {"function": "one function", "allowed_tools": "some functions"}.get(kind, "a word")


Tool = TypeVar("Tool")
Reference = TypeVar("Reference")
Allowed = TypeVar("Allowed")
ListOf = Annotated[list[Annotated[Tool, BeforeValidator(_of_functions)]], Field(max_length=MOST_TOOLS, fail_fast=True)]
OneOf = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("a word")]
    | Annotated[Reference, Tag("one function")]
    | Annotated[Allowed, Tag("some functions")],
    Discriminator(_tag),
    BeforeValidator(_one_kind),
]


class ToolFields(Strict):
    """Fields about tools that both chat APIs have; each says what a tool and a choice look like."""

    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    def functions(self) -> list[dict[str, Any]]:
        """Return the functions that the model is told of: none where it must not call any."""
        return [] if self.choice().mode == "none" else [tool.plain() for tool in self.tools or []]

    def choice(self) -> Choice:
        """Return which functions the answer may call."""
        given = self.tool_choice
        if isinstance(given, ChatReference | ItemReference):  # one call of this function
            return Choice("required", (given.name,), parallel=False)
        parallel = self.parallel_tool_calls is not False
        if isinstance(given, ChatAllowed | ItemAllowed):
            return given.choice()._replace(parallel=parallel)
        return Choice(given or "auto", None, parallel)

    @model_validator(mode="after")
    def _choice_of_some(self) -> "ToolFields":
        wanted = self.choice()
        if not self.tools and (wanted.mode == "required" or wanted.names):
            raise ValueError("tool_choice needs tools to choose from")
        names = [function["name"] for function in self.functions()]
        if unknown := [name for name in wanted.names or () if name not in names]:
            raise ValueError(f"tool_choice names {unknown[0]!r}, which is none of the tools")
        return self


class ChatToolFields(ToolFields):
    """Fields about tools in the chat API."""

    tools: ListOf[ChatTool] | None = None
    tool_choice: OneOf[ChatReference, ChatAllowed] | None = None


class ItemToolFields(ToolFields):
    """Fields about tools in the Responses API."""

    tools: ListOf[ItemTool] | None = None
    tool_choice: OneOf[ItemReference, ItemAllowed] | None = None
