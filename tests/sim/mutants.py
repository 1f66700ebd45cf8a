"""Mistakes made on purpose, each of which a thousand seeds must find."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

MUTANTS: dict[str, Callable[[], AbstractContextManager[None]]] = {}
