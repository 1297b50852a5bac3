"""The samplers of students of other methods: schedulers of diffusers on the timesteps of the student's training."""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import TDMError

SCHEDULERS = ("DDIMScheduler", "EulerDiscreteScheduler", "LCMScheduler", "TCDScheduler")


@dataclass(frozen=True)
class Sampler:
    """What a student samples with, where that is not TDM's own `TDMScheduler`.

    Attributes:
        scheduler: class name in diffusers, one of `SCHEDULERS`.
        config: what its config has instead of the base's, such as ``{"timestep_spacing": "trailing"}``.
        eta: argument of the call, 0 to 1: the share of noise of TCD (its gamma) and DDIM. LCM always adds noise, Euler
            never. All noise comes from the call's `generator`.
        default_steps: the step count when none is asked for; None is the largest trained one.
    """

    scheduler: str
    config: Mapping[str, Any] = field(default_factory=dict)
    eta: float = 0.0
    default_steps: int | None = None

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            TDMError: a field has the wrong type or a value outside its range.
        """
        if self.scheduler not in SCHEDULERS:
            raise TDMError(f"sampler: scheduler must be one of {', '.join(SCHEDULERS)}, got {self.scheduler!r}")
        if not isinstance(self.config, Mapping) or not all(isinstance(key, str) for key in self.config):
            raise TDMError(f"sampler: config must be settings by name, got {self.config!r}")
        if not isinstance(self.eta, int | float) or not 0 <= self.eta <= 1:
            raise TDMError(f"sampler: eta must be from 0 to 1, got {self.eta!r}")

    @classmethod
    def from_fields(cls, fields: Any) -> Sampler:
        """A sampler from its fields, as a header has them.

        Raises:
            TDMError: they are no mapping, one is unknown or wrong, or the scheduler is missing.
        """
        known = list(inspect.signature(cls).parameters)
        if not isinstance(fields, Mapping) or "scheduler" not in fields or not set(fields) <= set(known):
            raise TDMError(
                f"sampler must have the fields scheduler and, if need be, {', '.join(known[1:])}: {fields!r}"
            )
        return cls(**fields)

    def on(self, config: Mapping[str, Any], grids: Mapping[int, Sequence[float]]) -> Any:
        """The scheduler, on the noise schedule of a base.

        ``set_timesteps(K)`` runs exactly the timesteps trained for K. Another K runs on the scheduler's own spacing,
        with a warning, once.

        Args:
            config: of the base's scheduler.
            grids: for each trained step count K its timesteps.

        Raises:
            TDMError: an unknown setting; or timesteps that the scheduler cannot run.
        """
        cls = _on_trained_grids(self.scheduler)
        if unknown := sorted(set(self.config) - set(inspect.signature(cls.__init__).parameters)):
            raise TDMError(f"sampler: {self.scheduler} has no setting {', '.join(unknown)}")
        scheduler = cls.from_config(config, **self.config)
        scheduler.trained_timesteps, scheduler.warned = dict(grids), set()
        for k, grid in grids.items():
            try:
                scheduler.set_timesteps(k)
            except ValueError as error:
                raise TDMError(f"sampler: {self.scheduler} cannot run the timesteps {list(grid)}: {error}") from None
            if (timesteps := scheduler.timesteps.tolist()) != list(grid):
                raise TDMError(
                    f"sampler: {self.scheduler} runs {k} steps at {timesteps}, not at the trained {list(grid)}"
                )
        return scheduler

    def __str__(self) -> str:
        settings = {**self.config, **({"eta": self.eta} if self.eta else {})}
        return ", ".join([self.scheduler, *(f"{name} {value}" for name, value in settings.items())])


@functools.cache
def _on_trained_grids(name: str) -> Any:
    """A scheduler class of diffusers whose `set_timesteps` knows the trained timesteps of an instance."""
    stock: Any = getattr(importlib.import_module("diffusers"), name)
    takes_timesteps = "timesteps" in inspect.signature(stock.set_timesteps).parameters

    @functools.wraps(stock.set_timesteps)  # pipelines look at its arguments
    def set_timesteps(self: Any, num_inference_steps: int | None = None, device: Any = None, **options: Any) -> None:
        k, grids = num_inference_steps, self.trained_timesteps
        if k in grids and takes_timesteps:
            return stock.set_timesteps(self, device=device, timesteps=list(grids[k]), **options)
        if grids and k is not None and k not in grids and k not in self.warned:
            self.warned.add(k)
            stated = ", ".join(map(str, grids))
            warnings.warn(f"this student is for {stated} steps; {k} steps run on the grid of {name}", stacklevel=3)
        return stock.set_timesteps(self, k, device, **options)

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:  # noqa: ARG001
        return _unpickled, (name,), vars(self)

    # Under its stock name and home: pipelines write both down when they are saved.
    names = {"set_timesteps": set_timesteps, "trained_timesteps": {}, "__module__": stock.__module__}
    return type(name, (stock,), {**names, "__reduce_ex__": reduce})


def _unpickled(name: str) -> Any:
    """An empty scheduler on trained timesteps, which then gets its state: no name leads to its class."""
    return object.__new__(_on_trained_grids(name))
