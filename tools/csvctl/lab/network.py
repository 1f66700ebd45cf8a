"""Namespaces, bridges and links of a lab, made with pyroute2 (rtnetlink(7)).

In the switch's namespace each host has a port `<host>-san` on the bridge `san` and `<host>-net` on
the bridge `cluster`; the target has `target-san`. In its own namespace a link is called `san` or
`cluster`.

- A link is *cut* by taking its port off the bridge: nothing passes in either direction, and nobody
  is told, for no carrier is lost. Neighbours are entered for good, so that not even a failed ARP
  says it: TCP sees silence.
- A relay is put into a link with another pair: `<host>-san` leaves the bridge, `<host>-far` enters
  it, and the relay carries frames between `<host>-san` and `<host>-near`. Connections live through
  that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from pyroute2 import IPRoute, netns
from pyroute2.netlink.exceptions import NetlinkError

from csvctl.lab.processes import namespace_of, wait_until
from csvctl.lab.state import NAMESPACES, HostState, LabState

_PREFIX_LENGTH: Final = 24
_UP_LIMIT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class _End:
    """One end of a link to a bridge."""

    role: str
    bridge: str
    port: str
    """Its name in the switch's namespace."""
    address: str
    mac: str


def _ends(state: LabState) -> list[_End]:
    found = [_End("target", "san", "target-san", state.target_address, "02:c5:f5:00:01:fe")]
    for host in state.hosts:
        number = f"{host.number:02x}"
        found += [
            _End(
                host.name, "san", f"{host.name}-san", host.san_address, f"02:c5:f5:00:01:{number}"
            ),
            _End(
                host.name,
                "cluster",
                f"{host.name}-net",
                host.cluster_address,
                f"02:c5:f5:00:02:{number}",
            ),
        ]
    return found


def make(state: LabState) -> None:
    """Make all of it. Raises OSError, `NetlinkError`, TimeoutError."""
    for role in state.roles:
        netns.create(state.namespace(role))
    ends = _ends(state)
    with _inside(state, "switch") as switch:
        bridges = {name: _make_bridge(switch, name) for name in ("san", "cluster")}
        for end in ends:
            peer = {
                "ifname": end.bridge,
                "address": end.mac,
                "net_ns_fd": state.namespace(end.role),
            }
            switch.link("add", ifname=end.port, kind="veth", peer=peer)
            port = _index(switch, end.port)
            switch.link("set", index=port, master=bridges[end.bridge], state="up")
        for role in state.roles[1:]:
            _configure(state, role, ends)
        for end in ends:
            _wait_up(switch, end.port)


def set_cut(state: LabState, host: HostState, bridge: str, *, cut: bool) -> None:
    """Cut a host's link to ``bridge``, or mend it. Raises OSError."""
    with _inside(state, "switch") as switch:
        port = f"{host.name}-net"
        if bridge == "san":
            port = f"{host.name}-{'far' if _has_relay(switch, host) else 'san'}"
        _set_master(switch, port, None if cut else bridge)


def insert_relay_ports(state: LabState, host: HostState) -> None:
    """Take the host's SAN port off the bridge, for a relay; nothing passes until one runs.

    The new port is not on the bridge yet: see `set_cut`. There already is no error.
    """
    with _inside(state, "switch") as switch:
        if not _has_relay(switch, host):
            near, far = f"{host.name}-near", f"{host.name}-far"
            switch.link("add", ifname=far, kind="veth", peer={"ifname": near})
            for name in (near, far):
                switch.link("set", index=_index(switch, name), state="up")
            _wait_up(switch, far)
            _set_master(switch, f"{host.name}-san", None)


def remove_relay_ports(state: LabState, host: HostState) -> None:
    """The host's SAN port takes its place again, but is not on the bridge yet: see `set_cut`."""
    with _inside(state, "switch") as switch:
        if _has_relay(switch, host):
            switch.link("del", index=_index(switch, f"{host.name}-far"))


def _has_relay(switch: Any, host: HostState) -> bool:
    return bool(switch.link_lookup(ifname=f"{host.name}-far"))


def remove(names: list[str]) -> None:
    """Take the names of namespaces away; what is in them goes with their last process."""
    for name in names:
        if namespace_of(name) is not None:
            netns.remove(name)
        else:
            (NAMESPACES / name).unlink(missing_ok=True)


def names(lab_id: str, prefix: str) -> list[str]:
    """The names of the lab's namespaces that exist."""
    found = os.listdir(NAMESPACES) if NAMESPACES.is_dir() else []
    return sorted(name for name in found if name.startswith(f"{prefix}{lab_id}-"))


def _make_bridge(switch: Any, name: str) -> int:
    # Without multicast snooping a bridge sends no queries of its own.
    switch.link("add", ifname=name, kind="bridge", br_stp_state=0, br_mcast_snooping=0)
    bridge = _index(switch, name)
    switch.link("set", index=bridge, state="up")
    return bridge


def _configure(state: LabState, role: str, ends: list[_End]) -> None:
    with _inside(state, role) as inside:
        inside.link("set", index=_index(inside, "lo"), state="up")
        for own in (end for end in ends if end.role == role):
            link = _index(inside, own.bridge)
            inside.addr("add", index=link, address=own.address, prefixlen=_PREFIX_LENGTH)
            inside.link("set", index=link, state="up")
            for other in ends:
                if other.bridge == own.bridge and other is not own:
                    inside.neigh(
                        "add", ifindex=link, dst=other.address, lladdr=other.mac, state="permanent"
                    )


def _set_master(switch: Any, port: str, bridge: str | None) -> None:
    master = 0 if bridge is None else _index(switch, bridge)
    switch.link("set", index=_index(switch, port), master=master)


def _wait_up(switch: Any, name: str) -> None:
    """Until its carrier has been noticed a port forwards nothing."""

    def is_up() -> bool:
        link = switch.get_links(_index(switch, name))[0]
        return bool(link.get_attr("IFLA_OPERSTATE") == "UP")

    wait_until(is_up, f"the link {name}", _UP_LIMIT_S)


def _index(route: Any, name: str) -> int:
    found: list[int] = route.link_lookup(ifname=name)
    if not found:
        raise OSError(f"there is no link {name}")
    return found[0]


@contextmanager
def _inside(state: LabState, role: str) -> Iterator[Any]:
    # The socket is made by a child that enters the namespace; this process stays where it is.
    try:
        with IPRoute(netns=state.namespace(role)) as route:
            yield route
    except NetlinkError as error:
        raise OSError(error.code, f"{state.namespace(role)}: {error}") from error
