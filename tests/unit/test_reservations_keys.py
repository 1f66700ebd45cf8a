"""Reservation keys: layout, limits, words; choosing initiator ports."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redirector.block.keys import (
    MAX_GENERATION,
    MAX_INCARNATION,
    MAX_SLOT,
    KeysExhausted,
    PathKey,
    choose_port,
    is_foreign,
    is_newcomer,
    key_words,
    newcomer_key,
)

paths = st.builds(
    PathKey,
    st.integers(0, MAX_SLOT),
    st.integers(1, MAX_INCARNATION),
    st.integers(1, MAX_GENERATION),
)


def test_layout_is_pinned() -> None:
    assert PathKey(3, 0x010203, 0x0405).pack() == 0xC5F5_03_010203_0405


@given(paths)
def test_parse_undoes_pack(path: PathKey) -> None:
    key = path.pack()
    assert key < 1 << 64
    assert PathKey.parse(key) == path
    assert not is_foreign(key)
    assert not is_newcomer(key)


@given(st.integers(0, (1 << 64) - 1))
def test_every_key_is_of_one_kind(key: int) -> None:
    kinds = [PathKey.parse(key) is not None, is_newcomer(key), is_foreign(key)]
    assert kinds.count(True) == 1
    assert f"{key:#018x}" in key_words(key)


@given(paths, paths)
def test_order_of_keys_of_one_life_is_that_of_generations(a: PathKey, b: PathKey) -> None:
    if a.is_of(b.slot, b.incarnation):
        assert (a.pack() < b.pack()) == (a.generation < b.generation)


def test_counters_do_not_wrap() -> None:
    with pytest.raises(KeysExhausted, match="mount again"):
        PathKey(0, 1, MAX_GENERATION).next()
    with pytest.raises(KeysExhausted):
        PathKey(0, MAX_INCARNATION + 1, 1)
    with pytest.raises(ValueError, match="slot 255"):
        PathKey(255, 1, 1)


def test_newcomers_have_keys_of_their_own() -> None:
    rng = Random(1)
    keys = {newcomer_key(rng) for _ in range(1000)}
    assert len(keys) == 1000
    assert all(is_newcomer(key) for key in keys)
    assert "newcomer" in key_words(keys.pop())


def test_words_name_slot_incarnation_and_strangers() -> None:
    assert "slot 3, incarnation 17, path generation 2" in key_words(PathKey(3, 17, 2).pack())
    assert "not a key of csvfs" in key_words(0xABCD)


def test_ports_are_unique_and_of_the_random_form() -> None:
    rng = Random(2)
    ports = {choose_port("iqn.2026-11.test:a", rng) for _ in range(500)}
    assert len(ports) == 500
    assert all(port.isid >> 40 == 0x80 for port in ports)
