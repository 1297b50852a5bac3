"""Measure what a call of `TDMPipeline` costs beyond its network calls: exact counts, seconds, memory.

Three runs of one model on the same weights: the call of `TDMPipeline`; the call of the stock pipeline with its own
scheduler and the same settings; and the bare networks, which is every call of text encoder, denoiser and decoder that
the first run made, repeated with the same inputs and nothing between them.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..pipelines.tdm_pipeline import TDMPipeline
from .memory import LiveMemory

COPIES = {"_to_copy", "clone", "copy_", "_copy_from"}
READS = {"_local_scalar_dense", "nonzero", "equal"}  # the host waits for a value
Run = Callable[[], Any]


@dataclass
class Cost:
    """Operators that one part of a run dispatched.

    Attributes:
        operators: on tensors, of any kind, views included.
        allocations: outputs that do not share memory.
        copies: operators that only move or cast values.
        reads: operators whose result the host waits for; a host sync, where the value is on an accelerator.
    """

    operators: int = 0
    allocations: int = 0
    copies: int = 0
    reads: int = 0


@dataclass
class Counts:
    """The counts of one call: calls by component, cost by part ("networks", "steps", "rest"), and its peak memory.

    `peak` is in bytes, of tensors that operators created, without the weights.
    """

    calls: Counter[str] = field(default_factory=Counter)
    costs: dict[str, Cost] = field(default_factory=lambda: {name: Cost() for name in ("networks", "steps", "rest")})
    peak: int = 0


class _Meter(LiveMemory):
    """Counts every operator that runs inside the `with`, under the part that is set."""

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.part = Counts(), "rest"

    def record(self, function: Any, args: Any, kwargs: Any, out: Any, allocations: int) -> None:  # noqa: ARG002
        cost, name = self.counts.costs[self.part], function.overloadpacket.__name__
        cost.operators += 1
        cost.copies += name in COPIES
        cost.reads += name in READS
        cost.allocations += allocations
        self.counts.peak = self.peak


def networks(pipe: Any) -> dict[str, nn.Module]:
    """The networks that a call runs, by name: text encoders, the denoiser and the decoder."""
    networks = {name: m for name, m in pipe.components.items() if isinstance(m, nn.Module) and name != "vae"}
    return networks | ({"decoder": pipe.vae.decoder} if getattr(pipe, "vae", None) is not None else {})


@contextmanager
def _hooked(pipe: Any, before: Callable[..., None], after: Callable[[], None]) -> Iterator[None]:
    """`before(name, network, args, kwargs)` and `after()` around every call of a network."""
    with ExitStack() as hooks:
        for name, network in networks(pipe).items():

            def enter(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                before(name, module, args, kwargs)

            hooks.enter_context(network.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.enter_context(network.register_forward_hook(lambda *_: after()))
        yield


def count(pipe: Any, run: Run) -> Counts:
    """The exact counts of one run of a pipeline. Its networks must not be compiled: their operators would hide."""
    meter, step = _Meter(), pipe.scheduler.step

    def enter(name: str, *_: Any) -> None:
        meter.counts.calls[name] += 1
        meter.part = "networks"

    def leave() -> None:
        meter.part = "rest"

    def counted_step(*args: Any, **kwargs: Any) -> Any:
        meter.part = "steps"
        try:
            return step(*args, **kwargs)
        finally:
            meter.part = "rest"

    pipe.scheduler.step = counted_step
    try:
        with _hooked(pipe, enter, leave), meter:
            run()
    finally:
        del pipe.scheduler.step
    return meter.counts


def bare(pipe: Any, run: Run) -> Run:
    """Return a function that repeats the network calls of a run, with the same inputs and nothing between them."""
    calls: list[tuple[nn.Module, Any, Any]] = []
    with _hooked(pipe, lambda _, *call: calls.append(call), lambda: None):
        run()

    @torch.no_grad()
    def replay() -> None:
        for network, args, kwargs in calls:
            network(*args, **kwargs)

    return replay


def runs_of(pipe: Any, call: dict[str, Any]) -> tuple[Any, dict[str, Run]]:
    """(stock pipeline, runs by name) of a `TDMPipeline`: the stock one shares its components but the scheduler.

    Args:
        pipe: with a student, whose adapter both pipelines run.
        call: arguments of both calls, without the student's steps, guidance and size; no generator.
    """
    stock_class = pipe.family.pipeline_class()
    options = {
        name: pipe.config[name] for name in inspect.signature(stock_class.__init__).parameters if name in pipe.config
    }
    stock: Any = stock_class(**{**options, **pipe.components, "scheduler": pipe.teacher_scheduler})
    stock.set_progress_bar_config(disable=True)
    pipe.set_progress_bar_config(disable=True)
    known = inspect.signature(type(stock).__call__).parameters
    settings = {k: v for k, v in pipe.call_defaults().items() if k in known} | call

    def tdm() -> Any:
        return pipe(**call, generator=torch.Generator().manual_seed(0))

    def plain() -> Any:
        return stock(**settings, generator=torch.Generator().manual_seed(0))

    return stock, {"TDMPipeline": tdm, "stock pipeline": plain, "bare networks": bare(pipe, tdm)}


def seconds(runs: dict[str, Run], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each run, one after the other in each round, so that a busy machine slows all alike.

    On a CPU they are of processor time, to which other work on the machine adds little; else by the clock on the wall.
    """
    now = time.process_time if device.type == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(repeats + 1):
        for name, run in runs.items():
            _wait(device)
            begun = now()
            run()
            _wait(device)
            if round_ > 0:  # the first one warms up, and compiles
                times[name].append(now() - begun)
    return times


