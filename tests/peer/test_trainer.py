"""What the network process does when the trainer reads nothing."""

from __future__ import annotations

import asyncio
import logging

from p2p_diloco.peer.control import socket_pair
from p2p_diloco.peer.trainer import MAX_UNREAD_BYTES, ToTrainer, is_read


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
