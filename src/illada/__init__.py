"""illada: pre-train, tune, run and score masked diffusion language models of the iLLaDA kind (arXiv 2606.25331).

    model, tokenizer = illada.load_model("runs/demo/model")
    chat = [{"role": "user", "content": "Shift: k d a q m z"}]
    illada.generate(model, [chat], tokenizer=tokenizer)[0].text

Importing it takes no time: a name loads what it needs when it is first used, and the Auto classes of transformers learn
of the models as soon as transformers loads its own list of them.
"""

from functools import partial
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

from illada.errors import IlladaError

if TYPE_CHECKING:
    from illada.diffusion.loss import diffusion_loss
    from illada.generation.engine import Generation, StepEvent, generate, infill
    from illada.generation.optional.tool_calls import Tools
    from illada.generation.settings import GenerationSettings
    from illada.model.config import IlladaConfig
    from illada.model.transformer import IlladaForMaskedLM, IlladaModel
    from illada.post_training.bounds import elbo
    from illada.scoring.confidence import confidence_scores
    from illada.scoring.likelihood import likelihood_scores
    from illada.scoring.optional.candidates import score
    from illada.scoring.path import path_log_likelihoods
    from illada.weights.load import load_model

__version__ = version("illada")

__all__ = [
    "Generation",
    "GenerationSettings",
    "IlladaConfig",
    "IlladaError",
    "IlladaForMaskedLM",
    "IlladaModel",
    "StepEvent",
    "Tools",
    "__version__",
    "confidence_scores",
    "diffusion_loss",
    "elbo",
    "generate",
    "infill",
    "likelihood_scores",
    "load_model",
    "path_log_likelihoods",
    "score",
]

_HOMES = {
    "Generation": "generation.engine",
    "GenerationSettings": "generation.settings",
    "IlladaConfig": "model.config",
    "IlladaForMaskedLM": "model.transformer",
    "IlladaModel": "model.transformer",
    "StepEvent": "generation.engine",
    "Tools": "generation.optional.tool_calls",
    "confidence_scores": "scoring.confidence",
    "diffusion_loss": "diffusion.loss",
    "elbo": "post_training.bounds",
    "generate": "generation.engine",
    "infill": "generation.engine",
    "likelihood_scores": "scoring.likelihood",
    "load_model": "weights.load",
    "path_log_likelihoods": "scoring.path",
    "score": "scoring.optional.candidates",
}


def __getattr__(name: str) -> Any:
    """Load a public name."""
    if name not in _HOMES:
        raise AttributeError(f"module 'illada' has no attribute {name!r}")
    return getattr(import_module(f"illada.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]


def _load(ours: str, _: ModuleType) -> None:
    import_module(ours)


# Each of our two modules tells the Auto classes of its own when it is loaded.
register_post_import_hook(partial(_load, "illada.model.config"), "transformers.models.auto.configuration_auto")
register_post_import_hook(partial(_load, "illada.model.transformer"), "transformers.models.auto.modeling_auto")
