"""An overview of the swarm as others read it: metrics for Prometheus, targets for its service discovery, JSON for the
page. Pure.

Names and versions, which peers choose, are bounded and show nothing but text (``display``). A peer's series are those
of its record, so they end with it. Metric names: what ``# HELP`` says is their documentation.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import get_args

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from p2p_diloco import __version__
from p2p_diloco.core.admission import invited_as
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.records import Fault, Record
from p2p_diloco.look.display import label, plain
from p2p_diloco.look.history import History
from p2p_diloco.look.overview import STATES, Overview, scrape_targets, state_of
from p2p_diloco.look.page_view import page_of
from p2p_diloco.peer.web import Response

PREFIX = "p2p_diloco_swarm_"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
JSON_TYPE = "application/json"


@dataclass(frozen=True, kw_only=True)
class Sight:
    """All that is known at one moment."""

    manifest: RunManifest
    overview: Overview
    history: History
    rejected: Mapping[Fault, int]
    """Records that were refused, by fault, since the monitor started."""
    initial_peers: tuple[str, ...]
    private_targets: bool
    """Whether peers are scraped inside private networks, too."""

    @cached_property
    def metrics(self) -> Response:
        """Returns the text that Prometheus scrapes."""
        collected = _Collected(
            (*swarm_metrics(self), *certificate_metrics(self.overview), *peer_metrics(self.overview))
        )
        return Response(body=generate_latest(collected), content_type=METRICS_TYPE)

    @cached_property
    def targets(self) -> Response:
        """Returns the peers that Prometheus can scrape themselves, as JSON."""
        return json_response([asdict(target) for target in targets_of(self)])

    @cached_property
    def status(self) -> Response:
        """Returns what the page asks for, as JSON."""
        return json_response(asdict(page_of(self.manifest, self.overview, self.history, self.initial_peers)))


def json_response(value: object) -> Response:
    """Returns a response whose body is ``value`` as JSON. ValueError for what a browser's JSON cannot say."""
    body = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    return Response(body=body, content_type=JSON_TYPE)


@dataclass(frozen=True)
class _Collected(Collector):
    metrics: tuple[Metric, ...]

    def collect(self) -> Iterable[Metric]:
        return self.metrics


# -- Prometheus --------------------------------------------------------------------------------------------------------


def swarm_metrics(sight: Sight) -> Iterator[Metric]:
    """Yields the metrics of the swarm as a whole; what nobody reports has no sample."""
    manifest, overview, history = sight.manifest, sight.overview, sight.history
    run = {
        "run_id": manifest.run_id,
        "run_name": manifest.spec.name,
        "n_params": str(manifest.n_params),
        "codec": manifest.spec.outer.codec,
    }
    yield gauge("run_info", "The run that is followed.", (run, 1))
    yield gauge("build_info", "The monitor's version.", ({"version": __version__}, 1))
    yield gauge("model_parameters", "Parameters of the run's model.", ({}, manifest.n_params))
    yield gauge("up", "1 while at least one peer's record is live.", ({}, overview.step is not None))
    yield gauge("outer_step", "Outer step of the swarm's head, the last one seen.", ({}, history.step))
    yield gauge("outer_steps_goal", "Outer steps of the whole run.", ({}, manifest.spec.outer.steps))
    text = "Newest outer step that the run's owner has anchored, as half of the live peers say at least."
    yield gauge("anchored_step", text, ({}, overview.anchored_step or None))
    text = "Peers that have reduced parts wrongly, as half of the live peers say at least."
    yield gauge("peers_found_wrong", text, ({}, overview.found_wrong))
    text = "Peers that are barred from the run, as half of the live peers say at least."
    yield gauge("peers_barred", text, ({}, overview.barred))
    peers = [({"state": state}, overview.peers[state]) for state in STATES]
    yield gauge("peers", "Live peers by state.", *peers)
    yield gauge("tokens_per_second", "Of all trainers together.", ({}, overview.tokens_per_s))
    yield gauge("tokens", "Trained on by the live peers, each since it joined.", ({}, overview.tokens))
    yield gauge("loss_nats", "Training loss per token, mean weighted by tokens per second.", ({}, overview.loss))
    yield gauge("held_out_loss_nats", "Of theta, per token, the newest evaluation.", ({}, overview.held_out_loss))
    held_out_step = None if overview.held_out_loss is None else overview.held_out_step
    yield gauge("held_out_step", "Outer step of the newest evaluation.", ({}, held_out_step))
    yield gauge("heads", "Different heads among the peers at the swarm's outer step.", ({}, overview.heads))
    when = "Unix time at which the outer step last changed, or at which the monitor first saw it."
    yield gauge("last_step_timestamp_seconds", when, ({}, history.step_since_s))
    yield gauge("round_seconds", "Median of the peers' last rounds.", ({}, overview.round_s))
    seats = [({"invitation": row.name, "token": row.token}, row) for row in overview.seats]
    where = "of an invitation, in a run by invitation."
    yield gauge("seat_peers", f"Live peers {where}", *((labels, row.peers) for labels, row in seats))
    yield gauge("seat_places", f"Peers that a round takes {where}", *((labels, row.places) for labels, row in seats))
    expiry = f"Unix time at which it expires, {where}"
    yield gauge("seat_expires_timestamp_seconds", expiry, *((labels, row.expires_s) for labels, row in seats))
    rejected = CounterMetricFamily(
        PREFIX + "records_rejected", "Records that do not hold what they claim.", labels=["reason"]
    )
    for fault in get_args(Fault):
        rejected.add_metric([fault], sight.rejected.get(fault, 0))
    yield rejected


