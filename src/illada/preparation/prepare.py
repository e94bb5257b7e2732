"""Raw text to token shards: restartable, and the same bytes whatever the number of workers.

There are three phases: `plan` divides the sources into tasks, an executor runs the stages of `pipeline`, and `finish`
puts the shards together.
"""

import os
import sys
from pathlib import Path

from illada.data.shards import Shards
from illada.errors import IlladaError
from illada.folders import is_full
from illada.preparation.executors import progress, quiet, run_locally, run_on_ray, submit_to_slurm
from illada.preparation.finish import finish
from illada.preparation.options import PrepareSettings
from illada.preparation.pipeline import pipeline
from illada.preparation.plan import LOG, SLURM_LOG, WORK, discard, plan, read_plan
from illada.preparation.readers import recognise
from illada.preparation.records import CONTENTS


def prepare(settings: PrepareSettings) -> Shards | str:
    """Turn files and folders into a prepared data set; the same call continues where an interrupted one stopped.

    Returns the data set, or the number of the last job where Slurm works on it. After an error before any task was
    finished, or when nothing was worth keeping, the output folder is as it was.

    Raises:
        IlladaError: when a source is missing or unusable, the output folder holds something else, or the disk is full.
    """
    try:
        return _prepare(settings)
    except Exception as error:
        if not is_full(error):
            raise
        raise IlladaError(
            f"no room for {settings.output}: the disk is full: free some and run the same command again, which "
            "keeps what is finished"
        ) from error


def _prepare(settings: PrepareSettings) -> Shards | str:
    given, settings = settings.kind, recognise(settings)
    if given == "auto" and settings.kind in ("chat", "preference"):
        held = CONTENTS[settings.kind]
        print(f"{settings.sources[0]} holds {held}: prepared with --kind {settings.kind}", file=sys.stderr)
    tasks = plan(settings)
    if not tasks:
        return finish(settings.output)
    output, stages = Path(os.path.abspath(settings.output)), pipeline(settings, tasks)
    if settings.executor == "slurm":
        with quiet():
            return submit_to_slurm(stages, output / SLURM_LOG, settings)
    run = run_on_ray if settings.executor == "ray" else run_locally
    try:
        with quiet(), progress(output / WORK, read_plan(output)["source_bytes"]):
            run(stages, output / LOG, settings)
        return finish(settings.output)
    except (IlladaError, OSError):
        discard(output)
        raise
