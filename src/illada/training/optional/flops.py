"""The FLOPs that a network needs and a GPU has: their ratio is model FLOPs utilisation (MFU)."""

import os
from dataclasses import dataclass

import torch

from illada.diffusion.noise import EPSILON
from illada.errors import IlladaError
from illada.model.config import IlladaConfig


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, by its vendor's data sheet."""

    teraflops: float
    """Dense bf16 with fp32 accumulation; the headline figures of the sheets mostly assume sparsity, twice as high."""
    gigabytes: float


GPUS = {
    "a100": Gpu(312, 80),  # SXM, 80 GB
    "h100": Gpu(989, 80),  # SXM
    "h200": Gpu(989, 141),
    "b200": Gpu(2250, 180),  # as in HGX B200
    "l40s": Gpu(362, 48),
    "rtx4090": Gpu(165, 24),
}


def flops_per_token(config: IlladaConfig, mean_length: float, adapter: int = 0) -> float:
    """Return the FLOPs to learn from one token: 3·(2·P + 4·L·d·layers + 2·V·D·masked); recomputation is not counted.

    P are the parameters of the blocks, L = `mean_length` is the mean over tokens of the length of their segment, d the
    width of all query heads together. The head counts on masked tokens only. A causal model sees half of L and predicts
    all tokens. A backward pass costs two forward passes; for weights frozen beside an `adapter` of so many parameters
    it costs one.
    """
    masked, length = (1.0, mean_length / 2) if config.causal else (EPSILON + (1 - EPSILON) / 2, mean_length)
    attention = 4 * length * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    products = 2 * (block_parameters(config) + config.vocab_size * config.hidden_size * masked)
    return 3 * attention + (2 * products + 6 * adapter if adapter else 3 * products)


def block_parameters(config: IlladaConfig) -> int:
    """Return the parameters of all blocks, norms included."""
    width, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    attention = 2 * width * config.head_dim * (heads + groups)
    return config.num_hidden_layers * (attention + 3 * width * config.intermediate_size + 2 * width)


MOST_BLOCKS = 1000
"""As many as the deepest transformers ever trained have (DeepNet, arXiv 2203.00555)."""


def check_shape(config: IlladaConfig, device: torch.device | None = None) -> None:
    """Check, before a new network is built, that one of its size can be built and, on a CPU, trained by this process.

    Args:
        config: shape of the network.
        device: where it is to be trained; None asks only whether anybody could build it.

    Raises:
        IlladaError: with the number of parameters and the memory that they would take.
    """
    if config.num_hidden_layers > MOST_BLOCKS:
        raise IlladaError(f"num_hidden_layers is {config.num_hidden_layers:,}: it must be at most {MOST_BLOCKS:,}")
    parameters = block_parameters(config) + config.vocab_size * config.hidden_size * (2 - config.tie_word_embeddings)
    # fp32 weights are made on the CPU; to train them there takes gradients and two moments besides.
    alone = device is not None and device.type == "cpu" and os.environ.get("WORLD_SIZE", "1") == "1"
    needed = parameters * (16 if alone else 4)
    there = 2**60 if device is None else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise IlladaError(
            f"a network of {parameters:,} parameters takes {needed / 1e9:,.0f} GB, there are {there / 1e9:,.0f}: take "
            "a smaller shape; `illada estimate` says what one needs"
        )


def peak_flops(device: torch.device) -> float | None:
    """Return the bf16 FLOPs a second of a GPU that is in `GPUS`, else None."""
    name = torch.cuda.get_device_name(device).lower().replace(" ", "") if device.type == "cuda" else ""
    return next((gpu.teraflops * 1e12 for part, gpu in GPUS.items() if part in name), None)
