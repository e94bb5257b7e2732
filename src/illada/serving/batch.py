"""`illada batch`: requests from a file in OpenAI's batch format, answered without a server; it goes on where it ended.

A line of the input is {"custom_id": …, "method": "POST", "url": "/v1/chat/completions", "body": {…}}, a line of the
output {"id": …, "custom_id": …, "response": {"status_code": …, "request_id": …, "body": {…}}, "error": null}. It comes
as soon as the answer is there, in another order than the input's.
"""

import asyncio
import json
import logging
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from illada.errors import IlladaError, needs
from illada.files import read_lines, write_bytes
from illada.generation.settings import GenerationSettings
from illada.serving.handlers import Handlers
from illada.serving.options import ServerSettings
from illada.serving.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    FailedError,
    ResponseRequest,
    validation_error,
)
from illada.serving.responses import Body
from illada.serving.server import model_name
from illada.weights.load import load_model
from illada.weights.options import ModelOptions

with needs("serve", "batches of requests"):
    from pydantic import ValidationError

log = logging.getLogger("illada.serving")
URLS: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponseRequest,
}
BEGINNING = b'{"id": "batch_req_'
"""How a line of the output begins; a line that a crash tore may have less."""
PATIENCE = 7 * 86400.0
"""Seconds in which an answer must be there: nobody waits at the other end."""


class Line(NamedTuple):
    """A request of the input."""

    custom_id: str
    url: str
    body: dict[str, Any]


def answer_batch(file: str, output: str, model: ModelOptions, defaults: GenerationSettings, at_once: int) -> None:
    """Answer every request of a file that the output does not answer yet, and append the answers to it.

    Args:
        file: the requests, a JSON object on each line.
        output: file of the answers; one that holds answers to these requests is gone on with.
        model: what to load, and how.
        defaults: how to generate where a request does not say.
        at_once: most answers under way at once.

    Raises:
        IlladaError: when a line of the input is no request, or the output holds something else.
    """
    lines = list(_read(file))
    path = Path(output)
    if path.exists() and Path(file).samefile(path):
        raise IlladaError(f"{output} is the input too: give another --output")
    done = _answered(path, {line.custom_id for line in lines})
    left = [line for line in lines if line.custom_id not in done]
    print(f"{len(lines)} requests, {len(done)} answered before", file=sys.stderr)
    if left:
        network, tokenizer = load_model(model.model, model.dtype, model.device, model.quantize)
        server = ServerSettings(max_requests=2**20, request_timeout=PATIENCE)  # at_once is the limit
        handlers = Handlers(network, tokenizer, model_name(model.model), server, defaults)
        asyncio.run(_answer_all(handlers, left, path, at_once))
    refused = sum(json.loads(line)["response"]["status_code"] != 200 for line in path.read_text("utf-8").splitlines())
    print(f"{output}: {len(lines) - refused} answers, {refused} refused (their lines say why)", file=sys.stderr)


def _read(file: str) -> Iterator[Line]:
    """Yield the requests of a file."""
    seen: set[str] = set()
    for number, text in read_lines(file):
        where = f"{file} line {number}"
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            raise IlladaError(f"{where} is not JSON") from None
        shape = isinstance(record, dict) and isinstance(record.get("body"), dict)
        if not shape or not isinstance(record.get("custom_id"), str) or not record["custom_id"].isprintable():
            raise IlladaError(f'{where} is not {{"custom_id": TEXT, "method": "POST", "url": URL, "body": {{…}}}}')
        if record.get("method", "POST") != "POST" or record.get("url") not in [*URLS]:
            raise IlladaError(f"{where}: method must be POST and url one of {', '.join(URLS)}")
        if record["custom_id"] in seen:
            raise IlladaError(f"{where}: its custom_id was there before, and answers are told apart by it")
        seen.add(record["custom_id"])
        yield Line(record["custom_id"], record["url"], record["body"])


def _answered(path: Path, wanted: set[str]) -> set[str]:
    """Return the requests that a file answers; failures of the server and a line torn by a crash are taken out."""
    if not path.exists():
        return set()
    if not path.is_file():
        raise IlladaError(f"{path} is no file: give another --output")
    content = path.read_bytes()
    done: set[str] = set()
    kept: list[bytes] = []
    whole = content.rfind(b"\n") + 1
    if (torn := content[whole : whole + len(BEGINNING)]) and not BEGINNING.startswith(torn):
        raise IlladaError(f"{path} does not end in an answer of a batch: give another --output")
    for number, line in enumerate(content[:whole].splitlines(keepends=True), 1):
        try:
            record = json.loads(line)
            if not isinstance(record["custom_id"], str) or type(record["response"]["status_code"]) is not int:
                raise TypeError("a part is of another type")
            if record["response"]["status_code"] < 500:
                done.add(record["custom_id"])
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise IlladaError(f"{path} line {number} is no answer of a batch: give another --output") from None
    if others := done - wanted:
        raise IlladaError(f"{path} answers {sorted(others)[0][:80]!r}, which is not asked for: give another --output")
    if b"".join(kept) != content:
        write_bytes(path, b"".join(kept))
    return done


async def _answer_all(handlers: Handlers, lines: list[Line], path: Path, at_once: int) -> None:
    """Answer requests, `at_once` at a time; each answer is on the disk before the next request takes its place."""
    waiting = iter(lines)
    await handlers.worker.start()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:

            async def work() -> None:
                for line in waiting:
                    record = await _answer(handlers, line)
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    file.flush()
                    os.fsync(file.fileno())

            async with asyncio.TaskGroup() as group:
                for _ in range(min(at_once, len(lines))):
                    group.create_task(work())
    finally:
        await handlers.worker.close()


async def _answer(handlers: Handlers, line: Line) -> dict[str, Any]:
    """Return the record of one answer; what a server would refuse is an answer too."""
    try:
        body = URLS[line.url].model_validate({**line.body, "stream": None})
        status, found = 200, await handlers.complete(body)
    except ValidationError as error:
        places = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        refusal = validation_error(places)
        status, found = refusal.status, refusal.body
    except ApiError as error:
        status, found = error.status, error.body
    except Exception:
        log.exception("the request %s failed", line.custom_id[:80])
        failed = FailedError()
        status, found = failed.status, failed.body
    response = {"status_code": status, "request_id": f"req_{uuid.uuid4().hex}", "body": found}
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.custom_id, "response": response, "error": None}
