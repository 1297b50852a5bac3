"""The example workflows as prompts. `make_workflows.py` has the front end write them to `example_workflows`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .graphs import node
from .install import REPOSITORY
from .server import Graph

Link = list[Any]

FOLDER = REPOSITORY / "example_workflows"

HUB = "https://huggingface.co/"
STUDENTS = f"{HUB}Luo-Yihong/"


@dataclass(frozen=True)
class Workflow:
    """One example workflow.

    Attributes:
        title: the heading of its note.
        text: what its note says, in Markdown.
        columns: heading -> the nodes below it, from left to right.
        files: path in ComfyUI's `models` folder -> where it is found.
        too_large: why no test can run it, if none can.
    """

    title: str
    text: str
    columns: dict[str, Graph]
    files: dict[str, str] = field(default_factory=dict)
    too_large: str | None = None

    @property
    def graph(self) -> Graph:
        """The prompt, its nodes numbered from left to right."""
        nodes = {name: each for column in self.columns.values() for name, each in column.items()}
        number = {name: str(i) for i, name in enumerate(nodes, 1)}

        def linked(value: Any) -> Any:
            return [number[value[0]], value[1]] if isinstance(value, list) else value

        return {
            number[name]: {**each, "inputs": {key: linked(value) for key, value in each["inputs"].items()}}
            for name, each in nodes.items()
        }

    @property
    def note(self) -> str:
        """The note at its left."""
        files = "\n".join(f"- **{path}**, from [{url.removeprefix(HUB)}]({url})" for path, url in self.files.items())
        return f"## {self.title}\n\n{self.text}" + (f"\n\n### Files, in `ComfyUI/models`\n\n{files}" if files else "")


def _student(model: Link, file: str, released_as: str, **more: Any) -> Graph:
    return {"student": node("TDMLoadStudent", model=model, file=file, released_as=released_as, strength=1.0, **more)}


def _prompt(text: str, clip: Link, latent: dict[str, Any]) -> dict[str, Graph]:
    return {"Prompt and size": {"prompt": node("CLIPTextEncode", clip=clip, text=text), "latent": latent}}


def _sampling(vae: Link, student: str, prefix: str) -> dict[str, Graph]:
    """Nodes "student", "prompt" and "latent" to a picture, as the student's recipe says."""
    own = {"student": student, "timesteps": "999, 749, 499, 249", "recipe": ["student", 2]}
    return {
        "Noise and the student's steps": {
            "noise": node("RandomNoise", noise_seed=7),
            "sigmas": node("TDMSigmas", model=["student", 0], steps=0, denoise=1.0, **own),
            "sampler": node("TDMSampler", order=["sigmas", 2]),
        },
        "Sampling: 4 network calls": {
            "guider": node("BasicGuider", model=["sigmas", 0], conditioning=["prompt", 0]),
            "samples": node(
                "SamplerCustomAdvanced",
                noise=["noise", 0],
                guider=["guider", 0],
                sampler=["sampler", 0],
                sigmas=["sigmas", 1],
                latent_image=["latent", 0],
            ),
            "pixels": node("VAEDecode", samples=["samples", 0], vae=vae),
        },
        "Picture": {"picture": node("SaveImage", images=["pixels", 0], filename_prefix=f"TDM/{prefix}")},
    }


def _square(kind: str, side: int) -> dict[str, Any]:
    return node(kind, width=side, height=side, batch_size=1)


DREAMSHAPER = {
    "checkpoints/DreamShaper_7_pruned.safetensors": f"{HUB}Lykon/DreamShaper",
    "loras/tdm_dreamshaper.pt": f"{STUDENTS}TDM_dreamshaper_LoRA",
}
_DREAMSHAPER_BASE = {"base": node("CheckpointLoaderSimple", ckpt_name="DreamShaper_7_pruned.safetensors")}
_DREAMSHAPER_ID = "Luo-Yihong/TDM_dreamshaper_LoRA"
_FOX = "a red fox asleep in deep snow, golden morning light, highly detailed"

_TEXT_ENCODERS = f"{HUB}Comfy-Org/stable-diffusion-3.5-fp8"
_Z_IMAGE = f"{HUB}Comfy-Org/z_image_turbo"


def _dreamshaper() -> Workflow:
    return Workflow(
        "Dreamshaper 7 in 4 steps",
        "Stable Diffusion 1.5, 512 x 512. `Load TDM Student` reads how the student is run and hands it on: sampler "
        "order, timesteps and strength need no setting. Other fine-tunes of SD1.5 work too; there a strength of 0.5 to "
        "0.75 can look better.",
        {
            "Base": _DREAMSHAPER_BASE,
            "Student": _student(["base", 0], "tdm_dreamshaper.pt", _DREAMSHAPER_ID, clip=["base", 1]),
            **_prompt(_FOX, ["student", 1], _square("EmptyLatentImage", 512)),
            **_sampling(["base", 2], _DREAMSHAPER_ID, "dreamshaper-7"),
        },
        DREAMSHAPER,
    )


