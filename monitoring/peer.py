"""The dashboard *Peer*: one peer that this Prometheus scrapes."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from monitoring.panels import (
    NATS,
    PEERS,
    RECENT,
    STEPS,
    Panel,
    Query,
    blank,
    choice,
    curve,
    figure,
    finished,
    lines,
    perplexity,
    phases,
)


def peer(name: str, labels: str = "") -> str:
    """Of the chosen peer."""
    return f'p2p_diloco_{name}{{instance="$peer"{labels and f", {labels}"}}}'


def mean(name: str) -> str:
    """Of what the chosen peer's histogram ``name`` counts."""
    total, count = (f"rate({peer(f'{name}_{part}')}{RECENT})" for part in ("sum", "count"))
    return f"{total} / ({count} > 0)"


def peer_dashboard() -> Dashboard:
    board = blank("Peer", "p2p-diloco-peer", "One peer that Prometheus scrapes.")
    # A peer is chosen by its name; what tells its series apart is the address that is scraped.
    regex = r"""/instance="(?<value>[^"]+)".*,name="(?<text>[^"]*)"/"""
    board.with_variable(choice("peer", "Peer", "query_result(p2p_diloco_peer_info)").regex(regex))
    panels = {
        "Is it learning": peer_learning(),
        "Who is here": peer_company(),
        "Are rounds healthy": peer_rounds(),
        "Network": peer_network(),
        "This machine": peer_machine(),
    }
    return finished(board, panels)


def peer_learning() -> list[Panel]:
    progress = f"{peer('outer_step')} + {peer('inner_step')} / ({peer('inner_steps_planned')} > 0)"
    return [
        figure("Outer step", "That this peer stands at.", "none", peer("outer_step")),
        figure("Inner step", "Made since the last outer step.", STEPS, peer("inner_step")),
        figure("Inner steps planned", "Until the next outer step.", STEPS, peer("inner_steps_planned")),
        figure("Tokens per second", "That this peer trains on.", "short", peer("tokens_per_second")),
        figure("Seconds per inner step", "Mean of the last ones.", "s", peer("inner_step_seconds")),
        figure("Tokens", "That this peer has trained on since it joined.", "short", peer("tokens_total")),
        curve(
            "Loss against outer step",
            "Per token: of theta on held-out text, when this peer was the one that evaluated, and in training, where "
            "inner steps are fractions of an outer step.",
            NATS,
            (Query(peer("held_out_step"), "outer step evaluated"), Query(peer("held_out_loss_nats"), "held-out loss")),
            (Query(progress, "outer step"), Query(peer("loss_nats"), "training loss")),
        ),
        perplexity(
            "e to the loss; held-out, when this peer was the one that evaluated.",
            peer("loss_nats"),
            peer("held_out_loss_nats"),
        ),
        lines(
            "Stall",
            "Mean time from the end of the last inner step to the start of the next, after an outer step.",
            "s",
            Query(mean("stall_seconds"), "stall"),
            width=6,
        ),
    ]


def peer_company() -> list[Panel]:
    return [
        lines("Peers seen", "Others of the run whose records are alive.", PEERS, Query(peer("peers_seen"), "peers")),
        lines(
            "Members lost",
            "That failed in rounds of this peer.",
            PEERS,
            Query(f"increase({peer('members_lost_total')}{RECENT})", "lost"),
        ),
        lines(
            "Messages rejected",
            "Streams that ended in an error of the peer beyond.",
            "short",
            Query(f"increase({peer('rejected_messages_total')}{RECENT})", "{{reason}}"),
            stacked=True,
        ),
    ]


