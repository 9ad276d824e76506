"""What a trainer and its network process say to each other: one class for each kind of line, and their sockets.

A line is a JSON object with the ``kind``, as KINDS names it, and the fields of the class. ``pack_line`` writes it, and
``unpack_line`` checks it, though both ends are ours. The end of the stream means that the other process is gone.

    trainer -> network    Start (once, first), Begin (answered by Begun), InnerStep, Stall, Evaluated,
                          OuterStep (answered by OuterResult), Leave (answered by Left)
    network -> trainer    LogLine, Found, Joined, Begun, News, Peers, Moved, OuterResult, Left, Failed
"""

from __future__ import annotations

import json
import select
import socket
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

from p2p_diloco.core.config import PeerConfig, Timeouts
from p2p_diloco.core.peer_row import PeerRow
from p2p_diloco.core.records import Natural, Role
from p2p_diloco.core.runfile import NotNegative

# -- trainer -> network ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Start:
    """Find the run, and join it."""

    config: PeerConfig
    timeouts: Timeouts
    role: Role
    manifest_path: Path | None
    """Of a seed, which brings the run along."""


@dataclass(frozen=True, kw_only=True)
class Begin:
    """The trainer takes theta now."""

    planned: Natural
    """Inner steps until its first outer step."""


@dataclass(frozen=True, kw_only=True)
class InnerStep:
    """An inner step ended."""

    inner_step: Natural
    """Since the last outer step."""
    planned: Natural
    step_s: NotNegative
    """Mean seconds of the last ones."""
    loss: float | None
    """Nats per token; None where it is not finite."""
    tokens: Natural
    """Trained on since joining."""
    tokens_per_s: NotNegative


@dataclass(frozen=True, kw_only=True)
class OuterStep:
    """The inner steps are done, ``local`` holds what was learned: make the outer step."""

    tokens: Natural
    """That the contribution stands for."""
    dropped: bool
    """Contribute nothing."""
    pace: NotNegative
    """The trainer's speed in tokens per second; 0 where unknown."""


@dataclass(frozen=True, kw_only=True)
class Stall:
    """The outer step that led to ``step`` has kept the trainer from learning for so long."""

    step: Natural
    seconds: NotNegative


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Theta of outer step ``step`` was evaluated on held-out text."""

    step: Natural
    held_out_loss: float | None
    """Nats per token; None where it is not finite."""
    tokens: Natural
    seconds: NotNegative


@dataclass(frozen=True, kw_only=True)
class Leave:
    """Say goodbye to the others, and end."""

    reason: str


# -- network -> trainer ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LogLine:
    """A record of ``logging``: the trainer alone writes to the terminal."""

    level: Natural
    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Found:
    """The run is known, and the shared vectors have their size."""

    manifest_path: Path
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The state is here."""

    peer_id: str
    maddrs: list[str]
    step: Natural
    head: str


@dataclass(frozen=True, kw_only=True)
class Begun:
    """Theta moves at outer steps only from now on."""

    step: Natural
    head: str
    evaluate: bool
    """It is this peer's turn to evaluate theta."""


@dataclass(frozen=True, kw_only=True)
class News:
    """An outer step may have become due."""

    closes_in_s: float | None
    """Until the round closes; None where none is closing."""
    behind: bool
    """The swarm has gone on without this peer."""


