"""How a peer is made to lie: it is a real ``Peer``, one thing of which is patched.

It is honest until ``Liar.lying``, and wherever it does not lie: its ledger, its records and its answers are
those of the protocol. What it lies about is in ``lies_in_rounds`` and ``lies_beside``; all kinds are in ``liars``.
Nothing of this runs by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from p2p_diloco.peer.outer_steps import OuterSteps
from p2p_diloco.peer.peer import Peer
from p2p_diloco.round.settle import Settlement

FOR_EVER_S = 10_000.0
IDLES_S = 12.0
"""After this a liar that is silent in a round looks for the next one."""


@dataclass(frozen=True, kw_only=True)
class Liar:
    """A peer that lies, as those who patch it see it: in memory (``world``), or in a process (``liar_process``)."""

    peer: Peer
    lying: Callable[[], bool]
    """Whether it lies by now."""
    accomplices: tuple[str, ...]
    """Peer ids of all that tell this lie, itself included, in order."""

    @property
    def steps(self) -> OuterSteps:
        """The part of it that makes outer steps: liars train."""
        assert self.peer.outer_steps is not None
        return self.peer.outer_steps

    @property
    def me(self) -> str:
        return self.peer.identity.peer_id


def override(target: object, name: str, make: Callable[[Any], Any]) -> None:
    """In place of a method of this one object: what ``make`` makes of it."""
    setattr(target, name, make(getattr(target, name)))


def in_rounds(change: Callable[[Liar, Settlement], None]) -> Callable[[Liar], None]:
    """A lie that is told in each round that the liar is a member of."""

    def corrupt(liar: Liar) -> None:
        def meet(real: Callable[..., Settlement]) -> Callable[..., Settlement]:
            def met(*round_of: Any) -> Settlement:
                settlement = real(*round_of)
                if liar.lying():
                    change(liar, settlement)
                return settlement

            return met

        override(liar.steps.attempts, "_meet", meet)

    return corrupt
