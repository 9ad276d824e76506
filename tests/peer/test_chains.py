"""The chain from a donor: how much of it is asked for, and that nothing is taken along one that is not sound."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from p2p_diloco.core.anchor import Anchors
from p2p_diloco.core.certificate import Certified
from p2p_diloco.core.identity import Identity
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.peer import chains, uploads
from p2p_diloco.peer.chains import unpack_entries
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import No, Size
from p2p_diloco.wire.state_messages import AskChain, AskChunk, AskUpdate, Heads
from tests.support import library as support
from tests.support.builders import NOW_S, damaged, identity, plain_values
from tests.support.fakes import run_simulated
from tests.support.library import (
    Donor,
    Library,
    Lie,
    advance,
    frames,
    new_replica,
    on,
    replica_at,
    says,
    silent,
    small_parts,
    update_after,
)

STRANGERS = (identity(30), identity(31))


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with small_parts():
        yield


def asked(donor: Donor) -> list[int]:
    return [message.since for message in donor.asked if isinstance(message, AskChain)]


def entries_of(replica: Replica, since: int = 0) -> list[Certified]:
    chain = replica.ledger.chain
    return [entry for step in range(since, chain.end) if (entry := chain.entry(step)) is not None]


def same_chain(library: Library, swarm: Replica) -> None:
    """In memory, and on the disk."""
    for chain in (library.replica.ledger.chain, new_replica(library.replica.ledger.folder).ledger.chain):
        assert [chain.head_at(step) for step in range(chain.end + 1)] == [
            swarm.ledger.chain.head_at(step) for step in range(swarm.ledger.chain.end + 1)
        ]


# -- honest donors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 7, 24])
def test_a_newcomer_follows_it_from_the_genesis_on(tmp_path: Path, step: int) -> None:
    """Also where the snapshot is a late one, and the donor has no earlier updates any more."""

    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        swarm = replica_at(tmp_path / "donor", step)
        donor = library.add(swarm)
        assert await library.to(swarm) is not None
        assert asked(donor) == [0]
        assert entries_of(library.replica) == entries_of(swarm)
        assert library.replica.known() == swarm.known()
        library.check_same(swarm)

    run_simulated(main())


@pytest.mark.parametrize(
    ("mine", "fork_at", "theirs", "since"),
    [
        (6, 10**6, 13, [6]),
        (4, 10**6, 24, [4]),  # beyond what the donor has updates of
        (7, 6, 9, [6]),
        (9, 2, 13, [4, 0]),  # it has updates from 5 on; the chains part before
        (24, 21, 23, [21]),
        (24, 1, 3, [1]),
        (30, 3, 40, [30, 14, 0]),
        (20, 18, 40, [20, 4]),
    ],
)
def test_it_is_asked_for_from_where_it_may_leave_mine(
    tmp_path: Path, mine: int, fork_at: int, theirs: int, since: list[int]
) -> None:
    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", mine, fork_at=fork_at))
        swarm = replica_at(tmp_path / "donor", theirs)
        donor = library.add(swarm)
        assert await library.to(swarm) is not None
        assert asked(donor) == since
        same_chain(library, swarm)
        library.check_same(swarm)
        assert library.suspects() == []

    run_simulated(main())


def test_it_comes_in_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page_bytes = 4000
    monkeypatch.setattr(uploads, "MAX_CHAIN_BYTES", page_bytes)
    monkeypatch.setattr(chains, "MAX_CHAIN_BYTES", page_bytes)

    async def main() -> None:
        library = Library(tmp_path, new_replica(tmp_path / "me"))
        swarm = replica_at(tmp_path / "donor", 13)
        donor = library.add(swarm)
        assert await library.to(swarm) is not None
        starts = asked(donor)
        assert starts[0] == 0
        assert len(starts) > 2
        for start, stop in zip(starts, [*starts[1:], 13]):
            sent = swarm.ledger.chain.pieces(start, page_bytes)
            assert len(msgpack.packb(sent)) <= page_bytes
            assert start + len(sent) >= stop
        same_chain(library, swarm)
        library.check_same(swarm)

    run_simulated(main())


def test_one_that_ends_before_the_target_is_passed_over(tmp_path: Path) -> None:
    """Its updates lead there, and nobody has signed them."""

    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", 3))
        swarm = replica_at(tmp_path / "donor", 8)

        async def end_early(donor: Donor, channel: Channel, message: Message) -> bool:
            if isinstance(message, AskChain):
                pieces = swarm.ledger.chain.pieces(message.since, 10**6)
                await channel.send_blob(bytes(msgpack.packb(pieces[:-1])))
                return True
            return False

        short = library.add(swarm, end_early)
        assert await library.to(swarm) is None
        assert short.count(AskUpdate) == 0
        assert library.suspects() == []
        assert library.replica.loaded.step == 3
        assert library.replica.ledger.chain.end == 7, "what came of it was sound"
        donor = library.add(swarm)
        assert await library.to(swarm) is not None
        assert asked(donor) == [7]
        library.check_same(swarm)

    run_simulated(main())


def test_what_came_stays_and_is_not_asked_for_again(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = replica_at(tmp_path / "swarm", 13)
        library = Library(tmp_path / "1", new_replica(tmp_path / "me"))
        library.add(swarm, on(AskChunk, says()))
        assert await library.to(swarm) is None
        again = Library(tmp_path / "2", new_replica(tmp_path / "me"))
        donor = again.add(swarm)
        assert await again.to(swarm) is not None
        assert asked(donor) == []
        again.check_same(swarm)

    run_simulated(main())


def test_mine_is_given_up_no_sooner_than_there_is_something_in_its_place(tmp_path: Path) -> None:
    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", 24, fork_at=18))
        mine, swarm = entries_of(library.replica), replica_at(tmp_path / "swarm", 22)
        library.add(swarm, on(AskUpdate, says(No(reason="busy serving others"))))
        assert await library.to(swarm) is None
        assert entries_of(library.replica) == mine
        assert library.replica.known().step == 24
        library.add(swarm)
        assert await library.to(swarm) is not None
        assert entries_of(library.replica) == entries_of(swarm)
        library.check_same(swarm)

    run_simulated(main())


# -- what a donor's answer is ------------------------------------------------------------------------------------------


@given(st.binary(max_size=300) | plain_values.map(msgpack.packb))
@example(b"")
@example(b"\x90")
@example(b"\xdd\xff\xff\xff\xff")
def test_no_other_bytes_are_entries(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"entr|header|msgpack"):
        unpack_entries(data, 0)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    with small_parts():
        return chain_of(*entries_of(replica_at(tmp_path_factory.mktemp("sound"), 3)))


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_answer_that_is_damaged_is_none(sound: bytes, data: st.DataObject) -> None:
    """Or a changed byte is under a signature, which is verified then."""
    assert len(unpack_entries(sound, 0)) == 3
    with pytest.raises(ValueError, match=r"entries of other"):
        unpack_entries(sound, 1)
    changed = data.draw(damaged(sound))
    with contextlib.suppress(ValueError):
        assert chain_of(*unpack_entries(changed, 0)) == changed


# -- donors that lie: the first one asked does, the second one helps -----------------------------------------------


def chain_of(*entries: Certified) -> bytes:
    return bytes(msgpack.packb([entry.to_bytes() for entry in entries]))


def blob(data: bytes) -> Lie:
    async def lie(donor: Donor, channel: Channel, message: Message) -> None:
        await channel.send_blob(data)

    return on(AskChain, lie)


def size(size_bytes: int) -> bytes:
    return bytes(msgpack.packb(["size", {"size_bytes": size_bytes}]))


def made_by(replica: Replica, members: Sequence[Identity], owner: Identity, steps: int) -> Replica:
    """Goes on from where it stands, as ``members`` decide it and ``owner`` witnesses it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "MEMBERS", members)
        patch.setattr(support, "OWNER", owner)
        return advance(replica, replica.loaded.step + steps, seed=5)


