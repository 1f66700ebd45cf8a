"""The six lock modes and everything that follows from the compatibility matrix.

Theory. The modes and their matrix are those of the VAX/VMS lock manager (Snaman and Thiel, "The
VAX/VMS Distributed Lock Manager", Digital Technical Journal 5, 1987), which the Linux DLM kept:

    NL  null              interest in a resource, no access
    CR  concurrent read   reads while others write
    CW  concurrent write  writes while others write
    PR  protected read    reads, nobody writes           ("shared")
    PW  protected write   writes, others may only CR     ("update")
    EX  exclusive         nobody else has access

One table is typed in, the matrix; the rest is computed from it. A mode *covers* another when
whatever it lets in the other lets in too. The order this gives is a lattice, with one pair that
is not comparable:

             EX
             PW
           /    \\
         CW      PR
           \\    /
             CR
             NL

invariants (asserted at import):
- the matrix is symmetric
- any two modes have exactly one join and one meet
- a mode is compatible with a join if and only if it is compatible with both parts; so a set of
  holders may be summed up as the join of their modes
"""

from __future__ import annotations

from enum import IntEnum


class Mode(IntEnum):
    """A lock mode. The numbers are those of VMS (LCK$K_NLMODE ...) and of dlm.h."""

    NL = 0
    CR = 1
    CW = 2
    PR = 3
    PW = 4
    EX = 5

    def __str__(self) -> str:
        return self.name


_MATRIX = """
       NL CR CW PR PW EX
    NL  y  y  y  y  y  y
    CR  y  y  y  y  y  .
    CW  y  y  y  .  .  .
    PR  y  y  .  y  .  .
    PW  y  y  .  .  .  .
    EX  y  .  .  .  .  .
"""

COMPATIBLE: tuple[tuple[bool, ...], ...] = tuple(
    tuple(cell == "y" for cell in row.split()[1:]) for row in _MATRIX.strip().splitlines()[1:]
)
"""``COMPATIBLE[a][b]``: may two lockers hold ``a`` and ``b`` at once? For the hot path."""

COVERS: tuple[tuple[bool, ...], ...] = tuple(
    tuple(all(COMPATIBLE[b][c] for c in Mode if COMPATIBLE[a][c]) for b in Mode) for a in Mode
)
"""``COVERS[a][b]``: is ``a`` at least as strong as ``b``? For the hot path."""


def _strongest(modes: list[Mode]) -> Mode:
    (best,) = [a for a in modes if all(COVERS[a][b] for b in modes)]
    return best


def _weakest(modes: list[Mode]) -> Mode:
    (best,) = [a for a in modes if all(COVERS[b][a] for b in modes)]
    return best


JOIN: tuple[tuple[Mode, ...], ...] = tuple(
    tuple(_weakest([c for c in Mode if COVERS[c][a] and COVERS[c][b]]) for b in Mode) for a in Mode
)
"""``JOIN[a][b]``: the weakest mode that covers both."""

_MEET = tuple(
    tuple(_strongest([c for c in Mode if COVERS[a][c] and COVERS[b][c]]) for b in Mode)
    for a in Mode
)

_YIELDED = tuple(
    tuple(_strongest([c for c in Mode if COVERS[a][c] and COMPATIBLE[c][b]]) for b in Mode)
    for a in Mode
)

WRITES_VALUE: tuple[bool, ...] = tuple(mode in (Mode.PW, Mode.EX) for mode in Mode)
"""``WRITES_VALUE[a]``: does lowering from ``a`` write the lock value block?"""

WRITES: tuple[bool, ...] = tuple(not COMPATIBLE[mode][Mode.PR] for mode in Mode)
"""``WRITES[a]``: may its holder change what the resource stands for?"""


def compatible(a: Mode, b: Mode) -> bool:
    """May two different lockers hold ``a`` and ``b`` on one resource at the same time?"""
    return COMPATIBLE[a][b]


def covers(a: Mode, b: Mode) -> bool:
    """Does a holder of ``a`` have everything that a holder of ``b`` has?"""
    return COVERS[a][b]


def join(a: Mode, b: Mode) -> Mode:
    """The weakest mode that covers both (CW and PR: PW)."""
    return JOIN[a][b]


def meet(a: Mode, b: Mode) -> Mode:
    """The strongest mode that both cover (CW and PR: CR)."""
    return _MEET[a][b]


def yielded(held: Mode, wanted: Mode) -> Mode:
    """The most that a holder of ``held`` can keep when somebody else wants ``wanted``."""
    return _YIELDED[held][wanted]


assert all(COMPATIBLE[a][b] == COMPATIBLE[b][a] for a in Mode for b in Mode)
assert all(
    COMPATIBLE[c][JOIN[a][b]] == (COMPATIBLE[c][a] and COMPATIBLE[c][b])
    for a in Mode
    for b in Mode
    for c in Mode
)
