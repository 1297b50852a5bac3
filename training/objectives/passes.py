"""What an objective costs: its passes through the network, which each entry of the table counts."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import DistillConfig


@dataclass(frozen=True)
class Passes:
    """Passes per sample of one update, means over the stages.

    Attributes:
        prefix: the student, without gradient, to where the stage starts.
        student: the student's one step.
        critic: the critic, to learn from the student's state.
        teacher: the base, with and without the prompt.
        score: the critic again, for the student.
        student_backward, critic_backward: backward passes.
        looked_through: passes that the student's backward goes through on its way to a state (SiD). No weight there has
            a gradient, so each costs about one forward more.
    """

    prefix: float
    student: int
    critic: int
    teacher: float
    score: int
    student_backward: int
    critic_backward: int
    looked_through: int = 0

    @property
    def forwards(self) -> float:
        """All forward passes, without those that gradient checkpointing repeats."""
        return self.prefix + self.student + self.critic + self.teacher + self.score

    @property
    def backwards(self) -> int:
        """All backward passes."""
        return self.student_backward + self.critic_backward

    @property
    def total(self) -> float:
        """What they cost together, in forward passes: a backward one is about two."""
        return self.forwards + 2 * self.backwards + self.looked_through


def step_counts(config: DistillConfig) -> tuple[int, ...]:
    """The step counts that the student learns; each update draws one of them."""
    return config.trajectory.unify or (config.trajectory.steps,)


def prefix_passes(config: DistillConfig) -> float:
    """The mean number of student passes to where a stage starts: (K - 1) / 2."""
    counts = step_counts(config)
    return sum(k - 1 for k in counts) / 2 / len(counts)


def teacher_passes(config: DistillConfig) -> int:
    """Passes of one prediction of the guided teacher."""
    return 1 if config.objective.guidance_scale == 1 else 2
