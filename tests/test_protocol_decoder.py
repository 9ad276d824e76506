"""A decoder that was written from ``docs/protocol.md`` alone, against what real peers say to each other."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import blake3
import numpy as np
import pytest

from p2p_diloco.core.aggregate import AGGREGATIONS
from p2p_diloco.core.codecs import CodecName
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.known import WINDOW_STEPS, known_at
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.records import seal_record
from p2p_diloco.core.runfile import OnMissed
from p2p_diloco.peer.control import OuterResult
from p2p_diloco.round.outcome import Settled
from tests.support import decoder, meetings
from tests.support.builders import RUN_ID, group_of, head, identity, ranked, record_of
from tests.support.decoder import Certificate, Decoded, Decoder, Header, Mean, Round, State, Stream, Vector
from tests.support.fakes import SimPeer, make_manifest, run_simulated
from tests.support.invited import revocations_of, token_of
from tests.support.links import FakeNetwork, FakeTransport, Pipe

OWNER = identity(1000)
N = decoder.PART_VALUES + 77
"""Two parts, the second with blocks that are not whole and an odd number of values."""
SEED, NEWCOMER, CLIENT, SLOW = 1000, 7, 3, 4
OUTER_STEPS, SNAPSHOT_EVERY = 3, 2
CLAIMS = {identity(1).peer_id: 3, identity(2).peer_id: 7, identity(CLIENT).peer_id: 64}
"""Tokens. The last one is the most that this run allows, and more than four times the median."""
LONGEST_S = 300
"""Of the simulated time."""


def b3(data: bytes) -> bytes:
    return blake3.blake3(data).digest()


class WatchedPeer(SimPeer):
    """Remembers what it offers."""

    offers: dict[bytes, tuple[Vector, Vector]]
    """Head -> (theta, local), of the newest offer there."""

    async def offer(self, tokens: int) -> OuterResult:
        assert self.peer.local is not None
        state = self.peer.replica.loaded
        self.offers = getattr(self, "offers", {}) | {state.head: (state.theta.copy(), self.peer.local.copy())}
        return await super().offer(CLAIMS.get(self.peer.identity.peer_id, tokens))


@dataclass
class Tap:
    """Every byte of all streams in memory."""

    opened: list[Pipe] = field(default_factory=list)
    """Of each stream the direction from the one that opened it."""
    sent: dict[Pipe, bytearray] = field(default_factory=lambda: defaultdict(bytearray))

    def streams(self) -> list[Stream]:
        return [
            Stream(pipe.source, pipe.target, bytes(self.sent[pipe]), bytes(self.sent[pipe.back]))
            for pipe in self.opened
            if self.sent[pipe]
        ]


@pytest.fixture
def tap(monkeypatch: pytest.MonkeyPatch) -> Tap:
    found, connect, send = Tap(), FakeTransport._connect, Pipe.send

    def connect_and_tap(transport: FakeTransport, remote: FakeTransport, protocol: str) -> Pipe:
        there = connect(transport, remote, protocol)
        found.opened.append(there)
        return there

    def send_and_tap(pipe: Pipe, data: bytes | None) -> None:
        if not (pipe.over or pipe.closed):
            found.sent[pipe] += data or b""
        send(pipe, data)

    monkeypatch.setattr(FakeTransport, "_connect", connect_and_tap)
    monkeypatch.setattr(Pipe, "send", send_and_tap)
    return found


@dataclass
class Run:
    """One run in memory."""

    manifest: RunManifest
    folder: Path
    genesis: Vector
    targets: Vector
    tap: Tap
    network: FakeNetwork = field(default_factory=FakeNetwork)
    peers: dict[int, WatchedPeer] = field(default_factory=dict)
    clients: tuple[int, ...] = (CLIENT,)
    """Who is in client mode."""

    def add(self, index: int, *, step_s: float = 1.0) -> WatchedPeer:
        sim = self.peers[index] = WatchedPeer.create(
            self.network,
            self.manifest,
            OWNER,
            self.folder,
            index,
            target=None if index in (SEED, NEWCOMER) else self.targets[index],
            genesis=self.genesis if index == SEED else None,
            client_mode=index in self.clients,
            step_s=step_s,
        )
        sim.start()
        return sim

    async def start(self, trainers: Sequence[int]) -> None:
        self.add(SEED)
        await asyncio.sleep(1)
        for index in trainers:
            self.add(index, step_s=1e6 if index == SLOW else 1.0)

    async def until(self, step: int, *indices: int) -> None:
        for _ in range(LONGEST_S):
            if all(self.peers[i].peer.step >= step for i in indices):
                break
            await asyncio.sleep(1)
        await asyncio.sleep(30)  # whatever is on its way arrives


MakeRun = Callable[[CodecName, OnMissed], Run]


@pytest.fixture
def make_run(tmp_path: Path, tap: Tap) -> MakeRun:
    def make(codec: CodecName, on_missed: OnMissed = "adopt") -> Run:
        values = np.random.default_rng(3).standard_normal((9, N)).astype(np.float32)
        values[:, ::977] *= 300  # some blocks have an outlier
        values[1:, :300] = values[0, :300]  # and some are all zeros
        manifest = make_manifest(
            N,
            values[0],
            OWNER,
            codec=codec,
            outer_steps=OUTER_STEPS,
            inner_steps=2,
            on_missed=on_missed,
            snapshot_every=SNAPSHOT_EVERY,
        )
        return Run(manifest, tmp_path, values[0], values, tap)

    return make


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("total", [None, 4000])
@pytest.mark.parametrize("k", [77, 40_000])
def test_the_robust_mean_is_that_of_the_page(count: int, total: int | None, k: int) -> None:
    """One is flipped, and one is long; the roster has others between them, of whom nothing came."""
    generator, grid = np.random.default_rng(count), Grid(n=k, codec="int4")
    common, weights = generator.standard_normal(k), [100 + 7 * i for i in range(2 * count)]
    left_out = 0
    for trial in range(5):
        came = {2 * i: (0.3 * common + generator.standard_normal(k)).astype(np.float32) for i in range(count)}
        came[2 * (trial % count)] *= np.float32(-1.25)
        came[2 * ((trial + 1) % count)] *= np.float32(1e20)
        members, mean = decoder.robust_mean_of(came, weights, total, k)
        part = AGGREGATIONS["robust"].reduce(came, weights, 0, grid, total)
        assert (part.mask, part.data) == (decoder.mask_of(members), decoder.encode(mean, "int4"))
        left_out += count - len(members)
    assert (left_out > 0) == (count >= 5)


def decoded_by(run: Run, story: Callable[[], Awaitable[None]]) -> tuple[Decoder, list[Decoded]]:
    """All streams of a story, each to its last byte."""

    async def main() -> None:
        await story()

    run_simulated(main())
    spec = run.manifest.spec
    reader = Decoder(
        n=N,
        codec=spec.outer.codec,
        owner=run.manifest.owner,
        blake3=b3,
        keep=spec.round.on_missed == "keep",
        min_group=spec.round.min_group,
    )
    return reader, reader.all(run.tap.streams())


def tags_of(decoded: Sequence[Decoded]) -> set[str]:
    return {message.tag for one in decoded for message in (*one.asked, *one.answered)}


def committed(reader: Decoder) -> dict[int, tuple[Round, list[bytes]]]:
    """Outer step -> the round that ended it, and its part hashes."""
    found: dict[int, tuple[Round, list[bytes]]] = {}
    for round_id, (part_hashes, _) in reader.certified.items():
        meeting = reader.rounds[round_id]
        assert meeting.step not in found, "two certified rounds of one outer step"
        found[meeting.step] = meeting, part_hashes
    return found


def recomputed(run: Run, reader: Decoder, decoded: Sequence[Decoded], meeting: Round, part: int, wanted: bytes) -> Mean:
    """A part of an update from what the members had learned; every contribution that was sent is looked at."""
    codec, where = reader.codec, decoder.parts_of(N)[part]
    trainers = {sim.peer.identity.peer_id: sim for sim in run.peers.values()}
    masks = {mean.mask for one in decoded for i, mean in one.means.items() if i == part and mean.hash == wanted}
    assert len(masks) == 1, "one part, sent to everybody"
    came = {}
    for i in decoder.members_of(masks.pop()):
        theta, local = trainers[meeting.ids[i]].offers[meeting.members[0]["head"]]
        data = decoder.encode(theta[where] - local[where], codec)
        came[i] = decoder.decode(data, where.stop - where.start, codec)
        sent = {
            one.contributions[part]
            for one in decoded
            if one.stream.opener == meeting.ids[i] and part in one.contributions
            if one.asked[0].fields["round_id"] == meeting.round_id
        }
        assert sent <= {data}
    return meeting.reduce(came, where.stop - where.start, codec)


def check_audited(decoded: Sequence[Decoded], asked: Mapping[str, Any], shown: bytes) -> None:
    """What a reducer shows is what it has signed that it took, and what went to it over the wire."""
    inputs = decoder.inputs_of(decoder.contributions_of(shown), b3)
    of_round = [one for one in decoded if one.asked[0].fields.get("round_id") == asked["round_id"]]
    made = {one.reductions[asked["part"]] for one in of_round if asked["part"] in one.reductions}
    assert {one.inputs for one in made if one.number == asked["number"]} == {inputs}
    sent = {one.signatures[asked["part"]] for one in of_round if asked["part"] in one.signatures}
    assert len(sent.intersection(one for _, one in decoder.contributions_of(shown).values())) >= 1


def check_certificate(
    run: Run, meeting: Round, header: Header, certificate: Certificate, means: Sequence[Mean], state: State
) -> None:
    """What was signed is what there is, and so are the certificates that peers have kept."""
    parts = Counter(i for mean in means for i in decoder.members_of(mean.mask))
    assert decoder.members_of(certificate.full) == sorted(i for i, count in parts.items() if 2 * count > len(means))
    digest = decoder.state_digest(state.step, state.head, [b3(chunk) for chunk in state.chunks()])
    assert certificate.state == (b"" if state.step % SNAPSHOT_EVERY else digest)
    for sim in run.peers.values():
        entry = sim.peer.replica.ledger.chain.entry(header.step)
        if entry is not None:
            theirs, kept = decoder.open_certificate(
                entry.certificate.to_bytes(), min_group=meeting.min_group, owner=run.manifest.owner
            )
            kept.check(theirs, header.link, run.manifest.owner)
            assert (theirs.round_id, kept.full, kept.state) == (meeting.round_id, certificate.full, certificate.state)


def check_history(run: Run, reader: Decoder, decoded: Sequence[Decoded]) -> dict[int, State]:
    """Every outer step computed again; outer step -> the state."""
    outer, state = run.manifest.spec.outer, State.genesis(run.genesis, b3)
    assert decoder.state_digest(0, state.head, [b3(chunk) for chunk in state.chunks()]).hex() == run.manifest.genesis
    rounds, states = committed(reader), {0: state}
    for step in sorted(rounds):
        meeting, part_hashes = rounds[step]
        means = [recomputed(run, reader, decoded, meeting, part, wanted) for part, wanted in enumerate(part_hashes)]
        assert [mean.hash for mean in means] == part_hashes
        header, certificate = meeting.header(part_hashes), reader.certified[meeting.round_id][1]
        check_certificate(run, meeting, header, certificate, means, state)
        data = decoder.pack_update(header, means)
        assert decoder.open_update(data, N, reader.codec) == (header, means)
        state = State(state.step, state.head, state.theta.copy(), state.momentum.copy())
        state.apply(header, means, reader.codec, outer.lr, outer.momentum)
        states[state.step] = state
        for sim in run.peers.values():
            ledger = sim.peer.replica.ledger
            assert not ledger.updates.path(step).exists() or ledger.updates.path(step).read_bytes() == data
            assert sim.history.get(state.step, (state.head, state.theta.tobytes())) == (
                state.head,
                state.theta.tobytes(),
            )
    for sim in run.peers.values():
        theirs = sim.peer.replica.loaded
        mine = states[theirs.step]
        assert theirs.head == mine.head
        assert theirs.theta.tobytes() == mine.theta.tobytes()
        assert theirs.momentum.tobytes() == mine.momentum.tobytes()
    return states


def check_chain(run: Run, states: dict[int, State], since: int, data: bytes) -> None:
    """What a donor has served of it."""
    entries = decoder.unpack(data)
    assert entries
    rules = {"min_group": run.manifest.spec.round.min_group, "owner": run.manifest.owner}
    for step, entry in enumerate(entries, since):
        header, meeting, certificate = decoder.open_entry(entry, **rules)
        assert (header.step, header.parent, header.head) == (step, states[step].head, states[step + 1].head)
        assert header == meeting.header(header.part_hashes)
        certificate.check(meeting, header.link, run.manifest.owner)


def test_what_peers_say_where_the_owners_seed_helps(make_run: MakeRun) -> None:
    """Two trainers in client mode."""
    run = make_run("int8", "adopt")
    run.clients = (1, CLIENT)

    async def story() -> None:
        await run.start([1, CLIENT])
        await run.until(OUTER_STEPS, 1, CLIENT, SEED)

    reader, decoded = decoded_by(run, story)
    states = check_history(run, reader, decoded)
    assert set(states) == set(range(OUTER_STEPS + 1))
    assert all(meeting.helper == [2] == meeting.reducers(range(3)) for meeting in reader.rounds.values())


@pytest.mark.parametrize(
    ("codec", "on_missed"), [("fp32", "adopt"), ("fp16", "keep"), ("int8", "adopt"), ("int4", "keep")]
)
def test_everything_that_peers_say_is_decoded_and_computed_again(
    make_run: MakeRun, codec: CodecName, on_missed: OnMissed
) -> None:
    """Three trainers, one in client mode, and in runs that keep missed rounds one that does not come; a seed that
    follows, and one that comes late and downloads a snapshot."""
    run = make_run(codec, on_missed)
    trainers = [1, 2, CLIENT, *([SLOW] if on_missed == "keep" else [])]

    async def story() -> None:
        await run.start(trainers)
        await run.until(OUTER_STEPS, 1, 2, CLIENT)
        run.add(NEWCOMER)
        await run.until(OUTER_STEPS, NEWCOMER, SEED)

    reader, decoded = decoded_by(run, story)
    assert {"ready", "roster", "closing", "eta", "contribute", "receipt", "commit", "took", "push"} <= tags_of(decoded)
    assert {"certifies", "ask-witness", "witnessed"} <= tags_of(decoded)
    assert {"ask-heads", "heads", "ask-chain", "ask-update", "ask-index", "ask-chunk", "size"} <= tags_of(decoded)
    assert any(request.tag == "ask-contributions" for one in decoded for request, _ in one.blobs)
    states = check_history(run, reader, decoded)
    assert set(states) == set(range(OUTER_STEPS + 1))
    assert any(meeting.absent for meeting in reader.rounds.values()) == (on_missed == "keep")
    assert any(sorted(meeting.weights) == [3, 7, 28] for meeting in reader.rounds.values())

    canonical, run_id = decoder.open_manifest(run.manifest.signed(OWNER))
    assert (canonical, run_id) == (run.manifest.canonical_bytes, run.manifest.run_id)
    for request, data in (blob for one in decoded for blob in one.blobs):
        if request.tag == "ask-chain":
            check_chain(run, states, request.fields["since"], data)
            continue
        if request.tag == "ask-contributions":
            check_audited(decoded, request.fields, data)
            continue
        state = states[request.fields["step"]]
        hashes = [b3(chunk) for chunk in state.chunks()]
        if request.tag == "ask-index":
            assert data == state.head + b"".join(hashes)
            assert request.fields["digest"] == decoder.state_digest(state.step, state.head, hashes)
        elif request.tag == "ask-chunk":
            assert data == state.chunks()[request.fields["chunk"]]
        else:
            header, _ = decoder.open_update(data, N, codec)
            assert (header.parent, header.head) == (state.head, request.fields["head"])
    for said in (message for one in decoded for message in one.answered if message.tag == "heads"):
        step, head = said.fields["first"], said.fields["head"]
        assert head == states[step].head
        for link in said.fields["links"]:
            step, head = step + 1, decoder.h(head, link)
            assert head == states[step].head
    snapshot = run.peers[1].peer.replica.ledger.folder / "snapshots" / f"{SNAPSHOT_EVERY:010d}.safetensors"
    assert snapshot.read_bytes() == decoder.pack_snapshot(states[SNAPSHOT_EVERY], run_id, b3)


def test_parts_that_are_reduced_again_when_a_reducer_has_died(make_run: MakeRun) -> None:
    run = make_run("int8", "adopt")

    async def story() -> None:
        await run.start([1, 2, 5, 6])
        while True:
            meeting = next((sim.peer for sim in run.peers.values() if sim.peer.seat.in_round), None)
            if meeting is not None:
                break
            await asyncio.sleep(0.005)
        victim = meeting.reception.rounds[-1].group.members[1].peer_id
        index = next(i for i in run.peers if identity(i).peer_id == victim)
        run.network.kill(victim)
        del run.peers[index]
        await run.until(OUTER_STEPS, *(i for i in run.peers if i != SEED))

    reader, decoded = decoded_by(run, story)
    assert {"again", "commit", "took"} <= tags_of(decoded)
    assert 1 in {message.fields.get("number") for one in decoded for message in one.asked if one.contributions}
    check_history(run, reader, decoded)


@dataclass(frozen=True)
class Captured:
    """What was said in one round whose members know who is known."""

    meeting: meetings.Round
    reader: Decoder
    decoded: list[Decoded]

    @property
    def certificate(self) -> Certificate:
        (found,) = self.reader.certified.values()
        return found[1]


class Settle(Protocol):
    def __call__(
        self,
        unknown: Sequence[int],
        clients: Sequence[int],
        given: int | None,
        said: Mapping[int, int] | None = None,
    ) -> Captured: ...


@pytest.fixture
def settle(tap: Tap, small_parts: None, monkeypatch: pytest.MonkeyPatch) -> Settle:
    monkeypatch.setattr(decoder, "PART_VALUES", meetings.SMALL_PART_VALUES)

    def settled(
        unknown: Sequence[int],
        clients: Sequence[int],
        given: int | None,
        said: Mapping[int, int] | None = None,
    ) -> Captured:
        """``given``: the leader dies when it has sent so many commits. ``said``: what all say of each other's
        uplinks."""

        async def main() -> meetings.Round:
            uplinks = (dict(said or {}),) * 7
            meeting = meetings.Round(7, unknown=tuple(unknown), clients=tuple(clients), uplinks=uplinks)
            leader, commits = meeting.group.leader, meeting.trouble.commits

            def watch() -> None:
                if given is not None and leader not in meeting.killed and len(commits) >= given:
                    meeting.kill(leader)

            meeting.watch(watch)
            await meeting.run()
            return meeting

        meeting = run_simulated(main())
        assert set(meeting.committed()) == set(range(7)) - meeting.killed
        group, known = meeting.group, {meeting.ids[i] for i in range(7) if i not in unknown}
        known_on = {group.head: frozenset(known)}
        reader = Decoder(n=meeting.n, codec=meeting.codec, owner=OWNER.peer_id, blake3=b3, known_on=known_on)
        sealed = group.sealed
        roster = Round(sealed.leader, sealed.members, sealed.signature, idle=sealed.idle, known_on=reader.known_on)
        reader.rounds[roster.round_id] = roster
        assert (roster.round_id, roster.counting) == (group.round_id, sorted(group.counting))
        assert roster.reducers(range(7)) == list(group.reducers)
        assert roster.leaders == list(group.leaders)
        return Captured(meeting, reader, reader.all(tap.streams()))

    return settled


def test_who_averages_and_leads_where_members_have_other_families() -> None:
    choice = random.Random(0)
    for _ in range(40):
        members = ranked(head("f"), choice.choice((3, 4, 6)))
        size, familiar = len(members), members[: choice.choice((len(members), len(members) - 1))]
        group = group_of(
            members,
            "f",
            familiar=familiar,
            client_mode=choice.choices((True, False), (1, 4), k=size),
            dropped=choice.choices((True, False), (1, 4), k=size),
            reached_over=choice.choices((1, 2, 3), k=size),
            reaches_over=choice.choices((1, 2, 3), k=size),
        )
        sealed, known = group.sealed, frozenset(who.peer_id for who in familiar)
        roster = Round(sealed.leader, sealed.members, sealed.signature, known_on={group.head: known})
        for among in (range(size), range(1, size)):
            assert roster.reducers(among) == list(group.reducers_among(among))
        assert roster.leaders == list(group.leaders)


@pytest.mark.parametrize(("unknown", "clients"), [((), ()), ((1, 4), ()), ((2,), (0, 3))])
def test_a_round_of_known_members_and_newcomers(
    settle: Settle, unknown: tuple[int, ...], clients: tuple[int, ...]
) -> None:
    """Newcomers contribute, and neither reduce nor certify."""
    settled = settle(unknown, clients, None)
    meeting, reader, certificate = settled.meeting, settled.reader, settled.certificate
    update = meeting.update()
    ((round_id, (part_hashes, _)),) = reader.certified.items()
    assert reader.rounds[round_id].header(part_hashes).head == update.header.head
    assert decoder.members_of(certificate.full) == list(range(7))
    signers = {i for i, _ in certificate.signatures}
    assert not signers & set(unknown)
    assert not certificate.witness
    reducers = [i for i in range(7) if i not in (*unknown, *clients)][: meetings.N_PARTS]
    assert {one.stream.server for one in settled.decoded if one.contributions} == {meeting.ids[i] for i in reducers}
    assert {part for one in settled.decoded for part in one.reductions} == set(range(meetings.N_PARTS))
    for part, made in ((part, made) for one in settled.decoded for part, made in one.reductions.items()):
        sent = {i: meeting.sent(i, part) for i in range(7)}
        came = {i: (signed.data, signed.signature) for i, signed in sent.items()}
        assert made.inputs == decoder.inputs_of(came, b3)


def test_a_round_whose_slow_members_reduce_nothing(settle: Settle) -> None:
    said = {0: 100_000, 1: 200_000, **dict.fromkeys(range(2, 7), 1_000_000)}
    settled = settle((4,), (3,), None, said=said)
    group = settled.meeting.group
    (roster,) = settled.reader.rounds.values()
    assert roster.uplinks == list(group.uplinks)
    members, parts = range(7), range(meetings.N_PARTS)
    assert roster.dealt(members, parts) == group.shares_among(members, parts)
    assert {one.stream.server for one in settled.decoded if one.contributions} == {
        settled.meeting.ids[i] for i in (2, 5, 6)
    }
    assert {part for one in settled.decoded for part in one.reductions} == set(parts)


@pytest.mark.parametrize(("given", "told"), [(1, 1), (3, 3), (6, 5)])
def test_a_commit_that_was_signed_before_its_leader_died(settle: Settle, given: int, told: int) -> None:
    """The next leader is one of the six who have got it last, and need not tell itself."""
    settled = settle((1, 4), (), given)
    reader, certificate = settled.reader, settled.certificate
    ((round_id, (part_hashes, _)),) = reader.certified.items()
    signed = certificate.signed(reader.rounds[round_id], reader.rounds[round_id].header(part_hashes).link)
    answers = [(one.stream.server, said) for one in settled.decoded for said in one.answered]
    before = [(peer_id, said.fields) for peer_id, said in answers if said.tag == "took-before"]
    assert len(before) == told
    for peer_id, fields in before:
        assert fields["part_hashes"] == part_hashes
        assert decoder.is_signed(decoder.public_key(peer_id), signed, fields["signature"])


@pytest.mark.parametrize("step", [4, 15, 16, 17, 40])
def test_who_is_known_is_who_the_page_says(step: int) -> None:
    generator, ids = np.random.default_rng(step), [identity(i).peer_id for i in range(12)]
    history = [[ids[i] for i in range(12) if generator.random() < i / 16] for _ in range(step)]
    known = decoder.known_at(step, history[-16:])
    assert known == known_at(step, history[-WINDOW_STEPS:]).peers
    assert (0 < len(known) < 12) == (step >= 16)


def test_a_certificate_of_another_kind_is_none(settle: Settle) -> None:
    settled = settle((1, 4), (), None)
    ((round_id, (part_hashes, certificate)),) = settled.reader.certified.items()
    meeting = settled.reader.rounds[round_id]
    link, known_on = meeting.header(part_hashes).link, meeting.known_on

    def opened(data: bytes) -> None:
        roster, found = decoder.open_certificate(data, known_on=known_on)
        found.check(roster, link, OWNER.peer_id)

    def changed(**changes: Any) -> bytes:
        return replace(certificate, **changes).packed(meeting)

    data, fewest = certificate.packed(meeting), certificate.signatures[:3]
    opened(data)
    opened(changed(signatures=fewest))
    for outcome in settled.meeting.outcomes.values():
        assert isinstance(outcome, Settled)
        opened(outcome.certificate.to_bytes())
    broken: list[Callable[[], object]] = [
        *(lambda at=at: opened(flipped(data, at)) for at in range(0, len(data), 29)),
        lambda: opened(changed(signatures=fewest[:2])),
        lambda: opened(changed(signatures=fewest[::-1])),
        lambda: opened(changed(signatures=[*fewest, fewest[-1]])),
        lambda: opened(changed(signatures=[*fewest[:2], (fewest[2][0], fewest[1][1])])),
        lambda: opened(changed(full=b"")),
        lambda: opened(changed(state=bytes(32))),
        lambda: opened(changed(witness=fewest[0][1])),
        lambda: opened(data + b"\0"),
        lambda: certificate.check(replace(meeting, known_on={}), link, OWNER.peer_id),
        lambda: certificate.check(meeting, bytes(32), OWNER.peer_id),
    ]
    assert [number for number, decode in enumerate(broken) if is_taken(decode)] == []


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def is_taken(decode: Callable[[], object]) -> bool:
    try:
        decode()
    except ValueError:
        return False
    return True


def test_what_the_page_does_not_allow_is_no_part_of_the_protocol() -> None:
    """A decoder that takes anything would prove nothing."""
    sealed = seal_record(record_of(identity(1), "ab"), identity(1))
    alone = decoder.message(b"\x92\xaano-witness\x80")
    assert decoder.open_sealed(sealed, decoder.RECORD)["peer_id"] == identity(1).peer_id
    header = decoder.Header(3, bytes(32), [(identity(1).peer_id, 5)], [Mean(b"\x01", bytes(28)).hash])
    update = decoder.pack_update(header, [Mean(b"\x01", bytes(28))])
    assert (decoder.open_update(update, 7, "fp32")[0], alone.tag) == (header, "no-witness")
    broken: list[Callable[[], object]] = [
        *(
            lambda at=at: decoder.open_sealed(flipped(sealed, at), decoder.RECORD)
            for at in (-1, -64, 60, len(sealed) // 2)
        ),
        lambda: decoder.open_sealed(sealed, decoder.READINESS),
        lambda: decoder.frames(b"\0\0\0\7" + bytes(6)),
        lambda: decoder.frames((4194305).to_bytes(4, "big") + bytes(4194305)),
        lambda: decoder.message(b"\x92\xaano-witness\x80\0"),
        lambda: decoder.message(b"\x92\xaano-witness\x81\xa1a\1"),
        lambda: decoder.message(b"\x92\xaano-witless\x80"),
        lambda: decoder.message(b"\x92\xa4took\x80"),
        lambda: decoder.members_of(b"\1\0"),
        *(lambda at=at: decoder.open_update(flipped(update, at), 7, "fp32") for at in range(len(update))),
        lambda: decoder.open_update(update + b"\0", 7, "fp32"),
        lambda: decoder.decode(np.array([np.inf], "<f4").tobytes() + b"\0", 1, "int8"),
        lambda: decoder.decode(np.array([-1], "<f4").tobytes() + b"\0", 1, "int4"),
        lambda: decoder.decode(bytes(5), 1, "fp32"),
    ]
    assert [number for number, decode in enumerate(broken) if is_taken(decode)] == []


def test_a_seat_is_read_as_the_page_says() -> None:
    """And a seat of another peer, run or owner is refused."""
    token, me, other = token_of(), identity(1).peer_id, identity(2).peer_id
    seat = token.seat(me)
    invitation = decoder.open_seat(seat, me, RUN_ID, OWNER.peer_id)
    assert invitation == token.invitation.model_dump()
    for peer_id, run_id, owner in ((other, RUN_ID, OWNER.peer_id), (me, "cd" * 20, OWNER.peer_id), (me, RUN_ID, other)):
        with pytest.raises(decoder.Undecodable):
            decoder.open_seat(seat, peer_id, run_id, owner)
    listed = decoder.open_sealed(revocations_of({token.invitation.token: 7}), decoder.REVOCATIONS)
    assert (listed["number"], listed["tokens"], listed["steps"]) == (1, [token.invitation.token], [7])
