"""Tokenizers: load anybody's, tell two apart, and encode plain text."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from illada.errors import IlladaError, first_line
from illada.hub import TOKENIZER_FILES, hub_folder, is_hub_name


def load_tokenizer(path: str | os.PathLike[str], allow_hub: bool = False) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a folder that holds `tokenizer.json`, or, if `allow_hub`, by its name on the hub.

    No code that comes with a tokenizer is ever run.

    Raises:
        IlladaError: when there is none, or it is damaged.
    """
    name = os.fspath(path)
    if not Path(name).is_dir():
        if not (allow_hub and is_hub_name(name)):
            raise IlladaError(f"no tokenizer folder at {name}: make one with `illada tokenizer`")
        path = hub_folder(name, TOKENIZER_FILES)
    if not (Path(path) / "tokenizer.json").is_file():
        raise IlladaError(
            f"{name} holds no tokenizer.json: give the folder of a tokenizer (`illada tokenizer` makes one), or fetch "
            "the model's tokenizer files into it"
        )
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
        tokenizer.decode(tokenizer.encode("a b\n1"), skip_special_tokens=True)  # some fail only when used
        return tokenizer
    except BaseException as error:  # for a damaged file the libraries below raise bare Exception, or Rust panics
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise IlladaError(f"cannot load the tokenizer {name}: {first_line(error)}") from None


def tokenizer_sha256(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a hash of what turns text into ids: equal for a tokenizer and its saved copy, before and after use."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # The last call that padded or truncated leaves its settings behind.
    state["padding"] = state["truncation"] = None
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Encode texts as plain text: nothing is added, and what looks like a special token stays text."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = tokenizer.split_special_tokens
