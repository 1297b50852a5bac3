"""What a run will take, before it runs: passes, FLOPs, seconds of an update, and memory by part.

Sizes come from the base's configs, FLOPs and activations from an update without data (rehearsal.py). What is assumed
and not measured has a name here: what CUDA itself takes, the share of a GPU's memory that can be filled, and
the share of its peak that is reached. None of it has been checked against a GPU yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..config import DistillConfig, MemoryConfig, Storage
from ..cost import head_start_passes, micro_batch_size, micro_batches, passes
from ..loop import settled
from ..objectives import objective_of
from ..objectives.passes import Passes
from ..presets import MEMORY
from ..settings import load_config
from ..stages import stages_of
from ..tasks.base_storage import compute_dtype, storage_on
from ..tasks.prompt_cache import encoder_dtype
from .rehearsal import Course, Rehearsal, TaskWithoutWeights

GIB = 2**30
CONTEXT = {  # what is there besides tensors
    "cuda": 0.6 * GIB,  # CUDA's context and the workspaces of its libraries: assumed
    "cpu": 0.6 * GIB,  # Python, torch, diffusers and the workspaces of oneDNN: measured, docs/measurements.md
}
USABLE = 0.95  # of a GPU's memory, the rest is lost between blocks: assumed
UTILISATION = (0.25, 0.5)  # of a GPU's peak, that training such networks reaches: assumed


@dataclass(frozen=True)
class Gpu:
    """A GPU: memory in GiB, and its maker's peak of dense bfloat16 products summed in float32, in TFLOP/s."""

    name: str
    memory: float
    tflops: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("rtx3060", 12, 25),
        Gpu("rtx4060ti", 16, 44),
        Gpu("rtx4080", 16, 97),
        Gpu("rtx3090", 24, 71),
        Gpu("rtx4090", 24, 165),
        Gpu("rtx5090", 32, 210),
        Gpu("l40s", 48, 362),
        Gpu("a100-40gb", 40, 312),
        Gpu("a100", 80, 312),
        Gpu("h100", 80, 989),
        Gpu("h200", 141, 989),
    )
}

# Bytes of a linear layer's weight, where they are fewer than it is computed in. nf4 has a scale for every 64 weights,
# in 8 bits itself.
_SMALL: dict[Storage, float] = {"fp8": 1, "int8": 1, "llm_int8": 1, "nf4": 0.5 + 1 / 64 + 4 / 64 / 256}
_MOMENTS = {"adamw": 8.0, "adamw8bit": 2 + 2 * 4 / 256}  # bytes of an optimiser's state for a weight


@dataclass(frozen=True)
class Estimate:
    """The estimate of one configuration on ``processes`` devices. Of several stages it is that of the one that takes
    most memory. `run_flops` and `stages` are of the whole run.

    Attributes:
        device: "cuda" or "cpu".
        shapes: whose configs the base's sizes are from.
        batch_size: samples of an update, over all processes.
        run_flops: FLOPs of the whole run, on all devices together.
        stages: each stage's name, updates and estimate; none for a run without stages.
        parameters: of the frozen base.
        trained: by role.
        flops: of one sample's pass, by name; see ``Course``.
        memory: bytes on each device by part, at the peak of an update.
        encoders: bytes of the text encoders on a device, which are there before, while prompts are encoded.
        prompt: bytes of one prompt's condition, which waits in main memory.
    """

    config: DistillConfig
    processes: int
    device: str
    shapes: str
    passes: Passes
    parameters: int
    trained: dict[str, int]
    flops: Mapping[str, float]
    memory: dict[str, float]
    encoders: float
    prompt: int
    batch_size: int
    run_flops: float
    stages: tuple[tuple[str, int, Estimate], ...] = ()

    @property
    def total(self) -> float:
        """Bytes on each device at the peak of an update."""
        return sum(self.memory.values())

    @property
    def encoding(self) -> float:
        """Bytes on a device while prompts are encoded: a text encoder's activations are small next to it."""
        return self.encoders + self.memory["context"]

    @property
    def flops_per_update(self) -> float:
        """FLOPs of an update of the whole batch, on all devices together."""
        return self.batch_size * _flops_per_sample(self.passes, self.flops)

    def seconds(self, gpu: Gpu) -> tuple[float, float]:
        """(least, most) seconds of an update, at the assumed ``UTILISATION``."""
        return self._seconds(self.flops_per_update, gpu)

    def run_seconds(self, gpu: Gpu) -> tuple[float, float]:
        """(least, most) seconds of the whole run, without previews and evaluation."""
        return self._seconds(self.run_flops, gpu)

    def _seconds(self, flops: float, gpu: Gpu) -> tuple[float, float]:
        ideal = flops / (gpu.tflops * 1e12 * self.processes)
        return ideal / UTILISATION[1], ideal / UTILISATION[0]

    def fits(self, gpu: Gpu) -> bool:
        """Whether each device has room, by the assumed ``USABLE`` share."""
        return max(self.total, self.encoding) <= USABLE * gpu.memory * GIB


