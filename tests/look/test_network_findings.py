from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from p2p_diloco.core.addresses import parse_maddr
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.listening import parse_host_maddr
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.records import Record
from p2p_diloco.core.runfile import RunSpec
from p2p_diloco.look.findings import Kind
from p2p_diloco.look.network_findings import (
    AddressTrial,
    Bandwidth,
    Dialled,
    Home,
    address_finding,
    bandwidth_finding,
    client_mode_finding,
    clock_finding,
    reachable_finding,
    run_finding,
    untried_family,
)
from p2p_diloco.look.ways_in import forward
from tests.look.test_findings import check
from tests.support.builders import head, identity, record_of

SEED = identity(1)
MADDR = f"/ip4/203.0.113.7/tcp/4001/p2p/{SEED.peer_id}"
SHOWN = f"/ip4/203.0.113.7/tcp/4001/p2p/…{SEED.peer_id[-8:]}"


def manifest_of(**changes: Any) -> RunManifest:
    spec = {
        "name": "tiny",
        "model": {"config": {"model_type": "llama"}},
        "outer": {"steps": 10},
        "round": {"min_group": 2},
    }
    fields: dict[str, Any] = {
        "spec": RunSpec.model_validate(spec),
        "model_config_json": '{"model_type":"llama"}',
        "n_params": 1000,
        "layout_digest": "1" * 64,
        "vocab_size": 256,
        "data_fingerprint": "",
        "genesis": "2" * 64,
        "owner": SEED.peer_id,
    }
    return RunManifest(**fields | changes)


def seed(**changes: Any) -> Record:
    return record_of(SEED, "abc", role="seed", maddrs=[MADDR], **changes)


def mirror() -> Record:
    """The seed of somebody else, which does not average for others."""
    return record_of(identity(9), "abc", role="seed", maddrs=[MADDR])


def trainer(index: int, **changes: Any) -> Record:
    return record_of(identity(index), "abc", **changes)


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trial", "measured"),
    [
        (AddressTrial(maddr=MADDR, connect_s=0.023), f"{SHOWN} answers in 23 ms, directly, with the right peer id"),
        (
            AddressTrial(maddr=f"/dns/a.org/tcp/1/p2p/{SEED.peer_id}", ips=("192.0.2.1", "::1"), connect_s=1.5),
            f"/dns/a.org/tcp/1/p2p/…{SEED.peer_id[-8:]} (192.0.2.1, ::1) answers in 1.5 s",
        ),
        (
            AddressTrial(maddr=f"{MADDR}/p2p-circuit/p2p/{identity(2).peer_id}", connect_s=0.1),
            "answers in 100 ms, through a relay, with the right peer id",
        ),
    ],
)
def test_an_address_that_answers(trial: AddressTrial, measured: str) -> None:
    check(address_finding(trial, others_answer=True, records=()), "ok", measured, "")


@pytest.mark.parametrize(
    ("trouble", "remedy"),
    [
        ("its host name is unknown", "check its spelling"),
        ("connection refused", "nobody listens at that port now"),
        ("no answer", "its firewall and router let the port in"),
        ("another peer answers at that address", "paste all of it"),
        ("some other program answers at that address", "check host and port"),
        ("its port is open, but no peer answers", "not only starting or stuck"),
        ("no route to host", "this machine has no way there"),
        ("has sent nothing for 10 s", "ask for the address of a peer that is in the run now"),
    ],
)
def test_an_address_that_does_not_answer(trouble: str, remedy: str) -> None:
    trial = AddressTrial(maddr=MADDR, trouble=trouble)
    records = [seed(), trainer(2)]
    check(address_finding(trial, others_answer=False, records=()), "problem", f"{SHOWN}: {trouble}", remedy)
    check(address_finding(trial, others_answer=True, records=records), "warning", f"{SHOWN}: {trouble}", remedy)


