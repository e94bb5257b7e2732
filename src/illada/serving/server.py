"""`illada serve`: one process, one model, one address."""

import logging
import signal
import socket
from pathlib import Path
from types import FrameType
from typing import Any

from illada.errors import IlladaError, needs
from illada.generation.settings import GenerationSettings
from illada.serving.app import create_app
from illada.serving.middleware import read_keys
from illada.serving.settings import ServerSettings
from illada.weights.load import load_model
from illada.weights.options import Dtype, Quantization

with needs("serve", "serving"):
    import uvicorn


def model_name(path: str) -> str:
    """Return what a model is called in the API: its folder's name, or that of the run it is part of."""
    parts = [part for part in Path(path).parts if part not in ("/", ".", "..")]
    while len(parts) > 1 and (parts[-1] in ("model", "adapter") or parts[-1].startswith("step")):
        parts.pop()
    return parts[-1] if parts else "model"


def open_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        IlladaError: when the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except (OSError, OverflowError) as problem:
        found.close()
        reason = getattr(problem, "strerror", None) or problem
        raise IlladaError(f"cannot listen on {host}:{port}: {reason}; choose another --port or --host") from problem
    return found


def show_log() -> None:
    """Write this package's log to stderr, from what is only for information on; uvicorn does so for its own."""
    log = logging.getLogger("illada")
    log.setLevel(logging.INFO)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s:     %(message)s"))
    log.addHandler(handler)


def serve(
    model: str,
    server: ServerSettings,
    defaults: GenerationSettings,
    dtype: Dtype = "auto",
    device: str = "auto",
    quantize: Quantization | None = None,
) -> None:
    """Serve a model until the process is asked to end; answers under way are finished first.

    Args:
        model: model or run folder, or a hub name.
        server: limits, keys and address.
        defaults: how to generate where a request does not say.
        dtype: of the weights.
        device: to run on.
        quantize: weights of the blocks in 8 or 4 bits.

    Raises:
        IlladaError: when the model or the keys cannot be read or the address cannot be had.
    """
    read_keys(server)  # before the model is loaded, which takes longer
    show_log()
    listening = open_socket(server.host, server.port)
    network, tokenizer = load_model(model, dtype, device, quantize)
    app = create_app(network, tokenizer, server.name or model_name(model), server, defaults)
    config = uvicorn.Config(
        app,
        log_level="info",
        server_header=False,
        timeout_graceful_shutdown=int(server.drain_timeout) or 1,
        timeout_keep_alive=30,
    )

    class Server(uvicorn.Server):
        """Says that it is ending as soon as it is asked to."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            app.state.worker.draining = True
            super().handle_exit(sig, frame)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            address: Any = listening.getsockname()
            host = f"[{address[0]}]" if ":" in address[0] else address[0]
            print(f"ready: http://{host}:{address[1]} (page, API under /v1; Ctrl-C ends)", flush=True)

    running = Server(config)
    running.run(sockets=[listening])
    if signal.SIGINT in running._captured_signals:
        raise KeyboardInterrupt
