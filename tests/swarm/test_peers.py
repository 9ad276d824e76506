"""One seed and some peers as real processes, each started with the command that a user types; then things happen."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2p_diloco.core.event import DamageRepaired, PeerCaughtUp, PeerJoined, PeerLeft, PeerStarted, RoundEnded
from p2p_diloco.ledger.folder import find_run, load_state
from tests.swarm.places import LEAVE_S, START_S, Place, Program, as_flags, wait_until

EVERY = 4
"""Outer steps between two snapshots, where they matter."""


def test_bits_that_flip_in_memory_and_on_the_disk_of_a_running_peer() -> None:
    """In the memory that its trainer and network process share, in an update's file, and in a snapshot's."""
    place = Place(snapshot_every=EVERY)
    try:
        flip_and_repair(place)
    finally:
        place.clear()


def flip_and_repair(place: Place) -> None:
    names = ["a", "b"]
    seed = place.seed()
    programs = [seed, *(place.peer(name, seed.address) for name in names)]
    wait_until(lambda: all(place.step_of(name) >= 1 for name in names), *programs)
    ledger = next((place.root / "a").glob("*/ledger"))

    def between_snapshots() -> bool:
        return place.step_of("a") % EVERY == 1

    def repaired(what: str) -> list[DamageRepaired]:
        return [event for event in place.events("a", DamageRepaired) if event.what == what]

    descriptors = Path(f"/proc/{programs[1].of_mine('p2p_diloco.peer.network')}/fd").iterdir()
    memory = next(path for path in descriptors if os.readlink(path).startswith("/memfd:p2p-diloco"))
    flip(memory, 4 * 7 + 2)  # no last bit, which the rounding of the next outer step might mend
    wait_until(lambda: repaired("state"), *programs)

    wait_until(between_snapshots, *programs)
    update = max((ledger / "updates").glob("*.update"))
    flip(update, update.stat().st_size - 1)
    wait_until(lambda: repaired("update"), *programs)
    assert repaired("update")[0].how == "fetched"

    wait_until(between_snapshots, *programs)
    snapshot = max((ledger / "snapshots").glob("*.safetensors"))
    flip(snapshot, snapshot.stat().st_size - 1)
    wait_until(lambda: repaired("snapshot"), *programs)
    assert repaired("snapshot")[0].how == "replayed"

    assert len(place.events("a", DamageRepaired)) == 3
    assert place.events("b", DamageRepaired) == place.events("seed", DamageRepaired) == []
    aside = sorted(path.name for path in (ledger / "quarantine").iterdir())
    assert aside == sorted([f"{update.name}.0", f"{snapshot.name}.0"])
    step = max(map(place.step_of, names))
    wait_until(lambda: min(map(place.step_of, names)) > step, *programs)
    for program in reversed(programs):
        assert program.interrupt() == 0, program.text
    place.check_heads(*names)
    step = min(load_state(find_run(place.root / name))[1].step for name in names)
    states = [load_state(find_run(place.root / name), step)[1] for name in names]
    assert states[0].digest() == states[1].digest()


def flip(path: Path, at: int) -> None:
    """One bit, in place."""
    with path.open("r+b", buffering=0) as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


# -- a swarm that runs through all that follows ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    place = Place()
    yield place
    place.clear()


@pytest.fixture(scope="module")
def running(place: Place) -> Iterator[dict[str, Program]]:
    """A seed and two peers that train until the module's tests are over; then nothing may be left of them."""
    seed = place.seed()
    programs = {"seed": seed, "a": place.peer("a", seed.address), "b": place.peer("b", seed.address)}
    wait_until(lambda: place.step_of("a") >= 1, *programs.values())
    yield programs
    for program in programs.values():
        program.process.send_signal(signal.SIGINT)
    for program in programs.values():
        assert program.process.wait(LEAVE_S) == 0, program.text
        assert "Traceback" not in program.text
    place.assert_nothing_left()


