"""Exact resume: everything a run is, in one file that is written beside its place and then renamed.

Both adapters, the mean weights, both optimisers, the random generator (which is also the position in the data:
prompts are drawn from it) and the number of updates done. Learning rates are functions of that number, so there is no
scheduler to save.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from ..errors import TDMError
from ..pipelines.student import StudentRecipe
from .config import DistillConfig
from .roles import ROLES, Ema, Role, Roles

FORMAT = 1


def save_checkpoint(
    path: Path,
    *,
    step: int,
    config: DistillConfig,
    recipe: StudentRecipe | None,
    roles: Roles,
    ema: Ema,
    optimizers: dict[Role, Optimizer],
    generator: torch.Generator,
) -> None:
    """Write the run after ``step`` updates. A run killed while writing leaves the file that was there.

    ``recipe`` is for whoever exports the student.
    """
    payload = {
        "format": FORMAT,
        "step": step,
        "config": dataclasses.asdict(config),
        "recipe": recipe and dataclasses.asdict(recipe),
        "adapters": {role: roles.state(role) for role in ROLES},
        "ema": {"count": ema.count, "weights": ema.weights},
        "optimizers": {role: optimizer.state_dict() for role, optimizer in optimizers.items()},
        "generator": generator.get_state(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    torch.save(payload, temporary)
    os.replace(temporary, path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, tensors on the CPU. Nothing in the file is executed (``weights_only``).

    Raises:
        TDMError: no such file, or not a checkpoint of this version.
    """
    if not path.is_file():
        raise TDMError(f"no checkpoint {path}")
    try:
        try:
            payload = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if "torchao" not in str(error):
                raise
            import torchao.optim  # noqa: F401  # which makes its 8-bit moments known to weights_only

            payload = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise TDMError(f"{path} is not a readable checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise TDMError(f"{path} is not a checkpoint of format {FORMAT}")
    return payload


def restore_checkpoint(
    path: Path,
    *,
    config: DistillConfig,
    roles: Roles,
    ema: Ema,
    optimizers: dict[Role, Optimizer],
    generator: torch.Generator,
) -> int:
    """Put a run back as it was and return the number of updates done.

    Raises:
        TDMError: not a checkpoint, or one of other settings; ``output`` may differ, and so may ``updates`` while no
            learning
            rate decays towards its end.
    """
    payload = read_checkpoint(path)
    differences = list(_differences(payload["config"], dataclasses.asdict(config), free=_free(config)))
    if differences:
        raise TDMError(
            f"{path} was made with other settings: {'; '.join(differences)}; use those, or another output folder"
        )
    for role in ROLES:
        roles.load(role, payload["adapters"][role])
        optimizers[role].load_state_dict(payload["optimizers"][role])
    ema.count = payload["ema"]["count"]
    for name, weight in ema.weights.items():
        weight.copy_(payload["ema"]["weights"][name])
    generator.set_state(payload["generator"])
    return payload["step"]


def _free(config: DistillConfig) -> set[str]:
    steady = config.student.decay == config.critic.decay == "constant"
    return {"output", "updates"} if steady else {"output"}


def _differences(old: Any, new: Any, name: str = "", free: set[str] = frozenset()) -> Iterator[str]:  # type: ignore[assignment]
    """``key: old -> new`` for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new} - set(free)):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name}: {old} there, {new} here"
