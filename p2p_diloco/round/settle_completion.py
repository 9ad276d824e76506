"""How a member completes a commit: it fetches the parts that it misses, and makes the update of all of them.

What others send here is checked here: a part is taken only when it has the hash that the commit names, and is not one
that this member refuses.
"""

from __future__ import annotations

import logging

from p2p_diloco.core.errors import Misbehaved, RemoteError
from p2p_diloco.core.update import Update
from p2p_diloco.core.waiting import run_all
from p2p_diloco.round.meeting import Meeting
from p2p_diloco.wire.messages import Size
from p2p_diloco.wire.round_messages import AskPart, Commit

log = logging.getLogger(__name__)

COULD_NOT_FETCH = "the round committed, but parts of the update could not be fetched"


class Completion:
    """Completes commits of one round at one member."""

    def __init__(self, meeting: Meeting) -> None:
        self.meeting = meeting
        self.group = meeting.group

    async def complete(self, commit: Commit, leader: int) -> Update | None:
        """Returns the update of a commit, after fetching the parts that I do not hold. None when some do not come."""
        await self.fetch_missing(commit, leader)
        held = [part for part in self.meeting.parts if part is not None]
        if [part.hash for part in held] != commit.part_hashes:
            return None
        return Update(header=self.group.header(commit.part_hashes), parts=tuple(held))

    async def fetch_missing(self, commit: Commit, leader: int) -> None:
        """Fetches the parts of a commit that I do not hold, first from the holders that it names, as far as I reach
        them, and what fails there from the leader; one stream at a time to each."""
        named = [holder if holder in self.meeting.within_call else leader for holder in commit.holders]
        for sources in (named, [leader] * len(commit.holders)):
            wanted_from: dict[int, list[int]] = {}
            for part, (held, wanted) in enumerate(zip(self.meeting.parts, commit.part_hashes)):
                if held is None or held.hash != wanted:
                    self.meeting.parts[part] = None
                    if wanted not in self.meeting.refused:
                        wanted_from.setdefault(sources[part], []).append(part)
            others = [i for i in wanted_from if i != self.meeting.me]
            await run_all(*(self._fetch(commit, source, wanted_from[source]) for source in others))

    async def _fetch(self, commit: Commit, source: int, parts: list[int]) -> None:
        """Fetches some parts of a commit from one member, which is lost when it fails or sends other bytes. It is not
        to blame for a part that I refuse: it may have taken it in good faith."""
        meeting = self.meeting
        try:
            for part in parts:
                channel = await meeting.open(source)
                try:
                    wanted = commit.part_hashes[part]
                    await channel.request(AskPart(round_id=self.group.round_id, part=part, hash=wanted), Size)
                    received, reduction = await meeting.receive_part(channel, part, meeting.timeouts.request_s)
                finally:
                    channel.close()
                if received.hash != wanted:
                    raise Misbehaved(channel.peer_id, f"sends other bytes for part {part} than it said that it holds")
                if objection := meeting.objection(part, received, reduction):
                    log.warning("outer step %d: the group holds what I refuse: %s", self.group.step, objection)
                    meeting.refused.add(wanted)
                    continue
                if meeting.takes(part, received, reduction):
                    meeting.hold(part, received, reduction)
        except RemoteError as error:
            meeting.lose(source, error)
