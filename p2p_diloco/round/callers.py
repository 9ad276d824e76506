"""The peers that call the others to a round (``core.call``), as one peer's records have them.

A leader shows those whom it calls the records of the callers. So nobody has to believe it that the round is due: who is
ready has signed that itself. Nobody gets a place among those that a peer has heard of by being shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from p2p_diloco.core.admission import Seated
from p2p_diloco.core.call import CALLERS, READY_PHASES, is_called
from p2p_diloco.core.errors import Misbehaved
from p2p_diloco.core.records import Record, is_current, open_record
from p2p_diloco.core.roster import on_head
from p2p_diloco.round.company import Company


def calls(company: Company, head: bytes, shown: Sequence[Record] = ()) -> bool:
    """Returns whether enough trainers are ready on ``head`` to call the others, myself counted where I train, and who
    is ``shown`` to be ready. Who does not answer me counts as one of those around until its record is out of date: a
    peer that cannot dial it, as one behind a router, would else need fewer than the others."""
    here, seat, directory = company.here, company.here.seat, company.here.directory
    records = [*directory.current(here.wall_s()), *directory.expected(here.wall_s()), *shown]
    around: dict[str, Seated] = {record.peer_id: record for record in on_head(records, head)}
    ready: dict[str, Seated] = {record.peer_id: record for record in (*_ready(company, head), *shown)}
    if seat.role_trainer and seat.phase != "joining" and seat.standing.head == head:
        around[company.me] = here.claim
        if seat.phase in READY_PHASES:
            ready[company.me] = here.claim
    return is_called([*around.values()], [*ready.values()], seat.known, company.rules.min_group)


def records_of(company: Company, head: bytes) -> list[bytes]:
    """Returns the sealed records of CALLERS that are ready on ``head``, the known ones first; fewer where there are
    not so many. Mine is not among them."""
    known = company.here.seat.known.peers
    ready = sorted(_ready(company, head), key=lambda record: record.peer_id not in known)
    sealed = map(company.here.directory.sealed, (record.peer_id for record in ready[:CALLERS]))
    return [one for one in sealed if one is not None]


def shown_by(company: Company, leader: str, sealed: Iterable[bytes], head: bytes) -> list[Record]:
    """Returns the records among those that a leader shows of trainers that are ready on ``head``, as far as I have
    heard of them, also where I have a newer record. Misbehaved of the leader for one that its peer did not sign."""
    here, shown = company.here, []
    for one in sealed:
        try:
            record = open_record(one)
        except ValueError as error:
            raise Misbehaved(leader, f"sends {error}") from error
        heard_of = here.directory.get(record.peer_id) is not None and record.run_id == company.rules.run_id
        if heard_of and is_current(record, here.wall_s()) and record.phase in READY_PHASES:
            shown.append(record)
    return on_head(shown, head)


def _ready(company: Company, head: bytes) -> list[Record]:
    """Returns the records that say of themselves that their trainers are ready on ``head``. That a round has led one
    there says nothing of it."""
    return [record for record in on_head(company.here.live(), head) if record.phase in READY_PHASES]
