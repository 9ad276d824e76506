"""The small decisions of a checkup; all of it runs in tests/swarm/test_diagnoses.py, with real peers."""

from __future__ import annotations

from p2p_diloco.look.doctor import candidates_of, fixed_port, served_runs
from p2p_diloco.look.network_findings import AddressTrial
from p2p_diloco.look.network_trial import Candidate, by_family
from tests.look.test_network_findings import manifest_of
from tests.support.builders import identity, record_of

OWNER = identity(1)


def trial(index: int, signed: bytes) -> AddressTrial:
    return AddressTrial(maddr=f"/ip4/192.0.2.{index}/tcp/1/p2p/{identity(index).peer_id}", signed=signed)


def candidate(index: int) -> Candidate:
    peer_id = identity(index).peer_id
    return Candidate(peer_id=peer_id, maddrs=(f"/ip4/192.0.2.{index}/tcp/1/p2p/{peer_id}",))


def test_runs_that_are_served_at_the_addresses() -> None:
    one, other = manifest_of(), manifest_of(n_params=7)
    sound, another, forged = one.signed(OWNER), other.signed(OWNER), one.signed(identity(7))
    runs = served_runs([trial(2, sound), trial(3, b""), trial(4, another), trial(5, sound), trial(6, forged)])
    assert runs == {one.run_id: [candidate(2), candidate(5)], other.run_id: [candidate(4)]}


def test_seeds_are_asked_first_and_nobody_who_cannot_be_dialled() -> None:
    records = [
        record_of(identity(2), "a"),
        record_of(identity(3), "a", client_mode=True),
        record_of(identity(4), "a", role="seed"),
        record_of(identity(5), "a", maddrs=[]),
        record_of(identity(6), "a"),
    ]
    asked = [one.peer_id for one in candidates_of([candidate(6)], records)]
    assert asked == [identity(4).peer_id, identity(6).peer_id, identity(2).peer_id]
    assert candidates_of([candidate(6)], [])[0].maddrs == candidate(6).maddrs, "as the user gave it"


def test_a_peer_that_is_given_in_two_families_is_one_with_the_addresses_of_both() -> None:
    over_ip6 = Candidate(peer_id=candidate(6).peer_id, maddrs=("/ip6/2001:db8::6/tcp/1",))
    record = record_of(identity(6), "a", maddrs=["/ip6/2001:db8::6/tcp/1", "/ip4/192.168.1.6/tcp/1"])
    (one,) = candidates_of([candidate(6), over_ip6], [record])
    assert one.maddrs == (*candidate(6).maddrs, "/ip6/2001:db8::6/tcp/1", "/ip4/192.168.1.6/tcp/1")
    assert [of.maddrs for of in by_family([one], 6)] == [("/ip6/2001:db8::6/tcp/1",)]
    assert by_family([candidate(6)], 6) == []


def test_a_port_to_open() -> None:
    assert fixed_port(["/ip4/0.0.0.0/tcp/0"]) == 4001
    assert fixed_port(["/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/5000"]) == 5000
    assert fixed_port([]) == 4001
