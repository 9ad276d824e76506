"""What measurements of the network mean for a volunteer: one finding each, about the run and its addresses, the clock,
the way to this machine, and the connection. Pure; ``network_trial`` measures.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from p2p_diloco.core.addresses import direct_ip, family_of, is_relayed, publicness, without_peer
from p2p_diloco.core.admission import one_vote_each
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.records import Record
from p2p_diloco.core.swarm_head import swarm_head
from p2p_diloco.look.findings import Finding, Kind, amount, span
from p2p_diloco.look.ways_in import SHARED_MEANS, forward, is_global, is_shared

SET_CLOCK = "set it by NTP, on Linux: sudo timedatectl set-ntp true"
OTHER_ADDRESS = "ask for the address of a peer that is in the run now"


# -- the way to the run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AddressTrial:
    """Says what came of one address of ``--initial-peers``."""

    maddr: str
    ips: tuple[str, ...] = ()
    """What its host name stands for."""
    connect_s: float = 0.0
    """Until its port answered."""
    trouble: str = ""
    """Why there is no connection to the peer that it names, as ``addresses.DIAL_REASONS`` has it; else empty."""
    signed: bytes = b""
    """The manifest that the peer serves; empty where it serves none."""

    @property
    def peer_id(self) -> str:
        """Returns the id of the peer that the address names."""
        return self.maddr.rpartition("/p2p/")[2]


REACH_REMEDIES = {
    "its host name is unknown": "check its spelling, and that this machine resolves names",
    "connection refused": "nobody listens at that port now: see that the peer runs, and ask for its present address",
    "no answer": "see that the peer runs, that its firewall and router let the port in, and that yours let you out",
    "some other program answers at that address": "check host and port: a peer listens elsewhere",
    "its port is open, but no peer answers": "see that the peer runs, and is not only starting or stuck",
    "another peer answers at that address": "ask for the address again, and paste all of it: the peer's id is another",
    "network is unreachable": "this machine has no way there: look at its network, or take an address it can reach",
    "no route to host": "this machine has no way there: look at its network, or take an address it can reach",
}


def address_finding(trial: AddressTrial, *, others_answer: bool, records: Sequence[Record]) -> Finding:
    """Returns the finding about one address. ``records``: of the run, where another address led to it."""
    shown = short_maddr(trial.maddr)
    if not trial.trouble:
        names = f" ({', '.join(trial.ips)})" if trial.ips else ""
        way = "through a relay" if is_relayed(trial.maddr) else "directly"
        measured = f"{shown}{names} answers in {span(trial.connect_s)}, {way}, with the right peer id"
        return Finding(kind="ok", what="address", measured=measured)
    kind: Kind = "warning" if others_answer else "problem"
    if any(record.peer_id == trial.peer_id and record.client_mode for record in records):
        measured = f"{shown}: this peer is in client mode, nobody can dial it"
        dialled = [maddr for record in records if not record.client_mode for maddr in record.maddrs[:1]]
        remedy = f"take another peer's address: {dialled[0]}" if dialled else OTHER_ADDRESS
        return Finding(kind=kind, what="address", measured=measured, remedy=remedy)
    return Finding(
        kind=kind,
        what="address",
        measured=f"{shown}: {trial.trouble}",
        remedy=REACH_REMEDIES.get(trial.trouble, OTHER_ADDRESS),
    )


def run_finding(manifest: RunManifest, records: Sequence[Record], *, client_mode: bool, trouble: str) -> Finding:
    """Returns the finding about the run. ``records``: of its live peers. ``trouble``: why the DHT could not be asked,
    if so."""
    spec, name = manifest.spec, f"{manifest.spec.name} {manifest.run_id[:12]}"
    if spec.membership == "invite":
        name += ", by invitation"
    swarm = swarm_head(one_vote_each(records), None)
    trainers = [record for record in records if record.role == "trainer"]
    if swarm is None:
        why, _, remedy = (trouble or "no peer's record is found; try again in a minute").partition("; ")
        measured = f"{name} is served there, but who is in it is not known: {why}"
        return Finding(kind="warning", what="run", measured=measured, remedy=remedy)
    step = swarm[0]
    seeds = len(records) - len(trainers)
    measured = f"{name}: outer step {step} of {spec.outer.steps}, {len(trainers)} training, {seeds} seeding"
    kind: Kind = "ok"
    remedy = ""
    alone = nobody_averages(manifest, records)
    if trainers and all(record.client_mode for record in trainers):
        measured += (
            ", none of whom can be dialled" if alone else ", none of whom can be dialled: the owner's seed averages"
        )
    if step >= spec.outer.steps:
        kind, remedy = "problem", "it is over: take its model with p2p-diloco export"
    elif alone:
        measured += "; this one cannot, either" if client_mode else ""
        kind = "problem" if client_mode else "warning"
        remedy = "the owner's seed, or a trainer that others can dial, has to come: nobody averages here"
    elif len(trainers) + 1 < spec.round.min_group:
        missing = spec.round.min_group - len(trainers) - 1
        kind, remedy = "warning", f"you will train alone until {missing} more come: outer steps need a group"
    return Finding(kind=kind, what="run", measured=measured, remedy=remedy)


def nobody_averages(manifest: RunManifest, records: Sequence[Record]) -> bool:
    """Returns whether trainers are there, none of them can be dialled, and the owner's seed does not help them."""
    trainers = [record for record in records if record.role == "trainer"]
    seeds = (record for record in records if record.role == "seed" and not record.client_mode)
    helps = manifest.spec.round.seeds_reduce != "never" and any(seed.peer_id == manifest.owner for seed in seeds)
    return bool(trainers) and all(record.client_mode for record in trainers) and not helps


