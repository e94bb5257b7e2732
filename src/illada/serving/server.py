"""`illada serve`: one process, one model, one address."""

import logging
import math
import signal
import socket
import time
from pathlib import Path
from types import FrameType

from illada.errors import IlladaError, needs
from illada.generation.settings import GenerationSettings
from illada.serving.about import read_about
from illada.serving.app import create_app
from illada.serving.connections import Connections
from illada.serving.middleware import read_keys, warn_if_open
from illada.serving.options import ServerSettings
from illada.serving.worker import Worker
from illada.weights.load import load_model
from illada.weights.options import ModelOptions

with needs("serve", "serving"):
    import uvicorn
    from fastapi import FastAPI


def model_name(path: str) -> str:
    """Return the name of a model in the API: the name of its folder, or of the run that it is part of."""
    parts = [part for part in Path(path).parts if part not in ("/", ".", "..")]
    while len(parts) > 1 and (parts[-1] in ("model", "adapter") or parts[-1].startswith("step")):
        parts.pop()
    return parts[-1] if parts else "model"


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address.

    Raises:
        IlladaError: when the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError, UnicodeError, TypeError) as error:  # of a name that is none: TypeError
        listening.close()
        reason = getattr(error, "strerror", None) or error
        raise IlladaError(f"cannot listen on {host}:{port}: {reason}; choose another --port or --host") from error
    return listening


def url_of(host: str, port: int) -> str:
    """Return the URL of an address."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def show_log() -> None:
    """Write this package's log to stderr, from level INFO on, as uvicorn does with its own."""
    log = logging.getLogger("illada")
    log.setLevel(logging.INFO)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s:     %(message)s"))
    log.addHandler(handler)


class Server(uvicorn.Server):
    """Serves an application until the process is asked to end and the answers under way are out.

    Until then new requests for answers get 503, and so does /health; a second signal ends the waiting. Connections
    that wait too long for their client are closed.

    Args:
        app: the application of `create_app`.
        server: its settings.
        log_level: of uvicorn.
    """

    def __init__(self, app: FastAPI, server: ServerSettings, log_level: str = "info") -> None:
        config = uvicorn.Config(
            app,
            http="h11",  # bounds the size of a header, and is there with every uvicorn
            ws="none",
            log_level=log_level,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=1,  # after a second signal
            limit_concurrency=server.max_connections + 1,
        )
        super().__init__(config)
        self._worker: Worker = app.state.worker
        self._settings = server
        self._deadline = math.inf
        self.connections = Connections(server.max_connections)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, or end at once if this is not the first signal."""
        if self._deadline < math.inf:
            super().handle_exit(sig, frame)
            return
        self._captured_signals.append(sig)
        self.drain()

    def drain(self) -> None:
        """Take no new requests for answers; end as soon as those under way are out."""
        self._worker.draining = True
        self._deadline = time.monotonic() + self._settings.drain_timeout

    async def on_tick(self, counter: int) -> bool:
        """Say whether the server is to end; uvicorn asks ten times a second."""
        now = time.monotonic()
        self.connections.check(self.server_state.connections, now)
        if self._deadline < math.inf and (not self.server_state.tasks or now >= self._deadline):
            # What is written may still be on its way.
            self.config.timeout_graceful_shutdown = max(1, int(self._deadline - now))
            self.should_exit = True
        return await super().on_tick(counter)


def serve(model: ModelOptions, server: ServerSettings, defaults: GenerationSettings) -> None:
    """Serve a model until the process is asked to end; answers under way are finished first.

    Args:
        model: what to load, and how.
        server: limits, keys and address.
        defaults: how to generate where a request does not say.

    Raises:
        IlladaError: when the model or the keys cannot be read or the address cannot be used.
    """
    keys = read_keys(server)  # before the model is loaded, which takes longer
    show_log()
    listening = open_socket(server.host, server.port)
    warn_if_open(server, keys)
    network, tokenizer = load_model(model.model, model.dtype, model.device, model.quantize)
    name = server.name or model_name(model.model)
    app = create_app(network, tokenizer, name, server, defaults, read_about(model.model))

    class Announced(Server):
        """Says when it is ready."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            url = url_of(*listening.getsockname()[:2])
            print(f"ready: {url} (page, API under /v1; Ctrl-C ends)", flush=True)

    running = Announced(app, server)
    running.run(sockets=[listening])
    if signal.SIGINT in running._captured_signals:
        raise KeyboardInterrupt
