"""What the network process does when the trainer reads nothing, and what it tells of what the trainer says."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

from p2p_diloco.peer.control import InnerStep, socket_pair
from p2p_diloco.peer.trainer import MAX_UNREAD_BYTES, ToTrainer, Trainer, is_read


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


def test_the_last_inner_step_is_told_however_soon_it_comes() -> None:
    told: list[Any] = []
    nothing: Any = None
    peer: Any = SimpleNamespace(
        step=3,
        seat=SimpleNamespace(phase="inner"),
        presence=SimpleNamespace(trained=SimpleNamespace()),
        events=SimpleNamespace(write=told.append),
    )

    async def main() -> None:
        trainer = Trainer(nothing, nothing)
        for i in (1, 2, 3):
            line = InnerStep(inner_step=i, planned=3, step_s=0.1, loss=None, tokens=i, tokens_per_s=1.0)
            trainer.on_inner_step(peer, line)

    asyncio.run(main())
    assert [event.inner_step for event in told] == [1, 3]
