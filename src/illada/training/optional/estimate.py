"""What a recipe will need: memory of one GPU by kind, speed, days and cost, without training.

Memory is not guessed from a formula: one forward and backward pass of the real network and the real loss runs on fake
tensors, which have shapes and no contents, and every allocation is counted. Only what sharding adds (FSDP2 in
training/parallel.py: fp32 shards on the GPUs of a copy, one block gathered while it computes and one ahead) is
arithmetic. The driver, buffers inside kernels and communication libraries, and fragmentation are not counted, so a
tenth stays free.

`benchmarks/estimate.py` compares with the memory of real runs.

Shape letters: T packed tokens · M masked tokens.
"""

import copy
import dataclasses
import math
import os
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from illada.data.shards import Shards
from illada.diffusion.loss import chunked_cross_entropy
from illada.errors import IlladaError
from illada.model.attention import Packing
from illada.model.config import IlladaConfig
from illada.model.transformer import IlladaForMaskedLM
from illada.training.optim import muon_matrices
from illada.training.optional.dropout import Dropout
from illada.training.optional.flops import GPUS, block_parameters, check_shape, flops_per_token
from illada.training.optional.options import EstimateOptions, Work
from illada.training.parallel import check_divisible, recompute
from illada.training.recipe import LORA_TARGETS, Recipe
from illada.weights.adapters import add_adapter
from illada.weights.load import load_config
from illada.weights.runs import model_folder

Checkpointing = Literal["none", "selective", "full"]
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "full")

FREE_SHARE = 0.1
"""Share of a GPU's memory to leave to what is not counted (ours)."""

DEEP = 40
"""Blocks of the deepest network that is rehearsed whole (8B has 32)."""

MOST_TOKENS = 2**24
"""Tokens of one pass: far more than any GPU holds."""

_GB = 1e9


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU under one kind of activation checkpointing; each kind at its own maximum."""

    weights: int
    """Shards of the fp32 weights (frozen ones under an adapter in their own type), and of a copy of the start; what
    writes answers."""
    gathered: int
    """Weights in the computation's type, gathered while they are used; 0 for one GPU."""
    gradients: int
    optimizer: int
    """Moments, and the average of the weights (training.average)."""
    activations: int
    """What the backward pass needs from the trunk; for one GPU under bf16 this includes the weights' bf16 copies."""
    loss: int
    """Head and loss: one chunk of logits, the head in the computation's type, the gradients of head and rows."""
    backward: int
    """What the backward pass needs besides: gradients of one block's activations and weights."""
    peak: int
    """The most at one time in a step: less than the sum, as activations shrink while gradients grow."""
    saving: int
    """Besides, from the first checkpoint on: the copy of weights and moments from which checkpoints are written; 0 on a
    GPU, because the copy lies in main memory."""


@dataclass(frozen=True)
class Estimate:
    """The answer of `estimate`; bytes, tokens, seconds and the currency of the price."""

    parameters: int
    parameters_in_blocks: int
    parameters_trained: int
    vocab_size: int
    gpus: int
    copies: int
    """Copies of the weights, each in shards over gpus / copies (HSDP)."""
    gpu: str
    windows_per_pass: int
    passes_per_step: int
    memory: dict[Checkpointing, Memory]
    memory_available: int
    tokens_per_step: int
    steps: int | None
    """None when the recipe counts epochs and the size of the data is not known."""
    flops_per_token: float
    mfu: float | None
    """None for a CPU, whose peak is not in the table; the next four fields are None as well then."""
    tokens_per_second: float | None
    days: float | None
    gpu_hours: float | None
    cost: float | None

    def fits(self, kind: Checkpointing) -> bool:
        """Say whether the peak and a checkpoint's copy leave `FREE_SHARE` of the memory."""
        memory = self.memory[kind]
        return memory.peak + memory.saving <= (1 - FREE_SHARE) * self.memory_available