def last_changed(entries: list[Certified], change: str) -> list[Certified]:
    last = entries[-1]
    header, certificate = last.header, last.certificate
    changed = {
        "unsigned": replace(last, certificate=replace(certificate, signatures=())),
        "other state": replace(last, certificate=replace(certificate, state=bytes(32))),
        "other full": replace(last, certificate=replace(certificate, full=b"\x01")),
        "of another update": replace(last, certificate=entries[-2].certificate),
        "other parts": replace(last, header=replace(header, part_hashes=(bytes(32),) * len(header.part_hashes))),
        "other parent": replace(last, header=replace(header, parent=bytes(32))),
    }
    return [*entries[:-1], changed[change]]


CHANGES = ("unsigned", "other state", "other full", "of another update", "other parts", "other parent")
GARBLED: dict[str, Lie] = {
    "closes": on(AskChain, says()),
    "refuses": on(AskChain, says(No(reason="not in my chain"))),
    "is silent": on(AskChain, silent),
    "out of turn": on(AskChain, says(Heads(first=0, head=bytes(32), links=[]))),
    "too large": on(AskChain, frames(size(2**59))),
    "nothing": blob(b""),
    "no list": blob(bytes(msgpack.packb(3))),
    "an empty list": blob(bytes(msgpack.packb([]))),
    "a list of lists": blob(bytes(msgpack.packb([[]] * 65536))),
    "no entry": blob(bytes(msgpack.packb([b""] * 65536))),
    "nested": blob(b"\x91" * 10**5),
}


