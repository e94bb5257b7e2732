"""Run the arms of questions, one process a core, and keep one small file of numbers for each arm and seed.

    python studies/texts.py
    python studies/run.py studies/questions/split.yaml --cores 2

Every arm is what the product's own commands do: `illada pretrain` or `illada sft` into a run folder, then a measurement
(`measure.py`). Killed anywhere and started again, it goes on: a run continues from its checkpoint to the same bits, and
an arm whose file of numbers is there is done. To make again what is in the repository, give `--results` another folder.
`python studies/report.py` makes the tables and pictures.

A question (YAML) says, before it runs: `number`, `question`, `hypothesis`, `refuted_by`, `seeds`, `arms` (name: what
is its own), `pairs` of arms to compare, and for the page `show` (figures of the table) and `plot`; afterwards `finding`
and `answer` (one sentence). For all arms, and in an arm where it has its own:

    recipe: file below the repository; none: nothing is trained, and the model at `start` is measured
    command: pretrain (without it) or sft
    data: folder of `studies/data`: train.jsonl, held-out.jsonl and perhaps problems.jsonl
    documents: how many lines of train.jsonl; without it all
    tokenizer: [folder of `studies/data`, size of the vocabulary]
    start: arm (or QUESTION/ARM) whose model of the same seed is the beginning
    same: QUESTION/ARM that is this arm, and is run there
    seeds: an arm's own, where fewer than the question's are enough, such as a rate that is only tried
    measure: what to measure, see `measure.py`
    settings: the recipe's keys; in an arm they stand directly
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

STUDIES = Path(__file__).parent
ILLADA = [sys.executable, "-m", "illada"]
OWN = ("recipe", "command", "data", "documents", "tokenizer", "start", "same", "measure")


@dataclass(frozen=True)
class Places:
    """Where a study reads and writes."""

    work: Path
    """Prepared data and run folders."""
    results: Path
    """Files of numbers."""


@dataclass(frozen=True)
class Arm:
    """One training run of a question, or one measurement of a model: what is asked of it, and a seed."""

    question: str
    name: str
    seed: int
    asked: dict[str, Any]
    """What the question says for this arm: the keys of `OWN`, and settings."""
    places: Places

    @property
    def label(self) -> str:
        """Its name on the command line and in the log."""
        return f"{self.question}/{self.name}-{self.seed}"

    @property
    def result(self) -> Path:
        """Where its numbers are kept."""
        return self.places.results / self.question / f"{self.name}-{self.seed}.json"

    @property
    def run(self) -> Path:
        """Its run folder."""
        return self.places.work / self.question / f"{self.name}-{self.seed}"

    @cached_property
    def start(self) -> "Arm | None":
        """The arm whose model is the beginning."""
        return self._other(self.asked["start"]) if self.asked.get("start") else None

    @cached_property
    def judge(self) -> "Arm | None":
        """The arm whose model judges what this one writes."""
        writing = (self.asked["measure"] or {}).get("writing")
        return self._other(writing["judge"]) if writing else None

    @property
    def before(self) -> list["Arm"]:
        """The other arms whose models this one needs."""
        return [arm for arm in (self.start, self.judge) if arm is not None and arm.label != self.label]

    def _other(self, name: str) -> "Arm":
        question, _, arm = name.rpartition("/")
        found = arm_of(question or self.question, arm, self.seed, self.places)
        return found._other(found.asked["same"]) if found.asked.get("same") else found

    def model(self) -> Path:
        """Return the folder of its model, trained or begun with."""
        if self.asked["recipe"] is None:
            if self.start is None:
                raise SystemExit(f"{self.label} trains nothing and begins with nothing: give it a recipe or a start")
            return self.start.model()
        return self.run / "model"

    def is_done(self) -> bool:
        """Whether its numbers are there.

        Raises:
            SystemExit: when they are of something else than the question asks now.
        """
        if not self.result.is_file():
            return False
        if json.loads(self.result.read_text())["asked"] != json.loads(json.dumps(self.asked)):
            raise SystemExit(
                f"{self.result} is of other settings: take it away, and its run too, or restore the question"
            )
        return True

    def is_trained(self) -> bool:
        """Whether its model is there."""
        return (self.model() / "config.json").is_file()


@cache
def read_question(name: str) -> dict[str, Any]:
    """Return the content of a question's file.

    Raises:
        SystemExit: when there is none.
    """
    path = STUDIES / "questions" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise SystemExit(f"there is no question {name}: choose from {known}")
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def arm_of(question: str, name: str, seed: int, places: Places) -> Arm:
    """Return an arm of a question.

    Raises:
        SystemExit: when there is no such question or arm.
    """
    asked = read_question(question)
    if name not in asked["arms"]:
        raise SystemExit(f"{question} has no arm {name}: choose from {', '.join(asked['arms'])}")
    own = {key: value for key, value in (asked["arms"][name] or {}).items() if key != "seeds"}
    common = {key: asked.get(key) for key in OWN if key != "same"}
    settings = {**asked.get("settings", {}), **{key: value for key, value in own.items() if key not in OWN}}
    special = {key: value for key, value in own.items() if key in OWN}
    return Arm(question, name, seed, {**common, **special, "settings": settings}, places)


def arms_of(question: str, places: Places) -> Iterator[Arm]:
    """Yield the arms of a question, seed by seed, so that an interrupted study has whole pairs."""
    asked = read_question(question)
    for seed in asked["seeds"]:
        for name, own in asked["arms"].items():
            if seed not in (own or {}).get("seeds", asked["seeds"]):
                continue
            arm = arm_of(question, name, seed, places)
            yield arm._other(arm.asked["same"]) if arm.asked.get("same") else arm


def needed(questions: list[str], places: Places) -> list[Arm]:
    """Return the arms that have no numbers yet, each behind those whose models it needs, where these are gone."""
    found: dict[str, Arm] = {}

    def add(arm: Arm, above: tuple[str, ...] = ()) -> None:
        if arm.label in above:
            raise SystemExit(f"{arm.label} needs its own model: look at start and judge")
        for other in arm.before:
            other.is_done()  # refuses numbers of other settings, whose model would be another one
            if not other.is_trained():
                add(other, (*above, arm.label))
        found.setdefault(arm.label, arm)

    for question in questions:
        for arm in arms_of(question, places):
            if not arm.is_done():
                add(arm)
    return list(found.values())


def illada(*words: object, log: Path) -> None:
    """Run a command of illada; its output goes to the end of the log.

    Raises:
        SystemExit: when it fails.
    """
    with log.open("a") as file:
        done = subprocess.run([*ILLADA, *map(str, words)], stdout=file, stderr=file, check=False)
    if done.returncode:
        raise SystemExit(f"illada {words[0]} failed, see {log}")


def prepare(arm: Arm) -> None:
    """Make the tokenizer of an arm, if there is none, and its data, if there are none or their texts are newer."""
    if arm.asked["recipe"] is None:
        return
    tokenizer, folder = tokenizer_of(arm), prepared(arm)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    if not (tokenizer / "tokenizer.json").is_file():
        text, size = arm.asked["tokenizer"]
        illada("tokenizer", source(text, "train"), "--output", tokenizer, "--vocab_size", size, log=log)
    for part in ("train", "held-out"):
        file, index = source(arm.asked["data"], part), folder / part / "index.json"
        if index.is_file() and index.stat().st_mtime > file.stat().st_mtime:
            continue
        if part == "train" and arm.asked["documents"]:
            with file.open(encoding="utf-8") as lines:
                chosen = [line for line, _ in zip(lines, range(arm.asked["documents"]), strict=False)]
            file = folder / "train.jsonl"
            file.write_text("".join(chosen), encoding="utf-8")
        illada("prepare", file, "--tokenizer", tokenizer, "--output", folder / part, log=log)


def source(name: str, part: str) -> Path:
    """Return a file of `studies/data`.

    Raises:
        SystemExit: when it has not been made.
    """
    file = STUDIES / "data" / name / f"{part}.jsonl"
    if not file.is_file():
        raise SystemExit(f"{file} is not there: run python studies/texts.py and python studies/tasks.py first")
    return file


def tokenizer_of(arm: Arm) -> Path:
    """Return the folder of an arm's tokenizer."""
    text, size = arm.asked["tokenizer"]
    return arm.places.work / "data" / f"{text}-{size}" / "tokenizer"


