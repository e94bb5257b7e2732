"""The second phase of a preparation: which datatrove steps run, in how many tasks, in which order.

Importing this module needs `pip install 'illada[data]'`.
"""

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from illada.errors import needs
from illada.preparation.filters import FILTER_STEPS, PlainWords
from illada.preparation.options import PrepareSettings
from illada.preparation.plan import WORK
from illada.preparation.steps import finish_data, read_documents, write_shards

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
    first one in the order of the sources stays; of similar ones (MinHash) one of the group. On Slurm, where no process
    waits for the tasks, the last stage completes the data set.
    """
    # Other machines may have another working directory.
    settings = replace(settings, output=os.path.abspath(settings.output))
    folder = Path(settings.output, WORK, "dedup")
    signatures, pairs, duplicates = (str(folder / name) for name in ("signatures", "pairs", "duplicates"))
    sha1 = HashConfig(hash_fc="sha1")
    exact = exact_dedup.ExactDedupConfig(_text, _earlier_first, sha1)
    near = minhash.MinhashConfig(hash_config=sha1)

    def stage(name: str, *steps: Any) -> Stage:
        """Return a stage whose tasks read and filter documents; the filters are new ones, as each counts its work."""
        filters = (FILTER_STEPS[filter_](language=PlainWords()) for filter_ in settings.filters)
        return Stage(name, tasks, [partial(read_documents, settings), *filters, *steps])

    write = partial(write_shards, settings)
    if settings.dedup == "exact":
        stages = [
            stage("signatures", exact_dedup.ExactDedupSignature(signatures, exact)),
            Stage("duplicates", 1, [exact_dedup.ExactFindDedups(signatures, duplicates, exact)]),
            stage("write", exact_dedup.ExactDedupFilter(duplicates, exact), write),
        ]
    elif settings.dedup == "minhash":
        stages = [
            stage("signatures", minhash.MinhashDedupSignature(signatures, near, language=PlainWords())),
            Stage("pairs", near.num_buckets, [minhash.MinhashDedupBuckets(signatures, pairs, config=near)]),
            Stage("duplicates", 1, [minhash.MinhashDedupCluster(pairs, duplicates, near)]),
            stage("write", minhash.MinhashDedupFilter(duplicates), write),
        ]
    else:
        stages = [stage("write", write)]
    if settings.executor == "slurm":
        stages.append(Stage("finish", 1, [partial(finish_data, settings)]))
    return stages


def _text(document: Document) -> str:
    return document.text


def _earlier_first(document: Document) -> int:
    """Return a priority, 1 to 65535, that falls with the number of the task (at the front of the document's id)."""
    return max(1, 65_535 - int(document.id.split("/", 1)[0]))
