"""The largest set of nodes that all hear each other: a maximum clique, exactly.

Theory. Hearing graphs are nearly complete, so the question is turned round: of the *complement*
(pairs that do not hear each other, few) a largest independent set is wanted. Nodes with at most one
such pair are taken at once; rings have a closed form; otherwise the node with the most pairs is
once taken and once left out. Independent parts are solved apart, and what is known is kept. That is
exponential in theory, and quick for every graph of 64 nodes that a network can make.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def largest_mutual_set(mutual: Sequence[int], with_one_of: int) -> tuple[int, ...]:
    """The largest set of nodes that are pairwise mutual and that contains one of ``with_one_of``.

    ``mutual[i]`` is the bit map of the nodes that node ``i`` and that hear each other (own bit and
    one-sided bits do not matter); nodes that are to be left out have no bit in their own word.
    Of several largest sets the lexicographically lowest; empty if there is none.
    """
    apart = _Apart(mutual)
    candidates = sum(1 << node for node, word in enumerate(mutual) if word >> node & 1)
    if not candidates & with_one_of:
        return ()
    if not any(apart.words[node] & candidates for node in _bits(candidates)):
        return tuple(_bits(candidates))
    wanted = apart.size_with(candidates, with_one_of)
    chosen: list[int] = []
    while len(chosen) < wanted:
        for node in _bits(candidates):
            rest = candidates & ~apart.words[node] & ~(1 << node)
            needs = 0 if (1 << node) & with_one_of or not with_one_of else with_one_of
            size = apart.size_with(rest, needs) if needs else apart.size(rest)
            if size >= 0 and len(chosen) + 1 + size == wanted:
                chosen.append(node)
                candidates, with_one_of = rest, needs
                break
        else:
            raise AssertionError("a size that no set has")
    return tuple(sorted(chosen))


class _Apart:
    """The complement: ``words[i]`` are the nodes that ``i`` cannot be in a set with."""

    def __init__(self, mutual: Sequence[int]) -> None:
        count = len(mutual)
        self.words = [0] * count
        for a in range(count):
            for b in range(count):
                if a != b and not (mutual[a] >> b & 1 and mutual[b] >> a & 1):
                    self.words[a] |= 1 << b
        self._known: dict[int, int] = {0: 0}

    def size_with(self, candidates: int, one_of: int) -> int:
        """Of the largest set that has one of ``one_of``; -1: there is none."""
        best = -1
        for node in _bits(candidates & one_of):
            rest = candidates & ~self.words[node] & ~(1 << node)
            best = max(best, 1 + self.size(rest))
        return best

    def size(self, candidates: int) -> int:
        """Of the largest set within ``candidates``."""
        known = self._known.get(candidates)
        if known is not None:
            return known
        found = 0
        left = candidates
        while left:
            part = self._part(left)
            found += self._size_of_part(part)
            left &= ~part
        self._known[candidates] = found
        return found

    def _part(self, candidates: int) -> int:
        """The connected part of the lowest candidate."""
        part = edge = candidates & -candidates
        while edge:
            reached = 0
            for node in _bits(edge):
                reached |= self.words[node]
            edge = reached & candidates & ~part
            part |= edge
        return part

    def _size_of_part(self, part: int) -> int:
        known = self._known.get(part)
        if known is not None:
            return known
        most, busiest = -1, -1
        for node in _bits(part):
            degree = (self.words[node] & part).bit_count()
            if degree <= 1:
                # To take it costs nothing that another choice would not cost.
                found = 1 + self.size(part & ~self.words[node] & ~(1 << node))
                break
            if degree > most:
                most, busiest = degree, node
        else:
            if most == 2:
                found = part.bit_count() // 2
            else:
                without = part & ~(1 << busiest)
                found = max(
                    1 + self.size(without & ~self.words[busiest]),
                    self.size(without),
                )
        self._known[part] = found
        return found


def _bits(word: int) -> Iterable[int]:
    while word:
        low = word & -word
        yield low.bit_length() - 1
        word ^= low
