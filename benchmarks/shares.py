"""How much of a pass or a step is matrix products, and where does the rest go? The table of shares of RESULTS.md.

    python benchmarks/shares.py [--presets 1m 15m 50m 150m] [--dtypes fp32 bf16] [--threads 1 2] [--repeats 7]

Three kinds of work on random weights: a pass of the engine (one row in a block of 16 behind a prompt of 64, or 16 such
rows), scoring one pair (a context of 64, a candidate of 8), a training step (8 windows of 256, half of the
tokens masked, loss, gradients and AdamW). Every product and every call of attention that the work makes is noted with
the shapes, strides and types of what it gets; the same calls on random tensors, alone, are the bare time. Work and bare
calls take turns, in processor seconds; the share is the median of bare over work. The rest is what torch's profiler
sees in other operators, and what is no operator at all: Python, and the host's arrays.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from common import machine
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from illada.diffusion.loss import masked_loss
from illada.generation.engine import Engine
from illada.generation.settings import GenerationSettings
from illada.heap import keep_freed_memory
from illada.model.attention import Packing
from illada.model.config import PRESETS, IlladaConfig
from illada.model.transformer import IlladaForMaskedLM
from illada.scoring.confidence import confidence_scores
from illada.training.optim import make_optimizers, update
from illada.training.recipe import TrainingRecipe

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.linear.default}
ATTENTION = {
    aten.scaled_dot_product_attention.default,  # as a whole where no gradient is wanted
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}
KINDS = {
    "norms": ("rms_norm", "rsqrt", "mean", "pow"),
    "softmax, choice": ("logsumexp", "exp", "log", "max", "argmax", "topk", "sub", "sum", "scatter_add", "gather"),
    "copies, casts": ("copy_", "cat", "clone", "to", "_to_copy", "index", "index_put_", "embedding", "stack", "fill_"),
    "silu, rotation, sums": ("silu", "mul", "addcmul", "add", "neg", "silu_backward", "cos", "sin"),
    "optimiser": ("_fused_adamw_",),
}
"""The rest by what it is for."""
OTHER = "other operators"

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Products(TorchDispatchMode):
    """Notes the products and the calls of attention that are made while it is on, as calls on random tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Call] = []
        self.attention: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a call and make it."""
        of = self.products if func in PRODUCTS else self.attention if func in ATTENTION else None
        if of is not None:
            copies = torch.utils._pytree.tree_map_only(torch.Tensor, _alike, (args, kwargs or {}))
            of.append((func, *copies))
        return func(*args, **(kwargs or {}))


def _alike(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape, strides and type, with numbers of its own."""
    if not x.is_floating_point():
        return x.clone()
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).normal_()


def processor_seconds(work: Callable[[], Any]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def engine_pass(model: IlladaForMaskedLM, rows: int) -> Callable[[], Any]:
    """Return the work of a pass of the engine over some rows that are never finished."""
    engine = Engine(model, None)
    settings = GenerationSettings(max_new_tokens=4096, block_length=16, eos_token_id=None, steps_per_block=16)
    waiting = iter(range(10**9))

    def work() -> None:
        while len(engine.running) + len(engine.waiting) < rows:
            ids = [(7 * next(waiting) + 13 * at) % (model.config.vocab_size - 9) for at in range(64)]
            engine.enter(engine.request(ids, settings))
        engine.step()
        for request in [one for one in engine.running if one.block >= 32]:  # as long as a short answer
            engine.cancel(request.index)

    return work


def score_one(model: IlladaForMaskedLM) -> Callable[[], Any]:
    """Return the work of scoring one pair: eight passes."""
    pair = ([*range(10, 74)], [*range(80, 88)])
    return lambda: confidence_scores(model, [pair])


def training_step(model: IlladaForMaskedLM, dtype: str) -> Callable[[], Any]:
    """Return the work of one optimiser step; bf16 is autocast over weights in fp32, as in `illada pretrain`."""
    model = model.float().train()
    optimizers = make_optimizers(model, TrainingRecipe())
    draw = torch.Generator().manual_seed(0)
    clean = torch.randint(9, model.config.vocab_size, (8 * 256,), generator=draw)
    masked, packing = torch.rand(clean.shape, generator=draw) < 0.5, Packing((256,) * 8)
    weight = torch.full(clean.shape, 1 / len(clean))

    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16) if dtype == "bf16" else nullcontext():
            loss = masked_loss(model, clean, masked, weight, packing)
        loss.backward()
        update(optimizers, 1e-4)

    return work


