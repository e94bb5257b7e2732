"""The configuration of an iLLaDA model and its presets (paper §2.1 and Table 1; spec §1)."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from illada.errors import IlladaError
from illada.model.released import FAMILY_IDS, read_config

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


class IlladaConfig(PreTrainedConfig):
    """Shape and special ids of a masked diffusion language model; a transformers configuration, model_type "illada".

    Attributes:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU.
        num_hidden_layers: number of blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads; 0 or None means as many as query heads.
        head_dim: width of one head; 0 or None means hidden_size / num_attention_heads.
        max_position_embeddings: context length in tokens; generation and training refuse more.
        rope_theta: base wavelength of the rotary embedding. Not published; default ours.
        rms_norm_eps: added to the mean square. Not published; default ours.
        initializer_range: standard deviation of the linear layers at the start. Not published; default ours.
        causal: whether a position sees only itself and earlier positions, and its logits predict the next token: the
            autoregressive baseline (ours), with which diffusion can be compared at equal data and size.
        tie_word_embeddings: whether the LM head is the embedding (iLLaDA: yes, LLaDA: no).
        mask_token_id: the id that stands for a masked token. The released iLLaDA files do not carry it: it is 5 there.
            None where a causal model comes from elsewhere and has none.
        bos_token_id: the id that begins a document.
        eos_token_id: the id that ends an answer.
        pad_token_id: the id of padding; its embedding row starts at zero. None for no such row.

    Raises:
        IlladaError: when the shape is impossible or a special id lies outside the vocabulary.
    """

    model_type = "illada"

    vocab_size: int = 155_136
    hidden_size: int = 4096
    intermediate_size: int = 14_336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 8192
    rope_theta: float = 500_000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    causal: bool = False
    tie_word_embeddings: bool = True
    mask_token_id: int | None = FAMILY_IDS["illada"]["mask_token_id"]
    bos_token_id: int | None = FAMILY_IDS["illada"]["bos_token_id"]
    pad_token_id: int | None = FAMILY_IDS["illada"]["pad_token_id"]
    eos_token_id: int | list[int] | None = FAMILY_IDS["illada"]["eos_token_id"]

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the derived sizes and check the shape."""
        if not self.num_key_value_heads:
            self.num_key_value_heads = self.num_attention_heads
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise IlladaError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not self.head_dim:
            if self.hidden_size % self.num_attention_heads:
                raise IlladaError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}: change one of them or give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise IlladaError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise IlladaError(f"head_dim {self.head_dim} is odd: rotary embedding needs an even one")
        for name in ("mask_token_id", "bos_token_id", "pad_token_id", "eos_token_id"):
            ids = getattr(self, name)
            for token_id in ids if isinstance(ids, list) else [] if ids is None else [ids]:
                if not 0 <= token_id < self.vocab_size:
                    raise IlladaError(f"{name} {token_id} is outside the vocabulary of {self.vocab_size}")
        if self.mask_token_id is None and not self.causal:
            raise IlladaError("mask_token_id is null: only a causal model can be without a mask token")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the configuration from the contents of a config.json: ours, iLLaDA's or LLaDA's.

        Raises:
            IlladaError: when it is of another family, or asks for something this network does not do.
        """
        return super().from_dict(read_config(config_dict), **kwargs)

    @property
    def mask_id(self) -> int:
        """`mask_token_id` of a masked diffusion model, which always has one."""
        assert self.mask_token_id is not None
        return self.mask_token_id

    def refuse_causal(self, what: str, instead: str) -> None:
        """Raise an IlladaError if the model is causal: `what` is defined for masked diffusion only."""
        if self.causal:
            raise IlladaError(f"{what} for masked diffusion models only, and this one is causal: {instead}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "IlladaConfig":
        """Return the configuration called `name`, with `overrides` applied.

        Raises:
            IlladaError: when there is no such preset.
        """
        if name not in PRESETS:
            raise IlladaError(f"no preset {name!r}: choose one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})


def _small(width: int, layers: int, heads: int, key_value_heads: int, intermediate: int) -> dict[str, Any]:
    """Return a preset for one machine."""
    return {
        "vocab_size": 4096,
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "max_position_embeddings": 1024,
        # A shorter context needs no longer wavelengths; ours.
        "rope_theta": 10_000.0,
    }


PRESETS: dict[str, dict[str, Any]] = {
    # Ours, for one machine; their names count no embedding. Training replaces vocab_size by the tokenizer's.
    "1m": _small(128, 4, 4, 2, 384),
    "5m": _small(256, 6, 4, 2, 768),
    "15m": _small(384, 8, 6, 2, 1152),
    "50m": _small(640, 10, 10, 5, 1920),
    # Paper Table 1.
    "illada-8b": {"num_key_value_heads": 8},
    # LLaDA paper; ids from its released tokenizer.
    "llada-8b": {
        "vocab_size": 126_464,
        "intermediate_size": 12_288,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        **FAMILY_IDS["llada"],
        "pad_token_id": None,
    },
}


class LladaConfig(IlladaConfig):
    """The name under which transformers finds LLaDA's config.json; reading one gives an `IlladaConfig`."""

    model_type = "llada"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build an `IlladaConfig`; errors as in `IlladaConfig.from_dict`."""
        return IlladaConfig.from_dict(config_dict, **kwargs)


AutoConfig.register("illada", IlladaConfig, exist_ok=True)
AutoConfig.register("llada", LladaConfig, exist_ok=True)
