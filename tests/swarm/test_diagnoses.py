"""``p2p-diloco doctor`` as a user types it, beside a real swarm, and beside peers of our own making in this process."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p2p_diloco.core.config import PeerConfig, Timeouts
from p2p_diloco.core.event import PeerStarted
from p2p_diloco.core.events import EventLog
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.manifest import open_manifest
from p2p_diloco.learn.genesis import start_run
from p2p_diloco.ledger.folder import open_ledger
from p2p_diloco.ledger.replica import Replica
from p2p_diloco.peer.peer import Peer
from p2p_diloco.wire.daemon import private_socket_folder
from p2p_diloco.wire.node import Node
from tests.swarm.places import Place, Program, wait_until

STRANGER = Identity.from_seed(b"s" * 32)
HERE = "/ip4/127.0.0.1/tcp/0"
START_S = 240.0
"""As in places, on a machine that does other things, too."""
LIMIT_S = 150.0
"""Below two minutes, as promised, on a machine that does nothing else."""


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    place = Place()
    yield place
    place.clear()


@pytest.fixture(scope="module")
def running(place: Place) -> Iterator[dict[str, Program]]:
    """A seed, a peer, and one in client mode; after the module's tests nothing may be left of them or of any doctor."""
    seed = place.seed()
    own = ("--data", str(place.root / "text"), "--threads", "1", "--device", "cpu", "--folder", str(place.root / "c"))
    client = place.start("c", "peer", "--initial-peers", seed.address, "--client-mode", *own)
    programs = {"seed": seed, "a": place.peer("a", seed.address), "c": client}
    wait_until(lambda: place.step_of("a") >= 1 and place.step_of("c") >= 1, *programs.values(), limit_s=START_S)
    yield programs
    for program in programs.values():
        program.process.send_signal(signal.SIGINT)
    for program in programs.values():
        assert program.process.wait(START_S) == 0, program.text
    place.assert_nothing_left()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "p2p_diloco", "doctor", "--device", "cpu", "--host-maddrs", HERE, *arguments]


