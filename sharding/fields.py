"""Config dataclasses that accept only the names and types that they declare.

Lives on the lowest floor, beside the errors, because every package declares a part of the config.
Imports nothing heavy.
"""

import dataclasses
import functools
import math
import numbers
import typing
from typing import Any

from sharding.errors import UsageError, nearest

_LARGEST = 2**63 - 1  # of an integer: what arrays, files and flags can hold


class FieldError(UsageError):
    """A field that does not exist, or a value that does not have its field's type."""


class Fields:
    """Base of the config dataclasses: each value is checked wherever it is set.

    That is by assignment, in the constructor and by `dataclasses.replace`. An int is converted for
    a float field, a float without a fraction (1e6) for an int field, a list for a tuple.

        @dataclass
        class TrainConfig(Fields, at="config.train"): ...

    Setting a field raises FieldError, which names the field by `at`, and the nearest known name.
    """

    def __init_subclass__(cls, at: str = "", **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if at:
            cls.at = at

    def __new__(cls, /, *_: Any, **values: Any) -> typing.Self:
        for name in values:
            field_type(cls, name)
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        kind = field_type(type(self), name)
        super().__setattr__(name, convert(f"{self.at}.{name}", value, kind))


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Returns the declared type of every field of a config dataclass."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def field_type(cls: type[Fields], name: str) -> Any:
    """Returns the type of one field; raises FieldError where `cls` has no such field."""
    known = field_types(cls)
    if name not in known:
        fields = ", ".join(known)
        raise FieldError(
            f"no field {_shown(name)} in {cls.at} (fields: {fields}){nearest(name, known)}"
        )
    return known[name]


def convert(path: str, value: Any, kind: Any) -> Any:
    """Returns `value` as the type `kind` of the field `path`; raises FieldError if it is none."""
    if kind is tuple or typing.get_origin(kind) is tuple:
        fits = isinstance(value, list | tuple)
        element = typing.get_args(kind)[0] if kind is not tuple else object
        if fits:
            return tuple(convert(path, entry, element) for entry in value)
    elif kind is object:  # an element of a plain tuple, which its reader checks
        return tuple(convert(path, v, object) for v in value) if isinstance(value, list) else value
    elif kind in (int, float):
        value, fits = _number(value, kind)
    else:
        fits = isinstance(value, kind)
    if not fits:
        raise FieldError(f"{path} = {_shown(value)} is not of type {type_name(kind)}")
    if kind is float and not math.isfinite(value):
        raise FieldError(f"{path} = {value} is not finite")
    if kind is int and abs(value) > _LARGEST:
        raise FieldError(f"{path} = {_shown(value)} is above 2**63 - 1")
    return value


def _number(value: Any, kind: type) -> tuple[Any, bool]:
    """Returns the number as an int or a float, and whether it is one without loss."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value, False
    if kind is int and not (isinstance(value, numbers.Integral) or float(value).is_integer()):
        return value, False
    try:
        return kind(value), True
    except OverflowError:  # an int that is too large for a float
        return value, False


def type_name(kind: Any) -> str:
    """Returns how messages call a type: int, bool, tuple[str, ...]."""
    return str(kind) if typing.get_args(kind) else getattr(kind, "__name__", str(kind))


def _shown(value: Any) -> str:
    """Returns the value as Python writes it, cut to a line."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length():,} bits"  # Python does not write the longest
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
