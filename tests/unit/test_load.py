"""The load itself, against small servers: what a latency counts, what becomes of errors."""

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from fellray.jobs.generator import Generator, Load, Question
from fellray.jobs.load import run_closed, run_open
from fellray.jobs.tally import OK
from fellray.jobs.wire import Target, connect

Answer = Callable[[bytes], Awaitable[bytes]]
YES = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


async def serve(answer: Answer) -> tuple[asyncio.Server, Target]:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                size = 0
                for line in head.split(b"\r\n"):
                    if line.startswith(b"Content-Length: "):
                        size = int(line.split(b" ")[1])
                said = await answer(head + await reader.readexactly(size))
                writer.write(said)
                if b"Connection: close" in said:
                    break
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    return server, Target("127.0.0.1", server.sockets[0].getsockname()[1], "secret")


async def say_yes(request: bytes) -> bytes:
    return YES


def test_a_request_carries_token_and_body_and_a_connection_is_kept() -> None:
    heard: list[bytes] = []

    async def listen(request: bytes) -> bytes:
        heard.append(request)
        return b"HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"

    async def go() -> None:
        server, target = await serve(listen)
        async with server:
            connection = await connect(target)
            for _ in range(2):
                request = target.write_request("POST", "/x", b"[1]")
                assert await connection.ask(request) == (404, b"ab")
                assert connection.open
            connection.close()

    asyncio.run(go())
    assert heard[0] == heard[1]
    assert heard[0].startswith(b"POST /x HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nAuthorization: Bearer secret\r\n" in heard[0]
    assert heard[0].endswith(b"Content-Length: 3\r\n\r\n[1]")


def test_who_waits_for_a_slow_service_is_counted_as_waiting() -> None:
    """The service stands still for 0.3 s: of 30 requests due meanwhile each is late by what was
    left of that. A clock that starts at sending would have seen one slow answer."""
    stalled = asyncio.Event

    async def go() -> list[float]:
        free, first = stalled(), True

        async def answer(request: bytes) -> bytes:
            nonlocal first
            if first:
                first = False
                asyncio.get_running_loop().call_later(0.3, free.set)
            await free.wait()
            return YES

        server, target = await serve(answer)
        async with server:
            requests = [target.write_request("GET", "/")]
            times = np.arange(60) / 100
            fates, tally = await run_open(target, requests, np.zeros(60, np.int64), times)
        assert set(fates.fates) == {OK}
        assert tally.answered == 60
        return sorted(fates.latency_s)

    latency = asyncio.run(go())
    assert latency[-1] >= 0.29
    assert sum(seconds > 0.1 for seconds in latency) >= 15


def test_errors_have_kinds() -> None:
    async def go() -> list[str]:
        asked = 0

        async def answer(request: bytes) -> bytes:
            nonlocal asked
            asked += 1
            if asked == 2:
                return b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"
            if asked == 3:
                return b"Connection: close"  # no HTTP
            return YES

        server, target = await serve(answer)
        async with server:
            requests = [target.write_request("GET", "/")]
            fates, _ = await run_open(target, requests, np.zeros(4, np.int64), np.arange(4) / 20)
        gone, _ = await run_closed(target, requests, np.zeros(1, np.int64), 1, 0.1)
        return fates.fates + gone.fates

    fates = asyncio.run(go())
    assert fates[:4] == [OK, "status 503", "connection: ConnectionError", OK]
    assert set(fates[4:]) == {"connection: ConnectionRefusedError"}


def test_a_closed_loop_has_as_many_under_way_as_connections() -> None:
    async def go() -> int:
        under_way = most = 0

        async def answer(request: bytes) -> bytes:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            await asyncio.sleep(0.01)
            under_way -= 1
            return YES

        server, target = await serve(answer)
        async with server:
            requests = [target.write_request("GET", "/")]
            _, tally = await run_closed(target, requests, np.zeros(1, np.int64), 5, 0.2)
        assert tally.errors == {}
        assert tally.sent == tally.answered > 5
        return most

    assert asyncio.run(go()) == 5


@pytest.mark.timeout(60)
def test_the_generator_is_a_process_of_its_own() -> None:
    async def go() -> None:
        server, target = await serve(say_yes)
        async with server:
            with Generator() as generator:
                questions = [Question("POST", "/", {"a": 1}), Question("GET", "/")]
                for load in (Load([0, 1], 0.2, connections=2), Load([1, 0], 0.5, rate=40)):
                    told = await asyncio.to_thread(generator.ask, target, questions, load)
                    assert told.tally.errors == {}
                    assert len(told.latency_s) == told.tally.answered > 3

    asyncio.run(go())
