"""A pipeline in diffusers' layout, for the models that ComfyUI does not know: the bundled one, Sana, fine-tunes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io, ui
from torch import nn

from ..errors import TDMError, first_line
from ..pipelines.families import Family
from .students import BUNDLED

_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


class TDMLoadDiffusers(io.ComfyNode):
    """A folder of `models/diffusers`, or the bundled pipeline, as MODEL, CLIP and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="TDMLoadDiffusers",
            display_name="Load Diffusers Pipeline",
            category="model/sampling/TDM",
            description="Loads a pipeline in diffusers' layout, run by diffusers itself: Stable Diffusion 1.5, SDXL, "
            "SD3, PixArt, CogVideoX, Flux, Sana, Wan, Z-Image, Qwen-Image, Krea 2, or the small model that comes with "
            "TDM.",
            search_aliases=["diffusers", "Sana", "bundled", "teacher", "load model", "model_index.json"],
            inputs=[
                io.Combo.Input(
                    "pipeline",
                    options=[BUNDLED, *pipelines()],
                    tooltip=f"A folder in models/diffusers that has a model_index.json; '{BUNDLED}' is the small model "
                    "that comes with TDM and draws pictures of 64 x 64.",
                )
            ],
            has_intermediate_output=True,  # shows its text also when it comes from the cache
            outputs=[
                io.Model.Output(tooltip="The denoiser. Load a student onto it with Load TDM Student."),
                io.Clip.Output(tooltip="The text encoders, for CLIP Text Encode. Empty text is no prompt at all."),
                io.Vae.Output(tooltip="The VAE, for VAE Decode and VAE Encode."),
                io.String.Output("report", tooltip="What the node shows: the pipeline, its dtype and its size."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, pipeline: str) -> str:
        """The state of its files."""
        return folder_stamp(pipeline)

    @classmethod
    def execute(cls, pipeline: str) -> io.NodeOutput:
        """(MODEL, CLIP, VAE, report).

        Raises:
            TDMError: the folder is no pipeline, of no family that is supported, or damaged; diffusers is missing.
        """
        try:
            from ..pipelines.bases import family_of_base
            from ..pipelines.scheduler import TDMScheduler
        except ImportError as error:
            raise TDMError(f"Load Diffusers Pipeline needs diffusers (pip install diffusers): {error}") from None
        from .bridge import DiffusersVAE, clip_of, model_of
        from .core_loras import serve_core_loaders

        serve_core_loaders()
        folder = folder_of(pipeline)
        family = family_of_base(folder)
        split = load_split(folder, family)
        scheduler = TDMScheduler.from_config(split.pipe.scheduler.config)
        vae = DiffusersVAE(family, split.pipe)
        network = getattr(split.pipe, family.denoiser)
        model, clip = model_of(family, split.pipe, scheduler, vae), clip_of(family, split.text, network.config)
        height, width, frames = family.default_size(split.pipe)
        text = f"{family.pipeline}, {str(network.dtype).removeprefix('torch.')}\nmade for {width} x {height}" + (
            f", {frames} frames" if frames else ""
        )
        return io.NodeOutput(model, clip, vae, text, ui=ui.PreviewText(text))


class SplitPipeline(NamedTuple):
    """A pipeline in two: with denoiser and VAE, and with text encoders and tokenizers. Both have the scheduler."""

    pipe: Any
    text: Any


def pipelines() -> list[str]:
    """The folders below `models/diffusers` that are pipelines, as paths from there."""
    folders = set()
    for root in folder_paths.get_folder_paths("diffusers"):
        for folder, inside, files in os.walk(root, followlinks=True):
            if "model_index.json" in files:
                folders.add(os.path.relpath(folder, root))
                inside.clear()
    return sorted(folders - {BUNDLED})


def folder_of(pipeline: str) -> str:
    """The folder of one of `pipelines`, or of the bundled one.

    Raises:
        TDMError: there is none.
    """
    if pipeline == BUNDLED:
        from ..pipelines.bases import base_folder

        return base_folder(BUNDLED)
    for root in folder_paths.get_folder_paths("diffusers"):
        if os.path.isfile(os.path.join(root, pipeline, "model_index.json")):
            return os.path.join(root, pipeline)
    raise TDMError(f"{pipeline} is no pipeline in models/diffusers: it has no model_index.json")


def folder_stamp(pipeline: str) -> str:
    """The state of the files of one of `pipelines`: another one when one of them was written again."""
    states = [file.stat() for file in Path(folder_of(pipeline)).rglob("*") if file.is_file()]
    newest, size = max((each.st_mtime_ns for each in states), default=0), sum(each.st_size for each in states)
    return f"{newest} {size} {len(states)}"


def load_split(folder: str, family: Family) -> SplitPipeline:
    """The pipeline of a folder on the CPU, in the dtypes that ComfyUI chooses for its devices.

    Raises:
        TDMError: a student is in its weights already; or diffusers cannot load it.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from ..pipelines.base_weights import component_classes
    from ..pipelines.students.file import MERGED_FILE

    if (Path(folder) / MERGED_FILE).is_file():
        raise TDMError(f"{folder} has a student in its weights; load its base, and the student on it")
    index: Any = DiffusionPipeline.load_config(folder)
    names = list(component_classes(index))
    management = comfy.model_management
    dtype = management.unet_dtype(management.get_torch_device(), supported_dtypes=_DTYPES)
    if dtype not in _DTYPES:
        raise TDMError(f"networks of diffusers cannot compute in {dtype}; start ComfyUI without that option")
    vae_dtype = management.vae_dtype(management.vae_device(), allowed_dtypes=[torch.bfloat16, torch.float32])
    texts = [name for name in names if name.startswith(("text_encoder", "tokenizer"))]
    rest = [name for name in names if name not in texts]

    def load(wanted: list[str]) -> Any:
        absent = {name: None for name in names if name not in (*wanted, "scheduler")}
        try:
            pipe = family.pipeline_class().from_pretrained(
                folder, dtype={"default": dtype, "vae": vae_dtype}, local_files_only=True, **absent
            )
        except management.OOM_EXCEPTION:
            raise
        except Exception as error:  # diffusers and transformers refuse a damaged folder in many ways
            raise TDMError(f"diffusers cannot load {folder}: {first_line(error)}") from None
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)
        return pipe

    return SplitPipeline(load(rest), load(texts))
