"""Which donor is asked for which item. Whole downloads, with donors that lie, are in ``test_catchup``."""

from __future__ import annotations

from collections import deque

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from p2p_diloco.core.codecs import encode
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.grid import Grid
from p2p_diloco.core.outer import genesis_state
from p2p_diloco.core.update import Part, Update, UpdateHeader, update_to_bytes
from p2p_diloco.peer.download import COPIES, LATE, LEAST_LATE_S, RECENT, Handout, Updates
from p2p_diloco.wire.state_messages import AskUpdate
from tests.support.builders import pipe
from tests.support.fakes import run_simulated

LATE_S = 5.0


def handout(items: int = 3, limit: int = 100) -> Handout:
    return Handout(range(items), limit=limit, late_s=LATE_S, took_s=deque(maxlen=RECENT))


def test_every_item_is_asked_for_once_the_lowest_first() -> None:
    queue = handout()
    assert [queue.take(donor, 0.0) for donor in ("a", "b", "a", "b")] == [0, 1, 2, None]
    assert queue.missing == {0, 1, 2}
    assert [queue.arrived(1, "b", 1.0), queue.arrived(0, "a", 1.0), queue.arrived(2, "a", 1.0)] == [True, True, True]
    assert not queue.missing


def test_what_a_donor_owed_that_was_dropped_goes_to_the_next_one() -> None:
    queue = handout()
    assert [queue.take("a", 0.0), queue.take("b", 0.0), queue.take("a", 0.0)] == [0, 1, 2]
    assert queue.arrived(0, "a", 0.5)
    queue.give_back("a")
    assert [queue.take("b", 1.0), queue.take("b", 1.0)] == [2, None]
    queue.give_back("a")
    assert queue.take("c", 1.0) is None


def test_items_beyond_the_limit_wait() -> None:
    queue = handout(limit=1)
    assert [queue.take("a", 0.0), queue.take("b", 0.0)] == [0, None]
    queue.limit = 2
    assert [queue.take("b", 0.0), queue.take("b", 0.0)] == [1, None]


def test_what_the_last_download_took_tells_when_the_first_item_of_the_next_one_is_late() -> None:
    """Of who follows every outer step each update is a download by itself."""
    took_s: deque[float] = deque(maxlen=RECENT)
    for number in range(2):
        queue = Handout([number], limit=100, late_s=LATE_S, took_s=took_s)
        assert queue.take("a", 0.0) == number
        late_s = LATE * 0.5 if number else LATE_S
        assert queue.wait_s(0.0) == late_s
        assert [queue.take("b", late_s - 0.1), queue.take("b", late_s)] == [None, number]
        assert queue.arrived(number, "a", 0.5)


def test_what_is_late_is_asked_from_one_more_donor() -> None:
    queue = handout(2)
    assert [queue.take("a", 0.0), queue.take("b", 1.0)] == [0, 1]
    assert queue.wait_s(2.0) == LATE_S - 2.0
    assert queue.take("b", LATE_S - 0.1) is None
    assert queue.take("a", LATE_S) is None  # it owes that item itself
    assert queue.take("c", LATE_S) == 0
    assert queue.take("d", LATE_S) is None
    assert queue.wait_s(LATE_S) == 1.0
    assert queue.take("d", LATE_S + 1.0) == 1
    assert queue.take("e", 100.0) is None
    assert queue.arrived(0, "c", LATE_S + 1.5)
    assert not queue.arrived(0, "a", 100.0)
    queue.give_back("a")
    queue.give_back("c")
    assert queue.missing == {1}
    assert queue.take("a", 100.0) is None
    queue.give_back("b")
    assert queue.take("a", 100.0) == 1


def test_a_new_item_comes_before_a_late_one() -> None:
    queue = handout(2)
    assert queue.take("a", 0.0) == 0
    assert queue.take("b", 100.0) == 1
    assert queue.take("b", 100.0) == 0


def test_once_items_have_come_late_is_what_takes_much_longer_than_those() -> None:
    queue = handout(6)
    for item, took_s in ((0, 2.0), (1, 3.0), (2, 100.0)):
        assert queue.take("a", 0.0) == item
        assert queue.arrived(item, "a", took_s)
    assert queue.take("a", 200.0) == 3
    assert queue.wait_s(200.0) == LATE * 3.0
    assert queue.take("b", 200.0) == 4
    assert queue.take("c", 200.0) == 5
    assert queue.take("d", 200.0 + LATE * 3.0 - 0.1) is None
    assert queue.take("d", 200.0 + LATE * 3.0) == 3
    for item, donor in ((4, "b"), (5, "c")):
        assert queue.arrived(item, donor, 200.001)
    assert queue.arrived(3, "d", 210.0)
    quick = handout(2)
    assert [quick.take("a", 0.0), quick.take("b", 0.0)] == [0, 1]
    assert quick.arrived(0, "a", 0.001)
    assert quick.wait_s(0.001) == LEAST_LATE_S - 0.001


def test_when_nothing_can_be_late_there_is_no_hurry() -> None:
    assert handout(0).wait_s(7.0) == LATE_S
    queue = handout(1)
    queue.take("a", 0.0)
    queue.take("b", LATE_S)
    assert queue.wait_s(2 * LATE_S) == LATE_S


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


class Donors(RuleBasedStateMachine):
    """Whatever donors do, nothing is lost, and nothing is asked for more often than it should."""

    @initialize(items=st.sets(st.integers(0, 20), max_size=8), limit=st.integers(0, 25))
    def begin(self, items: set[int], limit: int) -> None:
        self.items, self.now_s = items, 0.0
        self.queue = Handout(items, limit=limit, late_s=LATE_S, took_s=deque(maxlen=RECENT))
        self.owed: dict[str, list[int]] = {name: [] for name in "abc"}
        self.came: set[int] = set()

    @rule(donor=st.sampled_from("abc"), pause_s=st.sampled_from([0.0, 1.0, LATE_S]))
    def take(self, donor: str, pause_s: float) -> None:
        self.now_s += pause_s
        before = {item: sum(item in owed for owed in self.owed.values()) for item in self.items}
        item = self.queue.take(donor, self.now_s)
        if item is None:
            free = [i for i in self.items - self.came if not before[i] and i < self.queue.limit]
            assert not free
            return
        assert item in self.items - self.came
        assert item not in self.owed[donor]
        assert before[item] < COPIES
        assert item < self.queue.limit
        self.owed[donor].append(item)

    @precondition(lambda self: any(self.owed.values()))
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        donor = data.draw(st.sampled_from([name for name in "abc" if self.owed[name]]))
        item = self.owed[donor].pop(0)
        assert self.queue.arrived(item, donor, self.now_s) == (item not in self.came)
        self.came.add(item)

    @rule(donor=st.sampled_from("abc"))
    def dropped(self, donor: str) -> None:
        self.queue.give_back(donor)
        self.owed[donor].clear()

    @rule(more=st.integers(0, 5))
    def allow(self, more: int) -> None:
        self.queue.limit += more

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "queue"):
            assert self.queue.missing == self.items - self.came
            assert 0 <= self.queue.wait_s(self.now_s) < 1000

    def teardown(self) -> None:
        """In the end one donor alone can give all that is left."""
        if hasattr(self, "queue"):
            self.queue.limit = 100
            for donor in "abc":
                self.queue.give_back(donor)
            while (item := self.queue.take("d", self.now_s)) is not None:
                assert self.queue.arrived(item, "d", self.now_s)
            assert not self.queue.missing


TestDonors = Donors.TestCase
