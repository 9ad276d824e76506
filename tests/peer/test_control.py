"""What a trainer and its network process do when the other one reads nothing."""

from __future__ import annotations

import asyncio
import logging

from p2p_diloco.peer.control import has_room, pack_line, socket_pair, unpack_line
from p2p_diloco.peer.network import MAX_UNREAD_BYTES, ToTrainer, is_read


def test_a_line_comes_back_as_it_was_sent() -> None:
    line = pack_line("progress", inner_step=3, loss=None)
    assert line.count(b"\n") == 1
    assert unpack_line(line) == {"kind": "progress", "inner_step": 3, "loss": None}


def test_where_there_is_room_nobody_waits_and_where_nobody_reads_there_is_none() -> None:
    mine, theirs = socket_pair()
    with mine, theirs:
        mine.settimeout(1.0)
        line, sent = pack_line("progress", text="x" * 300), 0
        while has_room(mine):
            mine.sendall(line)
            sent += len(line)
        assert sent > 10_000
        while sent:
            sent -= len(theirs.recv(sent))
        assert has_room(mine)


def test_a_line_to_one_that_is_gone_does_not_wait_either() -> None:
    mine, theirs = socket_pair()
    theirs.close()
    with mine:
        assert has_room(mine)


def test_what_a_stopped_trainer_does_not_read_is_not_kept() -> None:
    async def main() -> None:
        mine, theirs = socket_pair()
        _, writer = await asyncio.open_connection(sock=mine)
        with theirs:
            handler = ToTrainer(writer)
            record = logging.LogRecord("x", logging.INFO, "", 0, "y" * 1000, (), None)
            for _ in range(3 * MAX_UNREAD_BYTES // 1000):
                handler.emit(record)
            assert not is_read(writer)
            assert writer.transport.get_write_buffer_size() < MAX_UNREAD_BYTES + 2000
            writer.close()

    asyncio.run(main())