async def check_liar(library: Library, swarm: Replica, target: Replica, lie: Lie, name: str) -> None:
    """Nothing is taken from it, and it is blamed unless it refused."""
    mine, step = entries_of(library.replica), library.replica.state and library.replica.state.step
    liar = library.add(target, lie)
    assert await library.to(target) is None
    assert liar.count(AskUpdate) == liar.count(AskChunk) == 0
    assert asked(liar) != []
    assert entries_of(library.replica)[: len(mine)] == mine
    assert (library.replica.state and library.replica.state.step) == step
    assert library.suspects() == ([] if name == "refuses" else [0])
    donor = library.add(swarm)
    assert await library.to(swarm) is not None
    assert donor.count(AskUpdate) > 0 or name == "refuses"
    same_chain(library, swarm)
    library.check_same(swarm)


@pytest.mark.parametrize("mine", [None, 18])
@pytest.mark.parametrize("name", GARBLED)
def test_what_is_no_chain_costs_the_guide_its_turn(tmp_path: Path, name: str, mine: int | None) -> None:
    async def main() -> None:
        replica = new_replica(tmp_path / "me") if mine is None else replica_at(tmp_path / "me", mine)
        swarm = replica_at(tmp_path / "swarm", 21)
        await check_liar(Library(tmp_path, replica), swarm, swarm, GARBLED[name], name)

    run_simulated(main())


@pytest.mark.parametrize("mine", [None, 18])
@pytest.mark.parametrize("change", CHANGES)
def test_one_entry_that_is_not_sound_costs_the_guide_its_turn(tmp_path: Path, change: str, mine: int | None) -> None:
    async def main() -> None:
        replica = new_replica(tmp_path / "me") if mine is None else replica_at(tmp_path / "me", mine)
        swarm = replica_at(tmp_path / "swarm", 21)
        lie = blob(chain_of(*last_changed(entries_of(swarm, mine or 0), change)))
        await check_liar(Library(tmp_path, replica), swarm, swarm, lie, change)

    run_simulated(main())


@pytest.mark.parametrize("mine", [None, 3, 19])
@pytest.mark.parametrize("since", [0, 2, 18])
def test_a_history_that_strangers_have_made_is_not_followed(tmp_path: Path, mine: int | None, since: int) -> None:
    """From the genesis on, or from where they left the run, all that they hold is sound but for who has signed it."""

    async def main() -> None:
        replica = new_replica(tmp_path / "me") if mine is None else replica_at(tmp_path / "me", mine)
        swarm = replica_at(tmp_path / "swarm", 21)
        theirs = replica_at(tmp_path / "theirs", since)
        made_by(theirs, STRANGERS, STRANGERS[0], 25 - since)
        library = Library(tmp_path, replica)
        liar = library.add(theirs)
        assert await library.to(theirs) is None
        assert liar.count(AskUpdate) == liar.count(AskChunk) == 0
        assert library.suspects() == [0]
        library.add(swarm)
        assert await library.to(swarm) is not None
        same_chain(library, swarm)
        library.check_same(swarm)

    run_simulated(main())


@pytest.mark.parametrize("mine", [None, 3, 19])
@pytest.mark.parametrize("names", ["the state", "another one", "a later one"])
def test_a_history_without_the_newest_anchor_is_not_followed(tmp_path: Path, mine: int | None, names: str) -> None:
    """All of it is certified. Whoever serves it is not blamed: it may not have heard of the anchor."""

    async def main() -> None:
        replica = new_replica(tmp_path / "me") if mine is None else replica_at(tmp_path / "me", mine)
        swarm = replica_at(tmp_path / "swarm", 21)
        library = Library(tmp_path, replica)
        donor = library.add(swarm)
        step = 30 if names == "a later one" else 17
        head = swarm.ledger.chain.head_at(17) if names == "the state" else bytes([9]) * 32
        assert head is not None
        anchor = Anchors().next(replica.manifest.run_id, step=step, head=head, state=bytes(32), owner=support.OWNER)
        library.catchup.here.seat.anchor = anchor
        there = await library.to(swarm)
        assert library.suspects() == []
        assert (there is not None) == (names == "the state")
        assert (library.directory.believed(NOW_S) == []) == (names == "another one"), "one that is behind has its vote"
        if there is None:
            assert donor.count(AskUpdate) == donor.count(AskChunk) == 0
            assert (replica.state and replica.state.step) == mine
            assert replica.ledger.chain.end == (mine or 0)

    run_simulated(main())