def peer_rounds() -> list[Panel]:
    rounds = Query(f"increase({peer('rounds_total')}{RECENT})", "{{result}}")
    return [
        lines(
            "Seconds per phase", "Mean, one on the other.", "s", phases(f"rate({peer('NAME')}{RECENT})"), stacked=True
        ),
        lines("Group size", "Members of the last round.", PEERS, Query(peer("group_size"), "members")),
        lines(
            "Share of the averaging",
            "Over an equal share: nothing where this peer's uplink is far slower than the others'.",
            "percentunit",
            Query(peer("reduce_share"), "of an equal share"),
        ),
        lines("Results", "What became of the attempts at an outer step.", "short", rounds, stacked=True),
        lines(
            "Age of the last commit",
            "Since this peer last committed a round.",
            "s",
            Query(f"time() - {peer('last_commit_timestamp_seconds')}", "age"),
        ),
        lines(
            "Contribution and update",
            "Norms of this peer's outer gradient, and of the group's mean.",
            "none",
            Query(peer("contribution_norm"), "contribution"),
            Query(peer("update_norm"), "update"),
        ),
        lines(
            "Cosine",
            "Between the two: near 0, this peer goes its own way.",
            "none",
            Query(peer("contribution_cosine"), "cosine"),
        ),
        lines(
            "Certificate",
            "Of the last round that committed: members that signed, of those that certify.",
            PEERS,
            Query(peer("certificate_members"), "certify"),
            Query(peer("certificate_signatures"), "signed"),
            Query(peer("known_members"), "known"),
        ),
        lines(
            "Without a certificate",
            "Time since the first round, after the last outer step, that had others in it and no certificate.",
            "s",
            Query(peer("uncertified_seconds"), "so far"),
        ),
        lines(
            "Rounds without a certificate",
            "By what was missing: the signatures of most, or the owner's witness.",
            "short",
            Query(f"increase({peer('uncertified_rounds_total')}{RECENT})", "{{reason}}"),
            stacked=True,
        ),
        lines(
            "Catch-ups",
            "State taken from others, and outer steps given up.",
            "short",
            Query(f"increase({peer('catch_ups_total')}{RECENT})", "catch-ups"),
            Query(f"increase({peer('rolled_back_steps_total')}{RECENT})", "steps rolled back"),
            Query(f"increase({peer('branches_left_total')}{RECENT})", "branches left"),
        ),
        lines(
            "Helped",
            "Outer steps that the owner's seed has led and averaged, for no trainer could be dialled by all.",
            "short",
            Query(f"increase({peer('helped_steps_total')}{RECENT})", "outer steps"),
        ),
        lines(
            "Damage",
            "Digests that differ from the others', and repairs.",
            "short",
            Query(f"increase({peer('digest_mismatches_total')}{RECENT})", "digest mismatches"),
            Query(f"increase({peer('repairs_total')}{RECENT})", "{{what}} repaired"),
            width=24,
        ),
    ]


def peer_network() -> list[Panel]:
    moved = f"rate({peer('bytes_total')}{RECENT})"
    links = peer("connections")
    relayed = f"""sum({peer("connections", 'kind="relay"')}) / (sum({links}) > 0)"""
    reduced = peer("bytes_total", 'purpose="reduce"')
    rounds = peer("rounds_total", 'result="committed"')
    cost = f"sum(rate({reduced}{RECENT})) / (sum(rate({rounds}{RECENT})) > 0)"
    share = f"(1 - 1 / ({peer('group_size')} > 0))"
    return [
        lines("Bytes", "Handed to and taken from p2pd.", "Bps", Query(moved, "{{purpose}}, {{direction}}")),
        lines(
            "Compression ratio",
            "What its rounds had cost at 4 bytes a parameter, to what they did cost.",
            "suffix:to 1",
            Query(f"16 * sum({peer('model_parameters')} * {share}) / ({cost})", "ratio"),
        ),
        lines("Relayed share", "Of open connections.", "percentunit", Query(relayed, "relayed")),
        lines("Connections", "Of p2pd to other peers.", "short", Query(links, "{{kind}}"), width=12, stacked=True),
        lines("DHT", "Peers in the routing table.", PEERS, Query(peer("dht_table_size"), "peers"), width=12),
    ]


def peer_machine() -> list[Panel]:
    def process(name: str) -> str:
        return f'process_{name}{{instance="$peer"}}'

    return [
        lines(
            "Memory",
            "Of both of its processes.",
            "bytes",
            Query(process("resident_memory_bytes"), "network"),
            Query(peer("trainer_resident_memory_bytes"), "trainer"),
            width=6,
        ),
        lines(
            "Processor",
            "Of the network process.",
            "percentunit",
            Query(f"rate({process('cpu_seconds_total')}{RECENT})", "network"),
            width=6,
        ),
        lines("Ledger", "All its files.", "bytes", Query(peer("ledger_bytes"), "ledger"), width=6),
        lines("Open files", "Of the network process.", "short", Query(process("open_fds"), "files"), width=6),
    ]
