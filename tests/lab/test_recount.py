from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.event import Event, OuterGradientOffered, pack_event
from p2p_diloco.core.events import EVENTS_FILE
from p2p_diloco.lab.recount import past_of, recount
from tests.look.test_network_findings import manifest_of
from tests.support.events import COMMITTED, STARTED

MANIFEST = manifest_of()
TOKENS = MANIFEST.spec.tokens_per_inner_step


def round_of(
    step: int,
    *,
    committed: bool = True,
    reason: str = "",
    group: tuple[str, ...] = ("a", "b"),
    dropped: tuple[str, ...] = (),
    lost: tuple[str, ...] = (),
) -> Event:
    return replace(
        COMMITTED,
        step=step,
        head=f"head-{step}",
        committed=committed,
        reason=reason,
        group=group,
        dropped=dropped,
        lost=lost,
    )


def offered(step: int, inner_steps: int) -> Event:
    """``inner_steps``: since theta was taken."""
    return OuterGradientOffered(step=step, tokens=inner_steps * TOKENS)


def log_of(peer_id: str, *events: Event) -> list[Event]:
    return [replace(STARTED, peer_id=peer_id), *events]


def test_who_made_how_many_inner_steps() -> None:
    a = log_of("a", offered(0, 3), round_of(1), offered(1, 4), round_of(2, dropped=("b",)))
    b = log_of("b", offered(0, 2), round_of(1), offered(1, 4), round_of(2, dropped=("b",)))
    seed = log_of("seed")
    past = recount([a, b, seed], MANIFEST, "FOLDER")
    assert past.names == ("a", "b")
    assert past.inner_steps == {0: {"a": (3,), "b": (2,)}, 1: {"a": (4,), "b": (4,)}}
    assert past.dropped == {0: frozenset(), 1: frozenset({"b"})}
    assert past.heads == {1: "head-1", 2: "head-2"}


def test_what_was_offered_after_the_last_outer_step_is_not_done_again() -> None:
    a = log_of("a", offered(0, 3), round_of(1), offered(1, 2))
    b = log_of("b", offered(0, 3), round_of(1))
    assert recount([a, b], MANIFEST, "FOLDER").inner_steps.keys() == {0}


def test_who_was_alone_offers_again_and_trains_on_in_between() -> None:
    alone = round_of(0, committed=False, reason="alone", group=())
    a = log_of("a", offered(0, 3), alone, offered(0, 5), alone, offered(0, 9), round_of(1), offered(1, 3), round_of(2))
    b = log_of("b", offered(0, 2), round_of(1), offered(1, 3), round_of(2))
    past = recount([a, b], MANIFEST, "FOLDER")
    assert past.inner_steps == {0: {"a": (3, 2, 4), "b": (2,)}, 1: {"a": (3,), "b": (3,)}}


@pytest.mark.parametrize(("on_missed", "expected"), [("keep", (3,)), ("adopt", (6,))])
def test_what_is_kept_is_offered_again_with_what_was_learned_since(on_missed: str, expected: tuple[int, ...]) -> None:
    """Three inner steps, dropped, and three more: six are offered. With ``adopt`` these were six new ones."""
    spec = MANIFEST.spec.model_copy(update={"round": MANIFEST.spec.round.model_copy(update={"on_missed": on_missed})})
    manifest = MANIFEST.model_copy(update={"spec": spec})
    a = log_of("a", offered(0, 3), round_of(1, dropped=("a",)), offered(1, 6), round_of(2))
    b = log_of("b", offered(0, 3), round_of(1, dropped=("a",)), offered(1, 3), round_of(2))
    assert recount([a, b], manifest, "FOLDER").inner_steps[1] == {"a": expected, "b": (3,)}


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (
            [offered(0, 3), round_of(1), round_of(1, committed=False, reason="failed")],
            "the round at outer step 1 failed",
        ),
        ([offered(0, 3), round_of(0, committed=False, reason="alone")], "its swarm has made no outer step"),
        ([offered(0, 3), round_of(1, lost=("b",))], "the round at outer step 1 lost somebody"),
        ([offered(1, 3), round_of(2)], "its logs do not tell of every outer step from the first one on"),
        ([replace(STARTED, peer_id="a"), round_of(1)], "peer a was restarted"),
        ([round_of(1, group=("a", "b", "guest"))], "not everybody who has a log here, or only they, made outer step 1"),
    ],
)
def test_a_past_that_cannot_be_done_again(log: list[Event], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        recount([log_of("a", *log)], MANIFEST, "FOLDER")
    assert str(refused.value).startswith(f"FOLDER: {message}")


def test_a_folder_without_a_swarm(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no swarm has run here; name the --folder of p2p-diloco swarm"):
        past_of(tmp_path)
    (tmp_path / "peer-1" / "run").mkdir(parents=True)
    (tmp_path / "peer-1" / "run" / EVENTS_FILE).write_bytes(pack_event(round_of(1)))
    with pytest.raises(UsageError, match="no swarm has run here"):
        past_of(tmp_path)


def test_a_seed_that_was_restarted_changes_nothing() -> None:
    a, b = (log_of(name, offered(0, 3), round_of(1)) for name in "ab")
    seed = [*log_of("seed"), *log_of("seed")]
    assert recount([a, b, seed], MANIFEST, "FOLDER") == recount([a, b], MANIFEST, "FOLDER")
