"""What ``mutants`` changes: the files that decide and compute, each with the tests that have to notice."""

from __future__ import annotations

SETTLE = ("tests/test_settle.py", "--deselect=tests/test_settle.py::test_two_of_five_fail")
"""Without what takes as long as all others together."""

TESTS: dict[str, tuple[str, ...]] = {
    "p2p_diloco/rounds.py": ("tests/test_rounds.py",),
    "p2p_diloco/settle.py": SETTLE,
    "p2p_diloco/butterfly.py": ("tests/test_butterfly.py", *SETTLE),
    "p2p_diloco/matchmaking.py": ("tests/test_matchmaking.py",),
    "p2p_diloco/gathering.py": ("tests/test_matchmaking.py",),
    "p2p_diloco/company.py": ("tests/test_matchmaking.py",),
    "p2p_diloco/catchup.py": ("tests/test_catchup.py",),
    "p2p_diloco/download.py": ("tests/test_download.py", "tests/test_catchup.py"),
    "p2p_diloco/ledger.py": ("tests/test_ledger.py",),
    "p2p_diloco/snapshot.py": ("tests/test_snapshot.py", "tests/test_ledger.py"),
    "p2p_diloco/replay.py": ("tests/test_ledger.py", "tests/test_replay.py"),
    "p2p_diloco/outer.py": ("tests/test_outer.py",),
    "p2p_diloco/codec.py": ("tests/test_codec.py",),
    "p2p_diloco/records.py": ("tests/test_records.py",),
    "p2p_diloco/wire.py": ("tests/test_wire.py", "tests/test_traffic.py"),
    "p2p_diloco/inner.py": ("tests/test_inner.py",),
    "p2p_diloco/data.py": ("tests/test_data.py",),
    "p2p_diloco/swarm.py": ("tests/test_swarm.py",),
    "p2p_diloco/process.py": ("tests/test_process.py",),
    "p2p_diloco/train.py": ("tests/test_train.py",),
}
"""File -> what pytest is asked about it, the quickest tests first."""
