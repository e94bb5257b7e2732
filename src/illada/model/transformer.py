"""The iLLaDA transformer: a pre-norm LLaMA trunk with full bidirectional attention (paper §2.1; spec §1).

With causal attention (ours) it is the autoregressive baseline.

There is one path through the network: packed segments. A batch with padding is packed first and unpacked after, so
neither padding nor the other rows change a row's result.

Shape letters: B rows · L row length · T packed tokens · D width · H query heads · G key/value heads · K head width ·
V vocabulary · C a piece of it · M selected tokens.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from illada.errors import IlladaError
from illada.hub import importing_quietly
from illada.model.attention import Packing, packed_attention
from illada.model.config import IlladaConfig
from illada.model.released import LLADA_TENSORS

with importing_quietly():
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
    from transformers import initialization as init
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode and back, where it is in training: to do so walks through all its modules."""
    was_training = module.training
    if was_training:
        module.eval()
    try:
        yield
    finally:
        if was_training:
            module.train()


Rotary = tuple[Tensor, Tensor]
"""Cosine and signed sine of the rotary angles, fp32 [T, 1, K]: the same for both halves of a head, but for the sign."""


class RMSNorm(nn.Module):
    """Root-mean-square norm: computed in fp32, cast back, then the gain."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """Normalise the last axis."""
        if hidden_TD.dtype == self.weight.dtype == torch.float32:  # the same numbers in one operation
            return F.rms_norm(hidden_TD, hidden_TD.shape[-1:], self.weight, self.eps)
        return F.rms_norm(hidden_TD.float(), hidden_TD.shape[-1:], eps=self.eps).to(hidden_TD.dtype) * self.weight


def rotary_angles(position_ids_T: Tensor, head_dim: int, theta: float) -> Rotary:
    """Return cosine and signed sine of the rotary angles, without scaling."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids_T.device) / head_dim
    angles = position_ids_T.float()[:, None, None] * theta**-exponent
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x_THK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + K/2) of a head by its angle: computed in fp32, returned in the dtype of `x_THK`."""
    first, second = x_THK.chunk(2, dim=-1)
    return torch.addcmul(x_THK * cos, torch.cat((second, first), dim=-1).float(), sin).to(x_THK.dtype)


def branch_end(inputs: int, outputs: int) -> nn.Linear:
    """Return the last linear layer of a residual branch, marked to start narrower (spec §1).

    It is not a subclass, as libraries that replace linear layers look for exactly `nn.Linear`.
    """
    layer = nn.Linear(inputs, outputs, bias=False)
    layer.ends_branch = True  # type: ignore[assignment]
    return layer


class Attention(nn.Module):
    """Grouped-query attention without bias."""

    def __init__(self, config: IlladaConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.config = config  # its attn_implementation may be changed later
        self.head_dim = config.head_dim
        width, queries = config.hidden_size, config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, queries, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, keys, bias=False)
        self.o_proj = branch_end(queries, width)

    def ask(self, hidden_TD: Tensor, rotary: Rotary, asking_M: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries [M, H, K] of the asking positions (None: of all), and keys and values [T, G, K] of all."""
        heads = (-1, self.head_dim)
        key_TGK = rotate(self.k_proj(hidden_TD).unflatten(-1, heads), *rotary)
        value_TGK = self.v_proj(hidden_TD).unflatten(-1, heads)
        if asking_M is not None:
            hidden_TD, rotary = hidden_TD[asking_M], (rotary[0][asking_M], rotary[1][asking_M])
        return rotate(self.q_proj(hidden_TD).unflatten(-1, heads), *rotary), key_TGK, value_TGK

    def attend(self, query_MHK: Tensor, key_TGK: Tensor, value_TGK: Tensor, packing: Packing) -> Tensor:
        """Attend within each segment; returns [M, H·K]."""
        kernel, causal = self.config._attn_implementation, self.config.causal
        return packed_attention(query_MHK, key_TGK, value_TGK, packing, kernel, self.layer, causal).flatten(-2)


