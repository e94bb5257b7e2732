import threading
from contextlib import contextmanager

import pytest
import torch

from illada.generation.settings import GenerationSettings
from illada.serving.options import ServerSettings
from illada.text.chat import CHAT_TEMPLATE

pytest.importorskip("uvicorn", reason="serving needs the extra: pip install 'illada[serve]'")


@pytest.fixture(scope="session")
def served_model(build_model, tiny_tokenizer):
    """A random model with a tokenizer that has a chat template."""
    ids = {f"{kind}_token_id": getattr(tiny_tokenizer, f"{kind}_token_id") for kind in ("mask", "bos", "eos", "pad")}
    model = build_model(tie=True, seed=3, vocab_size=len(tiny_tokenizer), max_position_embeddings=256, **ids)
    assert tiny_tokenizer.chat_template == CHAT_TEMPLATE
    return model, tiny_tokenizer


@pytest.fixture(scope="session")
def serve_model(served_model):
    """Return a context manager that serves the random model on a free port in a thread and gives (address, app)."""
    from illada.serving.app import create_app
    from illada.serving.server import Server, open_socket

    @contextmanager
    def serve(server=None, model=None, about=None, **defaults):
        torch.set_num_threads(1)
        server = server or ServerSettings()
        settings = GenerationSettings(**{"max_new_tokens": 32, "block_length": 8, **defaults})
        app = create_app(model or served_model[0], served_model[1], "tiny", server, settings, about)
        listening = open_socket(server.host, 0)
        running = Server(app, server, "warning")
        app.state.server = running
        started = threading.Event()
        begin = running.startup

        async def startup(sockets=None):
            await begin(sockets)
            started.set()

        running.startup = startup
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            assert started.wait(60)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", app
        finally:
            running.drain()
            thread.join(30)

    return serve


@pytest.fixture(scope="session")
def server(serve_model):
    """Address of a server of the random model, for all tests."""
    with serve_model() as (address, _):
        yield address
