"""Run the arms of a question, one process a core, and keep one small file of numbers for each arm and seed.

    python studies/texts.py
    python studies/run.py studies/questions/split.yaml --cores 2

Every arm is what the product's own commands do: `illada pretrain` into a run folder, then a measurement of held-out
text. Killed anywhere and started again, it goes on: a run continues from its checkpoint to the same bits, and an arm
whose file of numbers is there is done. `python studies/report.py` makes the tables and pictures.

A question (YAML) says, before it runs: `question`, `hypothesis`, `refuted_by`, `text`, `vocab_size`, `recipe`, the
`settings` of all arms, `arms` (name: settings), `seeds`, `pairs` of arms to compare, and `windows` (tokens: how many)
to measure on.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

STUDIES = Path(__file__).parent
ILLADA = [sys.executable, "-m", "illada"]


@dataclass(frozen=True)
class Arm:
    """One training run of a question: settings and a seed."""

    question: str
    name: str
    seed: int
    settings: dict[str, Any]

    @property
    def label(self) -> str:
        """The name of its run folder and of its file of numbers."""
        return f"{self.name}-{self.seed}"

    @property
    def result(self) -> Path:
        """Where its numbers are kept."""
        return STUDIES / "results" / self.question / f"{self.label}.json"

    def is_done(self) -> bool:
        """Whether its numbers are there.

        Raises:
            SystemExit: when they are of other settings than the question has now.
        """
        if not self.result.is_file():
            return False
        if json.loads(self.result.read_text())["settings"] != self.settings:
            raise SystemExit(
                f"{self.result} is of other settings: take it away, and its run too, or restore the question"
            )
        return True


def arms_of(path: Path, question: dict[str, Any]) -> list[Arm]:
    """Return all arms, seed by seed, so that an interrupted study has whole pairs."""
    return [
        Arm(path.stem, name, seed, {**question["settings"], **(settings or {})})
        for seed in question["seeds"]
        for name, settings in question["arms"].items()
    ]


def illada(*words: object, log: Path) -> None:
    """Run a command of illada; its output goes to the end of the log.

    Raises:
        SystemExit: when it fails.
    """
    with log.open("a") as file:
        done = subprocess.run([*ILLADA, *map(str, words)], stdout=file, stderr=file, check=False)
    if done.returncode:
        raise SystemExit(f"illada {words[0]} failed, see {log}")


def prepare(question: dict[str, Any], work: Path) -> Path:
    """Make tokenizer and prepared data of a question's text, if they are not there; return their folder."""
    text, size = STUDIES / "data" / question["text"], question["vocab_size"]
    if not (text / "train.jsonl").is_file():
        raise SystemExit(f"{text}/train.jsonl is not there: run python studies/texts.py first")
    folder = work / "data" / f"{question['text']}-{size}"
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    if not (folder / "tokenizer" / "tokenizer.json").is_file():
        illada("tokenizer", text / "train.jsonl", "--output", folder / "tokenizer", "--vocab_size", size, log=log)
    for part in ("train", "held-out"):
        words = [text / f"{part}.jsonl", "--tokenizer", folder / "tokenizer", "--output", folder / part]
        illada("prepare", *words, log=log)
    return folder


def run(arm: Arm, question: dict[str, Any], work: Path) -> None:
    """Train an arm, measure it and write its numbers."""
    data = work / "data" / f"{question['text']}-{question['vocab_size']}"
    folder = work / arm.question / arm.label
    folder.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        **arm.settings,
        "data.train": data / "train",
        "data.validation": data / "held-out",
        "training.seed": arm.seed,
        "output": folder,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    log = folder.with_suffix(".log")
    illada("pretrain", STUDIES.parent / question["recipe"], *words, log=log)
    numbers = measure(folder, question["windows"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers |= {"steps": lines[-1]["step"], "tokens": lines[-1]["tokens"]}
    arm.result.parent.mkdir(parents=True, exist_ok=True)
    content = {"question": arm.question, "arm": arm.name, "seed": arm.seed, "settings": arm.settings, **numbers}
    partial = arm.result.with_suffix(".part")
    partial.write_text(json.dumps(content, indent=1, default=str) + "\n")
    partial.rename(arm.result)


def measure(folder: Path, windows: dict[int, int]) -> dict[str, Any]:
    """Return bits per byte of held-out text in windows of each length, by bound and path or exactly, and versions."""
    from illada.data.shards import Shards
    from illada.reporting import environment_of
    from illada.training.optional.likelihood import text_likelihood
    from illada.weights.load import load_model

    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    model, _ = load_model(str(folder), device="cpu")
    shards = Shards.open(recipe["data"]["validation"])
    found = {length: text_likelihood(model, shards, length, count) for length, count in windows.items()}
    return {
        "bits_per_byte": {
            str(length): {"windows": text.windows, "tokens": text.tokens, **text.figures}
            for length, text in found.items()
        },
        "environment": environment_of(model),
    }


def work_through(path: Path, arms: list[Arm], work: Path, cores: int) -> bool:
    """Run the arms that have no numbers yet, so many at once, each in a process with one thread at lowest priority.

    Returns whether none failed. When this process is stopped, so are those of the arms; their runs keep checkpoints.
    """
    waiting = deque(arm for arm in arms if not arm.is_done())
    failed = 0
    running: dict[subprocess.Popen[bytes], Arm] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        while waiting or running:
            while waiting and len(running) < cores:
                arm = waiting.popleft()
                words = [
                    "nice",
                    "-n",
                    "19",
                    sys.executable,
                    __file__,
                    str(path),
                    "--work",
                    str(work),
                    "--arm",
                    arm.label,
                ]
                running[subprocess.Popen(words, env=environment, start_new_session=True)] = arm
                print(f"{arm.label} begins, {len(waiting)} wait", flush=True)
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                arm = running.pop(process)
                failed += process.returncode != 0
                print(f"{arm.label} {'is done' if process.returncode == 0 else 'FAILED'}", flush=True)
    finally:
        for process in running:  # the training below it gets the signal too, and writes a checkpoint
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    return not failed


def main() -> None:
    """Read the command line and run a question, or one arm of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", type=Path, help="file in studies/questions")
    parser.add_argument("--cores", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="arms at a time")
    parser.add_argument("--work", type=Path, default=Path("runs/studies"), help="folder of prepared data and runs")
    parser.add_argument("--arm", help="run only this one (NAME-SEED), in this process")
    options = parser.parse_args()
    question = yaml.safe_load(options.question.read_text())
    arms = arms_of(options.question, question)
    if options.arm is None:
        # Like an interrupt from the keyboard, so that the arms are stopped as well.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        prepare(question, options.work)
        if not work_through(options.question, arms, options.work, options.cores):
            raise SystemExit("an arm failed: see its log")
        return
    chosen = [arm for arm in arms if arm.label == options.arm]
    if not chosen:
        raise SystemExit(f"no arm {options.arm}: choose from {', '.join(arm.label for arm in arms)}")
    run(chosen[0], question, options.work)


if __name__ == "__main__":
    main()
