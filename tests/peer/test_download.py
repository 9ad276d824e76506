"""Updates that are kept until they are taken. Whole downloads, with donors that lie, are in ``test_catchup``."""

from __future__ import annotations

import numpy as np

from p2p_diloco.core.codecs import encode
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.outer import genesis_state
from p2p_diloco.core.update import Part, Update, UpdateHeader, update_to_bytes
from p2p_diloco.peer.download import Updates
from p2p_diloco.wire.state_messages import AskUpdate
from tests.support.builders import pipe
from tests.support.fakes import run_simulated


def test_an_update_that_comes_twice_is_kept_once() -> None:
    state = genesis_state(np.zeros(100, np.float32))
    part = Part(mask=b"\x01", data=encode(np.ones(100, np.float32), "int8"))
    header = UpdateHeader(step=0, parent=state.head, contributors=(("a", 5),), part_hashes=(part.hash,))
    update = Update(header=header, parts=(part,))

    async def main() -> None:
        updates = Updates(grid=Grid(n=100, codec="int8"), heads={1: header.head}, timeouts=Timeouts(), next_step=0)
        assert updates.request(0) == AskUpdate(step=0, head=header.head)
        assert updates.take() is None
        for _ in range(3):
            mine, theirs = pipe()
            await theirs.send_blob(update_to_bytes(update))
            await updates.receive(mine, 0)
            if updates.next_step == 0:
                assert updates.take() == (update, mine.peer_id)
        assert updates.take() is None
        assert not updates.ready

    run_simulated(main())
