"""Patches for models that ComfyUI samples wrongly. Tried on ComfyUI 0.30."""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import comfy.model_base
from comfy_api.latest import io

from ..errors import TDMError
from ..pipelines.schedule import NoiseSchedule
from .levels import sampling_on


class CogVideoXSampling(io.ComfyNode):
    """A node that puts CogVideoX on its noise schedule, for any sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="TDMCogVideoXSampling",
            display_name="TDM CogVideoX Sampling",
            category="model/sampling/TDM",
            description="Lets any sampler run CogVideoX right: its network is given unit-variance samples (ComfyUI "
            "gives it unscaled ones), on the noise schedule that it was trained on.",
            search_aliases=["CogVideoX", "v-prediction", "snr shift", "ModelSampling"],
            inputs=[
                io.Model.Input("model", tooltip="A CogVideoX model, straight from its loader or with LoRAs."),
                io.Float.Input(
                    "snr_shift_scale",
                    default=3.0,
                    min=0.1,
                    max=10.0,
                    step=0.1,
                    tooltip="As in the model's scheduler_config.json: 3 for CogVideoX-2B, 1 for CogVideoX-5B and 1.5.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model to sample.")],
        )

    @classmethod
    def execute(cls, model: Any, snr_shift_scale: float) -> io.NodeOutput:
        """Return a MODEL with the `model_sampling` of CogVideoX.

        Raises:
            TDMError: the model is no CogVideoX.
        """
        if not isinstance(model.model, comfy.model_base.CogVideoX):
            raise TDMError(f"this is a {type(model.model).__name__} model; TDM CogVideoX Sampling is for CogVideoX")
        patched = model.clone()
        schedule = NoiseSchedule.vp(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            rescale_betas_zero_snr=True,
            snr_shift_scale=snr_shift_scale,
        )
        patched.add_object_patch("model_sampling", sampling_on(schedule, "v_prediction"))
        return io.NodeOutput(patched)


class PixArtAlphaLatents(io.ComfyNode):
    """PixArt-alpha with the latent scale of its VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="TDMPixArtAlphaLatents",
            display_name="TDM PixArt-alpha Latents",
            category="model/sampling/TDM",
            description="For PixArt-alpha 512, which ComfyUI takes for PixArt-Sigma and gives the latent scale 0.13025 "
            "of the SDXL VAE: sets the 0.18215 of its own VAE, that of SD1.5.",
            search_aliases=["PixArt", "latent scale", "latent format"],
            inputs=[io.Model.Input("model", tooltip="A PixArt-alpha model, straight from its loader or with LoRAs.")],
            outputs=[io.Model.Output(tooltip="The model to sample.")],
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        """A MODEL with the latent format of SD1.5.

        Raises:
            TDMError: the model is no PixArt.
        """
        if not isinstance(model.model, comfy.model_base.PixArt):
            raise TDMError(f"this is a {type(model.model).__name__} model; TDM PixArt-alpha Latents is for PixArt")
        patched = model.clone()
        patched.add_object_patch("latent_format", comfy.latent_formats.SD15())
        return io.NodeOutput(patched)
