"""The HTTP application: its routes, what they refuse, and what lies around them."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from illada.errors import IlladaError
from illada.generation.settings import GenerationSettings
from illada.model import IlladaForMaskedLM
from illada.serving.handlers import Api
from illada.serving.middleware import Guard, read_keys
from illada.serving.protocol import FAILED, LATE, ChatRequest, CompletionRequest, error, refusal
from illada.serving.settings import ServerSettings
from illada.serving.streams import LostError, TimeoutPassedError, UnknownModelError
from illada.serving.worker import BusyError, DrainingError

PAGE = Path(__file__).parent / "page"


class ErrorBody(BaseModel):
    """An error as OpenAI's clients read it."""

    error: dict[str, Any]


REFUSALS: dict[int | str, dict[str, Any]] = {
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
    model: IlladaForMaskedLM, tokenizer: Any, name: str, server: ServerSettings, defaults: GenerationSettings
) -> FastAPI:
    """Return the application; its lifespan starts and ends the engine's thread.

    Args:
        model: the network.
        tokenizer: of the model.
        name: of the model in the API.
        server: limits, keys and names.
        defaults: how to generate where a request does not say.

    Raises:
        IlladaError: when the API keys cannot be read.
    """
    keys = read_keys(server)
    api = Api(model, tokenizer, name, server, defaults)
    worker = api.worker

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await worker.start()
        yield
        await worker.close()

    app = FastAPI(
        title="illada",
        version=version("illada"),
        description="OpenAI's chat and completion API for masked diffusion language models (docs/serving.md).",
        docs_url=None,  # they would load scripts of others
        redoc_url=None,
        redirect_slashes=False,  # to an address of the client's choice
        lifespan=lifespan,
        responses=REFUSALS,
    )
    app.state.worker = worker

    @app.post("/v1/chat/completions", responses=ANSWER, response_model=None)
    async def chat_completions(request: HttpRequest, asked: ChatRequest) -> Response:
        """Answer a conversation."""
        return await api.answer(request, asked)

    @app.post("/v1/completions", responses=ANSWER, response_model=None)
    async def completions(request: HttpRequest, asked: CompletionRequest) -> Response:
        """Go on with a text, or fill its gaps."""
        return await api.answer(request, asked)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [api.describe()]}

    @app.get("/v1/models/{model_id:path}")
    async def one_model(model_id: str) -> dict[str, Any]:
        """Describe a model."""
        if model_id != name:
            raise UnknownModelError(model_id, name)
        return api.describe()

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

    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    _add_refusals(app)
    app.add_middleware(Guard, server=server, keys=keys, metrics=worker.metrics)
    if server.cors_origins:  # outermost, so that pages can read why they were refused
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[*server.cors_origins],
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    return app


def _add_refusals(app: FastAPI) -> None:
    def on(kind: type[Exception]) -> Callable[..., Any]:
        return app.exception_handler(kind)

    @on(RequestValidationError)
    async def invalid(_: HttpRequest, problem: RequestValidationError) -> Response:
        return JSONResponse(refusal([*problem.errors()]), 400)

    @on(IlladaError)
    async def bad(_: HttpRequest, problem: IlladaError) -> Response:
        return JSONResponse(error(str(problem), "invalid_request_error"), 400)

    @on(UnknownModelError)
    async def unknown(_: HttpRequest, problem: UnknownModelError) -> Response:
        return JSONResponse(error(str(problem), "invalid_request_error", "model", "model_not_found"), 404)

    @on(HTTPException)
    async def refused(_: HttpRequest, problem: HTTPException) -> Response:
        return JSONResponse(error(str(problem.detail), "invalid_request_error"), problem.status_code, problem.headers)

    @on(BusyError)
    async def busy(_: HttpRequest, problem: BusyError) -> Response:
        headers = {"retry-after": str(problem.retry_after)}
        return JSONResponse(error(str(problem), "rate_limit_error", code="busy"), 429, headers)

    @on(DrainingError)
    async def ending(_: HttpRequest, __: DrainingError) -> Response:
        body = error("the server is about to end: ask another one, or later", "server_error", code="draining")
        return JSONResponse(body, 503, {"retry-after": "5"})

    @on(TimeoutPassedError)
    async def late(_: HttpRequest, __: TimeoutPassedError) -> Response:
        # The same request would take as long again, so clients should not repeat it by themselves.
        return JSONResponse(LATE, 504, {"x-should-retry": "false"})

    @on(LostError)
    async def lost(_: HttpRequest, __: LostError) -> Response:
        return JSONResponse(FAILED, 500)