def test_a_peer_in_client_mode_is_told_from_one_that_is_away() -> None:
    client = trainer(2, client_mode=True, maddrs=[])
    trial = AddressTrial(maddr=f"/ip4/203.0.113.8/tcp/1/p2p/{client.peer_id}", trouble="connection refused")
    finding = address_finding(trial, others_answer=True, records=[client, seed()])
    check(
        finding, "warning", "this peer is in client mode, nobody can dial it", f"take another peer's address: {MADDR}"
    )
    finding = address_finding(trial, others_answer=True, records=[client])
    check(finding, "warning", "client mode", "ask for the address of a peer")


# -- the run -----------------------------------------------------------------------------------------------------------


def clients(count: int) -> list[Record]:
    return [trainer(index + 2, client_mode=True, maddrs=[]) for index in range(count)]


@pytest.mark.parametrize(
    ("records", "client_mode", "kind", "measured", "remedy"),
    [
        ([seed(), trainer(2), trainer(3)], False, "ok", ": outer step 3 of 10, 2 training, 1 seeding", ""),
        ([seed(), trainer(2)], True, "ok", "1 training", ""),
        ([seed()], False, "warning", "0 training, 1 seeding", "alone until 1 more come"),
        (
            [seed(), *clients(2)],
            False,
            "ok",
            "2 training, 1 seeding, none of whom can be dialled: the owner's seed",
            "",
        ),
        ([seed(), *clients(2)], True, "ok", "none of whom can be dialled: the owner's seed averages", ""),
        (
            [mirror(), *clients(2)],
            True,
            "problem",
            "none of whom can be dialled; this one cannot",
            "the owner's seed, or",
        ),
        ([seed(client_mode=True), *clients(2)], True, "problem", "none of whom can be dialled", "the owner's seed"),
        ([mirror(), *clients(2)], False, "warning", "1 seeding, none of whom can be dialled", "the owner's seed, or a"),
        ([seed(), trainer(2), *clients(2)[1:]], False, "ok", "2 training, 1 seeding", ""),
        ([seed()], True, "warning", "0 training, 1 seeding", "alone until 1 more come"),
        ([record_of(SEED, "abcdefghij")], False, "problem", "outer step 10 of 10", "it is over: take its model"),
        ([], False, "warning", "who is in it is not known: no peer's record is found", "try again in a minute"),
    ],
)
def test_a_run(records: list[Record], client_mode: bool, kind: Kind, measured: str, remedy: str) -> None:
    finding = run_finding(manifest_of(), records, client_mode=client_mode, trouble="")
    check(finding, kind, measured, remedy)
    assert finding.measured.startswith(f"tiny {manifest_of().run_id[:12]}")


def test_a_run_whose_dht_cannot_be_read() -> None:
    finding = run_finding(manifest_of(), [], client_mode=False, trouble="nobody answers; look at it")
    check(finding, "warning", "is served there, but who is in it is not known: nobody answers", "look at it")


def test_a_run_by_invitation_is_told_to_be_one() -> None:
    manifest = manifest_of()
    invited = manifest.model_copy(update={"spec": manifest.spec.model_copy(update={"membership": "invite"})})
    finding = run_finding(invited, [seed(), trainer(2)], client_mode=False, trouble="")
    check(finding, "ok", f"tiny {invited.run_id[:12]}, by invitation: outer step 3 of 10", "")


def test_the_swarms_head_counts_not_the_loudest_claim() -> None:
    loud = record_of(identity(9), "x", step=10, head=head("lie"), heads=[])
    finding = run_finding(manifest_of(), [seed(), trainer(2), loud], client_mode=False, trouble="")
    check(finding, "ok", "outer step 3 of 10", "")