def clock_finding(behind_s: Sequence[float], timeouts: Timeouts) -> Finding:
    """Returns the finding about this machine's clock. ``behind_s``: by how much this machine's clock is at least behind
    each peer's that told its time; negative where it is ahead. The limits are those with which a peer starts."""
    if not behind_s:
        return Finding(
            kind="warning",
            what="clock",
            measured="no peer told its time",
            remedy="see yourself that this machine's clock is right",
        )
    offset_s = statistics.median(behind_s)
    peers = f"{len(behind_s)} peer{'s' if len(behind_s) > 1 else ''}"
    if abs(offset_s) <= timeouts.record_life_s / 10:
        return Finding(kind="ok", what="clock", measured=f"within {max(abs(offset_s), 0.1):.1f} s of {peers}")
    direction = "behind" if offset_s > 0 else "ahead of"
    kind: Kind = "problem" if abs(offset_s) > timeouts.record_life_s / 2 else "warning"
    measured = f"this machine's clock is {abs(offset_s):.1f} s {direction} that of {peers}"
    return Finding(kind=kind, what="clock", measured=measured, remedy=SET_CLOCK)


# -- the way to this machine -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Dialled:
    """Holds what a peer says that it found when it dialled us; ``reached`` is what we saw ourselves."""

    by: str
    ip: str
    """Where it sees us."""
    reached: bool
    reason: str = ""


def untried_family(dialled: Sequence[Dialled], own: Sequence[str]) -> int | None:
    """Returns the family, 4 or 6, in which nobody has dialled us yet, where in the other one nobody has reached us, and
    ``own`` has an address that may lead out: of IPv6 a public one, of IPv4 any, for routers translate it. None where
    there is nothing left to try."""
    if not dialled or any(one.reached for one in dialled):
        return None
    tried = {6 if ":" in one.ip else 4 for one in dialled}
    leads_out = {family_of(maddr) for maddr in own if publicness(maddr) <= (0 if family_of(maddr) == 6 else 2)}
    return next((family for family in (4, 6) if family in leads_out - tried), None)


CLIENT_MODE_MEANS = "you contribute and receive, others average"


@dataclass(frozen=True, kw_only=True)
class Home:
    """Says where this machine would listen as a peer, and who is around."""

    own: tuple[str, ...]
    """Its addresses, as p2pd sees them, or as the user announces them."""
    ports: tuple[int, ...]
    """Of these addresses."""
    fixed_port: int
    """That the user has chosen, or could choose."""
    counts: bool
    """A peer with these addresses takes itself for one that others can dial: it leads and averages."""
    relayed: bool = False
    """A peer would relay to it."""
    public_swarm: bool = False
    """Some peers announce public addresses."""

    @property
    def trouble(self) -> str:
        """Returns what is between it and the internet, as far as its own addresses tell; empty where nothing is."""
        ips = {level: direct_ip(maddr) for maddr in reversed(self.own) if (level := publicness(maddr)) in (0, 2)}
        if 0 in ips or 2 not in ips:
            return ""
        if any(map(is_shared, self.own)):
            return f"its own address is of a provider's own network: {SHARED_MEANS}"
        return f"its own address, {ips[2]}, is private: a router is between"

    @property
    def ip6(self) -> str:
        """Returns its public address of IPv6; empty where it has none."""
        public = (direct_ip(maddr) for maddr in self.own if publicness(maddr) == 0 and family_of(maddr) == 6)
        return next((ip for ip in public if ip), "")


