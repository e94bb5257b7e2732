"""What does all of this do on a GPU? One command fills every row that was never measured there.

    python benchmarks/gpu.py [--minutes 10] [--only ROW ...] [--again] [--output runs/gpu.json]
    python benchmarks/gpu.py --cpu                 # every row with tiny shapes: tests this code and measures nothing
    python benchmarks/gpu.py --table runs/gpu.json # the table of an earlier run
    python benchmarks/gpu.py --row exact [--cpu]   # one row in this process, without a limit of time

Each row runs in a process of its own and gets a share of the minutes that are left. Whatever happens to it becomes its
row: what failed, what is missing, after how many seconds it was ended. The file is written after every row; a second
run goes on behind the rows that it holds. Weights and prompts are random. Exit code 1 when a row of this run failed.
"""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from attention import documents, windows
from quantize import PLAIN, random_model, stored_gigabytes
from quantize import measure as measure_quantised

from illada.bench.measure import Measurement, measure
from illada.bench.options import BenchServeOptions
from illada.bench.samplers import Answer, Sampler, plain_sampler
from illada.bench.serving import bench_serve
from illada.devices import peak_memory
from illada.errors import MissingExtraError, first_line
from illada.files import read_json, write_json
from illada.generation.engine import generate
from illada.generation.settings import GenerationSettings
from illada.model.attention import Packing, packed_attention
from illada.model.config import IlladaConfig
from illada.model.transformer import IlladaForMaskedLM
from illada.preparation.shard_writer import ShardWriter, write_index
from illada.preparation.train_tokenizer import train_tokenizer
from illada.reporting import aligned, environment_of
from illada.scoring.confidence import confidence_scores
from illada.scoring.layout import Pair
from illada.scoring.likelihood import likelihood_scores, views
from illada.training.optional.estimate import estimate
from illada.training.optional.options import EstimateOptions
from illada.training.recipe import DataRecipe, ModelRecipe, ParallelRecipe, Recipe, TrainingRecipe
from illada.training.trainer import Trainer, train
from illada.weights.save import write_model


class Row(NamedTuple):
    """A row of the table; `row_NAME` below measures it."""

    weight: float
    """Share of the time, in any unit."""
    what: str
    needs_cuda: bool = False


ROWS = {
    "exact": Row(4, "8B shape, bf16, one prompt of 200 ids, 256 new in blocks of 32, one token a pass"),
    "cached": Row(4, "the same with the frozen and the prefix cache"),
    "threshold": Row(4, "the same by threshold, at which random weights decide several tokens a pass"),
    "batches": Row(5, "8B shape, 1, 8 and 32 prompts of 200 ids, 64 new each, exact and frozen"),
    "memory": Row(3, "8B shape, a prompt that leaves one block of 8192, four passes of 32 new tokens"),
    "training": Row(4, "1B shape (recipes/1b-pretrain.yaml), windows of 8192, bf16, kernels as auto chooses"),
    "recompute": Row(8, "the same, a window a pass, by what is computed again; memory beside `illada estimate`"),
    "varlen": Row(3, "varlen against SDPA: attention of packed segments, then training (1B shape, 4 layers)", True),
    "liger": Row(3, "Liger's kernels against ours in training (1B shape, 4 layers)", True),
    "fp8": Row(10, "FP8 against bf16 in training, both compiled (1B shape, 4 layers)", True),
    "scoring": Row(4, "8B shape, 16 candidates of 4 to 16 ids after 100, 16 samples, beside one plain forward each"),
    "server": Row(6, "illada bench serve, short questions, 8B shape with 8 layers, vocabulary 280"),
    "quantised": Row(8, "8B shape from files: seconds of loading, GB of weights, passes of 64 positions"),
    "processes": Row(6, "training (1B shape, 4 layers) in one and two processes: NCCL, with --cpu Gloo"),
}


