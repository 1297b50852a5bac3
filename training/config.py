"""The configuration of a distillation: one tree of dataclasses, loaded from YAML and ``key=value`` overrides.

An unknown key, a wrong type or settings that cannot work together are one-line :class:`TDMError`s with the nearest
name. Every switch is here and nowhere else. Out of memory: lower ``micro_batch_size``, then turn on
``memory.gradient_checkpointing``, then store the base smaller (``memory.base``).
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from ..errors import TDMError
from .losses import CriticWeight, Rho
from .presets import find_config

T = TypeVar("T")
_ITEMS = {float: "numbers", int: "numbers", str: "texts"}  # in errors


Band = Literal["separate", "overlap", "full"]


@dataclass(frozen=True)
class TrajectoryConfig:
    """The student's own grid, and where along it the distributions are matched."""

    steps: int = 4  # K, the student's number of steps; with `unify` that of previews, evaluation and `best`
    # Step counts that one student learns together, `steps` among them (TDM-unify): each update draws one.
    unify: tuple[int, ...] | None = None
    # How a unified student knows which. timestep: no two step counts share a timestep, so a plain LoRA knows (the
    # critic, which nobody ships, is told by an embedding); embedding: one for each, added to the time embedding of
    # student and critic, so that the student needs code at inference and cannot be exported; none: neither is told.
    tell_steps: Literal["timestep", "embedding", "none"] = "timestep"
    # tell_steps=timestep: `steps` begin at the last timestep, and each other count, from many to few, by this share of
    # the range below the one before.
    spread: float = 0.02
    timesteps: tuple[float, ...] | None = None  # the grid, strictly decreasing; None: uniform steps (with `shift`)
    shift: float = 1.0  # flow models: time shift of the grid and of tau (SD3 3.0); must be 1 for epsilon and v models
    # The next state has the student's own noise (DDIM, Euler), or fresh noise (consistency models, DMD2).
    sampler: Literal["deterministic", "stochastic"] = "deterministic"
    # What is diffused up to tau: the state x_m a stage ends in, or the clean prediction x0 (the paper's key ablation).
    renoise: Literal["state", "clean"] = "state"
    # separate: tau in [t_{k-1}, t_k], so one critic serves all stages; overlap: tau in [t_{k-1}, T]; full: all of it,
    # for renoise=clean.
    bands: Band = "separate"
    tau_min: float = 0.02  # tau stays inside this part of the (unshifted) time range,
    tau_max: float = 0.98  # where both scores are well defined,
    margin: float = 0.02  # and this far above the stage's end, where a subinterval target would blow up
    # Which stages one update trains. update: one for the whole batch; sample: spread evenly over the batch. Both cost
    # (K - 1) / 2 prefix passes per sample on average, but `update` makes them in full batches, in half as many calls;
    # on the mixture they end equally close.
    stages: Literal["update", "sample"] = "update"


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the student minimises (training/objectives)."""

    # matching: TDM, DMD and SiD, the student's distribution against the teacher's; consistency: LCM, against itself one
    # step of the teacher further on; regression: onto the end of the teacher's ODE. The last two train no critic.
    name: Literal["matching", "consistency", "regression"] = "matching"
    gradient: Literal["kl", "sid"] = "kl"  # matching: along the scores' difference, or through both of them (SiD)
    sid_alpha: float = 1.0  # of SiD: 1 to 1.2 in its papers
    ode_steps: int = 16  # consistency, regression: guided steps of the teacher's ODE over the whole range
    guidance_scale: float = 1.0  # w of the teacher; 1 is none and saves one of 6.5 passes
    # w of each stage, the noisiest first; None: guidance_scale in all. Previews and evaluation keep guidance_scale. A
    # unified student's other step counts take those at the same share of their steps.
    stage_guidance: tuple[float, ...] | None = None
    # decoupled: (w - 1)(x0(c) - x0(uncond)) is a term of its own, with its own tau and weight (Decoupled DMD); one pass
    # more.
    guidance_term: Literal["coupled", "decoupled"] = "coupled"
    guidance_band: Band = "overlap"  # of the decoupled term's tau
    guidance_weight: float = 1.0  # of the decoupled term
    rho: Rho = "pseudo_huber"  # the penalty: pseudo_huber (elementwise), vector_huber (whole sample), mse
    huber_c: float | None = None  # its width; None: 1e-3 (pseudo_huber), 0.00054 sqrt(d) (vector_huber)
    normalise: bool = True  # divide by mean |x0 - x0_teacher| per sample
    norm_min: float = 0.01  # ... but by no less than this; raise it if the loss spikes

    @property
    def own_guidance_band(self) -> Band | None:
        """The band of tau in a decoupled guidance term; None if there is no such term."""
        return self.guidance_band if self.guidance_term == "decoupled" else None

    @property
    def teacher_guidance(self) -> str:
        """For people: the scale that the student learned from, or one for each of its steps."""
        return ", ".join(f"{w:g}" for w in self.stage_guidance or (self.guidance_scale,))


@dataclass(frozen=True)
class RoleConfig:
    """One trained adapter and its AdamW."""

    rank: int = 32  # LoRA rank; lower on out of memory
    alpha: float | None = None  # LoRA alpha; None: the rank (scale 1)
    targets: tuple[str, ...] | None = None  # endings of layer names, or [all-linear]; None: the family's own
    lr: float = 1e-4
    betas: tuple[float, float] = (0.0, 0.99)  # the first is 0 because the other role moves the target all the time
    weight_decay: float = 0.0
    clip: float = 1.0  # gradient norm limit
    warmup: int = 0  # updates of linear warm-up of the learning rate
    decay: Literal["constant", "linear", "cosine"] = "constant"  # of the learning rate, over all updates
    lr_end: float = 0.0  # where `decay` ends, as a fraction of lr


@dataclass(frozen=True)
class CriticConfig(RoleConfig):
    """The fake score, which follows the student's distribution."""

    lr: float = 4e-4  # 4 to 10 times the student's in published settings
    # What it regresses to (training/losses.py). On the mixture `clean` passes 1/8 of the base's distance and then
    # drifts away to 1/2, `subinterval` falls below 1/10 and stays. The authors' demo has clean.
    target: Literal["subinterval", "clean"] = "subinterval"
    # Of its errors, over noise levels: min_snr nearly ignores the noisiest stage, whose critic then goes astray.
    weight: CriticWeight = "v"
    weight_limit: float = 5.0  # the most an error may weigh
    per_student: int = 1  # critic updates per student update; each beyond the first costs about 3.5 passes
    # Student and critic look at the same re-noised state, and the student follows the critic as it was before its step:
    # one pass less of 6.5.
    share_noise: bool = False
    head_start: int = 0  # critic updates before the student's first, so that the student never follows an untrained one
    # Which adapter it starts from when `start_from` gives the student one: the earlier critic's, the student's, or
    # none.
    start: Literal["checkpoint", "student", "teacher"] = "checkpoint"


