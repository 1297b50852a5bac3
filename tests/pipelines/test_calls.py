"""What users pass to a call, on all families with a student: batches, guidance, callbacks, formats, dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tdm import TDMPipeline
from tdm.errors import TDMError
from tdm.tests import tiny
from tdm.tests.pipelines.students import GRIDS, Make, latents, load
from torch import Tensor, nn

Loaded = Callable[[str], TDMPipeline]

PROMPTS = ("a red cube", "two blue rings by the sea")
VIDEOS = ("cogvideox", "wan")
SIZES = {"sana": (64, 32)}  # it takes multiples of 32
CUSTOM_SIZE = (48, 32)
GUIDED = {"flux": "true_cfg_scale", "qwenimage": "true_cfg_scale"}  # others: guidance_scale


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def pictures(pipe: TDMPipeline, family: str, output_type: str, **kwargs: Any) -> Any:
    return pipe(**{**tiny.call_kwargs(family), "output_type": output_type, **kwargs})[0]


def counted(pipe: TDMPipeline, family: str, **kwargs: Any) -> tuple[int, Tensor]:
    """(how many samples went through the network, latents) of a call."""
    recorded: list[int] = []

    def count(_: Any, args: Any, kwargs: Any) -> None:
        recorded.append(len(args[0] if args else kwargs["hidden_states"]))

    with getattr(pipe, pipe.family.denoiser).register_forward_pre_hook(count, with_kwargs=True):
        out = latents(pipe, family, **kwargs)
    return sum(recorded), out


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_batch_of_prompts_and_generators_equals_the_single_calls(family: str, count: int, loaded: Loaded) -> None:
    """Two prompts, each `count` times, one generator per sample.

    A batch sums in another order: 2e-7 of the largest value was measured, and 50 times that is allowed.
    """
    pipe, prompts = loaded(family), list(PROMPTS)
    several = {f"num_{'videos' if family in VIDEOS else 'images'}_per_prompt": count}
    batch = latents(pipe, family, prompt=prompts, generator=generators(2 * count), **several)
    assert prompts == list(PROMPTS)
    assert len(batch) == 2 * count
    scale = batch.abs().max()
    for i, sample in enumerate(batch):
        single = latents(pipe, family, prompt=PROMPTS[i // count], generator=generators(2 * count)[i])[0]
        assert (sample - single).abs().max() < 1e-5 * scale
    swapped = latents(pipe, family, prompt=PROMPTS[1], generator=generators(1))[0]
    assert (batch[0] - swapped).abs().max() > 1e-4 * scale  # the prompt matters, by more than rounding


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_guidance_calls_the_network_on_both_halves_and_the_negative_prompt_matters(family: str, loaded: Loaded) -> None:
    pipe = loaded(family)
    guided = {GUIDED.get(family, "guidance_scale"): 3.0}
    negatives = [{}, {"negative_prompt": "blurry", **guided}, {"negative_prompt": "a green box", **guided}]
    counts, outputs = zip(*(counted(pipe, family, **arguments) for arguments in negatives), strict=True)
    assert counts == (4, 8, 8)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (outputs[i] - outputs[j]).abs().max() > 1e-3


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_callback_sees_each_trained_timestep_and_can_change_the_latents(family: str, loaded: Loaded) -> None:
    pipe, recorded = loaded(family), []

    def zero_at_the_end(owner: Any, i: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        recorded.append((owner is pipe, i, float(timestep), list(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 3 else tensors

    out = latents(pipe, family, callback_on_step_end=zero_at_the_end)
    assert recorded == [(True, i, timestep, ["latents"]) for i, timestep in enumerate(GRIDS[4])]
    assert not out.any()

    def halve_at_first(_: Any, i: int, __: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": tensors["latents"] / 2} if i == 0 else tensors

    changed = latents(pipe, family, callback_on_step_end=halve_at_first)
    assert not torch.allclose(changed, latents(pipe, family), atol=1e-3)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_output_type_has_the_size_that_was_asked_for(family: str, loaded: Loaded) -> None:
    pipe = loaded(family)
    height, width = SIZES.get(family, CUSTOM_SIZE)
    assert (height, width) != (pipe.recipe.height, pipe.recipe.width)
    size = {"height": height, "width": width}
    tensor, pil = (pictures(pipe, family, kind, **size) for kind in ("pt", "pil"))
    frames = [9] if family in VIDEOS else []
    assert tensor.shape == (1, *frames, 3, height, width)
    assert tensor.isfinite().all()
    pil = np.stack([np.asarray(picture) for picture in (pil[0] if frames else pil)])
    pixels = tensor.flatten(0, -4).movedim(1, -1).numpy()
    assert pil.shape == pixels.shape
    assert abs(pil / 255 - pixels).max() <= 0.5 / 255 + 1e-6  # rounded to the next level
    assert pixels.std() > 0.01
    latent = pictures(pipe, family, "latent", **size)
    assert torch.stack(list(latent)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_half_precision_gives_finite_pictures_on_the_exact_timesteps(
    family: str, dtype: torch.dtype, make: Make
) -> None:
    pipe, recorded = load(make(family), dtype=dtype), []
    networks = {name: module for name, module in pipe.components.items() if isinstance(module, nn.Module)}
    assert {name: module.dtype for name, module in networks.items()} == dict.fromkeys(networks, dtype)

    def on_step_end(_: Any, __: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        recorded.append(float(timestep))
        return tensors

    out = pictures(pipe, family, "pt", callback_on_step_end=on_step_end)
    assert recorded == GRIDS[4]
    assert out.isfinite().all()
    assert out.std() > 0.01
    exact = latents(load(make(family)), family)
    error = (latents(pipe, family).float() - exact).norm() / exact.norm()
    assert 0 < error < 0.1


@pytest.fixture
def damaged() -> Iterator[Callable[[nn.Module], None]]:
    """Damages a network, for the length of a test."""
    before: list[tuple[Tensor, Tensor]] = []

    def damage(network: nn.Module) -> None:
        weight = list(network.parameters())[-1].data
        before.append((weight, weight.clone()))
        weight.fill_(torch.nan)

    yield damage
    for weight, values in before:
        weight.copy_(values)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_nan_is_an_error_and_no_black_picture(
    family: str, output_type: str, loaded: Loaded, damaged: Callable[[nn.Module], None]
) -> None:
    pipe = loaded(family)
    damaged(pipe.denoiser)
    with pytest.raises(TDMError, match="the student on this base gives NaN or infinite values in float32"):
        pictures(pipe, family, output_type)
    with pipe.teacher(), pytest.raises(TDMError, match="the base gives NaN"):
        pictures(pipe, family, output_type, num_inference_steps=2)
    processor = getattr(pipe, "video_processor", None) or pipe.image_processor
    assert "postprocess" not in vars(processor)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_vae_that_gives_nan_is_named(family: str, loaded: Loaded, damaged: Callable[[nn.Module], None]) -> None:
    pipe = loaded(family)
    damaged(pipe.vae.decoder)
    with pytest.raises(TDMError, match="the base's VAE gives NaN or infinite pixels in float32"):
        pictures(pipe, family, "pil")
    assert pictures(pipe, family, "latent").isfinite().all()