@dataclass(frozen=True)
class Scale:
    """The sizes of a run: those of a GPU, or tiny ones."""

    device: str = "cuda"
    preset: str = "illada-8b"
    changes: dict[str, Any] = field(default_factory=dict)
    prompt: int = 200
    answer: int = 256
    block: int = 32
    batches: tuple[int, ...] = (1, 8, 32)
    model: dict[str, Any] = field(default_factory=dict)
    """The network that is trained; its shape is that of recipes/1b-pretrain.yaml where nothing is said."""
    window: int = 8192
    steps: int = 8
    windows: int = 8
    vocab_size: int = 155_136
    candidates: int = 16

    @property
    def config(self) -> IlladaConfig:
        return IlladaConfig.preset(self.preset, **self.changes)


TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 128}
GPU = Scale(model=yaml.safe_load((Path(__file__).parents[1] / "recipes/1b-pretrain.yaml").read_text())["model"])
CPU = Scale("cpu", "1m", TINY | {"vocab_size": 320, "initializer_range": 0.3}, 20, 16, 8, (1, 2, 4))
CPU = Scale(**{**asdict(CPU), "model": {"preset": "1m", **TINY}, "window": 64, "steps": 4, "windows": 4})
CPU = Scale(**{**asdict(CPU), "vocab_size": 320, "candidates": 4})

LIMITS = {"exact": 131, "cached": 187}
"""Forwards a second that an H100's bandwidth and products allow: computed (docs/log.md), measured by nobody."""
WARM_UP = 2
"""Steps of a training that are not timed."""

Figures = dict[str, Any]
Checks = dict[str, bool]


class NotHereError(Exception):
    """A row cannot be measured on this machine, which is no failure."""


# Generation


