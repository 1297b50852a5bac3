"""A node that draws from a checkpoint, a student and a prompt. It runs the same nodes as a longer workflow."""

from __future__ import annotations

from typing import Any

import folder_paths
from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder

from ..errors import TDMError
from .load_diffusers import folder_stamp, pipelines
from .loader import BY_ITSELF
from .sigmas import TYPED
from .students import BUNDLED, RELEASED, file_stamp, recipe_of


class TDMGenerate(io.ComfyNode):
    """Everything that a picture takes, set as the student's recipe says."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="TDMGenerate",
            display_name="TDM Generate",
            category="model/sampling/TDM",
            description="Draws pictures from a checkpoint, a TDM student and a prompt, with the student's own "
            "timesteps, order, guidance and size. It runs the nodes that a longer workflow is made of, and gives the "
            "same picture as they do.",
            search_aliases=["text to image", "txt2img", "simple", "few-step", "trajectory distribution matching"],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=[BUNDLED, *folder_paths.get_filename_list("checkpoints"), *pipelines()],
                    tooltip="The student's base, or a fine-tune of it: a file in models/checkpoints with its CLIP and "
                    f"VAE, or a pipeline in models/diffusers; '{BUNDLED}' is the small model that comes with TDM.",
                ),
                io.Combo.Input(
                    "student",
                    options=[BUNDLED, *folder_paths.get_filename_list("loras")],
                    tooltip=f"The file, in models/loras; '{BUNDLED}' is the student that comes with TDM.",
                ),
                io.Combo.Input(
                    "released_as",
                    options=[BY_ITSELF, *RELEASED],
                    tooltip="For a released student whose file was renamed: which one it is.",
                ),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True, tooltip="What to draw."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Another seed is another picture of the prompt.",
                ),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=16384,
                    step=8,
                    tooltip="In pixels; 0 is the width that the student was trained for.",
                ),
                io.Int.Input(
                    "height",
                    default=0,
                    min=0,
                    max=16384,
                    step=8,
                    tooltip="In pixels; 0 is the height that the student was trained for.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="How many pictures at once."),
            ],
            outputs=[io.Image.Output(tooltip="The pictures.")],
            enable_expand=True,
        )

    @classmethod
    def fingerprint_inputs(cls, student: str, checkpoint: str = BUNDLED, **_: Any) -> str:
        """The state of the student's file, and of the files of a pipeline of diffusers."""
        return f"{file_stamp(student)} {folder_stamp(checkpoint) if checkpoint in (BUNDLED, *pipelines()) else ''}"

    @classmethod
    def execute(
        cls,
        checkpoint: str,
        student: str,
        released_as: str,
        prompt: str,
        seed: int,
        width: int,
        height: int,
        batch_size: int,
    ) -> io.NodeOutput:
        """(IMAGE), of the nodes that run in the place of this one.

        Raises:
            TDMError: the student's file has no recipe, one of another method, or one for videos.
        """
        recipe = recipe_of(student if released_as == BY_ITSELF else released_as)
        if recipe.num_frames:
            raise TDMError(f"{student} makes videos; TDM Generate draws pictures: use its example workflow")
        graph = GraphBuilder()
        if checkpoint in (BUNDLED, *pipelines()):
            base = graph.node("TDMLoadDiffusers", pipeline=checkpoint)
        else:
            base = graph.node("CheckpointLoaderSimple", ckpt_name=checkpoint)
        loaded = graph.node(
            "TDMLoadStudent",
            model=base.out(0),
            clip=base.out(1),
            file=student,
            released_as=released_as,
            strength=1.0,
        )
        model, clip, text = (loaded.out(i) for i in range(3))
        levels = graph.node("TDMSigmas", model=model, student=TYPED, timesteps="", steps=0, denoise=1.0, recipe=text)
        positive = graph.node("CLIPTextEncode", clip=clip, text=prompt).out(0)
        if recipe.guidance_scale > 1:
            negative = graph.node("CLIPTextEncode", clip=clip, text="").out(0)
            prompts = {"positive": positive, "negative": negative}
            guider = graph.node("CFGGuider", model=levels.out(0), cfg=recipe.guidance_scale, **prompts)
        else:
            guider = graph.node("BasicGuider", model=levels.out(0), conditioning=positive)
        size = {"width": width or recipe.width, "height": height or recipe.height}
        samples = graph.node(
            "SamplerCustomAdvanced",
            noise=graph.node("RandomNoise", noise_seed=seed).out(0),
            guider=guider.out(0),
            sampler=graph.node("TDMSampler", order=levels.out(2)).out(0),
            sigmas=levels.out(1),
            latent_image=graph.node("EmptyLatentImage", batch_size=batch_size, **size).out(0),
        )
        pictures = graph.node("VAEDecode", samples=samples.out(0), vae=base.out(2))
        return io.NodeOutput(pictures.out(0), expand=graph.finalize())
