"""Settings as people give them: configurations by file or preset, and ``key=value``.

An unknown key, a wrong type or settings that cannot work together are one-line :class:`TDMError`s with the nearest
name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import TDMError
from .config import DistillConfig
from .from_plain import from_dict
from .presets import BEHIND, find_config
from .progress import Report, print_line
from .validation import validate

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
    from ..pipelines.outlines import published_configs

    model = os.path.expanduser(model.strip("'\""))
    if model == BUNDLED:
        return BUNDLED
    family = family_of_base(str(published_configs(model) or base_folder(model))).name
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
