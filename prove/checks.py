"""How each row is shown: measured calls, killed and resumed runs, several processes, and every way to store a base."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..errors import TDMError
from ..training.checkpoint import read_checkpoint
from ..training.cost import micro_batch_size
from ..training.estimate.estimator import GIB, GPUS, Estimate, Estimator, Gpu
from ..training.settings import load_config
from ..training.stages import total_updates
from ..training.tasks.base_storage import storage_on
from .bases import Base
from .child import DiedError, in_child
from .compare import FAR, distance, equal
from .jobs import KILL, Machine, Trained, TrainingJob, bench, train
from .record import Result

PROMPTS = ("a red cube", "a cat", "two stars above a tree", "an orange moon over the sea")
SHORT = 4  # updates of a run that is not killed
REPEATS = 3
COMPILED = "pixart"  # the smallest of the measured models


class NotAvailableError(Exception):
    """This machine cannot do it, which is no failure."""


@dataclass(frozen=True)
class Workplace:
    """What every row works with.

    Attributes:
        machine: that it is measured on.
        device: as `joined` takes it.
        folder: for what a row needs while it runs, and for the logs.
        updates: of a killed run.
        settings: ``key=value`` of every run.
        estimator: is kept, so that nothing is rehearsed twice.
    """

    machine: Machine
    device: str
    folder: Path
    updates: int
    settings: tuple[str, ...]
    estimator: Estimator

    def child(self, row: str, function: Callable[..., Any], *arguments: Any, processes: int = 1) -> Any:
        """`in_child`, with the log of a row."""
        log = self.folder / "logs" / f"{row.replace(' ', '-')}.log"
        return in_child(function, *arguments, log=log, processes=processes)

    def job(self, base: Base, memory: str, out: str, *settings: str) -> TrainingJob:
        """A run of a family's preset with a memory class, without previews and evaluations."""
        prompts = self.folder / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
        quiet = ("output.preview_every=0", "output.evaluate_every=0", "output.log_every=1", "stages=[]")
        task = (f"task.model={base.folder}", f"task.prompts={prompts}", f"task.cache={self.folder / 'cache'}")
        settings = (*task, *quiet, *settings, *self.settings)
        folder = self.folder / "work" / out
        return TrainingJob(base.folder, base.random, (base.family, memory), settings, folder, self.device)

    def estimate(self, job: TrainingJob, processes: int = 1) -> Estimate:
        """`tdm estimate` of a run.

        Raises:
            TDMError: the settings or the base are refused.
        """
        return self.estimator(load_config(job.configs, job.settings), processes)

    @property
    def gpu(self) -> Gpu | None:
        """This device, if the speed of its kind is known."""
        name = _letters(self.machine.device)
        kinds = sorted(GPUS.values(), key=lambda gpu: len(gpu.name), reverse=True)
        known = next((gpu for gpu in kinds if _letters(gpu.name) in name), None)
        return known and replace(known, memory=self.machine.memory / GIB)

    def result(self, text: str, trained: Trained, estimate: Estimate) -> Result:
        """What a run took, and what was estimated."""
        if trained.peak is not None and (trained.loading_peak or 0) > trained.peak:
            text += f"; loading took {(trained.loading_peak or 0) / GIB:.2f} GiB"
        return Result(
            text,
            seconds=trained.seconds,
            seconds_estimated=estimate.seconds(self.gpu) if self.gpu else None,
            peak=trained.peak,
            peak_estimated=round(estimate.total - estimate.memory["context"]),
        )


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


# ---------------------------------------------------------------------- calls


def bench_row(work: Workplace, model: str) -> Result:
    """`tdm bench` of a model."""
    return _measured(work, f"bench {model}", model, compiled=False)


def compile_row(work: Workplace) -> Result:
    """The same with the denoiser compiled.

    Raises:
        NotAvailableError: what compiles for this device is not installed.
    """
    if work.machine.kind == "cuda" and find_spec("triton") is None:
        raise NotAvailableError("triton is not installed")
    if work.machine.kind == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise NotAvailableError("there is no C++ compiler")
    return _measured(work, "storage compile", COMPILED, compiled=True)


def _measured(work: Workplace, row: str, model: str, *, compiled: bool) -> Result:
    costs = work.child(row, bench, model, work.device, REPEATS, compiled)
    pipe, stock = costs["TDMPipeline"], costs["stock pipeline"]
    size = "small variant" if work.machine.kind == "cpu" and model != "bundled" else "native size"
    text = f"{size}: {pipe.calls} network calls, {pipe.over_bare:.3f} of the bare networks' time"
    text += f"; stock pipeline {stock.calls} calls, {stock.over_bare:.3f}"
    return Result(text, seconds=pipe.seconds, peak=pipe.peak)


# ---------------------------------------------------------------------- killed and resumed runs


