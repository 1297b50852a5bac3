"""How many passes through the network one update takes: counted here once, for the estimate and for the tests."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import TDMError
from .config import DistillConfig


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
        looked_through: passes that the student's backward goes through on its way to a state (SiD): no weight there has
            a gradient, so that each costs about one forward more.
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
        """All forward passes; what gradient checkpointing makes again is not in them."""
        return self.prefix + self.student + self.critic + self.teacher + self.score

    @property
    def backwards(self) -> int:
        """All backward passes."""
        return self.student_backward + self.critic_backward

    @property
    def total(self) -> float:
        """What they cost together, in forward passes: a backward one is about two."""
        return self.forwards + 2 * self.backwards + self.looked_through


def passes(config: DistillConfig, processes: int = 1) -> Passes:
    """The passes of an update of student and critic: 6.5 forwards and 2 backwards at K = 4 with guidance.

    ``critic.share_noise`` saves the critic's second look (5.5). Without it, several micro batches cost the student's
    one step again (7.5), since its gradient has to wait until the critic has learned from all of them. Of a unified
    student they are a mean over its step counts.

    Args:
        config: of the run.
        processes: that share a batch, a device each.
    """
    t, o, n, share = config.trajectory, config.objective, config.critic.per_student, config.critic.share_noise
    counts = t.unify or (t.steps,)
    prefix = sum(k - 1 for k in counts) / 2 / len(counts)
    teacher = 1 if o.guidance_scale == 1 else 2
    if o.name == "consistency":  # the sample, the target and the prediction
        return Passes(prefix, student=3, critic=0, teacher=teacher, score=0, student_backward=1, critic_backward=0)
    if o.name == "regression":
        # The teacher's grid has about this many steps below each stage's start.
        ode = sum(round(o.ode_steps * (k - i) / k) / k for k in counts for i in range(k)) / len(counts)
        return Passes(
            prefix, student=1, critic=0, teacher=teacher * ode, score=0, student_backward=1, critic_backward=0
        )
    again = micro_batches(config, processes) > 1 and not share
    return Passes(
        prefix=n * prefix,
        student=n + again,
        critic=n,
        teacher=teacher + (o.guidance_term == "decoupled"),
        score=0 if share else 1,
        student_backward=1,
        critic_backward=n,
        looked_through=teacher + 1 if o.gradient == "sid" else 0,
    )


def micro_batch_size(config: DistillConfig, processes: int = 1) -> int:
    """Samples at a time on one device."""
    share = max(1, config.batch_size // processes)
    return min(config.micro_batch_size or share, share)


def micro_batches(config: DistillConfig, processes: int = 1) -> int:
    """Micro batches of one device in an update.

    Raises:
        TDMError: the batch cannot be split evenly.
    """
    if config.batch_size % processes:
        raise TDMError(f"batch_size {config.batch_size} cannot be shared evenly by {processes} processes")
    share, micro = config.batch_size // processes, micro_batch_size(config, processes)
    if share % micro:
        raise TDMError(f"micro_batch_size {micro} does not divide the {share} samples that each process has")
    return share // micro
