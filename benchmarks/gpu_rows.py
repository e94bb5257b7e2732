"""The rows of gpu.py: each function measures one, at the scale that it is given, and returns what it found.

A figure is a number, the figures of one way by name, or the answer to a check; peaks of memory are called GB.
"""

import argparse
import gc
import os
import platform
import socket
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml
from attention import documents, windows
from common import NotHereError
from quantize import BLOCK, PLAIN, random_model, stored_gigabytes
from quantize import measure as measure_quantised

from illada.bench.measure import measure
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
from illada.model.optional.graphs import CudaGraph, GraphedPasses
from illada.model.transformer import IlladaForMaskedLM
from illada.preparation.shard_writer import ShardWriter, write_index
from illada.preparation.train_tokenizer import train_tokenizer
from illada.reporting import environment_of
from illada.scoring.confidence import confidence_scores
from illada.scoring.layout import Pair
from illada.scoring.likelihood import likelihood_scores, views
from illada.training.optional.estimate import estimate
from illada.training.optional.kernels import FP8_CAPABILITY, use_fp8, use_liger
from illada.training.optional.options import EstimateOptions
from illada.training.recipe import DataRecipe, ModelRecipe, ParallelRecipe, Recipe, TrainingRecipe
from illada.training.trainer import Trainer, train
from illada.weights.save import write_model

Figures = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """The sizes of a run."""

    device: str
    large: dict[str, Any]
    """The shape that generates and scores: a preset and changes."""
    small: dict[str, Any]
    """The shape that is trained."""
    prompt: int
    answer: int
    block: int
    batches: tuple[int, ...]
    window: int
    windows: int
    """In a step of training."""
    steps: int
    vocab_size: int
    """Of the shape that is trained."""
    candidates: int


BILLION = yaml.safe_load((Path(__file__).parents[1] / "recipes/1b-pretrain.yaml").read_text())["model"]
GPU = Scale("cuda", {"preset": "illada-8b"}, BILLION, 200, 256, 32, (1, 8, 32), 8192, 8, 8, 155_136, 16)
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 128}
TINY_LARGE = {"preset": "1m", **TINY, "vocab_size": 320, "initializer_range": 0.3}  # wide, so that choices are clear
CPU = Scale("cpu", TINY_LARGE, {"preset": "1m", **TINY}, 20, 16, 8, (1, 2, 4), 64, 4, 4, 320, 4)

LIMITS = {"exact": 131, "cached": 187}
"""Forwards a second that an H100's bandwidth and products allow: computed, reached by nobody yet."""
WARM_UP = 2
"""Steps of a training that are not timed."""
START = {"cpu": "fork", "cuda": "spawn"}
"""How processes begin: CUDA does not survive a fork; tiny rows take less time than the imports, which it spares."""


def environment(cpu: bool) -> dict[str, Any]:
    """Return device, driver, versions and commit, without touching the GPU."""
    found: dict[str, Any] = {"device": f"CPU {platform.machine()}", "devices": 1, "driver": None}
    if not cpu:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
            found = dict(zip(("device", "driver"), lines[0].split(", "), strict=True)) | {"devices": len(lines)}
        except (OSError, subprocess.CalledProcessError) as error:
            found |= {"device": "GPU", "driver": f"unknown: {first_line(error)}"}
    libraries = ("triton", "liger-kernel", "cut-cross-entropy", "torchao", "bitsandbytes", "accelerate")
    there = {package.metadata["Name"].lower(): package.version for package in metadata.distributions()}
    common = environment_of(None)
    versions = common["versions"] | {name: there[name] for name in libraries if name in there}
    found |= {"cuda": torch.version.cuda, "torch": torch.__version__, "versions": versions}
    return found | {"commit": common["commit"], "cores": common["cores"]}


def peak(at: Scale, figures: Figures) -> float:
    """Return the most memory in GB: measuring one way after another sets the device's own peak back."""
    ways = [figures, *(found for found in figures.values() if isinstance(found, dict))]
    return max([peak_memory(torch.device(at.device)) / 1e9, *(found.get("GB", 0.0) for found in ways)])


