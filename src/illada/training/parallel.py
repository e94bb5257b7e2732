"""Many processes as one run: which process computes what, weights in shards, errors raised together.

Every process takes its share of each step's windows (`noisy_batches`), whose noise does not depend on the division; the
sum of all gradients is the gradient of the step. Weights, gradients and optimiser lie in shards (FSDP2; Zhao et al.,
arXiv 2304.11277), gathered a block at a time. A process started without torchrun is alone and needs no group. The model
knows nothing of all this.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from illada.devices import choose_device
from illada.diffusion.causal import causal_loss
from illada.diffusion.loss import CrossEntropy, chunked_cross_entropy, masked_loss
from illada.errors import IlladaError
from illada.model.attention import Packing
from illada.model.config import IlladaConfig
from illada.model.transformer import IlladaForMaskedLM
from illada.training.recipe import Recipe

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them."""

    rank: int
    count: int
    device: torch.device
    """Where this process computes."""
    files: Any = None
    """A separate group for checkpoints, which a thread writes beside the training; None for a single process."""
    tensor: int = 1
    """How many neighbours compute the same windows together (parallel.tensor)."""

    @property
    def first(self) -> bool:
        """Whether this process writes and prints for all."""
        return self.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """Which share of each step's windows this process computes, and how many shares there are."""
        return self.rank // self.tensor, self.count // self.tensor

    def total(self, *values: float) -> list[float]:
        """Return the sum of each value over all shares; every process gets the same bits."""
        if self.count == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return (sums / self.tensor).tolist()

    def highest(self, *numbers: int) -> list[int]:
        """Return the largest of each number over all processes."""
        if self.count == 1:
            return list(numbers)
        maxima = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        dist.all_reduce(maxima, dist.ReduceOp.MAX)
        return maxima.tolist()

    def from_first(self, action: Callable[[], T]) -> T:
        """Let the first process act; all processes return its result or fail with its error (`raise_together`)."""
        result: list[Any] = [None]
        with self.raise_together():
            if self.first:
                result[0] = action()
        if self.count > 1:
            dist.broadcast_object_list(result, 0, device=self.device)
        return result[0]

    def first_of(self, message: str | None) -> str | None:
        """Return, in every process, the message of the lowest process that has one."""
        messages = [message]
        if self.count > 1:
            messages *= self.count
            dist.all_gather_object(messages, message)
        return next((message for message in messages if message is not None), None)

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """When the block raises IlladaError in any process, end all: the first raises it, the others exit in silence.

        Raises:
            IlladaError: the message of the lowest process that has one.
            SystemExit: instead, with code 2, on all processes but the first.
        """
        own_error: IlladaError | None = None
        try:
            yield
        except IlladaError as error:
            if self.count == 1:
                raise
            own_error = error
        message = self.first_of(None if own_error is None else str(own_error))
        if message is not None and self.first:
            raise IlladaError(message) from own_error
        if message is not None:
            sys.exit(2)


@contextmanager
def join(device: str, tensor: int = 1) -> Iterator[Processes]:
    """Join the processes that torchrun started, over NCCL on GPUs and Gloo on CPUs, or stand alone.

    Raises:
        IlladaError: when there is no such device, when this machine has fewer of them than processes, or when
            torchrun's variables are not set.
    """
    place = choose_device(device)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        if place.type == "cuda" and place.index:
            torch.cuda.set_device(place)  # kernels of Triton run on the current device
        yield Processes(0, 1, place)
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise IlladaError(f"WORLD_SIZE is {count} but {missing[0]} is not set: start several processes with torchrun")
    backend = "gloo"
    if place.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise IlladaError(
                f"this machine has {torch.cuda.device_count()} GPUs, fewer than processes: start one process per GPU"
            )
        place, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(place)
    elif place.type != "cpu":
        raise IlladaError(f"several processes need device cpu or cuda, not {place.type}: set training.device")
    dist.init_process_group(backend)
    try:
        yield Processes(dist.get_rank(), count, place, dist.new_group(backend="gloo"), tensor)
    finally:
        dist.destroy_process_group()


