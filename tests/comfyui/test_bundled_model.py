"""The bundled model and its student in ComfyUI, against the same in diffusers."""

from __future__ import annotations

import io
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tdm import TDMPipeline, TDMScheduler

from .graphs import SEED, node, sampling
from .server import Graph, PromptError, Server
from .test_bridge import decoded, guided, pictures_of
from .test_sampling import error

PROMPT = "three yellow rings at sea"
_nonces = itertools.count()


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = TDMPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def teacher(**options: Any) -> Graph:
    """The bundled teacher on timesteps; the server samples it again each time."""
    return {
        "load": node("TDMLoadDiffusers", pipeline="bundled"),
        "prompt": node("CLIPTextEncode", clip=["load", 1], text=PROMPT),
        **sampling(["load", 0], ["prompt", 0], **{"latent": ["fresh", 0], **options}),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "fresh": node("TestFresh", latent=["latent", 0], nonce=next(_nonces)),
    }


def student(**options: Any) -> Graph:
    """The bundled student as its recipe says."""
    graph = teacher(order=["sigmas", 2], **options)
    chosen = {"file": "bundled", "released_as": "by its header or name", "strength": 1.0}
    graph["student"] = node("TDMLoadStudent", model=["load", 0], clip=["load", 1], **chosen)
    graph["sigmas"]["inputs"] |= {"model": ["student", 0], "recipe": ["student", 2]}
    return graph


def test_student_prompt_and_seed_give_the_same_picture(server: Server, pipe: Any) -> None:
    """Both sides agree to float32 rounding: core merges the LoRA into the weights, diffusers computes it separately.

    Merging it in diffusers changes these latents by 1e-6 to 3e-6, as much as the way through ComfyUI does. Of a
    picture's 12,288 values hardly one is another then. But SaveImage cuts what diffusers rounds.
    """
    (latents,) = server.latents(student(), ["samples", 0])
    assert error(latents, pipe(PROMPT, generator=seeded(), output_type="latent")[0]) <= 1e-5
    (pixels,) = pictures_of(server, server.run(decoded(student())))
    picture = pipe(PROMPT, generator=seeded(), output_type="np").images[0]
    assert (pixels != np.floor(picture * 255)).sum() <= 5
    rounded = np.asarray(pipe(PROMPT, generator=seeded()).images[0]).astype(float)
    assert np.abs(pixels - rounded).max() <= 1


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_each_step_count_of_the_student_gives_the_same_latents(server: Server, pipe: Any, steps: int) -> None:
    """The other step counts that it learned begin below the last timestep; the grid of 3 steps is re-spaced."""
    (actual,) = server.latents(student(steps=steps), ["samples", 0])
    expected = pipe(PROMPT, generator=seeded(), num_inference_steps=steps, output_type="latent")[0]
    assert error(actual, expected) <= 1e-5


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_the_first_step_by_the_base_gives_the_latents_of_base_first(server: Server, pipe: Any, steps: int) -> None:
    """Two samplers on the two parts of the schedule, as the workflow for more variety has them."""
    graph = student(steps=steps)
    whole = graph["samples"]["inputs"]
    graph["base sigmas"] = node("TDMSigmas", **{**graph["sigmas"]["inputs"], "model": ["load", 0]})
    graph["base"] = node("BasicGuider", model=["base sigmas", 0], conditioning=["prompt", 0])
    graph["parts"] = node("SplitSigmas", sigmas=["sigmas", 1], step=1)
    graph["first"] = node("SamplerCustomAdvanced", **{**whole, "guider": ["base", 0], "sigmas": ["parts", 0]})
    graph["none"] = node("DisableNoise")
    others = {"noise": ["none", 0], "sigmas": ["parts", 1], "latent_image": ["first", 0]}
    graph["samples"] = node("SamplerCustomAdvanced", **{**whole, **others})
    (actual,) = server.latents(graph, ["samples", 0])
    with pipe.base_first():
        expected = pipe(PROMPT, generator=seeded(), num_inference_steps=steps, output_type="latent")[0]
    assert error(actual, expected) <= 1e-5


@pytest.mark.parametrize("order", [1, 2])
def test_the_guided_teacher_gives_the_same_latents(server: Server, pipe: Any, order: int) -> None:
    grid: list[float] = [1000, 870, 740, 610, 480, 350, 220, 90]
    (actual,) = server.latents(guided(teacher(timesteps=grid, order=order), 3.0), ["samples", 0])
    with pipe.teacher():
        pipe.scheduler = TDMScheduler.from_config(pipe.scheduler.config, trained_timesteps=grid, solver_order=order)
        call = {"num_inference_steps": 8, "guidance_scale": 3.0, "output_type": "latent"}
        expected = pipe(PROMPT, generator=seeded(), **call)[0]
    assert error(actual, expected) <= 1e-5


