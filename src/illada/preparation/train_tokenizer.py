"""Train a byte-level BPE tokenizer with this project's special tokens and chat template."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from illada.errors import IlladaError
from illada.folders import new_folder
from illada.preparation.options import PATTERNS
from illada.preparation.readers import Options, ReadStats, Unit, find_files, kind_of, read_unit
from illada.text.chat import CHAT_TEMPLATE

# bos, pad, eos and mask have the ids of the released tokenizer (spec §1); the names and the other ids are ours.
SPECIAL_TOKENS = ("<|bos|>", "<|pad|>", "<|eos|>", "<|user|>", "<|assistant|>", "<[MASK]>", "<|system|>", "<|end|>")

# Words as GPT-2 divides them, but every digit by itself, so that arithmetic sees digits.
_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: it encodes every text, and decoding gives the text back unchanged.

    Ids 0–7 are `SPECIAL_TOKENS`, the next 256 are the bytes, the rest are learned; little text gives fewer than
    `vocab_size` ids.

    Raises:
        IlladaError: when `vocab_size` leaves no room for the special tokens and bytes.
    """
    smallest = len(SPECIAL_TOKENS) + len(_BYTES)
    if vocab_size < smallest:
        raise IlladaError(f"vocab_size must be at least {smallest} ({len(_BYTES)} bytes and the special tokens)")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=_BYTES, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    bos, pad, eos, user, assistant, mask, system, end = SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        pad_token=pad,
        eos_token=eos,
        mask_token=mask,
        extra_special_tokens=[user, assistant, system, end],
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def train_tokenizer_from_files(
    sources: Sequence[str],
    vocab_size: int,
    output: str | os.PathLike[str],
    max_bytes: int = 1_000_000_000,
    text_field: str = "text",
    patterns: Sequence[str] = PATTERNS,
    exclude: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """Train a tokenizer on files and folders (as `prepare` reads them) and save it to the folder `output`.

    Of conversations it learns what is said in them. When the files hold more than `max_bytes`, it learns from the
    beginning of each file, in proportion to the file's size.

    Raises:
        IlladaError: when a source is missing or holds no text, or `output` is a folder with files in it.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise IlladaError(f"{output} exists already: choose another output or delete it")
    files = find_files(sources, patterns, exclude)
    share = max_bytes / max(1, sum(file.size for file in files))
    total = 0

    def texts() -> Iterator[str]:
        nonlocal total
        for file in files:
            left = max_bytes - total
            # A compressed file holds more text than its size says, so it has no limit of its own when all is wanted.
            if share < 1:
                left = min(left, max(1, int(file.size * share)))
            options = Options(kind_of(file.path, text_field) or "text", text_field)
            for piece in read_unit(Unit(file.path, 0, file.size), options, ReadStats()):
                data = piece.text.encode()[:left]
                text = data.decode(errors="ignore")
                left -= len(data)
                total += len(text.encode())
                yield text
                if left <= 0:
                    break

    tokenizer = train_tokenizer(texts(), vocab_size)
    if not total:
        raise IlladaError(f"no text in {', '.join(sources)}: there is nothing to train a tokenizer on")
    with new_folder(output, into_existing=True) as folder:
        tokenizer.save_pretrained(folder)
    return tokenizer
