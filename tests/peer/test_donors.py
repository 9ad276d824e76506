"""Which donors are asked, and the way that one of them shows, which may be a lie."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from p2p_diloco.core.errors import Gone
from p2p_diloco.core.update import next_head
from p2p_diloco.core.waiting import now_s
from p2p_diloco.peer import donors, uploads
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import No, Size
from p2p_diloco.wire.state_messages import AskChunk, AskHeads, AskUpdate, Heads
from tests.support.builders import NOW_S
from tests.support.fakes import run_simulated
from tests.support.library import (
    TIMEOUTS,
    Donor,
    Library,
    new_replica,
    replica_at,
    says,
    silent,
    small_parts,
)


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with small_parts():
        yield


def test_heads_come_in_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(donors, "MAX_LINKS", 3)
    monkeypatch.setattr(uploads, "MAX_LINKS", 3)

    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", 6))
        donor = library.add(replica_at(tmp_path / "donor", 13))  # it holds 5 to 13
        assert await library.to(donor.replica) is not None
        assert [message.since for message in donor.asked if isinstance(message, AskHeads)] == [0, 8, 11]
        library.check_same(donor.replica)

    run_simulated(main())


def test_a_donor_with_a_gap_in_its_ledger(tmp_path: Path) -> None:
    """It was away itself: it holds what was before, and what has been since."""

    async def main() -> None:
        swarm = replica_at(tmp_path / "donor", 12)
        away = Library(tmp_path / "1", replica_at(tmp_path / "away", 3))
        away.add(swarm)
        assert await away.to(swarm) is not None
        assert sorted(away.replica.ledger.heads()) == [0, 1, 2, 3, 10, 11, 12]
        for name, mine in (("newcomer", None), ("early", 2)):
            replica = new_replica(tmp_path / name) if mine is None else replica_at(tmp_path / name, mine)
            library = Library(tmp_path / f"of-{name}", replica)
            library.add(away.replica)
            assert await library.to(swarm) is not None
            library.check_same(swarm)

    run_simulated(main())


@pytest.mark.parametrize(("links", "back_to"), [(1024, 0), (3, 4)])
def test_a_peer_shows_how_it_came_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: int, back_to: int
) -> None:
    """In pages, back to one with a head that I have been at, of updates that nobody holds any more."""
    monkeypatch.setattr(donors, "MAX_LINKS", links)
    monkeypatch.setattr(uploads, "MAX_LINKS", links)

    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", 6))
        donor = library.add(replica_at(tmp_path / "donor", 13))  # it holds 5 to 13
        await library.learn_way(donor)
        head_at = donor.replica.ledger.chain.head_at
        assert library.directory.before == {head_at(step): head_at(step - 1) for step in range(back_to + 1, 14)}
        assert library.replica.loaded.step == 6

    run_simulated(main())


@pytest.mark.parametrize("changes", [{"step": 51}, {"step": 12}, {"head": bytes(32)}])
def test_who_is_not_where_it_says_shows_no_way(tmp_path: Path, changes: dict[str, Any]) -> None:
    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", 6))
        donor = library.add(replica_at(tmp_path / "donor", 13), **changes)
        await library.learn_way(donor)
        assert library.directory.before == {}
        assert donor.count(AskHeads) == (0 if changes == {"step": 51} else 1), "the run has 50 outer steps"
        assert library.suspects() == []

    run_simulated(main())


# -- guides that lie -----------------------------------------------------------------------------------------------


async def invented_heads(donor: Donor, channel: Channel, message: AskHeads) -> None:
    """From what the joiner has to nowhere, as many as there should be."""
    mine = donor.replica.ledger.heads()
    await channel.send(Heads(first=0, head=mine[0], links=[bytes([step]) * 32 for step in range(max(mine))]))


async def the_target_alone(donor: Donor, channel: Channel, message: AskHeads) -> None:
    mine = donor.replica.ledger.heads()
    await channel.send(Heads(first=max(mine), head=mine[max(mine)], links=[]))


async def heads_before_what_was_asked_for(donor: Donor, channel: Channel, message: AskHeads) -> None:
    await channel.send(Heads(first=max(message.since - 1, 0), head=bytes(32), links=[bytes(32)] * 3))


async def heads_with_a_gap(donor: Donor, channel: Channel, message: AskHeads) -> None:
    """What the joiner has, and then, a page later, the target."""
    mine = donor.replica.ledger.heads()
    if message.since == 0:
        await channel.send(Heads(first=0, head=mine[0], links=[bytes(32)] * 3))
    else:
        await the_target_alone(donor, channel, message)


async def other_heads_on_the_next_page(donor: Donor, channel: Channel, message: AskHeads) -> None:
    await channel.send(Heads(first=message.since, head=bytes([message.since]) * 32, links=[bytes(32)] * 3))


async def heads_without_end(donor: Donor, channel: Channel, message: AskHeads) -> None:
    head = bytes(32)
    for _ in range(message.since):
        head = next_head(head, bytes(32))
    await channel.send(Heads(first=message.since, head=head, links=[bytes(32)] * 3))


ASKED_TWICE = {
    "before": heads_before_what_was_asked_for,
    "with a gap": heads_with_a_gap,
    "other ones": other_heads_on_the_next_page,
}


HEAD_LIES = {
    "closes": says(),
    "silent": silent,
    "nothing": says(No(reason="not in my ledger")),
    "out of turn": says(Size(size_bytes=3)),
    "invented": invented_heads,
    "the target alone": the_target_alone,
    "without end": heads_without_end,
    **ASKED_TWICE,
}


@pytest.mark.parametrize("name", HEAD_LIES)
def test_a_guide_that_lies_costs_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """And nothing of what the joiner has."""
    monkeypatch.setattr(donors, "MAX_LINKS", 3)
    monkeypatch.setattr(uploads, "MAX_LINKS", 3)

    async def answer(donor: Donor, channel: Channel, message: Message) -> bool:
        if isinstance(message, AskHeads):
            await HEAD_LIES[name](donor, channel, message)
            if name == "closes":
                raise Gone(channel.peer_id, "closes the stream")
            return True
        return False

    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", 3))
        alone = library.add(replica_at(tmp_path / "liar", 4), answer)
        before = library.replica.ledger.heads()
        assert await library.to(alone.replica) is None
        assert alone.count(AskUpdate) == alone.count(AskChunk) == 0
        assert (library.replica.ledger.heads(), library.replica.loaded.step) == (before, 3)
        assert alone.count(AskHeads) == (2 if name in {*ASKED_TWICE, "without end", "silent"} else 1)
        assert library.suspects() == ([0] if name in {"closes", "silent", "out of turn", *ASKED_TWICE} else [])

        library.publish(alone, issued_s=NOW_S + 1)
        began_s = now_s()
        await library.learn_way(alone)
        assert library.directory.before == {}
        assert now_s() - began_s <= TIMEOUTS.request_s + 1

        library.publish(alone, issued_s=NOW_S + 2)
        donor = library.add(alone.replica)
        assert await library.to(donor.replica) is not None
        assert not (tmp_path / "me" / "abandoned").exists()
        library.check_same(donor.replica)

    run_simulated(main())
