"""Options of `illada eval`. Imports neither torch nor lm_eval."""

from dataclasses import dataclass
from typing import Any, Literal

from illada.errors import IlladaError
from illada.weights.options import Dtype, Quantization

Scoring = Literal["confidence", "likelihood", "path"]
Bos = Literal["always", "scores", "tokenizer"]
SpecialTokens = Literal["drop", "keep"]
RANGES = (
    ("limit", 1, 2**63),
    ("samples", 1, 2**31),
    ("shots", 0, 2**31),
    ("max_batch_tokens", 1, 2**63),
    ("seed", 0, 2**63),
    ("shots_seed", 0, 2**63),
)
"""Options that are numbers, each with its least value and the one that it must stay below."""


@dataclass(frozen=True)
class EvalOptions:
    """Evaluate a model with lm-evaluation-harness: the paper's tables, any tasks. Interrupted, it continues.

    Args:
        output: folder for results.json, table.md, samples/ and the journal that an interrupted evaluation continues.
        model: model, adapter or run folder, or a hub name (GSAI-ML/iLLaDA-8B-Base).
        run: folder of a training run; evaluates each of its checkpoints, instead of one model, and draws a picture.
        paper: evaluate the rows of this table of the paper, with its shots, lengths, blocks and prompts, and show its
            numbers beside ours.
        task_files: task files of the harness (YAML) to evaluate: a folder, or one file; they may name data files
            relative to their folder.
        local_data: folder of data sets in the hub's layout (FOLDER/openai/gsm8k, ...), read instead of the hub.
        authors_tasks: checkout of the authors' repository, whose own task files are run for the rows of --paper
            instruct that have one: their prompts and readers to the letter. It runs their Python code.
        tasks: rows or tasks to evaluate; without --paper and --task_files, any of the harness's tasks by name.
        limit: most documents of each task.
        decode: "fast" decodes the paper's rows by threshold 0.95 with an adaptive cache, which is not the paper's way.
        lengths: answer tokens of MMLU and MMLU-Redux (instruct), where the paper and the authors' script disagree.
        scoring: how to score choices: confidence, likelihood (a bound), or path (exact, under the decoding rule of the
            settings); null takes what the paper's row says, else confidence, and the exact likelihood for a causal
            model.
        samples: Monte-Carlo samples of the likelihood.
        shots: examples before each question; null takes the task's own number.
        chat: use the chat template and make each example a turn of its own: for models tuned on conversations.
        bos: where a BOS begins the context: always, in scores only as in the authors' script, or where the tokenizer
            adds one; null takes the authors' way for --paper, and always for other tasks.
        special_tokens: drop special tokens from answers, or keep them as the authors' script does; null keeps them for
            --paper, and drops them for other tasks.
        settings: settings of generation, which override the tasks' own: --settings.block_length 16,
            --settings.threshold 0.9, ...
        ablate: evaluate several values of this in one table (scoring: the paper's Table 4).
        values: values of the ablation, instead of the usual ones.
        allow_code: run the programs that the model writes, each in a limited process of its own.
        download: fetch data sets that are not in the local cache.
        seed: seed of likelihood masks and of sampling.
        shots_seed: seed of the choice of examples; the authors' and the harness's own is 1234.
        max_batch_tokens: most positions of one forward pass when scoring.
        dtype: type of the weights; auto takes the checkpoint's own.
        device: device to run on; auto takes a GPU where there is one.
        quantize: load the weights of the blocks in 8 or 4 bits.

    Raises:
        IlladaError: when two options contradict each other, or nothing says what to evaluate.
    """

    output: str
    model: str | None = None
    run: str | None = None
    paper: Literal["base", "instruct"] | None = None
    task_files: str | None = None
    local_data: str | None = None
    authors_tasks: str | None = None
    tasks: list[str] | None = None
    limit: int | None = None
    decode: Literal["exact", "fast"] = "exact"
    lengths: Literal["3-4", "4-3"] = "3-4"
    scoring: Scoring | None = None
    samples: int = 128
    shots: int | None = None
    chat: bool = False
    bos: Bos | None = None
    special_tokens: SpecialTokens | None = None
    settings: dict[str, Any] | None = None
    ablate: Literal["scoring", "block_length", "steps", "threshold"] | None = None
    values: list[str] | None = None
    allow_code: bool = False
    download: bool = False
    seed: int = 0
    shots_seed: int = 1234
    max_batch_tokens: int = 16_384
    dtype: Dtype = "auto"
    device: str = "auto"
    quantize: Quantization | None = None

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        paper, folder = self.paper is not None, self.task_files is not None
        if paper and folder:
            raise IlladaError("--paper and --task_files exclude each other: the paper's rows are tasks of their own")
        if not (paper or folder or self.tasks):
            choices = "--paper base or instruct, --task_files FOLDER_OR_FILE, or --tasks NAME ..."
            raise IlladaError(f"what to evaluate? Give {choices}")
        if not paper and (self.decode, self.lengths) != ("exact", "3-4"):
            raise IlladaError(
                "--decode and --lengths are about the paper's rows: give --paper, or --settings for others"
            )
        if paper and (self.shots is not None or self.chat):
            raise IlladaError("--shots and --chat are for tasks other than the paper's, whose rows say it themselves")
        if self.authors_tasks and self.paper != "instruct":
            raise IlladaError("--authors_tasks is about --paper instruct: the base table's tasks are the harness's own")
        if self.limit is not None and self.limit < 1:
            raise IlladaError(f"--limit is {self.limit}: it must be at least 1, or be left out for all documents")
        for name, least, most in RANGES:
            if (value := getattr(self, name)) is not None and not least <= value < most:
                bound = f"2^{most.bit_length() - 1}"
                raise IlladaError(f"--{name} is {value}: it must be at least {least} and below {bound}")
        for name in ("output", "model", "run", "task_files", "local_data", "authors_tasks"):
            if (value := getattr(self, name)) is not None and not value.strip():
                raise IlladaError(f"--{name} is empty: give a path (. is this folder), or leave it out")
        if self.values and not self.ablate:
            raise IlladaError("--values are those of an ablation: give --ablate too")
        if self.ablate and self.run:
            raise IlladaError("--ablate and --run exclude each other: choose --model, a checkpoint, for an ablation")
        if (self.model is None) == (self.run is None):
            raise IlladaError("give --model, or --run to evaluate every checkpoint of a training run")