def prepared(arm: Arm) -> Path:
    """Return the folder of an arm's prepared data."""
    documents = f"-{arm.asked['documents']}" if arm.asked["documents"] else ""
    return tokenizer_of(arm).parent / f"{arm.asked['data']}{documents}"


def run(arm: Arm) -> None:
    """Train an arm, measure it and write its numbers, as far as that has not been done."""
    if arm.asked["recipe"] is not None and not arm.is_trained():
        train(arm)
    if arm.is_done():
        return
    from measure import measure  # only here: the runner itself needs no torch

    problems = source(arm.asked["data"], "held-out").parent
    judge = None if arm.judge is None else arm.judge.model()
    asked = arm.asked["measure"] or {}
    figures, environment = measure(arm.model(), problems, prepared(arm) / "held-out", asked, judge)
    trained = curve(arm.run) if arm.asked["recipe"] is not None else {}
    figures |= trained.pop("figures", {})
    arm.result.parent.mkdir(parents=True, exist_ok=True)
    names = {"question": arm.question, "arm": arm.name, "seed": arm.seed, "asked": arm.asked}
    partial = arm.result.with_suffix(".part")
    partial.write_text(written({**names, "figures": figures, **trained, "environment": environment}) + "\n")
    partial.rename(arm.result)


def written(content: dict[str, Any]) -> str:
    """Return a result as JSON with one line for each of its parts, and numbers of seven digits."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.7g}")
        if isinstance(value, list):
            return [short(part) for part in value]
        return {key: short(part) for key, part in value.items()} if isinstance(value, dict) else value

    lines = [f" {json.dumps(key)}: {json.dumps(short(value), default=str)}" for key, value in content.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


def train(arm: Arm) -> None:
    """Run the arm's command into its run folder, or continue it there."""
    arm.run.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        **arm.asked["settings"],
        "data.train": prepared(arm) / "train",
        "data.validation": prepared(arm) / "held-out",
        "training.seed": arm.seed,
        "output": arm.run,
    }
    if arm.start is not None:
        settings["model.start"] = arm.start.model()
    words = [word for name, value in settings.items() for word in (f"--{name}", json_or_text(value))]
    illada(
        arm.asked["command"] or "pretrain",
        STUDIES.parent / arm.asked["recipe"],
        *words,
        log=arm.run.with_suffix(".log"),
    )


