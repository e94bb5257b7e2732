"""How to generate: the one schema of `generate`, of the command line and of the server. Imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from illada.errors import IlladaError

if TYPE_CHECKING:
    from illada.model.transformer import IlladaForMaskedLM

Remasking = Literal["low_confidence", "margin", "random"]
Cache = Literal["none", "prefix", "dual", "frozen", "adaptive"]

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
        min_p: draw a token only if it has at least this share of the best one's probability, at the temperature.
        repetition_penalty: divides the positive logits of every id in the prompt and among the committed tokens and
            multiplies the negative ones; 1 for none, above 1 against repetition.
        presence_penalty: subtracted from the logit of every id among the committed tokens of the answer; 0 for none.
        frequency_penalty: subtracted once for each time that the id stands there; 0 for none.
        logit_bias: what to add to the logits of some ids, as a dictionary; -100 practically bans an id.
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
            pass of every block; "dual" needs later_masks and keeps those of the later masks as well (Fast-dLLM,
            arXiv:2505.22618); "frozen" computes a finished block once more, together with the first pass of the next
            block, and never again; "adaptive" is "frozen" and renews everything after a doubtful step.
        refresh_below: the adaptive cache is renewed after a step that committed a token of less than this probability.
        speculate: compute up to this many expected future steps together with each step, and take those whose state
            really came about: fewer passes, more positions, the same tokens. At a high temperature few come about.
        regex: what the whole answer, or what fills each slot of a template, must match (docs/structured.md).
        json_schema: the schema of the JSON that it must be; on the command line the file that holds it.
        choices: the texts of which it must be one.
        slot_regex: what must fill each slot of a template, in order.

    Raises:
        IlladaError: when a value is out of range or two of them contradict each other.
    """

    max_new_tokens: int = 256
    block_length: int = 32
    steps_per_block: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int = 0
    eos_token_id: int | tuple[int, ...] | None = 2
    stop: tuple[str, ...] = ()
    remasking: Remasking = "low_confidence"
    guidance_scale: float = 0.0
    threshold: float | None = None
    entropy_bound: float | None = None
    later_masks: bool = False
    think_boost: float = 0.0
    think_boost_power: float = 3.0
    cache: Cache = "none"
    refresh_below: float = 0.5
    speculate: int = 0
    regex: str | None = None
    json_schema: dict[str, Any] | bool | str | None = None
    choices: tuple[str, ...] = ()
    slot_regex: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check every value; lists become tuples."""
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for name in ("stop", "choices", "slot_regex"):
            texts = getattr(self, name)
            holds = not isinstance(texts, str) and all(isinstance(text, str) for text in texts)
            self._require(name, holds, "a list of texts")
            object.__setattr__(self, name, tuple(texts))
        self._require("regex", self.regex is None or isinstance(self.regex, str), "a text")
        self._require("stop", all(self.stop), "a list of texts that are not empty")
        self._require("max_new_tokens", self.max_new_tokens >= 1, "at least 1")
        self._require("block_length", self.block_length >= 1, "at least 1")
        if self.steps_per_block is not None:
            holds = 1 <= self.steps_per_block <= self.block_length
            self._require("steps_per_block", holds, f"between 1 and block_length {self.block_length}")
        for name in ("temperature", "guidance_scale", "think_boost", "think_boost_power"):
            # The upper bound keeps sums of logits finite in fp32.
            self._require(name, 0 <= getattr(self, name) <= MOST, f"between 0 and {MOST:g}")
        holds = 1 / MOST <= self.repetition_penalty <= MOST
        self._require("repetition_penalty", holds, f"between {1 / MOST:g} and {MOST:g}")
        for name in ("presence_penalty", "frequency_penalty"):
            self._require(name, abs(getattr(self, name)) <= MOST, f"between {-MOST:g} and {MOST:g}")
        holds = all(token >= 0 and abs(bias) <= MOST for token, bias in (self.logit_bias or {}).items())
        self._require("logit_bias", holds, f"ids of the vocabulary with numbers between {-MOST:g} and {MOST:g}")
        self._require("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        self._require("seed", 0 <= self.seed < 1 << 63, "between 0 and 2^63 - 1")
        self._require("eos_token_id", all(i >= 0 for i in self.eos_ids), "at least 0 (or none)")
        for name, choices in (("remasking", get_args(Remasking)), ("cache", get_args(Cache))):
            self._require(name, getattr(self, name) in choices, f"{', '.join(choices[:-1])} or {choices[-1]}")
        self._require("threshold", self.threshold is None or 0 < self.threshold <= 1, "above 0 and at most 1")
        holds = self.entropy_bound is None or 0 <= self.entropy_bound < math.inf
        self._require("entropy_bound", holds, "finite and at least 0")
        self._require("top_k", self.top_k is None or self.top_k >= 1, "at least 1")
        for name in ("top_p", "refresh_below"):
            self._require(name, 0 < getattr(self, name) <= 1, "above 0 and at most 1")
        self._require("speculate", self.speculate >= 0, "at least 0")
        self._check_together()

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise IlladaError(f"{name} must be {wanted}, got {getattr(self, name)}")

    def _check_together(self) -> None:
        """Refuse settings that contradict each other or do nothing."""
        rules = [n for n in ("steps_per_block", "threshold", "entropy_bound") if getattr(self, n) is not None]
        if len(rules) > 1:
            raise IlladaError(f"{' and '.join(rules)} each say how many tokens a step commits: give one of them")
        if self.remasking != "low_confidence" and rules not in ([], ["steps_per_block"]):
            raise IlladaError(
                f"{rules[0]} has an order of its own: leave out remasking {self.remasking}, or give steps_per_block"
            )
        if not self.temperature and (self.top_k is not None or self.top_p < 1 or self.min_p):
            raise IlladaError("top_k, top_p and min_p do nothing at temperature 0: give one, or leave them out")
        forms = self.forms + [name for name in ("stop", "think_boost") if self.forms and getattr(self, name)]
        if len(forms) > 1:
            raise IlladaError(f"{forms[0]} and {forms[1]} cannot be used together: leave one of them out")
        if self.cache != "adaptive" and self.refresh_below != type(self).refresh_below:
            raise IlladaError(
                f"refresh_below does nothing with cache {self.cache}: give cache adaptive or leave it out"
            )
        if self.cache == "dual" and not self.later_masks:
            raise IlladaError("cache dual keeps the later masks too: give later_masks, or take cache prefix")

    def left_to_right(self) -> "GenerationSettings":
        """Return the settings under which one step of the engine adds the next token of a causal model.

        The keys and values of all tokens before it are kept, which is exact in a causal model.

        Raises:
            IlladaError: when a setting was changed that is about masks.
        """
        refuse_masks(vars(self))
        return replace(self, block_length=1, cache="frozen")

    @property
    def forms(self) -> list[str]:
        """The settings that say what the answer must match; one at most."""
        return [name for name in FORMS if getattr(self, name) not in (None, ())]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end the answer, possibly none."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id


FORMS = ("regex", "json_schema", "choices", "slot_regex")
"""Settings that say what an answer must match."""

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


def settings_for(model: "IlladaForMaskedLM", settings: GenerationSettings) -> GenerationSettings:
    """Return the settings with the model's own end-of-sequence ids."""
    eos = model.config.eos_token_id
    return replace(settings, eos_token_id=tuple(eos) if isinstance(eos, list) else eos)
