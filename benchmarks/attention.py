"""How should packed segments attend on a CPU? One SDPA call per run of equal lengths (ours), a nested jagged tensor, or
one padded and masked call: forward and backward, seconds of paired repetitions, as a markdown table.

    OMP_NUM_THREADS=1 python benchmarks/attention.py
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import machine
from torch import Tensor

from illada import rng
from illada.model.attention import Packing, packed_attention

HEADS, GROUPS, WIDTH = 6, 2, 64  # the preset of 15 million parameters

Attend = Callable[[Tensor, Tensor, Tensor, Packing], Tensor]


def nested_attention(query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, packing: Packing) -> Tensor:
    """Attend by one call on jagged tensors, which need each key repeated for its group."""
    offsets = torch.tensor([0, *packing.lengths]).cumsum(0)
    repeat = query_THD.shape[1] // key_TGD.shape[1]
    parts = (query_THD, key_TGD.repeat_interleave(repeat, 1), value_TGD.repeat_interleave(repeat, 1))
    limits = {"min_seqlen": min(packing.lengths), "max_seqlen": max(packing.lengths)}
    jagged = [torch.nested.nested_tensor_from_jagged(x, offsets, **limits).transpose(1, 2) for x in parts]
    return F.scaled_dot_product_attention(*jagged).transpose(1, 2).values()


def padded_attention(query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, packing: Packing) -> Tensor:
    """Attend by one call on rows padded to the longest segment, with the padding masked out."""
    lengths = torch.tensor(packing.lengths)
    real_SL = torch.arange(max(packing.lengths)) < lengths[:, None]

    def padded(x: Tensor) -> Tensor:
        return x.new_zeros(*real_SL.shape, *x.shape[1:]).masked_scatter(real_SL[..., None, None], x).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        padded(query_THD), padded(key_TGD), padded(value_TGD), attn_mask=real_SL[:, None, None], enable_gqa=True
    )
    return out.transpose(1, 2)[real_SL]


def windows(count: int = 16, length: int = 256) -> Packing:
    """Return a training batch by iLLaDA's rule, in which 30 % of the windows are split in two, the longest first."""
    lengths: list[int] = []
    for n in range(count):
        if rng.uniform_int(0, n, 0) < 0.3:
            cut = 1 + int(rng.uniform_int(0, n, 1) * (length - 1))
            lengths += [cut, length - cut]
        else:
            lengths.append(length)
    return Packing(tuple(sorted(lengths, reverse=True)))


def documents(count: int = 64) -> Packing:
    """Return documents of 8 to 256 tokens, mostly short ones; longest first."""
    lengths = [int(8 * 32 ** rng.uniform_int(1, n)) for n in range(count)]
    return Packing(tuple(sorted(lengths, reverse=True)))


def seconds(attend: Attend, packing: Packing, parts: list[Tensor]) -> float:
    """Return the time of one forward and backward pass."""
    for x in parts:
        x.grad = None
    start = time.perf_counter()
    attend(parts[0], parts[1], parts[2], packing).sum().backward()
    return time.perf_counter() - start


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--repeats", type=int, default=30)
    repeats = arguments.parse_args().repeats
    warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
    print(f"{machine()}; ", end="")
    print(f"{HEADS} heads, {GROUPS} groups of width {WIDTH}, fp32, median of {repeats} paired repetitions\n")
    columns = ["batch", "tokens", "segments", "runs", *(f"{way} (ms)" for way in ("ours", "nested", "padded"))]
    columns += ["nested / ours", "padded / ours"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    ways: dict[str, Attend] = {"ours": packed_attention, "nested": nested_attention, "padded": padded_attention}
    for name, packing in (("16 windows of 256, 30 % split", windows()), ("64 mixed documents", documents())):
        torch.manual_seed(0)
        parts = [torch.randn(packing.tokens, heads, WIDTH, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS)]
        want = packed_attention(*parts, packing)
        for attend in ways.values():
            torch.testing.assert_close(attend(*parts, packing), want, rtol=1e-4, atol=1e-5)
            seconds(attend, packing, parts)
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way, attend in ways.items():
                times[way].append(seconds(attend, packing, parts))
        cells = [f"{1000 * statistics.median(times[way]):.1f}" for way in ways]
        for way in ("nested", "padded"):
            ratios = [b / a for a, b in zip(times["ours"], times[way], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f}")
        counts = f"{packing.tokens} | {len(packing.lengths)} | {len(packing.groups)}"
        print(f"| {name} | {counts} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
