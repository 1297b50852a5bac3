"""TDM Generate against the workflow of many nodes that it stands for, on the real server."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from . import install
from .conftest import Checkpoint
from .graphs import node
from .server import Graph, PromptError, Server

PROMPT = "a red star above a blue moon"
BY_ITSELF = "by its header or name"


def short(checkpoint: str, student: str, **options: Any) -> Graph:
    defaults = {"released_as": BY_ITSELF, "prompt": PROMPT, "seed": 5, "width": 0, "height": 0, "batch_size": 1}
    return {"drawn": node("TDMGenerate", checkpoint=checkpoint, student=student, **{**defaults, **options})}


def long(base: dict[str, Any], student: str, width: int, height: int, *, batch_size: int = 1, seed: int = 5) -> Graph:
    """What an artist builds; `base` is the loader, which gives MODEL, CLIP and VAE."""
    return {
        "base": base,
        "student": node(
            "TDMLoadStudent",
            model=["base", 0],
            clip=["base", 1],
            file=student,
            released_as=BY_ITSELF,
            strength=1.0,
        ),
        "prompt": node("CLIPTextEncode", clip=["student", 1], text=PROMPT),
        "sigmas": node(
            "TDMSigmas",
            model=["student", 0],
            student="timesteps below",
            timesteps="",
            steps=0,
            denoise=1.0,
            recipe=["student", 2],
        ),
        "sampler": node("TDMSampler", order=["sigmas", 2]),
        "noise": node("RandomNoise", noise_seed=seed),
        "guider": node("BasicGuider", model=["sigmas", 0], conditioning=["prompt", 0]),
        "latent": node("EmptyLatentImage", width=width, height=height, batch_size=batch_size),
        "samples": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["sampler", 0],
            sigmas=["sigmas", 1],
            latent_image=["latent", 0],
        ),
        "drawn": node("VAEDecode", samples=["samples", 0], vae=["base", 2]),
    }


def from_file(checkpoint: Checkpoint) -> dict[str, Any]:
    return node("CheckpointLoaderSimple", ckpt_name=checkpoint.file)


def test_it_gives_the_picture_of_the_long_workflow(server: Server, checkpoint: Checkpoint) -> None:
    student = checkpoint.student(width=96)
    (actual,) = server.pictures(short(checkpoint.file, student, batch_size=2), ["drawn", 0])
    (expected,) = server.pictures(long(from_file(checkpoint), student, 96, 64, batch_size=2), ["drawn", 0])
    assert actual.shape == (2, 64, 96, 3)
    assert torch.equal(actual, expected)
    assert not torch.equal(actual[0], actual[1])
    (sized,) = server.pictures(short(checkpoint.file, student, width=64, height=128), ["drawn", 0])
    (expected,) = server.pictures(long(from_file(checkpoint), student, 64, 128), ["drawn", 0])
    assert torch.equal(sized, expected)


def test_without_any_file_it_draws_with_the_bundled_model(server: Server) -> None:
    (actual,) = server.pictures(short("bundled", "bundled", batch_size=2), ["drawn", 0])
    graph = long(node("TDMLoadDiffusers", pipeline="bundled"), "bundled", 64, 64, batch_size=2)
    (expected,) = server.pictures(graph, ["drawn", 0])
    assert torch.equal(actual, expected)
    assert actual.shape == (2, 64, 64, 3)


def test_a_pipeline_of_diffusers_is_a_checkpoint_too(server: Server) -> None:
    folder = server.models / "diffusers" / "mine" / "small"
    folder.parent.mkdir(parents=True)
    folder.symlink_to(install.REPOSITORY / "bundled" / "teacher", target_is_directory=True)
    for name in ("mine/small", "bundled"):
        assert (
            name
            in server.get("object_info/TDMGenerate")["TDMGenerate"]["input"]["required"]["checkpoint"][1]["options"]
        )
    pictures = [server.pictures(short(name, "bundled"), ["drawn", 0])[0] for name in ("mine/small", "bundled")]
    assert torch.equal(*pictures)


def test_a_base_that_gives_nan_draws_no_black_picture(server: Server) -> None:
    folder = server.models / "diffusers" / "nan"
    shutil.copytree(install.REPOSITORY / "bundled" / "teacher", folder)
    (file,) = (folder / "transformer").glob("*.safetensors")
    weights = load_file(file)
    weights["proj_out.weight"].fill_(torch.nan)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(PromptError, match="gives NaN or infinite values, which would be a black picture"):
        server.pictures(short("nan", "bundled"), ["drawn", 0])


def test_a_student_that_wants_guidance_gets_it(server: Server, checkpoint: Checkpoint) -> None:
    student = checkpoint.student("guided.safetensors", guidance_scale=2.5)
    graph = long(from_file(checkpoint), student, 64, 64)
    (unguided,) = server.pictures(graph, ["drawn", 0])
    graph["nothing"] = node("CLIPTextEncode", clip=["student", 1], text="")
    prompts = {"positive": ["prompt", 0], "negative": ["nothing", 0]}
    graph["guider"] = node("CFGGuider", model=["sigmas", 0], cfg=2.5, **prompts)
    (expected,) = server.pictures(graph, ["drawn", 0])
    (actual,) = server.pictures(short(checkpoint.file, student), ["drawn", 0])
    assert torch.equal(actual, expected)
    assert not torch.equal(actual, unguided)


def test_another_seed_loads_nothing_again(server: Server, checkpoint: Checkpoint) -> None:
    student = checkpoint.student()

    def ran(seed: int) -> set[str]:
        graph = short(checkpoint.file, student, seed=seed)
        run = server.run({**graph, "shown": node("PreviewImage", images=["drawn", 0])})
        return {e["data"]["node"] for e in run.events if e["type"] == "executing" and e["data"]["node"]}

    first, second = ran(1000), ran(1001)
    assert second < first
    assert len(first - second) >= 4  # checkpoint, student, prompt, sigmas


def test_a_student_that_was_trained_further_draws_another_picture(server: Server, checkpoint: Checkpoint) -> None:
    name = checkpoint.student("further.safetensors")
    (before,) = server.pictures(short(checkpoint.file, name), ["drawn", 0])
    checkpoint.student(name, trained_timesteps={2: [899.0, 449.0]})
    (after,) = server.pictures(short(checkpoint.file, name), ["drawn", 0])
    assert not torch.equal(before, after)


def test_a_student_that_it_cannot_draw_with_is_refused(server: Server, checkpoint: Checkpoint) -> None:
    graph = short(checkpoint.file, checkpoint.style)
    with pytest.raises(PromptError, match="says nothing about its timesteps: choose which released student it is"):
        server.run({**graph, "shown": node("PreviewImage", images=["drawn", 0])})
    video = short(checkpoint.file, checkpoint.style, released_as="Luo-Yihong/TDM_CogVideoX-2B_LoRA")
    with pytest.raises(PromptError, match="makes videos; TDM Generate draws pictures"):
        server.run({**video, "shown": node("PreviewImage", images=["drawn", 0])})
    named = short(checkpoint.file, checkpoint.style, released_as="Luo-Yihong/TDM_dreamshaper_LoRA", width=64, height=64)
    assert server.pictures(named, ["drawn", 0])
