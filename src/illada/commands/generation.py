"""`illada generate` and `illada chat`: text in, text out."""

import json as json_format

from illada.commands import heavy
from illada.errors import IlladaError
from illada.generation.settings import GenerationSettings, settings_for
from illada.text.prompts import encode_plain, encode_template, read_prompts, show_ids
from illada.weights.options import ModelOptions

SHOWN = ("ids", "finish_reason", "forwards", "positions", "log_probs")
"""What `--json` prints of a `Generation`, beside the prompt and the text."""


def generate(
    model: ModelOptions,
    settings: GenerationSettings,
    prompt: list[str] | None = None,
    file: str | None = None,
    chat: bool = False,
    slot_tokens: int | None = None,
    json: bool = False,
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
    """
    prompts = read_prompts(prompt, file)
    if chat and slot_tokens is not None:
        raise IlladaError("chat and slot_tokens exclude each other: slots are filled in plain text")
    network, tokenizer = heavy.weights.load_model(model.model, model.dtype, model.device, model.quantize)
    if slot_tokens is not None:
        templates = [encode_template(tokenizer, text, slot_tokens) for text in prompts]
        answers = heavy.generation.infill(network, templates, settings, tokenizer=tokenizer)
    else:
        if chat:
            ids = [heavy.chat.encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in prompts]
        else:
            ids = [encode_plain(tokenizer, text) for text in prompts]
        answers = heavy.generation.generate(network, ids, settings_for(network, settings), tokenizer=tokenizer)
    for text, answer in zip(prompts, answers, strict=True):
        if json:
            record = {"prompt": text, "text": show_ids(tokenizer, answer.ids)}
            record |= {name: getattr(answer, name) for name in SHOWN}
            print(json_format.dumps(record, ensure_ascii=False))
        else:
            if len(prompts) > 1:
                print(f"> {text}")
            print(show_ids(tokenizer, answer.ids))


def chat(model: ModelOptions, settings: GenerationSettings, system: str | None = None) -> None:
    """Talk to a tuned model in the terminal and watch each answer form.

    Args:
        model: which model, and how to load it.
        settings: how to decode.
        system: system message.
    """
    network, tokenizer = heavy.weights.load_model(model.model, model.dtype, model.device, model.quantize)
    heavy.terminal.chat(network, tokenizer, settings, system)
