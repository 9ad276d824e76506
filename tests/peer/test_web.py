"""The server over real connections on loopback: what strangers may send, and what they get."""

from __future__ import annotations

import asyncio
import gzip
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.errors import UsageError
from p2p_diloco.peer import web
from p2p_diloco.peer.web import HEADERS, MAX_HEAD_BYTES, TEXT, Response, receive, serving, url_of

LONG = b"a page of some length\n" * 1000
PATIENT = Timeouts()
QUICK = Timeouts(request_s=0.3, write_s=0.3, leave_s=2.0)
LIMIT_S = 20.0
ENOUGH = 64 * 1024 * 1024


def site(path: str) -> Response | None:
    if path == "/broken":
        raise RuntimeError("a mistake of ours")
    pages = {"/": b"hello", "/long": LONG, "/endless": bytes(ENOUGH)}
    return Response(body=pages[path], content_type=TEXT) if path in pages else None


class Client:
    def __init__(self, port: int) -> None:
        self.port = port

    async def send(self, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        return reader, writer

    async def ask(self, data: bytes) -> bytes:
        """Everything that comes back until the server closes."""
        reader, writer = await self.send(data)
        try:
            return await to_the_end(reader)
        finally:
            writer.close()

    async def get(self, path: str, *headers: str) -> tuple[int, dict[str, str], bytes]:
        lines = [f"GET {path} HTTP/1.1", "Host: here", *headers, "", ""]
        return parsed(await self.ask("\r\n".join(lines).encode()))


async def to_the_end(reader: asyncio.StreamReader) -> bytes:
    """What came before the server closed, or broke off."""
    received = b""
    try:
        while data := await reader.read(1 << 20):
            received += data
    except ConnectionError:
        pass
    return received


def parsed(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), dict(line.split(": ", 1) for line in lines), body


@asynccontextmanager
async def server(timeouts: Timeouts) -> AsyncIterator[Client]:
    async with serving("127.0.0.1", 0, site, timeouts) as url:
        yield Client(int(url.rstrip("/").rpartition(":")[2]))


def with_server(work: Callable[[Client], Awaitable[None]], timeouts: Timeouts = PATIENT) -> None:
    async def main() -> None:
        async with server(timeouts) as client:
            await asyncio.wait_for(work(client), LIMIT_S)

    asyncio.run(main())


def test_what_is_there_is_sent_with_its_type_and_all_headers() -> None:
    async def work(client: Client) -> None:
        status, headers, body = await client.get("/?a=b")
        assert (status, body) == (200, b"hello")
        assert headers == {**HEADERS, "Content-Length": "5", "Content-Type": TEXT}
        assert "default-src 'self'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"

    with_server(work)


@pytest.mark.parametrize("path", ["/nowhere", "//", "/../web.py", "/%2e%2e/web.py", "*", "http://elsewhere/"])
def test_what_is_not_there_is_not_found(path: str) -> None:
    async def work(client: Client) -> None:
        assert (await client.get(path))[0] == 404

    with_server(work)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "HEAD", "TRACE", "get"])
def test_only_get_is_answered(method: str) -> None:
    async def work(client: Client) -> None:
        request = f"{method} / HTTP/1.1\r\nHost: here\r\nContent-Length: 3\r\n\r\nabc"
        status, headers, body = parsed(await client.ask(request.encode()))
        assert (status, headers["Allow"]) == (405, "GET")
        assert (body == b"") == (method == "HEAD")

    with_server(work)


def test_compressed_where_that_is_accepted_and_worth_it() -> None:
    async def work(client: Client) -> None:
        status, headers, body = await client.get("/long", "Accept-Encoding: br, gzip;q=0.8")
        assert (status, headers["Content-Encoding"], gzip.decompress(body)) == (200, "gzip", LONG)
        assert len(body) == int(headers["Content-Length"]) < len(LONG) / 10
        for refused in ("gzip;q=0", "gzip; q=0.0", "br", "x-gzip", ""):
            _, headers, body = await client.get("/long", f"Accept-Encoding: {refused}")
            assert ("Content-Encoding" in headers, body) == (False, LONG)
        assert (await client.get("/", "Accept-Encoding: gzip"))[2] == b"hello"

    with_server(work)


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"hello\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no host
        (b"GET / HTTP/1.1\r\nHost: here\r\nContent-Length: -1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS
        (b"GET /" + b"a" * 2 * MAX_HEAD_BYTES + b" HTTP/1.1\r\nHost: here\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: here\r\n" + b"X: y\r\n" * MAX_HEAD_BYTES + b"\r\n", 431),
    ],
)
def test_what_is_no_request_or_too_long_is_said_to_be_so(request_bytes: bytes, status: int) -> None:
    async def work(client: Client) -> None:
        assert parsed(await client.ask(request_bytes))[0] == status
        assert (await client.get("/"))[0] == 200

    with_server(work)


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_a_request_an_error_or_an_end(data: bytes, like_a_request: bool) -> None:
    async def work() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(b"GET /" * like_a_request + data)
        reader.feed_eof()
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        with suppress(h11.RemoteProtocolError):
            request = await receive(connection, reader)
            assert request is None or request.method

    asyncio.run(work())