def test_cores_own_sampler_gives_the_same_on_the_grid_of_the_student(server: Server) -> None:
    """Euler on the schedule "simple", whose four levels are the student's at its shift."""
    graph = student()
    prompts = {"positive": ["prompt", 0], "negative": ["prompt", 0]}
    kept: dict[str, Any] = {"cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0, "steps": 4}
    graph["sd3"] = node("ModelSamplingSD3", model=["student", 0], shift=2.0)
    graph["core"] = node("KSampler", model=["sd3", 0], seed=SEED, latent_image=["fresh", 0], **prompts, **kept)
    graph["aura"] = node("ModelSamplingAuraFlow", model=["student", 0], shift=2.0)  # another clock, the same levels
    graph["other"] = node("KSampler", **{**graph["core"]["inputs"], "model": ["aura", 0]})
    ours, core, other = server.latents(graph, ["samples", 0], ["core", 0], ["other", 0])
    assert error(core, ours) <= 1e-5
    assert error(other, ours) <= 1e-5


def test_a_student_leaves_nothing_in_the_teacher(server: Server) -> None:
    grid: list[float] = [1000, 750, 500, 250]
    first = server.latents(teacher(timesteps=grid), ["samples", 0])[0], server.latents(student(), ["samples", 0])[0]
    second = server.latents(teacher(timesteps=grid), ["samples", 0])[0], server.latents(student(), ["samples", 0])[0]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert error(*first) > 0.01


def test_a_network_is_whole_where_memory_is_short_and_after_it_was_unloaded(server: Server) -> None:
    (expected,) = server.latents(student(), ["samples", 0])
    graph = student()
    graph["little"] = node("TestLittleMemory", model=["student", 0])
    graph["sigmas"]["inputs"]["model"] = ["little", 0]
    assert torch.equal(server.latents(graph, ["samples", 0])[0], expected)
    server.post("free", {"unload_models": True})
    assert torch.equal(server.latents(student(), ["samples", 0])[0], expected)


@pytest.mark.parametrize("denoise", [0.75, 0.4])
def test_image_to_image_is_that_of_the_pipeline(server: Server, pipe: Any, denoise: float) -> None:
    picture = pipe("a green heart on the beach", generator=torch.Generator().manual_seed(1)).images[0]
    picture.save(server.folder / "input" / "heart.png")
    graph = student(denoise=denoise, latent=["encoded", 0])
    graph["picture"] = node("LoadImage", image="heart.png")
    graph["encoded"] = node("VAEEncode", pixels=["picture", 0], vae=["load", 2])
    (latents,) = server.latents(graph, ["samples", 0])
    call = {"strength": denoise, "generator": seeded(), "output_type": "latent"}
    assert error(latents, pipe.image_to_image(PROMPT, picture, **call)[0]) <= 1e-5


def test_each_step_sends_its_progress_and_a_preview_of_the_picture(server: Server) -> None:
    shown: list[Image.Image] = []
    graph = decoded(student())
    run = server.run(graph, on_preview=lambda data: shown.append(Image.open(io.BytesIO(data)).convert("RGB")))
    steps = [e["data"] for e in run.events if e["type"] == "progress" and e["data"]["node"] == "samples"]
    assert [step["value"] for step in steps] == [1, 2, 3, 4]
    assert len(shown) >= 4
    (picture,) = pictures_of(server, run)
    small = np.asarray(Image.fromarray(picture.astype(np.uint8)).resize((8, 8), Image.Resampling.BOX))
    last = np.asarray(shown[-1].resize((8, 8), Image.Resampling.BOX))
    assert np.corrcoef(small.ravel(), last.ravel())[0, 1] > 0.8


def test_an_interrupted_run_ends_at_once_and_the_next_one_is_whole(server: Server) -> None:
    (expected,) = server.latents(student(), ["samples", 0])
    progress: list[int] = []

    def stop(event: dict[str, Any]) -> None:
        if event["type"] == "progress":
            progress.append(event["data"]["value"])
            if len(progress) == 1:
                server.post("interrupt", {})

    slow = decoded(teacher(timesteps=list(range(1000, 0, -1))))
    with pytest.raises(PromptError, match="interrupted"):
        server.run(slow, stop)
    assert progress[-1] < 900
    assert torch.equal(server.latents(student(), ["samples", 0])[0], expected)