def peak_on(device: torch.device, run: Run) -> int:
    """Bytes of device memory that a run took at its peak, beyond what was taken before it (accelerators only)."""
    _wait(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    _wait(device)
    return torch.cuda.max_memory_allocated(device) - before


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


HEADER = (
    "| model | run | denoiser calls | s | over bare | peak MB | operators in steps | copies | reads | allocations "
    "| other operators |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


@dataclass(frozen=True)
class Measured:
    """What one run of a model cost.

    Attributes:
        calls: of the denoiser.
        seconds: the median over rounds.
        over_bare: the median of the ratios to the bare networks within each round.
        peak: bytes beyond the weights: of the device, or on a CPU of the tensors that operators created. None where it
            was not measured.
        steps, rest: what the pipeline did outside the networks; None for the bare networks.
    """

    calls: int
    seconds: float
    over_bare: float
    peak: int | None
    steps: Cost | None = None
    rest: Cost | None = None

    def row(self, model: str, run: str) -> str:
        """A line of the Markdown table under `HEADER`."""
        cells = [model, run, str(self.calls), f"{self.seconds:.3f}", f"{self.over_bare:.3f}"]
        cells.append("" if self.peak is None else f"{self.peak / 1e6:.1f}")
        if self.steps is None or self.rest is None:
            cells += [""] * 5
        else:
            counts = (self.steps.operators, self.steps.copies, self.steps.reads, self.steps.allocations)
            cells += [str(count) for count in (*counts, self.rest.operators)]
        return f"| {' | '.join(cells)} |"


def measure(
    pipe: TDMPipeline, call: dict[str, Any], *, repeats: int, device: torch.device, compiled: bool
) -> dict[str, Measured]:
    """The three runs of one model, by name: "TDMPipeline", "stock pipeline" and "bare networks"."""
    stock, runs = runs_of(pipe, call)
    owners = {"TDMPipeline": pipe, "stock pipeline": stock}
    counts = {run: count(owner, runs[run]) for run, owner in owners.items()}
    if compiled:
        pipe.denoiser.compile()
    times = seconds(runs, repeats, device)
    measured = {}
    for run, spent in times.items():
        counted = counts.get(run)
        peak = peak_on(device, runs[run]) if device.type == "cuda" else counted.peak if counted else None
        measured[run] = Measured(
            calls=(counted or counts["TDMPipeline"]).calls[pipe.family.denoiser],
            seconds=statistics.median(spent),
            over_bare=statistics.median(a / b for a, b in zip(spent, times["bare networks"], strict=True)),
            peak=peak,
            steps=counted.costs["steps"] if counted else None,
            rest=counted.costs["rest"] if counted else None,
        )
    return measured