def doctor(place: Place, *arguments: str) -> tuple[int, dict[str, dict[str, str]], dict[str, Any]]:
    """Exit code, finding by what it is about (the last one), and all that ``--json`` prints."""
    done = subprocess.run(
        command("--json", *arguments), env=place.environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.stderr == ""
    said = json.loads(done.stdout)
    return done.returncode, {finding["what"]: finding for finding in said["findings"]}, said


def peer_id_of(program: Program, place: Place) -> str:
    return place.events(program.name, PeerStarted)[0].peer_id


@contextmanager
def in_a_thread(make: Callable[[], AbstractAsyncContextManager[str]]) -> Iterator[str]:
    """What ``make()`` yields, alive in an event loop of its own until the end of the block."""
    loop, ready = asyncio.new_event_loop(), threading.Event()
    stop, yielded = asyncio.Event(), list[str]()

    async def live() -> None:
        async with make() as value:
            yielded.append(value)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(live(),))
    thread.start()
    try:
        assert ready.wait(60)
        yield yielded[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


@asynccontextmanager
async def lone_node(folder: Path) -> AsyncIterator[str]:
    """A DHT without a run; its address."""
    config = PeerConfig(folder=folder, host_maddrs=(HERE,))
    identity = Identity.load_or_create(config.identity_path)
    node = await Node.start(config, identity, Timeouts(), private_socket_folder(folder))
    try:
        yield (await node.maddrs())[0]
    finally:
        await node.close()


@asynccontextmanager
async def seed_with_a_clock(folder: Path, run_file: Path, ahead_s: float) -> AsyncIterator[str]:
    """A seed whose clock is ``ahead_s`` ahead; its address."""
    config = PeerConfig(folder=folder, host_maddrs=(HERE,))
    identity = Identity.load_or_create(config.identity_path)
    path = start_run(run_file, folder, identity)
    signed = path.read_bytes()
    manifest = open_manifest(signed, "the run")
    node = await Node.start(config, identity, Timeouts(), private_socket_folder(folder))
    theta, momentum = np.empty(manifest.n_params, np.float32), np.empty(manifest.n_params, np.float32)
    events = EventLog(path.parent)
    peer = Peer(
        transport=node,
        identity=identity,
        replica=Replica(manifest, open_ledger(path.parent, manifest), theta, momentum),
        signed_manifest=signed,
        local=None,
        events=events,
        wall_s=lambda: time.time() + ahead_s,
    )
    try:
        await peer.join()
        running = asyncio.create_task(peer.run())
        yield (await node.maddrs())[0]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    finally:
        await node.close()
        events.close()


# -- beside a swarm ----------------------------------------------------------------------------------------------------


def test_where_all_is_well_it_says_so(place: Place, running: dict[str, Program]) -> None:
    flags = ("--data", str(place.root / "text"), "--folder", str(place.root / "new"))
    code, found, said = doctor(place, "--initial-peers", running["seed"].address, *flags)
    assert {what: finding["kind"] for what, finding in found.items()} == dict.fromkeys(
        ("address", "clock", "run", "bandwidth", "reachable", "device", "memory", "text", "disk", "outer step"), "ok"
    ), found
    assert (code, said["can_train"]) == (0, True)
    assert said["run_id"] in running["seed"].text
    assert "directly, with the right peer id" in found["address"]["measured"]
    assert "2 training, 1 seeding" in found["run"]["measured"]
    assert "reaches you directly at 127.0.0.1" in found["reachable"]["measured"]
    assert "inner steps of" in found["outer step"]["measured"]
    assert "in a group of 3" in found["outer step"]["measured"]
    assert not (place.root / "new").exists()


def test_findings_are_lines_for_a_person(place: Place, running: dict[str, Program]) -> None:
    """To one in client mode, with the addresses of a peer that trains and of one that is in client mode, too."""
    addresses = running["a"].address, f"/ip4/127.0.0.1/tcp/1/p2p/{peer_id_of(running['c'], place)}"
    arguments = command("--initial-peers", *addresses, "--client-mode", "--folder", "/dev/null/x")
    done = subprocess.run(arguments, env=place.environment, capture_output=True, text=True, timeout=LIMIT_S)
    *lines, last = done.stdout.splitlines()
    assert (done.returncode, last, done.stderr) == (1, "1 problem to mend", ""), done
    assert {line.split()[0] for line in lines} == {"ok", "warning", "problem"}

    def said(start: str, *more: str) -> bool:
        return any(line.startswith(start) and all(piece in line for piece in more) for line in lines)

    assert said("ok       address      /ip4/127.0.0.1/tcp/"), lines
    assert said("warning  address ", "in client mode, nobody can dial it; take another peer's address: /ip4/127"), lines
    assert said("ok       reachable    not needed in client mode"), lines
    assert said("warning  text         every peer of this run brings its own; start peer with --data"), lines
    assert said("problem  disk         /dev/null/x: cannot be written; choose another --folder"), lines


def test_an_address_at_which_nobody_can_dial_us(place: Place, running: dict[str, Program]) -> None:
    announced = ("--announce-maddrs", "/ip4/127.0.0.1/tcp/1")
    _, found, said = doctor(place, "--initial-peers", running["seed"].address, *announced)
    reachable = found["reachable"]
    assert reachable["kind"] in ("warning", "problem"), said
    assert "sees you at 127.0.0.1 and dials port 1: connection refused" in reachable["measured"]
    assert "add --client-mode" in reachable["remedy"]


@pytest.mark.parametrize("after", ["", "ok       address", "ok       reachable"])
def test_interrupted_it_leaves_nothing_behind(place: Place, running: dict[str, Program], after: str) -> None:
    """While it starts, while it measures the network, and while the device is tried."""
    before = set(place.alive())
    arguments = command("--initial-peers", running["seed"].address)
    process = subprocess.Popen(
        arguments, env=place.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    if after:
        assert any(line.startswith(after) for line in iter(process.stdout.readline, ""))
    else:
        time.sleep(2.0)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=START_S)
    # Before Python itself has come to our first line, the signal does what it does to any program.
    assert process.returncode == 130 or (process.returncode == -signal.SIGINT and not after), said
    assert "Traceback" not in said or process.returncode == -signal.SIGINT
    wait_until(lambda: set(place.alive()) <= before, limit_s=5.0)


# -- beside peers of our own making ------------------------------------------------------------------------------------


def test_a_dht_without_a_run(place: Place, tmp_path: Path) -> None:
    with in_a_thread(lambda: lone_node(tmp_path)) as address:
        code, found, said = doctor(place, "--initial-peers", address)
    assert (code, said["run_id"], list(found)) == (1, "", ["address", "run", "device"])
    assert (found["address"]["kind"], found["run"]["kind"]) == ("ok", "problem")
    assert found["run"]["measured"].startswith("found no run within 6 s")
    assert "p2p-diloco seed RUN.toml" in found["run"]["remedy"]


def test_a_closed_port_and_a_wrong_peer_id(place: Place, tmp_path: Path) -> None:
    closed = f"/ip4/127.0.0.1/tcp/1/p2p/{STRANGER.peer_id}"
    with in_a_thread(lambda: lone_node(tmp_path)) as address:
        wrong = address.rpartition("/p2p/")[0] + f"/p2p/{STRANGER.peer_id}"
        code, _, said = doctor(place, "--initial-peers", closed, wrong)
    first, second, device = said["findings"]
    assert (code, first["kind"], second["kind"], device["what"]) == (1, "problem", "problem", "device")
    assert first["measured"].endswith(": connection refused")
    assert first["remedy"].startswith("nobody listens at that port now")
    assert second["measured"].endswith(": another peer answers at that address")
    assert "paste all of it" in second["remedy"]


@pytest.mark.parametrize(("ahead_s", "kind"), [(4.2, "warning"), (-100.0, "problem")])
def test_a_clock_that_differs_from_the_peers(place: Place, tmp_path: Path, ahead_s: float, kind: str) -> None:
    """To a doctor it is all the same whose clock is wrong: the swarm's is the one that counts."""
    with in_a_thread(lambda: seed_with_a_clock(tmp_path, place.run_file, ahead_s)) as address:
        code, found, said = doctor(place, "--initial-peers", address, "--client-mode")
    direction = "behind" if ahead_s > 0 else "ahead of"
    assert (code, found["clock"]["kind"]) == (int(kind == "problem"), kind), said
    offset_s = float(found["clock"]["measured"].removeprefix("this machine's clock is ").split()[0])
    assert 0 <= abs(ahead_s) - offset_s < 3, "as far as it is certain"
    assert f" s {direction} that of 1 peer" in found["clock"]["measured"]
    assert "timedatectl set-ntp true" in found["clock"]["remedy"]
    assert found["run"]["measured"].startswith("test ")
    assert ("this clock hides it" in found["run"]["measured"]) == (kind == "problem")
    assert ("mend the clock first" in found["run"]["remedy"]) == (kind == "problem")
