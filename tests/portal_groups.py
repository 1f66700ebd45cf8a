"""A LUN behind portals whose target portal groups have different tags, as many arrays have them.

RFC 7143 6.3.5: a login closes the session that the same initiator port has *in the same portal
group*; in another group it has another. tgt has one group, so this is played.
"""

from __future__ import annotations

from dataclasses import replace

from redirector.block.device import InitiatorPort, Lun, Unreachable
from redirector.block.simulated import SimulatedDevice, SimulatedLun


class PortalGroups:
    """What all portals share."""

    def __init__(self, lun: SimulatedLun) -> None:
        self.lun = lun
        self.unreachable: set[tuple[str, str]] = set()
        """(from, portal): from whose URL a portal is not to be reached."""
        lun.faults = replace(lun.faults, reinstatement_keeps_old=True)

    def at(self, portal: str) -> PortalLun:
        """The LUN by the URL of this portal."""
        return PortalLun(self, portal, portal)


class PortalLun(Lun):
    """The LUN, through one portal."""

    def __init__(self, groups: PortalGroups, home: str, portal: str) -> None:
        self._groups, self._home, self._portal = groups, home, portal
        self.url = f"simulated://{home}"

    def through(self, portal: str) -> PortalLun:
        """See `Lun.through`."""
        return PortalLun(self._groups, self._home, portal)

    async def login(self, port: InitiatorPort, *, timeout_s: float = 10.0) -> SimulatedDevice:
        """See `Lun.login`."""
        lun = self._groups.lun
        if (self._home, self._portal) in self._groups.unreachable:
            raise Unreachable(f"{self.url}: {self._portal} does not answer")
        for device in list(lun.sessions.values()):
            assert isinstance(device, SimulatedDevice)
            if (device.port, device.portal) == (port, self._portal):
                lun.close_session(device)
        device = await lun.login(port, timeout_s=timeout_s)
        device.portal = self._portal
        return device

    async def reset(self, *, timeout_s: float = 2.0) -> None:
        """See `Lun.reset`."""
        await self._groups.lun.reset(timeout_s=timeout_s)