@dataclass(frozen=True)
class EmaConfig:
    """The running mean of the student's weights: what previews, evaluation and export use."""

    decay: float = 0.999  # 0 is the student itself
    warmup: bool = True  # start with a short memory: min(decay, (1 + n) / (10 + n)) at update n


Storage = Literal["auto", "fp32", "bf16", "fp16", "fp8", "int8", "llm_int8", "nf4"]


@dataclass(frozen=True)
class MemoryConfig:
    """What a run may cost in memory. None of it changes what is learned, beyond the rounding of a smaller base."""

    # How the frozen base is stored. auto: bf16 on a GPU, fp32 on a CPU. fp8: layerwise casting (with
    # gradient_checkpointing, or the backward pass keeps what was cast), int8: torchao's weight-only, llm_int8 and nf4:
    # bitsandbytes, the first with activations in 8 bits on a GPU. Convolutions stay as they are in all of these.
    base: Storage = "auto"
    gradient_checkpointing: bool = False  # recompute instead of storing activations: less memory, about 30 % slower
    offload: bool = False  # keep the base in main memory and bring groups of its layers to the GPU as they are called
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # adamw8bit: moments in 8 bits (torchao)
    shard: bool = False  # several processes: each holds its part of the base (FSDP2), not the whole


@dataclass(frozen=True)
class OutputConfig:
    """What a run writes, in updates between two; 0 is never."""

    log_every: int = 20  # a line of metrics.jsonl, a mean over that many updates
    preview_every: int = 500  # teacher, student and the critic's idea from fixed seeds, and their health
    evaluate_every: int = 500  # the task's own measure, in metrics.jsonl, by which best.pt is kept
    checkpoint_every: int = 500  # checkpoint.pt, exact resume; one is always written at the end
    keep: int = 1  # checkpoints: the last, and so many less one before it as checkpoint-<step>.pt
    teacher_steps: int = 50  # of the teacher in previews and evaluation
    stop_on_alarm: bool = False  # an alarm of training/health.py ends the run, with a checkpoint and exit code 2
    tensorboard: bool = False  # the metrics and previews in tensorboard/ too; needs the package tensorboard


