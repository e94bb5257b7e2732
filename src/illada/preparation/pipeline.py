"""The second phase of a preparation: which datatrove steps run, in how many tasks, in which order.

Importing this module needs `pip install 'illada[data]'`.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from illada.errors import needs
from illada.preparation.filters import FILTER_STEPS, PlainWords
from illada.preparation.plan import WORK
from illada.preparation.settings import PrepareSettings
from illada.preparation.steps import ReadDocuments, WriteShards

with needs("data", "preparing data"):
    from datatrove.data import Document
    from datatrove.pipeline.dedup import exact_dedup, minhash
    from datatrove.utils.hashing import HashConfig

# datatrove's progress bars would lie over ours.
for _module in (exact_dedup, minhash):
    _module.tqdm = lambda items, **_: items


@dataclass(frozen=True)
class Stage:
    """Steps that run as a number of tasks, once all tasks of the previous stage have finished."""

    name: str
    tasks: int
    steps: list[Any]


def pipeline(settings: PrepareSettings, tasks: int) -> list[Stage]:
    """Return the stages that carry out a plan of so many tasks.

    Finding duplicates is a pass of its own, so the documents are read (and filtered) twice then. Of equal documents the
    first one in the order of the sources stays; of similar ones (MinHash) one of the group.
    """
    # Other machines may have another working directory.
    settings = replace(settings, output=os.path.abspath(settings.output))
    folder = Path(settings.output, WORK, "dedup")
    signatures, pairs, duplicates = (str(folder / name) for name in ("signatures", "pairs", "duplicates"))

    def read() -> list[Any]:
        # New steps for each stage, as a step counts what it does.
        return [ReadDocuments(settings), *(FILTER_STEPS[name](language=PlainWords()) for name in settings.filters)]

    write = WriteShards(settings, threads=settings.executor == "local" and min(settings.workers, tasks) == 1)
    if settings.dedup == "none":
        return [Stage("write", tasks, [*read(), write])]
    sha1 = HashConfig(hash_fc="sha1")
    if settings.dedup == "exact":
        exact = exact_dedup.ExactDedupConfig(_text, _earlier_first, sha1)
        return [
            Stage("signatures", tasks, [*read(), exact_dedup.ExactDedupSignature(signatures, exact)]),
            Stage("duplicates", 1, [exact_dedup.ExactFindDedups(signatures, duplicates, exact)]),
            Stage("write", tasks, [*read(), exact_dedup.ExactDedupFilter(duplicates, exact), write]),
        ]
    near = minhash.MinhashConfig(hash_config=sha1)
    return [
        Stage("signatures", tasks, [*read(), minhash.MinhashDedupSignature(signatures, near, language=PlainWords())]),
        Stage("pairs", near.num_buckets, [minhash.MinhashDedupBuckets(signatures, pairs, config=near)]),
        Stage("duplicates", 1, [minhash.MinhashDedupCluster(pairs, duplicates, near)]),
        Stage("write", tasks, [*read(), minhash.MinhashDedupFilter(duplicates), write]),
    ]


def _text(document: Document) -> str:
    return document.text


def _earlier_first(document: Document) -> int:
    """Return a priority, 1 to 65535, that falls with the number of the task (at the front of the document's id)."""
    return max(1, 65_535 - int(document.id.split("/", 1)[0]))