def estimate(recipe: Recipe, options: EstimateOptions, work: Work = Work()) -> Estimate:  # noqa: B008 (frozen)
    """Estimate what it takes to carry out a recipe, whose data need not exist yet.

    Args:
        recipe: the run.
        options: the machine.
        work: what a sample of this kind of training costs.

    Raises:
        IlladaError: when the recipe or an option cannot be used.
    """
    _check(recipe, options, work)
    gpus, gpu, settings, data = options.gpus, options.gpu, recipe.training, recipe.data
    shards, config = _open(recipe, options.vocab_size, work)
    share = math.ceil(settings.samples_per_step / (gpus // recipe.parallel.tensor))
    samples = min(settings.samples_per_batch, share)
    windows, passes = math.ceil(samples * work.windows), math.ceil(share / samples)
    _check_pass(recipe, windows)
    parameters, trained, memory = _rehearse(recipe, config, windows, passes, gpus, gpu == "cpu", work)
    tokens = round(settings.samples_per_step * data.window * work.windows)
    available = options.data_tokens or (shards.tokens if shards else None)
    count = work.samples or (None if available is None else available // data.window)
    steps = settings.steps if count is None else settings.count_steps(count)
    # Two segments of a uniformly split window hold two thirds of its pairs.
    mean_length = data.window * (1 if work.whole else 1 - data.split_probability / 3)
    flops = flops_per_token(config, mean_length, trained if recipe.lora.rank else 0)
    flops += flops_per_token(config, mean_length) / 3 * work.forward / work.windows
    machine_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    speed = None if gpu == "cpu" else gpus * GPUS[gpu].teraflops * 1e12 * options.mfu / flops
    days = None if speed is None or steps is None else steps * tokens / speed / 86_400
    gpu_hours = None if days is None else gpus * days * 24
    return Estimate(
        parameters=parameters,
        parameters_in_blocks=block_parameters(config),
        parameters_trained=trained,
        vocab_size=config.vocab_size,
        gpus=gpus,
        copies=recipe.parallel.replicate,
        gpu=gpu,
        windows_per_pass=windows,
        passes_per_step=passes,
        memory=memory,
        memory_available=machine_memory if gpu == "cpu" else int(GPUS[gpu].gigabytes * _GB),
        tokens_per_step=tokens,
        steps=steps,
        flops_per_token=flops,
        mfu=None if gpu == "cpu" else options.mfu,
        tokens_per_second=speed,
        days=days,
        gpu_hours=gpu_hours,
        cost=None if gpu_hours is None or options.price is None else gpu_hours * options.price,
    )


def _check(recipe: Recipe, options: EstimateOptions, work: Work) -> None:
    # Where the run will write and read does not matter here.
    named = dataclasses.replace(recipe, output=recipe.output or "run")
    if not work.problems:
        named.data = dataclasses.replace(recipe.data, train=recipe.data.train or "data")
    named.check()
    gpus, gpu, mfu, price = options.gpus, options.gpu, options.mfu, options.price
    if gpu not in (*GPUS, "cpu"):
        raise IlladaError(f"no gpu {gpu!r}: choose one of {', '.join(GPUS)} or cpu")
    if gpus < 1 or (gpu == "cpu" and gpus > 1):
        raise IlladaError(f"gpus is {gpus}: it must be at least 1, and 1 on a cpu")
    copies, tensor, windows = recipe.parallel.replicate, recipe.parallel.tensor, recipe.training.samples_per_step
    if gpus % (copies * tensor):
        raise IlladaError(
            f"parallel.replicate {copies} times parallel.tensor {tensor} must divide the number of GPUs, {gpus}"
        )
    if not 0 < mfu <= 1:
        raise IlladaError(f"mfu is {mfu:g}: it must be above 0 and at most 1")
    if price is not None and price < 0:
        raise IlladaError(f"price is {price:g}: it must be at least 0")
    if windows < gpus // tensor:
        raise IlladaError(
            f"training.samples_per_step {windows} leaves some of {gpus} GPUs without a window: raise it or lower gpus"
        )


def _check_pass(recipe: Recipe, windows: int) -> None:
    if windows * recipe.data.window > MOST_TOKENS:
        raise IlladaError(
            f"training.samples_per_batch: {windows} windows of {recipe.data.window} tokens are more than a pass holds "
            f"({MOST_TOKENS:,} tokens): lower one of them"
        )


def table(result: Estimate) -> str:
    """Return the estimate as text for people."""
    lines = [
        f"{result.parameters:,} parameters, {result.parameters_in_blocks:,} of them in blocks, "
        f"{result.parameters_trained:,} trained; vocabulary {result.vocab_size:,}",
        f"{result.gpus} x {result.gpu}, {result.memory_available / _GB:.0f} GB each"
        f"{'' if result.copies == 1 else f', {result.copies} copies of the weights'}: "
        f"{result.windows_per_pass} windows a pass, {result.passes_per_step} passes a step",
        "",
        f"{'GB on each, by activation checkpointing':40}" + "".join(f"{kind:>11}" for kind in CHECKPOINTING),
    ]
    for part in dataclasses.fields(Memory):
        cells = (getattr(result.memory[kind], part.name) / _GB for kind in CHECKPOINTING)
        lines.append(f"  {part.name:38}" + "".join(f"{cell:>11.3g}" for cell in cells))
    fits = ("yes" if result.fits(kind) else "no" for kind in CHECKPOINTING)
    lines += [f"  {f'fits, with {FREE_SHARE:.0%} kept free':38}" + "".join(f"{word:>11}" for word in fits), ""]
    work = f"{result.tokens_per_step:,} tokens a step, {result.flops_per_token / 1e9:.3g} GFLOP a token"
    if result.tokens_per_second is None or result.mfu is None:
        return "\n".join([*lines, f"{work}; speed: not known for a cpu"])
    speed = result.tokens_per_second
    lines.append(f"{work}; at {result.mfu:.0%} MFU {speed:,.0f} tokens/s ({speed / result.gpus:,.0f} on each)")
    if result.steps is None or result.days is None or result.gpu_hours is None:
        return "\n".join(
            [*lines, "duration: not known, the recipe counts epochs: prepare its data or give data_tokens"]
        )
    cost = "" if result.cost is None else f", cost {result.cost:,.2f}"
    total = result.steps * result.tokens_per_step
    lines.append(
        f"{result.steps:,} steps, {total:,} tokens: {result.days:,.2f} days, {result.gpu_hours:,.1f} GPU hours{cost}"
    )
    return "\n".join(lines)


def _open(recipe: Recipe, vocab_size: int | None, work: Work) -> tuple[Shards | None, IlladaConfig]:
    """Return the prepared data if it exists (a URL must), and the network's shape, which must fit the recipe."""
    places, window = recipe.data.train, recipe.data.window
    names = [places] if isinstance(places, str) else list(places)
    exists = not work.problems and bool(places) and all("://" in name or Path(name).is_dir() for name in names)
    shards = Shards.open(places) if exists else None
    config = _config(recipe, vocab_size or (shards.vocab_size if shards else None))
    if window > config.max_position_embeddings:
        raise IlladaError(f"data.window {window} is longer than the model's context {config.max_position_embeddings}")
    check_shape(config)
    check_divisible(config, recipe.parallel.tensor)
    return shards, config


def _config(recipe: Recipe, vocab_size: int | None) -> IlladaConfig:
    if recipe.model.start is not None:
        return load_config(model_folder(recipe.model.start))
    assert recipe.model.preset is not None
    vocabulary = {} if vocab_size is None else {"vocab_size": vocab_size}
    return IlladaConfig.preset(recipe.model.preset, **{**recipe.model.changes(), **vocabulary})


class _Meter(TorchDispatchMode):
    """Counts the bytes of live tensors: `now`, its `peak`, and `peak_with_gradients`, which includes `gradients`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.peak_with_gradients = self.gradients = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it has allocated."""
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._add(storage, storage.nbytes())
        return outputs

    def ignore(self, tensor: Tensor) -> None:
        """Do not count a tensor that lives for the whole step."""
        self._add(tensor.untyped_storage(), 0)

    def move_gradient(self, parameter: Tensor) -> None:
        """Move the gradient of a parameter from `now` to `gradients`."""
        assert parameter.grad is not None
        size = self._sizes[parameter.grad.untyped_storage()._cdata]
        self._sizes[parameter.grad.untyped_storage()._cdata] = 0
        self.now -= size
        self.gradients += size

    def _add(self, storage: torch.UntypedStorage, size: int) -> None:
        self._sizes[storage._cdata] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        self.peak_with_gradients = max(self.peak_with_gradients, self.now + self.gradients)
        weakref.finalize(storage, self._remove, storage._cdata)

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _rehearse(
    recipe: Recipe, config: IlladaConfig, windows: int, passes: int, gpus: int, on_cpu: bool, work: Work
) -> tuple[int, int, dict[Checkpointing, Memory]]:
    """Return what `_rehearse_whole` does; of a deep network from two shallower ones, as each block adds as much."""
    layers, low, high = config.num_hidden_layers, DEEP // 2, DEEP
    if layers <= high:
        return _rehearse_whole(recipe, config, windows, passes, gpus, on_cpu, work)
    found = []
    for depth in (low, high):
        part = copy.deepcopy(config)
        part.num_hidden_layers = depth
        found.append(_rehearse_whole(recipe, part, windows, passes, gpus, on_cpu, work))

    def at_full_depth(few: int, many: int) -> int:
        return few + (many - few) * (layers - low) // (high - low)

    memory = {}
    for kind in CHECKPOINTING:
        few, many = (dataclasses.asdict(memory_of[kind]) for _, _, memory_of in found)
        memory[kind] = Memory(**{name: at_full_depth(few[name], many[name]) for name in few})
    return at_full_depth(found[0][0], found[1][0]), at_full_depth(found[0][1], found[1][1]), memory


def _rehearse_whole(
    recipe: Recipe, config: IlladaConfig, windows: int, passes: int, gpus: int, on_cpu: bool, work: Work
) -> tuple[int, int, dict[Checkpointing, Memory]]:
    """Run one micro-batch through the real network and loss on fake tensors, under each kind of checkpointing.

    Returns:
        the parameters of the whole network, the trained ones, and the memory of one GPU.
    """
    bf16 = recipe.training.dtype != "fp32"  # FP8 keeps bf16 activations
    model = _share_of_network(recipe, config)
    tensor, elsewhere = recipe.parallel.tensor, block_parameters(config) - block_parameters(model.config)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with FakeTensorMode():
        # In the types of the forward pass: FSDP2 hands it bf16 weights of the blocks, autocast makes its own copies.
        _fill(model.model.layers, torch.bfloat16 if bf16 and gpus > 1 else None)
        _fill(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        count = sum(p.numel() for p in trained)
        blocks = sum(p.numel() for p in model.model.layers.parameters())
        everything = sum(p.numel() for p in model.parameters())
        # A moment is fp32, as is the average; AdamW has two moments of each parameter, Muon one.
        each = 3 if recipe.training.average else 2
        optimizer = 4 * (each * count - sum(p.numel() for p in muon_matrices(model, recipe.training)))
        shards = gpus // recipe.parallel.replicate // tensor
        block, root = blocks // config.num_hidden_layers, everything - blocks
        once = recipe.parallel.gather == "step"
        gathered = (2 if bf16 else 4) * (blocks if once else 2 * block) + 4 * root if gpus > 1 else 0
        # The gradient of a block, and in the end of embedding and head, is summed over the GPUs in fp32.
        reduced = 4 * block if gpus > 1 else 0
        start = 4 * everything if work.copy else 0  # a copy of it, in fp32
        answering = 4 * everything if work.problems and (gpus > 1 or recipe.parallel.compile) else 0
        fixed = (weights + start + optimizer) // shards + answering + gathered
        gradients = 4 * count // (1 if once and passes > 1 else shards)
        memory: dict[Checkpointing, Memory] = {}
        dropout = Dropout(model, recipe.training.dropout, 0)
        for kind in CHECKPOINTING:
            recompute(model, kind)
            saved, loss, meter = _one_pass(model, dropout, recipe, windows, bf16, work)
            during = (
                gradients + meter.peak + reduced
                if passes > 1 or gpus > 1
                else max(gradients, meter.peak_with_gradients)
            )
            after = gradients + 8 * root if gpus > 1 else 0
            memory[kind] = Memory(
                weights=(weights + start) // shards + answering,
                gathered=gathered,
                gradients=gradients,
                optimizer=optimizer // shards,
                activations=saved,
                loss=loss,
                backward=max(0, meter.peak - saved - loss) + reduced,
                peak=fixed + max(during, after),
                saving=4 * count + optimizer if on_cpu else 0,
            )
    return everything + elsewhere, count + elsewhere, memory


def _share_of_network(recipe: Recipe, config: IlladaConfig) -> IlladaForMaskedLM:
    """Return the part of the network that one process of a group with shared heads holds, without memory."""
    part = copy.deepcopy(config)
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        setattr(part, name, getattr(config, name) // recipe.parallel.tensor)
    frozen = torch.bfloat16 if recipe.training.dtype != "fp32" and recipe.lora.rank else torch.float32
    # Not on fake tensors: PEFT moves layers, which they do not allow.
    with torch.device("meta"):
        model = IlladaForMaskedLM._from_config(part, dtype=frozen).train()
        if rank := recipe.lora.rank:
            add_adapter(model, rank, 2.0 * rank, recipe.lora.dropout, recipe.lora.targets or LORA_TARGETS, "", 0)
    return model


def _one_pass(
    model: IlladaForMaskedLM, dropout: Dropout, recipe: Recipe, windows: int, autocast: bool, work: Work
) -> tuple[int, int, _Meter]:
    """Return the bytes kept after the trunk, the bytes the loss adds at its peak, the meter after the backward pass."""
    packing = Packing(_lengths(recipe.data.window, windows, 0 if work.whole else recipe.data.split_probability))
    # The fullest of many micro-batches: p is uniform over the segments. A causal model predicts nearly all tokens.
    low, high = recipe.training.mask_range or (0.0, 1.0)
    if recipe.training.complementary:
        low, high = min(low, 1 - high), max(high, 1 - low)
    deviation = (high - low) * math.sqrt(1 / 12 / len(packing.lengths))
    share = 1.0 if model.config.causal or work.whole else min(high, (low + high) / 2 + 3 * deviation)
    with _Meter() as meter:
        hooks = []
        for parameter in model.parameters():
            meter.ignore(parameter)
            if parameter.requires_grad:
                hooks.append(parameter.register_post_accumulate_grad_hook(meter.move_gradient))
        ids_T = torch.zeros(packing.tokens, dtype=torch.int64)
        dropout.begin([ids_T], ids_T.device)
        rows_M = torch.arange(math.ceil(share * packing.tokens))
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            hidden_TD = model.model.packed(ids_T, packing)
            saved = meter.now
            meter.peak = meter.now
            loss = chunked_cross_entropy(
                hidden_TD[rows_M], model.lm_head.weight, ids_T[rows_M], torch.ones(len(rows_M))
            )
            del hidden_TD
            added = meter.peak - saved
        loss.backward()
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return saved, added, meter


def _lengths(window: int, windows: int, split_probability: float) -> tuple[int, ...]:
    """Return segment lengths of a typical micro-batch, longest first, with the average number of split windows."""
    split = round(windows * split_probability)
    cuts = [max(1, window * (i + 1) // (2 * (split + 1))) for i in range(split)]
    parts = [part for cut in cuts for part in (cut, window - cut)]
    return tuple(sorted([window] * (windows - split) + parts, reverse=True))


def _fill(part: torch.nn.Module, dtype: torch.dtype | None = None) -> None:
    """Give meta parameters storage (fake, in a fake mode) in their own type or another; tied ones stay tied."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in part.modules():
        for name, old in module._parameters.items():
            if old is not None and old.is_meta:
                if id(old) not in made:
                    tensor = torch.empty(old.shape, dtype=dtype or old.dtype)
                    made[id(old)] = torch.nn.Parameter(tensor, old.requires_grad)
                module._parameters[name] = made[id(old)]
