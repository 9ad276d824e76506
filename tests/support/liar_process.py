"""A liar as a real process: ``python -m tests.support.liar_process KIND peer``, with options of ``p2p-diloco peer``.

The trainer is ours and honest, and rests as in ``paced``. The network process that it starts is ours, too, but for its
peer, of which ``liars.CORRUPT`` has made a liar of this KIND. It does what all do until it is known, and lies as long
as it is: only who is known leads and reduces, and has a signature that counts.
"""

from __future__ import annotations

import sys
from typing import Any

from p2p_diloco.core.interpreter import python_command
from tests.support.lying import Liar, override
from tests.support.paced import rest_after_steps

THIS = "tests.support.liar_process"
NETWORK = "p2p_diloco.peer.network"
"""In the command line of the network process, as in that of an honest one."""


def lying_network(kind: str) -> None:
    """Runs this process as a network process whose peer lies."""
    from p2p_diloco.peer import network
    from p2p_diloco.peer.peer import Peer
    from tests.support.liars import CORRUPT

    def corrupted(**parts: Any) -> Peer:
        peer = Peer(**parts)
        me = peer.identity.peer_id
        CORRUPT[kind](Liar(peer=peer, lying=lambda: me in peer.seat.known.peers, accomplices=(me,)))
        return peer

    override(network, "Peer", lambda real: corrupted)
    network.main()


def lying_trainer(kind: str) -> int:
    """Runs this process as our command line, whose network process is ``lying_network``."""
    from p2p_diloco.__main__ import main
    from p2p_diloco.learn import process

    def command(_: str, module: str, *descriptors: str) -> list[str]:
        return python_command("-m", THIS, kind, module, *descriptors)

    override(process, "python_command", lambda real: command)
    rest_after_steps()
    return main()


if __name__ == "__main__":
    kind = sys.argv.pop(1)
    if sys.argv[1] == NETWORK:
        del sys.argv[1]
        lying_network(kind)
    else:
        sys.exit(lying_trainer(kind))
