"""Noise, loss and bound: the mathematics of masked diffusion (paper Eq. 1)."""

from illada.diffusion.loss import diffusion_loss, masked_loss

__all__ = ["diffusion_loss", "masked_loss"]
