"""What a run starts from (``start_from``): an earlier run's checkpoint, or a LoRA that `TDMPipeline` loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import TDMError
from ..pipelines.loras.average import reduce
from ..pipelines.loras.pairs import Lora
from ..pipelines.students.locate import student_file
from ..pipelines.students.unplaced import unplaced
from .checkpoint import read_checkpoint
from .config import DistillConfig, Role, RoleConfig
from .roles import ROLES, STEPS, Roles
from .task import Task

LOST = 1e-6  # of a layer's update, that a smaller rank may lose: rounding


def check_start(source: str) -> None:
    """Check that there is something to start from, without reading it.

    Raises:
        TDMError: no such file, folder or hub repository.
    """
    path = Path(source)
    if path.suffix in (".pt", ".safetensors", ".ckpt", ".bin") and not path.is_file():
        raise TDMError(f"start_from: no file {source}")
    if not path.is_file():
        _file_of(source)


def start(roles: Roles, task: Task, config: DistillConfig) -> None:
    """Give student and critic the weights that ``config.start_from`` names. They add the same to the base as before,
    whatever rank and alpha are now.

    Raises:
        TDMError: there is nothing to start from, it cannot be read, or does not fit the base, the targets or the rank.
    """
    assert config.start_from is not None
    saved = _checkpoint(config.start_from)
    try:
        if saved is not None:
            _from_checkpoint(roles, config, saved)
        else:
            _from_student(roles, task, config, config.start_from)
    except TDMError as error:
        raise TDMError(f"start_from: {error}") from None


def _checkpoint(source: str) -> dict[str, Any] | None:
    """The content of a run's checkpoint; None for a file of another kind."""
    path = Path(source)
    if path.suffix != ".pt" or not path.is_file():
        return None
    try:
        return read_checkpoint(path)
    except TDMError as error:
        try:
            unplaced(path)  # a released student may be a .pt, too
        except TDMError:
            raise error from None
        return None


def _file_of(source: str) -> Path:
    try:
        return student_file(source, {})
    except TDMError as error:
        raise TDMError(f"start_from: {error}") from None


def _from_checkpoint(roles: Roles, config: DistillConfig, saved: dict[str, Any]) -> None:
    student, settings = saved["ema"]["weights"], {role: saved["config"][role] for role in ROLES}
    before = {role: RoleConfig(rank=settings[role]["rank"], alpha=settings[role]["alpha"]) for role in ROLES}
    load(roles, "student", student, before["student"], config.student)
    if config.critic.start == "teacher":
        return
    of: Role = "student" if config.critic.start == "student" else "critic"
    weights = student if of == "student" else saved["adapters"]["critic"]
    try:
        load(roles, "critic", weights, before[of], config.critic)
    except TDMError as error:
        raise TDMError(f"{error}; critic.start=teacher begins a new critic") from None


def _from_student(roles: Roles, task: Task, config: DistillConfig, source: str) -> None:
    """The LoRA of a student file, on the denoiser."""
    family = getattr(task, "family", None)
    if family is None or config.full_weights:
        raise TDMError(f"{source} is no checkpoint of a run; a student file is for adapters on a pipeline's network")
    if config.critic.start == "checkpoint":
        raise TDMError(f"{source} has a student and no critic; set critic.start=student or critic.start=teacher")
    layers = unplaced(_file_of(source)).place(family, {family.denoiser: task.base})[family.denoiser]
    weights = {f"{name}.lora_{half}.weight": getattr(lora, half) for name, lora in layers.items() for half in "AB"}
    as_it_is = RoleConfig(alpha=None)
    load(roles, "student", weights, as_it_is, config.student)
    if config.critic.start == "student":
        load(roles, "critic", weights, as_it_is, config.critic)


def load(roles: Roles, role: Role, weights: Mapping[str, Tensor], before: RoleConfig, now: RoleConfig) -> None:
    """Put adapter weights of another rank or alpha into a role; layers that have none keep their fresh adapter.

    Args:
        weights: ``<layer>.lora_A.weight`` and ``.lora_B.weight``, and the embedding of step counts if there is one; or
            whole weights, which have no rank.
        before: rank and alpha that they had; an alpha of None is a scale of 1.
        now: those of the role.

    Raises:
        TDMError: layers that the role does not train, a rank that it cannot hold, or other step counts.
    """
    if not any(name.endswith(".lora_A.weight") for name in weights):
        roles.load(role, dict(weights))  # whole weights
        return
    state = roles.state(role)
    steps, own = weights.get(STEPS), state.get(STEPS)
    if (steps is None) != (own is None) or (steps is not None and own is not None and steps.shape != own.shape):
        raise TDMError(f"these {role} weights are of another set of step counts than this run trains")
    if steps is not None:
        state[STEPS] = steps
    factor = _scale(before) / _scale(now)
    for name, A in weights.items():
        layer = name.removesuffix(".lora_A.weight")
        if layer == name:
            continue
        lora = Lora(A.float(), weights[f"{layer}.lora_B.weight"].float())
        if name not in state:
            if lora.is_zero:
                continue
            raise TDMError(
                f"these {role} weights are for other layers than this run trains, such as {layer}; set {role}.targets "
                "so that they are among them"
            )
        lora = _of_rank(lora, now.rank, role, layer)
        state[name][: lora.rank] = lora.A.to(state[name])
        B = torch.zeros_like(state[f"{layer}.lora_B.weight"])
        B[:, : lora.rank] = (lora.B * factor).to(B)
        state[f"{layer}.lora_B.weight"] = B
    roles.load(role, state)


def _scale(role: RoleConfig) -> float:
    """What a LoRA's product of factors is multiplied by."""
    return 1.0 if role.alpha is None else role.alpha / role.rank


def _of_rank(lora: Lora, rank: int, role: Role, layer: str) -> Lora:
    """A LoRA as one of at most this rank.

    Raises:
        TDMError: the rank cannot hold it.
    """
    if lora.rank <= rank:
        return lora
    smaller, singular = reduce(lora, rank)
    lost = float((singular[rank:].square().sum() / singular.square().sum().clamp_min(1e-300)).sqrt())
    if lost > LOST:
        raise TDMError(
            f"its rank is {lora.rank}, and {role}.rank={rank} would lose {lost:.0%} of {layer}; set "
            f"{role}.rank={lora.rank}"
        )
    return smaller
