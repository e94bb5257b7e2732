"""Which tokens each training step sees, and where attention ends (paper §2.1, §2.2; spec §3–4).

A *sample* is a window of the token stream (iLLaDA's rule) or one example (the older LLaDA rule). It is cut into
*segments*, between which there is no attention. What step n sees is a pure function of (seed, n), so resuming needs
only n, and every process of a run can compute the plan of the whole step while it loads only its own part.

In a mixture, `rng.pick_source` picks the source of sample k of a run: over any stretch of the run the sources have
their shares, and each source goes through its own epochs, every epoch in a new order with new noise.

Windows lie at the same places in every epoch, unless `shift_windows` moves them (ours, as the paper does not say). Then
an epoch reads its source as a ring, from a token on that is drawn for (seed, source, epoch): windows stay disjoint and
as many as before, every token comes to stand at every position of a window, and the tokens left over (fewer than a
window) are others in each epoch. There is no attention across the end of the source.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from illada import rng
from illada.data.shards import Shards
from illada.diffusion.noise import PAPER, Noise
from illada.errors import IlladaError

Boundaries = Literal["window", "document"]
Rule = Literal["illada", "llada"]


@dataclass(frozen=True)
class Segment:
    """A stretch of the token stream whose tokens attend to each other and to nothing else."""

    sample: int
    epoch: int
    part: int
    """Number of the segment inside its sample."""
    start: int
    """First token, counted from the beginning of the stream."""
    length: int
    offset: int
    """Position of the first token inside its sample: noise is keyed by position in the sample."""
    visible: int = 0
    """Leading tokens that are never masked (the prompt, under the older LLaDA rule)."""
    padding: int = 0
    """EOS tokens appended (the older LLaDA rule)."""
    complement: bool = False
    """The other view of a segment: masked is what the first view shows."""

    @property
    def size(self) -> int:
        """Tokens in the batch, padding included."""
        return self.length + self.padding


@dataclass
class Batches:
    """The training set as a function from step number to segments.

    `samples` is the number of samples in one pass over all sources together.

    Args:
        shards: the prepared tokens, of one source or several.
        window: tokens of a sample; under the older LLaDA rule the longest example (longer ones are cut at the end).
        samples_per_step: global batch, in samples.
        seed: of order, splits and noise.
        split_probability: chance that a window is split into two segments (paper: 0.3).
        boundaries: "window": documents in one segment see each other (default, inherited); "document": each document
            is its own segment.
        rule: "illada": the whole window may be masked; "llada": prompt visible, EOS-padded, response-normalised.
        eos_token_id: padding of the older LLaDA rule.
        shift_windows: each epoch cuts its windows at other places (see above); does not concern the older LLaDA rule.
        noise: of the training. If complementary, a step holds half as many samples, each followed by its complement.

    Raises:
        IlladaError: when the shards do not fill one sample or hold preference pairs.
    """

    shards: Shards
    window: int
    samples_per_step: int
    seed: int
    split_probability: float = 0.3
    boundaries: Boundaries = "window"
    rule: Rule = "illada"
    eos_token_id: int | None = None
    shift_windows: bool = False
    noise: Noise = PAPER

    def __post_init__(self) -> None:
        """Count the samples of each source."""
        sources, llada = self.shards.sources, self.rule == "llada"
        if self.shards.kind == "preference":
            raise IlladaError(f"{sources[0].name} holds preference pairs: they are data for `illada dpo`")
        self._counts = [source.documents if llada else source.tokens // self.window for source in sources]
        self._first_sample = list(accumulate(self._counts, initial=0))
        self.samples = self._first_sample[-1]
        for source, count in zip(sources, self._counts, strict=True):
            if count == 0:
                raise IlladaError(
                    f"{source.name} holds {source.tokens} tokens, less than one window of {self.window}: "
                    "prepare more text or set a smaller data.window"
                )
        if llada and (self.shards.kind != "chat" or self.eos_token_id is None):
            names = " and ".join(source.name for source in sources)
            raise IlladaError(f"the llada rule needs prompts and answers: prepare {names} with --kind chat")

    def chosen(self, step: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield the samples of a step of so many, each with the epoch in which it is seen."""
        shares = [source.share for source in self.shards.sources]
        for number in range(step * count, (step + 1) * count):
            source, turn = rng.pick_source(number, shares, self.seed, rng.TURN)
            epoch, place = divmod(turn, self._counts[source])
            place = rng.shuffled_index(place, self._counts[source], self.seed, rng.ORDER, epoch)
            yield self._first_sample[source] + place, epoch

    def plan(self, step: int) -> list[list[Segment]]:
        """Return the segments of every sample of a step."""
        count = self.samples_per_step // (2 if self.noise.complementary else 1)
        segments_of = self._example if self.rule == "llada" else self._window
        samples = [segments_of(*one) for one in self.chosen(step, count)]
        if self.rule == "llada":
            # The longest of the step, not of the micro-batch: padding counts in the loss, which must not depend on how
            # the step is divided (ours).
            longest = max(segments[0].length for segments in samples)
            samples = [[replace(segment, padding=longest - segment.length)] for (segment,) in samples]
        if self.noise.complementary:
            samples = [view for one in samples for view in (one, [replace(part, complement=True) for part in one])]
        return samples

    def _window(self, sample: int, epoch: int) -> list[Segment]:
        number = bisect_right(self._first_sample, sample) - 1
        source = self.shards.sources[number]
        start = (sample - self._first_sample[number]) * self.window
        if self.shift_windows:
            start += int(rng.uniform_int(self.seed, rng.SHIFT, number, epoch) * source.tokens)
            start %= source.tokens
        # A shifted window may go on at the beginning of its source, behind `head` tokens.
        head, first = min(self.window, source.tokens - start), source.first_token
        edges = {0, head, self.window}
        if self.boundaries == "document":
            stretches = (first + start, first + start + head), (first, first + self.window - head)
            ends = [end for stretch in stretches for end in self.shards.document_ends_within(*stretch)]
            edges |= {(end - first - start) % source.tokens for end in ends}
        if self.window > 1 and rng.uniform_int(self.seed, rng.SPLIT, sample, epoch, 0) < self.split_probability:
            edges.add(1 + int(rng.uniform_int(self.seed, rng.SPLIT, sample, epoch, 1) * (self.window - 1)))
        return [
            Segment(sample, epoch, part, first + (start + edge) % source.tokens, end - edge, edge)
            for part, (edge, end) in enumerate(pairwise(sorted(edges)))
        ]

    def _example(self, sample: int, epoch: int) -> list[Segment]:
        start, end, prompt = self.shards.document_span(sample)
        length = min(end - start, self.window)
        # A prompt that fills the window would leave nothing to learn, so its last token counts as the answer.
        return [Segment(sample, epoch, 0, start, length, 0, visible=min(prompt, length - 1))]


def read_segments(segments: Sequence[Segment], shards: Shards, eos_token_id: int | None = None) -> Tensor:
    """Return the clean ids of segments, one after another with their padding: int64 [T]."""
    tokens = shards.read_all((segment.start, segment.length) for segment in segments)
    if any(segment.padding for segment in segments):
        assert eos_token_id is not None
        ends = np.cumsum([segment.length for segment in segments])
        tokens = np.insert(tokens, ends.repeat([segment.padding for segment in segments]), eos_token_id)
    return torch.from_numpy(tokens)
