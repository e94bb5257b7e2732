"""illada: pre-train, tune, run and score masked diffusion language models of the iLLaDA kind (arXiv 2606.25331).

Importing it registers the model with the Auto classes of transformers.
"""

import logging
from importlib.metadata import version

# transformers imports torchao wherever it is installed, which then complains of kernels for machines that this is not.
_noisy = {name: logging.getLogger(name).level for name in ("torchao", "torch.utils._pytree")}
for _name in _noisy:
    logging.getLogger(_name).setLevel(logging.ERROR)

from illada.diffusion import diffusion_loss  # noqa: E402
from illada.errors import IlladaError  # noqa: E402
from illada.generation.engine import Generation, StepEvent, generate, infill  # noqa: E402
from illada.generation.settings import GenerationSettings  # noqa: E402
from illada.model import IlladaConfig, IlladaForMaskedLM, IlladaModel  # noqa: E402
from illada.scoring import confidence_scores, likelihood_scores  # noqa: E402

for _name, _level in _noisy.items():
    logging.getLogger(_name).setLevel(_level)

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
    "infill",
    "likelihood_scores",
]
