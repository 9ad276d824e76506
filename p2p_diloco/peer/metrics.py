"""Metrics of one peer for Prometheus, served over HTTP by its network process: ``GET /metrics``.

Nothing is pushed here. What a peer is, is read from it when somebody asks; what happened is counted where it is written
down (``totals`` of the event log, ``traffic`` of the transport); what p2pd, the disk and the system have to be asked
for is looked up from time to time (``Surroundings``).

No label takes a value that a stranger can choose, so the number of series is fixed. An answer takes 3 to 4 ms of a
processor, in a run with 500 others (``python -m benchmarks scrape``), and is made anew at most once a second, however
often it is asked for.
"""

from __future__ import annotations

import asyncio
import itertools
import platform
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from p2p_diloco import __version__
from p2p_diloco.core.addresses import METRICS_FLAG, Endpoint
from p2p_diloco.core.equivocation import KINDS
from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.event import Uncertified
from p2p_diloco.core.findings import LASTS_STEPS, AuditResult
from p2p_diloco.core.totals import LIMITS_S, Durations
from p2p_diloco.core.waiting import now_s
from p2p_diloco.ledger.folder import folder_bytes
from p2p_diloco.peer.peer import Peer
from p2p_diloco.peer.web import Response, serving
from p2p_diloco.round.outcome import MissedReason
from p2p_diloco.wire.channel import Links
from p2p_diloco.wire.traffic import Purpose

PREFIX = "p2p_diloco_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LOOK_EVERY_S = 5.0
RENDER_EVERY_S = 1.0

