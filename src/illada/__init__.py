"""illada: pre-train, tune, run and score masked diffusion language models of the iLLaDA kind (arXiv 2606.25331)."""

from illada.model import IlladaConfig, IlladaForMaskedLM

__all__ = ["IlladaConfig", "IlladaForMaskedLM"]
