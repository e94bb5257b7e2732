"""What `prepare` leaves out: low quality and duplicates, by datatrove's own blocks.

Importing this module needs `pip install 'illada[data]'`. The blocks ask for words and sentences; those of spaCy and
NLTK, datatrove's choice, need downloads, so plain rules stand in (`PlainWords`, ours).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from illada.errors import IlladaError, needs

with needs("data", "preparing data"):
    from datatrove.data import Document
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.dedup import exact_dedup, minhash
    from datatrove.pipeline.dedup.exact_dedup import (
        ExactDedupConfig,
        ExactDedupFilter,
        ExactDedupSignature,
        ExactFindDedups,
    )
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.word_tokenizers import WordTokenizer

# Their progress bars would lie over ours.
for _module in (exact_dedup, minhash):
    _module.tqdm = lambda items, **_: items

Dedup = Literal["none", "exact", "minhash"]

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
        """Return where the sentences begin and end, white space behind them included."""
        starts = [0, *(found.end() for found in _SENTENCE_END.finditer(text))]
        return list(zip(starts, [*starts[1:], len(text)], strict=True))


FILTERS: dict[str, Callable[[], PipelineStep]] = {
    "gopher": lambda: GopherQualityFilter(language=PlainWords()),
    "gopher-repetition": lambda: GopherRepetitionFilter(language=PlainWords()),
    "c4": lambda: C4QualityFilter(language=PlainWords()),
    "fineweb": lambda: FineWebQualityFilter(language=PlainWords()),
}
"""Each with the thresholds of its authors, made for English web pages."""

_NOT_OFFERED = {
    "language": "it needs a fastText model that would be downloaded",
    "url": "it needs the addresses of the documents and lists that would be downloaded",
    "badwords": "it needs word lists that would be downloaded",
    "unigram": "it needs word frequencies that would be downloaded",
}


def check(filters: Sequence[str], kind: str) -> None:
    """Check the names of filters.

    Raises:
        IlladaError: when there is no such filter, it cannot work here, or the documents are conversations.
    """
    for name in filters:
        if name in _NOT_OFFERED:
            raise IlladaError(f"no filter {name}: {_NOT_OFFERED[name]}; choose from {', '.join(FILTERS)}")
        if name not in FILTERS:
            raise IlladaError(f"no filter {name!r}: choose from {', '.join(FILTERS)}")
    if filters and kind == "chat":
        raise IlladaError("filters are for texts, not for conversations: leave them out with kind chat")


@dataclass(frozen=True)
class Stage:
    """Steps that run as so many tasks, when all tasks of the stage before have finished."""

    name: str
    tasks: int
    steps: list[Any]


def stages(
    read: Callable[[], PipelineStep],
    write: Callable[[], PipelineStep],
    tasks: int,
    filters: Sequence[str],
    dedup: Dedup,
    folder: Path,
) -> list[Stage]:
    """Return how to get from the step that reads documents to the one that writes them.

    Finding duplicates is a pass of its own, so the documents are read (and filtered) twice then. Of equal documents the
    first one in the order of the sources stays; of similar ones (MinHash) one of the group.

    Args:
        read: makes the first step.
        write: makes the last one.
        tasks: how many there are of each.
        filters: names out of `FILTERS`.
        dedup: which duplicates to leave out.
        folder: for what is found on the way.
    """
    found, duplicates = str(folder / "signatures"), str(folder / "duplicates")

    def clean() -> list[Any]:
        return [read(), *(FILTERS[name]() for name in filters)]

    if dedup == "none":
        return [Stage("write", tasks, [*clean(), write()])]
    if dedup == "exact":
        exact = ExactDedupConfig(_text, _earlier_first, HashConfig(hash_fc="sha1"))
        return [
            Stage("signatures", tasks, [*clean(), ExactDedupSignature(found, exact)]),
            Stage("duplicates", 1, [ExactFindDedups(found, duplicates, exact)]),
            Stage("write", tasks, [*clean(), ExactDedupFilter(duplicates, exact), write()]),
        ]
    near = MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))
    pairs = str(folder / "pairs")
    return [
        Stage("signatures", tasks, [*clean(), MinhashDedupSignature(found, near, language=PlainWords())]),
        Stage("pairs", near.num_buckets, [MinhashDedupBuckets(found, pairs, config=near)]),
        Stage("duplicates", 1, [MinhashDedupCluster(pairs, duplicates, near)]),
        Stage("write", tasks, [*clean(), MinhashDedupFilter(duplicates), write()]),
    ]


def _text(document: Document) -> str:
    return document.text


def _earlier_first(document: Document) -> int:
    """Return a priority, 1 to 65535, that falls with the number of the task (at the front of the document's id)."""
    return max(1, 65_535 - int(document.id.split("/", 1)[0]))
