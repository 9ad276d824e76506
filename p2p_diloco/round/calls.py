"""The first words with a peer while a round is formed. Who is there answers at once, whatever it is at, so it is not
waited for as long as for other answers. How long each took is kept (``core.recent``).

That goes for proven peers alone. Nobody waits for the answers of the others, which may have to be dialled first.
"""

from __future__ import annotations

from typing import TypeVar

from p2p_diloco.core.errors import Silent
from p2p_diloco.core.waiting import now_s
from p2p_diloco.round.company import Company
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.message import Message

M = TypeVar("M", bound=Message)


def answer_s(company: Company, peer_id: str) -> float:
    """Returns how long a peer's first answer is waited for, in seconds: ``Recent.answer_s`` where it is proven, else
    ``Timeouts.request_s``."""
    timeouts = company.here.timeouts
    return company.recent.answer_s(timeouts) if peer_id in company.here.directory.proven else timeouts.request_s


async def reach(company: Company, peer_id: str) -> Channel:
    """Opens a stream to a peer. Silent when that takes longer than ``answer_s``; else as ``Here.open``."""
    try:
        return await company.here.open_within(peer_id, answer_s(company, peer_id))
    except Silent:
        _note(company, company.here.timeouts.request_s)
        raise


async def ask(company: Company, channel: Channel, message: Message, *kinds: type[M]) -> M:
    """Sends the first message, and returns the answer. Silent after ``answer_s``; else as ``Channel.request``."""
    asked_s = now_s()
    try:
        answer = await channel.request(message, *kinds, timeout_s=answer_s(company, channel.peer_id))
    except Silent:
        _note(company, company.here.timeouts.request_s)
        raise
    _note(company, now_s() - asked_s)
    return answer


def _note(company: Company, took_s: float) -> None:
    company.recent.note_answer(company.here.seat.standing.head, took_s)
