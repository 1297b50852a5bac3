"""Writes what the node pack says of itself: `python -m tdm.tests.comfyui.make_help`, when a node has changed.

The English of `locales` is that of the nodes' schemas on a real server, and the pictures of the help pages are the real
front end's. The Chinese of `locales`, and the pages, are written by hand: English is `<node>.md`, which is copied to
`<node>/en.md`, where the front end looks first.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..browser import chromium
from .front_end import FrontEnd
from .graphs import node
from .install import REPOSITORY
from .server import Graph, Server

LOCALES = REPOSITORY / "locales"
ENGLISH = LOCALES / "en" / "nodeDefs.json"
PAGES = REPOSITORY / "web" / "docs"

FILES = (
    "checkpoints/DreamShaper_7_pruned.safetensors",
    "loras/tdm_dreamshaper.pt",
    "loras/tdm_cogvideox_2b_lora.safetensors",
    "loras/my_pixart_student.safetensors",
    "diffusion_models/cogvideox_2b.safetensors",
    "diffusion_models/pixart_alpha_512.safetensors",
)

WORKFLOW: Graph = {
    "checkpoint": node("CheckpointLoaderSimple", ckpt_name="DreamShaper_7_pruned.safetensors"),
    "student": node(
        "TDMLoadStudent",
        model=["checkpoint", 0],
        clip=["checkpoint", 1],
        file="tdm_dreamshaper.pt",
        released_as="Luo-Yihong/TDM_dreamshaper_LoRA",
        strength=1.0,
    ),
    "sigmas": node(
        "TDMSigmas",
        model=["student", 0],
        recipe=["student", 2],
        student="timesteps below",
        timesteps="999, 749, 499, 249",
        steps=0,
        denoise=1.0,
    ),
    "sampler": node("TDMSampler", order=["sigmas", 2]),
    "guider": node("BasicGuider", model=["sigmas", 0]),
    "samples": node("SamplerCustomAdvanced", guider=["guider", 0], sampler=["sampler", 0], sigmas=["sigmas", 1]),
    "bundled": node("TDMLoadDiffusers", pipeline="bundled"),
    "bundled student": node(
        "TDMLoadStudent",
        model=["bundled", 0],
        clip=["bundled", 1],
        file="bundled",
        released_as="by its header or name",
        strength=1.0,
    ),
    "generate": node(
        "TDMGenerate",
        checkpoint="bundled",
        student="bundled",
        released_as="by its header or name",
        prompt="two red stars above a blue moon at night",
        seed=0,
        width=0,
        height=0,
        batch_size=1,
    ),
    "save": node("SaveImage", images=["generate", 0], filename_prefix="TDM"),
    "compare": node(
        "TDMCompare",
        student=["sigmas", 0],
        student_sampler=["sampler", 0],
        student_sigmas=["sigmas", 1],
        seed=0,
        steps=50,
        cfg=7.5,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
        student_cfg=1.0,
    ),
    "cogvideox": node("UNETLoader", unet_name="cogvideox_2b.safetensors", weight_dtype="default"),
    "cogvideox student": node(
        "TDMLoadStudent",
        model=["cogvideox", 0],
        file="tdm_cogvideox_2b_lora.safetensors",
        released_as="Luo-Yihong/TDM_CogVideoX-2B_LoRA",
        strength=1.0,
    ),
    "cogvideox sampling": node("TDMCogVideoXSampling", model=["cogvideox student", 0], snr_shift_scale=3.0),
    "pixart": node("UNETLoader", unet_name="pixart_alpha_512.safetensors", weight_dtype="default"),
    "pixart latents": node("TDMPixArtAlphaLatents", model=["pixart", 0]),
    "pixart student": node(
        "TDMLoadStudent",
        model=["pixart latents", 0],
        file="my_pixart_student.safetensors",
        released_as="by its header or name",
        strength=1.0,
    ),
}
PICTURES = {  # help page -> the part of the workflow that it shows
    "TDMLoadStudent": ("checkpoint", "student", "sigmas"),
    "TDMLoadDiffusers": ("bundled", "bundled student"),
    "TDMSigmas": ("student", "sigmas", "guider", "sampler"),
    "TDMSampler": ("sigmas", "sampler", "samples"),
    "TDMGenerate": ("generate", "save"),
    "TDMCompare": ("sigmas", "sampler", "compare"),
    "TDMCogVideoXSampling": ("cogvideox", "cogvideox student", "cogvideox sampling"),
    "TDMPixArtAlphaLatents": ("pixart", "pixart latents", "pixart student"),
}

_STACK = """() => {
    let y = 0;
    for (const node of app.graph._nodes_in_order) {
        for (const each of node.widgets ?? []) if (each.name === "control_after_generate") each.value = "fixed";
        node.setSize([320, node.size[1]]);
        node.pos = [0, y];
        node.updateArea();
        y += node.size[1] + 60;
    }
}"""


def english(server: Server) -> dict[str, Any]:
    """The texts of the pack's nodes as `locales/en/nodeDefs.json` has them."""
    nodes = server.get("object_info").items()
    return {name: _texts(shown) for name, shown in nodes if shown["python_module"].endswith("tdm_pack")}


def _texts(shown: dict[str, Any]) -> dict[str, Any]:
    inputs = {
        key: options for group in ("required", "optional") for key, options in shown["input"].get(group, {}).items()
    }
    return {
        "display_name": shown["display_name"],
        "description": shown["description"],
        "inputs": {
            key: {"name": options.get("display_name") or key, "tooltip": options["tooltip"]}
            for key, (_, options) in inputs.items()
        },
        "outputs": {
            str(i): {"name": name, "tooltip": tooltip}
            for i, (name, tooltip) in enumerate(zip(shown["output_name"], shown["output_tooltips"], strict=True))
        },
    }


def part(names: tuple[str, ...]) -> Graph:
    """These nodes of the workflow, and the links between them."""
    return {
        name: node(
            WORKFLOW[name]["class_type"],
            **{k: v for k, v in WORKFLOW[name]["inputs"].items() if not isinstance(v, list) or v[0] in names},
        )
        for name in names
    }


def main() -> None:
    """Write all of it."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "server")
        for name in FILES:
            file = server.models / name
            file.parent.mkdir(exist_ok=True)
            file.touch()
        ENGLISH.write_text(json.dumps(english(server), indent=2) + "\n")
        for name in PICTURES:
            shutil.copy(PAGES / f"{name}.md", PAGES / name / "en.md")
        with chromium() as browser:
            front_end = FrontEnd(browser, server.address)
            for name, names in PICTURES.items():
                front_end.from_prompt(part(names))
                front_end.page.evaluate(_STACK)
                front_end.picture(PAGES / f"{name}.jpg", scale=1.1)
        server.stop()


if __name__ == "__main__":
    main()
