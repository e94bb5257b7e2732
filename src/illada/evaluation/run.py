"""`illada eval`: rows of a table, each a task of the harness with its settings, for one model or several variants."""

import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from illada.errors import IlladaError, first_line, needs
from illada.evaluation.authors import tasks_folder, their_imports
from illada.evaluation.harness import IlladaLM
from illada.evaluation.local_data import check_folder, reading_from
from illada.evaluation.options import EvalOptions
from illada.evaluation.rows import Result, Row, Variant, ablation, paper_rows, select_rows
from illada.evaluation.tables import draw, markdown
from illada.evaluation.task_files import folder_of, names_in, task_manager
from illada.files import write_json, write_text
from illada.generation.settings import refuse_masks
from illada.reporting import environment_of, write_picture
from illada.scoring.path import refuse_rule
from illada.weights.runs import checkpoints, tuned_on_chats

with needs("eval", "evaluation"):
    import datasets
    from huggingface_hub import constants
    from lm_eval import evaluate as evaluate_in_harness
    from lm_eval.api import task as harness_task
    from lm_eval.tasks import TaskManager

# The harness draws a bar for each task that it builds: on a terminal only, in a log it says nothing.
harness_task.tqdm = partial(harness_task.tqdm, disable=None)

OF_MODEL = ("scoring", "samples", "seed", "dtype", "device", "quantize", "max_batch_tokens")
"""Options of `illada eval` that go to `IlladaLM`."""


def evaluate(options: EvalOptions) -> str | None:
    """Evaluate as the options of `illada eval` say; return the table, or None in a process that writes none.

    Raises:
        IlladaError: when an option names what does not exist.
    """
    models = _models(options)
    if options.local_data is not None:
        check_folder(options.local_data)
    folder = options.authors_tasks and tasks_folder(options.authors_tasks)
    if not (options.paper or options.chat) and (tuned := next(filter(tuned_on_chats, models.values()), None)):
        print(
            f"note: {tuned} was tuned on conversations, and the questions are put to it as plain text: add --chat, "
            "unless the tasks write the template themselves",
            file=sys.stderr,
        )
    variants = ablation(options.ablate, options.values) if options.ablate else [Variant()]
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    manager = task_manager(options.task_files)
    if options.paper is not None:
        rows = select_rows(paper_rows(options.paper, options.decode, options.lengths, bool(folder)), options.tasks)
    else:
        known = names_in(manager, options.task_files)
        rows = [Row(name, name, shots=options.shots, chat=options.chat) for name in known]
        rows = select_rows(rows, options.tasks)
    settings = options.settings or {}
    variants = [replace(variant, generation={**settings, **variant.generation}) for variant in variants]
    theirs = task_manager(str(folder)) if folder else None
    if theirs is not None:
        at_theirs = {*theirs.all_groups, *theirs.all_subtasks}
        if lacking := [row.task for row in rows if row.from_authors and row.task not in at_theirs]:
            raise IlladaError(f"{options.authors_tasks} lacks the tasks {', '.join(lacking)}: check out all of it")
    return Evaluation(options, manager, rows, theirs).run(models, variants)


def _models(options: EvalOptions) -> dict[str, str]:
    """Return the model by the empty label, or every checkpoint of a run by its step."""
    if options.model is not None:
        return {"": options.model}
    folders = checkpoints(Path(str(options.run)))
    if not folders:
        raise IlladaError(f"no checkpoints in {options.run}: give a run folder of `illada pretrain` or `illada sft`")
    return {path.name: str(path) for path in folders}