@dataclass(frozen=True, kw_only=True)
class Peers:
    """These peers are there."""

    rows: tuple[PeerRow, ...]
    """Everybody, me first."""
    evaluation: tuple[int, float] | None
    """(outer step, held-out loss) of the newest evaluation that is believed."""


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A seed followed the swarm."""

    step: Natural
    head: str


@dataclass(frozen=True, kw_only=True)
class OuterResult:
    """Says what became of one outer step of this peer."""

    committed: bool
    """A round of this peer committed: theta is new, and holds this peer's contribution, or the group's without it."""
    adopted: bool
    """This peer took theta over: the inner steps since the last outer step are lost, unless ``kept``."""
    reason: str
    """Why no round committed: ``alone`` (not enough peers were ready), ``behind`` (the swarm had gone on), ``failed``
    (the group did not agree on an update in time), ``diverged`` (a parameter of the model is not finite), ``repaired``
    (bits of this peer's state had flipped). Empty if one did."""
    step: Natural
    """The outer step at which this peer stands now."""
    head: str
    """The hash, in hex, that names the history up to ``step``: peers with the same head have the same theta."""
    group: Natural = 0
    """Peers in the round, this one too; 0 if there was none."""
    gather_s: NotNegative = 0.0
    """How long it took until the group stood."""
    reduce_s: NotNegative = 0.0
    """How long the group averaged outer gradients."""
    settle_s: NotNegative = 0.0
    """How long it took until all members agreed on the update."""
    apply_s: NotNegative = 0.0
    """How long it took to apply the update, and to keep it on the disk."""
    stall_s: NotNegative = 0.0
    """From the end of the last inner step until the next one can begin. The trainer measures it: 0 before."""
    bytes_sent: Natural = 0
    """In the round, to other members."""
    bytes_received: Natural = 0
    evaluate: bool = False
    """It is this peer's turn to evaluate theta."""
    kept: bool = False
    """The model goes on from its own parameters, although theta is new: this peer's contribution is not in it."""
    planned: Natural = 0
    """Inner steps until the next outer step."""

    @property
    def moved(self) -> bool:
        """Returns whether theta is new, whoever contributed to it."""
        return self.committed or self.adopted


@dataclass(frozen=True, kw_only=True)
class Left:
    """The others have been told, as far as there was time."""


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The network process ends."""

    message: str
    exit_code: Natural


# -- lines -------------------------------------------------------------------------------------------------------------

FromTrainer = Start | Begin | InnerStep | OuterStep | Stall | Evaluated | Leave
FromNetwork = LogLine | Found | Joined | Begun | News | Peers | Moved | OuterResult | Left | Failed
KINDS: dict[str, type[FromTrainer] | type[FromNetwork]] = {
    "start": Start,
    "begin": Begin,
    "progress": InnerStep,
    "outer_step": OuterStep,
    "stall": Stall,
    "evaluated": Evaluated,
    "leave": Leave,
    "log": LogLine,
    "found": Found,
    "joined": Joined,
    "begun": Begun,
    "news": News,
    "peers": Peers,
    "moved": Moved,
    "result": OuterResult,
    "left": Left,
    "failed": Failed,
}
NAMES = {line_type: kind for kind, line_type in KINDS.items()}


def pack_line(line: FromTrainer | FromNetwork) -> bytes:
    """Returns ``line`` as JSON, with the end of the line. ValueError where a number in it is not finite."""
    table = {"kind": NAMES[type(line)], **shallow(line)}
    return json.dumps(table, default=shallow, allow_nan=False).encode() + b"\n"


def unpack_line(data: bytes) -> FromTrainer | FromNetwork:
    """Returns the line that ``data`` is. ValueError for any that ``pack_line`` does not write, but for
    blanks, and the order of keys."""
    table = json.loads(data.decode(), object_pairs_hook=without_repetition)
    kind = table.get("kind") if isinstance(table, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"a line of kind {kind!r}")
    line = reader_of(kind).validate_python({key: value for key, value in table.items() if key != "kind"})
    if not says(table, json.loads(pack_line(line))):
        raise ValueError(f"a line of kind {kind!r} that says something else than it means")
    return line


def without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Returns the object of these pairs. ValueError where a key comes twice."""
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a key that comes twice")
    return table


def says(said: object, meant: object) -> bool:
    """Returns whether JSON says what was read out of it, as ``meant`` has it, in values of the same types. pydantic
    takes a text for a number, for example; its strict mode takes no list for a tuple. A whole number may stand for a
    float: callers in Python may give one."""
    if isinstance(said, dict) and isinstance(meant, dict):
        return said.keys() == meant.keys() and all(says(value, meant[key]) for key, value in said.items())
    if isinstance(said, list) and isinstance(meant, list):
        return len(said) == len(meant) and all(map(says, said, meant))
    return said == meant and (type(said) is type(meant) or (type(said), type(meant)) == (int, float))


@cache
def reader_of(kind: str) -> TypeAdapter[FromTrainer | FromNetwork]:
    return TypeAdapter(KINDS[kind])


def shallow(value: object) -> Any:
    """Returns what JSON has for ``value``, with its own values as they are. Not pydantic's JSON, which has no way to
    say a path with bytes that are no text."""
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, BaseModel):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a line cannot say {value!r}")


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Returns (the trainer's end, the network process's end)."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def has_room(end: socket.socket) -> bool:
    """Returns whether a line can be sent without waiting for the other end to read: it may be stopped."""
    poll = select.poll()
    poll.register(end, select.POLLOUT)
    return bool(poll.poll(0))
