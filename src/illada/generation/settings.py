"""How to generate: the one schema of `generate`, of the command line and of the server. Imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from illada.errors import IlladaError

if TYPE_CHECKING:
    from illada.model.transformer import IlladaForMaskedLM

MOST = 1e6
"""Largest temperature, guidance, boost and penalty."""


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of one request (spec §5); the defaults are the paper's variable-length decoding.

    Fixed-length generation, as the paper uses for HumanEval, is one block: block_length equal to max_new_tokens. A
    causal model generates one token after the other; for it the settings in `OF_DIFFUSION` must keep their defaults.

    Args:
        max_new_tokens: most tokens to generate; cut to what the context leaves and rounded down to whole blocks.
        block_length: masks appended at a time (paper: 32 mostly).
        steps_per_block: forward passes per block, none for one token a pass; fewer commit several tokens at once.
        temperature: of Gumbel-max sampling; 0 takes the most probable token.
        top_k: draw from this many most probable tokens only, and from those tied with the last; none for all. Needs a
            temperature above 0, like top_p.
        top_p: draw a token only if the more probable tokens together have less than this probability, counted at the
            temperature and within the top_k; 1 for all.
        repetition_penalty: divides the positive logits of every id in the prompt and among the committed tokens and
            multiplies the negative ones; 1 for none, above 1 against repetition.
        seed: of sampling and of random remasking; the answer depends on it and on the prompt, never on the batch.
        eos_token_id: id or ids that end the answer; none to go on to the full length.
        stop: strings that end the answer; they need a tokenizer.
        remasking: which tokens steps_per_block commits first: "low_confidence" the most probable; "margin" those at
            the positions whose best id leads the second by the most probability (arXiv:2502.06768); "random" random
            ones (LLaDA's baseline).
        guidance_scale: w of classifier-free guidance against a masked prompt; 0 for none, otherwise twice the work.
        threshold: commit every token of at least this probability, and always the most probable one, instead of
            steps_per_block: faster, and not the paper's decoding.
        entropy_bound: commit the positions of least entropy instead of steps_per_block: as many as keep the sum of
            their entropies, less the largest of them, within this many nats. It bounds what choosing them at once can
            cost (EB-sampler, arXiv:2505.24857).
        later_masks: keep the masks of all later blocks in view from the start: LLaDA's semi-autoregressive form.
        think_boost: logit added, rising along the answer, to the next id of `</think>` until it is written; 0 for none
            (authors' evaluation code: 100). Needs a tokenizer.
        think_boost_power: exponent of that rise (authors' evaluation code: 3; HumanEval 1).
        cache: "none": every pass sees all tokens afresh, which is exact. The others keep keys and values of the tokens
            before the active block, which is faster and not the paper's decoding: "prefix" renews them in the first
            pass of every block; "frozen" computes a finished block once more, together with the first pass of the next
            block, and never again; "adaptive" is "frozen" and renews everything after a doubtful step.
        refresh_below: the adaptive cache is renewed after a step that committed a token of less than this probability.
        speculate: compute up to this many expected future steps together with each step, and take those whose state
            really came about: fewer passes, more positions, the same tokens. At a high temperature few come about.

    Raises:
        IlladaError: when a value is out of range or two of them contradict each other.
    """

    max_new_tokens: int = 256
    block_length: int = 32
    steps_per_block: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    eos_token_id: int | tuple[int, ...] | None = 2
    stop: tuple[str, ...] = ()
    remasking: Literal["low_confidence", "margin", "random"] = "low_confidence"
    guidance_scale: float = 0.0
    threshold: float | None = None
    entropy_bound: float | None = None
    later_masks: bool = False
    think_boost: float = 0.0
    think_boost_power: float = 3.0
    cache: Literal["none", "prefix", "frozen", "adaptive"] = "none"
    refresh_below: float = 0.5
    speculate: int = 0

    def __post_init__(self) -> None:
        """Check every value; lists become tuples."""
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        if isinstance(self.stop, str):
            raise IlladaError(f"stop must be a list of strings, got the string {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))
        if not all(isinstance(text, str) and text for text in self.stop):
            raise IlladaError(f"stop must hold strings that are not empty, got {list(self.stop)}")
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _require(self.block_length >= 1, "block_length", self.block_length, "at least 1")
        if self.steps_per_block is not None:
            wanted = f"between 1 and block_length {self.block_length}"
            _require(1 <= self.steps_per_block <= self.block_length, "steps_per_block", self.steps_per_block, wanted)
        for name in ("temperature", "guidance_scale", "think_boost", "think_boost_power"):
            value = getattr(self, name)
            # The upper bound keeps sums of logits finite in fp32.
            _require(0 <= value <= MOST, name, value, f"between 0 and {MOST:g}")
        _require(0 <= self.seed < 1 << 63, "seed", self.seed, "between 0 and 2^63 - 1")
        _require(all(i >= 0 for i in self.eos_ids), "eos_token_id", self.eos_token_id, "at least 0 (or none)")
        known = self.remasking in ("low_confidence", "margin", "random")
        _require(known, "remasking", self.remasking, "low_confidence, margin or random")
        if self.threshold is not None:
            _require(0 < self.threshold <= 1, "threshold", self.threshold, "above 0 and at most 1")
        if self.entropy_bound is not None:
            holds = math.isfinite(self.entropy_bound) and self.entropy_bound >= 0
            _require(holds, "entropy_bound", self.entropy_bound, "finite and at least 0")
        rules = [n for n in ("steps_per_block", "threshold", "entropy_bound") if getattr(self, n) is not None]
        if len(rules) > 1:
            raise IlladaError(f"{' and '.join(rules)} each say how many tokens a step commits: give one of them")
        if self.remasking != "low_confidence" and rules not in ([], ["steps_per_block"]):
            raise IlladaError(
                f"{rules[0]} has an order of its own: leave out remasking {self.remasking}, or give steps_per_block"
            )
        self._check_sampling()
        known = self.cache in ("none", "prefix", "frozen", "adaptive")
        _require(known, "cache", self.cache, "none, prefix, frozen or adaptive")
        _require(0 < self.refresh_below <= 1, "refresh_below", self.refresh_below, "above 0 and at most 1")
        if self.cache != "adaptive" and self.refresh_below != type(self).refresh_below:
            raise IlladaError(
                f"refresh_below does nothing with cache {self.cache}: give cache adaptive or leave it out"
            )
        _require(self.speculate >= 0, "speculate", self.speculate, "at least 0")

    def _check_sampling(self) -> None:
        penalty = self.repetition_penalty
        _require(1 / MOST <= penalty <= MOST, "repetition_penalty", penalty, f"between {1 / MOST:g} and {MOST:g}")
        if self.top_k is not None:
            _require(self.top_k >= 1, "top_k", self.top_k, "at least 1")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        if not self.temperature and (self.top_k is not None or self.top_p < 1):
            raise IlladaError("top_k and top_p do nothing at temperature 0: give a temperature or leave them out")

    def left_to_right(self) -> "GenerationSettings":
        """Return the settings under which one step of the engine adds the next token of a causal model.

        The keys and values of all tokens before it are kept, which is exact in a causal model.

        Raises:
            IlladaError: when a setting was changed that is about masks.
        """
        refuse_masks(vars(self))
        return replace(self, block_length=1, cache="frozen")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end the answer, possibly none."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id


OF_DIFFUSION = (
    "block_length",
    "steps_per_block",
    "remasking",
    "guidance_scale",
    "threshold",
    "entropy_bound",
    "later_masks",
    "cache",
    "refresh_below",
    "speculate",
)
"""Settings about masks."""


def refuse_masks(values: Mapping[str, Any]) -> None:
    """Check settings by name for a causal model: those about masks must keep their defaults.

    Raises:
        IlladaError: when they do not.
    """
    fixed = {"block_length": 1, "cache": "frozen"}  # `left_to_right` sets these
    defaults = {name: getattr(GenerationSettings, name) for name in OF_DIFFUSION if name in values}
    changed = [name for name, default in defaults.items() if values[name] not in (default, fixed.get(name, default))]
    if changed:
        raise IlladaError(f"a causal model adds one token at a time: leave out {' and '.join(changed)}")


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise IlladaError(f"{name} must be {wanted}, got {value}")


def settings_for(model: "IlladaForMaskedLM", settings: GenerationSettings) -> GenerationSettings:
    """Return the settings with the model's own end-of-sequence ids."""
    eos = model.config.eos_token_id
    return replace(settings, eos_token_id=tuple(eos) if isinstance(eos, list) else eos)
