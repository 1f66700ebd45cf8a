"""What can go wrong on a host, and how it is mended: one table.

A host's faults add up; the state of its two links always follows from the list in its `HostState`
(`_apply_links`), so that they may come and go in any order.
"""

from __future__ import annotations

import secrets
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from csvctl.lab import network, state, target
from csvctl.lab.host import DAEMON, SUPERVISOR, Host, launch
from csvctl.lab.processes import Member, end, members, namespace_of, send
from csvctl.lab.relay import Orders
from csvfs.host.problems import Kind, Problem

DEFAULT_SLOWNESS_S: Final = 0.2


class Fault(StrEnum):
    """Every kind; see `FAULTS`."""

    SAN_CUT = "san-cut"
    SAN_RESET = "san-reset"
    NET_CUT = "net-cut"
    KILL = "kill"
    FREEZE = "freeze"
    POWER_OFF = "power-off"
    TARGET_RESTART = "target-restart"
    SLOW_SAN = "slow-san"


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of fault."""

    means: str
    strike: Callable[[Host], None]
    """Raises `Problem`, OSError, TimeoutError."""
    lasts: bool = True
    """It is the case until it is healed."""
    ends_daemon: bool = False
    """The mount is gone for good: healing makes a new one."""
    needs_daemon: bool = False
    """It befalls the daemon alone."""


def strike(host: Host, kind: Fault, seconds: float = 0.0) -> None:
    """Cause a fault; the state is written by the caller, after (and before, where it lasts)."""
    row = FAULTS[kind]
    if row.lasts:
        if kind in host.state.faults and kind is not Fault.SLOW_SAN:
            raise Problem(Kind.USAGE, f"{host.name} has the fault {kind} already")
        if row.needs_daemon and host.daemon() is None:
            raise Problem(
                Kind.USAGE, f"no daemon lives on {host.name}: `csvctl lab heal {host.name}`"
            )
        host.state.faults[kind] = seconds or DEFAULT_SLOWNESS_S if kind is Fault.SLOW_SAN else 0.0
        state.write(host.lab)
    row.strike(host)


def mend(host: Host) -> bool:
    """Undo every fault but a lost mount; True if one was undone."""
    had = dict(host.state.faults)
    for kind in had:
        if kind == Fault.POWER_OFF:
            host.lose_memory(secrets.token_hex(16))
    host.state.faults.clear()
    # Struck out by the caller only when this has been done: see the invariants of `state`.
    _apply_links(host)
    daemon = host.daemon()
    if Fault.FREEZE in had and daemon is not None:
        send(daemon, [host.namespace], signal.SIGCONT)
    return bool(had)


# -- strikes ---------------------------------------------------------------------------------
def _apply_links(host: Host) -> None:
    """Make both links what the list of faults says. An outage comes first, and goes last."""
    lab, faults = host.lab, host.state.faults
    off = Fault.POWER_OFF in faults
    cut = off or Fault.SAN_CUT in faults
    delay_s, reset = faults.get(Fault.SLOW_SAN, 0.0), Fault.SAN_RESET in faults
    if cut:
        network.set_cut(lab, host.state, "san", cut=True)
    network.set_cut(lab, host.state, "cluster", cut=off or Fault.NET_CUT in faults)
    if delay_s or reset:
        _order_relay(host, Orders(delay_s, reset))
    else:
        _remove_relay(host)
    if not cut:
        network.set_cut(lab, host.state, "san", cut=False)


def _kill(host: Host) -> None:
    host.signal_daemon(signal.SIGKILL)
    host.wait_daemon_ended()


def _freeze(host: Host) -> None:
    host.signal_daemon(signal.SIGSTOP)


def _power_off(host: Host) -> None:
    # The links first: no packet that the kernel sends for the dying tells anybody of it.
    _apply_links(host)
    namespace = host.namespace
    mounted = [each for each in host.processes() if each.module in (DAEMON, SUPERVISOR)]
    # The supervisor first, or it would detach the mount: programs of a host that has no power do
    # not see errors.
    end(sorted(mounted, key=lambda each: each.module == DAEMON), [namespace])
    host.kill_everything()


def _target_restart(host: Host) -> None:
    target.kill(host.lab)
    target.start(host.lab)


FAULTS: Final[dict[Fault, Row]] = {
    Fault.SAN_CUT: Row("the SAN link drops everything, silently", _apply_links),
    Fault.SAN_RESET: Row(
        "connections to the target are closed, and new ones refused", _apply_links
    ),
    Fault.NET_CUT: Row("the cluster link drops everything, silently", _apply_links),
    Fault.KILL: Row("SIGKILL for the daemon", _kill, ends_daemon=True, needs_daemon=True),
    Fault.FREEZE: Row("SIGSTOP for the daemon", _freeze, needs_daemon=True),
    Fault.POWER_OFF: Row(
        "both links cut, then everything on the host killed", _power_off, ends_daemon=True
    ),
    Fault.TARGET_RESTART: Row(
        "SIGKILL for the target, which starts again", _target_restart, lasts=False
    ),
    Fault.SLOW_SAN: Row("the target answers later by some time", _apply_links),
}


# -- the relay -------------------------------------------------------------------------------
def _order_relay(host: Host, orders: Orders) -> None:
    running = _relay(host)
    path = host.lab.path / "run" / f"{host.name}.relay"
    path.write_text(orders.encode())
    network.insert_relay_ports(host.lab, host.state)
    if running is not None:
        send(running, _switch(host), signal.SIGHUP)
        return
    command = [sys.executable, "-m", "csvctl.lab.relay"]
    command += [f"{host.name}-san", f"{host.name}-near", str(path)]
    launch(
        host.lab,
        "switch",
        command,
        log=host.lab.path / "log" / f"{host.name}-relay.log",
        environment=host.environment(),
    )


def _remove_relay(host: Host) -> None:
    running = _relay(host)
    if running is not None:
        end([running], _switch(host))
    network.remove_relay_ports(host.lab, host.state)


def _relay(host: Host) -> Member | None:
    found = members(_switch(host))
    return next((each for each in found if f"{host.name}-san" in each.command[3:4]), None)


def _switch(host: Host) -> list[tuple[int, int]]:
    namespace = namespace_of(host.lab.namespace("switch"))
    return [] if namespace is None else [namespace]
