"""`illada tokenizer` and `illada prepare`."""

from illada.commands import heavy
from illada.commands.next import next_commands
from illada.preparation.options import PrepareSettings


def tokenizer(
    sources: list[str], output: str, vocab_size: int = 4096, max_bytes: int = 50_000_000, text_field: str = "text"
) -> None:
    """Train a byte-level BPE tokenizer on text files, jsonl, parquet or folders of them.

    Args:
        sources: text files, jsonl, parquet, or folders of them.
        output: folder to write the tokenizer to.
        vocab_size: number of tokens, special ones included.
        max_bytes: bytes of text to train on, from the first.
        text_field: the field that holds the text of a record; of conversations ({"messages": [...]} or {"prompt",
            "response"}) and preference pairs without it everything said in them counts.
    """
    trained = heavy.train_tokenizer.train_tokenizer_from_files(
        sources, vocab_size=vocab_size, output=output, max_bytes=max_bytes, text_field=text_field
    )
    print(f"tokenizer of {len(trained)} tokens written to {output}")
    next_commands(f"illada prepare {' '.join(sources)} --tokenizer {output} --output DATA")


def prepare(settings: PrepareSettings) -> None:
    """Turn files and folders into a prepared data set; the same call continues where an interrupted one stopped."""
    result = heavy.preparation.prepare(settings)
    if isinstance(result, str):
        print(f"Slurm job {result} completes {settings.output}; the same command continues what was interrupted")
        return
    odd = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in result.index["odd"].items() if count)
    pairs = result.kind == "preference"
    count = f"{result.documents // 2:,} preference pairs" if pairs else f"{result.documents:,} documents"
    print(
        f"{count}, {result.tokens:,} tokens, {result.bytes:,} bytes of text in {result.path}"
        + (f" ({odd})" if odd else "")
    )
    if pairs:
        next_commands(f"illada dpo dpo --model.start MODEL --data.train {settings.output} --output RUN")
    elif result.kind == "chat":
        next_commands(f"illada sft tiny-cpu-sft --model.start MODEL --data.train {settings.output} --output RUN")
    else:
        next_commands(f"illada pretrain tiny-cpu-pretrain --data.train {settings.output} --output RUN")
