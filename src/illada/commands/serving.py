"""`illada serve`."""

from illada.commands import heavy
from illada.generation.settings import GenerationSettings
from illada.serving.options import Copies, ServerSettings
from illada.weights.options import ModelOptions


def serve(model: ModelOptions, settings: ServerSettings, copies: Copies, generation: GenerationSettings) -> None:
    """Serve a model: an OpenAI-compatible API, and a page to watch answers form."""
    how = (model.model, settings, generation, model.dtype, model.device, model.quantize)
    if copies == Copies():
        heavy.server.serve(*how)
    else:
        heavy.cluster.serve(copies, *how)