def reachable_finding(dialled: Sequence[Dialled], home: Home, *, reason: str) -> Finding:
    """Returns the finding about whether others reach this machine. ``reason``: why the last peer that did not try would
    not."""
    where = f"port{'s' if len(home.ports) > 1 else ''} {', '.join(map(str, home.ports))}"
    reached = [one for one in dialled if one.reached]
    if reached:
        best = max(reached, key=lambda one: is_global(one.ip))
        measured = f"{best.by} reaches you directly at {best.ip}, {where}"
        if ":" in best.ip and any(":" not in one.ip for one in dialled):
            measured += "; over IPv4 nobody does, so it is a way in for peers that have IPv6"
        if home.public_swarm and not is_global(best.ip):
            return Finding(
                kind="warning",
                what="reachable",
                measured=f"{measured}, from within your network",
                remedy=f"{forward(home.fixed_port, '')}, unless all peers are in it",
            )
        return Finding(kind="ok", what="reachable", measured=measured)
    if not dialled:
        return Finding(
            kind="warning",
            what="reachable",
            measured=f"not known, no peer has tried ({reason or 'there is nobody to ask'})",
            remedy="run doctor again in a minute",
        )
    last_of_family = {":" in one.ip: one for one in dialled}
    tries = [f"{one.by} sees you at {one.ip} and dials {where}: {one.reason}" for one in last_of_family.values()]
    told = [f"nobody reaches you directly: {', '.join(tries)}"]
    told += [home.trouble] if home.trouble else []
    seen = sorted({one.ip for one in dialled if is_global(one.ip) and ":" not in one.ip})
    told += [f"peers see you at {' and '.join(seen)}: {SHARED_MEANS}"] if len(seen) > 1 else []
    told += ["a relay could, with small messages only"] if home.relayed else []
    ways = [f"add --client-mode ({CLIENT_MODE_MEANS})" if home.counts else f"start as you are ({CLIENT_MODE_MEANS})"]
    over_ip4, over_ip6 = last_of_family.get(False), last_of_family.get(True)
    if over_ip4 and len(seen) < 2 and not any(map(is_shared, home.own)):
        ways.append(forward(home.fixed_port, over_ip4.ip))
    if ip6 := home.ip6 or (over_ip6.ip if over_ip6 else ""):
        told_of = "for peers that have IPv6, " if over_ip4 else ""
        ways.append(f"{told_of}{forward(home.fixed_port, ip6)}")
    kind: Kind = "problem" if home.counts else "warning"
    remedy = " or ".join(ways)  # no comma: an address may be the last word before it, and is pasted with it
    return Finding(kind=kind, what="reachable", measured="; ".join(told), remedy=remedy)


def client_mode_finding() -> Finding:
    """Returns the finding that nobody need reach a peer in client mode."""
    measured = f"not needed in client mode: {CLIENT_MODE_MEANS}"
    return Finding(kind="ok", what="reachable", measured=measured)


# -- the connection ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Bandwidth:
    """Says what was measured with one peer."""

    peer: str
    round_trip_s: float
    up_bytes_per_s: float
    down_bytes_per_s: float


def bandwidth_finding(bandwidth: Bandwidth | None, reason: str) -> Finding:
    """Returns the finding about the connection. ``reason``: why the last peer asked did not measure it with us."""
    if bandwidth is None:
        measured = f"not known, no peer has measured it ({reason})"
        return Finding(kind="warning", what="bandwidth", measured=measured, remedy="run doctor again in a minute")
    up, down = amount(bandwidth.up_bytes_per_s), amount(bandwidth.down_bytes_per_s)
    measured = f"{up}/s up, {down}/s down, {span(bandwidth.round_trip_s)} there and back, with {bandwidth.peer}"
    return Finding(kind="ok", what="bandwidth", measured=measured)


# -- addresses ---------------------------------------------------------------------------------------------------------


def short_maddr(maddr: str) -> str:
    """Returns the address with the end of its peer's id only, as the log has it."""
    return f"{without_peer(maddr)}/p2p/…{maddr[-8:]}"
