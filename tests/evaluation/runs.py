"""Evaluations of one model in processes of their own: undisturbed, killed again and again, and shared by two.

    python runs.py MODEL TASKS OUTPUT

Everything is imported once; every run is a fork, which has done nothing with torch before.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path

import datasets

from illada.evaluation.journal import Journal
from illada.evaluation.options import EvalOptions
from illada.evaluation.run import evaluate


def killed_at_its_second_write(journal, entries, add=Journal.add, written=[]):  # noqa: B006
    """The first results are kept; in the middle of writing the next ones, the process dies."""
    if written:
        line = json.dumps([{"key": entry.key, "value": entry.value} for entry in entries])
        with journal.path.open("a") as file:
            file.write(line[: len(line) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(add(journal, entries))


def forked(output, **environment):
    """Start an evaluation in a process of its own."""
    child = os.fork()
    if child:
        return child
    os.environ |= environment
    code = 1
    try:
        options = {"scoring": "confidence", "samples": 4, "max_batch_tokens": 8, "dtype": "fp32", "device": "cpu"}
        evaluate(EvalOptions(str(output), sys.argv[1], task_files=sys.argv[2], **options))
        code = 0
    finally:
        os._exit(code)


def status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


output = Path(sys.argv[3])
datasets.config.HF_DATASETS_CACHE = str(output / "cache")
assert status(forked(output / "whole")) == 0

add = Journal.add
Journal.add = killed_at_its_second_write
kills = 0
while (code := status(forked(output / "killed"))) == -signal.SIGKILL:
    kills += 1
assert code == 0, code
Journal.add = add
(output / "kills").write_text(str(kills))

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
both = [forked(output / "shared", **address, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in (0, 1)]
assert [status(child) for child in both] == [0, 0]
