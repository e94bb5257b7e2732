"""A conversation in the terminal, where each answer is drawn while it forms."""

import math
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from illada.errors import IlladaError
from illada.generation.engine import Generation, StepEvent, generate
from illada.generation.settings import GenerationSettings, settings_for
from illada.model.transformer import IlladaForMaskedLM
from illada.text.chat import Message, encode_prompt
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


def chat(model: IlladaForMaskedLM, tokenizer: Any, settings: GenerationSettings, system: str | None) -> None:
    """Hold a conversation on standard input and output until it ends.

    On a terminal each answer is drawn while it forms; elsewhere only finished answers are printed.
    """
    console = Console()
    settings = settings_for(model, settings)
    if sys.stdin.isatty():
        console.print("Type a message; /clear forgets the conversation, /quit or Ctrl-D ends.", style="dim")
    first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages = list(first)
    while True:
        try:
            said = console.input("[bold]> [/bold]" if sys.stdin.isatty() else "").strip()
            said.encode()
        except EOFError:
            return
        except UnicodeError as error:
            raise IlladaError("a message is not UTF-8 text: send it again as UTF-8") from error
        if not said:
            continue
        if said in ("/quit", "/exit"):
            return
        if said == "/clear":
            messages = list(first)
            continue
        # A chat on a terminal goes on after \n typed as two characters: puzzles have several lines.
        messages.append({"role": "user", "content": said.replace("\\n", "\n")})
        try:
            answer = _answer(console, model, tokenizer, messages, settings)
        except IlladaError as error:
            console.print(f"{error}", style="red", markup=False)
            console.print("(/clear begins a new conversation)", style="dim")
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": show_ids(tokenizer, answer.ids)})


def _answer(
    console: Console,
    model: IlladaForMaskedLM,
    tokenizer: Any,
    messages: Sequence[Message],
    settings: GenerationSettings,
) -> Generation:
    prompt = encode_prompt(tokenizer, messages)
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
