"""`illada eval`: rows of a table, each a task of the harness with its settings, for one model or several variants."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import datasets
import yaml
from huggingface_hub import constants
from lm_eval import evaluate
from lm_eval.tasks import TaskManager

from illada.errors import IlladaError, first_line
from illada.evaluation.harness import IlladaLM
from illada.evaluation.results import Result, Row
from illada.evaluation.tables import draw, markdown
from illada.files import write_json
from illada.generation.settings import refuse_masks
from illada.reporting import environment_of

HERE = Path(__file__).parent
FAST = {"threshold": 0.95, "cache": "adaptive"}
"""Decoding of `--decode fast`: not the paper's."""
Ablation = Literal["scoring", "block_length", "steps", "threshold"]
ABLATIONS: dict[str, list[Any]] = {
    "scoring": ["confidence", "likelihood"],
    "block_length": [8, 16, 32, 64],
    "steps": [32, 16, 8, 4],
    "threshold": ["none", 0.95, 0.9, 0.8],
}


@dataclass(frozen=True)
class Variant:
    """A column of an ablation: a label, and what it changes."""

    label: str = ""
    generation: dict[str, Any] = field(default_factory=dict)
    scoring: Literal["confidence", "likelihood"] | None = None
    kinds: frozenset[str] = frozenset()
    """Output types of the tasks it concerns; empty for all."""


def paper_rows(table: str, decode: str, lengths: str) -> list[Row]:
    """Return the rows of the paper's table "base" or "instruct" (spec §7).

    Args:
        table: which.
        decode: "exact" for the paper's, "fast" for `FAST`.
        lengths: answer lengths of MMLU and MMLU-Redux in the table of the instruct model, "3-4" or "4-3": the paper and
            the authors' script disagree which has which.
    """
    content = yaml.safe_load((HERE / "paper.yaml").read_text(encoding="utf-8"))[table]
    rows = [Row(name, **{**values, "metrics": tuple(values["metrics"])}) for name, values in content.items()]
    if table == "instruct":
        of = dict(zip(("MMLU", "MMLU-Redux"), map(int, lengths.split("-")), strict=True))
        rows = [
            replace(row, generation={"max_gen_toks": of[row.name], "block_length": of[row.name]})
            if row.name in of
            else row
            for row in rows
        ]
    if decode == "fast":
        rows = [replace(row, generation={**row.generation, **FAST}) if row.generation else row for row in rows]
    return rows


def chosen(rows: Sequence[Row], names: Sequence[str] | None) -> list[Row]:
    """Return the rows called by name, or by the name of their task.

    Raises:
        IlladaError: when there is no such row.
    """
    if names is None:
        return list(rows)
    known = {name.casefold(): row for row in rows for name in (row.task, row.name)}
    for name in names:
        if name.casefold() not in known:
            raise IlladaError(f"no task {name} here: choose from {', '.join(row.name for row in rows)}")
    return list({known[name.casefold()].name: known[name.casefold()] for name in names}.values())


def task_manager(folder: str | None) -> TaskManager:
    """Return the tasks in a folder alone, or all of the harness's and ours.

    Raises:
        IlladaError: when the folder has none.
    """
    if folder is None:
        return TaskManager(include_path=str(HERE / "tasks"))
    if not any(Path(folder).rglob("*.yaml")):
        raise IlladaError(f"no task files in {folder}: it must hold the harness's *.yaml")
    # In full, as data sets are read from inside the folder.
    return TaskManager(include_path=str(Path(folder).resolve()), include_defaults=False)


def ablation(what: str, values: Sequence[Any] | None) -> list[Variant]:
    """Return the variants of an ablation: Table 4 (scoring), block length, steps per block, or threshold.

    Raises:
        IlladaError: when a value is not of its kind.
    """
    found = []
    for value in values or ABLATIONS[what]:
        if what == "scoring":
            if value not in ("confidence", "likelihood"):
                raise IlladaError(f"values of scoring are confidence and likelihood, got {value}")
            found.append(Variant(value, scoring=value, kinds=frozenset(("multiple_choice", "loglikelihood"))))
            continue
        if value == "none":
            number: float | None = None
        else:
            try:
                number = float(value) if what == "threshold" else int(value)
            except ValueError:
                raise IlladaError(f"values of {what} are numbers, got {value}") from None
        name = {"steps": "steps_per_block"}.get(what, what)
        # A rule of how many tokens to commit excludes the others.
        others = {} if what == "block_length" else {"threshold": None, "steps_per_block": None, "entropy_bound": None}
        found.append(Variant(f"{what} {value}", {**others, name: number}, kinds=frozenset(("generate_until",))))
    return found


