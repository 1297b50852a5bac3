"""ComfyUI's noise levels and ours.

ComfyUI keeps a flow sample as ``(1 - s) * x0 + s * epsilon``, which is the pair (1 - s, s), and a vp sample as
``x0 + s * epsilon`` with ``s = sigma / alpha``, which is the pair (1, s): its `model_sampling` scales it for the
network. A level s is what its SIGMAS hold. Pure noise has no such s on a vp model: some large number stands for it,
and its sample is ``sqrt(1 + s^2) * epsilon``, which is the pair (0, sqrt(1 + s^2)).
"""

from __future__ import annotations

import copy
from typing import Any

import comfy.model_sampling as core
import torch
from torch import Tensor

from ..errors import TDMError
from ..pipelines.schedule import NoiseSchedule

PURE_NOISE = 2e4  # our s of pure noise: above all others, and stock samplers lose only s * 6e-8 to float32
_COMFY_PURE_NOISE = 4518.0  # where ComfyUI's tables end, if they end in pure noise

_NOT_DDPM = (core.ModelSamplingDiscreteEDM, core.StableCascadeSampling, core.EDM, core.IMG_TO_IMG)
_PREDICTIONS = {core.V_PREDICTION: "v_prediction", core.X0: "sample", core.EPS: "epsilon"}  # subclasses first


def prediction_type_of(model_sampling: Any) -> str:
    """Return what the network of a MODEL predicts, as a recipe names it, from its `model_sampling`.

    Raises:
        TDMError: this kind of model is none that a TDM student can have.
    """
    if isinstance(model_sampling, core.CONST) and not isinstance(model_sampling, core.IMG_TO_IMG_FLOW):
        return "flow_prediction"
    if isinstance(model_sampling, core.V_PREDICTION_DDPM):
        raise TDMError("ComfyUI samples CogVideoX wrongly; put the node 'TDM CogVideoX Sampling' behind its loader")
    if hasattr(model_sampling, "skip_steps"):
        raise TDMError("ModelSamplingDiscrete is set to lcm, which leaves 50 noise levels: remove it before TDM Sigmas")
    if isinstance(model_sampling, core.ModelSamplingDiscrete) and not isinstance(model_sampling, _NOT_DDPM):
        predictions = [name for kind, name in _PREDICTIONS.items() if isinstance(model_sampling, kind)]
        if predictions:
            return predictions[0]
    kinds = " and ".join(kind.__name__ for kind in type(model_sampling).__bases__)
    raise TDMError(f"this model samples with {kinds}; TDM runs on DDPM schedules (epsilon, v, x0) and on flow models")


def schedule_of(model_sampling: Any) -> NoiseSchedule:
    """The noise schedule of a MODEL, from its `model_sampling`.

    Raises:
        TDMError: as in `prediction_type_of`, or a schedule that cannot be the model's.
    """
    predicts = prediction_type_of(model_sampling)
    if predicts == "flow_prediction":
        return NoiseSchedule.flow()
    s = model_sampling.sigmas.to("cpu", torch.float64)
    alphas_cumprod = 1 / (1 + s**2)
    if s[-1] > _COMFY_PURE_NOISE:
        if predicts == "epsilon":
            raise TDMError(
                "an epsilon model knows nothing of the picture in pure noise; set zsnr only for v_prediction"
            )
        alphas_cumprod[-1] = 0
    return NoiseSchedule("vp", len(s), alphas_cumprod)


def sampling_on(schedule: NoiseSchedule, prediction_type: str, shift: float = 1.0) -> Any:
    """The `model_sampling` of a noise schedule, for a network that predicts this.

    Args:
        schedule: of the network.
        prediction_type: what it predicts, in our words.
        shift: of the levels that core's schedulers choose on a flow model.

    Raises:
        TDMError: ComfyUI has none for it.
    """
    predictions = {"flow_prediction": core.CONST, **{name: kind for kind, name in _PREDICTIONS.items()}}
    prediction = predictions[prediction_type]
    if (schedule.kind == "flow") != (prediction is core.CONST):
        raise TDMError(f"ComfyUI has no sampling for a {schedule.kind} model that predicts {prediction_type}")
    clock: Any = core.ModelSamplingDiscreteFlow if schedule.kind == "flow" else core.ModelSamplingDiscrete
    sampling = type("TDMModelSampling", (clock, prediction), {})()
    steps = schedule.num_train_timesteps
    if schedule.kind == "flow":
        sampling.set_parameters(shift=shift, timesteps=steps, multiplier=steps)
    else:
        sampling.set_sigmas(levels_of(schedule, *schedule.alpha_sigma(torch.arange(steps))))
    return sampling


def levels_of(schedule: NoiseSchedule, alphas: Tensor, sigmas: Tensor) -> Tensor:
    """The levels s of pairs, in the shape of the pairs: float32 on the CPU."""
    s = sigmas if schedule.kind == "flow" else (sigmas / alphas).clamp(max=PURE_NOISE)
    return s.to("cpu", torch.float32)


def pairs_of(model_sampling: Any, s: Tensor) -> tuple[Tensor, Tensor]:
    """(alphas, sigmas), float64 on the CPU, of the samples at levels s as ComfyUI keeps them."""
    s = s.to("cpu", torch.float64)
    if isinstance(model_sampling, core.CONST):
        return 1 - s, s
    pure = s >= PURE_NOISE
    return torch.where(pure, 0.0, torch.ones_like(s)), torch.where(pure, (1 + s**2).sqrt(), s)


class _FromPureNoise:
    """A model's sampling from pure noise at a level below the model's noisiest one."""

    uncut: tuple[Any]  # a tuple: a module inside a module would become part of it

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        """The first sample. A stock flow model keeps 1 - sigma of the (empty) latents at its first level."""
        if max_denoise and isinstance(self, core.CONST):
            sigma = torch.ones_like(sigma)
        return super().noise_scaling(sigma, noise, latent_image, max_denoise)  # type: ignore[misc]

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        """The clean sample. At pure noise the noisy sample has no part in it, as in the limit of infinite s."""
        if isinstance(self, core.V_PREDICTION):
            sigma = sigma.where(sigma < PURE_NOISE, 1e12)
        return super().calculate_denoised(sigma, model_output, model_input)  # type: ignore[misc]


def cut(model_sampling: Any, first: float) -> Any:
    """A copy of a `model_sampling` whose noisiest level is `first`, where sampling begins with pure unit noise.

    TDM begins at the first trained timestep with unit noise, wherever that lies. ComfyUI does so only at the noisiest
    level of a model, and scales the noise down below it.
    """
    result = copy.deepcopy(uncut(model_sampling))
    s = result.sigmas
    below = s[:-1] if first >= PURE_NOISE else s[s < first * (1 - 1e-6)]
    s = torch.cat([below, s.new_tensor([first])])
    if isinstance(result, core.CONST):
        result.register_buffer("sigmas", s)
    else:
        result.set_sigmas(s)
    result.uncut = (uncut(model_sampling),)
    result.__class__ = type("TDMModelSampling", (_FromPureNoise, type(result)), {})
    return result


def uncut(model_sampling: Any) -> Any:
    """Return what `cut` took, or the argument itself if it is no product of `cut`."""
    return model_sampling.uncut[0] if isinstance(model_sampling, _FromPureNoise) else model_sampling