@dataclass(frozen=True)
class DistillConfig:
    """All settings of ``tdm distill``. ``task`` says what is distilled and is read by that task."""

    task: dict[str, Any] = field(default_factory=lambda: {"name": "mixture"})
    seed: int = 0  # of all randomness; the same seed is the same run, bit for bit, on a CPU
    updates: int = 1000  # student updates
    batch_size: int = 16  # samples per update, over all processes; best a multiple of trajectory.steps
    micro_batch_size: int | None = None  # of these at a time on a device, the gradients summed; None: all of its share
    # bf16: autocast; adapters, losses and optimisers stay float32. auto: bf16 where the device is faster with it.
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    # Train whole copies of the network in float32 (two more of them, and their optimisers), not adapters.
    full_weights: bool = False
    start_from: str | None = None  # checkpoint.pt of an earlier run, whose adapters to begin with; None: the teacher
    trajectory: TrajectoryConfig = field(default_factory=TrajectoryConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    student: RoleConfig = field(default_factory=RoleConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        _validate(self)


def load_config(
    configs: str | Path | Sequence[str | Path] | None = None, overrides: Sequence[str] = ()
) -> DistillConfig:
    """Read configurations, apply ``section.key=value`` overrides (values are YAML) and check the result.

    Args:
        configs: YAML files, or names of presets (training/presets.py). A later one replaces the keys that it has, in
            sections key by key.
        overrides: applied last, in their order.

    Raises:
        TDMError: a file is missing or not a mapping, a key is unknown, a type or a value is wrong.
    """
    data: dict[str, Any] = {}
    for config in (configs,) if isinstance(configs, str | Path) else configs or ():
        _merge(data, _read(find_config(config)))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise TDMError(f"an override is key=value, for example student.lr=1e-4, not {override!r}")
        *sections, last = key.split(".")
        node = data
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise TDMError(f"{key}: {section} is a value, not a section")
        node[last] = yaml.safe_load(value)
    return from_dict(DistillConfig, data)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TDMError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise TDMError(f"{path} must hold 'key: value' settings")
    return data


def _merge(data: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(data.get(key), dict):
            _merge(data[key], value)
        else:
            data[key] = value


def from_dict(cls: type[T], data: dict[str, Any], where: str = "") -> T:
    """Build dataclass ``cls`` from plain data, refusing unknown keys, wrong types and values that are missing;
    ``where`` names it in errors.
    """
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    names, values = list(fields), {}
    for key, value in data.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            raise TDMError(
                f"unknown setting {where}{key}; " + (f"did you mean {near[0]}?" if near else f"known: {names}")
            )
        values[key] = _coerce(value, hints[key], f"{where}{key}")
    missing = [f"{where}{name}" for name in names if name not in values and _has_no_default(fields[name])]
    if missing:
        raise TDMError(f"{', '.join(missing)} must be set")
    return cls(**values)


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _coerce(value: Any, hint: Any, name: str) -> Any:
    """``value`` as the type ``hint``, or a TDMError that names it."""
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise TDMError(f"{name} is a section with its own keys, not {value!r}")
        return from_dict(hint, value, f"{name}.")  # type: ignore[arg-type]
    if origin is Literal:
        if value not in args:
            raise TDMError(f"{name} must be one of {', '.join(map(str, args))}, not {value!r}")
        return value
    if origin in (Union, types.UnionType):
        return None if value is None else _coerce(value, next(a for a in args if a is not type(None)), name)
    if origin is tuple:
        if not isinstance(value, list | tuple) or (args[-1] is not ... and len(value) != len(args)):
            items = _ITEMS.get(args[0], "lists") if args[-1] is ... else len(args)
            raise TDMError(f"{name} must be a list of {items}, not {value!r}")
        return tuple(_coerce(item, args[0], name) for item in value)
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise TDMError(f"{name} is a section with its own keys, not {value!r}")
        if args and dataclasses.is_dataclass(args[1]):
            return {key: _coerce(item, args[1], f"{name}.{key}") for key, item in value.items()}
        return value
    if hint is float:
        value = _number(value)  # YAML 1.1 reads 1e-4 as a string
    if isinstance(value, bool) is not (hint is bool) or not isinstance(value, hint):
        raise TDMError(f"{name} must be of type {hint.__name__}, not {value!r}")
    return value


def _number(value: Any) -> Any:
    try:
        return value if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return value


def _validate(c: DistillConfig) -> None:
    """The invariants between settings; the grid against a task's schedule is checked by ``Trajectory``."""

    def need(ok: bool, message: str) -> None:
        if not ok:
            raise TDMError(message)

    t, grid = c.trajectory, c.trajectory.timesteps
    need(c.updates > 0, f"updates must be positive, not {c.updates}")
    need(c.batch_size > 0, f"batch_size must be positive, not {c.batch_size}")
    micro = c.micro_batch_size
    need(
        micro is None or (micro > 0 and c.batch_size % micro == 0),
        f"micro_batch_size must divide batch_size, which is {c.batch_size}; {micro} does not",
    )
    need(t.steps > 0, f"trajectory.steps must be positive, not {t.steps}")
    if grid is not None:
        need(len(grid) == t.steps, f"trajectory.timesteps has {len(grid)} entries for {t.steps} steps; give as many")
        need(
            all(a > b for a, b in pairwise(grid)) and grid[-1] > 0,
            f"trajectory.timesteps must strictly decrease and stay positive, not {list(grid)}",
        )
    need(t.shift > 0, f"trajectory.shift must be positive, not {t.shift}")
    need(0 <= t.tau_min < t.tau_max < 1, f"need 0 <= tau_min < tau_max < 1, not {t.tau_min}, {t.tau_max}")
    need(0 < t.margin < 0.5, f"trajectory.margin must be in (0, 0.5), not {t.margin}")
    need(
        c.objective.guidance_scale >= 1,
        f"objective.guidance_scale must be at least 1, not {c.objective.guidance_scale}",
    )
    by_stage = c.objective.stage_guidance
    need(
        by_stage is None or (len(by_stage) == t.steps and min(by_stage) >= 1 and c.objective.guidance_scale > 1),
        f"objective.stage_guidance wants {t.steps} numbers of at least 1, beside a guidance_scale above 1",
    )
    need(c.objective.norm_min > 0, f"objective.norm_min must be positive, not {c.objective.norm_min}")
    need(
        c.objective.huber_c is None or c.objective.huber_c > 0,
        f"objective.huber_c must be positive, not {c.objective.huber_c}",
    )
    _validate_objective(c, need)
    for name, role in (("student", c.student), ("critic", c.critic)):
        need(role.rank > 0, f"{name}.rank must be positive, not {role.rank}")
        need(role.alpha is None or role.alpha > 0, f"{name}.alpha must be positive, not {role.alpha}")
        need(role.targets != (), f"{name}.targets must name at least one layer")
        need(role.targets is None or not c.full_weights, f"{name}.targets is for adapters; full_weights trains all")
        need(role.lr > 0, f"{name}.lr must be positive, not {role.lr}")
        need(role.clip > 0, f"{name}.clip must be positive, not {role.clip}")
        need(all(0 <= b < 1 for b in role.betas), f"{name}.betas must be in [0, 1), not {list(role.betas)}")
        need(role.weight_decay >= 0 and role.warmup >= 0, f"{name}.weight_decay and {name}.warmup must not be negative")
        need(0 <= role.lr_end <= 1, f"{name}.lr_end is a fraction of lr, not {role.lr_end}")
    need(c.critic.weight_limit > 0, f"critic.weight_limit must be positive, not {c.critic.weight_limit}")
    need(c.critic.per_student > 0, f"critic.per_student must be positive, not {c.critic.per_student}")
    need(c.critic.head_start >= 0, f"critic.head_start must not be negative, not {c.critic.head_start}")
    need(0 <= c.ema.decay < 1, f"ema.decay must be in [0, 1), not {c.ema.decay}")
    for f in dataclasses.fields(c.output):
        need(getattr(c.output, f.name) >= 0, f"output.{f.name} must not be negative")
    need(
        c.output.log_every > 0 and c.output.teacher_steps > 0,
        "output.log_every and output.teacher_steps must be positive",
    )
    need(c.output.keep > 0, "output.keep must be positive: the last checkpoint is always kept")


def _validate_objective(c: DistillConfig, need: Callable[[bool, str], None]) -> None:
    """What objective, critic and trajectory ask of each other."""
    t, o = c.trajectory, c.objective
    if t.unify is not None:
        known = len(set(t.unify)) == len(t.unify) and all(k > 0 for k in t.unify)
        need(
            known and t.steps in t.unify,
            f"trajectory.unify wants step counts, trajectory.steps (it is {t.steps}) among them",
        )
        need(t.timesteps is None, "trajectory.timesteps is the grid of one step count; leave it out with unify")
    need(0 < t.spread < 0.2, f"trajectory.spread must be in (0, 0.2), not {t.spread}")
    for name, band in (("trajectory.bands", t.bands), ("objective.guidance_band", o.guidance_band)):
        need(band != "full" or t.renoise == "clean", f"{name}=full goes below the states; set trajectory.renoise=clean")
    need(o.ode_steps >= t.steps, f"objective.ode_steps must be at least trajectory.steps, not {o.ode_steps}")
    need(o.guidance_weight >= 0, f"objective.guidance_weight must not be negative, not {o.guidance_weight}")
    matching = o.name == "matching"
    need(matching or o.gradient == "kl", f"objective.gradient=sid is for objective.name=matching, not {o.name}")
    need(matching or c.critic.head_start == 0, f"objective.name={o.name} trains no critic: critic.head_start must be 0")
    decoupled = o.guidance_term == "decoupled"
    need(
        not decoupled or (matching and o.gradient == "kl" and o.guidance_scale > 1),
        "objective.guidance_term=decoupled wants the objective matching with gradient kl, and a guidance_scale above 1",
    )
    need(
        not c.critic.share_noise or (matching and o.gradient == "kl" and not decoupled),
        "critic.share_noise is for the objective matching with gradient kl and coupled guidance",
    )
