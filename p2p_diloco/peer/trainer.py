"""The trainer, as its network process sees it: lines that come from it and go to it, and the log that it prints.

Nothing here waits for the trainer to read: one that is stopped misses what tells of the moment only.
"""

from __future__ import annotations

import asyncio
import logging
import time

from p2p_diloco.core.event import InnerStepEnded, ThetaEvaluated
from p2p_diloco.core.pace import Progress
from p2p_diloco.core.peer_row import PeerRow
from p2p_diloco.core.swarm_head import newest_evaluation
from p2p_diloco.core.waiting import heard, now_s
from p2p_diloco.peer.control import (
    Evaluated,
    FromNetwork,
    FromTrainer,
    InnerStep,
    LogLine,
    Moved,
    News,
    Peers,
    pack_line,
    unpack_line,
)
from p2p_diloco.peer.peer import Peer

PEERS_EVERY_S = 1.0
MAX_UNREAD_BYTES = 1 << 20
INNER_EVENT_EVERY_S = 1.0


class ToTrainer(logging.Handler):
    """Sends log records to the trainer, which alone writes to the terminal."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        super().__init__()
        self.writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        if not is_read(self.writer):
            return
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        self.writer.write(pack_line(LogLine(level=record.levelno, name=record.name, text=text)))


class Trainer:
    """The other end of the control socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._inner_event_s = 0.0
        """When the last inner step was written to the event log."""

    async def receive(self) -> FromTrainer | FromNetwork:
        """Returns the next line. Raises EOFError when the trainer is gone."""
        data = await self.reader.readline()
        if not data:
            raise EOFError
        return unpack_line(data)

    def send(self, line: FromNetwork) -> None:
        """Sends one line, without waiting for the trainer to read it."""
        self.writer.write(pack_line(line))

    def on_inner_step(self, peer: Peer, line: InnerStep) -> None:
        """Notes that the trainer has made an inner step."""
        came_s = now_s()
        inner_step, planned = line.inner_step, line.planned
        peer.seat.progress = Progress(inner_step=inner_step, planned=planned, step_s=line.step_s, reported_s=came_s)
        peer.presence.trained.loss, peer.presence.trained.tokens = line.loss, line.tokens
        peer.presence.trained.tokens_per_s = line.tokens_per_s
        if peer.seat.phase == "evaluate":
            peer.presence.enter("inner")  # a trainer need not evaluate when it is its turn
        if came_s - self._inner_event_s >= INNER_EVENT_EVERY_S or inner_step >= planned:
            self._inner_event_s = came_s
            ended = InnerStepEnded(
                step=peer.step,
                inner_step=inner_step,
                planned=planned,
                loss=line.loss,
                tokens=line.tokens,
                tokens_per_s=line.tokens_per_s,
            )
            peer.events.write(ended)

    def on_evaluated(self, peer: Peer, line: Evaluated) -> None:
        """Notes the loss that the trainer has found on held-out text, and has it published."""
        peer.presence.trained.held_out_loss, peer.presence.trained.held_out_step = line.held_out_loss, line.step
        evaluated = ThetaEvaluated(
            step=line.step, held_out_loss=line.held_out_loss, tokens=line.tokens, seconds=line.seconds
        )
        peer.events.write(evaluated)
        if peer.seat.phase == "evaluate":
            peer.presence.enter("inner")
        peer.presence.publish_now.ring()

    async def tell_news(self, peer: Peer) -> None:
        """Tells the trainer when a round closes or the swarm has gone on, and a seed's owner when the seed has
        followed, until it is cancelled."""
        seat = peer.seat
        told: tuple[float | None, bool, int] = (None, False, peer.step)
        while True:
            changed = seat.changed.event
            news = (seat.closes_s, peer.follower.behind, peer.step)
            if news != told:
                told = news
                closes_in_s = None if seat.closes_s is None else seat.closes_s - now_s()
                self.send(News(closes_in_s=closes_in_s, behind=peer.follower.behind))
                if peer.role == "seed":
                    self.send(Moved(step=peer.step, head=seat.standing.head.hex()))
            await heard(changed, PEERS_EVERY_S)

    async def tell_peers(self, peer: Peer) -> None:
        """Tells the trainer what everybody's record says, every PEERS_EVERY_S, until it is cancelled."""
        while True:
            records = [peer.presence.record(), *peer.directory.live(time.time())]
            if is_read(self.writer):
                rows = tuple(map(PeerRow.of, records))
                self.send(Peers(rows=rows, evaluation=newest_evaluation(records, peer.follower.target())))
            await asyncio.sleep(PEERS_EVERY_S)


def is_read(writer: asyncio.StreamWriter) -> bool:
    """Tells whether the trainer reads what it is told: it may be stopped."""
    return writer.transport.get_write_buffer_size() < MAX_UNREAD_BYTES
