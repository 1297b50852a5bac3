"""The example workflows of the bundled model, which everybody has."""

from __future__ import annotations

from typing import Any

from .graphs import node
from .workflow import Link, Workflow, empty_latent, prompt_node, sampling_nodes, saved_box, steps_nodes, student_node

_BUNDLED = {"base": node("TDMLoadDiffusers", pipeline="bundled"), **student_node(["base", 0], "bundled")}
_STARS = "two red stars above a blue moon at night"


def _larger(images: Link) -> dict[str, Any]:
    return node("ImageScaleBy", image=images, upscale_method="nearest-exact", scale_by=6.0)


def _bundled() -> Workflow:
    latent = empty_latent("EmptySD3LatentImage", 64, batch_size=4)
    return Workflow(
        "The model that comes with TDM",
        "Press Run: no file is needed, and no GPU. This small model draws stickers: one to four stars, hearts, moons, "
        "boxes, balls, crosses, rings or triangles, where you say, on a beach, at sea, in a meadow, in the snow or at "
        "night.\n\nEvery model and student runs on these same nodes; only the loader is another.",
        [
            {"Base and student": _BUNDLED},
            {"Prompt and size": {"prompt": prompt_node(_STARS, ["base", 1]), "latent": latent}},
            {"Noise and the student's steps": steps_nodes()},
            {"Sampling: 4 network calls": {**sampling_nodes(["base", 2]), "larger": _larger(["pixels", 0])}},
            saved_box(["larger", 0], "bundled"),
        ],
    )


def _more_variety() -> Workflow:
    steps = steps_nodes()
    of_base = {"base sigmas": node("TDMSigmas", **{**steps["sigmas"]["inputs"], "model": ["base", 0]})}
    split = {"parts": node("SplitSigmas", sigmas=["sigmas", 1], step=1)}
    first = {
        "base guider": node("BasicGuider", model=["base sigmas", 0], conditioning=["prompt", 0]),
        "first": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["base guider", 0],
            sampler=["sampler", 0],
            sigmas=["parts", 0],
            latent_image=["latent", 0],
        ),
    }
    others = {"no noise": node("DisableNoise"), **sampling_nodes(["base", 2])}
    others["samples"]["inputs"] |= {"noise": ["no noise", 0], "sigmas": ["parts", 1], "latent_image": ["first", 0]}
    return Workflow(
        "More variety",
        "Four pictures that differ more than the student's own, for as many network calls: the base makes the first "
        "step, which decides what is where, and the student the others. It is less exact; take it for ideas.\n\nAny "
        "model and student can be split like this. `SplitSigmas` says after how many steps the student takes over.",
        [
            {"Base and student": _BUNDLED},
            {
                "Prompt and size": {
                    "prompt": prompt_node(_STARS, ["base", 1]),
                    "latent": empty_latent("EmptySD3LatentImage", 64, batch_size=4),
                }
            },
            {"Noise, and the steps in two parts": {**steps, **of_base, **split}},
            {"The base: 1 network call": first, "The student: 3 network calls": others},
            {"Picture": {"larger": _larger(["pixels", 0]), **saved_box(["larger", 0], "more-variety")["Picture"]}},
        ],
    )


def _image_to_image() -> Workflow:
    other = prompt_node("two yellow stars above a green moon at night", ["base", 1])
    encoded = node("VAEEncode", pixels=["first pixels", 0], vae=["base", 2])
    decoded = {
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
                    "first prompt": prompt_node(_STARS, ["base", 1]),
                    "first latent": empty_latent("EmptySD3LatentImage", 64),
                },
                "Redrawn after another prompt": {"prompt": other, "latent": encoded},
            },
            {
                "Noise and all steps": steps_nodes("first "),
                "Noise and the last steps": steps_nodes(denoise=0.75, seed=8),
            },
            {
                "Sampling: 4 network calls": sampling_nodes(["base", 2], "first "),
                "3 network calls": sampling_nodes(["base", 2]),
            },
            {
                "The picture": decoded,
                "Redrawn": {
                    "larger": _larger(["pixels", 0]),
                    "picture": node("SaveImage", images=["larger", 0], filename_prefix="TDM/image-to-image"),
                },
            },
        ],
    )


def _compare() -> Workflow:
    _, sigmas, sampler = steps_nodes().items()
    inputs = {part: [name, 0] for part, name in (("teacher", "base"), ("student", "sigmas"), ("positive", "prompt"))}
    return Workflow(
        "Teacher and student",
        "The base with 50 guided steps on the left, its student with 4 steps on the right, from the same noise, with "
        "the network calls and seconds that each of them took.",
        [
            {"Base and student": _BUNDLED},
            {
                "Prompts and size": {
                    "prompt": prompt_node(_STARS, ["base", 1]),
                    "negative": prompt_node("", ["base", 1], "Negative prompt, for the teacher"),
                    "latent": empty_latent("EmptySD3LatentImage", 64),
                },
            },
            {"The student's steps": dict([sigmas, sampler])},
            {
                "Both": {
                    "both": node(
                        "TDMCompare",
                        **inputs,
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
            saved_box(["larger", 0], "compare"),
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
            saved_box(["larger", 0], "first-picture"),
        ],
    )


BUNDLED: dict[str, Workflow] = {
    "tdm-first-picture": _first_picture(),
    "tdm-bundled": _bundled(),
    "tdm-more-variety": _more_variety(),
    "tdm-image-to-image": _image_to_image(),
    "tdm-compare": _compare(),
}
