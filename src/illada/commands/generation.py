"""`illada generate` and `illada chat`: text in, text out."""

import json as json_format
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from illada.commands import heavy
from illada.errors import IlladaError, first_line
from illada.files import parse_json, read_json
from illada.generation.settings import GenerationSettings, settings_for
from illada.text.prompts import encode_plain, encode_template, read_prompts, show_ids
from illada.weights.options import ModelOptions

SHOWN = ("ids", "finish_reason", "forwards", "positions", "forced", "log_probs")
"""What `--json` prints of a `Generation`, beside the prompt and the text."""


def generate(
    model: ModelOptions,
    settings: GenerationSettings,
    prompt: list[str] | None = None,
    file: str | None = None,
    chat: bool = False,
    slot_tokens: int | None = None,
    json: bool = False,
    picture: str | None = None,
) -> None:
    """Complete prompts by block-wise, variable-length diffusion.

    Args:
        model: which model, and how to load it.
        settings: how to decode.
        prompt: texts to complete.
        file: file with a prompt on each line (or jsonl with "prompt"), instead.
        chat: put each prompt into the chat template.
        slot_tokens: fill in each ___ of the prompts with so many tokens, instead of writing on.
        json: print one JSON object per prompt.
        picture: draw how the answer to a single prompt forms, a row for each step: a file .png, .svg or .pdf.
    """
    prompts, settings = read_prompts(prompt, file), with_schema(settings)
    drawing = None if picture is None else heavy.picture.Drawing(Path(picture), prompts)
    on_step = None if drawing is None else drawing.events.append
    if chat and slot_tokens is not None:
        raise IlladaError("chat and slot_tokens exclude each other: slots are filled in plain text")
    network, tokenizer = heavy.weights.load_model(model.model, model.dtype, model.device, model.quantize)
    with_ends = settings_for(network, settings)
    if slot_tokens is not None:
        templates = [encode_template(tokenizer, text, slot_tokens) for text in prompts]
        answers = heavy.generation.infill(network, templates, settings, tokenizer, on_step)
    else:
        if chat:
            ids = [heavy.chat.encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in prompts]
        else:
            ids = [encode_plain(tokenizer, text) for text in prompts]
        answers = heavy.generation.generate(network, ids, with_ends, tokenizer, on_step)
    if not chat and slot_tokens is None:
        _check_plain(model.model, tokenizer, prompts)
    if all(not show_ids(tokenizer, answer.ids).strip() for answer in answers):
        _explain_nothing(model.model, blank=any(answer.ids for answer in answers))
    for text, answer in zip(prompts, answers, strict=True):
        if json:
            record = {"prompt": text, "text": show_ids(tokenizer, answer.ids)}
            record |= {name: getattr(answer, name) for name in SHOWN}
            print(json_format.dumps(record, ensure_ascii=False))
        else:
            if len(prompts) > 1:
                print(f"> {text}")
            print(show_ids(tokenizer, answer.ids))
    if drawing is not None:
        drawing.write(tokenizer, with_ends.eos_ids)


def with_schema(settings: GenerationSettings) -> GenerationSettings:
    """Return settings with the schema that the file they name holds."""
    if not isinstance(settings.json_schema, str):
        return settings
    return replace(settings, json_schema=read_json(Path(settings.json_schema)))


def _check_plain(model: str, tokenizer: Any, prompts: Sequence[str]) -> None:
    """Say what makes plain prompts the wrong ones: a tuned model, a space that belongs to the next word."""
    if heavy.runs.tuned_on_chats(model):
        _say(f"{model} was tuned on conversations, and the prompt is plain text to continue: add --chat to ask it")
    cut = [text for text in prompts if text[-1:].isspace() and not _ends_a_token(tokenizer, text)]
    if cut:
        _say(f"the space that ends {cut[0][-20:]!r} belongs to the next word, half a word may follow: leave it out")


def _ends_a_token(tokenizer: Any, text: str) -> bool:
    """Say whether the tokens of a text are still there when a word follows it, whatever its first letter."""
    ids, *longer = (tokenizer.encode(text + letter, add_special_tokens=False) for letter in ("", *ascii_lowercase))
    return all(more[: len(ids)] == ids for more in longer)


def _explain_nothing(model: str, blank: bool) -> None:
    """Say why a model may answer nothing, or nothing but white space."""
    if heavy.runs.converted_only(model):
        train = f"illada pretrain --model.start {model} --data.train DATA --output RUN"
        _say(f"nothing was written: {model} was converted and not trained yet, it is no model before: {train}")
    elif blank:
        _say("only white space was written: the model may want other prompts, or more training")
    else:
        _say("nothing was written: the model ends at once; it may want other prompts, or more training")


def _say(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


def chat(
    model: ModelOptions,
    settings: GenerationSettings,
    system: str | None = None,
    tools: str | None = None,
    tool_choice: str | None = None,
) -> None:
    """Talk to a tuned model in the terminal and watch each answer form.

    Args:
        model: which model, and how to load it.
        settings: how to decode.
        system: system message.
        tools: JSON file with a list of functions that may be called, as OpenAI's APIs take it; what a call gives is
            asked for.
        tool_choice: auto, required, or the function that each answer to a message must call; auto by default.
    """
    settings = with_schema(settings)
    if tools is None and tool_choice is not None:
        raise IlladaError("tool_choice does nothing without tools: give a file of tools, or leave it out")
    functions = None if tools is None else _read_tools(Path(tools))
    network, tokenizer = heavy.weights.load_model(model.model, model.dtype, model.device, model.quantize)
    known = None if functions is None else heavy.tool_calls.Tools(functions, tokenizer)
    heavy.terminal.chat(network, tokenizer, settings, system, known, tool_choice or "auto")


def _read_tools(path: Path) -> list[Any]:
    """Return the list of tools in a file, or in the request that it holds."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IlladaError(f"{path} cannot be read: {first_line(error)}") from error
    tools = found.get("tools") if isinstance(found, dict) else found
    if not isinstance(tools, list):
        raise IlladaError(f"{path} holds no list of tools: give one as OpenAI's APIs take it")
    return tools