RESULTS = ("committed", *get_args(MissedReason))
UNCERTIFIED = tuple(filter(None, get_args(Uncertified)))
REASONS = ("misbehaved", "silent", "gone", "refused")
REPAIRS = ("state", "snapshot", "update")


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Holds what p2pd, the disk and the system have to be asked for."""

    links: Links = field(default_factory=Links)
    ledger_bytes: int = 0
    trainer_bytes: int | None = None


class PeerMetrics:
    """The metrics of one peer.

    ``trainer_pid``: the process that trains, where it is another one than this."""

    def __init__(self, peer: Peer, trainer_pid: int | None = None) -> None:
        self.peer = peer
        self.surroundings = Surroundings()
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        self._trainer_pid = trainer_pid
        self._kept: tuple[float, Response | None] = (0.0, None)
        """The last answer, and until when it is given again."""

    async def serve(self, endpoint: Endpoint) -> None:
        """Serves the metrics until it is cancelled. Raises UsageError when nobody can listen there."""
        await self.look()
        try:
            async with serving(endpoint.host, endpoint.port, self.page, self.peer.here.timeouts):
                while True:
                    await asyncio.sleep(LOOK_EVERY_S)
                    await self.look()
        except UsageError as error:
            raise UsageError(f"{METRICS_FLAG} {endpoint}: {error}") from error

    async def look(self) -> None:
        """Looks around, at what cannot be read off the peer."""
        self.surroundings = Surroundings(
            links=await self.peer.here.transport.links(),
            ledger_bytes=await asyncio.to_thread(folder_bytes, self.peer.replica.ledger.folder),
            trainer_bytes=resident_bytes(self._trainer_pid),
        )

    def page(self, path: str) -> Response | None:
        """Returns what is at a path, made anew after RENDER_EVERY_S; None for a path that is nowhere."""
        if path != "/metrics":
            return None
        asked_s = now_s()
        until_s, response = self._kept
        if response is None or asked_s >= until_s:
            response = Response(body=self.render(), content_type=CONTENT_TYPE)
            self._kept = (asked_s + RENDER_EVERY_S, response)
        return response

    def render(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """Yields all metrics of the peer, for the registry."""
        yield from self._identity()
        yield from self._training()
        yield from self._rounds()
        yield from self._certificates()
        yield from self._repairs()
        yield from self._network()

    def _identity(self) -> Iterator[Metric]:
        peer, spec = self.peer, self.peer.manifest.spec
        about = {"version": __version__, "python": platform.python_version()}
        yield info("build_info", "This peer's software.", about)
        run = {
            "run_id": peer.manifest.run_id,
            "run_name": spec.name,
            "codec": spec.outer.codec,
            "n_params": str(peer.manifest.n_params),
        }
        yield info("run_info", "The run that this peer is in.", run)
        yield gauge("model_parameters", "Parameters of the run's model.", peer.manifest.n_params)
        me = {"peer_id": peer.identity.peer_id, "name": peer.presence.name, "role": peer.role}
        yield info("peer_info", "This peer.", me)

    def _training(self) -> Iterator[Metric]:
        peer, trained, progress = self.peer, self.peer.presence.trained, self.peer.seat.progress
        yield gauge("loss_nats", "Training loss of the last inner step, in nats per token.", trained.loss)
        text = "Loss of theta on held-out text, in nats per token, when this peer last evaluated it."
        yield gauge("held_out_loss_nats", text, trained.held_out_loss)
        held_out_step = None if trained.held_out_loss is None else trained.held_out_step
        yield gauge("held_out_step", "Outer step of that evaluation.", held_out_step)
        yield counter("tokens_total", "Tokens that this peer has trained on since it joined.", trained.tokens)
        yield gauge("tokens_per_second", "Tokens that this peer trains on in a second.", trained.tokens_per_s)
        yield gauge("inner_step", "Inner steps made since the last outer step.", progress.inner_step)
        yield gauge("inner_steps_planned", "Inner steps planned until the next outer step.", progress.planned)
        yield gauge("inner_step_seconds", "Mean duration of the last inner steps.", progress.step_s)
        yield gauge("outer_step", "Outer step that this peer stands at.", peer.step)
        newest = peer.seat.anchors.newest
        text = "Newest outer step that the run's owner has anchored, as far as this peer has heard."
        yield gauge("anchored_step", text, newest.step if newest else None)
        yield gauge("outer_steps_goal", "Outer steps of the whole run.", peer.manifest.spec.outer.steps)

    def _rounds(self) -> Iterator[Metric]:
        totals, presence = self.peer.events.totals, self.peer.presence
        last = totals.last_commit
        text = "Attempts at an outer step, by what became of them."
        yield counters("rounds_total", text, "result", {result: totals.rounds[result] for result in RESULTS})
        text = "Duration of a round's phases, of those that it came to."
        yield histogram("round_phase_seconds", text, "phase", totals.phases)
        text = "From the end of the last inner step to the start of the next, after an outer step."
        yield histogram("stall_seconds", text, "", {"": totals.stalls})
        yield gauge("group_size", "Members of this peer's last round.", presence.last_round.group)
        yield counter("members_lost_total", "Members that failed in rounds of this peer.", totals.members_lost)
        text = "Unix time at which this peer last committed a round."
        yield gauge("last_commit_timestamp_seconds", text, last.wall_s if last else None)
        share = None if last is None else 1.0 if last.share_percent is None else last.share_percent / 100
        text = "What this peer was to reduce, by its uplink, over an equal share, in the last round that committed."
        yield gauge("reduce_share", text, share)
        where = "in the last round that committed; of models with more than 4 parts, estimated from 4 of them"
        text = f"Norm of this peer's outer gradient {where}."
        yield gauge("contribution_norm", text, last.contribution_norm if last else None)
        text = f"Norm of the group's mean outer gradient {where}."
        yield gauge("update_norm", text, last.update_norm if last else None)
        text = f"Cosine between this peer's outer gradient and the group's mean {where}."
        yield gauge("contribution_cosine", text, last.cosine if last else None)

    def _certificates(self) -> Iterator[Metric]:
        totals, known = self.peer.events.totals, self.peer.seat.known.peers
        last, since_s = totals.last_commit, totals.uncertified_since_s
        yield gauge("known_members", "Peers that are known where this peer stands.", len(known))
        yield gauge("known", "1 where this peer is known itself.", self.peer.identity.peer_id in known)
        where = "in the last round of this peer that committed."
        text = f"Members that signed the update's certificate, {where}"
        yield gauge("certificate_signatures", text, last.signatures if last else None)
        text = f"Members that certify, most of which have to sign, {where}"
        yield gauge("certificate_members", text, last.certifying if last else None)
        text = "Outer steps of this peer that the run's owner has witnessed."
        yield counter("witnessed_steps_total", text, totals.witnessed)
        text = "Outer steps of this peer that the owner's seed has led and reduced: no trainer could be dialled by all."
        yield counter("helped_steps_total", text, totals.helped)
        text = "Rounds whose update got no certificate: most did not sign it, or the owner's witness was missing."
        counts = {reason: totals.uncertified[reason] for reason in UNCERTIFIED}
        yield counters("uncertified_rounds_total", text, "reason", counts)
        text = "Since the first round, after the last outer step, that had others in it and no certificate; 0 if none."
        waited_s = 0.0 if since_s is None else max(self.peer.here.wall_s() - since_s, 0.0)
        yield gauge("uncertified_seconds", text, waited_s)
        text = "Updates that this peer, the run's owner, was asked to witness, by what it answered."
        asked = {"signed": totals.witness_asked[True], "refused": totals.witness_asked[False]}
        yield counters("witness_requests_total", text, "result", asked)

    def _repairs(self) -> Iterator[Metric]:
        peer, totals = self.peer, self.peer.events.totals
        text = "Times that this peer took the swarm's state from other peers, after it had joined or missed a round."
        yield counter("catch_ups_total", text, totals.catch_ups)
        text = "Outer steps that this peer gave up because the swarm did not share them."
        yield counter("rolled_back_steps_total", text, totals.rolled_back)
        text = "Branches of the run's history that this peer gave up for another one, by the votes."
        yield counter("branches_left_total", text, totals.branches_left)
        text = "Times that other peers' digest of a state was another one than this peer's."
        yield counter("digest_mismatches_total", text, totals.disputes)
        text = "Parts that others have reduced and this peer has audited, by result."
        yield counters("audits_total", text, "result", {one: totals.audits[one] for one in get_args(AuditResult)})
        text = "Times that something was found of a peer that reduces, by this peer or proved to it."
        yield counters("findings_total", text, "kind", {kind: totals.found[kind] for kind in LASTS_STEPS})
        text = "Peers that this peer has barred since it was started, by what they have signed two of."
        found = {kind: totals.equivocations[kind] for kind in KINDS}
        yield counters("equivocations_total", text, "what", found)
        text = "Peers that are barred here, each with a proof that it has signed two of what is signed once."
        yield gauge("barred_peers", text, len(peer.directory.barred))
        text = "Repairs of what this peer holds in memory or on disk."
        yield counters("repairs_total", text, "what", {what: totals.repairs[what] for what in REPAIRS})

    def _network(self) -> Iterator[Metric]:
        peer, traffic, around = self.peer, self.peer.here.transport.traffic, self.surroundings
        text = "Bytes handed to and taken from p2pd, by direction and by what they were for."
        moved = CounterMetricFamily(PREFIX + "bytes_total", text, labels=("direction", "purpose"))
        for direction, counts in (("sent", traffic.sent), ("received", traffic.received)):
            for purpose in get_args(Purpose):
                moved.add_metric((direction, purpose), counts[purpose])
        yield moved
        text = "Streams that ended in an error of the peer beyond, and members of rounds given up as silent."
        rejected = {reason: traffic.rejected[reason] for reason in REASONS}
        yield counters("rejected_messages_total", text, "reason", rejected)
        text = "Other peers of the run whose records are alive."
        yield gauge("peers_seen", text, len(peer.here.live()))
        links = {"direct": around.links.direct, "relay": around.links.relayed}
        yield gauges("connections", "Open connections of p2pd to other peers.", "kind", links)
        yield gauge("dht_table_size", "Peers in the routing table of the DHT.", around.links.routing_table)
        yield gauge("ledger_bytes", "Size of all files of the ledger.", around.ledger_bytes)
        text = "Memory of the process that trains; process_resident_memory_bytes is that of the network process."
        yield gauge("trainer_resident_memory_bytes", text, around.trainer_bytes)


def gauge(name: str, text: str, value: float | None) -> Metric:
    """Returns one gauge, without a sample where ``value`` is not known."""
    family = GaugeMetricFamily(PREFIX + name, text)
    if value is not None:
        family.add_metric((), value)
    return family


def gauges(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    """Returns a gauge with one sample for each value of ``label``."""
    family = GaugeMetricFamily(PREFIX + name, text, labels=(label,))
    for key, value in values.items():
        family.add_metric((key,), value)
    return family


def info(name: str, text: str, labels: Mapping[str, str]) -> Metric:
    """Returns a gauge that is 1, and says what it says in its labels."""
    family = GaugeMetricFamily(PREFIX + name, text, labels=tuple(labels))
    family.add_metric(tuple(labels.values()), 1)
    return family


def counter(name: str, text: str, value: float) -> Metric:
    """Returns one counter."""
    return CounterMetricFamily(PREFIX + name, text, value=value)


def counters(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    """Returns a counter with one sample for each value of ``label``."""
    family = CounterMetricFamily(PREFIX + name, text, labels=(label,))
    for key, value in values.items():
        family.add_metric((key,), value)
    return family


def histogram(name: str, text: str, label: str, values: Mapping[str, Durations]) -> Metric:
    """Returns a histogram for each value of ``label``; where ``label`` is empty there is one, without labels."""
    family = HistogramMetricFamily(PREFIX + name, text, labels=(label,) if label else ())
    limits = [*map(str, LIMITS_S), "+Inf"]
    for key, durations in values.items():
        buckets = list(zip(limits, itertools.accumulate(durations.counts)))
        family.add_metric((key,) if label else (), buckets, durations.sum_s)
    return family


def resident_bytes(pid: int | None) -> int | None:
    """Returns how much memory a process takes; None where the system does not tell."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1]
    except (OSError, IndexError):
        return None
    return int(pages) * resource.getpagesize()
