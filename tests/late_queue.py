"""The queue of a simulated GPU, for the stand-ins of CuPy and of torch's streams."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class LateQueue:
    """Work that runs as late as it may, when it is waited for; or, if the queue is eager, at once.

    Attributes:
        eager: Whether work runs at once.
        queue: The work that has not run.
    """

    def __init__(self, *, eager: bool = False) -> None:
        self.eager = eager
        self.queue: deque[Callable[[], Any]] = deque()
        self._queued = self._done = 0

    def put(self, work: Callable[[], Any]) -> None:
        self.queue.append(work)
        self._queued += 1
        if self.eager:
            self.synchronize()

    def record(self) -> SimpleNamespace:
        """Return an event that is done when all work queued so far is."""
        return SimpleNamespace(synchronize=lambda until=self._queued: self._run(until))

    def wait_event(self, event: SimpleNamespace) -> None:
        self.put(event.synchronize)

    def synchronize(self) -> None:
        self._run(self._queued)

    def _run(self, until: int) -> None:
        while self._done < until:
            self._done += 1
            self.queue.popleft()()
