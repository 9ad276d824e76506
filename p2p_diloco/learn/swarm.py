"""The handle that a trainer holds on the swarm. ``train.py`` uses it, and so can any training loop of your own
(``docs/library.md``)::

    with Swarm.join(PeerConfig(folder=..., initial_peers=[...])) as swarm:
        model = model_of(swarm.manifest)
        swarm.load_into(model)                            # theta
        for batch in batches:
            loss = train_step(model, batch, inner_optimizer)
            swarm.report(loss, tokens)                    # tell the swarm and the event log
            if swarm.outer_step_due():
                swarm.outer_step(model)                   # offer what I learned, take what the group learned

Behind it is a network process of its own (``network``), started before anything else and without inheriting anything.
Theta and local are shared memory that has no name, so nothing is left of it whatever happens. A model on the CPU has
its parameters *in* local; one on an accelerator is copied there and back at outer steps.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from p2p_diloco.core.addresses import check_maddr
from p2p_diloco.core.codec import Vector
from p2p_diloco.core.config import PeerConfig, Timeouts
from p2p_diloco.core.errors import Stopped, UsageError
from p2p_diloco.core.manifest import RunManifest, open_manifest
from p2p_diloco.core.pace import outer_step_due
from p2p_diloco.core.peer_row import PeerRow
from p2p_diloco.core.records import Role
from p2p_diloco.learn.inner_steps import InnerSteps
from p2p_diloco.learn.process import NetworkHandle
from p2p_diloco.learn.shared import anonymous_memory, shared_vectors
from p2p_diloco.peer.control import (
    Begin,
    Begun,
    Evaluated,
    Found,
    Joined,
    Left,
    Moved,
    OuterResult,
    OuterStep,
    Stall,
)

if TYPE_CHECKING:
    import torch

    from p2p_diloco.learn.parameters import Parameters


class Swarm:
    """A trainer's hold on a swarm. ``join`` makes one, or ``find``. Use it as a context manager, from one thread."""

    manifest: RunManifest
    theta: Vector
    """float32 [n], the outer state's; read-only here."""
    local: Vector
    """float32 [n], what this peer trains."""

    def __init__(self, network: NetworkHandle, memory: int) -> None:
        """Takes over ``memory``, the descriptor of what this process shares with the network process."""
        self.step = 0
        """Outer step at which this peer stands; a seed follows the swarm inside ``serve``."""
        self.head = ""
        self.inner_step = 0
        """Inner steps since the last outer step."""
        self.planned = 0
        self.folder = Path()
        """Of this run: ledger, event log, inner state."""
        self.maddrs: list[str] = []
        self.peer_id = ""
        self.evaluate_now = False
        """Whether it is this peer's turn to evaluate theta."""
        self._inner_steps = InnerSteps()
        self._descriptor = memory
        self._network = network

    # -- life --------------------------------------------------------------------------------------------------------

    @classmethod
    def join(
        cls,
        config: PeerConfig,
        *,
        timeouts: Timeouts | None = None,
        role: Role = "trainer",
        manifest_path: Path | None = None,
    ) -> Swarm:
        """Joins the run at the addresses of ``config``, and returns when its state is here: theta, newest step.

        It is ``find``, then ``wait_for_state``. Raises UsageError for what you can mend, NetworkError for the rest,
        with nothing left behind.
        """
        swarm = cls.find(config, timeouts=timeouts, role=role, manifest_path=manifest_path)
        with closed_on_failure(swarm):
            swarm.wait_for_state()
        return swarm

    @classmethod
    def find(
        cls,
        config: PeerConfig,
        *,
        timeouts: Timeouts | None = None,
        role: Role = "trainer",
        manifest_path: Path | None = None,
    ) -> Swarm:
        """Starts the network process, and returns when the run's manifest is here and its state is still on its way.

        So a peer that cannot take part leaves before the download; else ``wait_for_state`` comes next. Raises as
        ``join``. ``manifest_path``: of a seed, which brings the run along.
        """
        for maddr in config.initial_peers:
            check_maddr(maddr)
        memory = anonymous_memory()
        swarm = cls(NetworkHandle.start(config, timeouts or Timeouts(), role, manifest_path, memory), memory)
        with closed_on_failure(swarm):
            swarm.wait_for_manifest()
        return swarm

    def wait_for_manifest(self) -> None:
        """Returns when the run is found; ``find`` does this. Raises as ``join``; the swarm is to be closed then."""
        found = self._network.wait(Found)
        self.folder = found.folder
        self.manifest = open_manifest(found.manifest_path.read_bytes(), str(found.manifest_path))
        self.theta, self.local = shared_vectors(self._descriptor, self.manifest.n_params)
        self.planned = self.manifest.spec.inner.steps

    def wait_for_state(self) -> None:
        """Returns when theta is here. Raises as ``join``; the swarm is to be closed then."""
        joined = self._network.wait(Joined)
        self.step, self.head, self.peer_id, self.maddrs = joined.step, joined.head, joined.peer_id, joined.maddrs

    def __enter__(self) -> Swarm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close("done" if error is None and self.done else why_left(error))

    def close(self, reason: str) -> None:
        """Says goodbye and ends the network process; within 10 s, whatever it does."""
        self._network.close(reason)
        os.close(self._descriptor)

    # -- training ----------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Returns whether the run's last outer step has been made."""
        return self.step >= self.manifest.spec.outer.steps

    @property
    def rows(self) -> tuple[PeerRow, ...]:
        """Returns what everybody's record says, mine first; renewed every second."""
        return self._network.rows

    @property
    def evaluation(self) -> tuple[int, float] | None:
        """Returns (outer step, held-out loss) of the swarm's newest evaluation; None before there is one."""
        return self._network.evaluation

    def load_into(self, model: torch.nn.Module) -> None:
        """Gives the model theta, and counts this peer as training from here on. A model on the CPU keeps its parameters
        in shared memory from then on. UsageError when it is not the run's model."""
        from p2p_diloco.learn.parameters import layout_of, tie

        if layout_of(model).digest != self.manifest.layout_digest:
            raise UsageError("this model is not the run's: its parameters have other names or shapes")
        self.begin()
        tie(model, self.local)

    def begin(self) -> None:
        """Takes theta as it is now into ``local``; this peer counts as training from here on. ``load_into`` does
        this."""
        if not self.peer_id:
            raise RuntimeError("theta is not here yet: wait_for_state comes before it is taken")
        self._network.say(Begin(planned=self.planned))
        begun = self._network.wait(Begun)
        self.step, self.head, self.evaluate_now = begun.step, begun.head, begun.evaluate
        self.local[:] = self.theta
        self._inner_steps.begin(time.monotonic())

    def restore_local(self, local: Vector, model: torch.nn.Module, *, inner_step: int, tokens: int) -> None:
        """Goes on from parameters that an earlier process of this peer saved, ``inner_step`` steps after theta."""
        self.local[:] = local
        self._parameters(model).write(self.local)
        self.inner_step = inner_step
        self._inner_steps.resume(tokens)

    def read_local(self, model: torch.nn.Module) -> None:
        """Makes ``local`` what the model is now."""
        self._parameters(model).read(self.local)

    def _parameters(self, model: torch.nn.Module) -> Parameters:
        from p2p_diloco.learn.parameters import parameters_of  # here, as a seed goes without torch

        return parameters_of(model, self.local)

    @property
    def tokens(self) -> int:
        """Returns the tokens trained on since joining."""
        return self._inner_steps.tokens

    @property
    def tokens_per_s(self) -> float:
        """Returns the tokens per second of the last inner steps."""
        return self._inner_steps.tokens_per_s

    @property
    def loss(self) -> float | None:
        """Returns the loss of the last inner step, in nats per token; None before there is one."""
        return self._inner_steps.loss

    @property
    def tokens_since_theta(self) -> int:
        """Returns the tokens that the next contribution stands for."""
        return self._inner_steps.tokens_since_theta

    @property
    def tokens_this_step(self) -> int:
        """Returns the tokens trained on since the outer step at which this peer stands."""
        return self._inner_steps.tokens_this_step

    def theta_in(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        """Makes the model theta inside the block, and what it was before afterwards."""
        return self._parameters(model).showing(self.theta)

    def report(self, loss: float, tokens: int) -> None:
        """Tells that an inner step ended: its mean loss in nats per token, and the tokens it took. It never waits.
        Raises what ended the network process, if it has ended."""
        self._network.check()
        self.inner_step += 1
        self._inner_steps.ended(float(loss), int(tokens), time.monotonic())  # numbers of whatever library
        if self._network.has_room():  # else it is stopped, and the next inner step says more than this one
            self._network.say(self._inner_steps.line(self.inner_step, self.planned))

    def outer_step_due(self) -> bool:
        """Returns whether the planned inner steps are done, or the round closes before another one would end, or the
        swarm has gone on without this peer. It never waits."""
        closes_s = self._network.closes_s
        closes_in_s = None if closes_s is None else closes_s - time.monotonic()
        return outer_step_due(
            inner_step=self.inner_step,
            planned=self.planned,
            step_s=self._inner_steps.speed.step_s,
            closes_in_s=closes_in_s,
            behind=self._network.behind,
        )

    def outer_step(self, model: torch.nn.Module, *, dropped: bool = False) -> OuterResult:
        """Offers what was learned since theta, takes what the group learned, and returns what became of it.

        It waits until the group is there or the round closes, and until the update is applied. It never raises for what
        other peers do: the result says whether theta is new (``moved``), and why not, and whether the model goes on
        from its own parameters all the same (``kept``). ``dropped``: offer nothing, as if it had been lost on its way.
        """
        ended_s = self._inner_steps.speed.ended_s(time.monotonic())
        self.read_local(model)
        pace = self._inner_steps.speed.offered(ended_s, self.tokens)
        self._network.say(OuterStep(tokens=max(self.tokens_since_theta, 1), dropped=dropped, pace=pace))
        result = self._network.wait(OuterResult)
        if result.moved and not result.kept:
            self.local[:] = self.theta
        if result.moved:
            self._inner_steps.moved(kept=result.kept)
            self._parameters(model).write(self.local)
        self.step, self.head, self.planned = result.step, result.head, result.planned
        self.inner_step = 0
        self.evaluate_now = result.evaluate
        result = replace(result, stall_s=time.monotonic() - ended_s)
        self._network.say(Stall(step=self.step, seconds=result.stall_s))
        self._inner_steps.begin(time.monotonic())
        return result

    def evaluated(self, held_out_loss: float, tokens: int, seconds: float) -> None:
        """Tells the swarm the loss of this outer step's theta on held-out text, in nats per token."""
        self.evaluate_now = False
        self._inner_steps.begin(time.monotonic())
        finite = float(held_out_loss) if np.isfinite(held_out_loss) else None
        self._network.say(Evaluated(step=self.step, held_out_loss=finite, tokens=int(tokens), seconds=float(seconds)))

    def serve(self) -> None:
        """Follows the swarm, on a seed, until a signal handler raises. Raises what ended the network process, if that
        ends first."""
        while isinstance(line := self._network.wait(Moved, Left), Moved):
            self.step, self.head = line.step, line.head


def why_left(error: BaseException | None) -> str:
    """Returns what others are told of a peer that leaves before the run is over: that it was asked to, by the user or
    by its own loop, or the name of the error that ended it."""
    return "asked" if error is None or isinstance(error, Stopped) else type(error).__name__


@contextmanager
def closed_on_failure(swarm: Swarm) -> Iterator[None]:
    """Closes the handle where the block raises, so that nothing is left behind."""
    try:
        yield
    except BaseException:
        swarm.close("could not join")
        raise
