"""The largest mutually connected set, against every set there is, and against the clock."""

from __future__ import annotations

import time
from itertools import combinations
from random import Random

import pytest

from lockmgr.cluster.cliques import largest_mutual_set


def naive(mutual: list[int], with_one_of: int) -> tuple[int, ...]:
    nodes = [n for n in range(len(mutual)) if mutual[n] >> n & 1]
    for size in range(len(nodes), 0, -1):
        for some in combinations(nodes, size):
            pairs = combinations(some, 2)
            if any(with_one_of >> n & 1 for n in some) and all(
                mutual[a] >> b & 1 and mutual[b] >> a & 1 for a, b in pairs
            ):
                return some
    return ()


def random_graph(rng: Random, count: int, density: float, *, both_ways: bool = True) -> list[int]:
    words = [0] * count
    for a in range(count):
        words[a] |= (rng.random() < 0.9) << a
        for b in range(a):
            if rng.random() < density:
                words[a] |= 1 << b
                if both_ways or rng.random() < 0.8:
                    words[b] |= 1 << a
    return words


@pytest.mark.parametrize("seed", range(40))
def test_equals_the_best_of_all_sets(seed: int) -> None:
    rng = Random(seed)
    for _ in range(25):
        count = rng.randint(1, 9)
        graph = random_graph(rng, count, rng.choice((0.2, 0.5, 0.8, 0.95)), both_ways=seed % 2 == 0)
        direct = rng.getrandbits(count)
        assert largest_mutual_set(graph, direct) == naive(graph, direct)


def test_the_lexicographically_lowest_of_equals_stays() -> None:
    # 0-3 and 1-2 hear each other: two pairs.
    assert largest_mutual_set([0b1001, 0b0110, 0b0110, 0b1001], 0b1111) == (0, 3)


def test_a_larger_set_without_a_direct_path_does_not_stay() -> None:
    # 0, 1, 2 hear each other, 3 and 4 too; only 4 has a path.
    assert largest_mutual_set([0b111, 0b111, 0b111, 0b11000, 0b11000], 0b10000) == (3, 4)


def complement(count: int, pairs: list[tuple[int, int]]) -> list[int]:
    words = [(1 << count) - 1] * count
    for a, b in pairs:
        words[a] &= ~(1 << b)
        words[b] &= ~(1 << a)
    return words


def hard_graphs() -> dict[str, list[int]]:
    rings = [(5 * ring + n, 5 * ring + (n + 1) % 5) for ring in range(12) for n in range(5)]
    petersen = [(n, (n + 1) % 5) for n in range(5)] + [(n, n + 5) for n in range(5)]
    petersen += [(5 + n, 5 + (n + 2) % 5) for n in range(5)]
    rng = Random(7)
    cubic = [(n, (n + 1) % 64) for n in range(64)]
    left = list(range(64))
    rng.shuffle(left)
    cubic += list(zip(left[::2], left[1::2], strict=True))
    graphs = {
        "everybody": complement(64, []),
        "32 pairs": complement(64, [(2 * n, 2 * n + 1) for n in range(32)]),
        "two halves": [0xFFFFFFFF] * 32 + [0xFFFFFFFF << 32] * 32,
        "12 rings of five": complement(60, rings),
        "6 Petersen graphs": complement(
            60, [(10 * k + a, 10 * k + b) for k in range(6) for a, b in petersen]
        ),
        "a ring with chords": complement(64, cubic),
    }
    for density in (0.1, 0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98):
        graphs[f"random, {density}"] = random_graph(Random(3), 64, density)
    return graphs


@pytest.mark.parametrize("name", hard_graphs())
def test_64_nodes_are_quick(name: str) -> None:
    graph = hard_graphs()[name]
    begin = time.process_time()
    found = largest_mutual_set(graph, (1 << 64) - 1)
    took = time.process_time() - begin
    assert all(graph[a] >> b & 1 for a in found for b in found)
    assert took < 5.0, f"{took:.2f} s for {len(found)} nodes"
