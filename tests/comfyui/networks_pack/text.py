"""A small CLIP, where released ones are gigabytes."""

from __future__ import annotations

import comfy.sd
import comfy.sdxl_clip
import torch
from comfy.supported_models_base import ClipTarget
from comfy_api.latest import io


class TestClip(io.ComfyNode):
    """Both text encoders of SDXL, with random weights, the same each time."""

    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="TestClip", category="test", inputs=[], outputs=[io.Clip.Output()])

    @classmethod
    def execute(cls):
        small = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3}
        options = {f"{name}_model_config": small for name in ("clip_l", "clip_g")}
        target = ClipTarget(comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel)
        clip = comfy.sd.CLIP(target, model_options={**options, "dtype": torch.float32})
        generator = torch.Generator().manual_seed(0)
        for parameter in clip.cond_stage_model.parameters():
            parameter.data.normal_(generator=generator)
        return io.NodeOutput(clip)
