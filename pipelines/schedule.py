"""Noise schedules, prediction types and timestep grids: the mathematics shared by sampler, trainer and nodes.

Every model here sees ``x_t = alpha_t * x0 + sigma_t * epsilon``; all is written on the pair ``(alpha, sigma)``:

- **vp** (SD, SDXL, PixArt, CogVideoX): ``alpha^2 + sigma^2 = 1``, a DDPM table; timesteps run from 0 to N - 1;
- **flow** (SD3, Flux, Sana, Wan, Z-Image, Qwen-Image, Krea 2): ``alpha = 1 - sigma`` and ``sigma = t / N``; timesteps
  run from 0 to N and are already shifted.

The clean end of a grid is the pair (1, 0). On a vp model it is not a table entry: timestep 0 is still slightly noisy.

Sources: DDPM (2006.11239), DDIM (2010.02502), v-prediction (2202.00512), zero-terminal SNR (2305.08891), SNR shift
(CogVideoX, 2408.06072), flow time shift (SD3, 2403.03206), DPM-Solver++ 2M (2211.01095), TDM (2503.06674).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ..errors import TDMError
from .prediction_types import PREDICTION_TYPES

Coefficient = float | Tensor  # a number, or a tensor that broadcasts against the samples (see `expand`)
F = TypeVar("F", float, Tensor)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The pair (alpha, sigma) as a function of the timestep; build one with `NoiseSchedule.vp` or `.flow`.

    Attributes:
        kind: "vp" or "flow".
        num_train_timesteps: N.
        alphas_cumprod: (N,) float64 on the CPU, the squares of alpha; None on a flow model.
    """

    kind: Literal["vp", "flow"]
    num_train_timesteps: int = 1000
    alphas_cumprod: Tensor | None = None

    @classmethod
    def vp(
        cls,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        snr_shift_scale: float = 1.0,
    ) -> NoiseSchedule:
        """The table of a DDPM model; the arguments mean what they mean in diffusers.

        The SNR is divided by `snr_shift_scale`, then the table is rescaled to zero terminal SNR (CogVideoX's order).

        Raises:
            TDMError: an unknown `beta_schedule`, betas outside (0, 1], a wrong number of betas, a scale not above 0.
        """
        if trained_betas is not None:
            betas = torch.as_tensor(trained_betas, dtype=torch.float64)
            if betas.shape != (num_train_timesteps,):
                raise TDMError(f"trained_betas has shape {tuple(betas.shape)}; expected ({num_train_timesteps},)")
        elif beta_schedule == "linear":
            betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
        elif beta_schedule == "scaled_linear":
            betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64) ** 2
        else:
            raise TDMError(
                f"beta_schedule {beta_schedule!r} is unknown; use 'linear', 'scaled_linear' or trained_betas"
            )
        if not bool(((betas > 0) & (betas <= 1)).all()):
            raise TDMError("every beta must lie in (0, 1]; check beta_start, beta_end and trained_betas")
        if not snr_shift_scale > 0:
            raise TDMError(f"snr_shift_scale must be above 0, got {snr_shift_scale}")

        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        alphas_cumprod = alphas_cumprod / (snr_shift_scale + (1 - snr_shift_scale) * alphas_cumprod)
        if rescale_betas_zero_snr:
            # alpha is moved to 0 at the last timestep and stretched to keep its first value (2305.08891, algorithm 1)
            alphas = alphas_cumprod.sqrt()
            alphas_cumprod = ((alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])) ** 2
        return cls("vp", num_train_timesteps, alphas_cumprod)

    @classmethod
    def flow(cls, num_train_timesteps: int = 1000) -> NoiseSchedule:
        """Rectified flow: ``sigma = t / N``, ``alpha = 1 - sigma``."""
        return cls("flow", num_train_timesteps)

    @property
    def clean_timestep(self) -> int:
        """Where the clean end lies when a grid is drawn on the axis of timesteps: one before the first table entry."""
        return 0 if self.kind == "flow" else -1

    @property
    def last_timestep(self) -> int:
        """The noisiest timestep: N on a flow model, N - 1 on a vp model."""
        return self.num_train_timesteps + self.clean_timestep

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at `timesteps` of any shape, in float64 on their device.

        A fractional timestep of a vp model interpolates alpha, which stays finite at zero terminal SNR. The look-up
        runs on the CPU: in a training loop, draw timesteps there.

        Raises:
            TDMError: a timestep is not finite or outside [0, last_timestep].
        """
        t = timesteps.detach().to("cpu", torch.float64)
        if not bool(((t >= 0) & (t <= self.last_timestep)).all()):
            raise TDMError(f"timesteps must lie in [0, {self.last_timestep}], got {t.min():g} to {t.max():g}")
        if self.alphas_cumprod is None:
            sigma = t / self.num_train_timesteps
            alpha = 1 - sigma
        else:
            table = self.alphas_cumprod.sqrt()
            low = t.floor().long()
            alpha = torch.lerp(table[low], table[t.ceil().long()], t - low)
            sigma = (1 - alpha**2).sqrt()
        return alpha.to(timesteps.device), sigma.to(timesteps.device)

    def timestep_from_sigma(self, sigmas: Tensor) -> Tensor:
        """The timesteps of noise levels, in their shape, float64 on the CPU. Levels are as diffusers counts them: sigma
        on a flow model, sigma / alpha on a vp model.

        Raises:
            TDMError: a noise level is not a number or outside the schedule.
        """
        s = sigmas.to("cpu", torch.float64)
        if self.alphas_cumprod is None:
            timesteps = s * self.num_train_timesteps
        else:
            # The inverse of the interpolation in `alpha_sigma`. searchsorted wants ascending values: look up -alpha.
            alpha = (1 + s**2).rsqrt()
            table = self.alphas_cumprod.sqrt()
            high = torch.searchsorted(-table, -alpha).clamp(1, self.last_timestep)
            timesteps = high - (alpha - table[high]) / (table[high - 1] - table[high])
            whole = timesteps.round()  # an entry of the table that was rounded to float32 is still that entry
            timesteps = torch.where((timesteps - whole).abs() < 1e-3, whole, timesteps)
        if not bool(((timesteps >= 0) & (timesteps <= self.last_timestep)).all()):
            raise TDMError(f"noise levels outside the schedule, got {s.min():g} to {s.max():g}")
        return timesteps


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """(B,) coefficients as (B, 1, ..., 1) in the dtype and on the device of the samples `like`, (B, ...)."""
    return coefficient.to(like).reshape(-1, *[1] * (like.ndim - 1))


def predict_x0_eps(
    prediction_type: str, model_output: Tensor, x: Tensor, alpha: Coefficient, sigma: Coefficient
) -> tuple[Tensor, Tensor]:
    """The clean sample and the noise that a network's output stands for at ``x = alpha * x0 + sigma * epsilon``.

    Output, x, x0 and epsilon have one shape; the coefficients are numbers or broadcast to it.

    - epsilon: ``x0 = (x - sigma * out) / alpha``, ``epsilon = out``
    - sample: ``x0 = out``, ``epsilon = (x - alpha * out) / sigma``
    - v_prediction, ``v = alpha * epsilon - sigma * x0``: ``x0 = alpha * x - sigma * v``,
      ``epsilon = sigma * x + alpha * v`` (vp only)
    - flow_prediction, ``v = epsilon - x0``: ``x0 = x - sigma * v``, ``epsilon = x + alpha * v`` (flow only)
    """
    if prediction_type == "epsilon":
        return (x - sigma * model_output) / alpha, model_output
    if prediction_type == "v_prediction":
        return alpha * x - sigma * model_output, sigma * x + alpha * model_output
    if prediction_type == "sample":
        return model_output, (x - alpha * model_output) / sigma
    if prediction_type == "flow_prediction":
        return x - sigma * model_output, x + alpha * model_output
    raise TDMError(f"prediction_type {prediction_type!r} is unknown; use one of {', '.join(PREDICTION_TYPES)}")


def predict_output(prediction_type: str, x0: Tensor, eps: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """The network output that stands for (x0, epsilon), in their shape: the inverse of `predict_x0_eps`."""
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "v_prediction":
        return alpha * eps - sigma * x0
    if prediction_type == "sample":
        return x0
    if prediction_type == "flow_prediction":
        return eps - x0
    raise TDMError(f"prediction_type {prediction_type!r} is unknown; use one of {', '.join(PREDICTION_TYPES)}")


def ddim_step(x0: Tensor, eps: Tensor, alpha_next: Coefficient, sigma_next: Coefficient) -> Tensor:
    """One deterministic step from x0 and epsilon of one shape: DDIM on vp, Euler on flow. At (1, 0) it is x0 itself."""
    return alpha_next * x0 + sigma_next * eps


def mixed_noise(eps: Tensor, fresh: Tensor, eta: float) -> Tensor:
    """The noise of a stochastic step, ``sqrt(1 - eta^2) eps + eta fresh``, of unit variance as both are.

    Args:
        eps: the model's own noise ``[B, ...]``.
        fresh: standard normal noise of that shape.
        eta: 0 (the model's own noise alone) to 1 (fresh noise alone), as in DDIM and TCD.
    """
    return fresh if eta == 1 else math.sqrt(1 - eta * eta) * eps + eta * fresh


def renoise_coefficients(
    alpha_m: Tensor, sigma_m: Tensor, alpha_tau: Tensor, sigma_tau: Tensor
) -> tuple[Tensor, Tensor]:
    """(r, b) with ``x_tau = r * x_m + b * xi``, ``xi ~ N(0, I)``: diffuse a state at level m up to level tau.

    ``r = alpha_tau / alpha_m``, ``b^2 = sigma_tau^2 - (r * sigma_m)^2``. From the clean end (1, 0) this is the ordinary
    forward process, and ``tau = m`` gives (1, 0).

    Raises:
        TDMError: alpha_m is 0 (nothing is noisier than pure noise), or tau is below m (noise cannot be removed).
    """
    if not bool((alpha_m > 0).all()):
        raise TDMError("cannot re-noise from alpha = 0: no level is noisier than pure noise")
    r = alpha_tau / alpha_m
    variance = sigma_tau**2 - (r * sigma_m) ** 2
    if not bool((variance > -1e-6).all()):  # tau = m leaves rounding below 0
        raise TDMError("re-noising only goes up: every tau must be at or above its m")
    return r, variance.clamp(min=0).sqrt()


def shift_sigma(sigma: F, shift: float) -> F:
    """Flow time shift ``shift * s / (1 + (shift - 1) * s)``, s in [0, 1]. A dynamic shift is ``exp(mu)``."""
    return sigma / (sigma + (1 - sigma) / shift)  # the same, and exactly 1 at 1


def unshift_sigma(sigma: F, shift: float) -> F:
    """The inverse of `shift_sigma`."""
    return shift_sigma(sigma, 1 / shift)


def check_grid(timesteps: Sequence[float], schedule: NoiseSchedule) -> list[float]:
    """The grid as a list of Python floats.

    Raises:
        TDMError: it is empty, not strictly decreasing, or has an entry that is not finite, not noisy or out of range.
    """
    grid = [float(t) for t in timesteps]
    low, high = schedule.clean_timestep, schedule.last_timestep
    if not grid:
        raise TDMError("a timestep grid needs at least one entry")
    if not all(low < t <= high and t >= 0 for t in grid):  # False for NaN
        raise TDMError(f"timesteps must lie in {'(' if low == 0 else '['}0, {high}], got {grid}")
    if any(later >= earlier for earlier, later in pairwise(grid)):
        raise TDMError(f"timesteps must strictly decrease, got {grid}")
    return grid


def grid_pairs(schedule: NoiseSchedule, timesteps: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(alphas, sigmas), (K + 1,) float64 each: the levels of a grid of K timesteps, ending in the clean pair (1, 0).

    Raises:
        TDMError: the grid is not valid (see `check_grid`).
    """
    alpha, sigma = schedule.alpha_sigma(torch.tensor(check_grid(timesteps, schedule), dtype=torch.float64))
    return torch.cat([alpha, alpha.new_ones(1)]), torch.cat([sigma, sigma.new_zeros(1)])


def second_order_weights(alphas: Tensor, sigmas: Tensor) -> list[float]:
    """Weights w (K floats) that turn `ddim_step` into DPM-Solver++ 2M: add ``w[k] * (x0_k - x0_{k-1})`` at step k.

    With ``lambda = log(alpha / sigma)``, ``h = lambda_{k+1} - lambda_k`` and ``h' = lambda_k - lambda_{k-1}``:
    ``w = (alpha_{k+1} - alpha_k * sigma_{k+1} / sigma_k) * h / (2 h')``. The first step has no predecessor and the last
    one goes to ``lambda = inf``: both have weight 0, as has the step after pure noise (``h' = inf``).
    """
    logsnr = alphas.log() - sigmas.log()
    h = logsnr.diff()
    weights = (alphas[2:-1] - alphas[1:-2] * sigmas[2:-1] / sigmas[1:-2]) * h[1:-1] / (2 * h[:-2])
    return [0.0, *weights.tolist(), 0.0][: len(alphas) - 1]


def uniform_grid(k: int, schedule: NoiseSchedule, shift: float = 1.0, first: float | None = None) -> list[float]:
    """K equal steps from `first` (the last timestep if None) to the clean end: diffusers' "trailing" spacing, shifted.

    Four steps on 1000 timesteps are [999, 749, 499, 249] (vp, integers) or [1000, 750, 500, 250] (flow, shift 1).
    """
    top = schedule.last_timestep if first is None else first
    clean = schedule.clean_timestep
    grid = [(top - clean) * shift_sigma((k - i) / k, shift) + clean for i in range(k)]
    return check_grid(_whole(grid, schedule), schedule)


def respace_grid(timesteps: Sequence[float], k: int, schedule: NoiseSchedule) -> list[float]:
    """A K-step grid along the curve of another one: linear interpolation over the fraction of steps done.

    Both grids begin at the same timestep and end clean; half the steps of a grid are every second of its timesteps.
    """
    knots = [*timesteps, schedule.clean_timestep]
    grid = []
    for i in range(k):
        position = i * len(timesteps) / k
        j = math.floor(position)
        grid.append(knots[j] + (position - j) * (knots[j + 1] - knots[j]))
    return check_grid(_whole(grid, schedule), schedule)


def trained_grids(
    trained: Sequence[float] | Mapping[Any, Sequence[float]] | None, schedule: NoiseSchedule
) -> dict[int, list[float]]:
    """{K: timesteps} of a list, a mapping (its keys may be strings, as JSON makes them) or None.

    Raises:
        TDMError: it is empty, a grid is not valid (see `check_grid`), has not as many timesteps as its K, or has
            fractions on a vp schedule.
    """
    if trained is None:
        return {}
    if len(trained) == 0:
        raise TDMError("trained_timesteps is empty; leave it out for a model that was not distilled")
    if not isinstance(trained, Mapping):
        trained = {len(trained): trained}
    grids = {}
    for key, timesteps in trained.items():
        grid = check_whole(check_grid(timesteps, schedule), schedule)
        if str(key) != str(len(grid)):
            raise TDMError(f"trained_timesteps has {len(grid)} timesteps for K = {key}: {grid}")
        grids[len(grid)] = grid
    return dict(sorted(grids.items()))


def grid_of_steps(trained: Mapping[int, Sequence[float]], k: int, schedule: NoiseSchedule) -> tuple[list[float], int]:
    """(grid, the step count it was trained for) of K steps: the grid trained for K, or the nearest one re-spaced.

    Args:
        trained: for each trained step count its timesteps; at least one. Of two that are as near, the longer is taken.
    """
    nearest = min(trained, key=lambda known: (abs(known - k), -known))
    grid = list(trained[nearest])
    return (grid if nearest == k else respace_grid(grid, k, schedule)), nearest


def first_step(grid: Sequence[float], strength: float, schedule: NoiseSchedule) -> int:
    """The index of the timestep nearest to a strength, as a share of the schedule's length; the noisier one of two.

    Args:
        grid: timesteps, decreasing.
        strength: 0 (keep the picture) to 1 (keep nothing of it), without the 0.

    Raises:
        TDMError: the strength is outside that range.
    """
    if not 0 < strength <= 1:
        raise TDMError(f"strength must be above 0 and at most 1, got {strength}")
    shares = [t / schedule.num_train_timesteps for t in grid]
    return min(range(len(grid)), key=lambda i: (abs(shares[i] - strength), i))


def check_whole(grid: list[float], schedule: NoiseSchedule) -> list[float]:
    """The grid, if it needs no rounding.

    Raises:
        TDMError: a timestep of a vp model has a fraction. Diffusers would run it as it is, and ComfyUI rounds it.
    """
    if grid != _whole(grid, schedule):
        raise TDMError(f"timesteps of epsilon and v-prediction models are whole numbers, got {grid}")
    return grid


def _whole(grid: list[float], schedule: NoiseSchedule) -> list[float]:
    """vp models were trained on whole timesteps; flow models on any."""
    return grid if schedule.kind == "flow" else [round(t) for t in grid]
