"""The simulated LUN as `redirector.block.reservations` sees it.

`SimTarget` is its `Lun`, `SimDevice` its `BlockDevice`, as far as it asks, and `simulated_sleep`
its clock. So succession, the fence and what is made of unit attentions, as they run here, are the
product's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

from redirector.block import reservations
from redirector.block.arbiter import Op
from redirector.block.device import InitiatorPort, LoginFailed, RegisteredKeys, Reservation
from tests.sim.lun import LOGIN_LIMIT_S, SanLink, Session, SimLun
from tests.sim.world import Process, Resume, Wish, World


@contextmanager
def simulated_sleep(world: World) -> Iterator[None]:
    """Let `redirector.block.reservations` pause in simulated time, and log nothing."""

    def sleep(duration_s: float) -> Wish[None]:
        def begin(resume: Resume) -> None:
            world.after(duration_s, resume, None)

        return Wish(begin)

    clock = SimpleNamespace(sleep=sleep)
    with (
        mock.patch.object(reservations, "trio", clock),
        mock.patch.object(reservations.log, "disabled", True),
    ):
        yield


class SimDevice:
    """A session as `redirector.block.reservations` sees it: a BlockDevice, as far as it asks."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.port = session.port

    async def read_keys(self) -> RegisteredKeys:
        arbiter = self.session.lun.arbiter
        return await self.session.ask(Op.READ_KEYS, arbiter.read_keys)

    async def read_reservation(self) -> Reservation:
        arbiter = self.session.lun.arbiter
        return await self.session.ask(Op.READ_RESERVATION, arbiter.read_reservation)

    async def register(self, key: int, *, old_key: int = 0) -> None:
        session = self.session

        def apply() -> None:
            session.lun.arbiter.register(session.nexus, key, old_key)
            session.key = key or session.key

        await session.ask(Op.REGISTER, apply, f"{key:#x} in place of {old_key:#x}")

    async def reserve(self, key: int) -> None:
        session = self.session
        await session.ask(Op.RESERVE, lambda: session.lun.arbiter.reserve(session.nexus, key))

    async def preempt(self, key: int, victim_key: int, *, abort: bool = False) -> None:
        session = self.session
        arbiter = session.lun.arbiter
        await session.ask(
            Op.PREEMPT,
            lambda: arbiter.preempt(session.nexus, key, victim_key, abort=abort),
            f"{victim_key:#x}",
        )

    async def aclose(self) -> None:
        self.session.close()


class SimTarget:
    """The LUN as one process reaches it: the `Lun` of `redirector.block.reservations`."""

    def __init__(self, lun: SimLun, process: Process, link: SanLink) -> None:
        self.lun = lun
        self.process = process
        self.link = link

    async def session(self, port: InitiatorPort) -> Session:
        """Log in. Raises `LoginFailed`."""
        wish: Wish[Session] = Wish(
            lambda resume: self.lun.login(self.process, self.link, port, resume)
        )
        return await wish

    async def login(self, port: InitiatorPort, *, timeout_s: float = 10.0) -> SimDevice:
        """As `redirector.block.device.Lun.login`."""
        del timeout_s
        return SimDevice(await self.session(port))

    async def reset(self, *, timeout_s: float = 2.0) -> None:
        """As `redirector.block.device.Lun.reset`."""
        world = self.lun.world
        over = False

        def begin(resume: Resume) -> None:
            def end(result: object) -> None:
                nonlocal over
                if not over:
                    over = True
                    resume(result)

            self.lun.reset(self.link, end)
            world.after(timeout_s, end, TimeoutError("no answer to the reset"))

        if self.link.cut_out and self.link.cut_in:
            wait: Wish[None] = Wish(lambda resume: world.after(LOGIN_LIMIT_S, resume, None))
            await wait
            raise LoginFailed("no answer to the login")
        wish: Wish[None] = Wish(begin)
        await wish
