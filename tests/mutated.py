"""What ``mutants`` changes: the files that decide and compute, each with the tests that have to notice."""

from __future__ import annotations

TESTS: dict[str, tuple[str, ...]] = {
    "p2p_diloco/rounds.py": ("tests/test_rounds.py",),
    "p2p_diloco/settle.py": ("tests/test_settle.py",),
    "p2p_diloco/butterfly.py": ("tests/test_butterfly.py", "tests/test_settle.py"),
    "p2p_diloco/matchmaking.py": ("tests/test_matchmaking.py",),
    "p2p_diloco/gathering.py": ("tests/test_matchmaking.py",),
    "p2p_diloco/company.py": ("tests/test_matchmaking.py",),
    "p2p_diloco/catchup.py": ("tests/test_catchup.py",),
    "p2p_diloco/download.py": ("tests/test_download.py", "tests/test_catchup.py"),
    "p2p_diloco/ledger.py": ("tests/test_ledger.py",),
    "p2p_diloco/snapshot.py": ("tests/test_snapshot.py", "tests/test_ledger.py"),
    "p2p_diloco/replay.py": ("tests/test_replay.py",),
    "p2p_diloco/outer.py": ("tests/test_outer.py",),
    "p2p_diloco/codec.py": ("tests/test_codec.py",),
    "p2p_diloco/records.py": ("tests/test_records.py",),
    "p2p_diloco/wire.py": ("tests/test_wire.py",),
    "p2p_diloco/inner.py": ("tests/test_inner.py",),
    "p2p_diloco/data.py": ("tests/test_data.py",),
    "p2p_diloco/swarm.py": ("tests/test_swarm.py",),
    "p2p_diloco/process.py": ("tests/test_process.py",),
    "p2p_diloco/train.py": ("tests/test_train.py",),
}
"""File -> its tests, the quickest to notice first."""
