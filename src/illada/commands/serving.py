"""`illada serve`."""

from illada.generation.settings import GenerationSettings
from illada.lazy import lazily
from illada.serving.options import Copies, ServerSettings
from illada.weights.options import ModelOptions

with lazily():
    import illada.serving.cluster as cluster
    import illada.serving.server as server


def serve(model: ModelOptions, settings: ServerSettings, copies: Copies, generation: GenerationSettings) -> None:
    """Serve a model: an OpenAI-compatible API, and a page to watch answers form."""
    how = (model.model, settings, generation, model.dtype, model.device, model.quantize)
    if copies == Copies():
        server.serve(*how)
    else:
        cluster.serve(copies, *how)
