"""Every setting of ``tdm distill`` with its default and its description, from the dataclasses themselves."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import json
import textwrap
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import TDMError
from .config import (
    CriticConfig,
    DistillConfig,
    EmaConfig,
    MemoryConfig,
    ObjectiveConfig,
    OutputConfig,
    RoleConfig,
    TrajectoryConfig,
)
from .objectives import OBJECTIVES
from .tasks.mixture import MixtureTaskConfig
from .tasks.pipeline_settings import PipelineTaskConfig

WIDTH = 100  # columns
SECTIONS: dict[str, tuple[type, ...]] = {
    "run": (DistillConfig,),
    "task": (PipelineTaskConfig, MixtureTaskConfig),
    "trajectory": (TrajectoryConfig,),
    "objective": (ObjectiveConfig,),
    "student": (RoleConfig,),
    "critic": (CriticConfig,),
    "ema": (EmaConfig,),
    "memory": (MemoryConfig,),
    "output": (OutputConfig,),
}
"""The dataclasses of each section. The settings of "run" have no section in front of their names."""


def settings_reference(section: str | None = None) -> str:
    """The settings of one section, or of all: ``section.name=default``, its choices, and what it does.

    Raises:
        TDMError: there is no such section.
    """
    if section is not None and section not in SECTIONS:
        near = difflib.get_close_matches(section, SECTIONS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise TDMError(f"{section} is no section of the settings; {hint}sections: {', '.join(SECTIONS)}")
    names = SECTIONS if section is None else (section,)
    return "\n\n".join(_of_class(cls, name) for name in names for cls in SECTIONS[name])


def descriptions(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, its base classes' included, each as one paragraph."""
    texts: dict[str, str] = {}
    for parent in reversed(cls.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(parent))).body
        assert isinstance(definition, ast.ClassDef)
        for field, following in zip(definition.body, definition.body[1:], strict=False):
            match field, following:
                case (ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text)))):
                    texts[name] = " ".join(text.split())
    return texts


def _of_class(cls: type, section: str) -> str:
    prefix = "" if section == "run" else f"{section}."
    text, hints = descriptions(cls), get_type_hints(cls)
    heading = " ".join((cls.__doc__ or "").split())
    lines = [f"# {section}: {heading}".replace("`", "")]
    for field in dataclasses.fields(cls):
        if field.name in SECTIONS and field.name != "task":
            continue  # a section of its own
        lines.append(f"{prefix}{field.name}={_shown(field)}{_choices(f'{prefix}{field.name}', hints[field.name])}")
        description = text[field.name].replace("`", "").replace("None:", "null:")  # as it is written in YAML
        lines.append(textwrap.fill(description, WIDTH, initial_indent="    ", subsequent_indent="    "))
    return "\n".join(lines)


def _shown(field: dataclasses.Field[Any]) -> str:
    """The default of a field as it is written on the command line."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return default if isinstance(default, str) else json.dumps(default)


def _choices(name: str, hint: Any) -> str:
    values = dict.fromkeys(o.name for o in OBJECTIVES) if name == "objective.name" else get_args(hint)
    chosen = name == "objective.name" or get_origin(hint) is Literal
    return f"  ({' | '.join(values)})" if chosen else ""
