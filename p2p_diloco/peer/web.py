"""A small HTTP server that strangers may reach: GET alone, one answer per connection, everything bounded.

What is at a path is decided by a plain function (``Site``); here is only what a stranger's request goes through:

    more than MAX_CONNECTIONS at once          closed without an answer
    a head of more than MAX_HEAD_BYTES         431
    no whole head within ``request_s``         closed without an answer
    no HTTP                                    400
    any method but GET                         405
    a path that is nowhere                     404
    an answer not taken within ``write_s``     cut off

A request's body is never read. There is no TLS and no login: behind a public name, put a reverse proxy before it.
"""

from __future__ import annotations

import asyncio
import errno
import gzip
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus

import h11

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.waiting import deadline

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 128
MAX_HEAD_BYTES = 8192
"""Of the request's first line and headers; a head that is whole may have READ_BYTES more."""
READ_BYTES = 1024
GZIP_FROM_BYTES = 1024
TEXT = "text/plain; charset=utf-8"
HEADERS = {
    "Cache-Control": "no-cache",
    "Connection": "close",
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept-Encoding",
    "X-Content-Type-Options": "nosniff",
}
"""Of every answer."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """One answer, which may be kept and sent many times."""

    body: bytes
    content_type: str
    status: HTTPStatus = HTTPStatus.OK

    @cached_property
    def gzipped(self) -> bytes:
        """Returns the body, compressed."""
        return gzip.compress(self.body, compresslevel=5, mtime=0)


Site = Callable[[str], Response | None]
"""Path, without a query -> what is there. Called in the event loop, so it has its answer at hand."""


def plain_response(status: HTTPStatus) -> Response:
    """Returns an answer that is its status and nothing else."""
    return Response(body=f"{status.value} {status.phrase}\n".encode(), content_type=TEXT, status=status)


@asynccontextmanager
async def serving(host: str, port: int, site: Site, timeouts: Timeouts) -> AsyncIterator[str]:
    """Serves a site inside the block, and yields where a browser on this machine finds it. Port 0 takes a free one.
    Raises UsageError when it cannot listen there. At the end of the block, answers under way are cut off."""
    connections = _Connections(site, timeouts)
    try:
        server = await asyncio.start_server(connections.serve, host, port, limit=MAX_HEAD_BYTES)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"port {port} is in use: end the program that listens there, or choose another") from error
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    try:
        yield url_of(*server.sockets[0].getsockname()[:2])
    finally:
        server.close()
        await connections.close()


def url_of(host: str, port: int) -> str:
    """Returns the address at which a browser on this machine finds a server that listens on ``host`` and ``port``."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


class _Connections:
    def __init__(self, site: Site, timeouts: Timeouts) -> None:
        self.site = site
        self.timeouts = timeouts
        self.tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self.tasks) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self.tasks.add(task)
        try:
            await self._exchange(reader, writer)
        except (OSError, asyncio.TimeoutError, asyncio.CancelledError) as error:
            log.debug("a request came to nothing: %r", error)  # cancelled: by ``close``, and asyncio would log it
        finally:
            self.tasks.discard(task)
            writer.transport.abort()

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=self.timeouts.leave_s / 4)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection, request = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES), None
        try:
            async with deadline(self.timeouts.request_s):
                request = await receive(connection, reader)
            if request is None:
                return
            response = self._answer(request)
        except h11.RemoteProtocolError as error:
            response = plain_response(HTTPStatus(error.error_status_hint))
        writer.write(as_sent(connection, request, response))
        writer.close()  # once all is written
        async with deadline(self.timeouts.write_s):
            await writer.wait_closed()

    def _answer(self, request: h11.Request) -> Response:
        if request.method != b"GET":
            return plain_response(HTTPStatus.METHOD_NOT_ALLOWED)
        path = request.target.partition(b"?")[0].decode("latin-1")
        try:
            return self.site(path) or plain_response(HTTPStatus.NOT_FOUND)
        except Exception:
            log.exception("%s cannot be answered", path)
            return plain_response(HTTPStatus.INTERNAL_SERVER_ERROR)


async def receive(connection: h11.Connection, reader: asyncio.StreamReader) -> h11.Request | None:
    """Returns the request; None when the other side closes first. Raises RemoteProtocolError for what is no HTTP, or
    too long."""
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Request):
            return event
        if event is not h11.NEED_DATA:
            return None
        connection.receive_data(await reader.read(READ_BYTES))


def as_sent(connection: h11.Connection, request: h11.Request | None, response: Response) -> bytes:
    """Returns the whole answer as bytes; ``request`` is None when it was none."""
    body, headers = response.body, dict(HEADERS)
    if request is not None and takes_gzip(request) and len(body) >= GZIP_FROM_BYTES:
        body = response.gzipped
        headers["Content-Encoding"] = "gzip"
    headers |= {"Content-Length": str(len(body)), "Content-Type": response.content_type}
    if response.status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = "GET"
    reason = response.status.phrase.encode()
    events: list[h11.Event] = [h11.Response(status_code=response.status, headers=list(headers.items()), reason=reason)]
    if request is None or request.method != b"HEAD":
        events.append(h11.Data(data=body))
    return b"".join(connection.send(event) or b"" for event in [*events, h11.EndOfMessage()])


def takes_gzip(request: h11.Request) -> bool:
    """Tells whether the browser takes compressed answers."""
    accepted = b",".join(value for name, value in request.headers if name == b"accept-encoding").lower()
    return any(re.fullmatch(rb"\s*gzip\s*(;\s*q=(?!0(\.0*)?\s*$).*)?", choice) for choice in accepted.split(b","))
