"""What every request passes first: who may ask, how much, and the headers that keep browsers careful."""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import os
from pathlib import Path

from illada.errors import IlladaError, needs
from illada.serving.metrics import Metrics
from illada.serving.options import ServerSettings
from illada.serving.protocol import ApiError, FailedError, named_field

with needs("serve", "serving"):
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.requests import ClientDisconnect, Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("illada.serving")
KEYS_VARIABLE = "ILLADA_API_KEYS"
OPEN = ("/", "/health", "/openapi.json")
"""Paths that need no key, beside the page's files."""
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
    """Return the API keys of the file or, without a file, of the environment; without any key everybody may ask.

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


def warn_if_open(server: ServerSettings, keys: list[str]) -> None:
    """Say it loudly when whoever reaches this machine over a network may ask."""
    if not keys and not _is_loopback(server.host.lower()):
        log.warning(
            "NO API KEY: everybody who reaches %s may use this model. Give --api_key_file FILE or set %s, or take "
            "--host 127.0.0.1",
            server.host,
            KEYS_VARIABLE,
        )


class LimitsMiddleware:
    """ASGI middleware: checks host, key, type and size of a request before anything reads it; counts every response.

    It also answers every error that the application raises. Without keys everybody may ask.
    """

    def __init__(self, app: ASGIApp, server: ServerSettings, keys: list[str], metrics: Metrics):
        self._app, self._server, self._metrics = app, server, metrics
        # Digests have one length, so comparing takes the same time whatever is sent.
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

        async def send_with_headers(message: Message) -> None:
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
            self._check(scope, headers)
            if scope["method"] == "POST":
                receive = _replay(await self._read_body(scope, headers, receive), receive)
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            if status:  # the response has begun: all that is left is to close the connection
                raise
            await _as_api_error(error).response()(scope, receive, send_with_headers)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "").rsplit("]", 1)
        name = host[0].lstrip("[") if len(host) == 2 else host[0].split(":")[0]
        if self._hosts and name.lower() not in self._hosts:
            text = f"this server is not called {name[:80]!r}: start it with --allowed_hosts to give it other names"
            raise ApiError(400, text)
        path = scope["path"]
        is_open = path in OPEN or path.startswith("/page/") or scope["method"] == "OPTIONS"
        if self._digests and not is_open:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            digest = hashlib.sha256((key if scheme.lower() == "bearer" else "").encode("latin-1")).digest()
            if not sum(hmac.compare_digest(digest, known) for known in self._digests):  # always compares all
                text = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`"
                challenge = {"www-authenticate": "Bearer"}
                raise ApiError(401, text, "authentication_error", code="invalid_api_key", headers=challenge)
        content_type = headers.get("content-type", "").split(";")[0].strip().lower()
        if scope["method"] == "POST" and content_type != "application/json":
            # This also keeps other sites' pages out: a browser asks before it sends JSON to another origin.
            raise ApiError(415, "send JSON, with the header `Content-Type: application/json`")

    async def _read_body(self, scope: Scope, headers: Headers, receive: Receive) -> bytes:
        # Starlette's RequestBodyLimitMiddleware answers in plain text where nothing reads the body, as for unknown
        # paths, and has no deadline, so the body would be read here all the same.
        limit = self._server.max_body_bytes
        too_large = ApiError(413, f"the request is larger than {limit} bytes: shorten it")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in Request(scope, receive).stream():
                    body += piece
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"the request did not arrive within {BODY_SECONDS:g} seconds") from None
        except ClientDisconnect:
            pass  # the application notices it too
        return bytes(body)


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, IlladaError):
        return ApiError(400, str(error), param=named_field(str(error)))
    if isinstance(error, ApiError):
        return error
    log.exception("a request failed")
    return FailedError()


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body once more and then goes on."""
    first = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replay() -> Message:
        return next(first, None) or await receive()

    return replay
