"""The training loop: draws batches, updates, and writes what a person wants to see. The method itself is in
update.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import TDMError
from ..pipelines.schedule import NoiseSchedule, PredictionType, uniform_grid
from ..pipelines.student import StudentRecipe
from .batch import Batch, draw_batch
from .checkpoint import Measure, read_checkpoint, restore_checkpoint, save_checkpoint
from .config import DistillConfig, RoleConfig
from .cost import micro_batch_size
from .health import Preview
from .log import Log, print_line
from .optimizers import build_optimizer, learning_rate, set_learning_rate
from .precision import Precision, best_precision
from .processes import Processes, shard
from .roles import ROLES, AdapterRoles, CopyRoles, Ema, Role, Roles
from .trajectory import Condition, Trajectory, sample
from .update import tdm_update

Sampler = Callable[[Tensor, Condition], Tensor]
"""``(noise [B, ...], cond) -> x0``: the student on its own grid with its mean weights, the guided teacher on many
steps, or the critic's idea of the student's sample.
"""


CRITIC_SEED = 1_000  # of the noise in Run.critic: not that of any task's previews


class Task(Protocol):
    """What is distilled: everything that differs between a mixture of Gaussians and a text-to-image model."""

    base: nn.Module  # the pretrained network, on its device; it is frozen
    schedule: NoiseSchedule
    prediction_type: PredictionType
    targets: Sequence[str] | str  # the layers that get adapters, as in peft

    @property
    def device(self) -> torch.device:
        """Where the base runs."""
        ...

    @property
    def measure(self) -> Measure | None:
        """The measure of :meth:`evaluate` by which the best student is kept; None keeps none."""
        ...

    def call(self, base: nn.Module, x: Tensor, timesteps: Tensor, cond: Condition) -> Tensor:
        """The network's output for ``x`` ``[B, ...]``, ``timesteps`` ``[B]`` float32. Keep bf16-unsafe
        parts in float32.
        """
        ...

    def conditions(self, n: int, generator: torch.Generator) -> tuple[Condition, tuple[int, ...]]:
        """``n`` prompts drawn with ``generator`` (CPU) and nothing else, encoded (``{}`` if there are none), and the
        shape of one sample, which may differ from batch to batch. On any device: the loop moves what it needs.
        """
        ...

    def null(self, cond: Condition) -> Condition:
        """The unconditional counterpart of ``cond``, in the same shapes, on the same device."""
        ...

    def preview(self, student: Sampler, teacher: Sampler, critic: Sampler) -> Preview:
        """What the three draw from fixed seeds, and how the student's samples compare with the teacher's."""
        ...

    def evaluate(self, student: Sampler, teacher: Sampler) -> dict[str, float]:
        """The task's own measures, from fixed seeds."""
        ...

    def recipe(self, trajectory: Trajectory) -> StudentRecipe | None:
        """How a student with this trajectory is sampled, for its file; None for a task that is no pipeline."""
        ...


