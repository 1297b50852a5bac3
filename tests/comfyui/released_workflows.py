"""The example workflows of the released students, whose files a user fetches."""

from __future__ import annotations

from typing import Any

from .graphs import node
from .server import Graph
from .workflow import (
    HUB,
    Link,
    Workflow,
    empty_latent,
    hub_file,
    prompt_node,
    released_file,
    sampling_nodes,
    saved_box,
    steps_nodes,
    student_node,
)


def _released(
    models: Graph, student: Graph, prompt: Link, latent: dict[str, Any], vae: Link, file: str, heading: str = "Base"
) -> list[dict[str, Graph]]:
    """From its base to a file."""
    name = student["student"]["inputs"]["released_as"]
    return [
        {heading: models, "Student": student},
        {"Prompt and size": {"prompt": prompt_node(_FOX, prompt), "latent": latent}},
        {"Noise and the student's steps": steps_nodes(student=name)},
        {"Sampling: 4 network calls": sampling_nodes(vae)},
        saved_box(["pixels", 0], file),
    ]


_FOX = "a red fox asleep in deep snow, golden morning light, highly detailed"
_DREAMSHAPER = {
    "checkpoints/DreamShaper_7_pruned.safetensors": hub_file("Lykon/DreamShaper", "DreamShaper_7_pruned.safetensors"),
    "loras/tdm_dreamshaper.pt": released_file("Luo-Yihong/TDM_dreamshaper_LoRA"),
}
_DREAMSHAPER_BASE = {"base": node("CheckpointLoaderSimple", ckpt_name="DreamShaper_7_pruned.safetensors")}
_DREAMSHAPER_STUDENT = ("tdm_dreamshaper.pt", "Luo-Yihong/TDM_dreamshaper_LoRA")
_NO_BUTTON = (
    "There is no download button for it, because we could not look up the name that the file has in its repository: "
    "open the repository, fetch its one `.safetensors` and rename it."
)
_SD35_FILES = "Comfy-Org/stable-diffusion-3.5-fp8"
_Z_IMAGE_FILES = "Comfy-Org/z_image_turbo"


def _dreamshaper() -> Workflow:
    student = student_node(["base", 0], *_DREAMSHAPER_STUDENT, clip=["base", 1])
    latent = empty_latent("EmptyLatentImage", 512)
    return Workflow(
        "Dreamshaper 7 in 4 steps",
        "Stable Diffusion 1.5, 512 x 512. `Load TDM Student` reads how the student is run and hands it on: strength, "
        "timesteps and sampler order need no setting. Other fine-tunes of SD1.5 work too; there a strength of 0.5 to "
        "0.75 can look better.",
        _released(_DREAMSHAPER_BASE, student, ["student", 1], latent, ["base", 2], "dreamshaper-7"),
        _DREAMSHAPER,
    )


def _lora_stack() -> Workflow:
    file = "add_detail.safetensors"
    links, strength = {"model": ["base", 0], "clip": ["base", 1]}, {"strength_model": 0.8, "strength_clip": 0.8}
    models = {**_DREAMSHAPER_BASE, "style": node("LoraLoader", **links, lora_name=file, **strength)}
    student = student_node(["style", 0], *_DREAMSHAPER_STUDENT, clip=["style", 1])
    latent = empty_latent("EmptyLatentImage", 512)
    return Workflow(
        "LoRAs of your own with a student",
        "The student is one more LoRA on the model: put yours before or behind `Load TDM Student`, as many as you "
        "like, with any loader. Its own strength stays at 1; if colours burn out, lower yours first. `add_detail` "
        "stands for any LoRA of Stable Diffusion 1.5.",
        _released(models, student, ["student", 1], latent, ["base", 2], "lora-stack", "Base and your LoRA"),
        {**_DREAMSHAPER, f"loras/{file}": hub_file("OedoSoldier/detail-tweaker-lora", file)},
    )


def _sd3() -> Workflow:
    base, file = "sd3_medium_incl_clips_t5xxlfp8.safetensors", "tdm_sd3_lora.safetensors"
    models = {"base": node("CheckpointLoaderSimple", ckpt_name=base)}
    student = student_node(["base", 0], file, "Luo-Yihong/TDM_sd3_lora", clip=["base", 1])
    latent = empty_latent("EmptySD3LatentImage", 1024)
    return Workflow(
        "Stable Diffusion 3 in 4 steps",
        "1024 x 1024. `released_as` tells the student's strength (0.125), timesteps and order, so that its file may "
        f"have any name. {_NO_BUTTON}",
        _released(models, student, ["student", 1], latent, ["base", 2], "sd3"),
        {
            f"checkpoints/{base}": hub_file("stabilityai/stable-diffusion-3-medium", base),
            f"loras/{file}": released_file("Luo-Yihong/TDM_sd3_lora"),
        },
        too_large="ComfyUI builds its text encoders in full size, 11 GB",
    )


