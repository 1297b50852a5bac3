"""The training loop: draws batches, updates, and writes what a person wants to see. The method itself is in
update.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from ..errors import TDMError
from ..files import writing
from .batch import Batch, draw_batch
from .checkpoint import read_for_resume, restore, save_checkpoint
from .config import DistillConfig, Role, RoleConfig, TrajectoryConfig
from .cost import micro_batches
from .extraction import EXTRACTION_FILE
from .log import Log
from .objectives import objective_of
from .optimizers import build_optimizer, learning_rate, set_learning_rate
from .precision import best_precision
from .processes import Processes, shard
from .progress import Report, print_line
from .roles import ROLES, STEPS, AdapterRoles, CopyRoles, Ema, Roles
from .run import Callback, Run
from .stages import Stage, stage_of_update, stages_of
from .start import load, start
from .task import Task
from .trajectory import Trajectory, build_trajectories
from .update import Draw, update
from .validation import validate


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
    on_update: Callable[[int], None] = lambda _step: None,
) -> Run:
    """Distil ``task`` into a few-step student.

    Writes ``metrics.jsonl`` and ``.csv``, ``previews/*.png``, ``checkpoint.pt`` and, for a task with a measure,
    ``best.pt`` in ``out_dir``; ``resume`` continues from the last checkpoint.

    Args:
        processes: this process among those of the run.
        report: takes the progress lines.
        stop: asked after every update (of several processes: whenever a line is logged); True, in any process, writes
            a checkpoint and returns the run as it is.
        on_update: called after every update with the number of updates done.

    Raises:
        TDMError: the settings do not fit the task, ``out_dir`` already holds a run (or none, to resume), it cannot be
            written, the run diverged, or an alarm stopped it (``output.stop_on_alarm``).
    """
    validate(config)
    out, processes = Path(out_dir), processes or Processes()
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists() and not resume:
        raise TDMError(f"{out} already holds a run; resume it, or choose another folder")
    config = settled(config, task.device.type)
    if processes.first and config.precision == "bf16" and best_precision(task.device.type) == "fp32":
        report(f"note: this {task.device.type} has no bf16 units: precision=bf16 is no faster than fp32 here")
    stages = stages_of(config)
    for stage in stages:
        _portions(stage.config, processes)
        _trajectories(task, stage)
    generator = torch.Generator().manual_seed(config.seed)
    roles = build_roles(task, stages[0].config, generator)
    if not resume:  # a checkpoint has them
        _start(roles, task, stages[0].config, out, processes, report)
    run = _begin(task, config, stages[0], out, roles)
    payload = None
    if resume:
        payload = read_for_resume(checkpoint, config, task.identity(), report)
        _prepare(run, stage_of_update(stages, payload["step"]))
    optimizers = _optimizers(run)
    state: dict[str, Any] = {"config": config, "roles": run.roles, "ema": run.ema, "optimizers": optimizers}
    state |= {"generator": generator, "identity": task.identity()}
    if payload is not None:
        run.step = restore(payload, run.roles, run.ema, optimizers, generator)
    log = Log(run, callbacks, report) if processes.first else None
    if resume:
        _show_what_is_missing(run, log, processes)

    def update_once(draw: Draw) -> None:
        _update(run, optimizers, draw, processes, log)
        on_update(run.step)

    def save() -> None:
        _save(checkpoint, state, run, log)

    def asked_to_stop() -> bool:
        # Several processes answer together, which waits for the device.
        now = processes.size == 1 or run.due(config.output.log_every)
        return now and processes.any(stop() or (log is not None and log.alarmed), task.device)

    for stage in stages[run.stage.index :]:
        if stage is not run.stage:
            _enter(run, stage, optimizers)
        if log is not None and config.stages:
            log.stage(len(stages))
        draw = _draw(run, generator, processes)
        if _train(run, log, functools.partial(update_once, draw), save, asked_to_stop):
            break
    processes.wait()  # for what the first one still writes
    if log is not None and log.alarmed:
        raise TDMError(
            f"{log.alarms[-1]}; stopped after update {run.step}: resume to go on as it is, or begin a new run "
            f"with other settings and start_from={checkpoint}"
        )
    return run


def _train(
    run: Run,
    log: Log | None,
    update_once: Callable[[], None],
    save: Callable[[], None],
    asked_to_stop: Callable[[], bool],
) -> bool:
    """Train a run's stage to its end, or until it is asked to stop; returns whether it was."""
    output = run.config.output
    while run.step < run.stage.end:
        update_once()
        # Before previews and evaluation, so that one that fails, for memory or a full disk, loses no update.
        saved = run.step == run.stage.end or run.due(output.checkpoint_every)
        if saved:
            save()
        _show(run, log, evaluation=run.due(output.evaluate_every), preview=run.due(output.preview_every))
        if asked_to_stop():
            if not saved:
                save()
            return True
    return False


def _start(roles: Roles, task: Task, config: DistillConfig, out: Path, processes: Processes, report: Report) -> None:
    """Give fresh roles the weights of ``config.start_from``, if it is set; the first process reads them."""
    if processes.first:
        with writing(out):
            (out / EXTRACTION_FILE).unlink(missing_ok=True)
    if config.start_from is None:
        return
    if processes.first and (extraction := start(roles, task, config, report)) is not None:
        extraction.write(out / EXTRACTION_FILE)
        for role in extraction.ranks:
            report(f"start_from: {extraction.summary(role)}")
    processes.from_first_([weight for role in ROLES for weight in roles.parameters(role)])


def _begin(task: Task, config: DistillConfig, stage: Stage, out: Path, roles: Roles) -> Run:
    """The run before its first update."""
    if config.memory.shard:
        shard(task.base, [weight for role in ROLES for weight in roles.parameters(role)])
    ema = Ema(roles, decay=stage.config.ema.decay, warmup=stage.config.ema.warmup)
    return Run(task, config, out, roles, _trajectories(task, stage), ema, stage)


def _trajectories(task: Task, stage: Stage) -> dict[int, Trajectory]:
    """The grids of a stage, checked for what its critic learns on them."""
    config = stage.config
    trajectories = build_trajectories(config.trajectory, task.schedule)
    if "critic" in objective_of(config.objective).trains and config.critic.target == "subinterval":
        for trajectory in trajectories.values():
            trajectory.require_finite_targets()
    return trajectories


def _prepare(run: Run, stage: Stage) -> None:
    """Put a run's grids, running mean and step counts in order for a stage. No trained weight changes."""
    run.stage, run.trajectories = stage, _trajectories(run.task, stage)
    run.ema.decay, run.ema.warmup = stage.config.ema.decay, stage.config.ema.warmup
    _tell_steps(run.roles, run.task, stage.config.trajectory)


def _optimizers(run: Run) -> dict[Role, Optimizer]:
    """Fresh optimisers of what a run's stage trains."""
    config = run.stage.config
    return {role: build_optimizer(run.roles.parameters(role), c, config.memory) for role, c in config.roles.items()}


def _enter(run: Run, stage: Stage, optimizers: dict[Role, Optimizer]) -> None:
    """Go on from the end of one stage into the next, on the same student."""
    _prepare(run, stage)
    if stage.critic == "teacher":
        run.roles.reset("critic")
    elif stage.critic == "student":
        steps = run.roles.state("critic").get(STEPS)  # the student may know step counts by their timesteps
        weights = run.ema.weights if steps is None else {STEPS: steps, **run.ema.weights}
        load(run.roles, "critic", weights, run.config.student, run.config.critic)
    if stage.optimizers == "fresh":
        optimizers |= _optimizers(run)


def _draw(run: Run, generator: torch.Generator, processes: Processes) -> Draw:
    """How a run's stage draws its batches: whole, in every process alike, of which each takes its micro batches."""
    config = run.stage.config
    task, n, objective, portions = run.task, config.batch_size, config.objective, _portions(config, processes)
    guidance_band = objective_of(objective).guidance_band(objective)

    def draw(student: bool) -> list[Batch]:
        cond, shape = task.conditions(n // config.samples_per_prompt, generator)
        # Tiled, so that the samples of one prompt fall into one micro batch: it takes every so many-th of the batch.
        cond = {key: value.repeat(config.samples_per_prompt, *[1] * (value.ndim - 1)) for key, value in cond.items()}
        null = task.null(cond) if objective.guidance_scale != 1 else {}
        k = draw_steps(run.trajectories, generator)
        cond, null = (run.with_steps(c, k, n) for c in (cond, null))
        batch = draw_batch(
            run.trajectories[k], cond, null, (n, *shape), generator, student=student,
            guidance_band=guidance_band, guidance_range=objective.guidance_range,
        )  # fmt: skip
        return [batch.part(i, portions).to(task.device) for i in range(processes.rank, portions, processes.size)]

    return draw


def _update(run: Run, optimizers: dict[Role, Optimizer], draw: Draw, processes: Processes, log: Log | None) -> None:
    """One update. ``log`` is None in all processes but the first."""
    stage, config = run.stage, run.stage.config
    train_student = run.step >= stage.student_from
    for role, c in config.roles.items():
        first = stage.student_from if role == "student" else stage.begin
        set_learning_rate(optimizers[role], learning_rate(c, max(0, run.step - first), stage.end - first))
    metrics = update(run.roles, config, draw, optimizers, processes, train_student=train_student)
    if train_student:
        run.ema.update()
    run.step += 1
    if log is not None:
        log.add(metrics)
        if run.due(config.output.log_every):
            log.flush()


def _save(path: Path, state: dict[str, Any], run: Run, log: Log | None) -> None:
    """Write a checkpoint, in the first process."""
    if log is not None:
        log.flush()  # a run that diverged must not replace its last good checkpoint
        save_checkpoint(path, step=run.step, recipe=run.task.recipe(run.trajectories), **state)


def _show(run: Run, log: Log | None, *, evaluation: bool, preview: bool) -> None:
    """Evaluate the student and draw previews, whichever of the two is asked for.

    Every process draws the pictures, for a sharded base needs them all; only the first writes.
    """
    measures = run.evaluate() if evaluation else {}
    sheet = run.task.preview(run.student, run.teacher, run.critic) if preview else None
    if log is None:
        return
    if measures:
        log.evaluation(measures)
    if sheet is not None:
        log.preview(sheet)


def _show_what_is_missing(run: Run, log: Log | None, processes: Processes) -> None:
    """Evaluate and preview the checkpoint's own update if the run ended after the checkpoint and before them."""

    def missing(every: int, kind: str) -> bool:
        return run.due(every) and processes.any(log is not None and log.lacks(kind), run.task.device)

    output = run.config.output
    _show(
        run,
        log,
        evaluation=missing(output.evaluate_every, "eval"),
        preview=missing(output.preview_every, "health"),
    )


def _portions(config: DistillConfig, processes: Processes) -> int:
    """How many micro batches a batch is split into, over all processes."""
    if config.memory.shard and processes.size == 1:
        raise TDMError("memory.shard needs several processes: start them with torchrun, or set it to false")
    if config.memory.shard and config.full_weights:
        raise TDMError("memory.shard is for a frozen base with adapters; set full_weights or memory.shard to false")
    return processes.size * micro_batches(config, processes.size)


def settled(config: DistillConfig, device: str) -> DistillConfig:
    """The configuration with the precision that ``auto`` means on a device, so that a checkpoint says which it was."""
    if config.precision != "auto":
        return config
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
    """The task's base with fresh adapters (or copies): student and critic are the teacher.

    Every run has a student and a critic, also where the objective trains no critic: a checkpoint can then start any
    other run (``start_from``), and the random draws of a seed do not depend on the objective.
    """
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
        "guided_output": task.guided_output,
    }
    roles: Roles
    if config.full_weights:
        roles = CopyRoles(task.base, task.call, **kind)
    else:
        roles = AdapterRoles(
            task.base,
            task.call,
            targets={role: _targets(task, c) for role, c in config.roles.items()},
            rank={role: c.rank for role, c in config.roles.items()},
            alpha={role: c.alpha for role, c in config.roles.items()},
            generator=generator,
            device=task.device,
            **kind,
        )
    _tell_steps(roles, task, config.trajectory)
    return roles


def draw_steps(trajectories: Mapping[int, Trajectory], generator: torch.Generator) -> int:
    """Draw one of the step counts that a student learns; a student of one draws nothing."""
    counts = list(trajectories)
    return counts[int(torch.randint(len(counts), (), generator=generator))] if len(counts) > 1 else counts[0]


def _tell_steps(roles: Roles, task: Task, config: TrajectoryConfig) -> None:
    """Give embeddings of the step count to those roles of a unified student's run that know it by one, and to no
    other.
    """
    with_embedding: tuple[Role, ...] = ()
    if config.unify is not None and config.tell_steps != "none":
        with_embedding = ROLES if config.tell_steps == "embedding" else ("critic",)
    roles.tell_steps(with_embedding, len(config.unify or ()), task.time_embedder)
