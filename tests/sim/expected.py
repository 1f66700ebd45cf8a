"""What a long run must have reached."""

from __future__ import annotations

from typing import Final

EXPECTED: Final[frozenset[str]] = frozenset()