def test_the_certificate_of_an_update_that_was_fetched_ahead_is_verified(tmp_path: Path) -> None:
    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", 18))
        swarm = replica_at(tmp_path / "swarm", 19)
        liar = library.add(swarm, blob(chain_of(*last_changed(entries_of(swarm, 17), "unsigned")[1:])))
        target = (19, swarm.loaded.head)
        await library.fetch_ahead(target)
        assert library.suspects() == [0]
        assert liar.count(AskUpdate) == 0
        donor = library.add(swarm)
        await library.fetch_ahead(target)
        assert (donor.count(AskChain), donor.count(AskUpdate)) == (1, 1)
        assert library.replica.ledger.chain.end == 18
        assert await library.catchup.to(target) is not None
        assert (donor.count(AskChain), donor.count(AskUpdate)) == (1, 1)
        same_chain(library, swarm)
        library.check_same(swarm)

    run_simulated(main())


@pytest.mark.parametrize("ahead", [False, True])
def test_who_shows_a_chain_that_is_not_sound_has_no_vote_and_others_with_that_head_have_theirs(
    tmp_path: Path, ahead: bool
) -> None:
    """Whatever newer record it signs."""

    async def main() -> None:
        library = Library(tmp_path, replica_at(tmp_path / "me", 18))
        swarm = replica_at(tmp_path / "swarm", 19)
        liar = library.add(swarm, blob(chain_of(*last_changed(entries_of(swarm, 17), "unsigned")[1:])))
        other = library.add(swarm)
        target = (19, swarm.loaded.head)
        assert (await library.catchup.check_ahead(target) if ahead else await library.to(swarm)) is not None
        library.publish(liar, NOW_S + 1)
        assert [record.peer_id for record in library.directory.believed(NOW_S + 1)] == [other.who.peer_id]
        again_s = NOW_S + library.timeouts.record_life_s
        assert {record.peer_id for record in library.directory.believed(again_s)} == {
            liar.who.peer_id,
            other.who.peer_id,
        }

    run_simulated(main())


@pytest.mark.parametrize("mine", [None, 3, 19])
def test_who_shows_a_history_without_the_newest_anchor_has_no_vote_wherever_it_goes_from_there(
    tmp_path: Path, mine: int | None
) -> None:
    """Its records show the last few heads only: a few outer steps later nobody sees in them where it left the run."""

    async def main() -> None:
        replica = new_replica(tmp_path / "me") if mine is None else replica_at(tmp_path / "me", mine)
        library = Library(tmp_path, replica)
        liar = library.add(replica_at(tmp_path / "theirs", 21, fork_at=16))
        other = library.add(replica_at(tmp_path / "swarm", 18))
        head = other.replica.ledger.chain.head_at(17)
        assert head is not None
        anchor = Anchors().next(replica.manifest.run_id, step=17, head=head, state=bytes(32), owner=support.OWNER)
        library.catchup.here.seat.anchor = anchor
        assert await library.to(liar.replica) is None
        library.publish(liar, NOW_S + 1, step=31, head=bytes([8]) * 32, heads=[bytes([i]) * 32 for i in range(4)])
        assert [record.peer_id for record in library.directory.believed(NOW_S + 1)] == [other.who.peer_id]
        again_s = NOW_S + library.timeouts.record_life_s
        assert len(library.directory.believed(again_s)) == 2

    run_simulated(main())


def test_an_update_that_others_are_in_than_its_certificate_says_is_not_committed(tmp_path: Path) -> None:
    """Most of the known have signed it: no honest peer can follow them."""

    async def main() -> None:
        swarm = replica_at(tmp_path / "swarm", 18)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.support.certificates.in_most_parts", lambda masks: b"\x01")
            update, certificate = update_after(swarm)
        swarm.ledger.append(update, certificate)
        swarm.load()
        library = Library(tmp_path, replica_at(tmp_path / "me", 18))
        library.add(swarm)
        assert await library.to(swarm) is None
        assert library.replica.loaded.step == 18

    run_simulated(main())


def test_a_chain_that_is_small_takes_no_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a large one does, so that strangers cannot have it sent any number of times."""

    async def main(small_bytes: int) -> list[tuple[str, int]]:
        monkeypatch.setattr(uploads, "SMALL_CHAIN_BYTES", small_bytes)
        library = Library(tmp_path / str(small_bytes), new_replica(tmp_path / str(small_bytes) / "me"))
        donor = library.add(replica_at(tmp_path / "donor", 9))
        channel = await library.open(donor)
        await channel.request(AskChain(since=3), Size)
        channel.close()
        return donor.phases()

    whole = replica_at(tmp_path / "donor", 9).ledger.chain.packed_bytes(3)
    assert run_simulated(main(whole)) == []
    assert run_simulated(main(whole - 1)) == [("serve", 3)]
