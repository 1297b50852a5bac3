"""The training loop: draws batches, updates, and writes what a person wants to see. The method itself is in
update.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import TDMError
from .batch import Batch, draw_batch
from .checkpoint import read_checkpoint, restore_checkpoint, save_checkpoint
from .config import DistillConfig, RoleConfig, TrajectoryConfig
from .cost import micro_batches
from .log import Log
from .optimizers import build_optimizer, learning_rate, set_learning_rate
from .precision import best_precision
from .processes import Processes, shard
from .progress import Report, print_line
from .roles import ROLES, AdapterRoles, CopyRoles, Ema, Role, Roles
from .run import Callback, Run
from .task import Task
from .trajectory import Trajectory, build_trajectories
from .update import update


def distill(
    task: Task,
    config: DistillConfig,
    out_dir: str | Path,
    *,
    processes: Processes | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    report: Report = print_line,
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
    config = settled(task, config)
    if processes.first and config.precision == "bf16" and best_precision(task.device.type) == "fp32":
        report(f"note: this {task.device.type} has no bf16 units: precision=bf16 is no faster than fp32 here")
    portions = _portions(config, processes)
    generator = torch.Generator().manual_seed(config.seed)
    trajectories = build_trajectories(config.trajectory, task.schedule)
    roles = build_roles(task, config, generator)
    if config.memory.shard:
        shard(task.base, [weight for role in ROLES for weight in roles.parameters(role)])
    settings: dict[Role, RoleConfig] = {"student": config.student, "critic": config.critic}
    optimizers = {role: build_optimizer(roles.parameters(role), c, config.memory) for role, c in settings.items()}
    ema = Ema(roles, decay=config.ema.decay, warmup=config.ema.warmup)
    run = Run(task, config, out, roles, trajectories, ema)
    parts: dict[str, Any] = {"config": config, "roles": roles, "ema": ema, "optimizers": optimizers}
    parts["generator"] = generator
    if resume:
        run.step = restore_checkpoint(checkpoint, **parts, report=report)
    log = Log(run, callbacks, report) if processes.first else None

    def draw(student: bool) -> list[Batch]:
        cond, shape = task.conditions(config.batch_size, generator)
        null = task.null(cond) if config.objective.guidance_scale != 1 else {}
        k = draw_steps(run.trajectories, generator)
        cond, null = (run.told(c, k, config.batch_size) for c in (cond, null))
        batch = draw_batch(
            run.trajectories[k],
            cond,
            null,
            (config.batch_size, *shape),
            generator,
            student=student,
            guidance_band=config.objective.own_guidance_band,
        )
        return [batch.part(i, portions).to(task.device) for i in range(processes.rank, portions, processes.size)]

    output = config.output
    while run.step < config.updates:
        for role, c in settings.items():
            set_learning_rate(optimizers[role], learning_rate(c, run.step, config.updates))
        student_too = run.step >= config.critic.head_start
        metrics = update(roles, config, draw, optimizers, processes, train_student=student_too)
        if student_too:
            ema.update()
        run.step += 1

        # Every process makes the pictures, for a sharded base needs them all; only the first writes.
        evaluation = run.evaluate() if run.due(output.evaluate_every) else {}
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
            save_checkpoint(checkpoint, step=run.step, recipe=task.recipe(run.trajectories), **parts)
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
    return processes.size * micro_batches(config, processes.size)


def settled(task: Task, config: DistillConfig) -> DistillConfig:
    """The configuration with the precision that ``auto`` means here, so that a checkpoint says which it was."""
    if config.precision != "auto":
        return config
    device = task.device.type
    fp32 = device == "cpu" and config.memory.gradient_checkpointing
    return replace(config, precision="fp32" if fp32 else best_precision(device))


def _targets(task: Task, config: RoleConfig) -> Sequence[str] | str:
    """The layers of a role's adapter, as peft takes them.

    Raises:
        TDMError: one that the configuration names is not in the base.
    """
    if config.targets is None:
        return task.targets
    if config.targets == ("all-linear",):
        return config.targets[0]
    names = [f".{name}" for name, _ in task.base.named_modules()]
    for ending in config.targets:
        if not any(name.endswith(f".{ending}") for name in names):
            raise TDMError(f"targets: no layer of {type(task.base).__name__} has a name that ends in {ending}")
    return config.targets


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
            targets={"student": _targets(task, config.student), "critic": _targets(task, config.critic)},
            rank={"student": config.student.rank, "critic": config.critic.rank},
            alpha={"student": config.student.alpha, "critic": config.critic.alpha},
            generator=generator,
            device=task.device,
            **kind,
        )
    _tell_steps(roles, task, config.trajectory)
    if config.start_from is not None:
        _start(roles, config.critic.start, read_checkpoint(Path(config.start_from)))
    return roles


def _start(roles: Roles, critic: Literal["checkpoint", "student", "teacher"], saved: dict[str, Any]) -> None:
    """The weights of an earlier run.

    Raises:
        TDMError: they do not fit; for the critic, such as one that was not told step counts, there is another way.
    """
    roles.load("student", saved["ema"]["weights"])
    if critic == "teacher":
        return
    try:
        roles.load("critic", saved["ema"]["weights"] if critic == "student" else saved["adapters"]["critic"])
    except TDMError as error:
        raise TDMError(f"start_from: {error}; critic.start=teacher begins a new critic") from None


def draw_steps(trajectories: Mapping[int, Trajectory], generator: torch.Generator) -> int:
    """One of the step counts that a student learns; a student of one needs no randomness."""
    counts = list(trajectories)
    return counts[int(torch.randint(len(counts), (), generator=generator))] if len(counts) > 1 else counts[0]


def _tell_steps(roles: Roles, task: Task, config: TrajectoryConfig) -> None:
    """Embeddings of the step count, for those roles of a unified student's run that are told it so."""
    if config.unify is None or config.tell_steps == "none":
        return
    told: tuple[Role, ...] = ROLES if config.tell_steps == "embedding" else ("critic",)
    roles.tell_steps(told, len(config.unify), task.time_embedder)
