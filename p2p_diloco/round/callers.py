"""The peers that call the others to a round (``core.call``), as one peer's records have them.

A leader shows those whom it calls the records of the callers. So nobody has to believe it that the round is due: who is
ready has signed that itself.
"""

from __future__ import annotations

from p2p_diloco.core.admission import Seated
from p2p_diloco.core.call import CALLERS, PHASES_OF_ROUND, is_called
from p2p_diloco.core.records import Record
from p2p_diloco.core.roster import on_head
from p2p_diloco.round.company import Company


def calls(company: Company, head: bytes) -> bool:
    """Returns whether enough trainers are ready on ``head`` to call the others, myself counted where I train."""
    here, seat, min_group = company.here, company.here.seat, company.rules.min_group
    around: list[Seated] = [*on_head(here.directory.expected(here.wall_s()), head)]
    ready: list[Seated] = [*_ready(company, head)]
    if seat.role_trainer and seat.phase != "joining" and seat.standing.head == head:
        around.append(here.claim)
        ready += [here.claim] if seat.phase in PHASES_OF_ROUND else []
    return is_called(around, ready, seat.known, min_group)


def records_of(company: Company, head: bytes) -> list[bytes]:
    """Returns the sealed records of CALLERS that are ready on ``head``, the known ones first; fewer where there are
    not so many. Mine is not among them."""
    known = company.here.seat.known.peers
    ready = sorted(_ready(company, head), key=lambda record: record.peer_id not in known)
    sealed = map(company.here.directory.sealed, (record.peer_id for record in ready[:CALLERS]))
    return [one for one in sealed if one is not None]


def _ready(company: Company, head: bytes) -> list[Record]:
    """Returns the records that say of themselves that their trainers are ready on ``head``. That a round has led one
    there says nothing of it."""
    return [record for record in on_head(company.here.live(), head) if record.phase in PHASES_OF_ROUND]
