"""Audits beside training: what a peer finds of others, what comes of it, and what others can make it believe."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p2p_diloco.core import findings
from p2p_diloco.core.aggregate import AggregateName
from p2p_diloco.core.audit import Evidence, pack_contributions
from p2p_diloco.core.errors import Misbehaved
from p2p_diloco.core.event import of_kind
from p2p_diloco.core.events import read_events
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.known import Known
from p2p_diloco.core.signed_part import Contribution, Inputs, Place, Reduction
from p2p_diloco.core.trust_event import PartAudited, ReducerFound
from p2p_diloco.core.update import Part, contributors_in_full
from p2p_diloco.ledger.found import keep_findings, read_findings
from p2p_diloco.peer.audits import MAX_EVIDENCE, left_out_by, reducers_of
from p2p_diloco.round.settle import Settlement
from p2p_diloco.wire.audit_messages import Accuses, AskEvidence
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.messages import No
from tests.support import lies_in_rounds
from tests.support.builders import identity
from tests.support.certificates import group_at
from tests.support.fakes import FakeNetwork, FakeTransport, SimPeer, make_manifest, run_simulated
from tests.support.lying import Liar, in_rounds, override
from tests.support.meetings import Round

pytestmark = pytest.mark.usefixtures("small_parts")

N = 1200
TRAINERS = (1, 2, 3, 4)
LIAR = 4


class Swarm:
    """The owner's seed and four trainers; the last of them is told how to lie."""

    def __init__(
        self,
        folder: Path,
        lie: Callable[[Any], None] | None,
        audit_parts: int = 1,
        aggregate: AggregateName = "mean",
    ) -> None:
        genesis, self.network = np.zeros(N, np.float32), FakeNetwork()
        manifest = make_manifest(N, genesis, identity(0), audit_parts=audit_parts, aggregate=aggregate)
        targets = np.random.default_rng(1).standard_normal((5, N)).astype(np.float32)
        self.sims = {
            i: SimPeer.create(
                self.network,
                manifest,
                identity(0),
                folder,
                i,
                target=targets[i] if i else None,
                genesis=None if i else genesis,
            )
            for i in (0, *TRAINERS)
        }
        if lie is not None:
            lie(Liar(peer=self.sims[LIAR].peer, lying=lambda: True, accomplices=()))

    async def reach(self, step: int) -> None:
        for sim in self.sims.values():
            sim.start()
        await self.until(step)

    async def until(self, step: int) -> None:
        behind = list(self.sims.values())
        while behind:
            await asyncio.sleep(0.5)
            behind = [sim for sim in behind if sim.peer.step < step]

    @property
    def grid(self) -> Grid:
        return self.sims[0].peer.replica.ledger.grid

    def found(self, i: int) -> list[ReducerFound]:
        return of_kind(read_events(self.sims[i].peer.events.path), ReducerFound)

    def audited(self, i: int) -> list[PartAudited]:
        return of_kind(read_events(self.sims[i].peer.events.path), PartAudited)

    def reducers(self, i: int) -> set[str]:
        """Who has reduced parts of the last round of a peer."""
        group = self.sims[i].peer.reception.rounds[-1].group
        return {group.members[r].peer_id for r in group.reducers}


ID = {i: identity(i).peer_id for i in range(10)}
HONEST = (1, 2, 3)


def test_honest_peers_find_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Swarm(tmp_path, None)
        await swarm.reach(6)
        audits = [audit for i in TRAINERS for audit in swarm.audited(i)]
        assert len(audits) >= 4 * 4
        assert {audit.result for audit in audits} == {"sound"}
        assert {audit.reducer for audit in audits} == {ID[i] for i in TRAINERS}
        assert not any(swarm.found(i) for i in TRAINERS)
        assert not any(read_findings(swarm.sims[i].peer.replica.ledger.folder) for i in TRAINERS)

    run_simulated(main())


