"""A MODEL whose network is one formula, in ComfyUI's real sampling path."""

from __future__ import annotations

import time

import comfy.model_base
import comfy.model_management
import comfy.supported_models as supported
import torch
from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import ComfyExtension, io

from .network import network
from .text import TestClip

KINDS = {
    "epsilon": (comfy.model_base.BaseModel, supported.SD15, ModelType.EPS),
    "v_prediction": (comfy.model_base.BaseModel, supported.SD15, ModelType.V_PREDICTION),
    "flow_prediction": (comfy.model_base.BaseModel, supported.SD15, ModelType.FLOW),
    "edm": (comfy.model_base.BaseModel, supported.SD15, ModelType.EDM),
    "cogvideox": (comfy.model_base.CogVideoX, supported.CogVideoX_T2V, ModelType.V_PREDICTION_DDPM),
    "pixart": (comfy.model_base.PixArt, supported.PixArtSigma, ModelType.EPS),  # as ComfyUI detects PixArt-alpha 512
}


class Network(torch.nn.Module):
    """`network` as ComfyUI calls a diffusion model; CogVideoX asks its own for the two numbers."""

    dtype = torch.float32
    in_channels = 16
    ofs_proj_dim = None

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x, timesteps, context, **_):
        time.sleep(self.seconds)
        each = (len(x), *[1] * (x.ndim - 1))  # prompts of one batch differ
        return network(x, timesteps.reshape(each), context.mean((1, 2)).reshape(each))


class TestModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TestModel",
            category="test",
            inputs=[
                io.Combo.Input("kind", options=list(KINDS)),
                io.Float.Input("shift", default=1.0),
                io.Float.Input("context", default=0.0),
                io.Float.Input("seconds", default=0.0, tooltip="How long a network call takes."),
            ],
            outputs=[io.Model.Output(), io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, kind, shift, context, seconds):
        base, config_class, model_type = KINDS[kind]
        config = config_class({"disable_unet_model_creation": True})
        if kind == "flow_prediction":
            config.sampling_settings = {"shift": shift}
        model = base(config, model_type)
        model.diffusion_model = Network(seconds)
        device = comfy.model_management.get_torch_device()
        conditioning = [[torch.full((1, 1, 4), context), {}]]
        return io.NodeOutput(ModelPatcher(model, device, torch.device("cpu")), conditioning)


class TestPrompt(io.ComfyNode):
    """What a text encoder would give a real network."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Int.Input("width")]
        return io.Schema(node_id="TestPrompt", category="test", inputs=inputs, outputs=[io.Conditioning.Output()])

    @classmethod
    def execute(cls, width):
        return io.NodeOutput([[torch.linspace(-1, 1, 7 * width).reshape(1, 7, width), {}]])


class TestSigmas(io.ComfyNode):
    """Shows SIGMAS to the client."""

    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="TestSigmas", category="test", inputs=[io.Sigmas.Input("sigmas")], is_output_node=True)

    @classmethod
    def execute(cls, sigmas):
        return io.NodeOutput(ui={"sigmas": sigmas.tolist()})


class TestFresh(io.ComfyNode):
    """What depends on it runs again for each `nonce`: the server keeps the results of nodes that it has run."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Latent.Input("latent"), io.Int.Input("nonce")]
        return io.Schema(node_id="TestFresh", category="test", inputs=inputs, outputs=[io.Latent.Output()])

    @classmethod
    def execute(cls, latent, nonce):
        return io.NodeOutput({**latent, "nonce": nonce})


class TestLittleMemory(io.ComfyNode):
    """Has core load a MODEL with memory for half of it."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Model.Input("model")]
        return io.Schema(node_id="TestLittleMemory", category="test", inputs=inputs, outputs=[io.Model.Output()])

    @classmethod
    def execute(cls, model):
        model.detach()
        model.partially_load(model.load_device, model.model_size() // 2)
        return io.NodeOutput(model)


class TestVideoLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="TestVideoLatent", category="test", outputs=[io.Latent.Output()])

    @classmethod
    def execute(cls):
        return io.NodeOutput({"samples": torch.zeros(1, 16, 3, 8, 8)})


class TestPack(ComfyExtension):
    async def get_node_list(self):
        return [TestModel, TestPrompt, TestSigmas, TestFresh, TestLittleMemory, TestVideoLatent, TestClip]
