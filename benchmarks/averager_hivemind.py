"""hivemind's own ``DecentralizedAverager``, N peers on loopback, one all-reduce of fp32 values: the baseline.

    python -m benchmarks.averager_hivemind --values 4000000 --peers 4

Its matchmaking is given the size of the group, so it goes on as soon as all are there: the kindest setting. Without
that, it waits 5 s first. Prints one line of JSON::

    seconds             per peer, from the call of ``step`` to its return
    all_reduce_seconds  per peer, the part of it after matchmaking
    wrong_values        per peer, values that are not the average afterwards, though ``step`` reports success

Every peer is a process that leads a session of its own, because ``hivemind.DHT`` and the averager fork and start
p2pd: at the end the session goes as a whole, whatever state it is in.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

LIMIT_S = 180.0
"""For everything: start, matchmaking, all-reduce."""
LEAVE_S = 10.0
"""For a peer to shut down politely; hivemind gives its DHT 3 s and its averager 5 s."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    values: int
    peers: int
    seconds: list[float]
    all_reduce_seconds: list[float]
    wrong_values: list[int]


def main(n_values: int, peers: int) -> Timing:
    """RuntimeError when a peer fails; TimeoutError after ``LIMIT_S``."""
    spawn = multiprocessing.get_context("spawn")
    deadline = time.monotonic() + LIMIT_S
    processes: list[SpawnProcess] = []
    pipes: list[Connection] = []
    sockets = tempfile.TemporaryDirectory(prefix="averager-")
    try:
        initial_peers: list[str] = []
        for rank in range(peers):
            ours, theirs = spawn.Pipe()
            arguments = (theirs, rank, n_values, peers, initial_peers, sockets.name)
            process = spawn.Process(target=run_peer, args=arguments)
            process.start()
            processes.append(process)
            theirs.close()
            pipes.append(ours)
            initial_peers = initial_peers or receive(ours, rank, deadline)
        for rank, pipe in enumerate(pipes[1:], start=1):
            receive(pipe, rank, deadline)
        for pipe in pipes:
            pipe.send("go")
        timings = [receive(pipe, rank, deadline) for rank, pipe in enumerate(pipes)]
        leave_by = time.monotonic() + LEAVE_S
        for process in processes:
            process.join(max(0.0, leave_by - time.monotonic()))
        return Timing(
            values=n_values,
            peers=peers,
            seconds=[round(timing[0], 3) for timing in timings],
            all_reduce_seconds=[round(timing[1], 3) for timing in timings],
            wrong_values=[timing[2] for timing in timings],
        )
    finally:
        for process in processes:
            end_session(process)
        sockets.cleanup()


def receive(pipe: Connection, rank: int, deadline: float) -> Any:
    if not pipe.poll(max(0.0, deadline - time.monotonic())):
        raise TimeoutError(f"peer {rank} was not done after {LIMIT_S:.0f} s")
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError(f"peer {rank} ended; its error is above") from None


def end_session(process: SpawnProcess) -> None:
    """Kill what is left of a peer's session. A peer that has not made its session yet is killed alone."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()


def run_peer(pipe: Connection, rank: int, n_values: int, peers: int, initial_peers: list[str], sockets: str) -> None:
    """In its own process: sends its addresses once it is ready, waits for any message, sends its result.

    The averager leaves a socket of its own behind in hivemind's folder, so all sockets are put into ``sockets``.
    """
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # the averager cannot be pickled
    os.environ["HIVEMIND_LOGLEVEL"] = "ERROR"
    import hivemind
    import torch
    from hivemind.averaging.control import AveragingStage
    from hivemind.p2p import P2P

    torch.set_num_threads(1)
    P2P._UNIX_SOCKET_PREFIX = f"/unix{sockets}/"
    tensor = torch.full([n_values], float(rank))
    dht = hivemind.DHT(
        initial_peers=initial_peers,
        start=True,
        host_maddrs=["/ip4/127.0.0.1/tcp/0"],
        use_relay=False,
        startup_timeout=60,
    )
    averager = hivemind.DecentralizedAverager(
        [tensor],
        dht,
        start=True,
        prefix="benchmark",
        target_group_size=peers,
        min_group_size=peers,  # without it three may go ahead, and the fourth looks for a group until its time-out
        allow_state_sharing=False,
    )
    try:
        pipe.send([str(address) for address in dht.get_visible_maddrs()])
        pipe.recv()
        began = time.perf_counter()
        step = averager.step(timeout=LIMIT_S, wait=False)
        while step.stage.value < AveragingStage.RUNNING_ALLREDUCE.value:
            time.sleep(0.002)
        matched = time.perf_counter()
        group = step.result()
        ended = time.perf_counter()
        with averager.get_tensors() as (averaged,):
            wrong = n_values - int((averaged == (peers - 1) / 2).sum())
        if len(group) != peers:
            raise RuntimeError(f"only {len(group)} of {peers} peers met")
        pipe.send([ended - began, ended - matched, wrong])
    except EOFError:
        return  # the parent has left, and has said why
    finally:
        averager.shutdown()
        dht.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.averager_hivemind")
    parser.add_argument("--values", type=int, default=4_000_000, help="float32 values that every peer brings")
    parser.add_argument("--peers", type=int, default=4)
    arguments = parser.parse_args()
    print(json.dumps(asdict(main(arguments.values, arguments.peers))))
