"""The dashboard *Swarm*: mostly what the monitor exports, so it shows everybody. What no record tells (phases, results,
bytes by purpose, memory) comes from those peers of the run that this Prometheus scrapes; such panels say so.
"""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import AnnotationQuery
from grafana_foundation_sdk.models.dashboard import Dashboard

from monitoring.panels import (
    NATS,
    PEERS,
    RECENT,
    Column,
    Panel,
    Query,
    blank,
    choice,
    curve,
    event,
    figure,
    finished,
    lines,
    perplexity,
    phases,
    rows,
)

SCRAPED = "Of those peers of the run that Prometheus scrapes."


def swarm(name: str, labels: str = "") -> str:
    """Of the monitor that follows the chosen run."""
    return f'p2p_diloco_swarm_{name}{{instance="$monitor"{labels and f", {labels}"}}}'


def of_run(expr: str) -> str:
    """``expr``, of the scraped peers that are in the chosen run."""
    return f'{expr} * on (job, instance) group_left () p2p_diloco_run_info{{run_name="$run"}}'


def with_name(expr: str) -> str:
    """``expr``, of the scraped peers that are in the chosen run, each with its name."""
    return f"{of_run(expr)} * on (job, instance) group_left (name) p2p_diloco_peer_info"


def named(name: str) -> str:
    """The monitor's series of each peer, with the peer's name."""
    return f"{swarm(name)} * on (peer) group_left (name) max by (peer, name) ({swarm('peer_info')})"


def swarm_dashboard() -> Dashboard:
    board = blank("Swarm", "p2p-diloco-swarm", "A whole run, as its monitor sees it.")
    board.with_variable(choice("run", "Run", "label_values(p2p_diloco_swarm_run_info, run_name)"))
    monitors = 'label_values(p2p_diloco_swarm_run_info{run_name="$run"}, instance)'
    board.with_variable(choice("monitor", "Monitor", monitors))
    for annotation in comings_and_goings():
        board.annotation(annotation)
    panels = {
        "Is it learning": swarm_learning(),
        "Who is here": swarm_members(),
        "Are rounds healthy": swarm_rounds(),
        "Network": swarm_network(),
        "These machines": swarm_machines(),
    }
    return finished(board, panels)


def swarm_learning() -> list[Panel]:
    step, held_out, training = swarm("outer_step"), swarm("held_out_loss_nats"), swarm("loss_nats")
    age = f"time() - {swarm('last_step_timestamp_seconds')}"
    trainers = swarm("peers", 'state!="seed"')
    return [
        figure("Outer step", "Of the swarm's head.", "none", step),
        figure("Done", "Of all outer steps of the run.", "percentunit", f"{step} / {swarm('outer_steps_goal')}"),
        figure("Held-out loss", "Of theta, per token, the newest evaluation.", NATS, held_out),
        figure("Tokens per second", "Of all trainers together.", "short", swarm("tokens_per_second")),
        figure("Trainers", "Live peers that train, or are about to.", PEERS, f"sum({trainers})"),
        figure("Age of the last commit", "Since the outer step last changed.", "s", age),
        curve(
            "Loss against outer step",
            "Per token: of theta on held-out text, and of the trainers, their mean weighted by their speed.",
            NATS,
            (Query(swarm("held_out_step"), "outer step evaluated"), Query(held_out, "held-out loss")),
            (Query(step, "outer step"), Query(training, "training loss")),
        ),
        perplexity("e to the loss.", training, held_out),
        lines(
            "Tokens",
            "Trained on by the live peers, each since it joined: it falls when one leaves.",
            "short",
            Query(swarm("tokens"), "tokens"),
            width=6,
        ),
    ]


def swarm_members() -> list[Panel]:
    return [
        rows(
            "Peers",
            "Everybody whose record is live. All of it, the name too, is what they say of themselves.",
            "peer",
            ("name", "state", "role", "version"),
            swarm("peer_info"),
            [
                Column("Outer step", swarm("peer_outer_step"), "none"),
                Column("Training loss", swarm("peer_loss_nats"), NATS),
                Column("Tokens per second", swarm("peer_tokens_per_second"), "short"),
                Column("Contributed tokens", swarm("peer_tokens"), "short"),
                Column("Age of its record", swarm("peer_record_age_seconds"), "s"),
            ],
        ),
        lines("Peers by state", "Live peers.", PEERS, Query(swarm("peers"), "{{state}}"), width=12, stacked=True),
        lines(
            "Tokens per second by peer",
            "As their records say.",
            "short",
            Query(named("peer_tokens_per_second"), "{{name}}"),
            width=12,
            stacked=True,
        ),
    ]


