"""`illada demo`."""

from pathlib import Path

from illada.commands import heavy


def demo(output: str = "runs/demo", quick: bool = False, seed: int = 0, align: bool = False) -> None:
    """Walk the whole road on this machine: tokenizer, pre-training, SFT, generation, scoring, report.

    The text is the standard library of this Python; nothing is downloaded. Interrupted, the same command continues.

    Args:
        output: run folder.
        quick: 3 to 4 minutes instead of 10 to 15, with a model that has learned less.
        seed: seed of everything random.
        align: go on with rewards of its own answers (`illada rl`) and to the same answers in fewer passes (`illada
            distill`), and show both in the report: some minutes more. A demo that is finished goes on from there.
    """
    heavy.demo.run_demo(Path(output), quick, seed, align)
