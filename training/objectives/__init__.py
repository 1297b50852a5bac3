"""What a student can minimise: one table, `OBJECTIVES`, and pages of pure functions that it names.

All of them share the trajectory, the roles and the batch's randomness. To add one, write its loss and its passes, and
add an `Objective` here. Update, validation, estimate and model card follow from the entry. A preset (a file in
training/configs whose first line begins with "# Objective:") names a combination of settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...errors import TDMError
from ..batch import Batch
from ..config import Band, CriticConfig, DistillConfig, ObjectiveConfig
from ..roles import Role, Roles
from .matching import (
    CriticForward,
    Metrics,
    StudentStep,
    critic_objective,
    decoupled_objective,
    decoupled_passes,
    matching_method,
    matching_objective,
    matching_passes,
    sid_objective,
    sid_passes,
)
from .passes import Passes
from .towards import consistency_objective, consistency_passes, regression_objective, regression_passes

StudentLoss = Callable[[Roles, ObjectiveConfig, Batch, StudentStep, CriticForward | None], tuple[Tensor, Metrics]]
"""``(roles, config, batch, step, forward) -> (scalar loss, metrics)``. ``forward`` is the critic's forward if the
student shares it, else None.
"""

CriticLoss = Callable[[Roles, CriticConfig, Batch, StudentStep, CriticForward], Tensor]
"""``(roles, config, batch, step, forward) -> scalar loss`` of the critic on the student's states."""


@dataclass(frozen=True)
class Objective:
    """An objective: what it trains, what it draws and what it costs.

    Attributes:
        name, gradient, guidance_term: the settings ``objective.*`` that choose it.
        method: what it is called, with its source; or how that follows from the settings.
        student_loss: the student's loss of one micro batch.
        passes: its passes per sample. The second argument says whether a device takes its share of a batch in several
            micro batches.
        critic_loss: the critic's loss of one micro batch. None: it trains no critic.
        through_step: the student's gradient goes through its step of the stage, whose graph is kept for it.
        shares_noise: it can take the critic's forward in place of its own (``critic.share_noise``).
        guidance_renoise: its batches carry a re-noising for a guidance term, in ``objective.guidance_band``.
        needs_guidance: it is for ``objective.guidance_scale`` above 1.
    """

    name: str
    method: str | Callable[[DistillConfig], str]
    student_loss: StudentLoss
    passes: Callable[[DistillConfig, bool], Passes]
    gradient: str = "kl"
    guidance_term: str = "coupled"
    critic_loss: CriticLoss | None = None
    through_step: bool = True
    shares_noise: bool = False
    guidance_renoise: bool = False
    needs_guidance: bool = False

    @property
    def trains(self) -> tuple[Role, ...]:
        """The roles that it trains. The others keep the weights that they start with."""
        return ("student",) if self.critic_loss is None else ("student", "critic")

    def guidance_band(self, config: ObjectiveConfig) -> Band | None:
        """The band of tau in its guidance term; None if it has no such term."""
        return config.guidance_band if self.guidance_renoise else None


OBJECTIVES = (
    Objective(
        name="matching",
        method=matching_method,
        student_loss=matching_objective,
        critic_loss=critic_objective,
        passes=matching_passes,
        shares_noise=True,
    ),
    Objective(
        name="matching",
        guidance_term="decoupled",
        method=matching_method,
        student_loss=decoupled_objective,
        critic_loss=critic_objective,
        passes=decoupled_passes,
        guidance_renoise=True,
        needs_guidance=True,
    ),
    Objective(
        name="matching",
        gradient="sid",
        method="score identity distillation (SiD, arXiv 2404.04057)",
        student_loss=sid_objective,
        critic_loss=critic_objective,
        passes=sid_passes,
    ),
    Objective(
        name="consistency",
        method="latent consistency distillation without pictures (LCM, arXiv 2310.04378)",
        student_loss=consistency_objective,
        passes=consistency_passes,
        through_step=False,
    ),
    Objective(
        name="regression",
        method="regression onto the end of the teacher's ODE",
        student_loss=regression_objective,
        passes=regression_passes,
    ),
)


def objective_of(config: ObjectiveConfig) -> Objective:
    """The objective that the settings name.

    Raises:
        TDMError: no objective has these ``name``, ``gradient`` and ``guidance_term``.
    """
    named = [objective for objective in OBJECTIVES if objective.name == config.name]
    if not named:
        names = dict.fromkeys(objective.name for objective in OBJECTIVES)
        raise TDMError(f"objective.name must be one of {', '.join(names)}, not {config.name!r}")
    with_gradient = [objective for objective in named if objective.gradient == config.gradient]
    if not with_gradient:
        names = dict.fromkeys(o.name for o in OBJECTIVES if o.gradient == config.gradient)
        raise TDMError(
            f"objective.gradient={config.gradient} is for objective.name={' or '.join(names)}, not {config.name}"
        )
    for objective in with_gradient:
        if objective.guidance_term == config.guidance_term:
            return objective
    fitting = [
        f"objective.name={o.name} with gradient={o.gradient}"
        for o in OBJECTIVES
        if o.guidance_term == config.guidance_term
    ]
    raise TDMError(f"objective.guidance_term={config.guidance_term} is for {' or '.join(fitting)}")


def method_of(config: DistillConfig) -> str:
    """What a run's settings are called, with its source."""
    method = objective_of(config.objective).method
    return method if isinstance(method, str) else method(config)
