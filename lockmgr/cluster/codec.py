"""Messages as bytes: frozen dataclasses to msgpack and back, checked field by field.

A message is a msgpack array of its fields in the order of their declaration; so is a dataclass or a
NamedTuple within it. What a field may be is read from its annotation, once, when the type is
registered; a value of another type, an unknown enum member or flag, a number beyond 64 bits, a
missing or a surplus field is a `WireError` that says where. Fields with defaults may be missing at
the end: they were added later.

What hostile bytes can cost is bounded before anything is allocated: the message's own limit of
bytes, and ``max_items`` for each array in it. (msgpack allocates an array when it reads its length;
arrays nest at most 1,024 deep there, so a hostile message can make it allocate 8 KiB times
``max_items`` for a moment.) No maps, no extensions, no NaN.

One field of a message may be its payload: bytes that follow the msgpack part as they are.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import IntEnum, IntFlag
from operator import attrgetter
from typing import Any, Final

import msgpack

DEFAULT_LIMIT_BYTES: Final = 4096
DEFAULT_MAX_ITEMS: Final = 64
WORDS_LIMIT: Final = 80

INT_MIN: Final = -(1 << 63)
INT_MAX: Final = (1 << 64) - 1


class WireError(Exception):
    """Bytes that no correct peer sends, in words; the connection they came over is closed."""


Decode = Callable[[Any], Any]
Encode = Callable[[Any], Any]


def _clipped(text: str) -> str:
    """For a log line: printable, and never longer than that."""
    text = ascii(text)[1:-1]
    return text if len(text) <= WORDS_LIMIT else text[: WORDS_LIMIT - 3] + "..."


def _refuse(value: object, expected: str) -> typing.NoReturn:
    what = type(value).__name__
    if isinstance(value, bytes | str | list | tuple):
        raise WireError(f"{expected} expected, not {what} of {len(value)}")
    raise WireError(f"{expected} expected, not {value!r:.{WORDS_LIMIT}}")


# -- plain values ------------------------------------------------------------------------------
def _int(value: Any) -> int:
    if type(value) is not int:
        _refuse(value, "a number")
    return value


def _bool(value: Any) -> bool:
    if type(value) is not bool:
        _refuse(value, "true or false")
    return value


def _float(value: Any) -> float:
    if type(value) not in (float, int) or not math.isfinite(value):
        _refuse(value, "a finite number")
    return float(value)


def _bytes(value: Any) -> bytes:
    if type(value) is not bytes:
        _refuse(value, "bytes")
    return value


def _str(value: Any) -> str:
    if type(value) is not str:
        _refuse(value, "text")
    return value


_PLAIN: Final[dict[Any, Decode]] = {
    int: _int,
    bool: _bool,
    float: _float,
    bytes: _bytes,
    str: _str,
}


def _enum(kind: type[IntEnum]) -> Decode:
    members = {int(member): member for member in kind}

    def decode(value: Any) -> IntEnum:
        member = members.get(value) if type(value) is int else None
        if member is None:
            _refuse(value, f"one of {kind.__name__}")
        return member

    return decode


def _flag(kind: type[IntFlag]) -> Decode:
    known = 0
    for member in kind:
        known |= int(member)

    def decode(value: Any) -> IntFlag:
        if type(value) is not int or value & ~known:
            _refuse(value, f"flags of {kind.__name__}")
        return kind(value)

    return decode


# -- composed values ---------------------------------------------------------------------------
def _coders(annotation: Any) -> tuple[Encode | None, Decode]:
    """How to encode (None: as it is) and decode what is annotated so.

    Raises TypeError for an annotation that has no wire form.
    """
    if annotation in _PLAIN:
        return None, _PLAIN[annotation]
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return _optional(annotation, arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return _sequence(arguments[0], tuple)
    if origin is tuple:
        return _record(tuple, [(str(n), a, False) for n, a in enumerate(arguments)])
    if origin is frozenset:
        return _sequence(arguments[0], frozenset)
    if isinstance(annotation, type):
        if issubclass(annotation, IntEnum):
            return None, _enum(annotation)
        if issubclass(annotation, IntFlag):
            return None, _flag(annotation)
        if is_dataclass(annotation):
            hints = typing.get_type_hints(annotation)
            return _record(
                annotation, [(f.name, hints[f.name], _may_miss(f)) for f in _inits(annotation)]
            )
        if issubclass(annotation, tuple) and hasattr(annotation, "_fields"):
            hints = typing.get_type_hints(annotation)
            defaults = getattr(annotation, "_field_defaults", {})
            return _record(annotation, [(n, hints[n], n in defaults) for n in hints])
    raise TypeError(f"{annotation} has no wire form")


def _inits(kind: Any) -> list[Any]:
    return [field for field in fields(kind) if field.init]


def _may_miss(field: Any) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _optional(annotation: Any, arguments: tuple[Any, ...]) -> tuple[Encode | None, Decode]:
    some = [argument for argument in arguments if argument is not type(None)]
    if len(some) != 1 or len(arguments) != 2:
        raise TypeError(f"{annotation} has no wire form: one type, or None")
    encode, decode = _coders(some[0])
    if encode is None:
        return None, lambda value: None if value is None else decode(value)
    known = encode
    return (
        lambda value: None if value is None else known(value),
        lambda value: None if value is None else decode(value),
    )


def _sequence(item: Any, kind: type) -> tuple[Encode | None, Decode]:
    encode, decode = _coders(item)

    def decode_all(value: Any) -> Any:
        if type(value) is not tuple:
            _refuse(value, "an array")
        found = kind(map(decode, value))
        if len(found) != len(value):
            raise WireError("the same twice in a set")
        return found

    if kind is frozenset:
        return lambda value: sorted(map(encode, value) if encode else value), decode_all
    if encode is None:
        return None, decode_all
    return lambda value: [encode(one) for one in value], decode_all


def _record(kind: Any, members: list[tuple[str, Any, bool]]) -> tuple[Encode | None, Decode]:
    """``members``: name, annotation, and whether it may be missing at the end."""
    named = is_dataclass(kind)
    coders = [_coders(annotation) for _name, annotation, _may in members]
    encoders = [encode for encode, _decode in coders]
    decoders = [
        (name, decode) for (name, _a, _m), (_e, decode) in zip(members, coders, strict=True)
    ]
    least = sum(not may_miss for _name, _annotation, may_miss in members)
    most = len(members)
    what = getattr(kind, "__name__", "tuple")

    def decode(value: Any) -> Any:
        if type(value) is not tuple or not least <= len(value) <= most:
            _refuse(value, f"{what}: an array of {least} to {most}")
        arguments = []
        for (name, check), member in zip(decoders, value, strict=False):
            try:
                arguments.append(check(member))
            except WireError as error:
                raise WireError(f"{what}.{name}: {error}") from None
        if kind is tuple:
            return tuple(arguments)
        try:
            return kind(*arguments)
        except ValueError as error:
            raise WireError(f"{what}: {_clipped(str(error))}") from None

    return _record_encoder(named, [name for name, _a, _m in members], encoders), decode


def _record_encoder(named: bool, names: list[str], encoders: list[Encode | None]) -> Encode | None:
    plain = not any(encoders)
    if not named:
        if plain:
            return None
        return lambda value: [
            encode(one) if encode else one for encode, one in zip(encoders, value, strict=True)
        ]
    if not names:
        return lambda _value: ()
    get: Callable[[Any], Any] = attrgetter(*names)
    if len(names) == 1:
        only = encoders[0]
        return lambda value: (only(get(value)) if only else get(value),)
    if plain:
        return get
    return lambda value: [
        encode(one) if encode else one for encode, one in zip(encoders, get(value), strict=True)
    ]


# -- the registry ------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Registered:
    """How one type of message goes over the wire."""

    code: int
    type: type
    limit_bytes: int
    """Of the msgpack part."""
    max_items: int
    """Of any array in it."""
    payload: str | None
    """The field that follows as it is."""
    payload_limit_bytes: int
    encode: Encode
    decode: Decode


class Registry:
    """Which messages there are, under which codes."""

    def __init__(self) -> None:
        self.by_code: dict[int, Registered] = {}
        self.by_type: dict[type, Registered] = {}

    def register(
        self,
        kind: type,
        code: int,
        *,
        limit_bytes: int = DEFAULT_LIMIT_BYTES,
        max_items: int = DEFAULT_MAX_ITEMS,
        payload: str | None = None,
        payload_limit_bytes: int = 0,
    ) -> None:
        """Give a frozen dataclass its code. ``payload``: its last field, of type bytes.

        Raises TypeError for fields without a wire form, ValueError for a code or type used twice.
        """
        if not 0 < code < 1 << 16 or code in self.by_code or kind in self.by_type:
            raise ValueError(f"{kind.__name__} cannot have code {code}")
        hints = typing.get_type_hints(kind)
        members = [(f.name, hints[f.name], _may_miss(f)) for f in _inits(kind)]
        if payload is not None:
            if members[-1] != (payload, bytes, False):
                raise TypeError(f"{kind.__name__}.{payload} is not its last field, bytes")
            members.pop()
        make = kind if payload is None else _Partial(kind)
        _encode, decode = _record(make, members)
        encode = _record_encoder(
            True,
            [name for name, _annotation, _may in members],
            [_coders(annotation)[0] for _name, annotation, _may in members],
        )
        assert encode is not None
        entry = Registered(
            code, kind, limit_bytes, max_items, payload, payload_limit_bytes, encode, decode
        )
        self.by_code[code] = entry
        self.by_type[kind] = entry

    def encode(self, message: object) -> tuple[int, bytes, bytes]:
        """Code, msgpack part and payload.

        Raises ValueError for what is not registered or too big: no peer could take it.
        """
        entry = self.by_type.get(type(message))
        if entry is None:
            raise ValueError(f"{type(message).__name__} has no code")
        try:
            header = msgpack.packb(entry.encode(message))
        except OverflowError:
            raise ValueError(f"{type(message).__name__} has a number beyond 64 bits") from None
        payload = b"" if entry.payload is None else getattr(message, entry.payload)
        if len(header) > entry.limit_bytes or len(payload) > entry.payload_limit_bytes:
            raise ValueError(
                f"{type(message).__name__} of {len(header)} bytes and {len(payload)} of payload: "
                f"at most {entry.limit_bytes} and {entry.payload_limit_bytes}"
            )
        return entry.code, header, payload

    def decode(self, code: int, header: bytes, payload: bytes = b"") -> Any:
        """The message. Raises `WireError`."""
        entry = self.entry(code, len(header), len(payload))
        try:
            value = msgpack.unpackb(
                header,
                use_list=False,
                raw=False,
                max_str_len=len(header),
                max_bin_len=len(header),
                max_array_len=entry.max_items,
                max_map_len=0,
                max_ext_len=0,
            )
        except (ValueError, msgpack.UnpackException) as error:
            words = _clipped(str(error)) or type(error).__name__
            raise WireError(f"{entry.type.__name__}: bad msgpack: {words}") from None
        if entry.payload is None:
            return entry.decode(value)
        return entry.type(*entry.decode(value), payload)

    def entry(self, code: int, header_bytes: int, payload_bytes: int) -> Registered:
        """The type with that code, if these lengths are allowed. Raises `WireError`."""
        entry = self.by_code.get(code)
        if entry is None:
            raise WireError(f"no message has code {code}")
        if header_bytes > entry.limit_bytes or payload_bytes > entry.payload_limit_bytes:
            raise WireError(
                f"{entry.type.__name__} of {header_bytes} bytes and {payload_bytes} of payload: "
                f"at most {entry.limit_bytes} and {entry.payload_limit_bytes}"
            )
        return entry


class _Partial:
    """Collects the fields of a message before its payload."""

    def __init__(self, kind: type) -> None:
        self.__name__ = kind.__name__

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        return arguments
