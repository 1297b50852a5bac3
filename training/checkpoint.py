"""Exact resume: everything a run is, in one file that is written under another name and then renamed.

Both adapters, the mean weights, both optimisers, the random generator (which is also the position in the data:
prompts are drawn from it) and the number of updates done. Learning rates are functions of that number, so there is no
scheduler to save.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from ..errors import TDMError, first_line
from ..files import RESUME, save_tensors, writing
from ..pipelines.students.recipe import StudentRecipe
from .config import DistillConfig
from .from_plain import from_dict
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
    identity: Mapping[str, str] | None = None,
) -> None:
    """Write the run after ``step`` updates; with ``output.keep`` above 1 the one that was there becomes
    ``checkpoint-<step>.pt``, and the oldest go. ``recipe`` is for whoever exports the student, ``identity`` (see
    ``Task.identity``) for whoever resumes the run.

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
        "identity": dict(identity or {}),
    }
    if config.output.keep > 1 and path.exists():
        _keep_another(path)
    save_tensors(payload, path)
    for old in older_checkpoints(path)[config.output.keep - 1 :]:
        old.unlink()


def older_checkpoints(path: Path) -> list[Path]:
    """The ``checkpoint-<step>.pt`` next to ``checkpoint.pt``, the newest first."""
    files = [old for old in path.parent.glob(f"{path.stem}-*{path.suffix}") if old.is_file()]
    steps = {old: old.stem.removeprefix(f"{path.stem}-") for old in files}
    return sorted((old for old in files if steps[old].isdigit()), key=lambda old: int(steps[old]), reverse=True)


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
        TDMError: no such file, damaged, or not a checkpoint of this version.
    """
    if not path.is_file():
        raise TDMError(f"no checkpoint {path}")
    try:
        if not mmap and zipfile.is_zipfile(path):  # torch compares no checksums
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"{damaged} in it is damaged")
        try:
            payload = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            if "torchao" not in str(error):
                raise
            import torchao.optim  # noqa: F401  # which makes its 8-bit moments known to weights_only

            payload = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged file can fail in any way
        raise TDMError(f"{path} is not a readable checkpoint: {first_line(error)}") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise TDMError(f"{path} is not a checkpoint of format {FORMAT}")
    return payload


def read_for_resume(
    path: Path, config: DistillConfig, identity: Mapping[str, str], report: Callable[[str], None]
) -> dict[str, Any]:
    """The content of a checkpoint that a run with these settings can go on from.

    A checkpoint that cannot be read, after a fault of the disk, is passed over with a line to ``report`` for the
    newest older one that can (see ``output.keep``).

    Args:
        identity: of the task (``Task.identity``); it is compared with that of the checkpoint.

    Raises:
        TDMError: no checkpoint can be read, it has other settings than those that may differ (`free_settings`), or
            prompts or base have another content than they had.
    """
    path, payload = _newest_readable(path, report)
    check_settings(path, payload, config)
    saved = payload.get("identity") or {}
    if changed := sorted(name for name, value in identity.items() if saved.get(name, value) != value):
        raise TDMError(
            f"{path} was made with other content of: {', '.join(changed)}; put back what was there, or begin a new run "
            f"in another folder with start_from={path}"
        )
    if (old := payload["config"].get("memory", {}).get("base")) != config.memory.base:
        report(f"note: memory.base was {old} and is {config.memory.base} now, which may round the base differently")
    return payload


def restore(
    payload: dict[str, Any], roles: Roles, ema: Ema, optimizers: dict[Role, Optimizer], generator: torch.Generator
) -> int:
    """Put a run back as a checkpoint's content has it, and return the number of updates done."""
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


def check_settings(path: Path, payload: Mapping[str, Any], config: DistillConfig) -> None:
    """Compare the settings of a checkpoint with those of a run that is to go on from it.

    Args:
        path: of the checkpoint, for errors.
        payload: its content.

    Raises:
        TDMError: they differ in what is not in `free_settings`.
    """
    free = free_settings(config, by_content=bool(payload.get("identity")))
    # A setting that is younger than the checkpoint counts as its default, which is how the run was made.
    before = dataclasses.asdict(from_dict(DistillConfig, payload["config"]))
    differences = list(_differences(before, dataclasses.asdict(config), free=free))
    if differences:
        raise TDMError(
            f"{path} was made with other settings: {'; '.join(differences)}; use those, or another output folder"
        )


def free_settings(config: DistillConfig, *, by_content: bool) -> set[str]:
    """The settings that may differ when a run is resumed, since what is learned does not depend on them.

    Args:
        by_content: the checkpoint knows the content of prompts and base, so that their names may differ.
    """
    free = {"output", "micro_batch_size", "task.cache", "task.evaluate"}
    free |= {f"memory.{name}" for name in ("base", "gradient_checkpointing", "offload", "shard")}
    if config.student.decay == config.critic.decay == "constant":  # no learning rate follows the number of updates
        free.add("updates")
    if config.precision == "auto":  # settled on the device
        free.add("precision")
    return free | {"task.model", "task.prompts", "task.loras"} if by_content else free


def _differences(old: Any, new: Any, free: set[str], name: str = "") -> Iterator[str]:
    """``key: old -> new`` for every leaf that differs."""
    if name in free:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), free, f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name}: {old} there, {new} here"
