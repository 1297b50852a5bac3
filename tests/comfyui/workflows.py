"""The example workflows as prompts. `make_workflows.py` has the front end write them to `example_workflows`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tdm.pipelines.locate import bundled_path
from tdm.pipelines.presets import PRESETS
from tdm.pipelines.student import read_student

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
        columns: from left to right on the canvas, each a heading -> the nodes below it.
        files: path in ComfyUI's `models` folder -> where it is found.
        too_large: why no test can run it, if none can.
    """

    title: str
    text: str
    columns: list[dict[str, Graph]]
    files: dict[str, str] = field(default_factory=dict)
    too_large: str | None = None

    @property
    def graph(self) -> Graph:
        """The prompt, its nodes numbered from left to right."""
        boxes = [box for column in self.columns for box in column.values()]
        nodes = {name: each for box in boxes for name, each in box.items()}
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


def _student(model: Link, file: str, released_as: str = "by its header or name", **more: Any) -> Graph:
    return {"student": node("TDMLoadStudent", model=model, file=file, released_as=released_as, strength=1.0, **more)}


def _prompt(text: str, clip: Link, title: str = "Prompt") -> dict[str, Any]:
    return {**node("CLIPTextEncode", clip=clip, text=text), "_meta": {"title": title}}


def _empty(kind: str, side: int, batch_size: int = 1) -> dict[str, Any]:
    return node(kind, width=side, height=side, batch_size=batch_size)


def _steps(name: str = "", seed: int = 7, denoise: float = 1.0, student: str = "timesteps below") -> Graph:
    """Noise, and timesteps and order of the recipe of node "student"; their names begin with `name`."""
    own = {"student": student, "timesteps": _grid(student), "recipe": ["student", 2]}
    return {
        f"{name}noise": node("RandomNoise", noise_seed=seed),
        f"{name}sigmas": node("TDMSigmas", model=["student", 0], steps=0, denoise=denoise, **own),
        f"{name}sampler": node("TDMSampler", order=[f"{name}sigmas", 2]),
    }


def _grid(student: str) -> str:
    """What its recipe says, for people: the link decides."""
    if student in PRESETS:
        (grid,) = PRESETS[student].fields["trained_timesteps"].values()
    else:
        grid = read_student(bundled_path() / "student.safetensors")[0].trained_timesteps[4]
    return ", ".join(f"{timestep:g}" for timestep in grid)


def _samples(vae: Link, name: str = "") -> Graph:
    """The latent and the prompt of this name to a picture, with the steps of this name."""
    links = {part: [f"{name}{part}", 0] for part in ("noise", "guider", "sampler")}
    sigmas, latent = [f"{name}sigmas", 1], [f"{name}latent", 0]
    return {
        f"{name}guider": node("BasicGuider", model=[f"{name}sigmas", 0], conditioning=[f"{name}prompt", 0]),
        f"{name}samples": node("SamplerCustomAdvanced", **links, sigmas=sigmas, latent_image=latent),
        f"{name}pixels": node("VAEDecode", samples=[f"{name}samples", 0], vae=vae),
    }


def _saved(images: Link, file: str) -> dict[str, Graph]:
    return {"Picture": {"picture": node("SaveImage", images=images, filename_prefix=f"TDM/{file}")}}


# ---------------------------------------------------------------------- released students


def _released(
    models: Graph, student: Graph, prompt: Link, latent: dict[str, Any], vae: Link, file: str, heading: str = "Base"
) -> list[dict[str, Graph]]:
    """From its base to a file."""
    name = student["student"]["inputs"]["released_as"]
    return [
        {heading: models, "Student": student},
        {"Prompt and size": {"prompt": _prompt(_FOX, prompt), "latent": latent}},
        {"Noise and the student's steps": _steps(student=name)},
        {"Sampling: 4 network calls": _samples(vae)},
        _saved(["pixels", 0], file),
    ]


_FOX = "a red fox asleep in deep snow, golden morning light, highly detailed"
_DREAMSHAPER = {
    "checkpoints/DreamShaper_7_pruned.safetensors": f"{HUB}Lykon/DreamShaper",
    "loras/tdm_dreamshaper.pt": f"{STUDENTS}TDM_dreamshaper_LoRA",
}
_DREAMSHAPER_BASE = {"base": node("CheckpointLoaderSimple", ckpt_name="DreamShaper_7_pruned.safetensors")}
_DREAMSHAPER_STUDENT = ("tdm_dreamshaper.pt", "Luo-Yihong/TDM_dreamshaper_LoRA")
_TEXT_ENCODERS = f"{HUB}Comfy-Org/stable-diffusion-3.5-fp8"
_Z_IMAGE = f"{HUB}Comfy-Org/z_image_turbo"


