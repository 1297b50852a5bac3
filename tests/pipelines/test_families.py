"""What training asks of a family is what sampling does: the same network calls, latents and pixels as the pipeline."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import diffusers
import pytest
import torch
from tdm import TDMScheduler
from tdm.errors import TDMError
from tdm.pipelines.families import Size, family_of_pipeline
from tdm.pipelines.families.base import Family
from tdm.pipelines.guidance_norm import GuidanceNorm, arguments_of_norm, norm_of_family, zero_star
from tdm.tests import tiny
from tdm.training.roles import ROLES, AdapterRoles
from tdm.training.trajectory import Condition, sample
from torch import Tensor

GRID = [900.0, 700.0, 500.0, 300.0]
VIDEO = ("cogvideox", "wan")
PROMPTS = ["a red cube", "two blue stars above a tree"]


def ready(name: str) -> tuple[Any, Family, Size, dict[str, Any]]:
    """(pipeline on the grid, family, size, the other arguments of a call)."""
    pipe = tiny.build(name)
    pipe.scheduler = TDMScheduler.from_config(pipe.scheduler.config, trained_timesteps=GRID, solver_order=1)
    call = tiny.call_kwargs(name)
    size = Size(call["height"], call["width"], call.get("num_frames"))
    for argument in ("prompt", "generator", "output_type"):
        del call[argument]
    return pipe, family_of_pipeline(type(pipe).__name__), size, call


def trainer(pipe: Any, family: Family, norm: str | None) -> AdapterRoles:
    """The roles of a training run on a pipeline's network, whose teacher's guidance is normalised."""
    config, schedule = pipe.scheduler.config, pipe.scheduler.schedule
    guidance_norm = norm_of_family(family, norm, flow=schedule.kind == "flow")
    return AdapterRoles(
        getattr(pipe, family.denoiser),
        family.denoise,
        targets=dict.fromkeys(ROLES, family.lora_targets),
        rank=dict.fromkeys(ROLES, 1),
        alpha=dict.fromkeys(ROLES),
        generator=torch.Generator().manual_seed(0),
        device=torch.device("cpu"),
        schedule=schedule,
        prediction_type=config.prediction_type,
        guided_output=guidance_norm and functools.partial(guidance_norm, token_norms=family.token_norms),
    )


@torch.no_grad()
def trained_way(
    pipe: Any, family: Family, size: Size, scale: float, options: dict[str, Any], norm: str | None = None
) -> Tensor:
    """Latents of PROMPTS as the trainer samples them with its teacher."""
    noise = torch.randn(
        len(PROMPTS), *family.latent_shape(pipe, size), generator=torch.Generator().manual_seed(0), dtype=torch.float32
    )
    cond = family.encode(pipe, PROMPTS, size, **options)
    assert all(len(value) == len(PROMPTS) for value in cond.values())
    null = {} if scale == 1 else family.null(pipe, cond, **{"negative_prompt": "", **options})
    roles = trainer(pipe, family, norm)

    def teacher(x: Tensor, timesteps: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        return roles.guided_teacher(x, timesteps, cond, null, scale)

    return sample(teacher, roles.schedule, GRID, noise, cond)


def sampled_way(pipe: Any, call: dict[str, Any], **changes: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt=list(PROMPTS), generator=generator, **{**call, "output_type": "latent", **changes})[0]


def assert_same(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert float((a - b).norm() / b.norm()) < 1e-5


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_the_trainers_steps_make_the_pipelines_latents(name: str) -> None:
    pipe, family, size, call = ready(name)
    options = dict(call) | ({"guidance_scale": 1.0} if name == "flux" else {})
    ours = trained_way(pipe, family, size, 1.0, options)
    assert_same(family.pack(ours), sampled_way(pipe, call, **family.guidance(1.0)))
    assert torch.equal(family.unpack(pipe, family.pack(ours), size), ours)


# The members of a family that call their network otherwise.
VARIANTS = {
    "CogVideoX-5B": ("cogvideox", {"use_rotary_positional_embeddings": True, "attention_head_dim": 16}),
    "CogVideoX-1.5": (
        "cogvideox",
        {
            "use_rotary_positional_embeddings": True,
            "attention_head_dim": 16,
            "patch_size_t": 2,
            "patch_bias": False,
            "sample_height": 16,
            "sample_width": 16,
        },
    ),
    "PixArt-alpha 1024": ("pixart", {"sample_size": 128, "attention_head_dim": 12, "cross_attention_dim": 24}),
    "FLUX.1-schnell": ("flux", {"guidance_embeds": False}),
    "SD3.5-M": ("sd3", {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_holds_for_the_other_models_of_a_family(variant: str) -> None:
    name, changes = VARIANTS[variant]
    pipe, family, size, call = ready(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = type(pipe.transformer).from_config({**pipe.transformer.config, **changes}).eval()
    pipe.register_modules(transformer=network)
    size = size._replace(height=32)  # not square: a network that is told the size must be told the right one
    call = call | {"height": 32}
    options = call | ({"guidance_scale": 1.0} if name == "flux" else {})
    ours = trained_way(pipe, family, size, 1.0, options)
    assert_same(family.pack(ours), sampled_way(pipe, call, **family.guidance(1.0)))
    pixels = family.decode(pipe, ours, size)
    assert pixels.shape == torch.as_tensor(sampled_way(pipe, call, **family.guidance(1.0), output_type="pt")).shape


# Flux guides by a second scale.
@pytest.mark.parametrize("negative", ["", "blurry, a frame"])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_the_trainers_guided_teacher_makes_the_pipelines_latents(name: str, negative: str) -> None:
    pipe, family, size, call = ready(name)
    flux = {"guidance_scale": 1.0, "true_cfg_scale": 3.0, "negative_prompt": [""] * 2} if name == "flux" else {}
    ours = trained_way(pipe, family, size, 3.0, {**call, **flux, "negative_prompt": negative})
    named = {"negative_prompt": [negative] * 2} if negative or name == "qwenimage" else {}
    assert_same(family.pack(ours), sampled_way(pipe, call, **{**(flux or family.guidance(3.0)), **named}))


NORMS = ["rescale@0.7", "norm_limit@1", "norm_limit@0.8", "zero_star"]
KNOWN_NORMS = {
    "sd15": ["rescale@0.7"],
    "sdxl": ["rescale@0.7"],
    "zimage": ["norm_limit@1", "norm_limit@0.8", "zero_star"],
    **{name: ["zero_star"] for name in ("bundled", "sd3", "sana", "wan", "krea2")},
}


@pytest.mark.parametrize("name", [*tiny.FAMILIES, "bundled"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_normalised_teacher_makes_the_latents_of_the_pipelines_teacher(name: str, norm: str) -> None:
    """A pipeline whose student was distilled so guides its teacher so; where none can, training is refused."""
    pipe, family, size, call = ready("pixart" if name == "bundled" else name)
    if name == "bundled":  # PixArt's network as a flow model
        flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
        pipe.scheduler = TDMScheduler.from_config(flow.config, trained_timesteps=GRID, solver_order=1)
    if norm not in KNOWN_NORMS.get(name, []):
        with pytest.raises(
            TDMError, match=f"guidance_norm={norm} is nothing that {family.pipeline} can be run with; it"
        ):
            norm_of_family(family, norm, flow=pipe.scheduler.schedule.kind == "flow")
        return
    ours = trained_way(pipe, family, size, 3.0, call, norm)
    plain = sampled_way(pipe, call, **family.guidance(3.0))
    arguments = arguments_of_norm(GuidanceNorm.parse(norm))
    with contextlib.nullcontext() if arguments else zero_star(pipe, family):
        theirs = sampled_way(pipe, call, **family.guidance(3.0), **arguments)
    assert_same(family.pack(ours), theirs)
    assert float((plain - theirs).norm() / plain.norm()) > 1e-4


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_decoding_gives_the_pipelines_pixels(name: str) -> None:
    pipe, family, size, call = ready(name)
    latents = family.unpack(pipe, sampled_way(pipe, call, **family.guidance(1.0)), size)
    ours = family.decode(pipe, latents, size)
    theirs = torch.as_tensor(sampled_way(pipe, call, **family.guidance(1.0), output_type="pt"))
    assert ours.dtype == torch.uint8
    assert ours.shape == theirs.shape
    assert family.video == (ours.ndim == 5)
    assert int((ours.float() - theirs.float() * 255).abs().max().round()) <= 1
    assert ours.float().std() > 1


@pytest.mark.parametrize("name", ["sdxl", "wan", "qwenimage"])
def test_a_vae_with_statistics_per_channel_is_decoded_as_the_pipeline_does(name: str) -> None:
    pipe, family, size, call = ready(name)
    pipe.vae.register_to_config(latents_mean=[0.5, -1.0, 0.2, 0.0], latents_std=[2.0, 0.5, 1.5, 3.0])
    latents = family.unpack(pipe, sampled_way(pipe, call, **family.guidance(1.0)), size)
    theirs = torch.as_tensor(sampled_way(pipe, call, **family.guidance(1.0), output_type="pt"))
    ours = family.decode(pipe, latents, size)
    assert int((ours.float() - theirs.float() * 255).abs().max().round()) <= 1
    torch.testing.assert_close(family.scale(pipe.vae, family.unscale(pipe.vae, latents)), latents)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_sizes_that_the_network_cannot_work_in_are_refused(name: str) -> None:
    pipe, family, size, _ = ready(name)
    step = family.multiple(pipe)
    assert family.latent_shape(pipe, size._replace(height=size.height + step)) != family.latent_shape(pipe, size)
    for height in (size.height + 1, 0):
        with pytest.raises(TDMError, match=f"multiples of {step} pixels"):
            family.latent_shape(pipe, size._replace(height=height))


@pytest.mark.parametrize("name", [name for name in tiny.FAMILIES if name not in VIDEO])
def test_scaled_latents_come_back(name: str) -> None:
    pipe, family, size, _ = ready(name)
    pictures = torch.rand(1, 3, size.height, size.width, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        latents = family.encode_pictures(pipe, pictures)
    assert latents.shape[1:] == family.latent_shape(pipe, size)
    torch.testing.assert_close(family.scale(pipe.vae, family.unscale(pipe.vae, latents)), latents)


@pytest.mark.parametrize("name", VIDEO)
def test_pictures_into_a_model_of_videos_are_refused(name: str) -> None:
    pipe, family, *_ = ready(name)
    with pytest.raises(TDMError, match="makes videos"):
        family.encode_pictures(pipe, torch.zeros(1, 3, 16, 16))


# Of the released models: what their pipelines make unasked (Sana's and Z-Image's numbers are in the pipelines' code).
WRITTEN_DOWN = {
    "flux": lambda pipe: Size(128 * pipe.vae_scale_factor, 128 * pipe.vae_scale_factor),
    "qwenimage": lambda pipe: Size(128 * pipe.vae_scale_factor, 128 * pipe.vae_scale_factor),
    "sana": lambda pipe: Size(8 * pipe.vae_scale_factor, 8 * pipe.vae_scale_factor),
    "wan": lambda _: Size(480, 832, 81),
    "zimage": lambda _: Size(1024, 1024),
    "krea2": lambda _: Size(1024, 1024),
}


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_the_default_size_is_the_models_own(name: str) -> None:
    pipe, family, _, call = ready(name)
    size = family.default_size(pipe)
    if name in WRITTEN_DOWN:
        assert size == WRITTEN_DOWN[name](pipe)
        return
    for argument in ("height", "width", "num_frames"):
        call.pop(argument, None)
    assert sampled_way(pipe, call, **family.guidance(1.0)).shape[1:] == family.latent_shape(pipe, size)
