"""`illada serve` and `illada batch`."""

from illada.commands import heavy
from illada.commands.generation import with_schema
from illada.errors import IlladaError
from illada.generation.settings import GenerationSettings
from illada.serving.options import Copies, ServerSettings
from illada.weights.options import ModelOptions


def serve(model: ModelOptions, settings: ServerSettings, copies: Copies, generation: GenerationSettings) -> None:
    """Serve a model: an OpenAI-compatible API, and a page to watch answers form."""
    generation = with_schema(generation)
    if copies == Copies():
        heavy.server.serve(model, settings, generation)
    else:
        heavy.cluster.serve(model, settings, generation, copies)


def batch(file: str, /, model: ModelOptions, generation: GenerationSettings, output: str, at_once: int = 64) -> None:
    """Answer a file of requests in OpenAI's batch format, without a server; the same command continues a killed run.

    Args:
        file: requests, a JSON object on each line: custom_id, method, url and body.
        model: which model, and how to load it.
        generation: how to generate where a request does not say.
        output: file of the answers, a JSON object on each line; answers in it are kept.
        at_once: most requests under way at once.
    """
    if at_once < 1:
        raise IlladaError(f"at_once is {at_once}: it must be at least 1")
    heavy.batch.answer_batch(file, output, model, with_schema(generation), at_once)