def _dreamshaper() -> Workflow:
    student = _student(["base", 0], *_DREAMSHAPER_STUDENT, clip=["base", 1])
    latent = _empty("EmptyLatentImage", 512)
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
    student = _student(["style", 0], *_DREAMSHAPER_STUDENT, clip=["style", 1])
    latent = _empty("EmptyLatentImage", 512)
    return Workflow(
        "LoRAs of your own with a student",
        "The student is one more LoRA on the model: put yours before or behind `Load TDM Student`, as many as you "
        "like, with any loader. Its own strength stays at 1; if colours burn out, lower yours first. `add_detail` "
        "stands for any LoRA of Stable Diffusion 1.5.",
        _released(models, student, ["student", 1], latent, ["base", 2], "lora-stack", "Base and your LoRA"),
        {**_DREAMSHAPER, f"loras/{file}": f"{HUB}OedoSoldier/detail-tweaker-lora"},
    )


def _sd3() -> Workflow:
    base, file = "sd3_medium_incl_clips_t5xxlfp8.safetensors", "tdm_sd3_lora.safetensors"
    models = {"base": node("CheckpointLoaderSimple", ckpt_name=base)}
    student = _student(["base", 0], file, "Luo-Yihong/TDM_sd3_lora", clip=["base", 1])
    latent = _empty("EmptySD3LatentImage", 1024)
    return Workflow(
        "Stable Diffusion 3 in 4 steps",
        "1024 x 1024. `released_as` tells the student's strength (0.125), timesteps and order, so that its file may "
        "have any name: rename the one `.safetensors` of its repository.",
        _released(models, student, ["student", 1], latent, ["base", 2], "sd3"),
        {
            f"checkpoints/{base}": f"{HUB}stabilityai/stable-diffusion-3-medium",
            f"loras/{file}": f"{STUDENTS}TDM_sd3_lora",
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
    student = _student(["base", 0], file, "Luo-Yihong/TDM_sd3-5_lora")
    latent = _empty("EmptySD3LatentImage", 512)
    return Workflow(
        "Stable Diffusion 3.5 Medium in 4 steps",
        "512 x 512, the size that this student was trained for. Its file is a list of weights without names: "
        "`released_as` tells which layers they are for.",
        _released(models, student, ["encoders", 0], latent, ["base", 2], "sd3.5-medium"),
        {
            f"checkpoints/{base}": f"{HUB}stabilityai/stable-diffusion-3.5-medium",
            **{f"text_encoders/{name}": _TEXT_ENCODERS for name in encoders},
            f"loras/{file}": f"{STUDENTS}TDM_sd3-5_lora",
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
    student = _student(["base", 0], file, "Luo-Yihong/TDM-R1")
    latent = _empty("EmptySD3LatentImage", 1024)
    return Workflow(
        "Z-Image-Turbo with TDM-R1 in 4 steps",
        "1024 x 1024, without guidance. The student's file is a list of weights without names: `released_as` tells "
        "which layers they are for. A quantised base from another loader, such as one for GGUF, takes it as well.",
        _released(models, student, ["encoder", 0], latent, ["vae", 0], "z-image-turbo"),
        {
            f"diffusion_models/{base}": _Z_IMAGE,
            f"text_encoders/{encoder}": _Z_IMAGE,
            f"vae/{vae}": _Z_IMAGE,
            f"loras/{file}": f"{STUDENTS}TDM-R1",
        },
        too_large="ComfyUI builds its text encoder in full size, 8 GB",
    )


def _cogvideox() -> Workflow:
    base, file = "CogVideoX-2b", "tdm_cogvideox_2b_lora.safetensors"
    models = {"base": node("TDMLoadDiffusers", pipeline=base)}
    student = _student(["base", 0], file, "Luo-Yihong/TDM_CogVideoX-2B_LoRA")
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
        "timesteps, so that its file may have any name: rename the one `.safetensors` of its repository.",
        [{"Base": models, "Student": student}, prompt, steps, samples, {"Video": video}],
        {f"diffusers/{base}/": f"{HUB}THUDM/CogVideoX-2b", f"loras/{file}": f"{STUDENTS}TDM_CogVideoX-2B_LoRA"},
    )


# ---------------------------------------------------------------------- the bundled model, which everybody has


_BUNDLED = {"base": node("TDMLoadDiffusers", pipeline="bundled"), **_student(["base", 0], "bundled")}
_STARS = "two red stars above a blue moon at night"


def _larger(images: Link) -> dict[str, Any]:
    return node("ImageScaleBy", image=images, upscale_method="nearest-exact", scale_by=6.0)


def _bundled() -> Workflow:
    latent = _empty("EmptySD3LatentImage", 64, batch_size=4)
    return Workflow(
        "The model that comes with TDM",
        "Press Run: no file is needed, and no GPU. This small model draws stickers: one to four stars, hearts, moons, "
        "boxes, balls, crosses, rings or triangles, where you say, on a beach, at sea, in a meadow, in the snow or at "
        "night.\n\nEvery model and student runs on these same nodes; only the loader is another.",
        [
            {"Base and student": _BUNDLED},
            {"Prompt and size": {"prompt": _prompt(_STARS, ["base", 1]), "latent": latent}},
            {"Noise and the student's steps": _steps()},
            {"Sampling: 4 network calls": {**_samples(["base", 2]), "larger": _larger(["pixels", 0])}},
            _saved(["larger", 0], "bundled"),
        ],
    )


def _image_to_image() -> Workflow:
    other = _prompt("two yellow stars above a green moon at night", ["base", 1])
    encoded = node("VAEEncode", pixels=["first pixels", 0], vae=["base", 2])
    seen = {
        "first larger": _larger(["first pixels", 0]),
        "first picture": node("PreviewImage", images=["first larger", 0]),
    }
    return Workflow(
        "Image to image",
        "Above, a picture is drawn; below, it is redrawn after another prompt. `denoise` of the lower TDM Sigmas says "
        "how much of it: sampling begins at the trained timestep nearest to that share, and takes only the steps that "
        "follow, here 3 of 4.\n\nFor a picture of your own put `Load Image` on the `pixels` of VAE Encode, and take "
        "the nodes above away.",
        [
            {"Base and student": _BUNDLED},
            {
                "A picture": {
                    "first prompt": _prompt(_STARS, ["base", 1]),
                    "first latent": _empty("EmptySD3LatentImage", 64),
                },
                "Redrawn after another prompt": {"prompt": other, "latent": encoded},
            },
            {"Noise and all steps": _steps("first "), "Noise and the last steps": _steps(denoise=0.75, seed=8)},
            {"Sampling: 4 network calls": _samples(["base", 2], "first "), "3 network calls": _samples(["base", 2])},
            {
                "The picture": seen,
                "Redrawn": {
                    "larger": _larger(["pixels", 0]),
                    "picture": node("SaveImage", images=["larger", 0], filename_prefix="TDM/image-to-image"),
                },
            },
        ],
    )


def _compare() -> Workflow:
    _, sigmas, sampler = _steps().items()
    parts = {part: [name, 0] for part, name in (("teacher", "base"), ("student", "sigmas"), ("positive", "prompt"))}
    return Workflow(
        "Teacher and student",
        "The base with 50 guided steps on the left, its student with 4 steps on the right, from the same noise, with "
        "the network calls and seconds that each of them took.",
        [
            {"Base and student": _BUNDLED},
            {
                "Prompts and size": {
                    "prompt": _prompt(_STARS, ["base", 1]),
                    "negative": _prompt("", ["base", 1], "Negative prompt, for the teacher"),
                    "latent": _empty("EmptySD3LatentImage", 64),
                },
            },
            {"The student's steps": dict([sigmas, sampler])},
            {
                "Both": {
                    "both": node(
                        "TDMCompare",
                        **parts,
                        negative=["negative", 0],
                        vae=["base", 2],
                        latent_image=["latent", 0],
                        student_sampler=["sampler", 0],
                        student_sigmas=["sigmas", 1],
                        seed=7,
                        steps=50,
                        cfg=3.0,
                        sampler_name="euler",
                        scheduler="normal",
                        denoise=1.0,
                        student_cfg=1.0,
                    ),
                    "larger": _larger(["both", 2]),
                },
            },
            _saved(["larger", 0], "compare"),
        ],
    )


def _first_picture() -> Workflow:
    return Workflow(
        "Your first picture",
        "Write what you want to see, and press Run. `TDM Generate` has all it takes, set as the student says: "
        "timesteps, sampler, guidance and size.\n\nThe small model that comes with TDM draws stickers, without any "
        "file. For your own choose a `checkpoint` and its `student`, and take `Upscale Image By` away.",
        [
            {
                "One node": {
                    "generate": node(
                        "TDMGenerate",
                        checkpoint="bundled",
                        student="bundled",
                        released_as="by its header or name",
                        prompt=_STARS,
                        seed=7,
                        width=0,
                        height=0,
                        batch_size=1,
                    ),
                    "larger": _larger(["generate", 0]),
                },
            },
            _saved(["larger", 0], "first-picture"),
        ],
    )


# Under the names of their files, which are their titles in the template browser.
WORKFLOWS: dict[str, Workflow] = {
    "tdm-first-picture": _first_picture(),
    "tdm-bundled": _bundled(),
    "tdm-image-to-image": _image_to_image(),
    "tdm-compare": _compare(),
    "tdm-dreamshaper-7": _dreamshaper(),
    "tdm-lora-stack": _lora_stack(),
    "tdm-sd3": _sd3(),
    "tdm-sd3.5-medium": _sd35(),
    "tdm-cogvideox-2b": _cogvideox(),
    "tdm-z-image-turbo": _z_image(),
}


def stand_ins(models: Path) -> None:
    """Empty files in the place of those that the workflows name: the front end asks which there are."""
    for named in {named for workflow in WORKFLOWS.values() for named in workflow.files}:
        file = models / (f"{named}model_index.json" if named.endswith("/") else named)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
