"""An event loop with a clock that jumps, and peers in it that die and stop as processes do.

``SimLoop`` has no real time: where a real loop would wait, its clock moves on at once, so a minute of a swarm takes as
long as its computations. Threads are run inline. A schedule is therefore the same every time.

Everything that runs belongs to an *incarnation*, one life of one peer, or to nobody: the test, the network between the
peers. Which one is a context variable, and tasks, timers and callbacks inherit it. A dead incarnation runs nothing any
more, not even a ``finally``, as after SIGKILL; what a stopped one would have run waits, as after SIGSTOP.
"""

from __future__ import annotations

import asyncio
import contextvars
import selectors
import warnings
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

START_S = 1_000_000.0
LONGEST_S = 5_000.0
THREAD_S = 0.01
TASKS_BEFORE_TIDYING = 64
LAST_AWAITS = 100
"""How often a coroutine of the dead may await something while it is closed."""


class Cut(BaseException):
    """Raised where a peer is killed in the middle of a thread's work."""


@dataclass(eq=False)
class Incarnation:
    """One life of a peer: from its start until it is killed. Use ``run`` for whatever it shall do first."""

    name: str = ""
    alive: bool = True
    stopped: bool = False
    thread_s: float = THREAD_S
    """How long the work of a thread takes."""
    in_thread: bool = False
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    """All that were created and may still run. Those of the dead are kept here until the loop ends."""
    parked: list[tuple[asyncio.Handle, _Guard, Context]] = field(default_factory=list)
    death: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.context = Context()
        self.context.run(RUNNING.set, self)

    @property
    def runs(self) -> bool:
        return self.alive and not self.stopped

    def run(self, call: Callable[..., T], *args: Any) -> T:
        """``call(*args)`` as this incarnation."""
        return self.context.copy().run(call, *args)

    def unfinished(self) -> list[asyncio.Task[Any]]:
        return [task for task in self.tasks if not task.done()]

    def die(self) -> None:
        self.alive = False
        self.parked.clear()
        self.death.set()

    async def end_of(self, task: asyncio.Task[Any]) -> None:
        """Until ``task`` is done, or never will be."""
        death = asyncio.ensure_future(self.death.wait())
        await asyncio.wait((task, death), return_when=asyncio.FIRST_COMPLETED)
        death.cancel()

    def stop(self) -> None:
        self.stopped = True

    def resume(self) -> None:
        """What came due meanwhile runs now, in that order."""
        self.stopped = False
        parked, self.parked = self.parked, []
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        for handle, guard, context in parked:
            loop.run_parked(handle, guard, context)


RUNNING: ContextVar[Incarnation | None] = ContextVar("RUNNING", default=None)
NOBODY = Context()
"""The context of what no peer does."""


class _Guard:
    """A callback of a peer, at the moment when the loop wants to run it."""

    __slots__ = ("args", "callback", "context", "handle", "loop", "owner")

    def __init__(
        self,
        loop: SimLoop,
        owner: Incarnation,
        callback: Callable[..., Any],
        args: tuple[Any, ...],
        context: Context,
    ) -> None:
        self.loop, self.owner, self.callback, self.args, self.context = loop, owner, callback, args, context
        self.handle: asyncio.Handle | None = None

    def __call__(self) -> None:
        if self.owner.runs:
            self.callback(*self.args)
            self.loop.watch()
        elif self.owner.alive and self.handle is not None:
            self.owner.parked.append((self.handle, self, self.context))


class _JumpingSelector(selectors.DefaultSelector):
    """Never waits: tells the loop's clock how long it would have."""

    loop: SimLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise AssertionError("the swarm waits for something that never happens")
        self.loop.now_s += max(timeout, 0.0)
        if self.loop.now_s > self.loop.ends_s:
            raise AssertionError(f"the swarm is still busy after {LONGEST_S:.0f} s")
        return []


class SimLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now_s = START_S
        self.ends_s = START_S + LONGEST_S
        self.incarnations: set[Incarnation] = set()
        """All that have created a task."""
        self.watch: Callable[[], None] = lambda: None
        """Called whenever a peer has made a step."""
        selector = _JumpingSelector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now_s

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        owner = RUNNING.get() if context is None else context.get(RUNNING)
        if owner is None:
            return super().call_soon(callback, *args, context=context)
        guard = _Guard(self, owner, callback, args, contextvars.copy_context() if context is None else context)
        handle = guard.handle = super().call_soon(guard, context=guard.context)
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        owner = RUNNING.get() if context is None else context.get(RUNNING)
        if owner is None:
            return super().call_at(when, callback, *args, context=context)
        guard = _Guard(self, owner, callback, args, contextvars.copy_context() if context is None else context)
        handle = guard.handle = super().call_at(when, guard, context=guard.context)
        return handle

    def run_parked(self, handle: asyncio.Handle, guard: _Guard, context: Context) -> None:
        super().call_soon(lambda: None if handle.cancelled() else guard(), context=context)

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        task = super().create_task(coro, **options)
        owner = RUNNING.get()
        if owner is not None:
            self.incarnations.add(owner)
            if len(owner.tasks) >= TASKS_BEFORE_TIDYING and owner.alive:
                owner.tasks = set(owner.unfinished())
            owner.tasks.add(task)
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """The work of a thread is done all at once, THREAD_S later, also when nobody waits for it any more; a peer that
        dies before never does it."""
        future: asyncio.Future[T] = self.create_future()
        owner = RUNNING.get()

        def work() -> None:
            if owner is not None:
                owner.in_thread = True
            try:
                result = func(*args)
            except Cut:
                return
            except Exception as error:
                if not future.cancelled():
                    future.set_exception(error)
            else:
                if not future.cancelled():
                    future.set_result(result)
            finally:
                if owner is not None:
                    owner.in_thread = False

        self.call_later(THREAD_S if owner is None else owner.thread_s, work)
        return future


def run_simulated(main: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run, on a SimLoop; an exception in any task, even one nobody awaits, fails the test."""
    loop = SimLoop()
    unheard: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: unheard.append(context))
    try:
        result = loop.run_until_complete(main)
    finally:
        try:
            loop.ends_s = loop.now_s + LONGEST_S
            loop.run_until_complete(_end(loop))
        finally:
            loop.close()
    assert not unheard, unheard
    return result


async def _end(loop: SimLoop) -> None:
    """Cancel what still runs; close what the dead have left, which no cancellation reaches."""
    for incarnation in loop.incarnations:
        if incarnation.alive and incarnation.stopped:
            incarnation.resume()
        if not incarnation.alive:
            _bury(incarnation)
    of_the_dead = {task for incarnation in loop.incarnations if not incarnation.alive for task in incarnation.tasks}
    pending = asyncio.all_tasks(loop) - of_the_dead - {asyncio.current_task()}
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for incarnation in loop.incarnations:
        for task in incarnation.tasks:
            if task.done() and not task.cancelled() and task._log_traceback:
                loop.call_exception_handler({"message": "nobody heard of it", "exception": task.exception()})


def _bury(incarnation: Incarnation) -> None:
    """Nobody shall hear of what the tasks of the dead left undone, or of what they might yet have told."""
    buried: set[asyncio.Task[Any]] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while incarnation.tasks - buried:
            task = (incarnation.tasks - buried).pop()
            buried.add(task)
            if not task.done():
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                incarnation.run(_close, task.get_coro())
            elif not task.cancelled():
                task.exception()


def _close(coroutine: Any) -> None:
    for _ in range(LAST_AWAITS):
        try:
            coroutine.close()
        except RuntimeError:
            continue  # it awaits something in a ``finally``
        except BaseException:
            return
        return