def _lora_stack() -> Workflow:
    lora = "add_detail.safetensors"
    return Workflow(
        "A LoRA of your own under a student",
        "The student is one more LoRA on the model: put yours before or behind `Load TDM Student`, as many as you "
        "like. Its own strength stays at 1; if colours burn out, lower yours first.\n\n`add_detail` stands for any "
        "LoRA of Stable Diffusion 1.5.",
        {
            "Base and your LoRAs": {
                **_DREAMSHAPER_BASE,
                "style": node(
                    "LoraLoader",
                    model=["base", 0],
                    clip=["base", 1],
                    lora_name=lora,
                    strength_model=0.8,
                    strength_clip=0.8,
                ),
            },
            "Student": _student(["style", 0], "tdm_dreamshaper.pt", _DREAMSHAPER_ID, clip=["style", 1]),
            **_prompt(_FOX, ["student", 1], _square("EmptyLatentImage", 512)),
            **_sampling(["base", 2], _DREAMSHAPER_ID, "lora-stack"),
        },
        {**DREAMSHAPER, f"loras/{lora}": f"{HUB}OedoSoldier/detail-tweaker-lora"},
    )


def _sd3() -> Workflow:
    base, student = "sd3_medium_incl_clips_t5xxlfp8.safetensors", "tdm_sd3_lora.safetensors"
    return Workflow(
        "Stable Diffusion 3 in 4 steps",
        "1024 x 1024. `released_as` is what tells the student's strength (0.125), timesteps and order, so its file may "
        "have any name: rename the one `.safetensors` of its repository.",
        {
            "Base": {"base": node("CheckpointLoaderSimple", ckpt_name=base)},
            "Student": _student(["base", 0], student, "Luo-Yihong/TDM_sd3_lora", clip=["base", 1]),
            **_prompt(_FOX, ["student", 1], _square("EmptySD3LatentImage", 1024)),
            **_sampling(["base", 2], "Luo-Yihong/TDM_sd3_lora", "sd3"),
        },
        {
            f"checkpoints/{base}": f"{HUB}stabilityai/stable-diffusion-3-medium",
            f"loras/{student}": f"{STUDENTS}TDM_sd3_lora",
        },
        too_large="its text encoders have one size: 11 GB",
    )


def _sd35() -> Workflow:
    base, student = "sd3.5_medium.safetensors", "tdm_sd3-5_lora.ckpt"
    encoders = ("clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp16.safetensors")
    names = {f"clip_name{i}": name for i, name in enumerate(encoders, 1)}
    return Workflow(
        "Stable Diffusion 3.5 Medium in 4 steps",
        "512 x 512, the size that this student was trained for. Its file is a list of weights without names: "
        "`released_as` tells which layers they are for.",
        {
            "Base": {
                "base": node("CheckpointLoaderSimple", ckpt_name=base),
                "encoders": node("TripleCLIPLoader", **names),
            },
            "Student": _student(["base", 0], student, "Luo-Yihong/TDM_sd3-5_lora"),
            **_prompt(_FOX, ["encoders", 0], _square("EmptySD3LatentImage", 512)),
            **_sampling(["base", 2], "Luo-Yihong/TDM_sd3-5_lora", "sd35-medium"),
        },
        {
            f"checkpoints/{base}": f"{HUB}stabilityai/stable-diffusion-3.5-medium",
            **{f"text_encoders/{name}": _TEXT_ENCODERS for name in encoders},
            f"loras/{student}": f"{STUDENTS}TDM_sd3-5_lora",
        },
        too_large="its text encoders have one size: 11 GB",
    )


def _z_image() -> Workflow:
    base, encoder, vae = "z_image_turbo_bf16.safetensors", "qwen_3_4b.safetensors", "ae.safetensors"
    student = "tdmr1_zimage_ema.ckpt"
    return Workflow(
        "Z-Image-Turbo with TDM-R1 in 4 steps",
        "1024 x 1024, without guidance. The student's file is a list of weights without names: `released_as` tells "
        "which layers they are for. A quantised base from another loader, such as GGUF, takes the student as well.",
        {
            "Base": {
                "base": node("UNETLoader", unet_name=base, weight_dtype="default"),
                "encoder": node("CLIPLoader", clip_name=encoder, type="lumina2", device="default"),
                "vae": node("VAELoader", vae_name=vae),
            },
            "Student": _student(["base", 0], student, "Luo-Yihong/TDM-R1"),
            **_prompt(_FOX, ["encoder", 0], _square("EmptySD3LatentImage", 1024)),
            **_sampling(["vae", 0], "Luo-Yihong/TDM-R1", "z-image-turbo"),
        },
        {
            f"diffusion_models/{base}": _Z_IMAGE,
            f"text_encoders/{encoder}": _Z_IMAGE,
            f"vae/{vae}": _Z_IMAGE,
            f"loras/{student}": f"{STUDENTS}TDM-R1",
        },
        too_large="its text encoder has one size: 8 GB",
    )


# Under the names of their files, which are their titles in the template browser.
WORKFLOWS: dict[str, Workflow] = {
    "tdm-dreamshaper-7": _dreamshaper(),
    "tdm-sd3": _sd3(),
    "tdm-sd3.5-medium": _sd35(),
    "tdm-z-image-turbo": _z_image(),
    "tdm-lora-stack": _lora_stack(),
}


def stand_ins(models: Path) -> None:
    """Empty files in the place of those that the workflows name, where there are none: the front end looks for them."""
    for file in {file for workflow in WORKFLOWS.values() for file in workflow.files}:
        (models / file).parent.mkdir(parents=True, exist_ok=True)
        (models / file).touch()