@pytest.mark.parametrize("lie", [lies_in_rounds.reduces_to_zeros, lies_in_rounds.flips_a_bit], ids=["zeros", "a bit"])
def test_a_reducer_that_is_wrong_is_found_by_all_and_reduces_no_more_but_contributes(
    tmp_path: Path, lie: Callable[[Any], None]
) -> None:
    async def main() -> None:
        swarm = Swarm(tmp_path, lie)
        await swarm.reach(8)
        for i in HONEST:
            found = [one for one in swarm.found(i) if one.kind == "wrong"]
            assert [one.reducer for one in found] == [ID[LIAR]], "once"
            assert found[0].step <= 2
            assert {audit.step for audit in swarm.audited(i) if audit.reducer == ID[LIAR]} <= {0, 1}
            assert swarm.reducers(i) == {ID[j] for j in HONEST}
            kept = read_findings(swarm.sims[i].peer.replica.ledger.folder)
            assert kept is not None
            assert kept.is_wrong(ID[LIAR], 8)
            assert swarm.sims[i].peer.presence.record().found_wrong == 1
        assert any(not one.accuser for i in HONEST for one in swarm.found(i)), "somebody has found it"
        assert any(one.accuser for i in HONEST for one in swarm.found(i)), "somebody was told"
        ledger = swarm.sims[0].peer.replica.ledger
        updates = [update for update in map(ledger.update, range(3, 8)) if update is not None]
        contributed = [ID[LIAR] in contributors_in_full(update, [0] * len(update.parts)) for update in updates]
        assert sum(contributed) >= 3, contributed

    run_simulated(main())