@dataclass
class Evaluation:
    """Evaluates rows one after the other into a folder: a journal, samples, results.json, table.md.

    Args:
        options: options of `illada eval`; paths in task files are relative to their folder.
        manager: source of the tasks.
        rows: rows to evaluate.
        theirs: source of the tasks in the authors' checkout.
        results: what has come out so far.
    """

    options: EvalOptions
    manager: TaskManager
    rows: Sequence[Row] = ()
    theirs: TaskManager | None = None
    results: list[Result] = field(default_factory=list)

    def run(self, models: dict[str, str], variants: Sequence[Variant]) -> str | None:
        """Evaluate every row for every model and variant; results.json and table.md are rewritten after each row.

        Args:
            models: path of each model by its label; the label is empty when there is one model.
            variants: ways to evaluate; a single one when it is no ablation.

        Returns:
            the table; None in a process of torchrun that writes none.
        """
        output = Path(self.options.output)
        of_model = {name: getattr(self.options, name) for name in OF_MODEL}
        table = None
        for label, path in models.items():
            lm = IlladaLM(path, results=str(output), **of_model)
            # A candidate's length is its own, so the budget must not shorten the rule's blocks.
            lm.rule = lm.settings_of({**(self.options.settings or {}), "max_new_tokens": lm.max_length})
            if "path" in (self.options.scoring, *(variant.scoring for variant in variants)):
                refuse_rule(lm.rule, lm.causal)
            for variant in variants:
                column = replace(variant, label=label or variant.label)
                for row in self.rows:
                    result = self.add(lm, row, column)
                    if result is None or lm.rank:
                        continue
                    metrics = result.metrics.items()
                    values = ", ".join(f"{name.removesuffix(',none')} {value:.4g}" for name, (value, _) in metrics)
                    name = " ".join(filter(None, (column.label, row.name)))
                    print(f"{name}: {values or result.status}", file=sys.stderr, flush=True)
                    table = markdown(self.results, self.rows, self.options.paper, self._conditions(lm))
                    self._write(lm, output, table)
            del lm  # before the next model is loaded
        if not self.results:
            raise IlladaError("no task here is concerned: scoring is that of choices, the other ablations of answers")
        if table is not None and len({result.variant for result in self.results}) > 1:
            write_picture(output / "variants.png", lambda: draw(self.results))
        return table

    def add(self, lm: IlladaLM, row: Row, variant: Variant) -> Result | None:
        """Evaluate a row and write its samples; return None when the variant does not concern the row."""
        result = Result(row.name, row.task, variant.label, paper=row.paper)
        with self._around(row) as manager:
            try:
                with self._sources():
                    loaded = manager.load([row.task])
            except (ConnectionError, FileNotFoundError) as error:
                result.status, result.reason = "dataset not reachable", first_line(error)
            except ModuleNotFoundError as error:
                # The harness's tasks name their own extras; its message says more than the import system's.
                result.status, result.reason = "library missing", first_line(error)
            except Exception as error:
                raise _of_task(row.task, "loaded", error) from error
            else:
                tasks = loaded["tasks"].values()
                if not tasks:
                    raise IlladaError(f"{row.task} holds no task: name tasks that are here in its file")
                if variant.kinds and variant.kinds.isdisjoint(task.OUTPUT_TYPE for task in tasks):
                    return None
                if not self.options.allow_code and any(getattr(task, "UNSAFE_CODE", False) for task in tasks):
                    result.status, result.reason = "not run", "it runs generated programs: allow that with --allow_code"
                else:
                    self._evaluate(lm, row, variant, loaded, result)
        self.results.append(result)
        return result

    @contextlib.contextmanager
    def _around(self, row: Row) -> Iterator[TaskManager]:
        """Give the manager of a row's task, with what the authors' own tasks want while they are loaded and run."""
        if row.from_authors and self.theirs is not None:
            with their_imports(tasks_folder(str(self.options.authors_tasks))):
                yield self.theirs
        else:
            yield self.manager

    @contextlib.contextmanager
    def _sources(self) -> Iterator[None]:
        """Read data sets from beside the task files and from `local_data`; use the network only with `download`."""
        saved = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
        banned = os.environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES
        offline = banned or not self.options.download
        if offline:  # a metric that the harness does not know would be looked for on the hub, and its code run
            os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = offline
        local = None if self.options.local_data is None else check_folder(self.options.local_data)
        try:
            with contextlib.chdir(folder_of(self.options.task_files or ".")), reading_from(local, not offline):
                yield
        finally:
            datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = saved

    def _evaluate(self, lm: IlladaLM, row: Row, variant: Variant, loaded: dict[str, Any], result: Result) -> None:
        """Evaluate loaded tasks and fill in the result."""
        generation = row.generation
        if lm.causal:
            refuse_masks(variant.generation)
            # The boost makes up for iLLaDA's long thinking; another model's answer it would break in two.
            generation = {name: value for name, value in generation.items() if not name.startswith("think_boost")}
        for task in loaded["tasks"].values():
            self._configure(task, row.shots, {**generation, **variant.generation})
        saved = lm.scoring, lm.samples, lm.bos, lm.special_tokens
        # The paper's rows say how to score a diffusion model.
        lm.scoring = variant.scoring or self.options.scoring or (None if lm.causal else row.scoring) or lm.scoring
        lm.samples = row.samples or lm.samples
        lm.bos = self.options.bos or row.bos or lm.bos
        lm.special_tokens = self.options.special_tokens or row.special_tokens or lm.special_tokens
        try:
            with _blaming(row.task):
                output = evaluate_in_harness(
                    lm,
                    loaded,
                    limit=self.options.limit,
                    bootstrap_iters=1000,
                    apply_chat_template=row.chat,
                    fewshot_as_multiturn=row.chat,
                    confirm_run_unsafe_code=self.options.allow_code,
                )
            result.settings = self._settings(lm, row, loaded["tasks"])
        finally:
            lm.scoring, lm.samples, lm.bos, lm.special_tokens = saved
        work = [lm.gather_object((lm.forwards.pop(name, 0), lm.seconds.pop(name, 0.0))) for name in loaded["tasks"]]
        if output is None:  # another process writes
            return
        result.forwards = sum(part[0] for parts in work for part in parts or [])
        result.seconds = sum(part[1] for parts in work for part in parts or [])
        values = output["results"][row.task]
        for name in row.metrics or [key for key in values if "," in key and "_stderr," not in key]:
            metric, _, kind = name.partition(",")
            error = values.get(f"{metric}_stderr,{kind}")
            result.metrics[name] = (float(values[name]), float(error) if isinstance(error, float | int) else None)
        for name, samples in output["samples"].items():
            result.documents += len({sample["doc_id"] for sample in samples})
            self._write_samples(variant.label, name, samples)

    def _configure(self, task: Any, shots: int | None, generation: dict[str, Any]) -> None:
        """Give a task of the harness its shots, their seed, and its settings of generation."""
        if shots is not None or task.config.num_fewshot is None:
            task.set_config("num_fewshot", shots or 0)
        # Where shots come from the test documents (MMLU-Redux), the harness leaves out the question itself only if the
        # task says where they come from.
        source, own = task.fewshot_cfg, (task.has_training_docs(), task.has_validation_docs())
        if source.split is None and source.samples is None and not any(own):
            source.split = task.config.test_split
        if task.OUTPUT_TYPE == "generate_until":
            task.set_config("generation_kwargs", generation, update=True)
        task.set_fewshot_seed(self.options.shots_seed)

    def _settings(self, lm: IlladaLM, row: Row, tasks: dict[str, Any]) -> dict[str, Any]:
        """Return the settings under which tasks were evaluated, for the record."""
        settings: dict[str, Any] = {
            "shots": {name: task.config.num_fewshot for name, task in tasks.items()},
            "chat": row.chat,
            "limit": self.options.limit,
            "seed": self.options.seed,
            "shots_seed": self.options.shots_seed,
            "bos": lm.bos,
        }
        generating = [task for task in tasks.values() if task.OUTPUT_TYPE == "generate_until"]
        if generating:
            settings["special_tokens"] = lm.special_tokens
            settings["generation"] = asdict(lm.settings_of(generating[0].config.generation_kwargs))
        if len(generating) < len(tasks):
            settings["scoring"] = lm.scoring
            if lm.scoring == "likelihood":
                settings["samples"] = lm.samples
            elif lm.scoring == "path":
                settings["rule"] = asdict(lm.rule)
        return settings

    def _conditions(self, lm: IlladaLM) -> str:
        """Return a line about what numbers of the harness depend on beside the model."""
        environment = environment_of(lm.model)
        authors = ", the authors' is 0.4.10" if self.options.paper else ""
        facts = [
            f"lm-evaluation-harness {version('lm-eval')}{authors}",
            f"{environment['dtype']} on {environment['device']}",
            f"seeds {self.options.shots_seed} (shots) and {lm.seed} (masks, sampling)",
        ]
        if self.options.authors_tasks:
            facts.append(f"task files of {self.options.authors_tasks}")
        if self.options.limit is not None:
            facts.append(f"the first {self.options.limit} documents of each task")
        return "; ".join(facts) + "."

    def _write_samples(self, label: str, task: str, samples: list[dict[str, Any]]) -> None:
        """Write a line for every document: the model's answers and what they count."""
        folder = Path(self.options.output) / "samples" / label
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            {
                "doc_id": sample["doc_id"],
                "question": _question(sample),
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
        write_text(folder / f"{name}.jsonl", text)

    def _write(self, lm: IlladaLM, output: Path, table: str) -> None:
        """Write results.json and table.md."""
        environment = environment_of(lm.model)
        environment["versions"] |= {name: version(name) for name in ("lm-eval", "datasets")}
        environment["processes"] = lm.world_size
        content = {
            "arguments": asdict(self.options),
            "model_fingerprint": lm.fingerprint,
            "environment": environment,
            "seeds": {"model": lm.seed, "shots": self.options.shots_seed},
            "results": [asdict(result) for result in self.results],
        }
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "results.json", content)
        write_text(output / "table.md", table + "\n")


@contextlib.contextmanager
def _blaming(task: str) -> Iterator[None]:
    """Turn an error within the harness into one line about the task's file or data; errors of the model pass.

    Raises:
        IlladaError: for such an error.
    """
    try:
        yield
    except Exception as error:
        within = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)}
        if isinstance(error, IlladaError | OSError) or IlladaLM.__module__ in within:
            raise
        raise _of_task(task, "evaluated", error) from error


def _of_task(task: str, what: str, error: Exception) -> IlladaError:
    """Return what is to be said where the harness trips over a task."""
    said = f"{type(error).__name__}: {first_line(error)}".removesuffix(f": {type(error).__name__}")
    return IlladaError(f"task {task} cannot be {what}, check its file and its data: {said}")


def _question(sample: dict[str, Any]) -> Any:
    """Return what the model was shown: the context of the first request, shots and template included."""
    requests = sample["arguments"]
    first = next(iter(requests.values())) if isinstance(requests, dict) else requests[0]
    return next(iter(first.values())) if isinstance(first, dict) else first[0]
