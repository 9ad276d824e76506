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
        result      the fields of peer.OuterResult
        left
        failed      message, exit_code                 the network process ends
"""

from __future__ import annotations

import json
import select
import socket
from typing import Any

Line = dict[str, Any]


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