def test_a_peer_joins_a_running_swarm_with_the_address_of_any_peer(place: Place, running: dict[str, Program]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics_addr = f"127.0.0.1:{free.getsockname()[1]}"
    newcomer = place.peer("newcomer", running["b"].address, **{"metrics-addr": metrics_addr})
    wait_until(lambda: len(place.committed("newcomer")) > 2, newcomer)  # it may have joined at any outer step
    peer_id = place.events("newcomer", PeerStarted)[0].peer_id
    joined = place.events("newcomer", PeerJoined)[0]
    assert joined.snapshot
    first = place.events("newcomer", RoundEnded)[0]
    assert first.committed
    before = [event for event in place.events("newcomer", PeerCaughtUp) if event.mono_s < first.mono_s]
    assert first.step == before[-1].to_step + 1
    assert len(first.group) == 3

    status = subprocess.run(
        [sys.executable, "-m", "p2p_diloco", "status", "--json", "--initial-peers", newcomer.address],
        env=place.environment,
        capture_output=True,
        check=True,
    )
    assert peer_id in {peer["peer_id"] for peer in json.loads(status.stdout)["peers"]}

    with urllib.request.urlopen(f"http://{metrics_addr}/metrics", timeout=10) as answer:
        metrics = answer.read().decode()
    assert f'p2p_diloco_peer_info{{name="newcomer",peer_id="{peer_id}",role="trainer"}} 1.0' in metrics
    committed = float(re.findall(r'^p2p_diloco_rounds_total\{result="committed"\} (\S+)$', metrics, re.MULTILINE)[0])
    assert 2 < committed <= len(place.events("newcomer", RoundEnded))
    for purpose in ("reduce", "catchup", "dht", "other"):
        assert f'p2p_diloco_bytes_total{{direction="received",purpose="{purpose}"}} 0.0' not in metrics

    newcomer.process.send_signal(signal.SIGTERM)
    assert newcomer.process.wait(LEAVE_S) == 0, newcomer.text
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://{metrics_addr}/metrics", timeout=10)
    place.check_heads("a", "b", "newcomer")
    left = place.events("newcomer", PeerLeft)[-1]
    manifest, state = load_state(find_run(place.root / "newcomer"))
    assert (state.step, state.head.hex()) == (left.step, left.head)
    _, other = load_state(find_run(place.root / "a"), state.step)
    assert (other.head, other.theta.tobytes()) == (state.head, state.theta.tobytes())
    assert manifest.n_params == len(state.theta)


def test_a_peer_without_text_is_told_what_to_add(place: Place, running: dict[str, Program]) -> None:
    folder = place.root / "textless"
    flags = {"folder": str(folder), "host-maddrs": "/ip4/127.0.0.1/tcp/0", "device": "cpu"}
    program = place.start("textless", "peer", "--initial-peers", running["a"].address, *as_flags(flags))
    assert program.process.wait(START_S) == 2
    assert program.text.endswith("error: this run brings no text of its own; add --data FILE-OR-FOLDER\n")
    assert "Traceback" not in program.text
    wait_until(lambda: not any(str(folder) in command for command in place.alive().values()), limit_s=2.0)


@pytest.mark.parametrize("after_s", [0.1, 1.0, 3.0])
def test_interrupted_while_starting(place: Place, running: dict[str, Program], after_s: float) -> None:
    program = place.peer(f"early-{after_s}", running["seed"].address)
    time.sleep(after_s)
    program.process.send_signal(signal.SIGINT)
    code = program.process.wait(LEAVE_S)
    # Before Python itself has come to our first line, the signal does what it does to any program.
    in_python = code == -signal.SIGINT and not program.text
    in_site = code == 1 and "init_import_site" in program.text
    assert code == 0 or in_python or in_site, program.text
    assert "Traceback" not in program.text or in_site
    wait_until(lambda: not any(program.name in command for command in place.alive().values()), limit_s=2.0)


def test_interrupted_in_training_and_back_with_a_damaged_ledger(place: Place, running: dict[str, Program]) -> None:
    """With outer steps of about a second, these moments fall anywhere. The file is put aside and fetched again."""
    generator = random.Random(1)
    programs = [place.peer(f"moment-{k}", running["seed"].address) for k in range(2)]
    wait_until(lambda: all(place.step_of(program.name) >= 3 for program in programs), *programs)
    for program in programs:
        time.sleep(generator.uniform(0.0, 1.5))
        program.process.send_signal(signal.SIGINT)
    for program in programs:
        assert program.process.wait(LEAVE_S) == 0, program.text
        assert "Traceback" not in program.text

    name = programs[0].name
    ledger = next((place.root / name).glob("*/ledger"))
    update = max((ledger / "updates").glob("*.update"))
    update.write_bytes(update.read_bytes()[:-1] + b"\xff")
    back, step = place.peer(name, running["seed"].address), place.step_of("a")
    wait_until(lambda: place.step_of(name) > step, back)
    assert update.name in back.text
    assert list((ledger / "quarantine").glob(f"{update.name}*"))
    assert back.interrupt() == 0, back.text
    place.check_heads("a", "b", *(program.name for program in programs))
