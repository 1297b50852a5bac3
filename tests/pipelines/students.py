"""Tiny bases, random students for them, and calls of both, for the tests of `TDMPipeline`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tdm import TDMPipeline, TDMScheduler
from tdm.pipelines.families import Condition, Size, family_of_name
from tdm.pipelines.schedule import expand, predict_x0_eps
from tdm.pipelines.students.recipe import StudentRecipe
from tdm.tests import tiny
from tdm.training.trajectory import Predict
from torch import Tensor, nn

GRIDS = {1: [900.0], 2: [900.0, 450.0], 4: [900.0, 700.0, 500.0, 300.0]}
NO_GUIDANCE = {  # others: guidance_scale=1.0
    **{name: {"guidance_scale": 0.0} for name in ("zimage", "krea2")},
    "qwenimage": {"true_cfg_scale": 1.0},
}
MAIN = ("sd15", "sdxl", "pixart", "sd3")

Make = Callable[..., Path]


def lora_for(denoiser: nn.Module, seed: int = 0, rank: int = 2) -> dict[str, Tensor]:
    """A small random LoRA on the attention projections."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, layer in denoiser.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(("to_q", "to_v", "to_out.0")):
            state[f"{name}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=generator) * 0.2
            state[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=generator) * 0.2
    return state


def recipe_for(tiny_family: str, base: Path, **changes: Any) -> StudentRecipe:
    scheduler = TDMScheduler.from_config(TDMScheduler.load_config(base, subfolder="scheduler"))
    call = tiny.call_kwargs(tiny_family)
    fields: dict[str, Any] = {
        "base_model": str(base),
        "family": tiny_family,
        "prediction_type": scheduler.config.prediction_type,
        "trained_timesteps": GRIDS,
        "guidance_scale": 1.0,
        "height": call["height"],
        "width": call["width"],
        "num_frames": call.get("num_frames"),
    }
    return StudentRecipe(**(fields | changes))


def load(*args: Any, **kwargs: Any) -> TDMPipeline:
    pipe = TDMPipeline.from_pretrained(*args, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plain(folder: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):  # torch picks another kernel for a weight that asks for a gradient
            component.requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: DiffusionPipeline, family: str, **kwargs: Any) -> Tensor:
    out = pipe(**{**tiny.call_kwargs(family), **kwargs})[0]
    return out if isinstance(out, Tensor) else torch.stack(list(out))


def guided(family: str) -> dict[str, Any]:
    """A call with guidance, as a stock pipeline and a teacher take it alike."""
    rows = family_of_name(family)
    call = rows.guidance(3.0)
    return call | rows.negative_prompt({**call, "prompt": tiny.PROMPT})


def short_call(pipe: DiffusionPipeline, family: str, **kwargs: Any) -> Tensor:
    """Make a call that leaves steps, guidance, size and length to the student's recipe."""
    known = {"num_inference_steps", "guidance_scale", "true_cfg_scale", "height", "width", "num_frames"}
    known |= {"use_resolution_binning", "clean_caption"}
    arguments = {name: value for name, value in tiny.call_kwargs(family).items() if name not in known}
    out = pipe(**{**arguments, **kwargs})[0]
    return out if isinstance(out, Tensor) else torch.stack(list(out))


def predictor(pipe: Any, family: str) -> tuple[Predict, Condition]:
    """(network, condition) of `tiny.PROMPT` as training calls them, without guidance."""
    call, rows = tiny.call_kwargs(family), pipe.family
    size = Size(call["height"], call["width"], call.get("num_frames"))
    network, config = getattr(pipe, rows.denoiser), pipe.scheduler.config
    named = {"height", "width", "num_frames", "prompt", "guidance_scale", "true_cfg_scale", "num_inference_steps"}
    options = {name: value for name, value in call.items() if name not in named}

    def predict(x: Tensor, timesteps: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        output = rows.denoise(network, x, timesteps.float(), cond)
        alpha, sigma = pipe.scheduler.schedule.alpha_sigma(timesteps)
        return predict_x0_eps(config.prediction_type, output, x, expand(alpha, x), expand(sigma, x))

    return predict, rows.encode(pipe, [tiny.PROMPT], size, **{**options, **rows.guidance(1.0)})


def state(pipe: TDMPipeline) -> tuple[Any, ...]:
    return pipe.recipe, pipe.scheduler, type(pipe.scheduler), pipe.get_list_adapters(), pipe.get_active_adapters()


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).double().norm() / expected.double().norm())


def without_student(pipe: TDMPipeline) -> TDMPipeline:
    """Return the same pipeline to put other networks into. Its own scheduler says that this is intended."""
    clean = copy.copy(pipe)
    clean.scheduler = copy.copy(pipe.scheduler)
    return clean
