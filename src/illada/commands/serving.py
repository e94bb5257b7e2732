"""`illada serve`."""

from illada.commands import heavy
from illada.generation.settings import GenerationSettings
from illada.serving.options import Copies, ServerSettings
from illada.weights.options import ModelOptions


def serve(model: ModelOptions, settings: ServerSettings, copies: Copies, generation: GenerationSettings) -> None:
    """Serve a model: an OpenAI-compatible API, and a page to watch answers form."""
    if copies == Copies():
        heavy.server.serve(model, settings, generation)
    else:
        heavy.cluster.serve(model, settings, generation, copies)