class Evaluation:
    """Rows evaluated one after the other into a folder: a journal, samples, results.json, table.md.

    Args:
        manager: where tasks come from.
        output: folder.
        limit: most documents of a task.
        seed: of the choice of shots.
        allow_code: whether generated programs may be run.
        folder: of local task files; paths in them are relative to it.
        download: whether data sets may be fetched.
    """

    def __init__(
        self,
        manager: TaskManager,
        output: Path,
        limit: int | None = None,
        seed: int = 0,
        allow_code: bool = False,
        folder: str | None = None,
        download: bool = False,
    ):
        self.manager, self.output, self.limit, self.seed = manager, output, limit, seed
        self.allow_code, self.folder, self.download = allow_code, folder, download
        self.results: list[Result] = []

    def add(self, lm: IlladaLM, row: Row, variant: Variant) -> Result | None:
        """Evaluate a row and write its samples; None when the variant does not concern it."""
        result = Result(row.name, row.task, variant.label, paper=row.paper)
        try:
            with self._sources():
                loaded = self.manager.load([row.task])
        except (ConnectionError, FileNotFoundError) as error:
            result.status, result.reason = "dataset not reachable", first_line(error)
        except ModuleNotFoundError as error:
            # The harness's tasks name their own extras; its message says more than the import system's.
            result.status, result.reason = "library missing", first_line(error)
        except Exception as error:
            raise IlladaError(f"task {row.task} cannot be loaded: {first_line(error)}") from error
        if result.status == "ok":
            kinds = {task.OUTPUT_TYPE for task in loaded["tasks"].values()}
            if variant.kinds and not kinds & variant.kinds:
                return None
            if not self.allow_code and any(getattr(task, "UNSAFE_CODE", False) for task in loaded["tasks"].values()):
                result.status, result.reason = "not run", "it runs generated programs: allow that with --allow_code"
        if result.status == "ok":
            self._evaluate(lm, row, variant, loaded, result)
        self.results.append(result)
        return result

    @contextlib.contextmanager
    def _sources(self) -> Iterator[None]:
        """Read data sets from beside the task files; use the network only if asked to."""
        saved = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
        offline = not self.download or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = offline
        try:
            with contextlib.chdir(self.folder or "."):
                yield
        finally:
            datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = saved

    def _evaluate(self, lm: IlladaLM, row: Row, variant: Variant, loaded: dict[str, Any], result: Result) -> None:
        if lm.causal:
            refuse_masks(variant.generation)
        generation = {**row.generation, **variant.generation}
        for task in loaded["tasks"].values():
            if row.shots is not None or task.config.num_fewshot is None:
                task.set_config("num_fewshot", row.shots or 0)
            # Where shots come from the test documents (MMLU-Redux), the harness leaves out the question itself only if
            # the task says where they come from.
            shots, own = task.fewshot_cfg, (task.has_training_docs(), task.has_validation_docs())
            if shots.split is None and shots.samples is None and not any(own):
                shots.split = task.config.test_split
            if task.OUTPUT_TYPE == "generate_until":
                task.set_config("generation_kwargs", generation, update=True)
            task.set_fewshot_seed(self.seed)
        saved = lm.scoring, lm.samples
        # The paper's rows say how to score a diffusion model.
        lm.scoring = variant.scoring or (None if lm.causal else row.scoring) or lm.scoring
        lm.samples = row.samples or lm.samples
        try:
            found = evaluate(
                lm,
                loaded,
                limit=self.limit,
                bootstrap_iters=1000,
                apply_chat_template=row.chat,
                fewshot_as_multiturn=row.chat,
                confirm_run_unsafe_code=self.allow_code,
            )
            result.settings = {
                "shots": {name: task.config.num_fewshot for name, task in loaded["tasks"].items()},
                "chat": row.chat,
                "limit": self.limit,
                "seed": self.seed,
            }
            kinds = {task.OUTPUT_TYPE for task in loaded["tasks"].values()}
            if "generate_until" in kinds:
                task = next(t for t in loaded["tasks"].values() if t.OUTPUT_TYPE == "generate_until")
                result.settings["generation"] = asdict(lm.settings_of(task.config.generation_kwargs))
            if kinds != {"generate_until"}:
                result.settings |= {"scoring": lm.scoring}
                result.settings |= {"samples": lm.samples} if lm.scoring == "likelihood" else {}
        finally:
            lm.scoring, lm.samples = saved
        work = [lm.gather_object((lm.forwards.pop(name, 0), lm.seconds.pop(name, 0.0))) for name in loaded["tasks"]]
        if found is None:  # another process writes
            return
        result.forwards = sum(part[0] for parts in work for part in parts or [])
        result.seconds = sum(part[1] for parts in work for part in parts or [])
        values = found["results"][row.task]
        names = row.metrics or [key for key, value in values.items() if "," in key and "_stderr," not in key]
        for name in names:
            metric, _, kind = name.partition(",")
            error = values.get(f"{metric}_stderr,{kind}")
            result.metrics[name] = (float(values[name]), float(error) if isinstance(error, float | int) else None)
        for name, samples in found["samples"].items():
            result.documents += len({sample["doc_id"] for sample in samples})
            self._write_samples(variant.label, name, samples)

    def _write_samples(self, label: str, task: str, samples: list[dict[str, Any]]) -> None:
        """Write a line for every document: what was said and what it counts."""
        folder = self.output / "samples" / label
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            {
                "doc_id": sample["doc_id"],
                "filter": sample["filter"],
                "target": sample["target"],
                "responses": sample["resps"],
                "filtered": sample["filtered_resps"],
                "metrics": sample["metrics"],
                **{metric: sample[metric] for metric in sample["metrics"]},
            }
            for sample in sorted(samples, key=lambda sample: (sample["filter"], sample["doc_id"]))
        ]
        text = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
        name = task.replace("/", "_").replace("::", "_")
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")

    def write(self, lm: IlladaLM, arguments: dict[str, Any], table: str) -> None:
        """Write results.json and table.md."""
        environment = environment_of(lm.model)
        environment["versions"] |= {name: version(name) for name in ("lm-eval", "datasets")}
        environment["processes"] = lm.world_size
        content = {
            "arguments": arguments,
            "model_fingerprint": lm.fingerprint,
            "environment": environment,
            "seeds": {"model": lm.seed, "shots": self.seed},
            "results": [asdict(result) for result in self.results],
        }
        write_json(self.output / "results.json", content)
        (self.output / "table.md").write_text(table + "\n", encoding="utf-8")


