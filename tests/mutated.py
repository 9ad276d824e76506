"""What ``mutants`` changes: the files that decide and compute, each with the tests that have to notice."""

from __future__ import annotations

SETTLE = (
    "tests/round/test_settle_decide.py",
    "tests/round/test_settle_member.py",
    "tests/round/test_settle_leader.py",
    "tests/round/test_settle.py",
    "--deselect=tests/round/test_settle.py::test_two_of_five_fail",
)
"""Without what takes as long as all others together."""
CATCHUP = ("tests/peer/test_catchup.py",)

TESTS: dict[str, tuple[str, ...]] = {
    "p2p_diloco/core/roster.py": ("tests/core/test_roster.py",),
    "p2p_diloco/core/swarm_head.py": ("tests/core/test_swarm_head.py",),
    "p2p_diloco/core/pace.py": ("tests/core/test_pace.py",),
    "p2p_diloco/core/directory.py": ("tests/core/test_directory.py",),
    "p2p_diloco/round/settle.py": SETTLE,
    "p2p_diloco/round/settle_decide.py": SETTLE,
    "p2p_diloco/round/settle_completion.py": SETTLE,
    "p2p_diloco/round/settle_pledge.py": SETTLE,
    "p2p_diloco/round/settle_member.py": SETTLE,
    "p2p_diloco/round/settle_member_answers.py": SETTLE,
    "p2p_diloco/round/settle_hearing.py": SETTLE,
    "p2p_diloco/round/settle_leader.py": SETTLE,
    "p2p_diloco/round/settle_leader_answers.py": SETTLE,
    "p2p_diloco/round/butterfly.py": ("tests/round/test_butterfly.py", *SETTLE),
    "p2p_diloco/round/matchmaking.py": ("tests/round/test_matchmaking.py",),
    "p2p_diloco/round/gathering.py": ("tests/round/test_matchmaking.py",),
    "p2p_diloco/round/company.py": ("tests/round/test_matchmaking.py",),
    "p2p_diloco/peer/catchup.py": CATCHUP,
    "p2p_diloco/peer/donors.py": ("tests/peer/test_donors.py", "tests/peer/test_snapshots.py", *CATCHUP),
    "p2p_diloco/peer/snapshots.py": ("tests/peer/test_snapshots.py", *CATCHUP),
    "p2p_diloco/peer/download.py": ("tests/peer/test_download.py", *CATCHUP),
    "p2p_diloco/ledger/files.py": ("tests/ledger/test_ledger.py",),
    "p2p_diloco/ledger/ledger.py": ("tests/ledger/test_ledger.py",),
    "p2p_diloco/ledger/disk.py": ("tests/ledger/test_disk.py", "tests/ledger/test_ledger.py"),
    "p2p_diloco/ledger/snapshot.py": ("tests/ledger/test_snapshot.py", "tests/ledger/test_ledger.py"),
    "p2p_diloco/ledger/replay.py": ("tests/ledger/test_ledger.py", "tests/ledger/test_replay.py"),
    "p2p_diloco/core/interruption.py": ("tests/core/test_interruption.py",),
    "p2p_diloco/core/outer.py": ("tests/core/test_outer.py",),
    "p2p_diloco/core/update.py": ("tests/core/test_update.py", "tests/core/test_outer.py"),
    "p2p_diloco/core/aggregate.py": ("tests/core/test_aggregate.py",),
    "p2p_diloco/core/agreement.py": ("tests/core/test_agreement.py", "tests/core/test_aggregate.py"),
    "p2p_diloco/core/norms.py": ("tests/core/test_norms.py",),
    "p2p_diloco/core/codec.py": ("tests/core/test_codecs.py",),
    "p2p_diloco/core/floats.py": ("tests/core/test_codecs.py",),
    "p2p_diloco/core/blocks.py": ("tests/core/test_codecs.py",),
    "p2p_diloco/core/grid.py": ("tests/core/test_grid.py", "tests/core/test_update.py"),
    "p2p_diloco/core/records.py": ("tests/core/test_records.py",),
    "p2p_diloco/wire/channel.py": ("tests/wire/test_channel.py", "tests/wire/test_traffic.py"),
    "p2p_diloco/learn/inner.py": ("tests/learn/test_inner.py",),
    "p2p_diloco/learn/data.py": ("tests/learn/test_data.py",),
    "p2p_diloco/learn/parameters.py": ("tests/learn/test_parameters.py",),
    "p2p_diloco/learn/speed.py": ("tests/learn/test_speed.py", "tests/learn/test_swarm.py"),
    "p2p_diloco/learn/swarm.py": ("tests/learn/test_swarm.py",),
    "p2p_diloco/learn/process.py": ("tests/learn/test_process.py",),
    "p2p_diloco/learn/train.py": ("tests/learn/test_train.py",),
}
"""File -> what pytest is asked about it, the quickest tests first."""
