"""Simulated time: one heap of things to come, one source of randomness, one trace.

Theory. Everything that happens is a call that stands in a heap under its time; between two calls
nothing happens. All randomness comes from one `random.Random`, and nothing here or in what is
simulated iterates over a set whose order depends on addresses or on the hash seed of strings. So
a seed names one history, and runs it again whenever it is given.

A `Process` is what can be killed and frozen: whatever reaches it goes through `Process.deliver`,
which drops it (dead), keeps it (frozen, as the kernel keeps what comes in for a stopped process),
or calls it. What a process does over several steps is written as a coroutine, which awaits
`Wish`es; `Process.start` runs it. A killed process's coroutines are never resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from heapq import heappop, heappush
from random import Random
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")

ROUNDING_S = 1e-6
"""A timer of a host's clock fires so much late, never early, whatever is rounded."""

Resume = Callable[[object], None]
"""Takes a value, or an exception to be raised."""


class Wish(Generic[T]):
    """Something that a coroutine waits for: ``begin`` is given what to call with the answer."""

    __slots__ = ("begin",)

    def __init__(self, begin: Callable[[Resume], None]) -> None:
        self.begin = begin

    def __await__(self) -> Generator[Wish[T], object, T]:
        return cast("T", (yield self))


class World:
    """The heap, the clock of the simulation, the dice, and the trace."""

    def __init__(self, seed: int, *, tracing: bool = False) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.now = 0.0
        self.events = 0
        self.tracing = tracing
        self.lines: list[str] = []
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._serial = 0

    def at(self, time: float, call: Callable[..., None], *arguments: object) -> None:
        """Make ``call`` at ``time``; what has the same time happens in the order of asking."""
        self._serial += 1
        heappush(self._heap, (time, self._serial, call, arguments))

    def after(self, delay_s: float, call: Callable[..., None], *arguments: object) -> None:
        """Make ``call`` in ``delay_s`` seconds."""
        self._serial += 1
        heappush(self._heap, (self.now + delay_s, self._serial, call, arguments))

    def run(self, until: float, events: int = 10_000_000) -> None:
        """Let everything happen up to ``until``."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            time, _, call, arguments = heappop(heap)
            self.now = time
            self.events += 1
            call(*arguments)
            if self.events > events:
                raise AssertionError(f"more than {events} events: something does not come to rest")
        self.now = until

    def chance(self, probability: float) -> bool:
        """Throw the dice."""
        return self.rng.random() < probability

    def trace(self, who: str, what: str) -> None:
        """A line for whoever reads the history of this seed; ask ``tracing`` before formatting."""
        if self.tracing:
            self.lines.append(f"{self.now:9.4f} {who:8} {what}")


class Process:
    """One life of a program on a host."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self.frozen = False
        self._inbox: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    def deliver(self, call: Callable[..., None], *arguments: object) -> None:
        """Let ``call`` happen in this process: now, when it is thawed, or never."""
        if not self.alive:
            return
        if self.frozen:
            self._inbox.append((call, arguments))
        else:
            call(*arguments)

    def freeze(self) -> None:
        """SIGSTOP."""
        self.frozen = True

    def thaw(self) -> None:
        """SIGCONT: what has come in meanwhile is read, in order."""
        if not self.frozen:
            return
        self.frozen = False
        inbox, self._inbox = self._inbox, []
        for call, arguments in inbox:
            self.deliver(call, *arguments)

    def kill(self) -> None:
        """SIGKILL."""
        self.alive = False
        self._inbox.clear()

    # -- coroutines ------------------------------------------------------------------------
    def start(
        self, coroutine: Coroutine[Any, Any, T], done: Callable[[T], None] | None = None
    ) -> None:
        """Run it until its first wish, and on; ``done`` gets what it returns.

        An exception that escapes from it ends the run: it is a mistake in the simulation, or in
        what is simulated.
        """
        self._resume(coroutine, done, None)

    def _resume(
        self,
        coroutine: Coroutine[Any, Any, Any],
        done: Callable[[Any], None] | None,
        value: object,
    ) -> None:
        try:
            wish = coroutine.throw(value) if isinstance(value, Exception) else coroutine.send(value)
        except StopIteration as end:
            if done is not None:
                done(end.value)
            return
        resume = _Resumption(self, coroutine, done)
        wish.begin(resume)

    def sleep(self, duration_s: float) -> Wish[None]:
        """A pause, in seconds of the world."""
        return Wish(lambda resume: self.world.after(duration_s, resume, None))


class _Resumption:
    """What a wish calls, once, in the process that had it."""

    __slots__ = ("_called", "_coroutine", "_done", "_process")

    def __init__(
        self,
        process: Process,
        coroutine: Coroutine[Any, Any, Any],
        done: Callable[[Any], None] | None,
    ) -> None:
        self._process = process
        self._coroutine = coroutine
        self._done = done
        self._called = False

    def __call__(self, value: object) -> None:
        assert not self._called, f"{self._coroutine} gets a second answer: {value}"
        self._called = True
        self._process.deliver(self._process._resume, self._coroutine, self._done, value)
