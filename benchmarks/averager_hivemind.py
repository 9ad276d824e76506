"""hivemind's own ``DecentralizedAverager``, N peers on loopback, all-reduces of fp32 values: the baseline.

    python -m benchmarks.averager_hivemind --values 4000000 --peers 4 --rounds 3

Its matchmaking is given the size of the group, so it goes on as soon as all are there: the kindest setting. Without
that, it waits 5 s first. Prints one line of JSON, whose lists have a list per peer, and that a figure per round::

    seconds             from the call of ``step`` to its return
    all_reduce_seconds  the part of it after matchmaking
    wrong_values        values that are not the average afterwards, though ``step`` reports success

``hivemind.DHT`` and the averager fork and start p2pd: at the end every peer's session goes as a whole, whatever state
it is in.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection

from benchmarks.workers import Workers

LIMIT_S = 180.0
"""For everything: start, matchmaking, all-reduce."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    values: int
    peers: int
    seconds: list[list[float]]
    all_reduce_seconds: list[list[float]]
    wrong_values: list[list[int]]


def main(n_values: int, peers: int, rounds: int) -> Timing:
    """RuntimeError when a peer fails; TimeoutError after ``LIMIT_S``."""
    timings: list[list[tuple[float, float, int]]] = [[] for _ in range(peers)]
    with tempfile.TemporaryDirectory(prefix="averager-") as sockets, Workers(LIMIT_S) as workers:
        initial_peers: list[str] = []
        for rank in range(peers):
            workers.start(run_peer, rank, n_values, peers, initial_peers, sockets)
            initial_peers = initial_peers or workers.receive(0)
        for rank in range(1, peers):
            workers.receive(rank)
        for _ in range(rounds):
            workers.send_all("go")
            for rank in range(peers):
                timings[rank].append(workers.receive(rank))
    return Timing(
        values=n_values,
        peers=peers,
        seconds=[[round(timing[0], 3) for timing in peer] for peer in timings],
        all_reduce_seconds=[[round(timing[1], 3) for timing in peer] for peer in timings],
        wrong_values=[[timing[2] for timing in peer] for peer in timings],
    )


def run_peer(pipe: Connection, rank: int, n_values: int, peers: int, initial_peers: list[str], sockets: str) -> None:
    """In its own process: sends its addresses once it is ready; then, for any message, makes a round and sends its
    result.

    The averager leaves a socket of its own behind in hivemind's folder, so all sockets are put into ``sockets``.
    """
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
        while True:
            pipe.recv()
            with averager.get_tensors() as (averaged,):
                averaged.fill_(float(rank))
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
            pipe.send((ended - began, ended - matched, wrong))
    finally:
        averager.shutdown()
        dht.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.averager_hivemind")
    parser.add_argument("--values", type=int, default=4_000_000, help="float32 values that every peer brings")
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(json.dumps(asdict(main(arguments.values, arguments.peers, arguments.rounds))))