class MLP(nn.Module):
    """SwiGLU without bias."""

    def __init__(self, config: IlladaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = branch_end(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """Map [T, D] to [T, D]."""
        return self.down_proj(F.silu(self.gate_proj(hidden_TD)) * self.up_proj(hidden_TD))


class Block(GradientCheckpointingLayer):
    """One pre-norm transformer block in three parts: before attention, attention, after attention.

    Attention sees the lengths of the batch, which change from step to step; the other two parts do not, so they can be
    compiled once (`IlladaModel.compile_blocks`).
    """

    def __init__(self, config: IlladaConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def pre_attention(
        self, hidden_TD: Tensor, rotary: Rotary, asking_M: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values."""
        return self.self_attn.ask(self.input_layernorm(hidden_TD), rotary, asking_M)

    def post_attention(self, hidden_MD: Tensor, attended_MD: Tensor) -> Tensor:
        """Add attention and then SwiGLU to the residual stream."""
        hidden_MD = hidden_MD + self.self_attn.o_proj(attended_MD)
        return hidden_MD + self.mlp(self.post_attention_layernorm(hidden_MD))

    def forward(self, hidden_TD: Tensor, packing: Packing, rotary: Rotary, asking_M: Tensor | None = None) -> Tensor:
        """Map [T, D] to [T, D], or to the [M, D] of the asking positions alone."""
        attended = self.self_attn.attend(*self.pre_attention(hidden_TD, rotary, asking_M), packing)
        return self.post_attention(hidden_TD if asking_M is None else hidden_TD[asking_M], attended)


class IlladaPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the family, and the paper's initialisation."""

    config_class = IlladaConfig
    config: IlladaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012  (transformers' own declaration)
    _supports_sdpa = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # attention reads the configuration each time; transformers would guess from the source text

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        key_mapping: dict[str, str] | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint of ours, of iLLaDA or of LLaDA; arguments as in transformers.

        Only safetensors are read: a pickle is an error, unless `use_safetensors=False` asks for it.

        Raises:
            IlladaError: when a tensor is missing, not expected or of another shape, naming them, or when a head that
                should be tied differs from the embedding. Nothing is ever initialised afresh.
        """
        kwargs.setdefault("use_safetensors", True)
        model, notes = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            key_mapping={**LLADA_TENSORS, **(key_mapping or {})},
            output_loading_info=True,
            # Below, odd shapes are refused together with odd names.
            **{**kwargs, "ignore_mismatched_sizes": True},
        )
        _refuse_odd(pretrained_model_name_or_path, notes)
        if cls is IlladaForMaskedLM and model.config.tie_word_embeddings and not model.all_tied_weights_keys:
            raise IlladaError(
                f"the weights in {pretrained_model_name_or_path} do not fit its config.json: lm_head.weight differs "
                "from model.embed_tokens.weight though tie_word_embeddings is true"
            )
        # transformers would use these to save in the layout that was read; we save in ours.
        model._weight_conversions = None
        return (model, notes) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as the released model code does (spec §1): narrower at the two ends of the residual branches."""
        config = self.config
        if isinstance(module, nn.Linear) and module.weight.is_floating_point():
            depth = math.sqrt(2 * config.num_hidden_layers) if hasattr(module, "ends_branch") else 1.0
            init.normal_(module.weight, std=config.initializer_range / depth)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=(2 * config.hidden_size) ** -0.5)
            # transformers looks for the flag "already loaded" on the slice, which has none: it is checked here.
            if config.pad_token_id is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[config.pad_token_id])
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)


def _refuse_odd(path: Any, notes: dict[str, Any]) -> None:
    """Raise an error that lists every tensor that did not find its place, if there is one."""
    odd = [
        *(f"{name} is missing" for name in sorted(notes["missing_keys"])),
        *(f"{name} is not part of the model" for name in sorted(notes["unexpected_keys"])),
        *(f"{name} is {list(a)}, not {list(b)}" for name, a, b in sorted(notes["mismatched_keys"])),
        *(str(line) for line in notes["error_msgs"]),
    ]
    if odd:
        raise IlladaError(f"the weights in {path} do not fit its config.json ({len(odd)} tensors): {'; '.join(odd)}")


class IlladaModel(IlladaPreTrainedModel):
    """The trunk: token ids to final hidden states."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012

    def __init__(self, config: IlladaConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def packed(
        self,
        input_ids_T: Tensor,
        packing: Packing,
        position_ids_T: Tensor | None = None,
        wanted: Sequence[NDArray[np.int64]] | None = None,
    ) -> Tensor:
        """Return final hidden states [T, D] of packed segments; without position ids, see `Packing.positions`.

        `wanted` lists positions within each segment: then their states alone are returned, [M, D] in order, and the
        last layer computes queries, output and SwiGLU for them only (keys and values for all), unless the model is
        causal.

        Raises:
            ValueError: when the segments do not add up to T tokens.
        """
        if packing.tokens != input_ids_T.numel():
            raise ValueError(f"the segments hold {packing.tokens} tokens but {input_ids_T.numel()} were given")
        if position_ids_T is None:
            position_ids_T = packing.positions(input_ids_T.device)
        hidden_TD = self.embed_tokens(input_ids_T)
        if packing.tokens:
            rotary = rotary_angles(position_ids_T, self.config.head_dim, self.config.rope_theta)
            *body, last = self.layers
            for block in body:
                hidden_TD = block(hidden_TD, packing, rotary)
            if wanted is None:
                hidden_TD = last(hidden_TD, packing, rotary)
            else:
                starts = np.cumsum([0, *packing.lengths[:-1]])
                flat_M = np.concatenate([start + at for start, at in zip(starts, wanted, strict=True)])
                asking_M = torch.from_numpy(flat_M).to(hidden_TD.device)
                spared = (packing.tokens - len(flat_M)) * self.config.hidden_size * self.config.intermediate_size
                if spared < 2**20 or self.config.causal:  # not worth it, or attention would have to know who asks
                    hidden_TD = last(hidden_TD, packing, rotary)[asking_M]
                else:
                    packing = replace(packing, queries=tuple(map(len, wanted)))
                    hidden_TD = last(hidden_TD, packing, rotary, asking_M)
        return self.norm(hidden_TD)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile all but attention, once for all layers and lengths.

        Results stay the same up to the rounding of fused operations; the first passes take up to a minute. `backend` is
        one of torch.compile's.
        """
        for block in self.layers:
            for part in ("pre_attention", "post_attention"):
                setattr(block, part, torch.compile(getattr(block, part), dynamic=True, backend=backend))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        """Return `last_hidden_state` [B, L, D]; rows of hidden states at padding are zero.

        Args:
            input_ids: token ids [B, L].
            attention_mask: [B, L], nonzero where there is a token; None means everywhere. Padding may lie on any side.
            position_ids: [B, L]; None counts the tokens of each row (or segment) from 0.
            cu_seqlens: cumulative segment lengths [S + 1] of the B·L tokens, row after row; excludes
                attention_mask.

        Raises:
            ValueError: when both attention_mask and cu_seqlens are given, or segments and tokens disagree.
        """
        ids_T = input_ids.reshape(-1)
        positions_T = None if position_ids is None else position_ids.expand_as(input_ids).reshape(-1)
        if attention_mask is not None:
            if cu_seqlens is not None:
                raise ValueError("give attention_mask or cu_seqlens, not both")
            kept_BL = attention_mask.bool()
            kept_T = kept_BL.reshape(-1)
            packing = Packing(tuple(kept_BL.sum(1).tolist()))
            packed_TD = self.packed(ids_T[kept_T], packing, None if positions_T is None else positions_T[kept_T])
            hidden_TD = packed_TD.new_zeros(ids_T.numel(), packed_TD.shape[-1]).index_put((kept_T,), packed_TD)
        else:
            lengths = (input_ids.shape[-1],) * (ids_T.numel() // max(1, input_ids.shape[-1]))
            packing = Packing(lengths) if cu_seqlens is None else Packing.from_cu_seqlens(cu_seqlens)
            hidden_TD = self.packed(ids_T, packing, positions_T)
        return BaseModelOutput(last_hidden_state=hidden_TD.view(*input_ids.shape, hidden_TD.shape[-1]))


class IlladaForMaskedLM(IlladaPreTrainedModel):
    """The trunk with its LM head. Logits at position i predict token i; there is no shift and no cache.

    In a causal model, the autoregressive baseline, they predict token i + 1. There is no `labels` argument: the
    diffusion loss needs the noise level, see `illada.diffusion_loss`.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: IlladaConfig):
        super().__init__(config)
        self.model = IlladaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **_: Any,
    ) -> MaskedLMOutput:
        """Return `logits` [B, L, V]; arguments and errors as in `IlladaModel.forward`."""
        hidden_BLD = self.model(input_ids, attention_mask, position_ids, cu_seqlens).last_hidden_state
        return MaskedLMOutput(logits=self.lm_head(hidden_BLD))

    @property
    def head_is_divisible(self) -> bool:
        """Whether the head is a plain matrix that nobody wrapped, so that some of its rows give some of the logits."""
        return type(self.lm_head) is nn.Linear and "forward" not in vars(self.lm_head)

    def head_pieces(self, hidden_MD: Tensor, pieces: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (first id, fp32 logits [M, C]) of pieces of nearly equal width; an indivisible head is one piece."""
        if pieces == 1 or not self.head_is_divisible:
            yield 0, self.lm_head(hidden_MD).float()
            return
        first = 0
        for weight_CD in self.lm_head.weight.tensor_split(pieces):
            yield first, F.linear(hidden_MD, weight_CD).float()
            first += len(weight_CD)


# Every class gives the model with its head, as the auto_map of the released folders does: scripts written for these
# folders expect logits from AutoModel. The trunk alone is IlladaModel.
for auto in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
    auto.register(IlladaConfig, IlladaForMaskedLM, exist_ok=True)