def measured(work: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Return milliseconds of work, of its bare products, of attention, and of the rest by kind."""
    for _ in range(3):
        work()
    with Products() as noted:
        work()

    def replay(calls: list[Call]) -> Callable[[], None]:
        def all_of_them() -> None:
            with torch.no_grad():
                for func, args, kwargs in calls:
                    func(*args, **kwargs)

        return all_of_them

    bare, attention = replay(noted.products), replay(noted.attention)
    bare(), attention()
    turns = [tuple(map(processor_seconds, (work, bare, attention))) for _ in range(repeats)]
    whole, products, attended = (1e3 * statistics.median(column) for column in zip(*turns, strict=True))
    found = {
        "work": whole,
        "products": products,
        "share": statistics.median(b / a for a, b, _ in turns),
        "with attention": statistics.median((b + c) / a for a, b, c in turns),
        "attention": attended,
    }
    profiles = [_by_kind(work) for _ in range(repeats)]
    # The profiler counts time that other processes took: the least is nearest to what an operator needs.
    seen = {kind: min(one.get(kind, 0.0) for one in profiles) for kind in [*KINDS, OTHER]}
    found |= seen
    found["no operator"] = max(0.0, whole - products - attended - sum(seen.values()))
    return found


def shape_of(size: str) -> dict[str, Any]:
    """Return the shape of a preset, or of the recipe that pre-trains a model of this size."""
    if size in PRESETS:
        return PRESETS[size]
    model = yaml.safe_load((Path(__file__).parents[1] / "recipes" / f"{size}-pretrain.yaml").read_text())["model"]
    return {**PRESETS[model.pop("preset")], **model}


def _by_kind(work: Callable[[], Any]) -> dict[str, float]:
    """Return the milliseconds of one run's operators by kind, without products and attention."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    found: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        name = event.key.removeprefix("aten::")
        if event.key.startswith("aten::") and not any(part in name for part in ("mm", "linear", "scaled_dot")):
            kind = next((kind for kind, names in KINDS.items() if name in names), OTHER)
            found[kind] += event.self_cpu_time_total / 1e3
    return found


def rows(options: argparse.Namespace) -> Any:
    """Yield a name and the figures of each row."""
    for threads in options.threads:
        torch.set_num_threads(threads)
        for preset in options.presets:
            for dtype in options.dtypes:
                config = IlladaConfig(**{**shape_of(preset), "vocab_size": options.vocab_size})
                torch.manual_seed(0)
                weights = torch.bfloat16 if dtype == "bf16" else torch.float32
                model = IlladaForMaskedLM._from_config(config, dtype=weights).eval()
                works = {
                    "engine, 1 row": engine_pass(model, 1),
                    "engine, 16 rows": engine_pass(model, 16),
                    "score one": score_one(model),
                }
                for name, work in works.items():
                    yield (preset, dtype, threads, name), measured(work, options.repeats)
                yield (preset, dtype, threads, "train"), measured(training_step(model, dtype), options.repeats)


def main() -> None:
    """Print the table row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["1m", "15m", "50m", "150m"], help="or sizes of recipes")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--vocab_size", type=int, default=8192)
    options = parser.parse_args()
    keep_freed_memory()  # as every command does
    print(
        f"{machine()}; vocabulary {options.vocab_size:,}, processor milliseconds, median of {options.repeats} turns\n"
    )
    kinds = [*KINDS, OTHER, "no operator"]
    head = ["preset", "type", "threads", "work", "ms", "bare products", "share", "with attention", *kinds]
    print(f"| {' | '.join(head)} |\n|{'---|' * 4}{'---:|' * (len(head) - 4)}")
    for name, found in rows(options):
        shares = [f"{found[key]:.0%}" for key in ("share", "with attention")]
        rest = [f"{found.get(kind, 0) / found['work']:.0%}" for kind in kinds]
        times = [f"{found[key]:.2f}" for key in ("work", "products")]
        print(f"| {' | '.join([*map(str, name), *times, *shares, *rest])} |", flush=True)


if __name__ == "__main__":
    main()