def certificate_metrics(overview: Overview) -> Iterator[Metric]:
    """Yields what the peers on the swarm's head say of its certificate, and of the next one."""
    certificate = overview.certificate
    yield gauge("known_members", "Peers that are known at the swarm's head.", ({}, overview.known_members))
    where = "the certificate of the last outer step."
    signatures = None if certificate is None else certificate.signatures
    yield gauge("certificate_signatures", f"Members that have signed {where}", ({}, signatures))
    certifying = None if certificate is None else certificate.certifying
    yield gauge("certificate_members", f"Members, most of which have to sign {where}", ({}, certifying))
    witnessed = None if certificate is None else certificate.witnessed
    yield gauge("certificate_witnessed", f"1 where the run's owner has signed {where}", ({}, witnessed))
    helped = None if certificate is None else certificate.helped
    text = "1 where the owner's seed has averaged the last outer step."
    yield gauge("certificate_helped", text, ({}, helped))
    text = "Trainers on the swarm's head whose last round did not commit for want of the owner's witness."
    yield gauge("peers_awaiting_witness", text, ({}, overview.awaiting_witness))


def peer_metrics(overview: Overview) -> Iterator[Metric]:
    """Yields the metrics that have one series for each live peer, labelled with its whole id."""
    records = overview.records
    ids = [{"peer": record.peer_id} for record in records]
    yield gauge("peer_info", "A live peer.", *((info_of(record), 1) for record in records))
    for name, text, values in (
        ("peer_outer_step", "Outer step at which it stands.", [r.step for r in records]),
        ("peer_inner_step", "Inner steps since its last outer step.", [r.inner_step for r in records]),
        (
            "peer_inner_steps_planned",
            "Inner steps that it plans.",
            [r.inner_steps_planned for r in records],
        ),
        ("peer_loss_nats", "Training loss per token.", [r.loss for r in records]),
        ("peer_tokens", "Trained on since it joined.", [r.tokens for r in records]),
        ("peer_tokens_per_second", "Its speed.", [r.tokens_per_s for r in records]),
        ("peer_group_size", "Of its last round.", [r.group_size for r in records]),
        ("peer_round_seconds", "That its last round took.", [r.round_s for r in records]),
        ("peer_round_bytes", "Sent and received in its last round.", [r.round_bytes for r in records]),
        (
            "peer_reduce_share",
            "What it was to reduce in its last outer step, by its uplink, over an equal share.",
            [r.share_percent / 100 for r in records],
        ),
        ("peer_known", "1 where it says that it is known at its head.", [float(r.known) for r in records]),
        ("peer_record_age_seconds", "Since it signed its record.", [overview.now_s - r.issued_s for r in records]),
    ):
        yield gauge(name, text, *zip(ids, values))


def info_of(record: Record) -> dict[str, str]:
    """Returns the labels of ``peer_info``."""
    return {
        "peer": record.peer_id,
        "name": label_of(record),
        "role": record.role,
        "version": plain(record.version),
        "state": state_of(record),
        "client_mode": str(record.client_mode).lower(),
        "invitation": invited_as(record),
    }


def label_of(record: Record) -> str:
    """Returns what the peer of a record is called."""
    return label(record.name, record.peer_id)


def gauge(name: str, documentation: str, *samples: tuple[Mapping[str, str], float | None]) -> GaugeMetricFamily:
    """Returns a gauge with these samples, (labels, value) each; those without a value are left out."""
    family = GaugeMetricFamily(PREFIX + name, documentation)
    for labels, value in samples:
        if value is not None:
            family.add_sample(family.name, dict(labels), value)
    return family


@dataclass(frozen=True, kw_only=True)
class Target:
    """A peer to be scraped, as Prometheus's service discovery over HTTP wants it:
    https://prometheus.io/docs/prometheus/latest/http_sd/"""

    targets: tuple[str, ...]
    """One address, HOST:PORT."""
    labels: Mapping[str, str]


def targets_of(sight: Sight) -> list[Target]:
    """Returns the peers that can be scraped, one target each."""
    return [
        Target(targets=(address,), labels={"peer": record.peer_id, "name": label_of(record)})
        for address, record in scrape_targets(sight.overview.records, private=sight.private_targets).items()
    ]
