"""datatrove's quality filters, by the names that `--filters` takes.

Importing this module needs `pip install 'illada[data]'`. The filters ask for words and sentences; datatrove finds them
with spaCy and NLTK, which need downloads, so plain rules stand in (`PlainWords`, ours).
"""

import re
from typing import Any

from illada.errors import needs

with needs("data", "preparing data"):
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.utils.word_tokenizers import WordTokenizer

_WORD = re.compile(r"\w+|[^\w\s]")
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+")


class PlainWords(WordTokenizer):
    """Words are runs of letters and digits, other signs stand alone; sentences end with . ! or ? before white space."""

    def __init__(self) -> None:
        super().__init__("any")

    def word_tokenize(self, text: str) -> list[str]:
        """Return the words and signs."""
        return _WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        """Return the sentences."""
        return [sentence for sentence in _SENTENCE_END.split(text) if sentence.strip()]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Return where the sentences begin and end, the white space after each included."""
        starts = [0, *(match.end() for match in _SENTENCE_END.finditer(text))]
        return list(zip(starts, [*starts[1:], len(text)], strict=True))


FILTER_STEPS: dict[str, Any] = {
    "gopher": GopherQualityFilter,
    "gopher-repetition": GopherRepetitionFilter,
    "c4": C4QualityFilter,
    "fineweb": FineWebQualityFilter,
}
"""The filter of each name, with the thresholds of its authors, made for English web pages."""
