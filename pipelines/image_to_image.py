"""Image to image with a few-step student: start from a picture, on one of the timesteps that the student knows."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..errors import TDMError
from .families import Size
from .picture_noise import generators_of
from .pictures import pictures_of
from .schedule import first_step
from .scheduler import TDMScheduler


@torch.no_grad()
def image_to_image(pipe: Any, image: Any, strength: float, call: dict[str, Any]) -> Any:
    """See `TDMPipeline.image_to_image`, whose pipeline this is given."""
    scheduler = pipe.scheduler
    family, call = pipe.family, dict(call)
    family.check_pictures()
    if not isinstance(scheduler, TDMScheduler):
        raise TDMError(_other_pipeline(pipe))
    if pipe.vae is None:
        raise TDMError("image to image needs the base's VAE, and this pipeline has vae=None")
    for name in ("sigmas", "timesteps"):
        if call.pop(name, None) is not None:
            raise TDMError(f"image to image follows the trained grid of num_inference_steps, and takes no {name}=")
    pipe.check_student()
    size, pictures = _pictures(pipe, image, call.pop("height", None), call.pop("width", None))
    steps = call.pop("num_inference_steps", None) or pipe.recipe.default_steps
    planned = copy.copy(scheduler)  # this may be a callback of a call that is under way
    planned.set_timesteps(steps)
    grid = planned.timesteps.tolist()
    left = grid[first_step(grid, strength, scheduler.schedule) :]

    device = pipe._execution_device
    x0 = family.encode_pictures(pipe, pictures.to(device))
    samples = _samples(call)
    if samples % len(x0):
        raise TDMError(f"{len(x0)} pictures do not go into {samples} samples (prompts times pictures per prompt)")
    x0 = x0.repeat_interleave(samples // len(x0), dim=0)
    generator = call.get("generator")
    of_cpu = isinstance(generator, torch.Generator) and generator.device.type == "cpu"
    if of_cpu and samples > 1 and scheduler.config["stochastic_sampling"]:
        assert isinstance(generator, torch.Generator)
        call["generator"] = generators_of(generator, range(samples), x0.shape[1:])
    noise = randn_tensor(tuple(x0.shape), generator=generator, device=device, dtype=torch.float32)
    alpha, sigma = scheduler.schedule.alpha_sigma(torch.tensor(left[0], dtype=torch.float64))
    latents = float(alpha) * x0.float() + float(sigma) * noise
    if family.binned_sample_sizes is not None:
        call["use_resolution_binning"] = False  # the latents have their size
    with _on_grid(pipe, left):
        return pipe(
            latents=family.pack(latents).to(torch.float32 if family.float32_latents else pipe.denoiser.dtype),
            num_inference_steps=len(left),
            height=size.height,
            width=size.width,
            **call,
        )


def _other_pipeline(pipe: Any) -> str:
    """What to use where the scheduler is none of ours, with the arguments that its own defaults do not have right."""
    problem = f"image_to_image follows a TDM student's grid, and this pipeline has a {type(pipe.scheduler).__name__}"
    stock = _stock_image_to_image(pipe.family.pipeline)
    if stock is None:
        return f"{problem}; diffusers has no image-to-image pipeline for {pipe.family.pipeline} either"
    known, defaults = inspect.signature(stock.__call__).parameters, pipe.call_defaults()
    names = ("num_inference_steps", *pipe.family.guidance(1.0), "eta")
    options = [
        f"{name}={defaults[name]:g}"
        for name in names
        if name in known and defaults.get(name) not in (None, known[name].default)
    ]
    return f"{problem}; use diffusers' own image-to-image pipeline: AutoPipelineForImage2Image.from_pipe(pipe)" + (
        f"; call it with {', '.join(options)}, which it does not know of the student" if options else ""
    )


def _stock_image_to_image(pipeline: str) -> Any:
    """The class that AutoPipelineForImage2Image makes of a text-to-image pipeline; None if there is none."""
    from diffusers.pipelines import auto_pipeline  # imports all pipelines

    kinds = [kind for kind, c in auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING.items() if c.__name__ == pipeline]
    return next((c for kind in kinds if (c := auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING.get(kind))), None)


def _pictures(pipe: Any, image: Any, height: int | None, width: int | None) -> tuple[Size, torch.Tensor]:
    """The pictures [B, 3, H, W] in [-1, 1] at the size asked for, or their own cut down to what the model works in."""
    step, processor, pictures = pipe.family.multiple(pipe), pipe.image_processor, pictures_of(image)
    picture_height, picture_width = processor.get_default_height_width(pictures[0])
    size = Size(height or picture_height // step * step, width or picture_width // step * step)
    pipe.family.check_size(pipe, size)
    return size, torch.cat([processor.preprocess(one, height=size.height, width=size.width).cpu() for one in pictures])


def _samples(call: dict[str, Any]) -> int:
    """How many pictures a call makes."""
    samples: Any
    prompt, embeddings = call.get("prompt"), call.get("prompt_embeds")
    if prompt is None and embeddings is None:
        raise TDMError("image to image needs a prompt, or prompt_embeds")
    samples = embeddings if prompt is None else prompt
    prompts = 1 if isinstance(samples, str) else len(samples)
    return prompts * (call.get("num_images_per_prompt") or 1)


@contextlib.contextmanager
def _on_grid(pipe: Any, grid: list[float]) -> Iterator[None]:
    """The student's sampler on these timesteps alone, for the length of a `with`."""
    scheduler = pipe.scheduler
    pipe.scheduler = TDMScheduler.from_config(scheduler.config, trained_timesteps={len(grid): grid})
    try:
        yield
    finally:
        pipe.scheduler = scheduler
