"""What a trainer keeps of its inner state, beside training: a thread copies and writes while inner steps go on.

A write takes seconds at 150 million parameters, and an inner step must not wait for it. The moments need not be as new
as the last inner step, and are copied one parameter at a time (``InnerOptimizer.save``). Local parameters are another
matter: a contribution stands for as many tokens as they have seen. They are copied at once, while the next inner step
computes its gradients, and only where they are not theta.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.errors import LedgerError
from p2p_diloco.learn.inner import InnerOptimizer

log = logging.getLogger(__name__)


class Keeper:
    """Writes one trainer's inner state to ``path``, one write at a time. Use it from the thread that trains."""

    def __init__(self, inner: InnerOptimizer, path: Path) -> None:
        self.inner = inner
        self.path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inner state")
        self._write: Future[None] | None = None

    def begin(self, local: Vector, *, head: str, inner_step: int, tokens: int) -> None:
        """Begins to write the state as it is now, beside training. ``tokens``: those that ``local`` has seen since
        theta; it is left out where there are none, and else must stay as it is until the next inner step, as a step
        changes parameters only when they have been copied. Where an earlier write goes on still, that one is new
        enough. Raises as ``check``."""
        self.check()
        if self.writing:
            log.info("the inner state is still being written since an earlier outer step; this one is not kept")
            return
        held = threading.Event()
        self._write = self._thread.submit(
            self._copy_and_save, local if tokens else local[:0], held, head, inner_step, tokens
        )
        held.wait()  # until the other thread runs, not until it has copied anything

    @property
    def writing(self) -> bool:
        """Tells whether a write is under way, or has ended without ``check`` having been asked how."""
        return self._write is not None

    def check(self) -> None:
        """Raises what ended the last write, if it failed: LedgerError on a full disk."""
        if self._write is not None and self._write.done():
            ended, self._write = self._write, None
            ended.result()

    def finish(self) -> None:
        """Waits for the write that is under way, if any, so that the final one does not race it. Where the disk failed
        this one, the final one says so, or makes good for it."""
        if self._write is not None:
            with suppress(LedgerError):
                self._write.result()
        self._thread.shutdown()

    def _copy_and_save(self, local: Vector, held: threading.Event, head: str, inner_step: int, tokens: int) -> None:
        with self.inner.changing:
            held.set()
            local = local.copy()
        self.inner.save(self.path, local, head=head, inner_step=inner_step, tokens=tokens)
