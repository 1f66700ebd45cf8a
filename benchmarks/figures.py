"""A measured figure, and what it must be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured figure. ``goal`` is what it must reach; ``ok`` says whether it does."""

    name: str
    value: float
    unit: str
    goal: str
    ok: bool
    command: str
    raw: float | None = None


def at_most(name: str, value: float, unit: str, limit: float, command: str) -> Figure:
    """A figure that must not be above ``limit``."""
    return Figure(name, value, unit, f"<= {limit:g}", value <= limit, command)


def at_least(name: str, value: float, unit: str, limit: float, command: str) -> Figure:
    """A figure that must not be below ``limit``."""
    return Figure(name, value, unit, f">= {limit:g}", value >= limit, command)


def told(name: str, value: float, unit: str, command: str) -> Figure:
    """A figure without a goal, beside one that has one."""
    return Figure(name, value, unit, "", True, command)
