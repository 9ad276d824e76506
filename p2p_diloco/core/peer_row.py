"""One peer of a run as others are shown it: a row of a table, or of JSON."""

from __future__ import annotations

from dataclasses import dataclass, fields

from p2p_diloco.core.admission import invited_as
from p2p_diloco.core.records import Phase, Reached, Record, Role


@dataclass(frozen=True, kw_only=True)
class PeerRow:
    """Holds what is shown of a peer's record; every field means what it means in ``records.Record``."""

    peer_id: str
    issued_s: float
    life_s: float
    role: Role
    phase: Phase
    step: int
    head: str
    """In hex."""
    committed: bool
    snapshot_step: int
    maddrs: tuple[str, ...]
    client_mode: bool
    name: str
    version: str
    inner_step: int
    inner_steps_planned: int
    loss: float | None
    held_out_loss: float | None
    held_out_step: int
    tokens: int
    tokens_per_s: float
    group_size: int
    round_s: float
    round_bytes: int
    metrics_addr: str
    invitation: str
    """Name of the invitation under which it takes part; empty where it needs none."""
    known: bool = False
    known_members: int = 0
    signatures: int = 0
    certifying: int = 0
    witnessed: bool = False
    awaits_witness: bool = False
    barred: int = 0
    found_wrong: int = 0
    helped: bool = False
    share_percent: int = 100
    reached: Reached = "direct"

    @classmethod
    def of(cls, record: Record) -> PeerRow:
        """Returns the row of a record."""
        said = {**vars(record), "head": record.head.hex(), "maddrs": tuple(record.maddrs)}
        said |= {"invitation": invited_as(record), "reached": record.reached}
        return cls(**{field.name: said[field.name] for field in fields(cls)})
