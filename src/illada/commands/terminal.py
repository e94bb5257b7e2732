"""A conversation in the terminal, where each answer is drawn while it forms."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from illada.errors import IlladaError
from illada.generation.engine import Generation, StepEvent, generate
from illada.generation.optional.tool_calls import Tools
from illada.generation.settings import GenerationSettings, settings_for
from illada.model.transformer import IlladaForMaskedLM
from illada.text.chat import encode_prompt
from illada.text.prompts import show_ids

MASK_SIGN = "░"


def draw(tokenizer: Any, event: StepEvent, eos_ids: Sequence[int]) -> Text:
    """Return a picture of an answer that is forming: committed tokens bold, proposals dim, the unknown as blocks.

    It ends at the first committed end-of-sequence token, whatever the model thinks comes after it.
    """
    text = Text()
    for token, committed, confidence in zip(event.ids, event.committed, event.confidence, strict=True):
        piece = tokenizer.decode([token], skip_special_tokens=True)
        if committed and token in eos_ids:
            break
        if committed:
            text.append(piece, style="bold")
        else:
            text.append(MASK_SIGN if math.isnan(confidence) or not piece else piece, style="dim")
    return text


def chat(
    model: IlladaForMaskedLM,
    tokenizer: Any,
    settings: GenerationSettings,
    system: str | None,
    tools: Tools | None = None,
    tool_choice: str = "auto",
) -> None:
    """Hold a conversation on standard input and output until it ends; calls of tools are shown and wait for results.

    On a terminal each answer is drawn while it forms; elsewhere only finished answers are printed.

    Args:
        model: the network.
        tokenizer: its tokenizer.
        settings: how to decode.
        system: system message.
        tools: functions that may be called.
        tool_choice: "auto", "required" or the name of a function, for the answer to a message of the user.

    Raises:
        IlladaError: when the settings, tools and choice do not go together, or a message is not UTF-8.
    """
    console = Console()
    settings = settings_for(model, settings)
    called, free = _with_calls(settings, tools, tool_choice), _with_calls(settings, tools, "auto")
    if sys.stdin.isatty():
        console.print("Type a message; /clear forgets the conversation, /quit or Ctrl-D ends.", style="dim")
    first: list[Mapping[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    messages = list(first)
    while (said := _read_line(console, "> ")) not in (None, "/quit", "/exit"):
        if not said:
            continue
        if said == "/clear":
            messages = list(first)
            continue
        before = len(messages)
        # A chat on a terminal goes on after \n typed as two characters: puzzles have several lines.
        messages.append({"role": "user", "content": said.replace("\\n", "\n")})
        try:
            results = _turn(console, model, tokenizer, messages, called, tools)
            while results:
                messages += results
                results = _turn(console, model, tokenizer, messages, free, tools)
        except EOFError:
            return
        except IlladaError as error:
            console.print(f"{error}", style="red", markup=False)
            console.print("(/clear begins a new conversation)", style="dim")
            del messages[before:]


def _with_calls(settings: GenerationSettings, tools: Tools | None, choice: str) -> GenerationSettings:
    """Return settings under which an answer may, or must, call tools."""
    if tools is None:
        return settings
    if given := [*settings.forms, *(["stop"] if settings.stop else [])]:
        raise IlladaError(f"tools and {given[0]} cannot be used together: leave one of them out")
    named = choice not in ("auto", "required")
    regex = tools.regex("required", [choice], parallel=False) if named else tools.regex(choice)
    return replace(settings, regex=regex)


def _read_line(console: Console, prompt: str) -> str | None:
    """Return the next line of standard input without the white space around it, None at the end."""
    try:
        said = console.input(f"[bold]{escape(prompt)}[/bold]" if sys.stdin.isatty() else "").strip()
        said.encode()
    except EOFError:
        return None
    except UnicodeError as error:
        raise IlladaError("a message is not UTF-8 text: send it again as UTF-8") from error
    return said


def _turn(
    console: Console,
    model: IlladaForMaskedLM,
    tokenizer: Any,
    messages: list[Mapping[str, Any]],
    settings: GenerationSettings,
    tools: Tools | None,
) -> list[Mapping[str, Any]]:
    """Answer a conversation, add the answer to it and return the results of the calls in it, as messages.

    Raises:
        EOFError: when the input ends before all results.
    """
    prompt = encode_prompt(tokenizer, messages) if tools is None else tools.encode(messages)
    text = show_ids(tokenizer, _answer(console, model, tokenizer, prompt, settings).ids)
    content, calls = (text, []) if tools is None else tools.read(text)
    made = [
        {"id": f"call_{len(messages)}_{number}", "type": "function", "function": call._asdict()}
        for number, call in enumerate(calls)
    ]
    messages.append({"role": "assistant", "content": content, **({"tool_calls": made} if made else {})})
    results: list[Mapping[str, Any]] = []
    for call, one in zip(calls, made, strict=True):
        result = _read_line(console, f"result of {call.name}({call.arguments})> ")
        if result is None:
            raise EOFError
        results.append({"role": "tool", "tool_call_id": one["id"], "content": result})
    return results


def _answer(
    console: Console,
    model: IlladaForMaskedLM,
    tokenizer: Any,
    prompt: Sequence[int],
    settings: GenerationSettings,
) -> Generation:
    if not console.is_terminal:
        answer = generate(model, [prompt], settings, tokenizer=tokenizer)[0]
        console.print(show_ids(tokenizer, answer.ids), markup=False, highlight=False, soft_wrap=True)
        return answer
    with Live(Text(MASK_SIGN * settings.block_length, style="dim"), console=console, refresh_per_second=30) as picture:
        answer = generate(
            model,
            [prompt],
            settings,
            tokenizer=tokenizer,
            on_step=lambda event: picture.update(draw(tokenizer, event, settings.eos_ids)),
        )[0]
        picture.update(Text(show_ids(tokenizer, answer.ids)))
    console.print(f"{len(answer.ids)} tokens, {answer.forwards} forward passes", style="dim")
    return answer