def _flops_per_sample(p: Passes, flops: Mapping[str, float]) -> float:
    forwards = (p.prefix + p.student) * flops["student"] + (p.critic + p.score) * flops["critic"]
    backwards = p.student_backward * flops["student_backward"] + p.critic_backward * flops["critic_backward"]
    return forwards + p.teacher * flops["teacher"] + backwards


class Estimator:
    """Estimates configurations, and rehearses only what has not been rehearsed yet.

    Args:
        device: "cuda" for GPUs, or "cpu" for this machine.
    """

    def __init__(self, device: Literal["cuda", "cpu"] = "cuda") -> None:
        self.device = device
        self._rehearsals: dict[str, Rehearsal] = {}
        self._courses: dict[tuple[str, int, int], Course] = {}

    def __call__(self, config: DistillConfig, processes: int = 1) -> Estimate:
        """The estimate of a configuration.

        Raises:
            TDMError: the task is no pipeline, or what it would refuse about base, size or grid.
        """
        stages = [(stage.name, stage.end - stage.begin, self._stage(stage.config, processes))
                  for stage in stages_of(config)]  # fmt: skip
        most = max((estimate for _, _, estimate in stages), key=lambda estimate: estimate.total)
        flops = sum(estimate.run_flops for _, _, estimate in stages)
        return replace(most, config=config, run_flops=flops, stages=tuple(stages) if config.stages else ())

    def _stage(self, config: DistillConfig, processes: int) -> Estimate:
        """The estimate of one stage's settings."""
        if self.device == "cpu":
            storage_on(config.memory, torch.device("cpu"))  # which refuses what is for a GPU
        micro, count = micro_batch_size(config, processes), micro_batches(config, processes)
        key, rehearsal = self._rehearsal(config)
        course = self._course(key, rehearsal, micro, count)
        trained = sum(rehearsal.trained.values())
        stepped = sum(rehearsal.trained[role] for role in objective_of(config.objective).trains)
        memory = {
            "base": _base_bytes(rehearsal, config.memory, processes),
            "adapters": 4.0 * (trained + rehearsal.trained["student"]),
            "optimisers": _MOMENTS[config.memory.optimizer] * stepped,  # AdamW makes its moments at the first step
            "update": course.peak + _unpacked(rehearsal, config.memory),
            "context": CONTEXT[self.device],
        }
        return Estimate(
            config=config,
            processes=processes,
            device=self.device,
            shapes=rehearsal.task.shapes,
            passes=(p := passes(config, processes)),
            parameters=sum(shape.numel() for _, shape in rehearsal.shapes),
            trained={str(role): n for role, n in rehearsal.trained.items()},
            flops=course.flops,
            memory=memory,
            encoders=rehearsal.task.encoder_weights * encoder_dtype(torch.device(self.device)).itemsize,
            prompt=sum(value.nbytes for value in rehearsal.task.conditions(1).values()),
            batch_size=config.batch_size,
            run_flops=config.batch_size
            * (
                config.updates * _flops_per_sample(p, course.flops)
                + config.critic.head_start * _flops_per_sample(head_start_passes(config, processes), course.flops)
            ),
        )

    def offloads(self, config: DistillConfig) -> bool:
        """Whether the base can be trained from main memory."""
        return self._rehearsal(config)[1].offloads

    def _rehearsal(self, config: DistillConfig) -> tuple[str, Rehearsal]:
        dtype = compute_dtype(config.memory.base, torch.device(self.device))
        precision = config.precision if self.device == "cuda" else settled(config, self.device).precision
        memory = MemoryConfig(gradient_checkpointing=config.memory.gradient_checkpointing)
        same = replace(config, batch_size=1, micro_batch_size=None, memory=memory)
        key = f"{dtype} {same}"
        if key not in self._rehearsals:
            task = TaskWithoutWeights(config.task, dtype)
            self._rehearsals[key] = Rehearsal(same, task, precision != "fp32", self.device)
        return key, self._rehearsals[key]

    def _course(self, key: str, rehearsal: Rehearsal, samples: int, count: int) -> Course:
        """The course of an update of ``count`` micro batches. It is rehearsed with one sample and with two, for each
        more adds the same activations.
        """

        def course(n: int) -> Course:
            if (key, n, min(count, 2)) not in self._courses:
                self._courses[key, n, min(count, 2)] = rehearsal.update(n, count)
            return self._courses[key, n, min(count, 2)]

        one = course(1)
        if samples == 1:
            return one
        return Course(one.flops, one.peak + (samples - 1) * (course(2).peak - one.peak))


