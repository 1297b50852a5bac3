"""What the settings of a run must satisfy together. The grid against a task's schedule is checked by ``Trajectory``."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

from ..errors import TDMError
from .config import CriticConfig, DistillConfig, EmaConfig, ObjectiveConfig, OutputConfig, RoleConfig, TrajectoryConfig
from .objectives import OBJECTIVES, objective_of
from .stages import stages_of
from .trajectory import BANDS_BELOW_THE_STATE

LARGEST_RANK = 8192  # beyond the width of any supported base: only a typing error is above it


def validate(config: DistillConfig) -> None:
    """Check the settings of a run.

    Raises:
        TDMError: a value is out of its range, or settings cannot work together.
    """
    if config.stages:
        for stage in stages_of(config):
            try:
                validate(stage.config)
            except TDMError as error:
                raise TDMError(f"stages[{stage.index}]: {error}") from None
        return
    _batch(config)
    _trajectory(config.trajectory)
    _objective(config.objective, config.trajectory)
    _objective_of_run(config)
    for name, role in (("student", config.student), ("critic", config.critic)):
        _role(name, role, config.full_weights)
    _critic(config.critic)
    _ema(config.ema)
    _output(config.output)


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise TDMError(message)


def _batch(c: DistillConfig) -> None:
    _need(c.updates > 0, f"updates must be positive, not {c.updates}")
    _need(0 <= c.seed < 2**63, f"seed must be 0 or more and below 2^63, not {c.seed}")
    _need(c.batch_size > 0, f"batch_size must be positive, not {c.batch_size}")
    micro = c.micro_batch_size
    _need(
        micro is None or (micro > 0 and c.batch_size % micro == 0),
        f"micro_batch_size must divide batch_size, which is {c.batch_size}; {micro} does not",
    )
    group = c.samples_per_prompt
    _need(
        group > 0 and c.batch_size % group == 0,
        f"samples_per_prompt must divide batch_size, which is {c.batch_size}; {group} does not",
    )


def _trajectory(t: TrajectoryConfig) -> None:
    _need(t.steps > 0, f"trajectory.steps must be positive, not {t.steps}")
    grid = t.timesteps
    if grid is not None:
        _need(len(grid) == t.steps, f"trajectory.timesteps has {len(grid)} entries for {t.steps} steps; give as many")
        _need(
            all(a > b for a, b in pairwise(grid)) and grid[-1] > 0,
            f"trajectory.timesteps must strictly decrease and stay positive, not {list(grid)}",
        )
    _need(t.shift > 0, f"trajectory.shift must be positive, not {t.shift}")
    _need(0 <= t.tau_min < t.tau_max < 1, f"need 0 <= tau_min < tau_max < 1, not {t.tau_min}, {t.tau_max}")
    _need(0 < t.eta <= 1, f"trajectory.eta must be above 0 and at most 1, not {t.eta}")
    _need(t.eta == 1 or t.sampler == "stochastic", "trajectory.eta below 1 is for trajectory.sampler=stochastic")
    _need(0 < t.margin < 0.5, f"trajectory.margin must be in (0, 0.5), not {t.margin}")
    if t.unify is not None:
        counts = len(set(t.unify)) == len(t.unify) and all(k > 0 for k in t.unify)
        _need(
            counts and t.steps in t.unify,
            f"trajectory.unify needs step counts, trajectory.steps (it is {t.steps}) among them",
        )
        _need(grid is None, "trajectory.timesteps is the grid of one step count; leave it out with unify")
    _need(0 < t.spread < 0.2, f"trajectory.spread must be in (0, 0.2), not {t.spread}")


def _objective(o: ObjectiveConfig, t: TrajectoryConfig) -> None:
    _need(o.guidance_scale >= 1, f"objective.guidance_scale must be at least 1, not {o.guidance_scale}")
    by_stage = o.stage_guidance
    _need(
        by_stage is None or (len(by_stage) == t.steps and min(by_stage) >= 1 and o.guidance_scale > 1),
        f"objective.stage_guidance needs {t.steps} numbers of at least 1, and a guidance_scale above 1",
    )
    drawn = o.guidance_range
    _need(
        drawn is None or (1 <= drawn[0] < drawn[1] and o.guidance_scale > 1 and by_stage is None),
        "objective.guidance_range needs two rising numbers of at least 1, a guidance_scale above 1 for previews, and "
        "no stage_guidance",
    )
    _need(o.norm_min > 0, f"objective.norm_min must be positive, not {o.norm_min}")
    _need(o.huber_c is None or o.huber_c > 0, f"objective.huber_c must be positive, not {o.huber_c}")
    _need(
        t.bands not in BANDS_BELOW_THE_STATE or t.renoise == "clean",
        f"trajectory.bands={t.bands} goes below the states; set trajectory.renoise=clean",
    )
    _need(
        o.guidance_term == "coupled" or o.rho == "mse",
        "objective.guidance_term=decoupled needs objective.rho=mse: the gradient of a Huber is a sign, which cancels "
        "the guidance scale",
    )
    _need(not o.guided_critic or o.gradient == "sid", "objective.guided_critic is for objective.gradient=sid")
    _need(
        o.norm_max is None or o.norm_max > o.norm_min,
        f"objective.norm_max must be above norm_min, which is {o.norm_min}; it is {o.norm_max}",
    )
    _need(o.anchor >= 0 and o.spread >= 0, "objective.anchor and objective.spread must not be negative")
    _need(o.anchor_steps > 0, f"objective.anchor_steps must be positive, not {o.anchor_steps}")
    _need(
        o.anchor == 0 or max(t.unify or (t.steps,)) > 1,
        "objective.anchor is for the first of several steps: the only step of a student ends in the picture",
    )
    _need(o.ode_steps >= t.steps, f"objective.ode_steps must be at least trajectory.steps, not {o.ode_steps}")
    _need(o.guidance_weight >= 0, f"objective.guidance_weight must not be negative, not {o.guidance_weight}")


def _objective_of_run(c: DistillConfig) -> None:
    """What the objective's entry in the table asks of the other settings."""
    o, objective = c.objective, objective_of(c.objective)
    _need(
        "critic" in objective.trains or c.critic.head_start == 0,
        f"objective.name={o.name} trains no critic: critic.head_start must be 0",
    )
    _need(
        not objective.needs_guidance or o.guidance_scale > 1,
        f"objective.guidance_term={o.guidance_term} needs a guidance_scale above 1",
    )
    _need(
        objective.through_step or (o.anchor == 0 and o.spread == 0),
        f"objective.name={o.name} does not train steps: leave objective.anchor and objective.spread out",
    )
    _need(
        o.spread == 0 or (c.samples_per_prompt > 1 and c.trajectory.stages == "update"),
        "objective.spread needs samples_per_prompt above 1 and trajectory.stages=update",
    )
    sharing = [f"objective.name={x.name}, gradient={x.gradient}, guidance_term={x.guidance_term}"
               for x in OBJECTIVES if x.shares_noise]  # fmt: skip
    _need(
        objective.shares_noise or not c.critic.share_noise,
        f"critic.share_noise is for {' or '.join(sharing)}",
    )


