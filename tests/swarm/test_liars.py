"""Six of the worst liars, as real processes among honest ones: one swarm, which one liar after another comes to.

Each does what all do until it is known, for only who is known leads and reduces, and lies from then on. It is told in
what honest peers have written down that the lie was told, and the honest ones go on as if it had not been. Of each
place that one can lie at, they are among the worst kinds of ``docs/trust.md``:

    flipped, largest weight    a contribution: one that a plain mean would be ruined by
    mean x-10                  a reducer: a false mean, the same to everybody, which shows when it is taken again
    two commits                a leader: two updates of one round, each with as many signatures as it can get
    two rosters                a leader: two groups on one head
    decides nothing            who holds up the others: it leads, and says that it is there as long as it is asked
    extends alone              who claims a history: updates that nobody has made with it
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import pytest

from p2p_diloco.core.event import E, RoundEnded, of_kind
from p2p_diloco.core.events import EventTail
from p2p_diloco.core.known import WINDOW_STEPS
from p2p_diloco.core.roster import open_readiness
from p2p_diloco.core.trust_event import PeerBarred, ReducerFound, StateDisputed, WitnessAsked
from p2p_diloco.core.update import parts_with
from p2p_diloco.lab.children import LOOPBACK
from p2p_diloco.ledger.folder import find_run, load_run, open_ledger, same_files
from tests.support.builders import identity
from tests.swarm.places import START_S, Place, Program, as_flags, descendants, wait_until

HONEST = ("ada", "ben", "cat", "dan")
PATIENCE = "0.3"
"""Factor on all time-outs: a leader that decides nothing is waited for for 13 s, and not for 45 s."""
WAIT_S = 4 * START_S
"""For a liar to start, and to be known, and to have told its lie."""
LEAST_STEPS = 6
"""Outer steps of all honest peers, from the one on at which the lie is seen."""


@dataclass(frozen=True)
class Liar:
    """A liar that has come to the swarm."""

    name: str
    peer_id: str
    program: Program


Told: TypeAlias = Callable[["Swarm", Liar], bool]
"""Whether honest peers have written down that this one has lied."""


class Swarm:
    """A seed and honest trainers, which train until all tests of this file are over, and what they have written."""

    def __init__(self, place: Place) -> None:
        self.place = place
        seed = place.seed(patience=PATIENCE)
        wait_until(lambda: "--initial-peers" in seed.text, seed, limit_s=WAIT_S)
        self.address = seed.address
        self.programs = [seed, *(self._peer(name, "-m", "tests.support.paced") for name in HONEST)]
        self._tails = {name: EventTail(place.root / name) for name in ("seed", *HONEST)}

    def events(self, kind: type[E], *names: str) -> list[E]:
        """Of all honest peers and the seed, or of some of them."""
        for tail in self._tails.values():
            tail.read()
        return [event for name in names or self._tails for event in of_kind(self._tails[name].log, kind)]

    def heads(self, name: str) -> dict[int, str]:
        """Outer step -> head, of the rounds that an honest peer has committed."""
        return {event.step: event.head for event in self.events(RoundEnded, name) if event.committed}

    @property
    def step(self) -> int:
        """The newest outer step that all honest peers have committed together, with one head; 0 before the first."""
        heads = [self.heads(name) for name in HONEST]
        steps = set(heads[0]).intersection(*heads)
        return max((step for step in steps if len({of[step] for of in heads}) == 1), default=0)

    def join(self, number: int, lie: str) -> Liar:
        """Starts a liar, which is ``identity(number)``: those who invent updates sign with such keys."""
        name, who = f"liar-{number}", identity(number)
        who.save(self.place.root / name / "identity.key")
        return Liar(name, who.peer_id, self._peer(name, "-m", "tests.support.liar_process", lie))

    def _peer(self, name: str, *program: str) -> Program:
        """Starts a program that has the options of ``p2p-diloco peer``."""
        flags = {"folder": str(self.place.root / name), "host-maddrs": LOOPBACK, "name": name, "patience": PATIENCE}
        flags |= {"data": str(self.place.root / "text"), "threads": "1", "device": "cpu"}
        return self.place.run(name, *program, "peer", "--initial-peers", self.address, *as_flags(flags))

    def wait_until_seen(self, told: Told, liar: Liar) -> None:
        """Looks once an outer step, for to look at a ledger takes long."""
        looked_at = 0

        def seen() -> bool:
            nonlocal looked_at
            if self.step == looked_at:
                return False
            looked_at = self.step
            return told(self, liar)

        self.wait_until(seen, liar.program)

    def wait_until(self, condition: Callable[[], object], *others: Program) -> None:
        wait_until(condition, *self.programs, *others, limit_s=WAIT_S)

    def check_honest(self) -> None:
        """Nobody honest has another head than others, or is blamed by one, and what they have on their disks is
        sound."""
        self.place.check_heads(*HONEST)
        liars = {identity(number).peer_id for number in range(len(TOLD) + 1)}
        blamed = {event.peer for event in self.events(PeerBarred)}
        blamed |= {event.reducer for event in self.events(ReducerFound)}
        blamed |= {other for event in self.events(StateDisputed) for other in event.others}
        assert blamed <= liars
        verify = self.place.start("verify", "verify", str(self.place.root / HONEST[0]))
        assert verify.process.wait(START_S) == 0, verify.text


def is_left_out(swarm: Swarm, liar: Liar) -> bool:
    """It has claimed the largest weight in a round, and no part of the update has its contribution in it."""
    run = find_run(swarm.place.root / HONEST[0])
    manifest = load_run(run)
    with same_files(run) as view:
        ledger = open_ledger(view, manifest)
        for step in ledger.heads():
            entry, update = ledger.chain.entry(step), ledger.update(step)
            members = map(open_readiness, entry.certificate.roster.members if entry and update else ())
            claimed = (liar.peer_id, manifest.spec.max_weight_tokens) in ((one.peer_id, one.weight) for one in members)
            if update and claimed and not parts_with(update, liar.peer_id):
                return True
    return False


def is_found_wrong(swarm: Swarm, liar: Liar) -> bool:
    """An honest peer has taken a mean of its again, and come to another one."""
    return any((event.reducer, event.kind) == (liar.peer_id, "wrong") for event in swarm.events(ReducerFound))


def is_barred(*why: str) -> Told:
    """All honest peers hold a proof that it has signed two."""

    def barred(swarm: Swarm, liar: Liar) -> bool:
        found = (swarm.events(PeerBarred, name) for name in ("seed", *HONEST))
        return all(any(event.peer == liar.peer_id and event.why in why for event in events) for events in found)

    return barred


def is_given_up(swarm: Swarm, liar: Liar) -> bool:
    """Honest members of a round that it led have not waited for its decision any longer, and settled without it."""
    said = f"without {liar.peer_id[-8:]}: promises a word, and does not come to it"
    left = [program.name for program in swarm.programs if said in program.text]
    return any(
        event.committed and liar.peer_id in event.lost for name in left for event in swarm.events(RoundEnded, name)
    )


def is_not_followed(swarm: Swarm, liar: Liar) -> bool:
    """All honest peers have seen that what it claims has no certificate that holds, and the owner has not helped it."""
    said = f"donor {liar.name} dropped: serves a chain that is not sound"
    refused = any(not event.signed for event in swarm.events(WitnessAsked, "seed"))
    return refused and all(said in program.text for program in swarm.programs)


TOLD: dict[str, Told] = {
    "flipped, largest weight": is_left_out,
    "mean x-10": is_found_wrong,
    "two commits": is_barred("links", "parts"),
    "two rosters": is_barred("rosters"),
    "decides nothing": is_given_up,
    "extends alone": is_not_followed,
}


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    """When the tests are over, all of it ends as it should, and leaves nothing behind."""
    place = Place(inner_steps=10, snapshot_every=4)
    try:
        swarm = Swarm(place)
        swarm.wait_until(lambda: swarm.step >= WINDOW_STEPS)
        yield swarm
        for program in swarm.programs:
            program.process.send_signal(signal.SIGINT)
        for program in swarm.programs:
            assert program.process.wait(START_S) == 0, program.text
            assert "Traceback" not in program.text
        place.assert_nothing_left()
    finally:
        place.clear()


@pytest.mark.parametrize(("number", "lie"), list(enumerate(TOLD, 1)), ids=TOLD)
def test_honest_peers_see_that_one_lies_and_go_on(swarm: Swarm, number: int, lie: str) -> None:
    liar = swarm.join(number, lie)
    swarm.wait_until_seen(TOLD[lie], liar)
    seen = swarm.step
    swarm.wait_until(lambda: swarm.step >= seen + LEAST_STEPS, liar.program)
    processes = descendants(liar.program.process.pid)
    liar.program.process.send_signal(signal.SIGINT)
    assert liar.program.process.wait(START_S) == 0, liar.program.text
    swarm.wait_until(lambda: liar.program.gone(processes), liar.program)
    swarm.check_honest()