# -- the clock ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behind_s", "kind", "measured"),
    [
        ([0.0], "ok", "within 0.1 s of 1 peer"),
        ([0.0, 2.9, 3.0], "ok", "within 2.9 s of 3 peers"),
        ([4.2], "warning", "this machine's clock is 4.2 s behind that of 1 peer"),
        ([-4.2, -4.2], "warning", "this machine's clock is 4.2 s ahead of that of 2 peers"),
        ([15.1], "problem", "15.1 s behind"),
        ([-3600.0], "problem", "3600.0 s ahead of"),
        ([0.0, 0.1, 1e6], "ok", "within 0.1 s of 3 peers"),
        ([], "warning", "no peer told its time"),
    ],
)
def test_clocks(behind_s: list[float], kind: Kind, measured: str) -> None:
    finding = clock_finding(behind_s, Timeouts())
    remedy = "" if kind == "ok" else "timedatectl set-ntp true" if behind_s else "see yourself"
    check(finding, kind, measured, remedy)


# -- are we reachable? -------------------------------------------------------------------------------------------------

OUTSIDE = Dialled(by="peer …X", ip="8.8.8.8", reached=True)
INSIDE = Dialled(by="peer …Y", ip="192.168.1.7", reached=True)
REFUSED = Dialled(by="peer …Z", ip="8.8.8.8", reached=False, reason="connection refused")
FORWARD = "--host-maddrs /ip4/0.0.0.0/tcp/4001 --announce-maddrs /ip4/8.8.8.8/tcp/4001"


BEHIND = Home(own=("/ip4/192.168.1.2/tcp/7777",), ports=(7777,), fixed_port=4001, counts=False, public_swarm=True)
OPEN = replace(BEHIND, own=("/ip4/8.8.8.8/tcp/7777",), counts=True)
SHARED = replace(BEHIND, own=("/ip4/100.64.1.2/tcp/7777", "/ip4/127.0.0.1/tcp/7777"))
BOTH = replace(BEHIND, own=("/ip6/2606:4700::1/tcp/7777", "/ip4/192.168.1.2/tcp/7777"))
REFUSED6 = replace(REFUSED, ip="2606:4700::1")
OVER6 = replace(REFUSED6, reached=True, reason="")
ELSEWHERE = replace(REFUSED, ip="9.9.9.9")
FORWARD6 = (
    "open TCP port 4001 for this machine in its firewall and in the router (IPv6 needs no forwarding), and start with "
    "--host-maddrs /ip4/0.0.0.0/tcp/4001 /ip6/::/tcp/4001 --announce-maddrs /ip6/2606:4700::1/tcp/4001"
)
AS_YOU_ARE = "start as you are (you contribute and receive, others average)"


@pytest.mark.parametrize(
    ("dialled", "home", "kind", "measured", "remedy"),
    [
        ([OUTSIDE], BEHIND, "ok", "peer …X reaches you directly at 8.8.8.8, port 7777", ""),
        ([REFUSED, OUTSIDE], OPEN, "ok", "peer …X reaches you", ""),
        ([INSIDE, OUTSIDE], BEHIND, "ok", "peer …X reaches you", ""),
        ([INSIDE], replace(BEHIND, public_swarm=False), "ok", "peer …Y reaches you directly at 192.168.1.7", ""),
        ([INSIDE], BEHIND, "warning", "from within your network", "YOUR-PUBLIC-IP/tcp/4001, unless all peers"),
        (
            [REFUSED],
            OPEN,
            "problem",
            "nobody reaches you directly: peer …Z sees you at 8.8.8.8 and dials port 7777: connection refused",
            f"add --client-mode (you contribute and receive, others average) or open TCP port 4001 in the firewall, "
            f"forward it in the router, and start with {FORWARD}",
        ),
        (
            [REFUSED],
            BEHIND,
            "warning",
            "connection refused; its own address, 192.168.1.2, is private: a router is between",
            f"{AS_YOU_ARE} or open TCP port 4001 in the firewall, forward it in the router, and start with {FORWARD}",
        ),
        ([REFUSED], replace(OPEN, relayed=True), "problem", "a relay could, with small messages only", FORWARD),
        ([REFUSED], SHARED, "warning", "of a provider's own network: a provider shares one address", AS_YOU_ARE),
        ([REFUSED, ELSEWHERE], BEHIND, "warning", "peers see you at 8.8.8.8 and 9.9.9.9: a provider", AS_YOU_ARE),
        ([REFUSED6], BOTH, "warning", "sees you at 2606:4700::1 and dials", f"{AS_YOU_ARE} or {FORWARD6}"),
        (
            [REFUSED, REFUSED6],
            BOTH,
            "warning",
            "8.8.8.8 and dials port 7777: connection refused, peer …Z sees you at 2606:4700::1 and dials port 7777",
            f"{FORWARD} or for peers that have IPv6, {FORWARD6}",
        ),
        ([REFUSED, OVER6], BOTH, "ok", "at 2606:4700::1, port 7777; over IPv4 nobody does, so it is a way in for", ""),
        ([OVER6], BOTH, "ok", "at 2606:4700::1, port 7777", ""),
        ([REFUSED], BOTH, "warning", "sees you at 8.8.8.8", f"{FORWARD} or for peers that have IPv6, {FORWARD6}"),
        ([], BEHIND, "warning", "no peer has tried (peer …Z: busy)", "run doctor again in a minute"),
    ],
)
def test_reachable(dialled: list[Dialled], home: Home, kind: Kind, measured: str, remedy: str) -> None:
    check(reachable_finding(dialled, home, reason="peer …Z: busy"), kind, measured, remedy)