def _role(name: str, role: RoleConfig, full_weights: bool) -> None:
    _need(
        0 < role.rank <= LARGEST_RANK,
        f"{name}.rank must be 1 to {LARGEST_RANK}, for no layer of a base has a higher one; it is {role.rank}",
    )
    _need(role.alpha is None or role.alpha > 0, f"{name}.alpha must be positive, not {role.alpha}")
    _need(role.targets != (), f"{name}.targets must name at least one layer")
    _need(role.targets is None or not full_weights, f"{name}.targets is for adapters; full_weights trains all")
    _need(role.lr > 0, f"{name}.lr must be positive, not {role.lr}")
    _need(role.clip > 0, f"{name}.clip must be positive, not {role.clip}")
    _need(all(0 <= b < 1 for b in role.betas), f"{name}.betas must be in [0, 1), not {list(role.betas)}")
    _need(role.weight_decay >= 0 and role.warmup >= 0, f"{name}.weight_decay and {name}.warmup must not be negative")
    _need(0 <= role.lr_end <= 1, f"{name}.lr_end is a fraction of lr, not {role.lr_end}")


def _critic(critic: CriticConfig) -> None:
    _need(critic.weight_limit > 0, f"critic.weight_limit must be positive, not {critic.weight_limit}")
    _need(critic.per_student > 0, f"critic.per_student must be positive, not {critic.per_student}")
    _need(critic.leash >= 0, f"critic.leash must not be negative, not {critic.leash}")
    _need(
        critic.skip_above is None or critic.skip_above > 0,
        f"critic.skip_above must be positive, not {critic.skip_above}",
    )
    _need(critic.head_start >= 0, f"critic.head_start must not be negative, not {critic.head_start}")


def _ema(ema: EmaConfig) -> None:
    _need(0 <= ema.decay < 1, f"ema.decay must be in [0, 1), not {ema.decay}")


def _output(output: OutputConfig) -> None:
    for f in dataclasses.fields(output):
        _need(getattr(output, f.name) >= 0, f"output.{f.name} must not be negative")
    _need(
        output.log_every > 0 and output.teacher_steps > 0,
        "output.log_every and output.teacher_steps must be positive",
    )
    _need(output.keep > 0, "output.keep must be positive: the last checkpoint is always kept")
