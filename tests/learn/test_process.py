"""The network process, as its trainer holds it: what it says is sorted, and its end is noticed, however it ends."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from p2p_diloco.core.config import PeerConfig, Timeouts
from p2p_diloco.core.errors import NetworkError, UsageError
from p2p_diloco.core.peer_row import PeerRow
from p2p_diloco.learn import process
from p2p_diloco.learn.process import NetworkHandle
from p2p_diloco.learn.shared import anonymous_memory
from p2p_diloco.peer.control import Begin, Begun, Failed, Found, Joined, Leave, Left, LogLine, News, OuterResult, Peers
from tests.support.builders import identity, record_of
from tests.support.scripted import ScriptedNetwork, head_at, joined_at, outcome, scripted_manifest

MANIFEST = scripted_manifest()
STUCK_S = 20.0
"""A test that waits for longer has failed."""
Pair = tuple[ScriptedNetwork, NetworkHandle]


def begun_at(step: int) -> Begun:
    return Begun(step=step, head=head_at(step), evaluate=False)


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Instead of ends of this process."""
    found: list[int] = []
    monkeypatch.setattr("p2p_diloco.learn.process.os._exit", found.append)
    monkeypatch.setattr(process, "POLL_S", 0.01)
    return found


@pytest.fixture
def pair(exits: list[int]) -> Iterator[Pair]:
    network = ScriptedNetwork(MANIFEST)
    handle = NetworkHandle(network.control, network)
    yield network, handle
    handle.close("done")


def test_what_comes_between_is_no_answer(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    network, handle = pair
    row = PeerRow.of(record_of(identity(2), "ab", maddrs=["/ip4/192.0.2.1/tcp/4001"], loss=2.5))
    with caplog.at_level(logging.INFO):
        network.say(LogLine(level=logging.WARNING, name="p2p_diloco.peer.peer", text="100 % of disk"))
        network.say(Peers(rows=(row,), evaluation=(3, 2.5)))
        network.say(News(closes_in_s=None, behind=True))
        network.say(Left())
        network.say(joined_at(7))
        assert handle.wait(Joined, Begun) == joined_at(7)
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        ("p2p_diloco.peer.peer", "100 % of disk")
    ]
    assert handle.rows == (row,)
    assert handle.evaluation == (3, 2.5)
    assert handle.behind


def test_a_result_clears_news_and_no_other_answer_does(pair: Pair) -> None:
    network, handle = pair
    network.say(News(closes_in_s=5.0, behind=True))
    network.say(begun_at(0))
    handle.wait(Begun)
    assert handle.behind
    assert handle.closes_s is not None
    network.say(outcome(1))
    handle.wait(OuterResult)
    assert not handle.behind
    assert handle.closes_s is None


@pytest.mark.parametrize("rest", [b"", b'{"kind": "joi'], ids=["a whole line", "half a line"])
def test_one_that_is_killed_is_an_error_and_its_last_line_counts(pair: Pair, rest: bytes) -> None:
    network, handle = pair
    network.say(joined_at(7))
    network.die(rest)
    assert handle.wait(Joined).step == 7
    with pytest.raises(NetworkError, match="the network process died"):
        handle.wait(Begun)
    handle.say(Begin(planned=1))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_line_that_cannot_be_read_leaves_nobody_waiting(pair: Pair) -> None:
    network, handle = pair
    network.die(b'{"kind": \n')
    with pytest.raises(NetworkError, match="the network process died"):
        handle.wait(Joined)


def test_an_answer_may_be_long_in_coming(pair: Pair) -> None:
    network, handle = pair
    later = threading.Timer(10 * process.POLL_S, network.say, (joined_at(7),))
    later.start()
    assert handle.wait(Joined).step == 7


def test_what_ended_it_can_be_asked_for_and_answers_stay(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "ORPHAN_S", 0.0)
    network, handle = pair
    handle.check()
    network.say(begun_at(3))
    network.die()
    wait_for_the_reader(handle)
    with pytest.raises(NetworkError, match="the network process died"):
        handle.check()
    assert handle.wait(Begun).step == 3


def test_a_process_is_told_how_to_start_and_says_why_it_cannot(exits: list[int], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{}")
    memory = anonymous_memory()
    handle = NetworkHandle.start(PeerConfig(folder=tmp_path / "me"), Timeouts(), "seed", damaged, memory)
    try:
        with pytest.raises(UsageError, match=r"damaged\.json"):
            handle.wait(Found)
    finally:
        handle.close("done")
        os.close(memory)


def test_a_trainer_whose_network_process_died_ends_even_inside_an_inner_step(
    pair: Pair, exits: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(process, "ORPHAN_S", 0.05)
    network, handle = pair
    network.die()
    wait_for_the_reader(handle)
    assert exits == [1]
    assert capsys.readouterr().err == "error: the network process died; this peer ends\n"


def test_what_a_network_process_says_of_its_end_is_told_inside_an_inner_step(
    pair: Pair, exits: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(process, "ORPHAN_S", 0.05)
    network, handle = pair
    network.say(Failed(message="this peer's invitation was revoked", exit_code=2))
    network.die()
    wait_for_the_reader(handle)
    assert exits == [2]
    assert capsys.readouterr().err == "error: this peer's invitation was revoked; this peer ends\n"


@pytest.mark.parametrize("end", [lambda network, handle: None, lambda network, handle: network.die()])
def test_one_that_is_left_or_found_dead_ends_nobody(
    exits: list[int], end: Callable[[ScriptedNetwork, NetworkHandle], None], capsys: pytest.CaptureFixture[str]
) -> None:
    network = ScriptedNetwork(MANIFEST)
    handle = NetworkHandle(network.control, network)
    end(network, handle)
    handle.close("done")
    wait_for_the_reader(handle)
    assert exits == []
    assert capsys.readouterr().err == ""


def test_one_that_does_not_leave_is_killed(
    exits: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process, "LEAVE_S", 0.05)
    network = ScriptedNetwork(MANIFEST, deaf=True)
    handle = NetworkHandle(network.control, network)
    handle.close("done")
    assert network.killed
    assert network.lines(Leave) == [Leave(reason="done")]
    assert "does not leave" in caplog.text
    assert exits == []


def wait_for_the_reader(handle: NetworkHandle) -> None:
    readers = [thread for thread in threading.enumerate() if thread is handle._reader]
    for reader in readers:
        reader.join(STUCK_S)
        assert not reader.is_alive()
