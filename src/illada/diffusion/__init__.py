"""Noise and loss: the mathematics of masked diffusion (paper Eq. 1)."""

from illada.diffusion.causal import causal_loss
from illada.diffusion.loss import diffusion_loss, masked_loss

__all__ = ["causal_loss", "diffusion_loss", "masked_loss"]
