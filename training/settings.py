"""Settings as people give them: configurations by file or preset, and ``key=value``.

An unknown key, a wrong type or settings that cannot work together are one-line :class:`TDMError`s with the nearest
name.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from ..errors import TDMError
from .config import DistillConfig
from .presets import BEHIND, find_config
from .progress import Report, print_line
from .validation import validate

T = TypeVar("T")
_ITEMS = {float: "numbers", int: "numbers", str: "texts"}  # in errors
# Settings that name files: taken as they are written, for YAML reads "[best].txt", "a #1.txt" or "on" otherwise.
_NAMES = ("task.model", "task.prompts", "task.cache", "start_from")


def read_settings(settings: Sequence[str], report: Report = print_line) -> DistillConfig:
    """The configuration of a command line: names or files of configurations, merged in their order, then the
    ``key=value`` settings.

    Without a configuration that says what is distilled it is the preset of the family of ``task.model``, or else the
    bundled teacher.

    Args:
        settings: of the command line.
        report: takes the line that says which preset was chosen for a base.

    Raises:
        TDMError: what `load_config` refuses, or ``task.model`` cannot be read.
    """
    configs = [text for text in settings if "=" not in text]
    values = [text for text in settings if "=" in text]
    if all(config in BEHIND for config in configs):
        models = [text.partition("=")[2] for text in values if text.startswith("task.model=")]
        configs = [_preset_of(models[-1], report) if models else "bundled", *configs]
    return load_config(configs, values)


def _preset_of(model: str, report: Report) -> str:
    """The name of the preset for a base, that of its family."""
    from ..pipelines.bases import BUNDLED, base_folder, family_of_base  # diffusers, which no other setting needs

    model = os.path.expanduser(model.strip("'\""))
    if model == BUNDLED:
        return BUNDLED
    family = family_of_base(base_folder(model)).name
    report(f"{model} is a base of {family}: the preset {family} is taken, with the settings given in its place")
    return family


def load_config(
    configs: str | Path | Sequence[str | Path] | None = None, overrides: Sequence[str] = ()
) -> DistillConfig:
    """Read configurations, apply ``section.key=value`` overrides (values are YAML) and check the result.

    Args:
        configs: YAML files, or names of presets (training/presets.py). A later one replaces the keys that it has, in
            sections key by key.
        overrides: applied last, in their order.

    Raises:
        TDMError: a file is missing or not a mapping, a key is unknown, a type or a value is wrong.
    """
    data: dict[str, Any] = {}
    for config in (configs,) if isinstance(configs, str | Path) else configs or ():
        _merge(data, _read(find_config(config)))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise TDMError(f"an override is key=value, for example student.lr=1e-4, not {override!r}")
        *sections, last = key.split(".")
        node = data
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise TDMError(f"{key}: {section} is a value, not a section")
        node[last] = _setting(key, value)
    settings = from_dict(DistillConfig, data)
    validate(settings)
    return settings


def _setting(key: str, text: str) -> Any:
    """The value of an override ``key=text``.

    Raises:
        TDMError: it is no YAML.
    """
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if key in _NAMES and not quoted and text not in ("", "null", "~"):
        return os.path.expanduser(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise TDMError(f"{key}={text}: cannot read the value as YAML; put it in quotes ({line})") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TDMError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise TDMError(f"{path} must hold 'key: value' settings")
    return data


def _merge(data: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(data.get(key), dict):
            _merge(data[key], value)
        else:
            data[key] = value


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
