"""Carries out a plan of faults on real processes, from outside: ``faults`` decides, ``children`` acts."""

from __future__ import annotations

import time
from collections import Counter

from p2p_diloco.core.event import Event, PhaseBegan, latest
from p2p_diloco.lab.child import Child
from p2p_diloco.lab.children import Children
from p2p_diloco.lab.faults import Act, Done, FaultPlan, due, restarts_to_come, waits_for_phase

POLL_S = 0.25
PHASE_POLL_S = 0.004
"""While a phase is waited for, which may last 50 ms. To look at the logs of five peers takes half a millisecond."""


class Injector:
    """Carries out one plan. Its time begins with ``start``: what the event logs said before is no reason for a
    fault."""

    def __init__(self, plan: FaultPlan, children: Children) -> None:
        self.plan, self.children = plan, children
        self.done: list[Done] = []
        self.started_s = 0.0
        self._seen: Counter[str] = Counter()
        """Events of each peer that have been considered."""

    def start(self) -> None:
        """Starts the clock of the plan."""
        self.started_s = time.monotonic()

    @property
    def poll_s(self) -> float:
        """Returns in how many seconds to poll again."""
        return PHASE_POLL_S if waits_for_phase(self.plan, self.done) else POLL_S

    @property
    def restarts_to_come(self) -> bool:
        """Returns whether a peer that is killed now will be started again."""
        return restarts_to_come(self.plan, self.done)

    def poll(self) -> list[Done]:
        """Does what is due, and returns what was done. LocalError when it cannot be done."""
        acts = due(
            self.plan,
            time.monotonic() - self.started_s,
            fresh={child.name: self._fresh(child) for child in self.children.all},
            done=self.done,
            trainers=[child.name for child in self.children.trainers],
            running=[child.name for child in self.children.all if child.running],
        )
        new = [self._carry_out(act) for act in acts if act.action != "restart" or self.children.can_start(act.peer)]
        self.done += new
        return new

    def _fresh(self, child: Child) -> list[Event]:
        child.tail.read()
        seen, self._seen[child.name] = self._seen[child.name], len(child.log)
        return [event for event in child.log[seen:] if event.mono_s >= self.started_s]

    def _carry_out(self, act: Act) -> Done:
        now_s = time.monotonic()
        last = latest(self.children.named(act.peer).log, PhaseBegan)
        pids = self.children.carry_out(act)
        return Done(
            act=act,
            at_s=now_s - self.started_s,
            mono_s=now_s,
            pids=pids,
            phase=last.phase if last else "",
            step=last.step if last else 0,
        )
