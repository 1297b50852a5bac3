"""TDM's sampler as a SAMPLER: `TDMScheduler.step` on ComfyUI's samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.samplers import KSAMPLER
from comfy_api.latest import io
from torch import Tensor
from tqdm.auto import trange

from ..errors import TDMError
from ..pipelines.schedule import ddim_step, mixed_noise, predict_x0_eps, second_order_weights
from .faces import warn
from .fresh_noise import FreshNoise
from .levels import pairs_of

FRESH_NOISE = "tdm_fresh_noise"
"""In the options of the MODEL that TDM Sigmas gives, if its student was trained with fresh noise at each step: the
"levels" of the whole run, by which a sampler on a part of them knows the noise that is due, and "eta" (`mixed_noise`).
"""
GUIDANCE = "tdm_guidance"
"""In the options of the MODEL that TDM Sigmas gives, if its student is made for classifier-free guidance: the scale."""


class TDMSampler(io.ComfyNode):
    """The sampler of TDM students."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="TDMSampler",
            display_name="TDM Sampler",
            category="model/sampling/TDM",
            description="The sampler of TDM students, for epsilon, v and flow models. Use it with TDM Sigmas in "
            "SamplerCustomAdvanced or SamplerCustom; TDM Sigmas goes last, behind ModelSampling nodes. It is "
            "deterministic, unless the student was trained with fresh noise at each step: then that follows from the "
            "seed.",
            search_aliases=["trajectory distribution matching", "few-step", "DDIM", "DPM-Solver++ 2M", "distilled"],
            inputs=[
                io.Int.Input(
                    "order",
                    default=1,
                    min=1,
                    max=2,
                    tooltip="What the student is sampled with: 1 is DDIM (Euler on flow models), 2 is DPM-Solver++ 2M "
                    "on the same timesteps. TDM Sigmas gives it for a student file: connect its output 'order'.",
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustomAdvanced or SamplerCustom.")],
        )

    @classmethod
    def execute(cls, order: int) -> io.NodeOutput:
        """A SAMPLER of this order."""
        return io.NodeOutput(KSAMPLER(sample_tdm, {"order": order}))


@torch.no_grad()
def sample_tdm(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    order: int = 1,
) -> Tensor:
    """Sample from `x` at `sigmas[0]` to the one at `sigmas[-1]`, in the form of k-diffusion's samplers.

    Args:
        model: ``model(x, sigma, **extra_args)`` is the clean sample, with guidance and masks applied.
        x: (B, ...), as ComfyUI keeps it.
        sigmas: (K + 1,) decreasing levels.
        extra_args: goes to `model`. Its "seed" is that of the fresh noise, if the "model_options" say that the student
            takes it (see `FRESH_NOISE`).
        callback: called after each network call; `denoised` is the clean sample of this step.
        disable: no progress bar in the console.
        order: 1, or 2 for DPM-Solver++ 2M.

    Raises:
        TDMError: there is no picture to begin with, and noise of this level is not what the model has been cut at; or a
            student that takes fresh noise has order 2, or no seed; or the samples are not finite.
    """
    extra_args = extra_args or {}
    model_sampling = model.inner_model.model_patcher.get_model_object("model_sampling")
    alphas, levels = pairs_of(model_sampling, sigmas)
    a, s = alphas.tolist(), levels.tolist()
    noisiest = float(model_sampling.sigma_max)
    if float(sigmas[0]) < noisiest * (1 - 1e-5) and not model.latent_image.any():  # core has scaled the noise down
        raise TDMError(
            f"an empty latent is pure noise, but these sigmas begin at {float(sigmas[0]):.6g} and this MODEL at "
            f"{noisiest:.6g}: sample the MODEL that TDM Sigmas gives, with no ModelSampling node behind it; for "
            "denoise below 1 connect a picture's latent"
        )
    if s[-1] > 0:  # a part of a schedule, and the weights are of a whole one
        alphas, levels = torch.cat([alphas, alphas.new_ones(1)]), torch.cat([levels, levels.new_zeros(1)])
    options = extra_args.get("model_options", {})
    _check_guidance(model.inner_model, options.get(GUIDANCE))
    of_student, fresh = options.get(FRESH_NOISE), None
    if of_student is not None:
        if order == 2:
            raise TDMError(
                "this student takes fresh noise at each step, and order 2 goes on along its own: set order to 1"
            )
        fresh = FreshNoise(x, float(sigmas[0]), model.noise, extra_args.get("seed"), of_student["levels"])
    weights = second_order_weights(alphas, levels)
    each = x.new_ones(len(x))
    previous: Tensor | None = None
    for i in trange(len(s) - 1, disable=disable):
        x0 = model(x, sigmas[i] * each, **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": x0})
        _, eps = predict_x0_eps("sample", x0, x, a[i], s[i])
        if fresh is not None and s[i + 1] > 0:
            eps = mixed_noise(eps, fresh.draw().to(x), of_student["eta"])
        x = ddim_step(x0, eps, a[i + 1], s[i + 1])
        if order == 2:
            if previous is not None:
                x = x + weights[i] * (x0 - previous)
            previous = x0
    if not bool(torch.isfinite(x).all()):
        raise TDMError(
            "the model gives NaN or infinite values, which would be a black picture: its weights or the student's are "
            "damaged, or overflow in its dtype (try bf16 or fp32)"
        )
    if fresh is not None and float(sigmas[-1]) > 0:
        fresh.leave(x, float(sigmas[-1]))
    return x


def _check_guidance(guider: Any, scale: float | None) -> None:
    """Warn if a student that is made for guidance runs without."""
    if scale is not None and getattr(guider, "cfg", scale) == 1:
        warn(f"This student is made for guidance {scale:g} and runs without: use CFGGuider with cfg {scale:g}.")
