"""Run `illada pretrain` several times in children of this process and kill some of them; used by test_killed.py.

Arguments: a recipe file and a folder for runs. Prints one JSON object: how every child ended and what it said. Each
child is forked before any computation, so torch is imported once and every kill is a real one.
"""

import json
import os
import signal
import sys
from pathlib import Path

from illada import cli
from illada.training import checkpoint, trainer
from illada.training.report import Report


def at_step(step, number):
    """Send a signal to ourselves when the metrics of `step` are written."""
    log = Report.log

    def log_and_signal(self, done, **values):
        log(self, done, **values)
        if done == step:
            os.kill(os.getpid(), number)

    Report.log = log_and_signal


def in_the_checkpoint(step):
    """Die in the middle of writing the checkpoint of `step`: weights are there, the optimiser is half there."""
    save_file = checkpoint.save_file

    def die(tensors, path):
        if f"{step:08d}" in str(path):
            Path(path).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        save_file(tensors, path)

    checkpoint.save_file = die


def while_finishing():
    """Die when the finished model is written and before it gets its name."""
    finish = trainer._finish

    def die(run, model, tokenizer):
        tokenizer.save_pretrained = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        finish(run, model, tokenizer)

    trainer._finish = die


def child(words, patch):
    said = Path(sys.argv[2]) / "said.txt"
    pid = os.fork()
    if pid == 0:
        with said.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        patch()
        try:
            cli.main(words)
        except SystemExit as end:
            os._exit(end.code or 0)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return {"code": os.waitstatus_to_exitcode(status), "said": said.read_text()}


def main():
    recipe, folder = sys.argv[1], sys.argv[2]
    whole = ["pretrain", recipe, "--output", f"{folder}/whole"]
    killed = ["pretrain", recipe, "--output", f"{folder}/killed"]
    ends = {
        "whole": child(whole, lambda: None),
        "killed at 4": child(killed, lambda: at_step(4, signal.SIGKILL)),
        "killed in checkpoint 14": child(killed, lambda: in_the_checkpoint(14)),
        "terminated at 17": child(killed, lambda: at_step(17, signal.SIGTERM)),
        "interrupted at 23": child(killed, lambda: at_step(23, signal.SIGINT)),
        "killed while finishing": child(killed, while_finishing),
        "last": child(killed, lambda: None),
        "again": child(killed, lambda: None),
        "other recipe": child([*killed, "--training.learning_rate", "1"], lambda: None),
    }
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