def swarm_rounds() -> list[Panel]:
    groups = f"{swarm('peer_group_size')} > 0"
    uncertified = f"sum by (reason) ({of_run(f'increase(p2p_diloco_uncertified_rounds_total{RECENT})')})"
    results = f"sum by (result) ({of_run(f'increase(p2p_diloco_rounds_total{RECENT})')})"
    return [
        lines(
            "Seconds per phase",
            f"Mean of the phases of a round, one on the other. {SCRAPED}",
            "s",
            phases(of_run(f"rate(p2p_diloco_NAME{RECENT})")),
            stacked=True,
        ),
        lines(
            "Group size",
            "Members of the peers' last rounds.",
            PEERS,
            Query(f"max({groups})", "largest"),
            Query(f"min({groups})", "smallest"),
        ),
        lines(
            "Results", f"What became of their rounds. {SCRAPED}", "short", Query(results, "{{result}}"), stacked=True
        ),
        lines(
            "Age of the last commit, over time",
            "A saw that rises above its usual teeth: outer steps have stopped.",
            "s",
            Query(f"time() - {swarm('last_step_timestamp_seconds')}", "age"),
        ),
        lines("Seconds per round", "Median of the peers' last ones.", "s", Query(swarm("round_seconds"), "median")),
        lines(
            "Different heads",
            "Among the peers at the swarm's outer step: more than one is a fault.",
            "suffix:heads",
            Query(swarm("heads"), "heads"),
        ),
        lines(
            "Certificate of the last outer step",
            "Members that signed it, of those that certify: most have to.",
            PEERS,
            Query(swarm("certificate_members"), "certify"),
            Query(swarm("certificate_signatures"), "signed"),
        ),
        lines(
            "Known members, and the owner's seed",
            "Where fewer than two are known, the owner has to witness outer steps: trainers that wait for that. And "
            "whether its seed averages.",
            PEERS,
            Query(swarm("known_members"), "known"),
            Query(swarm("peers_awaiting_witness"), "wait for the owner"),
            Query(swarm("certificate_helped"), "the seed averages"),
        ),
        lines(
            "Rounds without a certificate",
            f"By what was missing: the signatures of most, or the owner's witness. {SCRAPED}",
            "short",
            Query(uncertified, "{{reason}}"),
            stacked=True,
        ),
    ]


def swarm_network() -> list[Panel]:
    moved = f"sum by (direction, purpose) ({of_run(f'rate(p2p_diloco_bytes_total{RECENT})')})"
    links = "p2p_diloco_connections"
    relayed = f"""sum({of_run(f'{links}{{kind="relay"}}')}) / (sum({of_run(links)}) > 0)"""
    # In a butterfly all-reduce of g members, each sends and receives 4 (g - 1) / g values for every parameter.
    groups = f"({swarm('peer_group_size')} > 0)"
    whole = f"16 * scalar({swarm('model_parameters')}) * sum(1 - 1 / {groups})"
    refused = f"increase({swarm('records_rejected_total')}{RECENT})"
    return [
        lines(
            "Bytes by purpose and direction",
            f"Handed to and taken from p2pd. {SCRAPED}",
            "Bps",
            Query(moved, "{{purpose}}, {{direction}}"),
        ),
        lines(
            "Bytes per round",
            "Sent and received by each peer in its last round.",
            "bytes",
            Query(named("peer_round_bytes"), "{{name}}"),
        ),
        lines(
            "Compression ratio",
            "What the last rounds had cost at 4 bytes a parameter, to what they did cost.",
            "suffix:to 1",
            Query(f"{whole} / sum({swarm('peer_round_bytes')})", "ratio"),
        ),
        lines("Relayed share", f"Of open connections. {SCRAPED}", "percentunit", Query(relayed, "relayed"), width=12),
        lines(
            "Records refused",
            "By the monitor, since they did not hold what they claim.",
            "short",
            Query(refused, "{{reason}}"),
            width=12,
        ),
    ]


def swarm_machines() -> list[Panel]:
    memory, processor = "process_resident_memory_bytes", f"rate(process_cpu_seconds_total{RECENT})"
    return [
        lines("Memory", f"Of the network process. {SCRAPED}", "bytes", Query(with_name(memory), "{{name}}")),
        lines(
            "Processor", f"Of the network process. {SCRAPED}", "percentunit", Query(with_name(processor), "{{name}}")
        ),
        lines("Ledger", f"On the disk. {SCRAPED}", "bytes", Query(with_name("p2p_diloco_ledger_bytes"), "{{name}}")),
    ]


def comings_and_goings() -> list[AnnotationQuery]:
    """When Prometheus could not reach the monitor, nobody has come or gone."""
    now = f"max by (peer, name) ({swarm('peer_info')})"
    before = f"max by (peer, name) ({swarm('peer_info')} offset 1m)"
    joined = f"({now} unless {before}) and on () ({swarm('up')} offset 1m)"
    left = f"({before} unless {now}) and on () {swarm('up')}"
    return [event("Joins", "green", joined, "{{name}} is here"), event("Leaves", "orange", left, "{{name}} is gone")]
