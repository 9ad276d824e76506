"""Whole swarms of real processes on this machine, started with the command that a user types."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator

import pytest

from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.runfile import RunSpec
from p2p_diloco.lab.local import run_local
from p2p_diloco.learn.data import open_corpus
from p2p_diloco.learn.model import evaluate
from p2p_diloco.learn.sample import load_export
from p2p_diloco.ledger.folder import find_run, load_state
from tests.swarm.places import START_S, Place, wait_until

MakePlace = Callable[..., Place]


@pytest.fixture
def make_place() -> Iterator[MakePlace]:
    """Of short outer steps, to which everybody comes."""
    made: list[Place] = []

    def make(*, outer_steps: int = 10_000, min_group: int = 2, membership: str = "open") -> Place:
        made.append(
            Place(
                outer_steps=outer_steps,
                inner_steps=10,
                min_group=min_group,
                gather_s=20.0,
                snapshot_every=2,
                membership=membership,
            )
        )
        return made[-1]

    yield make
    for place in made:
        place.clear()


def test_three_peers_end_with_one_model(make_place: MakePlace) -> None:
    place = make_place(outer_steps=3, min_group=3)
    swarm = place.swarm(peers="3")
    assert swarm.process.wait(2 * START_S) == 0, swarm.text
    place.assert_nothing_left()

    names = ["peer-1", "peer-2", "peer-3"]
    summary = place.summary
    assert summary["exit_codes"] == dict.fromkeys(["seed", *names], 0)
    assert (summary["run_name"], summary["outer_steps"], summary["identical"]) == ("test", 3, True)
    assert len(set(summary["peers"].values())) == 3
    assert [list(summary["heads"][name]) for name in names] == 3 * [["0", "1", "2", "3"]]
    assert summary["group"] == {"1": 3, "2": 3, "3": 3}
    assert summary["guests"] == {}
    assert summary["faults"] == []
    assert [step for step, _ in summary["held_out"]] == [0, 1, 2, 3]
    first, last = summary["held_out"][0][1], summary["held_out"][-1][1]
    assert last < first - 0.5
    assert summary["tokens_per_s"]["total"] == pytest.approx(sum(summary["tokens_per_s"]["peers"].values()))
    for name in names:
        assert set(summary["stalled_s"]["peers"][name]) >= {"1", "2", "3"}
        assert all(summary[way][name][step] > 0 for way in ("bytes_sent", "bytes_received") for step in "123")

    states = [load_state(find_run(place.root / name)) for name in ["seed", *names]]
    assert {manifest.run_id for manifest, _ in states} == {summary["run_id"]}
    assert {(state.step, state.head.hex()) for _, state in states} == {(3, summary["heads"]["peer-1"]["3"])}
    assert len({state.theta.tobytes() for _, state in states}) == 1

    model, _, info = load_export(place.root / "export")
    assert (info.step, info.run_id) == (3, summary["run_id"])
    spec = RunSpec.load(place.run_file)
    corpus = open_corpus(spec.data, base=place.root, cache=place.root / "cache" / "p2p-diloco")
    batches = corpus.held_out_batches(batch_size=4, seq_len=spec.data.seq_len, max_tokens=spec.data.eval_tokens)
    assert evaluate(model, batches) == pytest.approx(last, abs=1e-4)

    text = swarm.text
    for line in corpus.report.lines:
        assert f"text: {line}" in text
        assert all(f"text: {line}" in (place.root / name / "output.log").read_text() for name in ("seed", *names))
    assert "to join from another terminal: p2p-diloco peer --initial-peers /ip4/127.0.0.1/tcp/" in text
    for step in (1, 2, 3):
        assert f"outer step {step} of 3: held-out loss {summary['held_out'][step][1]:.4f}, group of 3, " in text
    assert f"{first:.4f} -> {last:.4f} nats per token" in text
    assert str(place.root / "export") in text
    for said in (
        "held-out text, which no peer has trained on:",
        "how the model goes on:",
        "What to expect: a model of",
    ):
        assert said in text
    assert "Traceback" not in text


def test_stopped_while_training_and_its_folder_is_for_no_other_run(make_place: MakePlace) -> None:
    """By invitation: its own peers have one each, a guest trains until it is revoked, and a stranger is told to ask."""
    place = make_place(membership="invite")
    swarm = place.swarm(peers="2")
    wait_until(lambda: "outer step 2 of 10000" in swarm.text, swarm)
    guests = place.root / "guests.invitation"
    stranger = place.peer("stranger", swarm.address)
    guest = place.peer("guest", swarm.address, invite=str(guests))
    assert stranger.process.wait(START_S) == 2, stranger.text
    assert "error: run test is by invitation: ask its owner, 12D3KooW" in stranger.text
    wait_until(lambda: place.step_of("guest") >= 1, guest, swarm)
    revoke = place.start("revoke", "revoke", str(place.root / "seed"), "guests")
    assert revoke.process.wait(START_S) == 0, revoke.text
    assert guest.process.wait(START_S) == 2, guest.text
    assert "error: this peer's invitation has expired, or was revoked; ask the run's owner" in guest.text
    step = max(map(place.step_of, ("peer-1", "peer-2")))
    wait_until(lambda: place.step_of("peer-1") > step, swarm)
    texts = [path.read_text(errors="replace") for path in place.root.rglob("*") if path.suffix in (".out", ".log")]
    assert not any(word in text for word in guests.read_text().split() for text in texts)
    assert swarm.interrupt() == 0, swarm.text
    place.assert_nothing_left()
    assert place.summary["exit_codes"] == {"seed": 0, "peer-1": 0, "peer-2": 0}
    assert place.summary["identical"]
    assert not (place.root / "export").exists()
    assert "Traceback" not in swarm.text
    changed = place.run_file.with_name("changed.toml")
    changed.write_text(place.run_file.read_text().replace("lr = 3e-3", "lr = 2e-3"))
    with pytest.raises(UsageError, match="holds another run"):
        run_local(changed, peers=2, folder=place.root)


def test_stopped_while_starting(make_place: MakePlace) -> None:
    place = make_place()
    swarm = place.swarm(peers="2")
    wait_until(lambda: place.main_process_of("peer-1"), swarm)
    assert swarm.interrupt() == 0, swarm.text
    assert "Traceback" not in swarm.text
    place.assert_nothing_left()


@pytest.mark.skipif(sys.platform != "linux", reason="children learn of their parent's death on Linux only")
def test_killed_with_its_children(make_place: MakePlace) -> None:
    place = make_place()
    swarm = place.swarm(peers="2")
    wait_until(lambda: place.main_process_of("peer-2"), swarm)
    swarm.process.kill()
    swarm.process.wait()
    wait_until(lambda: place.alive() == {}, swarm, limit_s=5.0)
    place.assert_nothing_left()


def test_seed_that_cannot_start_is_told(make_place: MakePlace) -> None:
    place = make_place()
    shutil.rmtree(place.root / "text")
    swarm = place.swarm(peers="2")
    assert swarm.process.wait(START_S) == 1
    assert swarm.text.splitlines()[-1].startswith("error: the seed ended while starting: ")
    assert str(place.root / "text") in swarm.text
    place.assert_nothing_left()
