"""Exact resume: everything a run is, in one file that is written under another name and then renamed.

Both adapters, the mean weights, both optimisers, the random generator (which is also the position in the data:
prompts are drawn from it) and the number of updates done. Learning rates are functions of that number, so there is no
scheduler to save.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from ..errors import TDMError, first_line
from ..files import RESUME, save_tensors, writing
from ..pipelines.students.recipe import StudentRecipe
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
    """Write the run after ``step`` updates; with ``output.keep`` above 1 the one that was there becomes
    ``checkpoint-<step>.pt``, and the oldest go. ``recipe`` is for whoever exports the student.

    At every moment, and if the write fails, ``path`` is a whole checkpoint: the old one or the new one.

    Raises:
        TDMError: the write failed, for example on a full disk.
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
    if config.output.keep > 1 and path.exists():
        _keep_another(path)
    save_tensors(payload, path)
    for old in older_checkpoints(path)[config.output.keep - 1 :]:
        old.unlink()


def older_checkpoints(path: Path) -> list[Path]:
    """The ``checkpoint-<step>.pt`` beside ``checkpoint.pt``, the newest first."""
    steps = {old: old.stem.removeprefix(f"{path.stem}-") for old in path.parent.glob(f"{path.stem}-*{path.suffix}")}
    return sorted((old for old in steps if steps[old].isdigit()), key=lambda old: int(steps[old]), reverse=True)


def _keep_another(path: Path) -> None:
    """Give the checkpoint a second name, by its step, which stays when the next one takes the first."""
    try:
        step = read_checkpoint(path, mmap=True)["step"]
    except TDMError:
        return  # one that cannot be read is not worth keeping
    name = path.with_stem(f"{path.stem}-{step:06d}")
    with writing(name, RESUME):
        name.unlink(missing_ok=True)
        os.link(path, name)


def read_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """The content of a checkpoint, tensors on the CPU. Nothing in the file is executed (``weights_only``).

    Args:
        mmap: leave the tensors in the file until they are asked for.

    Raises:
        TDMError: no such file, or not a checkpoint of this version.
    """
    if not path.is_file():
        raise TDMError(f"no checkpoint {path}")
    try:
        try:
            payload = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            if "torchao" not in str(error):
                raise
            import torchao.optim  # noqa: F401  # which makes its 8-bit moments known to weights_only

            payload = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise TDMError(f"{path} is not a readable checkpoint: {first_line(error)}") from error
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
    report: Callable[[str], None],
) -> int:
    """Put a run back as it was and return the number of updates done.

    A checkpoint that cannot be read, after a fault of the disk, is passed over with a line to ``report`` for the
    newest older one that can (see ``output.keep``).

    Raises:
        TDMError: no checkpoint can be read, or it has other settings; ``output`` may differ, and so may ``updates``
            while no learning rate decays towards its end.
    """
    path, payload = _newest_readable(path, report)
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


def _newest_readable(path: Path, report: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    older = older_checkpoints(path)
    for candidate, following in zip([path, *older], [*older, None], strict=True):
        try:
            return candidate, read_checkpoint(candidate)
        except TDMError as error:
            if following is None:
                raise
            report(f"{error}; trying the older {following.name}")
    raise AssertionError("the last candidate is returned or raises")


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