@pytest.mark.parametrize("trickle", [False, True])
def test_who_is_slow_to_ask_is_cut_off_and_nobody_waits_for_it(trickle: bool) -> None:
    async def work(client: Client) -> None:
        reader, writer = await client.send(b"GET /")
        ended = asyncio.ensure_future(to_the_end(reader))
        assert (await client.get("/"))[0] == 200
        while trickle and not ended.done():
            writer.write(b"a")
            await asyncio.sleep(0.02)
        assert await ended == b""
        writer.close()

    with_server(work, QUICK)


def test_who_does_not_read_is_cut_off() -> None:
    async def work(client: Client) -> None:
        reader, writer = await client.send(b"GET /endless HTTP/1.1\r\nHost: here\r\n\r\n")
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(3 * QUICK.write_s)
        reader._transport.resume_reading()  # type: ignore[attr-defined]
        assert len(await to_the_end(reader)) < ENOUGH
        writer.close()
        assert (await client.get("/"))[0] == 200

    with_server(work, QUICK)


def test_who_reads_slowly_gets_all_of_it() -> None:
    async def work(client: Client) -> None:
        reader, writer = await client.send(b"GET /endless HTTP/1.1\r\nHost: here\r\n\r\n")
        received = 0
        while data := await reader.read(1 << 22):
            received += len(data)
            await asyncio.sleep(0.002)
        assert received > ENOUGH
        writer.close()

    with_server(work)


def test_beyond_the_limit_connections_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "MAX_CONNECTIONS", 3)

    async def work(client: Client) -> None:
        waiting = [await client.send(b"GET /") for _ in range(3)]
        await asyncio.sleep(0.05)
        assert await client.ask(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n") == b""
        reader, writer = waiting[0]
        writer.write(b" HTTP/1.1\r\nHost: here\r\n\r\n")
        assert b"200 OK" in await to_the_end(reader)
        writer.close()
        assert (await client.get("/"))[0] == 200
        for _, writer in waiting:
            writer.close()

    with_server(work)


def test_a_mistake_of_ours_costs_one_answer(caplog: pytest.LogCaptureFixture) -> None:
    async def work(client: Client) -> None:
        assert (await client.get("/broken"))[0] == 500
        assert (await client.get("/"))[0] == 200

    with_server(work)
    assert "a mistake of ours" in caplog.text


def test_closing_cuts_off_who_is_connected() -> None:
    async def main() -> None:
        async with server(PATIENT) as client:
            reader, writer = await client.send(b"GET /")
            await asyncio.sleep(0.05)
        assert await asyncio.wait_for(to_the_end(reader), LIMIT_S) == b""
        writer.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_port_that_is_taken_is_named() -> None:
    async def main(port: int) -> None:
        with pytest.raises(UsageError, match=f"port {port} is in use"):
            async with serving("127.0.0.1", port, site, PATIENT):
                raise AssertionError
        with pytest.raises(UsageError, match=r"cannot listen on 203\.0\.113\.7:80"):
            async with serving("203.0.113.7", 80, site, PATIENT):
                raise AssertionError

    with socket.create_server(("127.0.0.1", 0)) as taken:
        asyncio.run(main(taken.getsockname()[1]))


def test_where_a_browser_finds_it() -> None:
    assert url_of("0.0.0.0", 80) == url_of("127.0.0.1", 80) == "http://127.0.0.1:80/"
    assert url_of("::", 80) == url_of("::1", 80) == "http://[::1]:80/"
