"""`TDMScheduler`: runs a few-step student on the timesteps it was trained on, inside any diffusers pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, overload

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # diffusers' loader looks this name up here
from diffusers.utils import BaseOutput
from torch import Generator, Tensor

from ..errors import TDMError
from .noise import NONE_GIVEN, noise_like
from .prediction_types import PREDICTION_TYPES, PredictionType
from .schedule import (
    NoiseSchedule,
    check_grid,
    check_whole,
    ddim_step,
    expand,
    grid_of_steps,
    grid_pairs,
    mixed_noise,
    predict_x0_eps,
    second_order_weights,
    trained_grids,
    uniform_grid,
)
from .sigma_grids import is_pipeline_default, noisy_levels, time_shift, timesteps_of_sigmas
from .stock_config import arguments_from_stock


@dataclass
class TDMSchedulerOutput(BaseOutput):
    """What `TDMScheduler.step` returns.

    Attributes:
        prev_sample: the sample at the next (less noisy) timestep, in the dtype of the model output.
        pred_original_sample: the clean sample x0 predicted at this step.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class TDMScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' own bases disagree on config_name
    """A sampler whose config holds the trained timesteps of each step count K. Deterministic, unless a student was
    trained with fresh noise between its steps.

    `set_timesteps(K)` runs exactly the timesteps trained for K. For another K it re-spaces the grid of the nearest
    trained one and warns, once. Without `trained_timesteps` it is an ordinary DDIM / Euler (order 1) or DPM-Solver++ 2M
    (order 2) scheduler on a uniform, trailing grid with the model's time shift: that is how a teacher runs.

    In a `model_index.json` it is ``["tdm.pipelines.scheduler", "TDMScheduler"]``, which is what `save_pretrained` of a
    pipeline writes and what a plain `from_pretrained` loads.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: the table of a vp model ("linear" or
            "scaled_linear"); without meaning on a flow model.
        prediction_type: "epsilon", "v_prediction", "sample" or "flow_prediction".
        rescale_betas_zero_snr: the vp table ends in pure noise (not with "epsilon": its x0 is undefined there).
        snr_shift_scale: divides the SNR of the vp table (CogVideoX; 1 = off).
        use_flow_sigmas: a flow model; None means ``prediction_type == "flow_prediction"``. A flow model that predicts
            x0 is "sample" with `use_flow_sigmas=True`.
        flow_shift: time shift of a flow model's uniform grid.
        use_dynamic_shifting, time_shift_type: take the shift from `mu` instead: ``exp(mu)``, or mu itself if "linear".
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: the pipelines compute mu from them.
        shift_terminal: stretch a uniform flow grid so that its last sigma is this (Qwen-Image).
        trained_timesteps: a list of K timesteps, or a mapping from K to a list; strictly decreasing. On a flow model a
            timestep is ``num_train_timesteps * sigma``, already shifted: no shift touches it.
        solver_order: 1, or 2 for DPM-Solver++ 2M on the same grid (first and last step are of order 1).
        stochastic_sampling: each step but the last goes on with fresh noise in the place of the model's own, as
            students of consistency models and of DMD2 are trained: ``x = alpha * x0 + sigma * noise``. Order 1 alone.
        eta: with `stochastic_sampling`, how fresh that noise is, above 0 and at most 1 (see `mixed_noise`).

    Attributes:
        noise_source: where a stochastic run takes its noise from: called with a tensor, it gives noise in that one's
            shape and dtype. `TDMPipeline` puts the call's generator behind it; None: `step` has to be given one.
        explicit_sigmas: noise levels that `set_timesteps` takes in the place of its `num_inference_steps` and `sigmas`,
            exactly. `TDMPipeline` puts those of the call there: some pipelines drop them. None: the arguments
            count.
        pred_original_sample: the clean sample x0 that the last `step` predicted, in the dtype of the model output; None
            before the first step of a run. Pipelines drop what `step` returns after the next sample: previews need it.

    Raises:
        TDMError: arguments that contradict each other or name no schedule.

    >>> scheduler = TDMScheduler(prediction_type="flow_prediction", trained_timesteps=[1000, 900, 750, 500])
    >>> scheduler.set_timesteps(4)
    >>> x = torch.randn(1, 4, 8, 8)
    >>> for t in scheduler.timesteps:
    ...     x = scheduler.step(torch.zeros_like(x), t, x).prev_sample  # zeros: where the network's output goes
    """

    order = 1  # network calls per timestep, as diffusers counts them
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: PredictionType = "epsilon",
        rescale_betas_zero_snr: bool = False,
        snr_shift_scale: float = 1.0,
        use_flow_sigmas: bool | None = None,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        base_shift: float | None = 0.5,  # noqa: ARG002
        max_shift: float | None = 1.15,  # noqa: ARG002
        base_image_seq_len: int = 256,  # noqa: ARG002
        max_image_seq_len: int = 4096,  # noqa: ARG002
        shift_terminal: float | None = None,
        trained_timesteps: Sequence[float] | Mapping[int, Sequence[float]] | None = None,
        solver_order: Literal[1, 2] = 1,
        stochastic_sampling: bool = False,
        eta: float = 1.0,
    ) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise TDMError(f"prediction_type {prediction_type!r} is unknown; use one of {', '.join(PREDICTION_TYPES)}")
        if solver_order not in (1, 2):
            raise TDMError(f"solver_order must be 1 or 2, got {solver_order}")
        if stochastic_sampling and solver_order == 2:
            raise TDMError("stochastic_sampling goes with solver_order 1: order 2 goes on along the model's own noise")
        if not 0 < eta <= 1:
            raise TDMError(f"eta must be above 0 and at most 1, got {eta}")
        if time_shift_type not in ("exponential", "linear"):
            raise TDMError(f"time_shift_type must be 'exponential' or 'linear', got {time_shift_type!r}")
        if not flow_shift > 0:
            raise TDMError(f"flow_shift must be above 0, got {flow_shift}")
        flow = prediction_type == "flow_prediction" if use_flow_sigmas is None else use_flow_sigmas
        if prediction_type != "sample" and flow != (prediction_type == "flow_prediction"):
            raise TDMError(f"use_flow_sigmas={use_flow_sigmas} contradicts prediction_type={prediction_type!r}")
        if flow and (rescale_betas_zero_snr or snr_shift_scale != 1):
            raise TDMError("rescale_betas_zero_snr and snr_shift_scale belong to vp models; use flow_shift")
        if not flow and (flow_shift != 1 or use_dynamic_shifting or shift_terminal):
            raise TDMError("flow_shift, use_dynamic_shifting and shift_terminal belong to flow models")

        if flow:
            self.schedule = NoiseSchedule.flow(num_train_timesteps)
        else:
            betas = (beta_start, beta_end, beta_schedule, trained_betas)
            self.schedule = NoiseSchedule.vp(num_train_timesteps, *betas, rescale_betas_zero_snr, snr_shift_scale)
            assert self.schedule.alphas_cumprod is not None
            if prediction_type == "epsilon" and self.schedule.alphas_cumprod[-1] == 0:
                raise TDMError("prediction_type 'epsilon' leaves x0 undefined at zero terminal SNR; use 'v_prediction'")

        self.trained_timesteps = trained_grids(trained_timesteps, self.schedule)
        self.register_to_config(trained_timesteps=self.trained_timesteps or None, use_flow_sigmas=flow)

        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0)
        self.sigmas = torch.empty(0)
        self.noise_source: Callable[[Tensor], Tensor] | None = None
        self.explicit_sigmas: Sequence[float] | None = None
        self._warned: set[int] = set()
        self._reset([])

    # ------------------------------------------------------------------ config

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build from the config of a `TDMScheduler` or of a stock scheduler; `kwargs` override it.

        Of a stock scheduler, the noise schedule, the prediction type, the time shift and `solver_order` are followed;
        its own spacing of the steps, its noise injection and its corrector are what this scheduler replaces.

        Raises:
            TDMError: the config has no schedule this class can follow, or a keyword argument is unknown.

        >>> import diffusers
        >>> stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        >>> TDMScheduler.from_config(stock.config, trained_timesteps=[900, 450]).config.flow_shift
        3.0
        """
        if isinstance(config, Mapping):
            known = set(cls._get_init_keys(cls)) | set(config)
            unknown = [name for name in kwargs if name not in known]
            if unknown:
                raise TDMError(f"unknown scheduler arguments: {', '.join(unknown)}")
            if not cls._is_tdm_config(config):
                config, kwargs = arguments_from_stock(config, kwargs, cls._get_init_keys(cls)), {}
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def prediction_type_of(cls, config: Mapping[str, Any]) -> PredictionType:
        """What the network of a scheduler's config predicts, without building the schedule.

        Raises:
            TDMError: the config has no schedule this class can follow.

        >>> import diffusers
        >>> TDMScheduler.prediction_type_of(diffusers.FlowMatchEulerDiscreteScheduler().config)
        'flow_prediction'
        """
        known = config if cls._is_tdm_config(config) else arguments_from_stock(config, {}, cls._get_init_keys(cls))
        return known.get("prediction_type", "epsilon")

    @classmethod
    def _is_tdm_config(cls, config: Mapping[str, Any]) -> bool:
        """Whether a config is of a `TDMScheduler`, and not of a stock scheduler."""
        return config.get("_class_name") == cls.__name__ or "trained_timesteps" in config

    # ------------------------------------------------------------------ grid

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Choose the grid: one of a step count, `timesteps` or `sigmas`.

        Args:
            num_inference_steps: K. Trained: exactly its timesteps; else the nearest grid re-spaced, with a warning.
            device: where `self.timesteps` goes.
            sigmas: noise levels as the stock schedulers take them: on a flow model before the time shift, on a vp model
                sigma / alpha; a final 0 may be there. ``linspace(1, 1/n, n)`` on a flow model is what pipelines pass
                when the user gave no sigmas, so it means "n steps" and nothing else. To run that very grid on a
                student, give it as `timesteps`.
            mu: dynamic shift, used only if `use_dynamic_shifting` and only where a shift applies.
            timesteps: the exact timesteps, strictly decreasing; on a flow model already shifted.

        Raises:
            TDMError: no grid or two grids were given, or it is not valid.

        >>> scheduler = TDMScheduler(prediction_type="v_prediction")
        >>> scheduler.set_timesteps(4)
        >>> scheduler.timesteps
        tensor([999, 749, 499, 249])
        """
        if self.explicit_sigmas is not None:
            num_inference_steps, sigmas = None, self.explicit_sigmas
        if timesteps is not None and sigmas is not None:
            raise TDMError("give either timesteps or sigmas, not both")
        levels = None if sigmas is None else noisy_levels(sigmas)
        explicit = timesteps if timesteps is not None else levels
        if explicit is None and num_inference_steps is None:
            raise TDMError("give num_inference_steps, timesteps or sigmas")
        if explicit is not None and num_inference_steps not in (None, len(explicit)):
            raise TDMError(f"num_inference_steps={num_inference_steps} contradicts the {len(explicit)} levels given")

        if timesteps is not None:
            grid = check_whole(check_grid(timesteps, self.schedule), self.schedule)
        elif levels is not None and (
            self.explicit_sigmas is not None or not is_pipeline_default(levels, self.schedule)
        ):
            grid = self._grid_from_sigmas(levels, mu)
        else:
            grid = self._grid_for(len(levels) if levels is not None else num_inference_steps, mu)

        if not grid or grid != self._grid:  # pipelines choose the same grid call after call
            alphas, pair_sigmas = grid_pairs(self.schedule, grid)
            # As in diffusers: sigma on a flow model, sigma / alpha on a vp one; on the CPU, with the final 0.
            self.sigmas = (pair_sigmas if self.schedule.kind == "flow" else pair_sigmas / alphas).float()
            # Python floats: `step` reads no tensor, so it never waits for the device.
            self._alphas, self._sigmas = alphas.tolist(), pair_sigmas.tolist()
            self._weights = second_order_weights(alphas, pair_sigmas)
        whole = self.schedule.kind == "vp" and all(t == int(t) for t in grid)  # explicit sigmas may give fractions
        self.num_inference_steps = len(grid)
        self.timesteps = torch.tensor(grid, dtype=torch.int64 if whole else torch.float32, device=device)
        self._reset(grid)

    def _reset(self, grid: list[float]) -> None:
        self._grid = grid
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._previous_x0: Tensor | None = None
        self.pred_original_sample: Tensor | None = None

    def _grid_for(self, k: Any, mu: float | None) -> list[float]:
        if isinstance(k, bool) or not isinstance(k, Integral) or k < 1:
            raise TDMError(f"num_inference_steps must be an integer of at least 1, got {k!r}")
        k = int(k)
        if self.trained_timesteps:
            grid, nearest = grid_of_steps(self.trained_timesteps, k, self.schedule)
            if nearest != k and k not in self._warned:
                self._warned.add(k)
                trained = ", ".join(map(str, sorted(self.trained_timesteps)))
                warnings.warn(
                    f"this student was trained for {trained} steps; {k} steps run on its {nearest}-step grid re-spaced",
                    stacklevel=3,
                )
            return grid
        if self.schedule.kind == "vp":
            return uniform_grid(k, self.schedule)
        return self._grid_from_sigmas([(k - i) / k for i in range(k)], mu)

    def _grid_from_sigmas(self, sigmas: list[float], mu: float | None) -> list[float]:
        shift = time_shift(self.config, mu) if self.schedule.kind == "flow" else 1.0
        return timesteps_of_sigmas(sigmas, self.schedule, shift, self.config["shift_terminal"])

    # ------------------------------------------------------------------ step

    @overload
    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: Literal[True] = True,
        *,
        generator: Generator | Sequence[Generator] | None = NONE_GIVEN,
    ) -> TDMSchedulerOutput: ...

    @overload
    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool,
        *,
        generator: Generator | Sequence[Generator] | None = NONE_GIVEN,
    ) -> TDMSchedulerOutput | tuple[Tensor, Tensor]: ...

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        *,
        generator: Generator | Sequence[Generator] | None = NONE_GIVEN,
    ) -> TDMSchedulerOutput | tuple[Tensor, Tensor]:
        """Go from one timestep to the next; the last step returns x0. Without a host sync.

        Args:
            model_output: the network's output at `timestep`, the shape of `sample`.
            timestep: only read to find where a run begins, if `set_begin_index` was not called.
            sample: x_t. Halves are computed in float32 and cast back.
            return_dict: False for the tuple (prev_sample, pred_original_sample).
            generator: of the fresh noise, or one for each sample; None is torch's global one. Without a meaning unless
                `stochastic_sampling`, or if there is a `noise_source`.

        Raises:
            TDMError: `set_timesteps` was not called, the run is over, the shapes differ, the timestep is foreign, or
                there is nothing to draw fresh noise with.
        """
        if self.num_inference_steps is None:
            raise TDMError("call set_timesteps before step")
        if model_output.shape != sample.shape:
            raise TDMError(
                f"model output {tuple(model_output.shape)} and sample {tuple(sample.shape)} differ in shape; "
                "split off a learned variance before step"
            )
        if self._step_index is None:
            self._step_index = self._find_step(timestep) if self._begin_index is None else self._begin_index
        i = self._step_index
        if not 0 <= i < self.num_inference_steps:
            raise TDMError(f"there is no step {i} among {self.num_inference_steps}; call set_timesteps to start again")

        compute_dtype = torch.promote_types(model_output.dtype, torch.float32)
        out, x = model_output.to(compute_dtype), sample.to(compute_dtype)
        x0, eps = predict_x0_eps(self.config["prediction_type"], out, x, self._alphas[i], self._sigmas[i])
        if self.config["stochastic_sampling"] and self._sigmas[i + 1] > 0:
            fresh = noise_like(x0, generator) if self.noise_source is None else self.noise_source(x0)
            eps = mixed_noise(eps, fresh, self.config["eta"])
        prev_sample = ddim_step(x0, eps, self._alphas[i + 1], self._sigmas[i + 1])
        if self._previous_x0 is not None:  # None at order 1, and at the first step of order 2, wherever a run begins
            prev_sample = prev_sample + self._weights[i] * (x0 - self._previous_x0)
        if self.config["solver_order"] == 2:
            self._previous_x0 = x0
        self._step_index = i + 1

        prev_sample, x0 = prev_sample.to(model_output.dtype), x0.to(model_output.dtype)
        self.pred_original_sample = x0
        return TDMSchedulerOutput(prev_sample, x0) if return_dict else (prev_sample, x0)

    def _find_step(self, timestep: float | Tensor) -> int:
        """The index of `timestep`, once a run, and without reading device memory for what pipelines pass.

        They iterate over `self.timesteps`: what arrives is a view of it, and its offset is the index. Only a tensor
        from elsewhere has to be read.
        """
        timesteps = self.timesteps
        if isinstance(timestep, Tensor) and timestep.numel() == 1 and timestep.device == timesteps.device:
            same_memory = timestep.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr()
            if same_memory and timestep.dtype == timesteps.dtype:
                return int(timestep.storage_offset())
        t = float(timestep)
        for i, entry in enumerate(self._grid):
            if abs(entry - t) < 1e-3:
                return i
        raise TDMError(f"timestep {t} is not one of {self._grid}")

    @property
    def step_index(self) -> int | None:
        """The index of the next step; None before the first one."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Where the run begins, if `set_begin_index` was called."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this step (image-to-image begins in the middle)."""
        self._begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The sample itself: these models take x_t as it is."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t of clean samples (B, ...) at `timesteps` (B,) or (1,), in the dtype of the samples."""
        x0 = original_samples.to(torch.promote_types(original_samples.dtype, torch.float32))
        alpha, sigma = (expand(c, x0) for c in self.schedule.alpha_sigma(timesteps.cpu()))
        return (alpha * x0 + sigma * noise.to(x0)).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` in the argument order of the flow pipelines."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]
