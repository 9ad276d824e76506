from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_doctor import manifest_of

from p2p_diloco.errors import UsageError
from p2p_diloco.events import EVENTS_FILE
from p2p_diloco.recount import past_of, recount

MANIFEST = manifest_of()
TOKENS = MANIFEST.spec.tokens_per_inner_step


def round_of(step: int, **changes: Any) -> dict[str, Any]:
    event = {"event": "round", "step": step, "committed": True, "reason": "", "group": ["a", "b"], "dropped": []}
    return event | {"lost": [], "weights": [3 * TOKENS, 2 * TOKENS], "head": f"head-{step}"} | changes


def test_who_made_how_many_inner_steps() -> None:
    """Every peer logs every round; one log tells it all."""
    first = [round_of(1), round_of(2, dropped=["b"])]
    past = recount([first, first, [{"event": "started"}]], MANIFEST, "FOLDER")
    assert past.names == ("a", "b")
    assert past.inner_steps == {0: {"a": 3, "b": 2}, 1: {"a": 3, "b": 2}}
    assert past.dropped == {0: frozenset(), 1: frozenset({"b"})}
    assert past.heads == {1: "head-1", 2: "head-2"}


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ([round_of(1), round_of(2, committed=False, reason="failed")], "a round after outer step 1 failed (failed)"),
        ([round_of(1, lost=["b"])], "a round after outer step 0 lost somebody"),
        ([round_of(2)], "its logs do not tell of every outer step from the first one on"),
    ],
)
def test_a_past_that_cannot_be_done_again(log: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        recount([log], MANIFEST, "FOLDER")
    assert str(refused.value).startswith(f"FOLDER: {message}")


def test_a_folder_without_a_swarm(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no swarm has run here; name the --folder of p2p-diloco swarm"):
        past_of(tmp_path)
    (tmp_path / "peer-1" / "run").mkdir(parents=True)
    (tmp_path / "peer-1" / "run" / EVENTS_FILE).write_text(json.dumps(round_of(1)) + "\n")
    with pytest.raises(UsageError, match="no swarm has run here"):
        past_of(tmp_path)
