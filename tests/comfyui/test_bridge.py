"""Load Diffusers Pipeline with each family: what core's nodes make with it is what diffusers makes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tdm import TDMPipeline, TDMScheduler
from tdm.pipelines.families import Size, family_of_pipeline
from tdm.pipelines.loras.layer_names import layer_shapes
from tdm.pipelines.loras.pairs import Lora, state_dict_of
from tdm.pipelines.students.file import Student, save_student
from tdm.pipelines.students.recipe import StudentRecipe
from tdm.tests import tiny

from .graphs import SEED, node, sampling
from .server import Graph, PromptError, Run, Server
from .test_sampling import error, noise

Folder = Callable[[str], Path]
GRID: list[float] = [999, 700, 320]
FRAMES = 9
CALLS: dict[str, dict[str, Any]] = {
    "pixart": {"use_resolution_binning": False, "clean_caption": False},
    "sana": {"use_resolution_binning": False},
    "cogvideox": {"num_frames": FRAMES, "max_sequence_length": 16},
    "wan": {"num_frames": FRAMES},
}


def size_of(name: str) -> Size:
    """Not square: a network that is told the size must be told the right one."""
    side = 32 if name == "sana" else 16
    return Size(side, 2 * side)


def loaded(name: str, *, batch: int = 1, **options: Any) -> Graph:
    """A pipeline of the server, sampled on `GRID` from one prompt and an empty latent of core's own nodes."""
    size: dict[str, Any] = {"width": size_of(name).width, "height": size_of(name).height, "batch_size": batch}
    video = name in ("cogvideox", "wan")
    return {
        "load": node("TDMLoadDiffusers", pipeline=name),
        "prompt": node("CLIPTextEncode", clip=["load", 1], text=tiny.PROMPT),
        **sampling(["load", 0], ["prompt", 0], **{"timesteps": GRID, **options}),
        "latent": node("EmptyHunyuanLatentVideo", length=FRAMES, **size) if video else node("EmptyLatentImage", **size),
    }


def guided(graph: Graph, cfg: float) -> Graph:
    prompts = {"positive": ["prompt", 0], "negative": ["nothing", 0]}
    return {
        **graph,
        "nothing": node("CLIPTextEncode", clip=["load", 1], text=""),
        "guider": node("CFGGuider", model=["sigmas", 0], cfg=cfg, **prompts),
    }


def stock(name: str, guidance: float = 1.0, **options: Any) -> Any:
    """What diffusers makes of the same prompt and seed; latents in ComfyUI's layout."""
    pipe: Any = tiny.build(name)
    family, size = family_of_pipeline(type(pipe).__name__), size_of(name)
    pipe.scheduler = TDMScheduler.from_config(pipe.scheduler.config, trained_timesteps=GRID, solver_order=1)
    call = {
        "prompt": tiny.PROMPT,
        "num_inference_steps": len(GRID),
        "height": size.height,
        "width": size.width,
        "generator": torch.Generator().manual_seed(SEED),
        **(family.guidance(guidance) if name != "flux" else {}),  # where it is something that the network is told
        **CALLS.get(name, {}),
        **options,
    }
    if name == "cogvideox":  # diffusers draws its noise with frames before channels, ComfyUI as for any video
        call["latents"] = noise((1, 4, 3, 2, 4)).transpose(1, 2)
    out = pipe(**call)[0]
    if options.get("output_type") != "latent":
        return out
    return out.transpose(1, 2) if name == "cogvideox" else family.unpack(pipe, out, size)


def pictures_of(server: Server, run: Run) -> Any:
    """What a node "save" saved: [B, H, W, 3], 0 to 255."""
    files = [server.output / each["subfolder"] / each["filename"] for each in run.outputs["save"]["images"]]
    return np.stack([np.asarray(Image.open(file)) for file in files]).astype(float)