@dataclass
class Run:
    """A run as callbacks and callers see it. ``step`` counts updates done; ``ema.weights`` is the student to export."""

    task: Task
    config: DistillConfig
    out_dir: Path
    roles: Roles
    trajectory: Trajectory
    ema: Ema
    step: int = 0

    def student(self, noise: Tensor, cond: Condition) -> Tensor:
        """Samples of the student (mean weights) on its trained grid."""
        with self.ema.applied():
            return sample(self.roles.student, self.task.schedule, self.trajectory.timesteps.tolist(), noise, cond)

    def teacher(self, noise: Tensor, cond: Condition) -> Tensor:
        """Samples of the teacher with the run's guidance on ``output.teacher_steps`` uniform steps."""
        null, w = self.task.null(cond), self.config.objective.guidance_scale
        grid = uniform_grid(self.config.output.teacher_steps, self.task.schedule, self.config.trajectory.shift)

        def guided(x: Tensor, timesteps: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
            return self.roles.guided_teacher(x, timesteps, cond, null, w)

        return sample(guided, self.task.schedule, grid, noise, cond)

    @torch.no_grad()
    def critic(self, noise: Tensor, cond: Condition) -> Tensor:
        """What the critic takes the student's samples for: its clean prediction after they were noised again.

        Up to the student's last timestep, the noisiest state of clean samples that the critic is trained on with
        separate bands, and half of the range at most. The noise is the same each time.
        """
        x0, last = self.student(noise, cond), len(self.trajectory) - 1
        stages = torch.full((len(x0),), last)
        tau = self.trajectory.timesteps[stages].clamp_max(self.task.schedule.num_train_timesteps // 2)
        xi = torch.randn(x0.shape, generator=torch.Generator().manual_seed(CRITIC_SEED)).to(x0)
        return self.roles.critic(self.trajectory.renoise(x0, stages, tau, xi).x_tau, tau, cond)[0]

    def due(self, every: int) -> bool:
        """Whether something that happens ``every`` so many updates (0 is never), and at the end, happens now."""
        return every > 0 and (self.step % every == 0 or self.step == self.config.updates)


Callback = Callable[[Run, dict[str, float]], None]
"""Called with the run and each line that goes to metrics.jsonl; raise from it to stop."""


def distill(
    task: Task,
    config: DistillConfig,
    out_dir: str | Path,
    *,
    processes: Processes | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    report: Callable[[str], None] = print_line,
    stop: Callable[[], bool] = lambda: False,
) -> Run:
    """Distil ``task`` into a few-step student.

    Writes ``metrics.jsonl`` and ``.csv``, ``previews/*.png``, ``checkpoint.pt`` and, for a task with a measure,
    ``best.pt`` in ``out_dir``; ``resume`` continues from the last checkpoint.

    Args:
        processes: this process among those of the run.
        report: takes the progress lines.
        stop: asked after every update (of several processes: whenever a line is logged); True, in any process, writes
            a checkpoint and returns the run as it is.

    Raises:
        TDMError: the settings do not fit the task, ``out_dir`` already holds a run (or none, to resume), it cannot be
            written, the run diverged, or an alarm stopped it (``output.stop_on_alarm``).
    """
    out, processes = Path(out_dir), processes or Processes()
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists() and not resume:
        raise TDMError(f"{out} already holds a run; resume it, or choose another folder")
    if config.precision == "auto":  # settled here, so that the checkpoint says which it was
        config = replace(config, precision=_best_precision(task, config))
    portions = _portions(config, processes)
    generator = torch.Generator().manual_seed(config.seed)
    trajectory = Trajectory(config.trajectory, task.schedule)
    roles = build_roles(task, config, generator)
    if config.memory.shard:
        shard(task.base, [weight for role in ROLES for weight in roles.parameters(role)])
    settings: dict[Role, RoleConfig] = {"student": config.student, "critic": config.critic}
    optimizers = {role: build_optimizer(roles.parameters(role), c, config.memory) for role, c in settings.items()}
    ema = Ema(roles, decay=config.ema.decay, warmup=config.ema.warmup)
    run = Run(task, config, out, roles, trajectory, ema)
    parts: dict[str, Any] = {"config": config, "roles": roles, "ema": ema, "optimizers": optimizers}
    parts["generator"] = generator
    if resume:
        run.step = restore_checkpoint(checkpoint, **parts, report=report)
    log = Log(run, callbacks, report) if processes.first else None

    def draw(student: bool) -> list[Batch]:
        cond, shape = task.conditions(config.batch_size, generator)
        null = task.null(cond) if config.objective.guidance_scale != 1 else {}
        batch = draw_batch(trajectory, cond, null, (config.batch_size, *shape), generator, student=student)
        return [batch.part(i, portions).to(task.device) for i in range(processes.rank, portions, processes.size)]

    output = config.output
    while run.step < config.updates:
        for role, c in settings.items():
            set_learning_rate(optimizers[role], learning_rate(c, run.step, config.updates))
        student_too = run.step >= config.critic.head_start
        metrics = tdm_update(roles, trajectory, config, draw, optimizers, processes, train_student=student_too)
        if student_too:
            ema.update()
        run.step += 1

        # Every process makes the pictures, for a sharded base needs them all; only the first writes.
        evaluation = task.evaluate(run.student, run.teacher) if run.due(output.evaluate_every) else {}
        preview = task.preview(run.student, run.teacher, run.critic) if run.due(output.preview_every) else None
        if log is not None:
            log.add(metrics)
            if run.due(output.log_every):
                log.flush()
            if evaluation:
                log.evaluation(evaluation)
            if preview is not None:
                log.preview(preview)
        asked = processes.size == 1 or run.due(output.log_every)  # several answer together, which waits for the device
        stopping = asked and processes.any(stop() or (log is not None and log.alarmed), task.device)
        if log is not None and (stopping or run.step == config.updates or run.due(output.checkpoint_every)):
            log.flush()  # a run that diverged must not replace its last good checkpoint
            save_checkpoint(checkpoint, step=run.step, recipe=task.recipe(trajectory), **parts)
        if stopping:
            break
    processes.wait()  # for what the first one still writes
    if log is not None and log.alarmed:
        raise TDMError(
            f"{log.alarms[-1]}; stopped after update {run.step}: resume to go on as it is, or begin a new run "
            f"with other settings and start_from={checkpoint}"
        )
    return run


def _portions(config: DistillConfig, processes: Processes) -> int:
    """Into how many parts a batch is split: micro batches of all processes."""
    if config.memory.shard and processes.size == 1:
        raise TDMError("memory.shard needs several processes: start them with torchrun, or set it to false")
    if config.memory.shard and config.full_weights:
        raise TDMError("memory.shard is for a frozen base with adapters; set full_weights or memory.shard to false")
    if config.batch_size % processes.size:
        raise TDMError(f"batch_size {config.batch_size} cannot be shared evenly by {processes.size} processes")
    share, micro = config.batch_size // processes.size, micro_batch_size(config, processes.size)
    if share % micro:
        raise TDMError(f"micro_batch_size {micro} does not divide the {share} samples that each process has")
    return config.batch_size // micro


def _best_precision(task: Task, config: DistillConfig) -> Precision:
    device = task.device.type
    return "fp32" if device == "cpu" and config.memory.gradient_checkpointing else best_precision(device)


def build_roles(task: Task, config: DistillConfig, generator: torch.Generator) -> Roles:
    """The task's base with fresh adapters (or copies), or those of ``config.start_from``."""
    if config.memory.gradient_checkpointing:
        if config.precision == "bf16" and task.device.type == "cpu":
            raise TDMError(
                "on a CPU bf16 cannot be checkpointed; set precision to fp32 or memory.gradient_checkpointing to false"
            )
        enable = getattr(task.base, "enable_gradient_checkpointing", None)
        if enable is None:
            raise TDMError(f"{type(task.base).__name__} cannot checkpoint; set memory.gradient_checkpointing to false")
        enable()
    assert config.precision != "auto"
    kind: dict[str, Any] = {
        "schedule": task.schedule,
        "prediction_type": task.prediction_type,
        "precision": config.precision,
    }
    roles: Roles
    if config.full_weights:
        roles = CopyRoles(task.base, task.call, **kind)
    else:
        roles = AdapterRoles(
            task.base,
            task.call,
            targets=task.targets,
            rank={"student": config.student.rank, "critic": config.critic.rank},
            alpha={"student": config.student.alpha, "critic": config.critic.alpha},
            generator=generator,
            device=task.device,
            **kind,
        )
    if config.start_from is not None:
        saved = read_checkpoint(Path(config.start_from))
        roles.load("student", saved["ema"]["weights"])
        if config.critic.start == "student":
            roles.load("critic", saved["ema"]["weights"])
        elif config.critic.start == "checkpoint":
            roles.load("critic", saved["adapters"]["critic"])
    return roles
