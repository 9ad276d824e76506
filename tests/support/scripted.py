"""The network process's end of the control socket, without a process: it hears all that a trainer says, and answers as
it was told before."""

from __future__ import annotations

import subprocess
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.runfile import DataSpec, InnerSpec, OuterSpec, RoundSpec
from p2p_diloco.learn.parameters import layout_of
from p2p_diloco.learn.process import NetworkHandle
from p2p_diloco.learn.shared import anonymous_memory
from p2p_diloco.learn.swarm import Swarm
from p2p_diloco.peer.control import (
    Begin,
    Begun,
    Failed,
    Found,
    FromNetwork,
    FromTrainer,
    Joined,
    Leave,
    Left,
    OuterResult,
    OuterStep,
    pack_line,
    socket_pair,
    unpack_line,
)
from p2p_diloco.peer.network import map_vectors
from tests.support.builders import identity
from tests.support.small_models import llama, manifest_of, resolved

OWNER = identity(1000)
L = TypeVar("L")
TOKENS = 16
"""In an inner step."""


def scripted_manifest(*, inner_steps: int = 4, outer_steps: int = 10, snapshot_every: int = 100) -> RunManifest:
    """Of a run of ``llama()``, whose peers bring their own text."""
    manifest = manifest_of(resolved(), layout_of(llama()))
    changes = {
        "data": DataSpec(source="path", path="text", seq_len=8, held_out=0.2, eval_tokens=64),
        "inner": InnerSpec(steps=inner_steps, batch_size=2, lr=1e-2, warmup_steps=0),
        "outer": OuterSpec(steps=outer_steps),
        "round": RoundSpec(snapshot_every=snapshot_every),
    }
    return manifest.model_copy(update={"spec": manifest.spec.model_copy(update=changes), "owner": OWNER.peer_id})


def outcome(step: int, **changes: Any) -> OuterResult:
    """An outer step that committed and led to ``step``."""
    fields: dict[str, Any] = {"committed": True, "adopted": False, "reason": "", "planned": 4}
    return OuterResult(step=step, head=head_at(step), **fields | changes)


def head_at(step: int) -> str:
    return f"{step:064x}"


def joined_at(step: int) -> Joined:
    return Joined(peer_id=identity(1).peer_id, maddrs=["/ip4/127.0.0.1/tcp/1"], step=step, head=head_at(step))


class ScriptedNetwork:
    """Every outer step has the next of ``outcomes``; where there is none left, it says ``last_words``. One that moves
    theta makes it what ``becomes`` is, or what was offered. ``process.NetworkHandle`` takes this for the process."""

    def __init__(self, manifest: RunManifest, *, step: int = 0, evaluate: bool = False, deaf: bool = False) -> None:
        self.outcomes: deque[OuterResult] = deque()
        self.last_words = Failed(message="no more outer steps", exit_code=1)
        self.heard: list[FromTrainer | FromNetwork] = []
        """All that the trainer has said, up to the last line that was answered at least."""
        self.offered: list[bytes] = []
        """Local parameters at each outer step."""
        self.becomes: Vector | None = None
        self.killed = False
        self.memory = anonymous_memory()
        self.theta, self.local = map_vectors(self.memory, manifest.n_params, resize=True)
        self.control, self._end = socket_pair()
        self._step, self._evaluate, self._deaf = step, evaluate, deaf
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def say(self, line: FromNetwork) -> None:
        self._end.sendall(pack_line(line))

    def die(self, half_a_line: bytes = b"") -> None:
        """As if it had been killed."""
        self._end.sendall(half_a_line)
        self._end.shutdown(2)

    def lines(self, kind: type[L]) -> list[L]:
        return [line for line in self.heard if isinstance(line, kind)]

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise subprocess.TimeoutExpired("scripted", timeout or 0.0)
        return 0

    def kill(self) -> None:
        self.killed = True
        self._end.shutdown(2)

    def _serve(self) -> None:
        with self._end, self._end.makefile("rb") as stream:
            for data in stream:
                line = unpack_line(data)
                self.heard.append(line)
                if isinstance(line, Begin):
                    self.say(Begun(step=self._step, head=head_at(self._step), evaluate=self._evaluate))
                elif isinstance(line, OuterStep):
                    self._outer_step()
                elif isinstance(line, Leave) and not self._deaf:
                    self.say(Left())
                    return

    def _outer_step(self) -> None:
        self.offered.append(self.local.tobytes())
        if not self.outcomes:
            self.say(self.last_words)
            return
        result = self.outcomes.popleft()
        if result.moved:
            self.theta[:] = self.local if self.becomes is None else self.becomes
        self.say(result)


@contextmanager
def joined(network: ScriptedNetwork, manifest: RunManifest, folder: Path) -> Iterator[Swarm]:
    """A trainer's swarm, as ``Swarm.join`` gives it."""
    path = folder / "manifest.json"
    path.write_bytes(manifest.signed(OWNER))
    with Swarm(NetworkHandle(network.control, network), network.memory) as swarm:
        network.say(Found(manifest_path=path, folder=folder))
        swarm.wait_for_manifest()
        network.say(joined_at(0))
        swarm.wait_for_state()
        yield swarm
