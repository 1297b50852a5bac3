"""Plain data, such as YAML gives, as dataclasses: unknown keys, wrong types and missing values are refused."""

from __future__ import annotations

import dataclasses
import difflib
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import TDMError

T = TypeVar("T")
_ITEMS = {float: "numbers", int: "numbers", str: "texts"}  # in errors


def from_dict(cls: type[T], data: dict[str, Any], where: str = "") -> T:
    """Build dataclass ``cls`` from plain data, refusing unknown keys, wrong types and values that are missing;
    ``where`` names it in errors.
    """
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    names, values = list(fields), {}
    for key, value in data.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            raise TDMError(
                f"unknown setting {where}{key}; " + (f"did you mean {near[0]}?" if near else f"known: {names}")
            )
        values[key] = _coerce(value, hints[key], f"{where}{key}")
    missing = [f"{where}{name}" for name in names if name not in values and _has_no_default(fields[name])]
    if missing:
        raise TDMError(f"{', '.join(missing)} must be set")
    return cls(**values)


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _coerce(value: Any, hint: Any, name: str) -> Any:
    """``value`` as the type ``hint``, or a TDMError that names it."""
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise TDMError(f"{name} is a section with its own keys, not {value!r}")
        return from_dict(hint, value, f"{name}.")  # type: ignore[arg-type]
    if origin is Literal:
        if value not in args:
            raise TDMError(f"{name} must be one of {', '.join(map(str, args))}, not {value!r}")
        return value
    if origin in (Union, types.UnionType):
        return None if value is None else _coerce(value, next(a for a in args if a is not type(None)), name)
    if origin is tuple:
        if not isinstance(value, list | tuple) or (args[-1] is not ... and len(value) != len(args)):
            items = _ITEMS.get(args[0], "lists") if args[-1] is ... else len(args)
            raise TDMError(f"{name} must be a list of {items}, not {value!r}")
        return tuple(_coerce(item, args[0], f"{name}[{i}]") for i, item in enumerate(value))
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise TDMError(f"{name} is a section with its own keys, not {value!r}")
        if args and dataclasses.is_dataclass(args[1]):
            return {key: _coerce(item, args[1], f"{name}.{key}") for key, item in value.items()}
        return value
    if hint is float:
        value = _number(value)  # YAML 1.1 reads 1e-4 as a string
    if isinstance(value, bool) is not (hint is bool) or not isinstance(value, hint):
        raise TDMError(f"{name} must be of type {hint.__name__}, not {value!r}")
    return value


def _number(value: Any) -> Any:
    try:
        return value if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return value