def decoded(graph: Graph) -> Graph:
    return {
        **graph,
        "pixels": node("VAEDecode", samples=["samples", 0], vae=["load", 2]),
        "save": node("SaveImage", images=["pixels", 0], filename_prefix="bridge/p"),
    }


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_each_family_gives_the_latents_and_the_pixels_of_diffusers(server: Server, folder: Folder, name: str) -> None:
    """Both sides start from the same seed."""
    folder(name)
    (latents,) = server.latents(loaded(name), ["samples", 0])
    assert error(latents, stock(name, output_type="latent")) <= 1e-5
    pictures = pictures_of(server, server.run(decoded(loaded(name))))
    expected = np.asarray(stock(name, output_type="np")).reshape(pictures.shape)
    assert len(pictures) == (FRAMES if name in ("cogvideox", "wan") else 1)
    assert np.abs(pictures - expected * 255).max() < 1.01  # SaveImage cuts to whole numbers
    assert pictures.std() > 1


@pytest.mark.parametrize("name", ["sdxl", "sana", "wan", "zimage"])
def test_guidance_is_that_of_diffusers(server: Server, folder: Folder, name: str) -> None:
    """Empty text is what diffusers takes for no prompt: zeros for SDXL, without instructions for Sana."""
    folder(name)
    (latents,) = server.latents(guided(loaded(name), 3.0), ["samples", 0])
    assert error(latents, stock(name, guidance=3.0, output_type="latent")) <= 1e-5


@pytest.mark.parametrize(("name", "shift"), [("sd3", 3.0), ("flux", math.exp(1.15))])
def test_cores_schedules_have_the_shift_of_the_model(server: Server, folder: Folder, name: str, shift: float) -> None:
    """A shift that depends on the picture size is that of the largest size, as in ComfyUI for Flux."""
    folder(name)
    graph = {
        "load": node("TDMLoadDiffusers", pipeline=name),
        "core": node("BasicScheduler", model=["load", 0], scheduler="simple", steps=4, denoise=1.0),
        "show": node("TestSigmas", sigmas=["core", 0]),
    }
    expected = [shift * s / (1 + (shift - 1) * s) for s in (1, 0.75, 0.5, 0.25, 0)]
    assert server.run(graph).outputs["show"]["sigmas"] == pytest.approx(expected, abs=1e-6)


def test_flux_guidance_is_what_the_network_is_told(server: Server, folder: Folder) -> None:
    folder("flux")
    graph = loaded("flux")
    graph["told"] = node("FluxGuidance", conditioning=["prompt", 0], guidance=7.0)
    graph["guider"]["inputs"]["conditioning"] = ["told", 0]
    (actual,) = server.latents(graph, ["samples", 0])
    expected = stock("flux", guidance_scale=7.0, output_type="latent")
    assert error(actual, expected) <= 1e-5
    assert error(expected, stock("flux", output_type="latent")) > 1e-4


def test_a_batch_is_that_of_diffusers(server: Server, folder: Folder) -> None:
    folder("sana")
    (latents,) = server.latents(guided(loaded("sana", batch=2), 3.0), ["samples", 0])
    assert error(latents, stock("sana", guidance=3.0, num_images_per_prompt=2, output_type="latent")) <= 1e-5


def test_a_video_leaves_as_a_video(server: Server, folder: Folder) -> None:
    folder("wan")
    graph = decoded(loaded("wan"))
    graph["video"] = node("CreateVideo", images=["pixels", 0], fps=8.0)
    graph["file"] = node("SaveVideo", video=["video", 0], filename_prefix="bridge/v", format="mp4", codec="auto")
    graph["frames"] = node("GetVideoComponents", video=["file", 0])  # of the file
    graph["save"]["inputs"]["images"] = ["frames", 0]
    run = server.run(graph)
    (file,) = (server.output / "bridge").glob("v_*.mp4")
    assert file.read_bytes()[4:8] == b"ftyp"
    assert pictures_of(server, run).shape == (FRAMES, *size_of("wan")[:2], 3)