def fresh_memory() -> None:
    """Give back what nothing refers to, and begin a new peak."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def each(ways: dict[str, Callable[[], Figures]]) -> Figures:
    """Measure several ways in turn; one that fails leaves the others."""
    figures: Figures = {}
    for name, way in ways.items():
        fresh_memory()
        try:
            figures[name] = way()
        except (ImportError, MissingExtraError) as error:
            figures[name] = {"not measured": first_line(error)}
        except Exception as error:
            traceback.print_exc()
            figures[name] = {"failed": f"{type(error).__name__}: {first_line(error)}"}
    return figures


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


# Generation


def network(at: Scale, shape: Figures, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> IlladaForMaskedLM:
    """Return random weights, drawn where they will lie: 8B would take minutes on a CPU."""
    values = {**shape, **changes}
    torch.manual_seed(0)
    with torch.device(at.device):
        return IlladaForMaskedLM._from_config(IlladaConfig.preset(values.pop("preset"), **values), dtype=dtype).eval()


def random_ids(lengths: list[int], below: int) -> list[list[int]]:
    drawn = torch.Generator().manual_seed(1)
    return [torch.randint(10, below, (length,), generator=drawn).tolist() for length in lengths]


def asked(model: IlladaForMaskedLM, lengths: list[int]) -> list[list[int]]:
    return random_ids(lengths, model.config.vocab_size)


def settings_of(at: Scale, **changes: Any) -> GenerationSettings:
    sizes = {"max_new_tokens": at.answer, "block_length": at.block, "eos_token_id": None}
    return GenerationSettings(**{**sizes, **changes})


def generated(model: IlladaForMaskedLM, prompts: list[list[int]], settings: GenerationSettings) -> Figures:
    """Answer one prompt to warm up and all of them for the clock."""

    def answer(group: Any) -> list[Answer]:
        return [Answer(row.ids, row.forwards) for row in generate(model, group, settings)]

    (done,) = measure(model, [Sampler("engine", answer)], prompts, 1)
    figures = {"forwards/s": done.work.forwards / done.seconds[0], "tokens/s": done.tokens_per_second}
    return figures | {"forwards": done.work.forwards, "GB": (done.peak_bytes or 0) / 1e9}


def same_tokens(at: Scale, rows: int, **changes: Any) -> Figures:
    """Compare tokens of a batch with those of each prompt alone, exact ones with the plain loop's: fp32, two layers."""
    model = network(at, at.large, torch.float32, num_hidden_layers=2)
    settings = settings_of(at, max_new_tokens=2 * at.block, **changes)
    prompts = asked(model, [1 + 37 * i % at.prompt for i in range(rows)])
    alone = [generate(model, [prompt], settings)[0].ids for prompt in prompts]
    differ = sum(row.ids != ids for row, ids in zip(generate(model, prompts, settings), alone, strict=True))
    found: Figures = {f"fp32, {rows} rows: tokens as alone": not differ}
    if differ:  # perhaps by a tie, which rounding decides
        found["rows that differ"] = differ
    if settings == settings_of(at, max_new_tokens=2 * at.block):
        answers = plain_sampler(model, settings).answer(prompts[:4])
        found["fp32: tokens as in the plain loop"] = [answer.ids for answer in answers] == alone[:4]
    return found


def row_exact(at: Scale) -> Figures:
    model = network(at, at.large)
    found = generated(model, asked(model, [at.prompt]), settings_of(at))
    return found | {"of the H100's limit": found["forwards/s"] / LIMITS["exact"]} | same_tokens(at, 4)


def row_cached(at: Scale) -> Figures:
    model = network(at, at.large)
    prompts = asked(model, [at.prompt])
    found: Figures = {cache: generated(model, prompts, settings_of(at, cache=cache)) for cache in ("frozen", "prefix")}
    found["of the H100's limit"] = found["frozen"]["forwards/s"] / LIMITS["cached"]
    model = network(at, at.large, torch.float32, num_hidden_layers=2)
    # With one pass a block the prefix is always fresh.
    fresh = [generate(model, prompts, settings_of(at, steps_per_block=1, cache=cache)) for cache in ("none", "prefix")]
    return found | {"fp32: a fresh cache changes no token": fresh[0] == fresh[1]} | same_tokens(at, 4, cache="frozen")


