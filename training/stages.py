"""The stages of a run: one after another on the same student, each with settings of its own.

A stage patches the run's settings, and no stage sees another's patch. The student and its running mean go on from one
stage to the next; critic and optimisers go on or begin anew, as the stage says. A run without stages is one stage.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import TDMError
from .config import DistillConfig, TrajectoryConfig
from .from_plain import from_dict

SECTIONS = ("trajectory", "objective", "student", "critic", "ema")
VALUES = ("batch_size", "micro_batch_size")
OF_THE_STAGE = ("name", "updates", "optimizers")
OF_THE_RUN = ("rank", "alpha", "targets")  # an adapter's shape stays as it is


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
        index: 0 for the first.
        name: for people.
        config: the run's settings with the stage's in their place. Its ``updates`` are the stage's, its ``stages``
            empty.
        begin: updates of the run before it, those of the critic alone included.
        optimizers: whether they go on from the stage before, or begin anew.
        critic: where the critic begins: where the stage before left it ("checkpoint"), from the student, or from the
            teacher.
    """

    index: int
    name: str
    config: DistillConfig
    begin: int
    optimizers: Literal["continue", "fresh"]
    critic: Literal["checkpoint", "student", "teacher"]

    @property
    def end(self) -> int:
        """Updates of the run up to its end."""
        return self.student_from + self.config.updates

    @property
    def student_from(self) -> int:
        """Updates of the run before the student's first one in this stage (``critic.head_start``)."""
        return self.begin + self.config.critic.head_start


def stages_of(config: DistillConfig) -> list[Stage]:
    """The stages of a run, in their order.

    Raises:
        TDMError: a stage has an unknown setting, one that belongs to the whole run, or no ``updates``; or optimisers
            are to go on where the trained weights change.
    """
    if not config.stages:
        return [Stage(0, "", config, 0, "fresh", config.critic.start)]
    stages: list[Stage] = []
    for index, patch in enumerate(config.stages):
        where, begin = f"stages[{index}]", stages[-1].end if stages else 0
        patched = _patched(config, patch, where)
        optimizers = patch.get("optimizers", "fresh")
        if optimizers not in ("continue", "fresh"):
            raise TDMError(f"{where}.optimizers must be continue or fresh, not {optimizers!r}")
        # The run's own critic.start is about start_from: it counts for the first stage alone.
        critic = patched.critic.start if index == 0 or "start" in patch.get("critic", {}) else "checkpoint"
        if optimizers == "continue" and stages and _step_vectors(stages[-1].config) != _step_vectors(patched):
            raise TDMError(
                f"{where} trains other weights than the stage before (trajectory.unify): its optimizers must be fresh"
            )
        if stages and _student_vectors(stages[-1].config) != _student_vectors(patched):
            raise TDMError(f"{where}: with trajectory.tell_steps=embedding all stages need the same trajectory.unify")
        name = str(patch.get("name", f"{patched.objective.name}, {_steps(patched.trajectory)}"))
        stages.append(Stage(index, name, patched, begin, optimizers, critic))
    return stages


def total_updates(config: DistillConfig) -> int:
    """All updates of a run, those of the critic alone included."""
    return stages_of(config)[-1].end


def stage_of_update(stages: list[Stage], step: int) -> Stage:
    """The stage of a run's update number ``step``, counted from 1; 0 counts as the first."""
    return next((stage for stage in stages if step <= stage.end), stages[-1])


def _steps(trajectory: TrajectoryConfig) -> str:
    counts = trajectory.unify or (trajectory.steps,)
    return f"{', '.join(map(str, counts))} step{'s' * (counts != (1,))}"


def _step_vectors(config: DistillConfig) -> tuple[int, str]:
    """How many step counts the roles have an embedding of, and which roles."""
    t = config.trajectory
    return (len(t.unify), t.tell_steps) if t.unify and t.tell_steps != "none" else (0, "none")


def _student_vectors(config: DistillConfig) -> int:
    count, known_by = _step_vectors(config)
    return count if known_by == "embedding" else 0


def _patched(config: DistillConfig, patch: dict[str, Any], where: str) -> DistillConfig:
    """The run's settings with those of a stage in their place."""
    if not isinstance(patch, dict):
        raise TDMError(f"{where} is a section with its own keys, not {patch!r}")
    data = {**dataclasses.asdict(config), "stages": ()}
    for key, value in patch.items():
        if key in OF_THE_STAGE:
            continue
        if key not in SECTIONS + VALUES:
            raise TDMError(
                f"{where}.{key} is not for a stage; it may have {', '.join(OF_THE_STAGE + VALUES + SECTIONS)}"
            )
        if key in VALUES:
            data[key] = value
            continue
        if not isinstance(value, dict):
            raise TDMError(f"{where}.{key} is a section with its own keys, not {value!r}")
        if fixed := [name for name in OF_THE_RUN if name in value]:
            raise TDMError(f"{where}.{key}.{fixed[0]} is the same in all stages; set {key}.{fixed[0]}")
        data[key] = {**data[key], **value}
    data["updates"] = _updates(config, patch, where)
    try:
        return from_dict(DistillConfig, data)
    except TDMError as error:
        raise TDMError(f"{where}: {error}") from None


def _updates(config: DistillConfig, patch: dict[str, Any], where: str) -> int:
    """The updates of a stage: a whole number, or a share of the run's ``updates``."""
    updates = patch.get("updates")
    if isinstance(updates, float) and 0 < updates < 1:
        return max(1, round(updates * config.updates))
    if isinstance(updates, bool) or not isinstance(updates, int) or updates < 1:
        raise TDMError(
            f"{where}.updates must be a whole number above 0, or a share of the run's updates such as 0.25, "
            f"not {updates!r}"
        )
    return updates