def test_a_student_goes_onto_denoiser_and_text_encoder(server: Server, folder: Folder) -> None:
    folder("sd15")
    pipe: Any = tiny.build("sd15")
    generator = torch.Generator().manual_seed(2)
    layers = {
        f"{component}.{name}": Lora(
            torch.randn(2, shape.inputs, *shape.kernel, generator=generator) * 0.3,
            torch.randn(shape.outputs, 2, *[1] * len(shape.kernel), generator=generator) * 0.3,
        )
        for component in ("unet", "text_encoder")
        for name, shape in layer_shapes(getattr(pipe, component)).items()
        if name.endswith(("to_q", "conv1", "q_proj"))
    }
    recipe = StudentRecipe("me/tiny", "sd15", "epsilon", {3: GRID}, guidance_scale=1.0, height=16, width=32)
    (server.models / "loras").mkdir(exist_ok=True)
    file = save_student(
        server.models / "loras" / "on_sd15.safetensors", Student.from_state_dict(recipe, state_dict_of(layers))
    )
    graph = loaded("sd15", timesteps=None)
    (teacher,) = server.latents(loaded("sd15"), ["samples", 0])
    student = {"file": file.name, "released_as": "by its header or name", "strength": 1.0}
    graph["student"] = node("TDMLoadStudent", model=["load", 0], clip=["load", 1], **student)
    graph["sigmas"]["inputs"] |= {"model": ["student", 0], "recipe": ["student", 2]}
    graph["prompt"]["inputs"]["clip"] = ["student", 1]
    (actual,) = server.latents(graph, ["samples", 0])
    same = {"generator": torch.Generator().manual_seed(SEED), "output_type": "latent"}
    expected = TDMPipeline.from_pipe(pipe, student=file)(tiny.PROMPT, **same)[0]
    assert error(actual, expected) <= 1e-5
    assert error(actual, teacher) > 0.01


def broken(path: Path, how: str) -> None:
    index = json.loads((path / "model_index.json").read_text())
    if how == "unknown":
        index["_class_name"] = "KandinskyPipeline"
    elif how == "truncated":
        weights = path / "transformer" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "incomplete":
        shutil.rmtree(path / "text_encoder")
    elif how == "merged":
        (path / "student.json").write_text("{}")
    (path / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("unknown", "pipeline class 'KandinskyPipeline' is not supported"),
        ("truncated", "diffusers cannot load"),
        ("incomplete", "diffusers cannot load"),
        ("merged", "has a student in its weights"),
        ("absent", "Value not in list"),
    ],
)
def test_a_folder_that_cannot_be_loaded_says_so(server: Server, folder: Folder, how: str, message: str) -> None:
    if how != "absent":
        path = server.models / "diffusers" / how
        shutil.copytree(folder("sana"), path)
        broken(path, how)
    with pytest.raises(PromptError, match=message) as failure:
        server.latents(loaded(how), ["samples", 0])
    if how != "absent":
        assert "\n" not in str(failure.value).strip()
    server.latents(loaded("sana", seed=1), ["samples", 0])  # the server goes on


def test_what_does_not_fit_says_so(server: Server, folder: Folder) -> None:
    folder("sana")

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(PromptError, match=message):
            server.latents({**loaded("sana"), **changes}, ["samples", 0])

    refused("48x32 does not fit sana", latent=node("EmptyLatentImage", width=32, height=48, batch_size=1))
    both = node("ConditioningConcat", conditioning_to=["prompt", 0], conditioning_from=["prompt", 0])
    guider = node("BasicGuider", model=["sigmas", 0], conditioning=["both", 0])
    refused("cannot be concatenated", both=both, guider=guider)
    guider = node("BasicGuider", model=["sigmas", 0], conditioning=["foreign", 0])
    refused("this one has no mask", foreign=node("TestPrompt", width=16), guider=guider)
    patched = node("HyperTile", model=["load", 0], tile_size=256, swap_size=2, max_depth=0, scale_depth=False)
    sigmas = node("TDMSigmas", **{**loaded("sana")["sigmas"]["inputs"], "model": ["patched", 0]})
    refused("patches of attention do not fit", patched=patched, sigmas=sigmas)