def json_or_text(value: Any) -> str:
    """Return a setting as the command line takes it."""
    return json.dumps(value) if isinstance(value, list | bool) else str(value)


def curve(folder: Path) -> dict[str, Any]:
    """Return what a run's log says: its validations as [tokens, bits per byte or loss], tokens, steps and the best."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    name = (
        "validation_bits_per_byte" if any("validation_bits_per_byte" in line for line in lines) else "validation_loss"
    )
    points = [[line["tokens"], line[name]] for line in lines if name in line]
    best = {"best": min(value for _, value in points), "last": points[-1][1]} if points else {}
    return {"steps": lines[-1]["step"], "tokens": lines[-1]["tokens"], "curve": points, "figures": best}


def work_through(arms: list[Arm], options: list[str], cores: int) -> bool:
    """Run arms, so many at once, each in a process with one thread at lowest priority, none before those that it needs.

    Returns whether none failed. When this process is stopped, so are those of the arms; their runs keep checkpoints.
    """
    waiting = [*arms]
    failed: list[str] = []
    running: dict[subprocess.Popen[bytes], Arm] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        while waiting or running:
            busy = {arm.label for arm in [*waiting, *running.values()]}
            ready = [arm for arm in waiting if not any(other.label in busy for other in arm.before)]
            for arm in ready[: cores - len(running)]:
                waiting.remove(arm)
                if any(other.label in failed for other in arm.before):
                    failed.append(arm.label)
                    continue
                words = ["nice", "-n", "19", sys.executable, __file__, *options, "--arm", arm.label]
                running[subprocess.Popen(words, env=environment, start_new_session=True)] = arm
                print(f"{arm.label} begins, {len(waiting)} wait", flush=True)
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                arm = running.pop(process)
                failed += [arm.label] if process.returncode else []
                print(f"{arm.label} {'FAILED' if process.returncode else 'is done'}", flush=True)
    finally:
        for process in running:  # the training below it gets the signal too, and writes a checkpoint
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    return not failed


def stand_back() -> None:
    """Lower this session's share of the processor too: where Linux groups by session, `nice` counts within one only."""
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text("19")


def main() -> None:
    """Read the command line and run questions, or one arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path, nargs="*", help="files in studies/questions")
    parser.add_argument("--cores", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="arms at a time")
    parser.add_argument("--work", type=Path, default=Path("runs/studies"), help="folder of prepared data and runs")
    parser.add_argument("--results", type=Path, default=STUDIES / "results", help="folder of the files of numbers")
    parser.add_argument("--arm", help="run only this one (QUESTION/NAME-SEED), in this process")
    options = parser.parse_args()
    places = Places(options.work, options.results)
    if options.arm is not None:
        stand_back()
        name, _, seed = options.arm.rpartition("-")
        question, _, name = name.partition("/")
        run(arm_of(question, name, int(seed), places))
        return
    if not options.questions:
        parser.error("name a file in studies/questions")
    if options.cores < 1:
        parser.error(f"--cores {options.cores}: one at least")
    # Like an interrupt from the keyboard, so that the arms are stopped as well.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arms = needed([path.stem for path in options.questions], places)
    if not arms:
        print(f"all numbers are in {options.results}; to make them again, give --results another folder")
    for arm in arms:
        prepare(arm)
    if not work_through(arms, ["--work", str(options.work), "--results", str(options.results)], options.cores):
        raise SystemExit("an arm failed: see the logs beside the runs")


if __name__ == "__main__":
    main()
