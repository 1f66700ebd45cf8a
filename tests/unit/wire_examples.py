"""Messages of every registered type: any (for hypothesis), and one each (for golden bytes)."""

from __future__ import annotations

import types
import typing
from dataclasses import fields, is_dataclass
from enum import IntEnum, IntFlag
from itertools import count
from typing import Any

from hypothesis import strategies as st

from lockmgr.cluster.codec import INT_MAX, INT_MIN
from lockmgr.messages import (
    NAME_LIMIT_BYTES,
    VALUE_BYTES,
    Loss,
    Reassert,
    Resource,
    ValueBlock,
)

INTS = st.integers(INT_MIN, INT_MAX) | st.integers(0, 100)
PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    int: INTS,
    bool: st.booleans(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bytes: st.binary(max_size=40),
    str: st.text(max_size=20),
    Resource: st.builds(
        Resource, st.binary(min_size=1, max_size=NAME_LIMIT_BYTES), st.binary(max_size=8)
    ),
    ValueBlock: st.builds(
        ValueBlock, st.none() | st.binary(min_size=VALUE_BYTES, max_size=VALUE_BYTES), INTS
    ),
}

MEMBERS = st.lists(st.integers(0, (1 << 63) - 1), max_size=4).map(tuple)
OWN_RULES: dict[tuple[type, str], st.SearchStrategy[Any]] = {
    (Loss, "members"): MEMBERS,
    (Reassert, "views"): st.lists(MEMBERS, max_size=4).map(tuple),
}


def members(kind: Any) -> list[tuple[str, Any]]:
    """Names and types of the fields of a dataclass or NamedTuple."""
    hints = typing.get_type_hints(kind)
    names = [f.name for f in fields(kind)] if is_dataclass(kind) else list(kind._fields)
    return [(name, hints[name]) for name in names]


def anything(annotation: Any) -> st.SearchStrategy[Any]:
    """All values of an annotation that fit into a message."""
    if annotation in PLAIN:
        return PLAIN[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        (some,) = [argument for argument in arguments if argument is not type(None)]
        return st.none() | anything(some)
    if origin is frozenset:
        return st.frozensets(anything(arguments[0]), max_size=4)
    if origin is tuple and arguments[1:] == (Ellipsis,):
        return st.lists(anything(arguments[0]), max_size=4).map(tuple)
    if origin is tuple:
        return st.tuples(*map(anything, arguments))
    if issubclass(annotation, IntEnum):
        return st.sampled_from(annotation)
    if issubclass(annotation, IntFlag):
        known = sum(annotation)
        return st.integers(0, known).map(lambda bits: annotation(bits & known))
    return st.builds(annotation, *(field_of(annotation, *each) for each in members(annotation)))


def field_of(kind: type, name: str, annotation: Any) -> st.SearchStrategy[Any]:
    """All values of a field."""
    rule = OWN_RULES.get((kind, name))
    return anything(annotation) if rule is None else rule


def example(annotation: Any, numbers: Any = None) -> Any:
    """One value, always the same; no two numbers in it are equal."""
    numbers = numbers if numbers is not None else count(1)
    if annotation is Resource:
        return Resource(b"name%d" % next(numbers), b"place%d" % next(numbers))
    if annotation is ValueBlock:
        return ValueBlock(bytes([next(numbers)]) * VALUE_BYTES, next(numbers))
    if annotation in (int, float):
        return annotation(next(numbers))
    if annotation is bool:
        return True
    if annotation in (bytes, str):
        text = f"text{next(numbers)}"
        return text if annotation is str else text.encode()
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        (some,) = [argument for argument in arguments if argument is not type(None)]
        return example(some, numbers)
    if origin is frozenset or arguments[1:] == (Ellipsis,):
        return origin([example(arguments[0], numbers), example(arguments[0], numbers)])
    if origin is tuple:
        return tuple(example(argument, numbers) for argument in arguments)
    if issubclass(annotation, IntEnum | IntFlag):
        return list(annotation)[-1]
    return annotation(*(example(kind, numbers) for _name, kind in members(annotation)))