def _sd35() -> Workflow:
    base, file = "sd3.5_medium.safetensors", "tdm_sd3-5_lora.ckpt"
    encoders = ("clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp16.safetensors")
    names = {f"clip_name{i}": name for i, name in enumerate(encoders, 1)}
    models = {
        "base": node("CheckpointLoaderSimple", ckpt_name=base),
        "encoders": node("TripleCLIPLoader", **names),
    }
    student = student_node(["base", 0], file, "Luo-Yihong/TDM_sd3-5_lora")
    latent = empty_latent("EmptySD3LatentImage", 512)
    return Workflow(
        "Stable Diffusion 3.5 Medium in 4 steps",
        "512 x 512, the size that this student was trained for. Its file is a list of weights without names: "
        "`released_as` tells which layers they are for.",
        _released(models, student, ["encoders", 0], latent, ["base", 2], "sd3.5-medium"),
        {
            f"checkpoints/{base}": hub_file("stabilityai/stable-diffusion-3.5-medium", base),
            **{f"text_encoders/{name}": hub_file(_SD35_FILES, f"text_encoders/{name}") for name in encoders},
            f"loras/{file}": released_file("Luo-Yihong/TDM_sd3-5_lora"),
        },
        too_large="ComfyUI builds its text encoders in full size, 11 GB",
    )


def _z_image() -> Workflow:
    base, encoder, vae = "z_image_turbo_bf16.safetensors", "qwen_3_4b.safetensors", "ae.safetensors"
    file = "tdmr1_zimage_ema.ckpt"
    models = {
        "base": node("UNETLoader", unet_name=base, weight_dtype="default"),
        "encoder": node("CLIPLoader", clip_name=encoder, type="lumina2", device="default"),
        "vae": node("VAELoader", vae_name=vae),
    }
    student = student_node(["base", 0], file, "Luo-Yihong/TDM-R1")
    latent = empty_latent("EmptySD3LatentImage", 1024)
    return Workflow(
        "Z-Image-Turbo with TDM-R1 in 4 steps",
        "1024 x 1024, without guidance. The student's file is a list of weights without names: `released_as` tells "
        "which layers they are for. A quantised base from another loader, such as one for GGUF, takes it as well.",
        _released(models, student, ["encoder", 0], latent, ["vae", 0], "z-image-turbo"),
        {
            f"diffusion_models/{base}": hub_file(_Z_IMAGE_FILES, f"split_files/diffusion_models/{base}"),
            f"text_encoders/{encoder}": hub_file(_Z_IMAGE_FILES, f"split_files/text_encoders/{encoder}"),
            f"vae/{vae}": hub_file(_Z_IMAGE_FILES, f"split_files/vae/{vae}"),
            f"loras/{file}": released_file("Luo-Yihong/TDM-R1"),
        },
        too_large="ComfyUI builds its text encoder in full size, 8 GB",
    )


def _cogvideox() -> Workflow:
    base, file = "CogVideoX-2b", "tdm_cogvideox_2b_lora.safetensors"
    models = {"base": node("TDMLoadDiffusers", pipeline=base)}
    student = student_node(["base", 0], file, "Luo-Yihong/TDM_CogVideoX-2B_LoRA")
    latent = node("EmptyHunyuanLatentVideo", width=720, height=480, length=49, batch_size=1)
    prompt, steps, samples, _ = _released(models, student, ["base", 1], latent, ["base", 2], "")[1:]
    video = {
        "video": node("CreateVideo", images=["pixels", 0], fps=8.0, bit_depth=8),
        "file": node("SaveVideo", video=["video", 0], filename_prefix="TDM/cogvideox-2b", format="auto", codec="auto"),
    }
    return Workflow(
        "CogVideoX-2B in 4 steps",
        "49 frames of 720 x 480 at 8 a second: 6 seconds. The base is the whole repository in diffusers' layout. For a "
        "base from ComfyUI's own loaders put `TDM CogVideoX Sampling` behind it. `released_as` tells the student's "
        f"timesteps, so that its file may have any name. {_NO_BUTTON}",
        [{"Base": models, "Student": student}, prompt, steps, samples, {"Video": video}],
        {
            f"diffusers/{base}/": f"{HUB}THUDM/CogVideoX-2b",
            f"loras/{file}": released_file("Luo-Yihong/TDM_CogVideoX-2B_LoRA"),
        },
    )


RELEASED: dict[str, Workflow] = {
    "tdm-dreamshaper-7": _dreamshaper(),
    "tdm-lora-stack": _lora_stack(),
    "tdm-sd3": _sd3(),
    "tdm-sd3.5-medium": _sd35(),
    "tdm-cogvideox-2b": _cogvideox(),
    "tdm-z-image-turbo": _z_image(),
}
