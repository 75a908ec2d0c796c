"""Records as JSON, in and out."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def to_json(record: Any) -> str:
    """Spell a record as JSON text."""
    return json.dumps(dataclasses.asdict(record), indent=2, allow_nan=True) + "\n"


def from_json(cls: type[T], text: str) -> T:
    """Read a record of type ``cls`` from JSON text.

    Raises:
        ValueError: if a field without a default is missing, or one is unknown or of another type than the record says.
    """
    return _decode(cls, json.loads(text), cls.__name__)


def write(path: str | Path, record: Any) -> None:
    """Write a record's JSON to a file, through a temporary name, so that a reader never sees half a file."""
    write_text(path, to_json(record))


def write_text(path: str | Path, text: str) -> None:
    """Write text to a file through a temporary name in the same folder."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(cls: type[T], path: str | Path) -> T:
    """Read a record of type ``cls`` from a JSON file."""
    return from_json(cls, Path(path).read_text(encoding="utf-8"))


def _decode(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        required = {field.name for field in dataclasses.fields(hint) if field.default is dataclasses.MISSING}
        if not isinstance(value, dict) or not required <= value.keys() <= hints.keys():
            got = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"{where}: expected the fields {sorted(hints)}, got {got}")
        return hint(**{name: _decode(hints[name], value[name], f"{where}.{name}") for name in value})
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        if arguments[-1] is Ellipsis:
            return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(arguments) != len(value):
            raise ValueError(f"{where}: expected {len(arguments)} items, got {len(value)}")
        return tuple(
            _decode(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(arguments, value, strict=True))
        )
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (kind for kind in arguments if kind is not type(None))
        return _decode(hint, value, where)
    if hint is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
    return value
