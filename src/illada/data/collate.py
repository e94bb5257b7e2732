"""Noise for the segments of one optimiser step, and the weights that make their losses the step's loss (Eq. 1).

The autoregressive baseline sees the same segments without noise.

Shape letters: S segments · T packed tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from illada.data.batches import Rule, Segment, read_segments
from illada.data.shards import Shards
from illada.diffusion.noise import PAPER, Noise, masked_positions, masking_probability, stratified_times
from illada.model.attention import Packing


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the host."""

    clean_T: Tensor
    """Token ids, int64."""
    masked_T: Tensor
    """Tokens that the model does not see; for a causal model, tokens that it predicts from earlier ones; bool."""
    weight_T: Tensor
    """Weight of each token's cross-entropy, fp32; meaningful where masked."""
    packing: Packing
    probability_T: Tensor | None
    """The probability with which each token was masked, fp32; None without noise."""
    places: tuple[Tensor, Tensor, Tensor, Tensor]
    """Sample, epoch and position in the sample of each token, and whether it is in a complement: its key."""

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return clean ids, mask and weights on a device."""
        clean_T, masked_T, weight_T = (
            tensor.to(device, non_blocking=True) for tensor in (self.clean_T, self.masked_T, self.weight_T)
        )
        return clean_T, masked_T, weight_T


def noisy_batches(
    samples: Sequence[Sequence[Segment]],
    samples_per_batch: int,
    shards: Shards,
    seed: int,
    step: int,
    rule: Rule = "illada",
    eos_token_id: int | None = None,
    rank: int = 0,
    ranks: int = 1,
    causal: bool = False,
    noise: Noise = PAPER,
) -> Iterator[Batch]:
    """Draw t for all segments of a step, then noise and pack the segments of one of `ranks` processes, batch by batch.

    How the step is divided into processes and batches changes neither noise nor weights. Every process gets the same
    number of batches, because all processes gather sharded weights together: one that runs out of samples repeats the
    first sample with weight 0.

    With these weights the losses of the batches add up to the loss of the step: 1/(p * tokens of the step) (paper
    Eq. 1), or 1/(p * answer tokens * examples) under the older LLaDA rule. For a causal model every token but the first
    of its segment counts, under the older rule only those of the answer; p is 1, and only tokens that count are tokens.
    `noise` may change the distribution of t and put something else in the place of p in the weights. Complements share
    the t of their segment and are tokens, samples and examples of their own.
    """
    segments = [segment for sample in samples for segment in sample]
    columns = torch.tensor([(s.sample, s.part, s.epoch) for s in segments if not s.complement]).T
    drawn = noise.times(stratified_times(seed, step, *columns)).tolist()
    time_of = dict(zip(map(tuple, columns.T.tolist()), drawn, strict=True))
    times = [time_of[s.sample, s.part, s.epoch] for s in segments]
    unpredicted = int(causal)  # tokens at the start of a segment
    tokens = sum(segment.size - unpredicted for segment in segments)
    starts = list(accumulate((len(sample) for sample in samples), initial=0))
    share = -(-len(samples) // ranks)
    end = min(share * (rank + 1), len(samples))
    for first in range(share * rank, share * (rank + 1), samples_per_batch):
        idle = first >= end
        place = slice(0, starts[1]) if idle else slice(starts[first], starts[min(first + samples_per_batch, end)])
        pairs = list(zip(segments[place], times[place], strict=True))
        # Neighbours of equal length share one attention call.
        pairs.sort(key=lambda pair: -pair[0].size)
        norms = [(s.size - max(unpredicted, s.visible)) * len(samples) if rule == "llada" else tokens for s, _ in pairs]
        batch = _noisy_batch(pairs, norms, shards, seed, eos_token_id, causal, noise)
        yield replace(batch, weight_T=torch.zeros_like(batch.weight_T)) if idle else batch


def _noisy_batch(
    pairs: Sequence[tuple[Segment, float]],
    norms: Sequence[int],
    shards: Shards,
    seed: int,
    eos_token_id: int | None,
    causal: bool,
    noise: Noise,
) -> Batch:
    """Noise and pack segments with their times; without noise for a causal model."""
    segments = [segment for segment, _ in pairs]
    size_S = torch.tensor([segment.size for segment in segments])

    def spread(values: Sequence[int] | Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).repeat_interleave(size_S)

    clean_T = read_segments(segments, shards, eos_token_id)
    packing = Packing(tuple(segment.size for segment in segments))
    within_T = packing.positions()
    visible_T = spread([s.visible for s in segments], torch.int64)
    norm_T = spread(norms, torch.float64)
    complement_T = spread([s.complement for s in segments], torch.bool)
    sample_T, epoch_T = (spread([getattr(s, name) for s in segments], torch.int64) for name in ("sample", "epoch"))
    places = (sample_T, epoch_T, spread([s.offset for s in segments], torch.int64) + within_T, complement_T)
    if causal:
        return Batch(clean_T, within_T >= visible_T.clamp(min=1), (1 / norm_T).float(), packing, None, places)
    time_T = spread([time for _, time in pairs], torch.float64)
    probability_T = masking_probability(time_T, *noise.band)
    masked_T = (masked_positions(seed, *places[:3], probability_T) ^ complement_T) & (within_T >= visible_T)
    probability_T = torch.where(complement_T, 1 - probability_T, probability_T)
    weight_T = 1 / (noise.divisor(time_T, probability_T) * norm_T)
    return Batch(clean_T, masked_T, weight_T.float(), packing, probability_T.float(), places)