@pytest.mark.parametrize(
    ("dialled", "home", "family"),
    [
        ([], BOTH, None),
        ([REFUSED], BOTH, 6),
        ([REFUSED6], BOTH, 4),
        ([REFUSED6], replace(BOTH, own=(BOTH.own[0], "/ip4/127.0.0.1/tcp/7777")), None),
        ([REFUSED], replace(BOTH, own=("/ip6/fd00::1/tcp/7777", BOTH.own[1])), None),
        ([REFUSED, REFUSED6], BOTH, None),
        ([REFUSED, OUTSIDE], BOTH, None),
        ([REFUSED], BEHIND, None),
        ([REFUSED], OPEN, None),
    ],
)
def test_who_is_reached_in_neither_family_has_the_other_one_tried(
    dialled: list[Dialled], home: Home, family: int | None
) -> None:
    """Where it has an address of it that may lead out."""
    assert untried_family(dialled, home.own) == family


@pytest.mark.parametrize("dialled", [[REFUSED], [REFUSED, ELSEWHERE]])
def test_behind_a_shared_address_nothing_is_forwarded(dialled: list[Dialled]) -> None:
    shared = reachable_finding(dialled, SHARED if len(dialled) == 1 else BEHIND, reason="")
    assert "forward it" not in shared.remedy


def test_an_ipv6_remedy_can_be_followed_to_the_letter() -> None:
    """What is printed is what a peer can listen at and announce."""
    words = forward(4001, "2606:4700::1").split()
    listen, announce = words.index("--host-maddrs"), words.index("--announce-maddrs")
    assert [parse_host_maddr(maddr)[1] for maddr in words[listen + 1 : announce]] == ["ip4", "ip6"]
    assert parse_maddr(words[announce + 1]) == "/ip6/2606:4700::1/tcp/4001"
    assert len(words) == announce + 2


def test_in_client_mode_nobody_need_reach_us() -> None:
    check(client_mode_finding(), "ok", "not needed in client mode", "")


def test_bandwidth() -> None:
    bandwidth = Bandwidth(peer="peer …X", round_trip_s=0.04, up_bytes_per_s=1.25e6, down_bytes_per_s=1e7)
    check(bandwidth_finding(bandwidth, ""), "ok", "1.25 MB/s up, 10 MB/s down, 40 ms there and back, with peer …X", "")
    finding = bandwidth_finding(None, "peer …X: in a round")
    check(finding, "warning", "no peer has measured it (peer …X: in a round)", "run doctor again in a minute")
