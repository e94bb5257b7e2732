"""The HTTP application: its routes, its errors and its middleware."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from illada.errors import needs
from illada.generation.settings import GenerationSettings
from illada.model.transformer import IlladaForMaskedLM
from illada.serving.handlers import Handlers
from illada.serving.middleware import LimitsMiddleware, read_keys
from illada.serving.options import ServerSettings
from illada.serving.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponseRequest,
    TokenizeRequest,
    validation_error,
)

with needs("serve", "serving"):
    from fastapi import FastAPI
    from fastapi import Request as HttpRequest
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
    from fastapi.staticfiles import StaticFiles
    from pydantic import BaseModel
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware
    from starlette.types import Scope

PAGE = Path(__file__).parent / "page"


class PageFiles(StaticFiles):
    """Serves the page's files under their own names only: Starlette finds a file under its name and a slash too."""

    def get_path(self, scope: Scope) -> str:
        """Return where the file of a request lies.

        Raises:
            HTTPException: 404 when the path ends in a slash.
        """
        if scope["path"].endswith("/"):
            raise HTTPException(404)
        return super().get_path(scope)


class ErrorBody(BaseModel):
    """An error as OpenAI's clients read it."""

    error: dict[str, Any]


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request cannot be served; the message says why."},
    401: {"model": ErrorBody, "description": "The API key is missing or wrong."},
    404: {"model": ErrorBody, "description": "There is no such model."},
    408: {"model": ErrorBody, "description": "The request arrived too slowly."},
    413: {"model": ErrorBody, "description": "The request is too large."},
    415: {"model": ErrorBody, "description": "The request is not JSON."},
    429: {"model": ErrorBody, "description": "Too many answers are under way; Retry-After says when to try again."},
    500: {"model": ErrorBody, "description": "The engine failed."},
    503: {"model": ErrorBody, "description": "The server is about to end."},
    504: {"model": ErrorBody, "description": "The answer was not finished in time."},
}
ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, or its stream.", "content": {"application/json": {}, "text/event-stream": {}}}
}


def create_app(
    model: IlladaForMaskedLM,
    tokenizer: Any,
    name: str,
    server: ServerSettings,
    defaults: GenerationSettings,
    about: Mapping[str, Any] | None = None,
) -> FastAPI:
    """Return the application; its lifespan starts and ends the engine's thread.

    Args:
        model: the network.
        tokenizer: the model's tokenizer.
        name: name of the model in the API.
        server: limits, keys and names.
        defaults: how to generate where a request does not say.
        about: what the page says about the model (`about.py`).

    Raises:
        IlladaError: when the API keys cannot be read.
    """
    keys = read_keys(server)
    handlers = Handlers(model, tokenizer, name, server, defaults, about)
    worker = handlers.worker

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await worker.start()
        yield
        await worker.close()

    app = FastAPI(
        title="illada",
        version=version("illada"),
        description="OpenAI's chat and completion API for masked diffusion language models (docs/serving.md).",
        docs_url=None,  # these pages would load scripts of others
        redoc_url=None,
        redirect_slashes=False,  # a redirect would go to an address of the client's choice
        lifespan=lifespan,
        responses=ERRORS,
    )
    app.state.worker = worker
    _add_answers(app, handlers)
    _add_routes(app, handlers)
    _add_error_handlers(app)
    app.add_middleware(LimitsMiddleware, server=server, keys=keys, metrics=worker.metrics)
    if server.cors_origins:  # outermost, so that pages can read why they were refused
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[*server.cors_origins],
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    return app


def _add_answers(app: FastAPI, handlers: Handlers) -> None:
    """Add the routes of what is asked in JSON."""

    @app.post("/v1/chat/completions", responses=ANSWER, response_model=None)
    async def chat_completions(request: HttpRequest, body: ChatRequest) -> Response:
        """Answer a conversation."""
        return await handlers.answer(request, body)

    @app.post("/v1/completions", responses=ANSWER, response_model=None)
    async def completions(request: HttpRequest, body: CompletionRequest) -> Response:
        """Go on with a text, or fill its gaps."""
        return await handlers.answer(request, body)

    @app.post("/v1/responses", responses=ANSWER, response_model=None)
    async def responses(request: HttpRequest, body: ResponseRequest) -> Response:
        """Answer a conversation in the form of the Responses API; nothing is stored."""
        return await handlers.answer(request, body)

    @app.post("/v1/embeddings", include_in_schema=False)
    async def embeddings() -> Response:
        message = (
            "this server has no embeddings: the model was trained to fill masked tokens, not to give texts one vector; "
            "use an embedding model"
        )
        raise ApiError(404, message, code="unsupported")

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """Return the ids of a text or of a conversation."""
        return await handlers.tokenize(body)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """Return the text of ids."""
        return await handlers.detokenize(body)


def _add_routes(app: FastAPI, handlers: Handlers) -> None:
    """Add the routes of what can only be read."""
    worker = handlers.worker

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the one model, under each of its names."""
        return {"object": "list", "data": [handlers.describe(name) for name in handlers.names]}

    @app.get("/v1/models/{model_id:path}")
    async def one_model(model_id: str) -> dict[str, Any]:
        """Describe a model."""
        handlers.check_name(model_id)
        return handlers.describe(model_id)

    @app.get("/health")
    async def health() -> Response:
        """Say whether requests are taken."""
        state = "draining" if worker.draining else "ok"
        return JSONResponse({"status": state}, 503 if worker.draining else 200)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return counters in Prometheus's text format."""
        return Response(worker.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", PageFiles(directory=PAGE), name="page")


def _add_error_handlers(app: FastAPI) -> None:
    """Give FastAPI's own errors our form; the middleware answers all others."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HttpRequest, error: RequestValidationError) -> Response:
        return validation_error(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http_error(_: HttpRequest, error: HTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()
