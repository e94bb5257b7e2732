"""Noise and loss: the mathematics of masked diffusion (paper Eq. 1; spec §2)."""