class Objective(nn.Module):
    """The training loss as a module, because FSDP gathers weights while a module's forward and backward run."""

    def __init__(
        self,
        model: IlladaForMaskedLM,
        device: torch.device,
        dtype: str,
        cross_entropy: CrossEntropy = chunked_cross_entropy,
    ):
        super().__init__()
        self.model, self.device, self.dtype, self.cross_entropy = model, device, dtype, cross_entropy
        self.gathers_once = False
        """Whether weights are gathered once in a step, not in every pass (parallel.gather)."""

    def forward(
        self,
        clean_T: Tensor,
        masked_T: Tensor,
        weight_T: Tensor,
        packing: Packing,
        entropy_T: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a batch in nats (see `masked_loss`, `causal_loss`), computed in the recipe's dtype."""
        half = self.dtype != "fp32"
        with torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext():
            if self.model.config.causal:
                return causal_loss(self.model, clean_T, masked_T, weight_T, packing, self.cross_entropy)
            return masked_loss(self.model, clean_T, masked_T, weight_T, packing, entropy_T, self.cross_entropy)


def distribute(
    model: IlladaForMaskedLM,
    recipe: Recipe,
    processes: Processes,
    cross_entropy: CrossEntropy = chunked_cross_entropy,
    loss: type[Objective] = Objective,
) -> Objective:
    """Move the model to its device, in shards when there are several processes; returns its loss of the given kind.

    Each block is gathered when it is needed and released afterwards, or all blocks are gathered for a whole step
    (parallel.gather); embedding, head and last norm are gathered once a pass. Master weights and sums of gradients are
    fp32. Under bf16 the blocks are gathered and computed in bf16, while the residual stream and everything outside the
    blocks stay fp32, as under autocast in one process (only the gains of the norms are rounded besides). Under fp8 the
    blocks are gathered in bf16 as well.

    Raises:
        IlladaError: when the processes do not divide into groups of parallel.tensor and these into parallel.replicate
            copies, or the heads not into groups.
    """
    settings, dtype, shares = recipe.parallel, recipe.training.dtype, processes.share[1]
    if processes.count % settings.tensor:
        raise IlladaError(
            f"parallel.tensor is {settings.tensor}: it must divide the number of processes, {processes.count}"
        )
    if shares % settings.replicate:
        groups = "processes" if settings.tensor == 1 else f"groups of {settings.tensor} processes"
        raise IlladaError(
            f"parallel.replicate is {settings.replicate}: it must divide the number of {groups}, {shares}"
        )
    recompute(model, settings.recompute)
    if settings.compile:
        model.model.compile_blocks()
    objective = loss(model.to(processes.device), processes.device, dtype, cross_entropy)
    if processes.count == 1:
        return objective
    shape = (settings.replicate, shares // settings.replicate, settings.tensor)
    whole_mesh = init_device_mesh(processes.device.type, shape, mesh_dim_names=("replicate", "shard", "tensor"))
    mesh = whole_mesh["replicate", "shard"] if settings.replicate > 1 else whole_mesh["shard"]
    if settings.tensor > 1:
        _split_heads(model, whole_mesh["tensor"])
    half = None if dtype == "fp32" else torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    objective.gathers_once = settings.gather == "step" or (settings.gather == "auto" and processes.device.type == "cpu")
    for module in _sharded(objective):
        if objective.gathers_once:
            module.set_reshard_after_forward(False, recurse=False)
        # The loss of each share is already divided by the tokens of the whole step, so gradients are summed.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return objective


def check_divisible(config: IlladaConfig, tensor: int) -> None:
    """Check that groups of `tensor` processes can share the heads and width of a network.

    Raises:
        IlladaError: when they cannot.
    """
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % tensor:
            raise IlladaError(
                f"parallel.tensor is {tensor}: it must divide {name} of the model, {getattr(config, name)}"
            )


def _split_heads(model: IlladaForMaskedLM, mesh: DeviceMesh) -> None:
    """Give each process of a group some of the heads and of the SwiGLU's width (Shoeybi et al., arXiv 1909.08053).

    Every process computes embedding, norms and head.
    """
    check_divisible(model.config, mesh.size())
    plan: dict[str, ParallelStyle] = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    plan |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    for block in model.model.layers:
        parallelize_module(block, mesh, plan)


def recompute(model: IlladaForMaskedLM, kind: Literal["none", "selective", "full"]) -> None:
    """Let the backward pass compute activations again: whole blocks, or all but matrix products and attention."""
    if kind == "none":
        model.activation_checkpointing_disable()
    else:
        context = {"context_fn": _keep_products} if kind == "selective" else {}
        model.activation_checkpointing_enable({"use_reentrant": False, **context})


def before_pass(objective: Objective, last: bool) -> None:
    """Prepare a pass: communication that happens once in a step, as the sum over copies, waits for the last pass."""
    if isinstance(objective, FSDPModule):
        if objective.gathers_once:
            objective.set_requires_gradient_sync(last)
            objective.set_reshard_after_backward(last)
        objective.set_requires_all_reduce(last)
        objective.set_is_last_backward(last)


def release(objective: Objective) -> None:
    """Free weights that stayed gathered because no backward pass followed."""
    for module in _sharded(objective):
        module.reshard()


def by_mesh(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group parameters by the mesh that they lie on, because torch's operations on many tensors take only one mesh."""
    groups: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(groups.values())


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the norm of all gradients together; all processes must call this."""
    norms = []
    for group in by_mesh(parameters):
        norm = torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return torch.linalg.vector_norm(torch.stack(norms))


def clip(parameters: Iterable[Tensor], largest: float, norm: Tensor) -> None:
    """Scale gradients whose norm is `norm` down to a norm of at most `largest`."""
    for group in by_mesh(parameters):
        torch.nn.utils.clip_grads_with_norm_(group, largest, norm)


def _sharded(objective: Objective) -> list[FSDPModule]:
    return [module for module in objective.modules() if isinstance(module, FSDPModule)]


def _keep_products() -> Any:
    """Keep the results of matrix products and attention; compute norms, rotations and the SwiGLU product again."""
    aten = torch.ops.aten
    attention = [
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.torch_attn._varlen_attn.default,
    ]
    return create_selective_checkpoint_contexts([aten.mm.default, *attention])
