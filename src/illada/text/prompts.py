"""Prompts as token ids, plain or with slots to fill in, and ids as text again."""

from collections.abc import Sequence
from typing import Any

from illada.errors import IlladaError
from illada.files import parse_json, read_lines

SLOT_SIGN = "___"


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Return BOS (where the tokenizer has one) and the ids of the text, as a pre-training document begins."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + list(tokenizer.encode(text, add_special_tokens=False))


def encode_template(tokenizer: Any, text: str, slot_tokens: int) -> list[int | None]:
    """Return the ids of a document, from BOS to EOS where the tokenizer has them, with `slot_tokens` None per `___`.

    Raises:
        IlladaError: when the text has no `___`, or `slot_tokens` is out of range.
    """
    pieces = text.split(SLOT_SIGN)
    if len(pieces) == 1:
        raise IlladaError(f"there is no {SLOT_SIGN} to fill in {text[:40]!r}: write one, or leave out slot_tokens")
    if not 1 <= slot_tokens <= 2**20:
        raise IlladaError(f"slot_tokens is {slot_tokens}: it must be between 1 and {2**20:,}")
    ids: list[int | None] = [*encode_plain(tokenizer, pieces[0])]
    for piece in pieces[1:]:
        ids += [None] * slot_tokens
        ids += tokenizer.encode(piece, add_special_tokens=False)
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def show_ids(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of generated ids, special tokens left out."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def read_prompts(prompts: Sequence[str] | None, file: str | None) -> list[str]:
    """Return the prompts of a command, or those in its file: one a line, or the "prompt" of each .jsonl record.

    Raises:
        IlladaError: when the command has neither or both, or the file cannot be used.
    """
    if (prompts is None) == (file is None):
        raise IlladaError("give --prompt TEXT (once or more) or --file FILE")
    if prompts is not None:
        return list(prompts)
    assert file is not None
    if not file.endswith(".jsonl"):
        return [line for _, line in read_lines(file)]
    read = []
    for number, line in read_lines(file):
        try:
            read.append(str(parse_json(line)["prompt"]))
        except (ValueError, KeyError, TypeError) as error:
            raise IlladaError(f'{file} line {number} is not {{"prompt": ...}}') from error
    return read