def network(at: Scale, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> IlladaForMaskedLM:
    """Return random weights, drawn where they will lie: 8B take a minute on a CPU."""
    torch.manual_seed(0)
    with torch.device(at.device):
        return IlladaForMaskedLM._from_config(
            IlladaConfig.preset(at.preset, **{**at.changes, **changes}), dtype=dtype
        ).eval()


def prompts(at: Scale, lengths: list[int]) -> list[list[int]]:
    drawn = torch.Generator().manual_seed(1)
    return [torch.randint(10, at.config.vocab_size, (length,), generator=drawn).tolist() for length in lengths]


def settings_of(at: Scale, **changes: Any) -> GenerationSettings:
    sizes = {"max_new_tokens": at.answer, "block_length": at.block, "eos_token_id": None}
    return GenerationSettings(**{**sizes, **changes})


def generated(model: IlladaForMaskedLM, asked: list[list[int]], settings: GenerationSettings) -> Figures:
    """Answer once to warm up and once for the clock."""

    def answer(group: Any) -> list[Answer]:
        return [Answer(row.ids, row.forwards) for row in generate(model, group, settings)]

    done: Measurement = measure(model, [Sampler("", answer)], asked, 1)[0]
    forwards, seconds = done.work.forwards, done.seconds[0]
    figures = {"forwards/s": forwards / seconds, "tokens/s": done.tokens / seconds, "forwards": forwards}
    return figures | {"GB": (done.peak_bytes or 0) / 1e9}


def same_tokens(at: Scale, rows: int, **changes: Any) -> Checks:
    """Compare a batch's tokens with those of each prompt alone, and with the plain loop's, in fp32 with two layers."""
    model = network(at, torch.float32, num_hidden_layers=2)
    settings = settings_of(at, max_new_tokens=2 * at.block, **changes)
    asked = prompts(at, [1 + (37 * i + at.prompt) % at.prompt for i in range(rows)])
    alone = [generate(model, [prompt], settings)[0].ids for prompt in asked]
    checks = {"a batch's tokens are those alone": [row.ids for row in generate(model, asked, settings)] == alone}
    if settings.cache == "none" and settings.threshold is None:
        checks["tokens are the plain loop's"] = [a.ids for a in plain_sampler(model, settings).answer(asked)] == alone
    return checks


def row_exact(at: Scale) -> tuple[Figures, Checks]:
    figures = generated(network(at), prompts(at, [at.prompt]), settings_of(at))
    return figures | {"of an H100's limit": figures["forwards/s"] / LIMITS["exact"]}, same_tokens(at, 4)


def row_cached(at: Scale) -> tuple[Figures, Checks]:
    model, asked = network(at), prompts(at, [at.prompt])
    figures = {cache: generated(model, asked, settings_of(at, cache=cache)) for cache in ("frozen", "prefix")}
    figures["of an H100's limit"] = figures["frozen"]["forwards/s"] / LIMITS["cached"]
    del model
    # With one pass a block the prefix is always fresh, so the cache may change nothing.
    model = network(at, torch.float32, num_hidden_layers=2)
    fresh = [generate(model, asked, settings_of(at, steps_per_block=1, cache=cache)) for cache in ("none", "prefix")]
    checks = {"a fresh cache changes no token": fresh[0][0].ids == fresh[1][0].ids}
    return figures, same_tokens(at, 4, cache="frozen") | checks


def row_threshold(at: Scale) -> tuple[Figures, Checks]:
    model, asked = network(at), prompts(at, [at.prompt])
    sure = sorted(generate(model, asked, settings_of(at, max_new_tokens=at.block))[0].log_probs)
    threshold = float(np.exp(sure[len(sure) // 3]))
    figures: Figures = {"threshold": threshold}
    for cache in ("none", "frozen"):
        figures[cache] = generated(model, asked, settings_of(at, threshold=threshold, cache=cache))
    return figures, same_tokens(at, 4, threshold=threshold)


def row_batches(at: Scale) -> tuple[Figures, Checks]:
    model, figures = network(at), {}
    for rows in at.batches:
        for cache in ("none", "frozen"):
            settings = settings_of(at, max_new_tokens=2 * at.block, cache=cache)
            figures[f"{rows}, {cache}"] = generated(model, prompts(at, [at.prompt] * rows), settings)
    del model
    return figures, same_tokens(at, at.batches[-1]) | same_tokens(at, 8, cache="frozen")


def row_memory(at: Scale) -> tuple[Figures, Checks]:
    model, asked = network(at), prompts(at, [at.config.max_position_embeddings - at.block])
    figures: Figures = {"weights": {"GB": stored_gigabytes(model)}}
    for cache in ("none", "frozen"):
        settings = settings_of(at, max_new_tokens=at.block, steps_per_block=4, cache=cache)
        figures[cache] = generated(model, asked, settings)
    return figures, {}


# Training


class EnoughError(Exception):
    """Ends a training with what it found, before it would write a checkpoint."""


class Measured(Trainer):
    """Takes the steps of a recipe; the speed in the last record is that since the warm-up."""

    def write_log(self, record: dict[str, Any]) -> None:
        if self.state.step == 1:
            self.loss = record["loss"]
        if self.state.step == WARM_UP:
            self.start_clock()
        if self.state.step == self.schedule.steps:
            raise EnoughError(record | {"loss": self.loss, "kernels": " ".join(self.run.remarks)})


@contextmanager
def training_data(at: Scale) -> Iterator[str]:
    """Write random ids as a prepared data set, with a tokenizer that knows few of them."""
    with TemporaryDirectory() as folder:
        writer = ShardWriter(folder, at.vocab_size)
        writer.append(np.random.default_rng(0).integers(8, at.vocab_size, 2 * at.windows * at.window))
        write_index(folder, writer.finish(), vocab_size=at.vocab_size)
        train_tokenizer(["one two three four"], 280).save_pretrained(Path(folder) / "tokenizer")
        yield folder


def recipe_of(at: Scale, data: str, layers: int | None, windows: int, dtype: str, **parallel: Any) -> Recipe:
    model = ModelRecipe(**{**at.model, **({} if layers is None else {"num_hidden_layers": layers})})
    steps = {"steps": at.steps, "warmup_steps": 1, "samples_per_step": at.windows, "samples_per_batch": windows}
    settings: dict[str, Any] = {**steps, "dtype": dtype, "device": at.device, "checkpoint_every": 10**6}
    parts = {"data": DataRecipe(train=data, window=at.window), "parallel": ParallelRecipe(**parallel)}
    return Recipe(output=f"{data}/run-{time.monotonic_ns()}", model=model, training=TrainingRecipe(**settings), **parts)


def trained(recipe: Recipe) -> Figures:
    """Train and return tokens/s, model FLOPs utilisation (of GPUs that flops.py knows), peak memory and first loss."""
    if recipe.training.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        train(recipe, trainer=Measured)
    except EnoughError as enough:
        record = enough.args[0]
    figures = {"tokens/s": record["tokens_per_second"], "MFU": record.get("mfu"), "GB": record["memory_gb"]}
    return figures | {"loss": record["loss"], "kernels": record["kernels"]}


def ways(of: dict[str, Callable[[], Figures]]) -> tuple[Figures, Checks]:
    """Measure several ways in turn; one that fails leaves the others."""
    figures, checks = {}, {}
    for name, way in of.items():
        try:
            figures[name] = way()
        except MissingExtraError as error:
            figures[name] = {"not measured": str(error)}
        except Exception as error:
            traceback.print_exc()
            figures[name], checks[f"{name} runs"] = {"failed": f"{type(error).__name__}: {first_line(error)}"}, False
        gc.collect()  # a traceback holds the network
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return figures, checks


def compared(at: Scale, of: dict[str, dict[str, Any]], layers: int | None, tolerance: float) -> tuple[Figures, Checks]:
    """Train in several ways on the same batches and compare their first losses with that of the first way."""
    with training_data(at) as data:
        plan = {
            name: {"layers": layers, "windows": at.windows // 2, "dtype": "bf16", **way} for name, way in of.items()
        }
        figures, checks = ways(
            {name: lambda way=way: trained(recipe_of(at, data, **way)) for name, way in plan.items()}
        )
    losses = [found["loss"] for found in figures.values() if "loss" in found]
    return figures, checks | {"losses agree": max(losses) - min(losses) <= tolerance * losses[0]}


def row_training(at: Scale) -> tuple[Figures, Checks]:
    return compared(at, {"auto": {}}, None, 0)


def row_recompute(at: Scale) -> tuple[Figures, Checks]:
    kinds = ("none", "selective", "full")
    figures, checks = compared(at, {kind: {"recompute": kind, "windows": 1} for kind in kinds}, None, 1e-3)
    options = EstimateOptions(gpu="cpu" if at.device == "cpu" else "h100", vocab_size=at.vocab_size)
    expected = estimate(recipe_of(at, "", None, 1, "bf16"), options).memory
    return {kind: figures[kind] | {"estimated GB": expected[kind].peak / 1e9} for kind in kinds}, checks


def row_varlen(at: Scale) -> tuple[Figures, Checks]:
    """Losses are of bf16; tokens/s of attention count a forward and a backward pass of one layer of the 8B shape."""
    found, checks = {}, {}
    config = at.config
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    for name, packing in (("windows", windows(4, at.window)), ("documents", documents())):
        half: dict[str, Any] = {"device": at.device, "dtype": torch.bfloat16, "requires_grad": True}
        parts = [torch.randn(packing.tokens, count, config.head_dim, **half) for count in heads]
        outputs = [packed_attention(*parts, packing, kernel).detach() for kernel in ("sdpa", "varlen")]
        checks[f"attention agrees, {name}"] = torch.allclose(*outputs, atol=2e-2, rtol=2e-2)
        for kernel in ("sdpa", "varlen"):
            seconds = timed(at, lambda k=kernel, x=parts, p=packing: packed_attention(*x, p, k).sum().backward())
            found[f"{name}, {kernel}"] = {"tokens/s": packing.tokens / seconds, "runs": len(packing.groups)}
    figures, more = compared(
        at, {kind: {"attention": kind, "kernels": "plain"} for kind in ("sdpa", "varlen")}, 4, 1e-3
    )
    return found | figures, checks | more


def row_liger(at: Scale) -> tuple[Figures, Checks]:
    return compared(at, {kind: {"kernels": kind} for kind in ("plain", "liger")}, 4, 1e-3)


def row_fp8(at: Scale) -> tuple[Figures, Checks]:
    return compared(at, {dtype: {"dtype": dtype, "compile": True} for dtype in ("bf16", "fp8")}, 4, 1e-2)


def one_of(rank: int, count: int, port: int, recipe: Recipe, file: Path) -> None:
    """Train as process `rank` of `count`, as torchrun would have started it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    figures = trained(recipe)
    if rank == 0:
        write_json(file, figures)


def row_processes(at: Scale) -> tuple[Figures, Checks]:
    if at.device == "cuda" and torch.cuda.device_count() < 2:
        raise NotHereError("needs two GPUs")
    figures: Figures = {}
    with training_data(at) as data:
        for count in (1, 2):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            file = Path(data) / f"{count}.json"
            sent = (count, port, recipe_of(at, data, 4, at.windows // 4, "bf16"), file)
            torch.multiprocessing.start_processes(one_of, sent, nprocs=count, start_method=start_method(at))
            figures[f"{count}"] = read_json(file)
    one, two = (figures[count]["loss"] for count in figures)
    return figures, {"losses agree": abs(one - two) <= 1e-3 * one}


# Scoring, serving, loading


def timed(at: Scale, action: Callable[[], object], repeats: int = 5) -> float:
    """Return the median seconds of an action after one that is not timed."""
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        action()
        if at.device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


@torch.inference_mode()
def plain_log_p(model: IlladaForMaskedLM, pair: Pair, masked: Any) -> torch.Tensor:
    """Return log p of the masked ids of a candidate, from one forward pass with all logits."""
    context, candidate = (torch.tensor(part, device=model.device) for part in pair)
    masked = torch.as_tensor(masked, device=model.device)
    seen = torch.cat((context, candidate.masked_fill(masked, model.config.mask_id)))
    logits = model(seen[None]).logits[0, len(context) :][masked].float()
    logits[:, model.config.mask_id] = -torch.inf
    return logits.log_softmax(-1).gather(1, candidate[masked][:, None])[:, 0]


def plain_confidence(model: IlladaForMaskedLM, pair: Pair) -> float:
    masked, total = np.ones(len(pair[1]), dtype=np.bool_), 0.0
    while masked.any():
        best, at = plain_log_p(model, pair, masked).max(0)
        total, masked[np.flatnonzero(masked)[int(at)]] = total + float(best), False
    return total


def plain_likelihood(model: IlladaForMaskedLM, pair: Pair, samples: int = 16) -> float:
    seen = zip(*views(len(pair[1]), samples, 0), strict=True)
    return sum(float(weight) * float(plain_log_p(model, pair, masked).sum()) for masked, weight in seen)


def row_scoring(at: Scale) -> tuple[Figures, Checks]:
    ids = prompts(at, [100, *(4 + i % 13 for i in range(at.candidates))])
    pairs: list[Pair] = [(ids[0], candidate) for candidate in ids[1:]]
    methods: dict[str, tuple[Callable[..., list[float]], Callable[..., float]]] = {
        "confidence": (confidence_scores, plain_confidence),
        "likelihood": (lambda model, pairs: likelihood_scores(model, pairs, 16), plain_likelihood),
    }
    model, figures, checks = network(at), {}, {}
    for name, (ours, plain) in methods.items():
        seconds = [timed(at, lambda: ours(model, pairs), 1), timed(at, lambda: [plain(model, p) for p in pairs], 1)]
        speeds = dict(zip(("items/s", "plain items/s"), (len(pairs) / each for each in seconds), strict=True))
        figures[name] = speeds | {"times": seconds[1] / seconds[0]}
    del model
    model = network(at, torch.float32, num_hidden_layers=2)
    for name, (ours, plain) in methods.items():
        checks[f"{name} agrees in fp32"] = np.allclose(ours(model, pairs), [plain(model, p) for p in pairs], 1e-4, 1e-3)
    return figures, checks


def row_server(at: Scale) -> tuple[Figures, Checks]:
    tokenizer = train_tokenizer(["one two three four"], 280)
    model = network(at, num_hidden_layers=min(8, at.config.num_hidden_layers), vocab_size=len(tokenizer))
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        write_model(folder, folder, model.config, tensors, model.dtype, "", tokenizer=tokenizer)
        del model, tensors
        sizes = {"block_length": at.block, "max_new_tokens": 2 * at.block, "limit": 4, "requests": 4 * at.batches[-1]}
        load: dict[str, Any] = {"mixes": ["short"], "clients": list(at.batches), "rates": [4.0], "seconds": 5.0}
        results = bench_serve(BenchServeOptions(model=str(folder), device=at.device, **sizes, **load))
    figures = {}
    for row in results["rows"]:
        times = {"times one at a time": next(iter(row["alone"].values()))["times"]} if row["rate"] is None else {}
        p50 = {"p50 s": row["latency"]["p50"]} if row["latency"] else {}
        figures[row["load"]] = {"answers/s": row["answers_per_second"], **times, **p50}
    wrong = sum(row["mixed_up"] for row in results["rows"])
    fine = all(set(row["statuses"]) <= {"ok"} for row in results["rows"])
    return figures, {"answers are those given alone": wrong == 0, "every answer came": fine}


def quantised(at: Scale, way: str, folder: str) -> Figures:
    if at.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    names = {"model": f"{folder}/model", "text": None, "reference": f"{folder}/reference.pt", "way": way}
    found = measure_quantised(argparse.Namespace(**names, lengths=[64], device=at.device, repeats=5))
    figures = {"load s": found["load_seconds"], "GB": found["weights"], "peak GB": found["gpu_peak"]}
    return figures | {"forwards/s": 1 / statistics.median(found["seconds_64"]), "KL": found["kl"]}


def row_quantised(at: Scale) -> tuple[Figures, Checks]:
    with TemporaryDirectory() as folder:
        with torch.device(at.device):
            random_model(at.preset, None, f"{folder}/model")
        torch.set_default_dtype(torch.float32)
        names = (PLAIN, "int8", "int4", "nf4")
        return ways({way: lambda way=way: quantised(at, way, folder) for way in names})


# Processes, the file, the table


def start_method(at: Scale) -> str:
    """CUDA does not survive a fork. Tiny rows take less time than the imports, which a fork has behind it."""
    return "fork" if at.device == "cpu" else "spawn"


def environment(at: Scale) -> dict[str, Any]:
    """Return device, driver, versions and commit, without touching the GPU."""
    found: dict[str, Any] = {"device": f"{at.device} {platform.machine()}", "driver": None, "cuda": torch.version.cuda}
    if at.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
            found["device"], found["driver"] = lines[0].split(", ")
            found["devices"] = len(lines)
        except (OSError, subprocess.CalledProcessError) as error:
            found["driver"] = f"unknown: {first_line(error)}"
    libraries = {"triton", "liger-kernel", "cut-cross-entropy", "torchao", "bitsandbytes", "accelerate"}
    there = {package.metadata["Name"].lower(): package.version for package in metadata.distributions()}
    common = environment_of(None)
    versions = common["versions"] | {name: there[name] for name in sorted(libraries & there.keys())}
    return found | {"versions": versions, "commit": common["commit"], "cores": common["cores"]}


def take(name: str, at: Scale) -> dict[str, Any]:
    """Measure a row in this process."""
    started = time.perf_counter()
    row: dict[str, Any] = {"status": "measured", "reason": "", "figures": {}, "checks": {}}
    try:
        row["figures"], row["checks"] = globals()[f"row_{name}"](at)
        if untrue := [check for check, holds in row["checks"].items() if not holds]:
            row |= {"status": "failed", "reason": f"not so: {', '.join(untrue)}"}
    except (NotHereError, ImportError, MissingExtraError) as error:
        row |= {"status": "not measured", "reason": first_line(error)}
    except Exception as error:
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {first_line(error)}"}
        traceback.print_exc()
    return row | {"seconds": time.perf_counter() - started, "peak_gb": peak_memory(torch.device(at.device)) / 1e9}


def take_into(file: Path, name: str, at: Scale) -> None:
    """Measure a row in a process that was started for it and leads a group, so that it ends with all that it started."""
    os.setsid()
    with file.with_suffix(".log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    write_json(file, take(name, at))


def attempt(name: str, at: Scale, limit: float) -> dict[str, Any]:
    """Measure a row in a process of its own, for at most `limit` seconds."""
    row: dict[str, Any] = {"status": "not measured", "reason": "needs CUDA", "figures": {}, "checks": {}}
    if ROWS[name].needs_cuda and at.device == "cpu":
        return row | {"seconds": 0.0, "peak_gb": 0.0}
    with TemporaryDirectory() as folder:
        file, started = Path(folder) / "row.json", time.monotonic()
        process = multiprocessing.get_context(start_method(at)).Process(target=take_into, args=(file, name, at))
        process.start()
        process.join(limit)
        late = process.is_alive()
        try:
            os.killpg(process.pid or 0, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()  # it had not begun, or all of it has ended
        process.join()
        log = file.with_suffix(".log").read_text(errors="replace") if file.with_suffix(".log").exists() else ""
        if file.exists():
            row = json.loads(file.read_text())
        else:
            reason = f"ended after {limit:.0f} s" if late else f"the process ended with code {process.exitcode}"
            row |= {"status": "failed", "reason": reason, "seconds": time.monotonic() - started, "peak_gb": 0.0}
    return row | ({"log": log[-3000:]} if row["status"] == "failed" else {})


def shown(values: Figures) -> str:
    """Return figures as words; those of several ways apart."""

    def word(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{name} {word(each)}" for name, each in value.items() if each not in (None, ""))
        return f"{value:,.4g}" if isinstance(value, float) else str(value)

    return "; ".join(f"{name}: {word(value)}" for name, value in values.items())


def table(rows: list[dict[str, Any]]) -> str:
    """Return the latest of each row in Markdown, a table for each machine and commit."""
    text: list[str] = []
    latest = list({(row["row"], row["cpu"]): row for row in rows}.values())
    for head, group in groupby(latest, lambda row: (row["device"], row["driver"], row["cuda"], row["commit"])):
        device, driver, cuda, commit = head
        members = list(group)
        test = " Tiny shapes on a CPU: a test of the code and no measurement." if members[0]["cpu"] else ""
        text.append(
            f"{device}, driver {driver}, CUDA {cuda}, torch {members[0]['versions']['torch']}, commit {commit}.{test}\n"
        )
        lines = [["row", "what", "found", "checks", "s", "peak GB"]]
        for row in members:
            found = shown(row["figures"]) if row["status"] == "measured" else f"{row['status']}: {row['reason']}"
            checks = "; ".join(f"{check}: {'yes' if holds else 'NO'}" for check, holds in row["checks"].items())
            cells = [row["row"], row["what"], found, checks, f"{row['seconds']:.0f}", f"{row['peak_gb']:.1f}"]
            lines.append([cell.replace("|", "/").replace("\n", " ") for cell in cells])
        text += [aligned(lines, left=4), ""]
    return "\n".join(text)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all rows together")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--again", action="store_true", help="rows too that the file holds already")
    parser.add_argument("--cpu", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu.json"))
    parser.add_argument("--row", choices=ROWS, metavar="ROW", help="measure one row here and print it")
    parser.add_argument("--table", type=Path, help="print the table of such a file")
    args = parser.parse_args(words)
    at = CPU if args.cpu else GPU
    if args.table:
        print(table(read_json(args.table)["rows"]))
        return 0
    if args.row:
        print(json.dumps(take(args.row, at), indent=1))
        return 0
    rows = read_json(args.output)["rows"] if args.output.exists() else []
    there = {row["row"] for row in rows if row["cpu"] == args.cpu and not args.again}
    todo = [name for name in args.only or ROWS if name not in there]
    about, until, failed = environment(at), time.monotonic() + 60 * args.minutes, 0
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(todo):
        print(name, file=sys.stderr, flush=True)
        share = ROWS[name].weight / sum(ROWS[other].weight for other in todo[i:])
        found = attempt(name, at, max(1.0, share * (until - time.monotonic())))
        failed += found["status"] == "failed"
        date = datetime.now(UTC).isoformat(timespec="seconds")
        rows.append({"row": name, "what": ROWS[name].what, "cpu": args.cpu, **found, "date": date, **about})
        write_json(args.output, {"rows": rows})
    print(table(rows))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
