"""What peers cost that do not answer, are idle in rounds, or promise: a short form of what docs/reliability.md says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from p2p_diloco.core import grid
from p2p_diloco.core.waiting import now_s
from p2p_diloco.round.settle import Settlement
from tests.support.fakes import SimPeer, run_simulated
from tests.support.lies_in_rounds import decides_nothing, tells_no_other
from tests.support.lying import Liar, override
from tests.support.stallers import (
    INNER_STEPS,
    STEP_S,
    Answer,
    Boaster,
    Idler,
    Swarm,
    busy,
    promises,
    silent,
    stalls,
)

PHASES = 12
"""Inner phases that a run takes here, most of which can be made into outer steps."""
PHASE_S = INNER_STEPS * STEP_S


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every member reduces some."""
    monkeypatch.setattr(grid, "PART_VALUES", 100)


def made(folder: Path, join: Callable[[Swarm], None], *, after: int = 0) -> int:
    """The outer steps that four honest trainers make in PHASES phases and a half, from ``after`` on, when ``join``
    is called."""

    async def main() -> int:
        swarm = Swarm(folder)
        await swarm.start()
        await swarm.until(after)
        join(swarm)
        return await swarm.made_in(PHASE_S * (PHASES + 0.5))

    return run_simulated(main())


def strangers(count: int, answer: Answer) -> Callable[[Swarm], None]:
    def join(swarm: Swarm) -> None:
        for number in range(count):
            swarm.stranger(number, answer)

    return join


def test_nobody_loses_an_outer_step_where_all_are_honest(tmp_path: Path) -> None:
    assert made(tmp_path, strangers(0, silent)) == PHASES


@pytest.mark.parametrize("count", [5, 50])
def test_silent_records_cost_nothing(tmp_path: Path, count: int) -> None:
    assert made(tmp_path, strangers(count, silent)) >= PHASES - 1


@pytest.mark.parametrize("answer", [promises, busy, stalls])
@pytest.mark.parametrize("after", [0, 3])
def test_one_that_promises_costs_its_credit(tmp_path: Path, answer: Answer, after: int) -> None:
    """A few waits of about a phase each, in all leaders' rounds together, and then none for long."""
    assert made(tmp_path, strangers(1, answer), after=after) >= PHASES - 4


@pytest.mark.parametrize("honest_steps", [0, 3])
def test_idle_members_cost_two_rounds(tmp_path: Path, honest_steps: int) -> None:
    """Eight of twelve, so that nothing can commit with them."""

    async def main() -> None:
        swarm = Swarm(tmp_path)
        await swarm.start()
        for i in range(8):
            idler = swarm.add(20 + i, Idler)
            assert isinstance(idler, Idler)
            idler.honest_steps = honest_steps
        await swarm.until(honest_steps)
        assert await swarm.made_in(PHASE_S * (PHASES + 0.5)) >= PHASES - 4
        groups = [result.group for result in swarm.honest[0].results if result.committed]
        assert groups[-5:] == [4] * 5

    run_simulated(main())


async def with_liar(folder: Path, lie: Callable[[Liar], None]) -> tuple[Swarm, SimPeer]:
    """Honest peers that have begun, and one that lies in every round."""
    swarm = Swarm(folder)
    await swarm.start()
    liar = swarm.add(20)
    lie(Liar(peer=liar.peer, lying=lambda: True, accomplices=()))
    return swarm, liar


def test_a_leader_that_never_decides_pays_for_what_was_waited(tmp_path: Path) -> None:
    """Also where the next one brings the round to its end; and nobody else pays."""

    async def main() -> None:
        swarm, liar = await with_liar(tmp_path, decides_nothing)
        results = swarm.honest[0].results
        while not (slow := [result for result in results if result.settle_s > PHASE_S]):
            await asyncio.sleep(STEP_S)
            assert swarm.step < 2 * PHASES
        assert slow[0].committed
        ids = [sim.peer.identity.peer_id for sim in (liar, *swarm.honest)]
        for sim in swarm.honest:
            rounds = sim.peer.matchmaker.company.rounds
            others = [rounds.left_s(peer_id, now_s()) for peer_id in ids if peer_id != sim.peer.identity.peer_id]
            assert others[0] < rounds.full_s / 2
            assert others[1:] == [rounds.full_s] * 3

    run_simulated(main())


