"""Three nodes against the model of one volume: each call by a node of hypothesis's choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import consumes, rule

from csvfs.errors import FilesystemError
from lockmgr.settings import Settings
from tests.cluster_script import Acted, ClusterReplay, ClusterScript, Kill, Leave, forgotten
from tests.crash import deterministic_run
from tests.unit.test_volume_machine import VolumeMachine
from tests.volume_model import Node, OpenFile
from tests.volume_script import Step, look

T = TypeVar("T")

PLACES: Final = 3


class ClusterMachine(VolumeMachine):
    """`VolumeMachine`, whose calls go to one node after another."""

    def __init__(self) -> None:
        super().__init__()
        self.plan = ClusterScript(self.model, PLACES)
        self.next = 0

    @rule(place=st.integers(0, PLACES - 1))
    def go_on_at(self, place: int) -> None:
        self.next = place

    def call(self, method: str, args: tuple[Any, ...], model: Callable[[], T]) -> list[T]:
        if any(isinstance(arg, Node) and arg in self.dead for arg in args):
            return []
        place = self.plan.place_for(args, self.next)
        if place is None:
            return []
        for arg in args:
            if isinstance(arg, Node):
                self.plan.tell(place, arg)
        try:
            result = model()
        except FilesystemError as error:
            self.plan.acts.append(Acted(place, Step(method, args, type(error))))
            return []
        node = result.node if isinstance(result, OpenFile) else result
        seen = look(node) if isinstance(node, Node) else ()
        self.plan.acts.append(Acted(place, Step(method, args, result, seen)))
        if isinstance(node, Node):
            if node not in self.nodes:
                self.nodes.append(node)
            if method not in ("setattr", "open"):
                self.plan.told[place].add(node)
        if isinstance(result, OpenFile):
            self.plan.homes[result] = place
        self.next = (self.next + 1) % PLACES
        self.bury()
        return [result]

    def bury(self) -> None:
        """What has no name and is open nowhere may be gone: nobody asks for it."""
        self.dead |= {n for n in self.nodes if n.nlink == 0 and not self.plan.open_at(n)}

    def release(self, handle: OpenFile) -> None:
        raise NotImplementedError

    @rule(handle=consumes(VolumeMachine.handles))
    def close(self, handle: OpenFile) -> None:
        place = self.plan.homes.get(handle)
        if place is not None:
            self.plan.acts.append(Acted(place, Step("release", (handle,), None)))
            del self.plan.homes[handle]
            self.bury()

    def _forget(self, node: Node) -> None:
        self.plan.told[self.next].discard(node)
        self.plan.acts.append(Acted(self.next, forgotten(node)))

    def remount(self, clean: bool) -> None:
        raise NotImplementedError

    @rule(clean=st.booleans())
    def replace(self, clean: bool) -> None:
        self.plan.acts.append(Leave(self.next) if clean else Kill(self.next))
        self.plan.gone(self.next)
        self.bury()

    def teardown(self) -> None:
        replay = ClusterReplay(self.model, self.lock_settings)
        script = list(self.plan.acts)

        async def run() -> None:
            await replay.carry_out(script)

        deterministic_run(run, 0)


class HastyMachine(ClusterMachine):
    """No lock stays where it was last used."""

    lock_settings = Settings(cache_limit=0, min_hold_s=0)


_SETTINGS: Final = settings(
    max_examples=15,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
for _machine in (ClusterMachine, HastyMachine):
    _machine.TestCase.settings = _SETTINGS

TestCluster = ClusterMachine.TestCase
TestClusterThatShedsLocks = HastyMachine.TestCase