def test_a_reducer_whose_part_is_refused_for_its_length_is_found_although_no_update_has_that_part(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        thousandfold = lies_in_rounds.reduces(lambda mean: np.float32(1000) * mean)
        swarm = Swarm(tmp_path, thousandfold, aggregate="robust")
        await swarm.reach(6)
        for i in HONEST:
            found = [one for one in swarm.found(i) if one.kind == "wrong"]
            assert [one.reducer for one in found] == [ID[LIAR]], "once"
            assert found[0].step <= 1
            assert swarm.reducers(i) == {ID[j] for j in HONEST}

    run_simulated(main())


def test_what_an_honest_reducer_made_is_sound_also_where_it_was_refused_and_it_is_asked_once(tmp_path: Path) -> None:
    """It shows no more in a round, and must not seem to hide anything."""

    def expects_nothing(_: Liar, settlement: Settlement) -> None:
        override(settlement.meeting, "_largest_norm", lambda real: lambda part: 0.0)

    async def main() -> None:
        swarm = Swarm(tmp_path, in_rounds(expects_nothing))
        await swarm.reach(5)
        audits = Counter((audit.step, audit.reducer) for audit in swarm.audited(LIAR))
        assert {reducer for _, reducer in audits} == {ID[i] for i in HONEST}
        assert set(audits.values()) == {1}
        assert not any(swarm.found(i) for i in TRAINERS)

    run_simulated(main())


def test_a_reducer_that_leaves_others_out_has_no_share_when_they_lead(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Swarm(tmp_path, lies_in_rounds.masks_away)
        await swarm.reach(8)
        found = [one for i in HONEST for one in swarm.found(i)]
        assert {(one.kind, one.reducer) for one in found} == {("left out", ID[LIAR])}

    run_simulated(main())


@in_rounds
def shows_nothing(_: Liar, settlement: Settlement) -> None:
    async def refuses(channel: Channel, *_: object) -> None:
        await channel.send(No(reason="nothing is kept"))

    override(settlement.member_answers, "on_ask_contributions", lambda real: refuses)


@in_rounds
def shows_others(_: Liar, settlement: Settlement) -> None:
    """Of these it has signed nothing, so they prove nothing either."""

    async def shows(channel: Channel, *_: object) -> None:
        await channel.send_blob(pack_contributions({}))

    override(settlement.member_answers, "on_ask_contributions", lambda real: shows)


@pytest.mark.parametrize("lie", [shows_nothing, shows_others], ids=["nothing", "others"])
def test_a_reducer_that_shows_nothing_is_remembered_and_not_proved_wrong(
    tmp_path: Path, lie: Callable[[Any], None]
) -> None:
    async def main() -> None:
        swarm = Swarm(tmp_path, lie)
        await swarm.reach(6)
        found = [one for i in HONEST for one in swarm.found(i)]
        assert {(one.kind, one.reducer, one.accuser) for one in found} == {("not answered", ID[LIAR], "")}
        assert not any(swarm.sims[i].peer.matchmaker.company.is_wrong(ID[LIAR]) for i in HONEST)

    run_simulated(main())


def test_without_audits_nothing_is_kept_or_looked_at(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Swarm(tmp_path, lies_in_rounds.reduces_to_zeros, audit_parts=0)
        await swarm.reach(4)
        assert not any(swarm.audited(i) or swarm.found(i) for i in TRAINERS)
        assert swarm.reducers(1) == {ID[i] for i in TRAINERS}
        assert swarm.sims[1].peer.reception.rounds[-1].meeting.kept is None

    run_simulated(main())


def test_who_leaves_waits_for_the_end_of_its_audit(tmp_path: Path) -> None:
    """Also where that takes a while."""

    async def main() -> None:
        swarm = Swarm(tmp_path, None)
        peer, ended = swarm.sims[1].peer, 0

        async def look(*_: object) -> None:
            nonlocal ended
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                await asyncio.sleep(100.0)
                ended += 1

        override(peer.audits, "_look", lambda real: look)
        await swarm.reach(2)
        await peer.leave("over")
        assert ended == 2

    run_simulated(main())


# -- what others say -------------------------------------------------------------------------------------------------


class Accuser:
    """Streams to an honest peer that are written by hand, in the name of another one."""

    def __init__(self, swarm: Swarm, who: int) -> None:
        self.peer = swarm.sims[1].peer
        self.transport = FakeTransport(swarm.network, ID[who], self.peer.here.timeouts)

    async def accuse(self, accused: int, evidence: bytes | None) -> bool:
        """Whether evidence was asked for."""
        channel = await self.transport.open(self.peer.identity.peer_id, [], self.peer.here.protocol)
        answer: AskEvidence | No = await channel.request(Accuses(peer_id=ID[accused]), AskEvidence, No)
        if isinstance(answer, AskEvidence) and evidence is not None:
            await channel.send_blob(evidence)
        channel.close()
        await asyncio.sleep(1.0)
        return isinstance(answer, AskEvidence)

    def blamed(self) -> list[str]:
        transport = self.peer.here.transport
        assert isinstance(transport, FakeTransport)
        return [error.reason for error in transport.complaints if isinstance(error, Misbehaved)]


def evidence_of(swarm: Swarm, *, wrong: bool) -> tuple[int, bytes]:
    """A reducer of the last round, and what it has signed of a part, or would have."""
    meeting = swarm.sims[2].peer.reception.rounds[-1].meeting
    index = next(i for i, one in enumerate(meeting.reductions) if one is not None and one.reducer != meeting.me)
    part, reduction = meeting.parts[index], meeting.reductions[index]
    assert part is not None
    assert reduction is not None
    reducer = next(i for i in TRAINERS if ID[i] == meeting.group.members[reduction.reducer].peer_id)
    kept = swarm.sims[reducer].peer.reception.rounds[-1]
    came = {}
    for settlement in (swarm.sims[i].peer.reception.rounds[-1] for i in TRAINERS):
        assert settlement.group.round_id == kept.group.round_id
        place = kept.member.butterflies[0].place(index)
        came[settlement.meeting.me] = settlement.meeting.signed_contribution(place)
    if wrong:
        part = type(part)(mask=b"\x01", data=part.data)
        place = kept.member.butterflies[0].place(index)
        reduction = Reduction.of(place, part, Inputs.of(came), reduction.reducer, identity(reducer))
    roster = meeting.group.sealed
    return reducer, Evidence(roster=roster, index=index, part=part, reduction=reduction, came=came).to_bytes()


def test_evidence_is_believed_whoever_brings_it(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Swarm(tmp_path, None)
        await swarm.reach(3)
        reducer, evidence = evidence_of(swarm, wrong=True)
        accuser = Accuser(swarm, 3 if reducer != 3 else 4)
        assert await accuser.accuse(reducer, evidence)
        company = accuser.peer.matchmaker.company
        assert company.is_wrong(ID[reducer])
        assert not company.is_trusted(ID[reducer])
        assert not await accuser.accuse(reducer, evidence), "known already"
        assert accuser.blamed() == []

    run_simulated(main())


def test_evidence_counts_from_its_own_round_on_and_is_forgotten_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whoever brings it again, or to a newcomer, would keep a peer without a share for the rest of the run."""
    monkeypatch.setitem(findings.LASTS_STEPS, "wrong", 4)

    async def main() -> None:
        swarm = Swarm(tmp_path, None)
        await swarm.reach(3)
        reducer, evidence = evidence_of(swarm, wrong=True)
        proved = Evidence.from_bytes(evidence).accused(swarm.sims[2].peer.replica.rules, swarm.grid)
        first, second = [i for i in (2, 3, 4) if i != reducer][:2]
        assert await Accuser(swarm, first).accuse(reducer, evidence)
        await swarm.until(proved[1] + 6)
        again = Accuser(swarm, second)  # from now on, the peer of this name hears nobody, as the first one
        assert await again.accuse(reducer, evidence), "it is news once more"
        await swarm.until(swarm.sims[1].peer.step + 2)
        found = {i: [(one.reducer, one.step) for one in swarm.found(i)] for i in TRAINERS}
        assert found[1] == [proved]
        assert all(found[i] in ([], [proved]) for i in TRAINERS if i not in (first, second)), found
        assert not again.peer.matchmaker.company.is_wrong(ID[reducer])
        assert again.blamed() == []
        assert not again.peer.audits._evidence, "nor is it passed on any more"

    run_simulated(main())


@pytest.mark.parametrize("brings", ["a part that is right", "nothing", "noise", "another peer's"])
def test_an_accuser_that_proves_nothing_is_not_asked_again(tmp_path: Path, brings: str) -> None:
    async def main() -> None:
        swarm = Swarm(tmp_path, None)
        await swarm.reach(3)
        reducer, evidence = evidence_of(swarm, wrong=brings == "another peer's")
        others = [i for i in (2, 3, 4) if i != reducer]
        accuser = Accuser(swarm, others[0])
        accused = others[1] if brings == "another peer's" else reducer
        brought = {"nothing": None, "noise": b"noise"}.get(brings, evidence)
        assert await accuser.accuse(accused, brought)
        assert not accuser.peer.matchmaker.company.findings.unfit(accuser.peer.step)
        assert not await accuser.accuse(accused, evidence)
        assert not await accuser.accuse(0, evidence)
        assert len(accuser.blamed()) == (brings != "nothing")

    run_simulated(main())


def evidence_of_a_round_to_come(swarm: Swarm, step: int) -> bytes:
    """Trainer 3 and a name that it has made up have signed a round that nobody has come to, and a part that is not the
    mean."""
    accomplices, grid = {identity(i).peer_id: identity(i) for i in (3, 9)}, swarm.grid
    known = Known(step=step, peers=frozenset())
    group = group_at([*accomplices.values()], swarm.sims[1].peer.replica.rules, known, bytes(32))
    place, zeros = Place(round_id=group.round_id, number=0, part=0), np.zeros(grid.n_values(0), np.float32)
    senders = [accomplices[member.peer_id] for member in group.members]
    came = {i: Contribution.of(place, grid.encode(zeros), who) for i, who in enumerate(senders)}
    part = Part(mask=b"\x03", data=grid.encode(zeros + 1))
    reduction = Reduction.of(place, part, Inputs.of(came), group.index_of(ID[3]), identity(3))
    return Evidence(roster=group.sealed, index=0, part=part, reduction=reduction, came=came).to_bytes()


def test_evidence_of_a_round_to_come_counts_from_where_the_run_stands(tmp_path: Path) -> None:
    """Else a liar would be found wrong for the rest of the run, and hold one of few places."""

    async def main() -> None:
        swarm = Swarm(tmp_path, None)
        await swarm.reach(3)
        accuser = Accuser(swarm, 4)
        assert await accuser.accuse(3, evidence_of_a_round_to_come(swarm, 10**6))
        company = accuser.peer.matchmaker.company
        assert company.findings.is_wrong(ID[3], accuser.peer.step)
        assert not company.findings.is_wrong(ID[3], accuser.peer.step + findings.WRONG_STEPS)
        company.findings = findings.Findings()
        assert not await accuser.accuse(3, b""), "each accuser is asked once about each"

    run_simulated(main())


def test_a_stranger_is_not_listened_to_and_who_is_known_is(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Swarm(tmp_path, None)
        await swarm.reach(3)
        accuser = Accuser(swarm, 9)
        assert not await accuser.accuse(2, b"")
        accuser.peer.seat.known = Known(step=accuser.peer.step, peers=frozenset((ID[9],)))
        assert await accuser.accuse(2, b"")

    run_simulated(main())


def test_evidence_is_held_about_few_peers_the_newest_ones(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Swarm(tmp_path, None)
        audits = swarm.sims[1].peer.audits
        for i in range(MAX_EVIDENCE + 1):
            audits._hold(str(i), b"")
        assert [*audits._evidence] == [*audits._told] == [str(i + 1) for i in range(MAX_EVIDENCE)]
        for sim in swarm.sims.values():
            sim.peer.events.close()

    run_simulated(main())


# -- what is looked at -----------------------------------------------------------------------------------------------


def test_only_what_a_reducer_has_signed_of_an_update_is_looked_at() -> None:
    async def main() -> None:
        meeting = Round(3)
        await meeting.run()
        held, update = meeting.settlements[0].meeting, meeting.update()
        reducers = meeting.group.reducers
        assert reducers_of(held, update) == {
            part: meeting.ids[reducers[part % len(reducers)]] for part in range(len(meeting.slices))
        }
        held.parts[1] = Part(mask=b"\x07", data=b"another")
        held.reductions[2] = None
        assert reducers_of(held, update).keys() == {0, 3, 4, 5}

    run_simulated(main())


def test_who_leaves_out_what_was_delivered_in_time_is_found_and_nobody_else() -> None:
    async def main() -> None:
        meeting = Round(3)
        await meeting.run()
        held, update, me = meeting.settlements[0].meeting, meeting.update(), 0
        assert not list(left_out_by(held, update))
        part = meeting.parts_of(1)[0]
        for index in (part, meeting.parts_of(me)[0]):
            reduction = held.reductions[index]
            assert reduction is not None
            others = dataclasses.replace(reduction.inputs, senders=b"\x06")
            held.reductions[index] = dataclasses.replace(reduction, inputs=others)
        assert list(left_out_by(held, update)) == [meeting.ids[1]]
        held.delivered.discard((0, part))
        assert not list(left_out_by(held, update)), "it may have come too late"

    run_simulated(main())


# -- what is remembered ----------------------------------------------------------------------------------------------


def test_what_was_found_is_taken_up_again_and_a_damaged_file_is_left_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        swarm = Swarm(tmp_path, None)
        audits, company = swarm.sims[1].peer.audits, swarm.sims[1].peer.matchmaker.company
        folder = swarm.sims[1].peer.replica.ledger.folder
        audits.read()
        assert not company.findings.unfit(0)
        company.findings.note(ID[2], "wrong", 3)
        keep_findings(folder, company.findings.to_bytes())
        company.findings = type(company.findings)()
        audits.read()
        assert company.findings.is_wrong(ID[2], 50)
        keep_findings(folder, b"damaged")
        assert read_findings(folder) is None
        assert "what was found of others is forgotten" in caplog.text
        for sim in swarm.sims.values():
            sim.peer.events.close()

    run_simulated(main())
