"""What runs in a process of its own: a training run of a few updates, a measured call, a look at the machine."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import statistics
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

from ..bench.machine import processor
from ..bench.measure import Measured, measure
from ..bench.models import build
from ..training.from_plain import from_dict
from ..training.log import read_metrics
from ..training.loop import distill
from ..training.processes import joined
from ..training.settings import load_config
from ..training.tasks.pipeline import PipelineTask
from ..training.tasks.pipeline_settings import PipelineTaskConfig
from ..training.tasks.random_base import RandomBase

KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has no other, and ends a process with it at once
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "torchao")
WARM = 2  # updates that are not timed
STEPS = 4  # network calls of a measured call


@dataclass(frozen=True)
class Machine:
    """What all rows are measured on.

    Attributes:
        device: its name.
        kind: "cuda" or "cpu".
        count: of such devices.
        memory: bytes of one; of a CPU the main memory.
        versions: of the driver and the packages, as text.
    """

    device: str
    kind: Literal["cuda", "cpu"]
    count: int
    memory: int
    versions: str


def machine(device: str | None) -> Machine:
    """The machine of a device.

    Raises:
        TDMError: there is no such device.
    """
    with joined(device) as (_, place):
        packages = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
        python = f"Python {platform.python_version()}"
        if place.type == "cpu":
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
            name = f"{processor()}, {torch.get_num_threads()} threads"
            return Machine(name, "cpu", 1, memory, f"{packages}, {python}")
        properties = torch.cuda.get_device_properties(place)
        driver = f"driver {_driver()}, CUDA {torch.version.cuda}"
        return Machine(
            properties.name,
            "cuda",
            torch.cuda.device_count(),
            properties.total_memory,
            f"{driver}, {packages}, {python}",
        )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    """The version of NVIDIA's driver."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return lines[0] if lines else "unknown"


@dataclass(frozen=True)
class TrainingJob:
    """A run of a few updates.

    Attributes:
        base: folder.
        random: whether its weights are random (see `RandomBase`).
        configs: presets, as `load_config` takes them.
        settings: ``key=value``, likewise.
        out: folder of the run.
        device: as `joined` takes it.
        resume: go on from the checkpoint in ``out``.
        kill_after: the update after which the process ends itself by SIGKILL.
    """

    base: str
    random: bool
    configs: tuple[str, ...]
    settings: tuple[str, ...]
    out: Path
    device: str
    resume: bool = False
    kill_after: int | None = None


@dataclass(frozen=True)
class Trained:
    """What a run took.

    Attributes:
        seconds: of an update, the median without the first ones.
        peak: bytes, while it trained: on a GPU of all tensors, on a CPU of what the process had resident beyond its
            imports. None where that is not known.
        loading_peak: the same before the first update.
        loss: the critic's in the last update; of an objective without a critic, the student's.
    """

    seconds: float
    peak: int | None
    loading_peak: int | None
    loss: float


def train(job: TrainingJob) -> Trained:
    """Train, as `tdm distill` does.

    Raises:
        TDMError: what `tdm distill` would refuse.
    """
    config = load_config(job.configs, job.settings)

    def on_update(step: int) -> None:
        if step == job.kill_after:
            os.kill(os.getpid(), KILL)

    with joined(job.device) as (processes, device):
        memory = _Peak(device)
        section = from_dict(PipelineTaskConfig, config.task, "task.")
        base = RandomBase.of(job.base) if job.random else None
        # The first process encodes the prompts; the others then find them.
        task = processes.first_alone(lambda: PipelineTask(section, config.memory, device, base=base))
        loading = memory.take()
        distill(task, config, job.out, processes=processes, resume=job.resume, on_update=on_update)
        peak = memory.take()
    lines = [line for line in read_metrics(job.out / "metrics.jsonl") if "seconds_per_update" in line]
    times = [line["seconds_per_update"] for line in lines]
    losses = [line[name] for line in lines[-1:] for name in ("critic_loss", "student_loss") if name in line]
    return Trained(statistics.median(times[WARM:] or times), peak, loading, losses[0])


class _Peak:
    """The most memory that this process had on a device since it was last asked."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = _resident("VmRSS") or 0

    def take(self) -> int | None:
        """Bytes; the next ones are counted anew."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return peak
        resident = _resident("VmHWM")
        if resident is None:
            return None
        with contextlib.suppress(OSError):  # without it the next peak is that of both
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        return max(0, resident - self.before)


def _resident(name: str) -> int | None:
    """Bytes of this process in main memory, where the system says that: now (VmRSS) or at the most (VmHWM)."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    lines = status.read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def bench(model: str, device: str, repeats: int, compiled: bool) -> dict[str, Measured]:
    """`tdm bench` of a model: at its native size on a GPU, its small variant on a CPU."""
    with joined(device) as (_, place):
        gpu = place.type == "cuda"
        dtype = torch.bfloat16 if gpu else torch.float32
        pipe, call = build(model, tiny=not gpu, device=place, dtype=dtype, steps=STEPS)
        return measure(pipe, call, repeats=repeats, device=place, compiled=compiled)