def test_a_reducer_that_says_nothing_of_another_update_costs_its_credit(tmp_path: Path) -> None:
    """Each time a member waits for ``heartbeat_s``, and then such a reducer is left out; and nobody else pays."""

    async def main() -> None:
        swarm, liar = await with_liar(tmp_path, tells_no_other)
        ids = [sim.peer.identity.peer_id for sim in (liar, *swarm.honest)]
        company, results = swarm.honest[0].peer.matchmaker.company, swarm.honest[0].results
        while not company.rounds.in_debt(ids[0], now_s()):
            await asyncio.sleep(STEP_S)
            assert swarm.step < 4 * PHASES
        for sim in swarm.honest:
            rounds = sim.peer.matchmaker.company.rounds
            assert all(rounds.left_s(i, now_s()) == rounds.full_s for i in ids[1:] if i != sim.peer.identity.peer_id)
        await swarm.until(swarm.step + 2)
        assert results[-1].group == len(swarm.honest)
        assert results[-1].settle_s < liar.peer.here.timeouts.heartbeat_s / 2
        assert all(result.committed for result in results[1:])

    run_simulated(main())


def test_a_known_peer_beside_the_round_pays_for_what_was_waited(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Swarm(tmp_path)
        await swarm.start()
        await swarm.until(1)
        sim = swarm.honest[0]
        assert sim.peer.outer_steps is not None
        attempts, silent_one = sim.peer.outer_steps.attempts, swarm.honest[1].peer.identity.peer_id

        def met(real: Callable[..., Settlement]) -> Callable[..., Settlement]:
            def meet(*round_: object) -> Settlement:
                settlement = real(*round_)

                async def answered() -> None:
                    settlement.rosters.late_s = {silent_one: 3.0}

                override(settlement.rosters, "answered", lambda _: answered)
                return settlement

            return meet

        override(attempts, "_meet", met)
        await swarm.until(2)
        rounds = attempts.matchmaker.company.rounds
        assert rounds.full_s - 3.0 <= rounds.left_s(silent_one, now_s()) < rounds.full_s

    run_simulated(main())


def test_nothing_is_told_to_the_seeds_any_more_when_a_peer_has_ended(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Swarm(tmp_path)
        await swarm.start()
        sim = swarm.honest[0]
        telling = sim.peer.attempts._telling = asyncio.create_task(asyncio.sleep(500))
        await sim.peer.attempts.close()
        assert telling.done()

    run_simulated(main())


def planned(folder: Path, boasts: bool, step_s: tuple[float, ...]) -> list[list[int]]:
    """What the honest plan after each of the later outer steps."""

    async def main() -> list[SimPeer]:
        swarm = Swarm(folder)
        await swarm.start(len(step_s), step_s=step_s)
        if boasts:
            swarm.add(20, Boaster)
        await asyncio.sleep(PHASE_S * 8)
        return swarm.honest

    return [[result.planned for result in sim.results[3:]] for sim in run_simulated(main())]


@pytest.mark.parametrize("boasts", [False, True])
def test_a_claimed_speed_changes_no_plan(tmp_path: Path, boasts: bool) -> None:
    fast, also_fast, slow = planned(tmp_path, boasts, (STEP_S, STEP_S, 2 * STEP_S))
    assert set(fast) | set(also_fast) == {INNER_STEPS}
    assert set(slow) == {INNER_STEPS // 2}


def test_a_peer_that_is_stopped_for_a_while_takes_part_again(tmp_path: Path) -> None:
    async def main() -> None:
        swarm = Swarm(tmp_path)
        await swarm.start()
        await swarm.until(2)
        stopped = swarm.honest[0]
        swarm.network.stop(stopped.peer.identity.peer_id)
        await asyncio.sleep(2 * PHASE_S)
        swarm.network.resume(stopped.peer.identity.peer_id)
        await asyncio.sleep(4 * PHASE_S)
        assert len({sim.peer.seat.standing.head for sim in swarm.honest}) == 1
        assert [result.group for result in swarm.honest[1].results if result.committed][-2:] == [4, 4]

    run_simulated(main())
