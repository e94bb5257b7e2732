"""illada: pre-train, tune, run and score masked diffusion language models of the iLLaDA kind (arXiv 2606.25331).

Importing it registers the model with the Auto classes of transformers.
"""

from importlib.metadata import version

from illada.diffusion import diffusion_loss
from illada.errors import IlladaError
from illada.generation.engine import Generation, StepEvent, generate
from illada.generation.settings import GenerationSettings
from illada.model import IlladaConfig, IlladaForMaskedLM, IlladaModel
from illada.scoring import confidence_scores, likelihood_scores

__version__ = version("illada")

__all__ = [
    "Generation",
    "GenerationSettings",
    "IlladaConfig",
    "IlladaError",
    "IlladaForMaskedLM",
    "IlladaModel",
    "StepEvent",
    "__version__",
    "confidence_scores",
    "diffusion_loss",
    "generate",
    "likelihood_scores",
]
