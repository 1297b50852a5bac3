"""What a run starts from (``start_from``): an earlier run's checkpoint, a LoRA that `TDMPipeline` loads, or a distilled
checkpoint of the base's family, from which a LoRA is extracted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import TDMError
from ..pipelines.loras.average import reduce
from ..pipelines.loras.pairs import Lora, state_dict_of
from ..pipelines.students.locate import student_file
from ..pipelines.students.unplaced import unplaced
from .checkpoint import read_checkpoint
from .config import DistillConfig, Role, RoleConfig
from .distilled import distilled_weights, is_distilled
from .extraction import Extraction, check_same_model, extract
from .progress import Report, silent
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
    if not path.is_file() and not (path.is_dir() and is_distilled(path)):
        _file_of(source)


def start(roles: Roles, task: Task, config: DistillConfig, report: Report = silent) -> Extraction | None:
    """Give student and critic the weights that ``config.start_from`` names. They add the same to the base as before,
    whatever rank and alpha are now; of a distilled checkpoint as much of it as an adapter of the rank can.

    Args:
        report: takes the progress lines of an extraction.

    Returns:
        what an extraction held and left; None for anything else.

    Raises:
        TDMError: there is nothing to start from, it cannot be read, or does not fit the base, the targets or the rank.
    """
    assert config.start_from is not None
    saved = _checkpoint(config.start_from)
    try:
        if saved is not None:
            _from_checkpoint(roles, config, saved)
        elif is_distilled(path := _place_of(config.start_from)):
            return _from_distilled(roles, task, config, path, report)
        else:
            _from_student(roles, task, config, path)
    except TDMError as error:
        raise TDMError(f"start_from: {error}") from None
    return None


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


def _place_of(source: str) -> Path:
    """The folder of a distilled checkpoint, or the file of that or of a student."""
    path = Path(source)
    return path if path.is_dir() and is_distilled(path) else student_file(source, {})


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


def _from_student(roles: Roles, task: Task, config: DistillConfig, source: Path) -> None:
    """The LoRA of a student file, on the denoiser."""
    family = getattr(task, "family", None)
    if family is None or config.full_weights:
        raise TDMError(f"{source} is no checkpoint of a run; a student file is for adapters on a pipeline's network")
    _require_critic_start(config, source)
    layers = unplaced(source).place(family, {family.denoiser: task.base})[family.denoiser]
    for role in ROLES if config.critic.start == "student" else ROLES[:1]:
        load(roles, role, state_dict_of(layers), RoleConfig(alpha=None), config.roles[role])


def _from_distilled(roles: Roles, task: Task, config: DistillConfig, source: Path, report: Report) -> Extraction | None:
    """The weights of a distilled checkpoint: all of them for a run of whole weights, a LoRA of each role's rank
    otherwise.
    """
    base_model = getattr(task, "base_model", None)
    if base_model is None:
        raise TDMError(f"{source} is a model of a pipeline, which this task does not distil")
    _require_critic_start(config, source)
    base = base_model.weights(base_model.family.denoiser)
    distilled = distilled_weights(source, base_model, task.base, task.prediction_type)
    of = ROLES if config.critic.start == "student" else ROLES[:1]
    if config.full_weights:
        check_same_model(base, distilled, source.name)
        for role in of:
            roles.load(role, {name: distilled.get(name, weight) for name, weight in roles.state(role).items()})
        return None
    extraction = extract(roles, task, config, of, (base, distilled), source.name, report)
    for role, layers in extraction.layers.items():
        load(roles, role, state_dict_of(layers), RoleConfig(alpha=None), config.roles[role])
    return extraction


def _require_critic_start(config: DistillConfig, source: Path) -> None:
    if config.critic.start == "checkpoint":
        raise TDMError(f"{source} has a student and no critic; set critic.start=student or critic.start=teacher")


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