def row_threshold(at: Scale) -> Figures:
    model = network(at, at.large)
    prompts = asked(model, [at.prompt])
    log_probs = sorted(generate(model, prompts, settings_of(at, max_new_tokens=at.block))[0].log_probs)
    threshold = float(np.exp(log_probs[at.block // 3]))
    found: Figures = {"threshold": threshold}
    for cache in ("none", "frozen"):
        found[cache] = generated(model, prompts, settings_of(at, threshold=threshold, cache=cache))
    return found | same_tokens(at, 4, threshold=threshold)


def row_batches(at: Scale) -> Figures:
    model, found = network(at, at.large), {}
    for rows in at.batches:
        for cache in ("none", "frozen"):
            settings = settings_of(at, max_new_tokens=2 * at.block, cache=cache)
            found[f"{rows}, {cache}"] = generated(model, asked(model, [at.prompt] * rows), settings)
    del model
    return found | same_tokens(at, 8) | same_tokens(at, 8, cache="frozen")


@contextmanager
def graphed(at: Scale, model: IlladaForMaskedLM) -> Iterator[GraphedPasses]:
    """Run small passes as CUDA graphs; on a CPU over the same buffers, but without graphs."""
    passes = GraphedPasses(model.model, CudaGraph if at.device == "cuda" else lambda run, _: run)
    model.model.packed = passes
    try:
        yield passes
    finally:
        del model.model.packed


def beside_graphs(at: Scale, model: IlladaForMaskedLM, rows: int, cache: str) -> Figures:
    """Time generation eagerly and by graphs; forwards are counted by the engine, as hooks do not see a replay."""
    settings = settings_of(at, max_new_tokens=2 * at.block, cache=cache)
    answer = partial(generate, model, asked(model, [at.prompt] * rows), settings)
    eager, wanted = timed(at, answer, 3), answer()
    with graphed(at, model) as passes:
        started = time.perf_counter()
        answers = answer()
        first, graphs = time.perf_counter() - started, timed(at, answer, 3)
    forwards = max(row.forwards for row in answers)
    figures = {"forwards/s": forwards / graphs, "eager forwards/s": forwards / eager, "times": eager / graphs}
    figures |= {"captures": len(passes.steps), "s for them": first - graphs}
    return figures | {"same answers": f"{sum(a == b for a, b in zip(answers, wanted, strict=True))} of {rows}"}


def row_graphs(at: Scale) -> Figures:
    model, found = network(at, at.large, torch.float32, num_hidden_layers=2), {}
    prompts = asked(model, [1 + 37 * i % at.prompt for i in range(8)])
    for cache in ("none", "frozen"):
        for group in (prompts[:1], prompts):
            answer = partial(generate, model, group, settings_of(at, max_new_tokens=2 * at.block, cache=cache))
            wanted = answer()
            with graphed(at, model) as passes:
                same = answer() == wanted and answer() == wanted  # the second time nearly all is replayed
            found[f"fp32, {len(group)} rows, {cache}: tokens as eager"] = same and bool(passes.steps)
    model = network(at, at.large)
    for rows, cache in ((1, "none"), (1, "frozen"), (at.batches[1], "frozen")):
        found[f"{rows}, {cache}"] = beside_graphs(at, model, rows, cache)
    return found


def row_memory(at: Scale) -> Figures:
    model = network(at, at.large)
    prompts = asked(model, [model.config.max_position_embeddings - at.block])
    found: Figures = {"weights": {"GB": stored_gigabytes(model)}}
    for cache in ("none", "frozen"):
        settings = settings_of(at, max_new_tokens=at.block, steps_per_block=4, cache=cache)
        found[cache] = generated(model, prompts, settings)
    return found


# Training


class EnoughError(Exception):
    """Ends a training with its last record, before a checkpoint would be written."""


class Measured(Trainer):
    """Takes the steps of a recipe; the speed in the last record is that since the warm-up."""

    def write_log(self, record: Figures) -> None:
        if self.state.step == 1:
            self.first_loss = record["loss"]
        if self.state.step == WARM_UP:
            self.start_clock()
        if self.state.step == self.schedule.steps:
            raise EnoughError(record | {"loss": self.first_loss, "kernels": " ".join(self.run.remarks)})


@contextmanager
def training_data(at: Scale) -> Iterator[str]:
    """Write random ids as a prepared data set, with a tokenizer that knows few of them."""
    with TemporaryDirectory() as folder:
        writer = ShardWriter(folder, at.vocab_size)
        writer.append(np.random.default_rng(0).integers(8, at.vocab_size, 2 * at.windows * at.window))
        write_index(folder, writer.finish(), vocab_size=at.vocab_size)
        train_tokenizer(["one two three four"], 280).save_pretrained(Path(folder) / "tokenizer")
        yield folder


def recipe_of(at: Scale, data: str, layers: int | None = None, share: int = 2, **how: Any) -> Recipe:
    """Return a recipe whose steps make `share` passes; dtype and what `how` says besides of parallel."""
    model = ModelRecipe(**{**at.small, **({} if layers is None else {"num_hidden_layers": layers})})
    training = TrainingRecipe(steps=at.steps, warmup_steps=1, device=at.device, dtype=how.pop("dtype", "bf16"))
    training.samples_per_step, training.samples_per_batch = at.windows, at.windows // share
    run = f"{data}/run-{time.monotonic_ns()}"
    return Recipe(
        run, model, data=DataRecipe(data, window=at.window), training=training, parallel=ParallelRecipe(**how)
    )


def trained(recipe: Recipe) -> Figures:
    """Train; return speed, model FLOPs utilisation (of GPUs that flops.py knows), peak memory and first loss."""
    try:
        train(recipe, trainer=Measured)
    except EnoughError as enough:
        record = enough.args[0]
    figures = {"tokens/s": record["tokens_per_second"], "MFU": record.get("mfu"), "GB": record["memory_gb"]}
    return figures | {"loss": record["loss"], "kernels": record["kernels"]}


def compared(at: Scale, ways: dict[str, Figures], tolerance: float, **common: Any) -> Figures:
    """Train in several ways on the same batches and compare their first losses."""
    with training_data(at) as data:
        found = each({name: partial(trained, recipe_of(at, data, **common, **way)) for name, way in ways.items()})
    losses = [figures["loss"] for figures in found.values() if "loss" in figures]
    return found | {"the first losses agree": bool(losses) and max(losses) - min(losses) <= tolerance * losses[0]}


def near(at: Scale, change: Callable[[IlladaForMaskedLM], object], tolerance: float) -> Figures:
    """Compare states and gradients of a changed network with ours, under bf16; distances over norms, two layers."""
    results = []
    for act in (lambda _: None, change):
        model = network(at, at.small, torch.float32, num_hidden_layers=2, vocab_size=at.vocab_size).train()
        act(model)
        packing = Packing((at.window // 2, at.window // 4, at.window // 8, 3))
        ids_T = torch.arange(packing.tokens, device=at.device) % at.vocab_size
        with torch.autocast(at.device, torch.bfloat16):
            states_TD = model.model.packed(ids_T, packing).float()
        (states_TD * torch.arange(states_TD.numel(), device=at.device).sin().view_as(states_TD)).sum().backward()
        slopes = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append((states_TD.detach(), torch.cat(slopes)))
    states, slopes = (float((a - b).norm() / a.norm()) for a, b in zip(*results, strict=True))
    name = f"states and gradients within {tolerance}"
    return {"distance": {"states": states, "gradients": slopes}, name: max(states, slopes) <= tolerance}


def row_training(at: Scale) -> Figures:
    ways: dict[str, Figures] = {"auto": {}, "as the recipe says": {"recompute": "selective", "compile": True}}
    return compared(at, ways, 1e-3, share=4)  # two windows of 8192 a pass: 60 GB by the estimate


def row_recompute(at: Scale) -> Figures:
    kinds = ("none", "selective", "full")
    found = compared(at, {kind: {"recompute": kind} for kind in kinds}, 1e-3, share=at.windows)
    options = EstimateOptions(gpu="cpu" if at.device == "cpu" else "h100", vocab_size=at.vocab_size)
    expected = estimate(recipe_of(at, "", share=at.windows), options).memory
    return found | {kind: found[kind] | {"estimated": expected[kind].peak / 1e9} for kind in kinds}


def row_varlen(at: Scale) -> Figures:
    """Tokens/s of attention count a forward and a backward pass of one layer of the large shape."""
    kernels, found = ("sdpa", "varlen"), {}
    model = network(at, at.large)
    heads = (model.config.num_attention_heads, *2 * (model.config.num_key_value_heads,))
    for name, packing in (("windows", windows(4, at.window)), ("documents", documents())):
        shapes = [(packing.tokens, count, model.config.head_dim) for count in heads]
        parts = [torch.randn(s, device=at.device, dtype=torch.bfloat16, requires_grad=True) for s in shapes]
        for kernel in kernels:
            attend = partial(packed_attention, *parts, packing, kernel)
            seconds = timed(at, lambda attend=attend: attend().sum().backward())
            found[f"{name}, {kernel}"] = {"tokens/s": packing.tokens / seconds, "runs": len(packing.groups)}
    for kernel in kernels:
        model.set_attn_implementation(kernel)
        settings = settings_of(at, max_new_tokens=at.block, cache="frozen")
        prompts = asked(model, [1 + 37 * i % at.prompt for i in range(8)])
        found[f"8 prompts, frozen, {kernel}"] = generated(model, prompts, settings)
    del model
    found |= near(at, lambda changed: changed.set_attn_implementation("varlen"), 0.1)
    return found | compared(at, {kind: {"attention": kind, "kernels": "plain"} for kind in kernels}, 1e-3, layers=4)


def row_liger(at: Scale) -> Figures:
    found = near(at, use_liger, 0.1)
    return found | compared(at, {kind: {"kernels": kind} for kind in ("plain", "liger")}, 1e-3, layers=4)


def row_fp8(at: Scale) -> Figures:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        raise NotHereError(f"needs a GPU of compute capability {FP8_CAPABILITY}")
    found = near(at, partial(use_fp8, device=torch.device(at.device)), 0.5)
    return found | compared(at, {dtype: {"dtype": dtype, "compile": True} for dtype in ("bf16", "fp8")}, 1e-2, layers=4)


def one_of(rank: int, count: int, port: int, recipe: Recipe, file: Path) -> None:
    """Train as process `rank` of `count`, as torchrun would have started it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    figures = trained(recipe)
    if rank == 0:
        write_json(file, figures)


def row_processes(at: Scale) -> Figures:
    if at.device == "cuda" and torch.cuda.device_count() < 2:
        raise NotHereError("needs two GPUs")
    found: Figures = {}
    with training_data(at) as data:
        for count in (1, 2):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            sent = (count, port, recipe_of(at, data, 4, share=4), Path(data) / f"{count}.json")
            torch.multiprocessing.start_processes(one_of, sent, nprocs=count, start_method=START[at.device])
            found[f"{count}"] = read_json(sent[-1])
    one, two = (figures["loss"] for figures in found.values())
    return found | {"the first losses agree": abs(one - two) <= 1e-3 * one}


# Scoring, serving, loading


@torch.inference_mode()
def plain_log_p(model: IlladaForMaskedLM, pair: Pair, masked: Any) -> torch.Tensor:
    """Return log p of the masked ids of a candidate, from one forward pass with all logits."""
    context, candidate = (torch.tensor(part, device=model.device) for part in pair)
    masked = torch.as_tensor(masked, device=model.device)
    seen = torch.cat((context, candidate.masked_fill(masked, model.config.mask_id)))
    logits = model(seen[None]).logits[0, len(context) :][masked].float()
    logits[:, model.config.mask_id] = -torch.inf
    return logits.log_softmax(-1).gather(1, candidate[masked][:, None])[:, 0]


def plain_confidences(model: IlladaForMaskedLM, pairs: list[Pair]) -> list[float]:
    totals = [0.0] * len(pairs)
    for i, pair in enumerate(pairs):
        masked = np.ones(len(pair[1]), dtype=np.bool_)
        while masked.any():
            best, place = plain_log_p(model, pair, masked).max(0)
            totals[i] += float(best)
            masked[np.flatnonzero(masked)[int(place)]] = False
    return totals


def plain_likelihoods(model: IlladaForMaskedLM, pairs: list[Pair]) -> list[float]:
    seen = [zip(*views(len(candidate), 16, 0), strict=True) for _, candidate in pairs]
    of_each = zip(pairs, seen, strict=True)
    return [sum(w * float(plain_log_p(model, pair, masked).sum()) for masked, w in drawn) for pair, drawn in of_each]


def row_scoring(at: Scale) -> Figures:
    methods: dict[str, tuple[Callable[..., list[float]], Callable[..., list[float]]]] = {
        "confidence": (confidence_scores, plain_confidences),
        "likelihood": (partial(likelihood_scores, samples=16), plain_likelihoods),
    }
    model, found = network(at, at.large), {}
    context, *candidates = asked(model, [100, *(4 + i % 13 for i in range(at.candidates))])
    pairs: list[Pair] = [(context, candidate) for candidate in candidates]
    for name, (ours, plain) in methods.items():
        times = [timed(at, partial(score, model, pairs), 1) for score in (ours, plain)]
        speeds = {"items/s": len(pairs) / times[0], "items/s of the plain loop": len(pairs) / times[1]}
        found[name] = speeds | {"times": times[1] / times[0]}
    model = network(at, at.large, torch.float32, num_hidden_layers=2)
    for name, (ours, plain) in methods.items():
        found[f"fp32: {name} agrees"] = np.allclose(ours(model, pairs), plain(model, pairs), rtol=1e-4, atol=1e-3)
    return found


def row_server(at: Scale) -> Figures:
    tokenizer = train_tokenizer(["one two three four"], 280)
    layers = min(8, at.large.get("num_hidden_layers", 8))
    model = network(at, at.large, num_hidden_layers=layers, vocab_size=len(tokenizer))
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        write_model(folder, folder, model.config, tensors, model.dtype, "", tokenizer=tokenizer)
        del model, tensors
        sizes = {"block_length": at.block, "max_new_tokens": 2 * at.block, "limit": 4, "requests": 4 * at.batches[-1]}
        load: Figures = {"mixes": ["short"], "clients": list(at.batches), "rates": [4.0], "seconds": 5.0}
        rows = bench_serve(BenchServeOptions(str(folder), device=at.device, **sizes, **load))["rows"]
    found: Figures = {}
    for row in rows:
        (alone,) = row["alone"].values()
        times = {} if row["rate"] else {"times the plain loop": alone["times"]}
        found[row["load"]] = {"answers/s": row["answers_per_second"], **times, "p50 s": row["latency"]["p50"]}
    found["every answer came"] = all(set(row["statuses"]) == {"ok"} for row in rows)
    return found | {"answers as alone": not any(row["mixed_up"] for row in rows)}


def quantised(at: Scale, folder: str, way: str) -> Figures:
    files = {"model": f"{folder}/model", "text": None, "reference": f"{folder}/reference.pt"}
    found = measure_quantised(
        argparse.Namespace(**files, way=way, lengths=[64], head=BLOCK, device=at.device, repeats=5, saved=False)
    )
    figures = {"load s": found["load_seconds"], "weights GB": found["weights"], "GB": found["gpu_peak"]}
    return figures | {"forwards/s": 1 / statistics.median(found["seconds_64"]), "KL": found["kl"]}


def row_quantised(at: Scale) -> Figures:
    with TemporaryDirectory() as folder:
        with torch.device(at.device):
            random_model(at.large["preset"], None, f"{folder}/model")
        torch.set_default_dtype(torch.float32)
        return each({way: partial(quantised, at, folder, way) for way in (PLAIN, "int8", "int4", "nf4")})
