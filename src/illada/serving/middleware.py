"""What stands before every request: who may ask, how much, and the headers that keep browsers careful."""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import os
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from illada.errors import IlladaError
from illada.serving.metrics import Metrics
from illada.serving.protocol import FAILED, error
from illada.serving.settings import ServerSettings

log = logging.getLogger("illada.serving")
KEYS_VARIABLE = "ILLADA_API_KEYS"
BODY_SECONDS = 30.0
"""How long a client may take to send its request."""

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


def read_keys(server: ServerSettings) -> list[str]:
    """Return the API keys of the file or, without one, of the environment; none means that no key is asked for.

    Raises:
        IlladaError: when the file cannot be read or holds no key.
    """
    if server.api_key_file is None:
        return [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    try:
        lines = Path(server.api_key_file).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as problem:
        raise IlladaError(f"api_key_file {server.api_key_file} cannot be read: give a text file") from problem
    if not (keys := [line.strip() for line in lines if line.strip()]):
        raise IlladaError(f"api_key_file {server.api_key_file} holds no key: write one on each line")
    return keys


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """ASGI middleware: checks host, key, type and size of a request before anything reads it; counts every answer.

    Args:
        app: what it stands before.
        server: limits and names.
        keys: API keys; none lets everybody in.
        metrics: to count in.
    """

    def __init__(self, app: ASGIApp, server: ServerSettings, keys: list[str], metrics: Metrics):
        self._app, self._server, self._metrics = app, server, metrics
        # Digests have one length, so that comparing takes the same time whatever is sent.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._hosts = {host.lower() for host in server.allowed_hosts}
        if not self._hosts and _is_loopback(server.host.lower()):
            self._hosts = {"localhost", "127.0.0.1", "::1", server.host.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("cache-control", "no-cache" if scope["path"].startswith("/page") else "no-store")
            await send(message)

        try:
            headers = Headers(scope=scope)
            refused = self._refuse(scope, headers)
            if refused is None and scope["method"] == "POST":
                body = await self._body(headers, receive)
                if isinstance(body, JSONResponse):
                    refused = body
                else:
                    receive = _replay(body, receive)
            await (refused or self._app)(scope, receive, send_guarded)
        except Exception:
            if status:  # the answer has begun: all that is left is to close the connection
                raise
            log.exception("a request failed")
            await JSONResponse(FAILED, 500)(scope, receive, send_guarded)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()

    def _refuse(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        host = headers.get("host", "").rsplit("]", 1)
        name = host[0].lstrip("[") if len(host) == 2 else host[0].split(":")[0]
        if self._hosts and name.lower() not in self._hosts:
            text = f"this server is not called {name[:80]!r}: start it with --allowed_hosts to give it other names"
            return _no(400, text, "invalid_request_error")
        path = scope["path"]
        if self._digests and (path.startswith("/v1/") or path == "/metrics") and scope["method"] != "OPTIONS":
            scheme, _, given = headers.get("authorization", "").partition(" ")
            digest = hashlib.sha256((given if scheme.lower() == "bearer" else "").encode("latin-1")).digest()
            if not sum(hmac.compare_digest(digest, known) for known in self._digests):  # always looks at all
                text = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`"
                response = _no(401, text, "authentication_error", "invalid_api_key")
                response.headers["www-authenticate"] = "Bearer"
                return response
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        if scope["method"] == "POST" and path.startswith("/v1/") and kind != "application/json":
            # Also keeps other sites' pages out: a browser asks before it sends JSON to another origin.
            return _no(415, "send JSON, with the header `Content-Type: application/json`", "invalid_request_error")
        return None

    async def _body(self, headers: Headers, receive: Receive) -> bytes | JSONResponse:
        most = self._server.max_body_bytes
        too_large = _no(413, f"the request is larger than {most} bytes: shorten it", "invalid_request_error")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > most:
            return too_large
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    pieces.append(message.get("body", b""))
                    size += len(pieces[-1])
                    if size > most:
                        return too_large
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            return _no(408, f"the request did not arrive within {BODY_SECONDS:g} seconds", "invalid_request_error")
        return b"".join(pieces)


def _no(status: int, message: str, kind: str, code: str | None = None) -> JSONResponse:
    return JSONResponse(error(message, kind, code=code), status)


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