def _base_bytes(rehearsal: Rehearsal, memory: MemoryConfig, processes: int) -> float:
    """The frozen base on one device. A base in main memory (offload) or spread over processes comes block by block."""
    other = rehearsal.task.dtype.itemsize
    linear = _SMALL.get(memory.base, other)
    whole = sum(shape.numel() * (linear if kind == "linear" else other) for kind, shape in rehearsal.shapes)
    if memory.offload:
        return _in_passing(rehearsal, memory, whole)
    return whole / processes + 2 * whole * rehearsal.largest_block if memory.shard and processes > 1 else whole


def _in_passing(rehearsal: Rehearsal, memory: MemoryConfig, whole: float) -> float:
    """Bytes in place at a time, where weights are brought into place for each layer: the backward pass keeps them all,
    or with gradient checkpointing those of a block.
    """
    return whole * (min(1.0, 2 * rehearsal.largest_block) if memory.gradient_checkpointing else 1.0)


def _unpacked(rehearsal: Rehearsal, memory: MemoryConfig) -> float:
    """Weights of a smaller base in the dtype that they are multiplied in."""
    sizes = [rehearsal.task.dtype.itemsize * shape.numel() for kind, shape in rehearsal.shapes if kind == "linear"]
    if memory.base == "fp8":
        return _in_passing(rehearsal, memory, sum(sizes))
    return max(sizes, default=0) if memory.base in ("int8", "llm_int8", "nf4") else 0.0


def lighter(config: DistillConfig, processes: int = 1, *, offload: bool = True) -> Iterator[tuple[str, DistillConfig]]:
    """(setting, configuration) that each take less memory than the one before, the cheapest means first; ``offload``
    says whether the base can be.
    """
    share = config.batch_size // processes
    for micro in range(micro_batch_size(config, processes) - 1, 0, -1):
        if share % micro == 0:
            config = replace(config, micro_batch_size=micro)
            yield f"micro_batch_size={micro}", config
    smaller: tuple[Storage, ...] = ("int8", "nf4")
    changes: list[tuple[str, dict[str, object]]] = [
        ("memory.gradient_checkpointing=true", {"gradient_checkpointing": True}),
        ("memory.optimizer=adamw8bit", {"optimizer": "adamw8bit"}),
    ]
    for base in smaller:
        if _SMALL[base] < _SMALL.get(config.memory.base, 2):
            changes.append((f"memory.base={base}", {"base": base}))
    if offload:
        changes.append(("memory.offload=true", {"offload": True}))
    for setting, change in changes:
        memory = replace(config.memory, **change)  # type: ignore[arg-type]
        if memory != config.memory:
            config = replace(config, memory=memory)
            yield setting, config


def what_to_lower(estimator: Estimator, config: DistillConfig, gpu: Gpu, processes: int = 1) -> list[str] | None:
    """The settings, in order of what they cost, with which a configuration fits; None if none is enough."""
    settings: dict[str, str] = {}
    for setting, smaller in lighter(config, processes, offload=estimator.offloads(config)):
        settings[setting.partition("=")[0]] = setting
        if estimator(smaller, processes).fits(gpu):
            return list(settings.values())
    return None


def presets_that_fit(estimator: Estimator, config: DistillConfig, gpu: Gpu, processes: int = 1) -> list[str]:
    """The memory classes with which a configuration fits, the largest first."""
    names = []
    for name in reversed(MEMORY):
        small = load_config(name)
        if small.batch_size % processes or (small.memory.shard and processes == 1):
            continue
        merged = replace(
            config, batch_size=small.batch_size, micro_batch_size=small.micro_batch_size, memory=small.memory
        )
        if estimator(merged, processes).fits(gpu):
            names.append(name)
    return names


def largest_micro_batch(estimator: Estimator, config: DistillConfig, gpu: Gpu, processes: int = 1) -> int | None:
    """The most samples at a time that fit, of those that divide a device's share; None if not even one does."""
    share = math.ceil(config.batch_size / processes)
    for micro in range(share, 0, -1):
        if share % micro == 0 and estimator(replace(config, micro_batch_size=micro), processes).fits(gpu):
            return micro
    return None
