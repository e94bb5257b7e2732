"""Small forward passes over buffers of fixed size, each captured once as a CUDA graph and replayed (ours).

A graph replays kernels with the addresses and shapes of its capture, without the host's work for each kernel, which is
what a small pass waits for. So a pass is laid out in a bucket: its rows, their length and the keys that they see are
rounded up. Padding repeats what is there (a row its first position, a pass its first row): it holds nothing odd, and
what it writes to the pool is there already. A pass that suits no bucket goes the eager way.

Shape letters: N rows of a pass · R rows of its bucket · L length · K keys · T packed tokens · D width.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from illada.errors import IlladaError
from illada.model.attention import KERNELS, Packing
from illada.model.kv_cache import CacheView, KVCache, PagePool
from illada.model.transformer import IlladaForMaskedLM, IlladaModel

LENGTHS = 32
"""Lengths of rows are rounded up to multiples of it; rows, and the keys that they see, to powers of two."""
WARM_UP = 2
"""Passes before a capture, on another stream as torch's notes on CUDA ask: libraries set themselves up in them."""


class CudaGraph:
    """A function captured as a CUDA graph; a call replays it and returns its result, always in the same memory.

    All graphs share one memory pool. torch's notes allow that for graphs replayed in the order of their capture, as one
    may read what another left there. Ours read only what lies outside (buffers, weights, the storage of keys and
    values), and each result is copied before the next replay.
    """

    def __init__(self, run: Callable[[], Tensor], others: Sequence[Any]):
        run()  # on this stream first: the storage that it may create is used there
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=others[0].graph.pool() if others else None):
            self.result = run()

    def __call__(self) -> Tensor:
        """Replay it."""
        self.graph.replay()
        return self.result


class Bucket(NamedTuple):
    """What is fixed in a graph."""

    rows: int
    length: int
    keys: int
    """How many each row sees; more than its length, so that attention takes the mask that it is given."""
    kernel: str
    causal: bool


@dataclass(frozen=True)
class Rectangle(Packing):
    """Rows of one length, of which a tensor says where they write and read and what they see."""

    view: CacheView | None = None

    def views(self, device: torch.device, causal: bool) -> list[CacheView | None]:  # noqa: ARG002
        """Return the one view."""
        return [self.view]


class Step:
    """The pass of one bucket: its buffers, and the network over them."""

    def __init__(self, model: IlladaModel, bucket: Bucket, storage: PagePool):
        self.model, self.bucket, self.storage = model, bucket, storage
        self.replay: Callable[[], Tensor] | None = None
        """`run`, once it is captured."""
        places = bucket.rows * bucket.length
        sizes = [places, places, bucket.rows, places, bucket.rows * bucket.keys, places]
        # One buffer, so that one copy from the host fills it.
        self.buffer = torch.zeros(sum(sizes), dtype=torch.int64, device=model.device)
        self.ids = self.buffer.new_zeros(places)
        self.source, self.position, self.seen, self.write, self.read, self.wanted = self.buffer.split(sizes)

    def fill(self, input_ids_T: Tensor, packing: Packing, wanted: Sequence[NDArray[np.int64]]) -> None:
        """Lay out a pass whose segments all have caches."""
        rows, length, keys = self.bucket[:3]
        size_N1 = np.array(packing.lengths)[:, None]
        start_N1 = np.array([past.start for past in packing.caches if past])[:, None]
        column_NL = np.arange(length) * (np.arange(length) < size_N1)
        source_NL, position_NL = np.cumsum(size_N1)[:, None] - size_N1 + column_NL, start_N1 + column_NL
        seen_N1 = np.array([past.seen for past in packing.caches if past])[:, None]
        read_NK = np.minimum(np.arange(keys), seen_N1 - 1)
        slots = [
            np.stack([past.slots[at] for past, at in zip(packing.caches, at_NX, strict=True) if past])
            for at_NX in (position_NL, read_NK)
        ]
        row_R = np.arange(rows) * (np.arange(rows) < len(size_N1))
        laid_out = [part[row_R].ravel() for part in (source_NL, position_NL, seen_N1, *slots)]
        flat = np.concatenate([*laid_out, *(row * length + at for row, at in enumerate(wanted))])
        self.buffer[: len(flat)].copy_(torch.from_numpy(flat))
        self.ids.copy_(input_ids_T[self.source])

    def run(self) -> Tensor:
        """Return the hidden states [R·L, D] of what lies in the buffers, from nothing else but weights and storage."""
        rows, length, keys, _, causal = self.bucket
        last = self.position.view(rows, length, 1) if causal else self.seen.view(rows, 1, 1) - 1
        mask = (torch.arange(keys, device=last.device) <= last)[:, None]
        view = CacheView(self.storage, self.write, self.read, self.read, mask)
        past = KVCache(self.storage)
        past.start, past.seen = keys - length, keys
        packing = Rectangle((length,) * rows, (past,) * rows, view=view)
        return IlladaModel.packed(self.model, self.ids, packing, self.position)