def evaluate_models(
    models: dict[str, str],
    rows: Sequence[Row],
    variants: Sequence[Variant],
    evaluation: Evaluation,
    options: dict[str, Any],
    arguments: dict[str, Any],
    title: str,
) -> str:
    """Evaluate every row for every model and variant; return the table, written beside results.json as it grows.

    Args:
        models: path by label; the label is empty when there is one.
        rows: what to evaluate.
        variants: ways to do it, one when it is no ablation.
        evaluation: where it goes.
        options: of `IlladaLM`.
        arguments: of the command, for the record.
        title: of the paper's table ("base", "instruct"), or empty.
    """
    table = ""
    for label, path in models.items():
        lm = IlladaLM(path, results=str(evaluation.output), **options)
        for variant in variants:
            column = replace(variant, label=label or variant.label)
            for row in rows:
                result = evaluation.add(lm, row, column)
                if result is None or lm.rank:
                    continue
                said = ", ".join(f"{name} {value:.4g}" for name, (value, _) in result.metrics.items()) or result.status
                print(f"{' '.join(filter(None, (column.label, row.name)))}: {said}", file=sys.stderr, flush=True)
                table = markdown(evaluation.results, rows, title)
                evaluation.write(lm, arguments, table)
        rank = lm.rank
        del lm
    if not evaluation.results:
        raise IlladaError("no task here is concerned: scoring is that of choices, the other ablations of answers")
    if not rank and len({result.variant for result in evaluation.results}) > 1:
        draw(evaluation.results, evaluation.output / "variants.png")
    return table
