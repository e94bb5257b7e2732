"""`illada serve`: one process, one model, one address."""

import logging
import signal
import socket
from pathlib import Path
from types import FrameType

from illada.errors import IlladaError, needs
from illada.generation.settings import GenerationSettings
from illada.serving.app import create_app
from illada.serving.middleware import read_keys, warn_if_open
from illada.serving.options import ServerSettings
from illada.weights.load import load_model
from illada.weights.options import ModelOptions

with needs("serve", "serving"):
    import uvicorn


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
    app = create_app(network, tokenizer, server.name or model_name(model.model), server, defaults)
    config = uvicorn.Config(
        app,
        log_level="info",
        server_header=False,
        timeout_graceful_shutdown=int(server.drain_timeout) or 1,
        timeout_keep_alive=30,
    )

    class Server(uvicorn.Server):
        """Tells the worker to take nothing new as soon as the process is asked to end; says when it is ready."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            app.state.worker.draining = True
            super().handle_exit(sig, frame)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            url = url_of(*listening.getsockname()[:2])
            print(f"ready: {url} (page, API under /v1; Ctrl-C ends)", flush=True)

    running = Server(config)
    running.run(sockets=[listening])
    if signal.SIGINT in running._captured_signals:
        raise KeyboardInterrupt