class GraphedPasses:
    """`IlladaModel.packed` by graphs, in inference mode: it takes the place of that method (see `use_cuda_graphs`).

    Weights may change in place. Where they or the storage of keys and values have moved, graphs are captured anew; of a
    tensor that was put in the place of another it learns nothing. For one thread at a time.

    Args:
        model: the trunk, on one device.
        graph: captures a function, given the captured ones that live; `CudaGraph`, or a stand-in without CUDA.
        most_positions: most positions of a bucket. Larger passes keep a GPU busy while the host prepares the next
            kernel (at the 8B shape, computed from an H100's limits, from about 250 on; not measured).
        most_graphs: most buckets; passes that suit none of them go the eager way.
    """

    def __init__(
        self,
        model: IlladaModel,
        graph: Callable[[Callable[[], Tensor], Sequence[Any]], Callable[[], Tensor]] = CudaGraph,
        most_positions: int = 512,
        most_graphs: int = 128,
    ):
        self.model, self.graph = model, graph
        self.most_positions, self.most_graphs = most_positions, most_graphs
        self.steps: dict[Bucket, Step] = {}
        self.storage = PagePool()
        """The keys and values that graphs know; one engine's pool has them at a time."""
        self.owner: Callable[[], PagePool | None] = lambda: None
        self.weights: list[Tensor] = []
        self.addresses: list[int] = []
        """Of weights and storage when the graphs were captured."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Be copied without graphs: they know this model's addresses."""
        return type(self), (self.model, self.graph, self.most_positions, self.most_graphs)

    def __call__(
        self,
        input_ids_T: Tensor,
        packing: Packing,
        position_ids_T: Tensor | None = None,
        wanted: Sequence[NDArray[np.int64]] | None = None,
    ) -> Tensor:
        """Return what `IlladaModel.packed` returns, up to rounding; arguments and errors as there."""
        pools = {cache.pool for cache in packing.caches if cache}
        lent = all(self._lend(pool) for pool in pools)
        bucket = self._bucket(packing) if lent and position_ids_T is None else None
        if bucket is None or wanted is None or packing.tokens != input_ids_T.numel():
            return IlladaModel.packed(self.model, input_ids_T, packing, position_ids_T, wanted)
        # Rows without a cache are guests in the pool: from the next pass on others may have their pages.
        pool = next(iter(pools), None) or self.owner() or PagePool()
        caches = packing.caches or (None,) * len(packing.lengths)
        pasts = tuple(cache or KVCache(pool) for cache in caches)
        for past, cache, length in zip(pasts, caches, packing.lengths, strict=True):
            if cache is None:
                past.begin(0, length)
        self.storage.pages = pool.pages
        self._forget_moved()
        if not self.steps:
            self.weights = [*self.model.parameters(), *self.model.buffers()]
        if bucket not in self.steps:
            self.steps[bucket] = Step(self.model, bucket, self.storage)
        step = self.steps[bucket]
        step.fill(input_ids_T, Packing(packing.lengths, pasts), wanted)
        for past in set(pasts).difference(caches):
            past.release()
        with torch.cuda.device_of(input_ids_T):
            if step.replay is None:
                step.replay = self.graph(step.run, [other.replay for other in self.steps.values() if other.replay])
                self.addresses = self._addresses()
            # Indexing copies: the next replay overwrites the states.
            return step.replay()[step.wanted[: sum(map(len, wanted))]]

    def _bucket(self, packing: Packing) -> Bucket | None:
        """Return the smallest bucket of a pass, or None if it must go the eager way."""
        config, lengths = self.model.config, packing.lengths
        kernel = config._attn_implementation
        if not torch.is_inference_mode_enabled() or torch.is_autocast_enabled(self.model.device.type):
            return None
        if self.model.training or kernel not in KERNELS or not lengths or not all(lengths):
            return None
        length = LENGTHS * -(-max(lengths) // LENGTHS)
        seen = [past.seen for past in packing.caches if past]
        keys = _power_of_two(max([length, *seen]) + 1)
        bucket = Bucket(_power_of_two(len(lengths)), length, keys, kernel, config.causal)
        room = bucket in self.steps or len(self.steps) < self.most_graphs
        return bucket if room and bucket.rows * length <= self.most_positions else None

    def _lend(self, pool: PagePool) -> bool:
        """Let a pool have the storage, unless it has begun elsewhere or another one has pages in use there."""
        owner = self.owner()
        if owner is pool:
            return True
        if pool.layers or (owner and len(owner.free) < owner.pages):
            return False
        if owner:
            owner.layers = []
        pool.layers = self.storage.layers
        self.owner = weakref.ref(pool)
        return True

    def _forget_moved(self) -> None:
        """Grow the storage to its pages; drop all graphs if anything has moved since their capture."""
        for number, layer in enumerate(self.storage.layers):
            self.storage.layer(number, layer)
        if self.steps and self._addresses() != self.addresses:
            self.steps.clear()

    def _addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in (*self.weights, *self.storage.layers)]


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def use_cuda_graphs(model: IlladaForMaskedLM) -> None:
    """Run small passes of generation and scoring as CUDA graphs; `del model.model.packed` ends it.

    Answers stay the same up to rounding. The first pass of a shape takes a few passes' time. Call it after everything
    that puts tensors into the model (adapters, quantisation).

    Raises:
        IlladaError: when the model does not lie on one CUDA device.
    """
    places = {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}
    if len(places) != 1 or model.device.type != "cuda":
        raise IlladaError(f"CUDA graphs need a model on one CUDA device, this one is on {', '.join(sorted(places))}")
    model.model.packed = GraphedPasses(model.model)  # type: ignore[method-assign]