def preset_row(work: Workplace, base: Base, memory: str) -> Result:
    """A run of a preset and a memory class, killed after three quarters and resumed from an earlier checkpoint than its
    last, so that the same update is made twice.

    Raises:
        NotAvailableError: it does not fit.
        TDMError: it was refused or went wrong.
    """
    row = f"presets {base.family} {memory}"
    out, updates = row.replace(" ", "-"), f"updates={work.updates}"
    plain = work.job(base, memory, out, updates)
    config = load_config(plain.configs, plain.settings)
    every = total_updates(config) // 4
    # Two micro batches take the memory of a larger batch, in less time.
    batch = f"batch_size={2 * micro_batch_size(config)}"
    job = work.job(base, memory, out, updates, batch, f"output.checkpoint_every={every}", "output.keep=2")
    estimate = work.estimate(job)
    _require_room(work, estimate)
    try:
        work.child(row, train, replace(job, kill_after=3 * every + 1))
    except DiedError as death:
        if death.code not in (-KILL, KILL):  # Windows has no sign
            raise
    else:
        raise TDMError(f"the run was to be killed after update {3 * every + 1} and went on")
    before = job.out / "killed.pt"
    (job.out / "checkpoint.pt").rename(before)
    trained = work.child(row, train, replace(job, resume=True))
    again = job.out / f"checkpoint-{3 * every:06d}.pt"
    same = _same(work, read_checkpoint(before), read_checkpoint(again))
    text = f"killed after update {3 * every + 1}, resumed from {2 * every}: update {3 * every} is the same {same}"
    batch = f"batch {load_config(job.configs, job.settings).batch_size}"
    return work.result(f"{batch}; {text}; critic loss {trained.loss:.4g}", trained, estimate)


def _require_room(work: Workplace, estimate: Estimate) -> None:
    device = Gpu(work.machine.device, work.machine.memory / GIB, 1.0)
    if not estimate.fits(device):
        needed = f"{estimate.total / GIB:.1f} of {device.memory:.1f} GiB"
        raise NotAvailableError(f"does not fit: {needed}, by tdm estimate")


def _same(work: Workplace, before: dict[str, Any], again: dict[str, Any]) -> str:
    """How equal two checkpoints of one update are.

    Raises:
        TDMError: they differ, where they must not: a CPU promises a resume that is exact.
    """
    states = ("step", "adapters", "ema", "optimizers", "generator")
    if all(equal(before[state], again[state]) for state in states):
        return "bit for bit"
    far = distance(again["ema"]["weights"], before["ema"]["weights"])
    if work.machine.kind == "cpu" or before["step"] != again["step"] or far > FAR[work.machine.kind]:
        raise TDMError(f"the resumed run differs from the killed one in update {before['step']}, by {far:.2g}")
    return f"except for rounding ({far:.1g} of the student; a GPU promises no more)"


# ---------------------------------------------------------------------- several processes


def cards_row(work: Workplace, base: Base, *, shard: bool) -> Result:
    """Two processes, a card each (NCCL), or on a CPU with gloo, against one with the same batch.

    Raises:
        NotAvailableError: there is one card.
        TDMError: another student came out.
    """
    if work.machine.kind == "cuda" and work.machine.count < 2:
        raise NotAvailableError("NCCL needs two GPUs; this machine has one")
    row = f"cards {'sharded base' if shard else 'data parallel'}"
    name = row.replace(" ", "-")
    few = (f"updates={SHORT}", "batch_size=4", "micro_batch_size=1", f"output.checkpoint_every={SHORT}")
    one = work.job(base, "24gb", f"{name}-one", *few)
    two = work.job(base, "24gb", f"{name}-two", *few, *(["memory.shard=true"] if shard else []))
    two = replace(two, device=work.machine.kind)  # each process takes its own card
    alone = work.child(row, train, one)
    together = work.child(row, train, two, processes=2)
    students = [read_checkpoint(job.out / "checkpoint.pt")["ema"]["weights"] for job in (two, one)]
    far = distance(*students)
    if not far <= FAR[work.machine.kind]:
        raise TDMError(f"the student of two processes differs from that of one by {far:.2g} of its size")
    backend = "NCCL" if work.machine.kind == "cuda" else "gloo"
    text = f"{backend}, two processes: {far:.1g} from the student of one, which took {alone.seconds:.3g} s"
    return work.result(text, together, work.estimate(two, 2))


# ---------------------------------------------------------------------- storage

STORAGES: dict[str, Sequence[str]] = {
    "plain": ("memory.base=auto",),
    "nf4": ("memory.base=nf4",),
    "int8": ("memory.base=int8",),
    "llm_int8": ("memory.base=llm_int8",),
    "fp8": ("memory.base=fp8",),
    "offload": ("memory.base=auto", "memory.offload=true"),
}


def storage_row(work: Workplace, base: Base, storage: str) -> Result:
    """A short run on a base that is stored in one way.

    Raises:
        NotAvailableError: it needs a GPU, or a package that is not installed, or another network.
        TDMError: it went wrong.
    """
    row = f"storage {storage}"
    few = (f"updates={SHORT}", "batch_size=2", "micro_batch_size=1")
    job = work.job(base, "24gb", row.replace(" ", "-"), *few, *STORAGES[storage])
    config = load_config(job.configs, job.settings)
    try:
        storage_on(config.memory, torch.device(work.device))
    except TDMError as error:
        raise NotAvailableError(str(error)) from None
    if config.memory.offload and not work.estimator.offloads(config):
        raise NotAvailableError("this base has convolutions, which cannot be trained from main memory")
    estimate = work.estimate(job)
    _require_room(work, estimate)
    trained = work.child(row, train, job)
    return work.result(f"critic loss {trained.loss:.4g} after {SHORT} updates", trained, estimate)
