from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from p2p_diloco.core.errors import LedgerError
from p2p_diloco.core.records import Phase
from p2p_diloco.core.swarm_head import Standing
from p2p_diloco.core.waiting import Bell
from p2p_diloco.peer.control import Begun, Evaluated, FromNetwork, FromTrainer, InnerStep, unpack_line
from p2p_diloco.peer.network import NetworkProcess, keep_manifest
from p2p_diloco.peer.presence import Trained
from p2p_diloco.peer.trainer import Trainer

NOTHING: Any = None


def test_a_manifest_that_is_there_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed's is the only one that the run has."""
    path = tmp_path / "run" / "manifest.json"
    keep_manifest(path, b"signed")
    written = path.stat()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    keep_manifest(path, b"signed")
    assert (path.read_bytes(), path.stat().st_ino, path.stat().st_mtime_ns) == (
        *(b"signed", written.st_ino, written.st_mtime_ns),
    )
    with pytest.raises(LedgerError, match=r"manifest\.json: disk full, free 1 MB or move the folder"):
        keep_manifest(path, b"signed anew")
    assert [file.name for file in path.parent.iterdir()] == ["manifest.json"]
    assert path.read_bytes() == b"signed"


@pytest.mark.parametrize("evaluates", [True, False])
def test_the_log_says_who_evaluates_theta_before_the_first_outer_step(evaluates: bool) -> None:
    """So does a fault of ``swarm --faults`` that waits for this phase, and the record."""
    told: list[FromNetwork | FromTrainer] = []
    seat = SimpleNamespace(phase="joining", standing=Standing(step=0, head=b"\x0b", heads=()), progress=None)
    entered: list[Phase] = []

    def enter(phase: Phase) -> None:
        seat.phase = phase
        entered.append(phase)

    async def begin() -> None:
        enter("inner")

    async def main() -> None:
        writer: Any = SimpleNamespace(write=lambda data: told.append(unpack_line(data)))
        trainer = Trainer(NOTHING, writer)
        peer: Any = SimpleNamespace(
            seat=seat,
            step=0,
            begin=begin,
            evaluates_genesis=lambda: evaluates,
            presence=SimpleNamespace(enter=enter, trained=Trained(), publish_now=Bell()),
            events=SimpleNamespace(write=lambda _: None),
        )
        await NetworkProcess(trainer, -1)._begin(peer)
        assert told == [Begun(step=0, head="0b", evaluate=evaluates)]
        assert seat.phase == ("evaluate" if evaluates else "inner")
        trainer.on_evaluated(peer, Evaluated(step=0, held_out_loss=2.5, tokens=640, seconds=1.5))
        trainer.on_inner_step(
            peer, InnerStep(inner_step=1, planned=3, step_s=0.1, loss=None, tokens=8, tokens_per_s=80.0)
        )

    asyncio.run(main())
    assert entered == (["inner", "evaluate", "inner"] if evaluates else ["inner"])


def test_a_trainer_need_not_evaluate_when_it_is_its_turn() -> None:
    entered: list[Phase] = []
    peer: Any = SimpleNamespace(
        seat=SimpleNamespace(phase="evaluate", progress=None),
        step=0,
        presence=SimpleNamespace(enter=entered.append, trained=Trained()),
        events=SimpleNamespace(write=lambda _: None),
    )
    line = InnerStep(inner_step=1, planned=3, step_s=0.1, loss=None, tokens=8, tokens_per_s=80.0)

    async def main() -> None:
        Trainer(NOTHING, NOTHING).on_inner_step(peer, line)

    asyncio.run(main())
    assert entered == ["inner"]
