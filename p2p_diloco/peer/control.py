"""What a trainer and its network process say to each other: JSON objects, one a line, over a pair of sockets.

Both ends are ours, so nothing is checked beyond the name; the end of the stream means that the other process is gone.

    trainer -> network
        start       config, timeouts, role, manifest_path (a seed's; else null)     once, first
        begin       planned (inner steps)                                           answered by begun
        progress    inner_step, planned, step_s, loss, tokens, tokens_per_s         after every inner step
        outer_step  tokens, dropped (offer nothing), pace (tokens per second)      answered by result
        stall       step, seconds
        evaluated   step, held_out_loss, tokens, seconds
        leave       reason                                                         answered by left
    network -> trainer
        log         level, name, text
        found       manifest_path, folder              the manifest is known; the vectors have their size
        joined      peer_id, maddrs, step, head
        begun       step, head, evaluate               theta moves at outer steps only from now on
        news        closes_in_s (null: no round is closing), behind
        peers       rows: the fields of everybody's record, mine first; evaluation: the newest one that is believed, as
                    [step, held-out loss], or null
        moved       step, head                         a seed followed the swarm
        result      the fields of OuterResult
        left
        failed      message, exit_code                 the network process ends
"""

from __future__ import annotations

import json
import select
import socket
from dataclasses import dataclass
from typing import Any

Line = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class OuterResult:
    """What became of one outer step of this peer."""

    committed: bool
    """A round of this peer committed: theta is new, and holds this peer's contribution, or the group's without it."""
    adopted: bool
    """This peer took theta over: the inner steps since the last outer step are lost, unless ``kept``."""
    reason: str
    """Why no round committed: ``alone`` (not enough peers were ready), ``behind`` (the swarm had gone on), ``failed``
    (the group did not agree on an update in time), ``diverged`` (a parameter of the model is not finite), ``repaired``
    (bits of this peer's state had flipped). Empty if one did."""
    step: int
    """The outer step at which this peer stands now."""
    head: str
    """The hash, in hex, that names the history up to ``step``: peers with the same head have the same theta."""
    group: int = 0
    """Peers in the round, this one too; 0 if there was none."""
    gather_s: float = 0.0
    """How long it took until the group stood."""
    reduce_s: float = 0.0
    """How long the group averaged outer gradients."""
    settle_s: float = 0.0
    """How long it took until all members agreed on the update."""
    apply_s: float = 0.0
    """How long it took to apply the update, and to keep it on the disk."""
    stall_s: float = 0.0
    """From the end of the last inner step until the next one can begin. The trainer measures it: 0 before."""
    bytes_sent: int = 0
    """In the round, to other members."""
    bytes_received: int = 0
    evaluate: bool = False
    """It is this peer's turn to evaluate theta."""
    kept: bool = False
    """The model goes on from its own parameters, although theta is new: this peer's contribution is not in it."""
    planned: int = 0
    """Inner steps until the next outer step."""

    @property
    def moved(self) -> bool:
        """Theta is new, whoever contributed to it."""
        return self.committed or self.adopted


def pack_line(kind: str, **fields: Any) -> bytes:
    return json.dumps({"kind": kind, **fields}).encode() + b"\n"


def unpack_line(data: bytes) -> Line:
    line: Line = json.loads(data)
    return line


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """(the trainer's end, the network process's end)"""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def has_room(end: socket.socket) -> bool:
    """Whether a line can be sent without waiting for the other end to read: it may be stopped."""
    poll = select.poll()
    poll.register(end, select.POLLOUT)
    return bool(poll.poll(0))
