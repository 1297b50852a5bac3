"""The models that `tdm bench` runs: the bundled one, and four real architectures with random weights.

The configs are those of the released SDXL base 1.0, SD3 medium, PixArt-alpha XL 1024 and CogVideoX-2B. Text encoders
are left out and prompts are random embeddings: gigabytes, and one call of theirs costs every sampler the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

from ..errors import TDMError
from ..pipelines.families import family_of_name
from ..pipelines.loras.pairs import Lora
from ..pipelines.students.file import Student
from ..pipelines.students.recipe import StudentRecipe
from ..pipelines.tdm_pipeline import TDMPipeline

_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
_TINY_VAE = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}


@dataclass(frozen=True)
class BenchModel:
    """One architecture; the `tiny_...` entries replace those of the full size, for a trial on any machine.

    Attributes:
        family: a name of `families`, and of the model.
        network, options: class and config of the denoiser.
        vae, vae_options: the same for the autoencoder.
        scheduler, schedule: the same for the stock scheduler.
        embeds: shapes of the prompt embeddings that a call takes, by argument.
        tokens: tokens of the prompt, if the pipeline takes a mask for it.
        size: width and height in pixels, and frames of a video.
    """

    family: str
    network: str
    options: dict[str, Any]
    tiny_options: dict[str, Any]
    vae_options: dict[str, Any]
    tiny_vae_options: dict[str, Any]
    scheduler: str
    schedule: dict[str, Any]
    embeds: dict[str, tuple[int, ...]]
    tiny_embeds: dict[str, tuple[int, ...]]
    size: tuple[int, int, int | None] = (1024, 1024, None)
    tiny_size: tuple[int, int, int | None] = (64, 64, None)
    vae: str = "AutoencoderKL"
    components: tuple[str, ...] = ("text_encoder", "tokenizer")  # that are None

    def denoiser(self, *, tiny: bool = False) -> Any:
        """The network with fresh random weights, on torch's default device."""
        return getattr(diffusers, self.network)(**self.options | (self.tiny_options if tiny else {}))

    def autoencoder(self, *, tiny: bool = False) -> Any:
        """The autoencoder with fresh random weights, on torch's default device."""
        return getattr(diffusers, self.vae)(**self.vae_options | (self.tiny_vae_options if tiny else {}))


_MODELS = (
    BenchModel(
        family="sdxl",
        network="UNet2DConditionModel",
        options={
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "use_linear_projection": True,
        },
        tiny_options={
            "sample_size": 8,
            "block_out_channels": (8, 8, 16),
            "transformer_layers_per_block": 1,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 8,
        },
        vae_options={**_SD_VAE, "scaling_factor": 0.13025, "sample_size": 1024},
        tiny_vae_options=_TINY_VAE,
        scheduler="EulerDiscreteScheduler",
        schedule={**_SD_BETAS, "steps_offset": 1, "timestep_spacing": "leading"},
        embeds={"prompt_embeds": (1, 77, 2048), "pooled_prompt_embeds": (1, 1280)},
        tiny_embeds={"prompt_embeds": (1, 77, 16), "pooled_prompt_embeds": (1, 8)},
        components=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    ),
    BenchModel(
        family="sd3",
        network="SD3Transformer2DModel",
        options={
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        tiny_options={
            "sample_size": 8,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 16,
        },
        vae_options={
            **_SD_VAE,
            "latent_channels": 16,
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        tiny_vae_options=_TINY_VAE,
        scheduler="FlowMatchEulerDiscreteScheduler",
        schedule={"shift": 3.0},
        embeds={"prompt_embeds": (1, 333, 4096), "pooled_prompt_embeds": (1, 2048)},
        tiny_embeds={"prompt_embeds": (1, 20, 16), "pooled_prompt_embeds": (1, 16)},
        components=tuple(f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")),
    ),
    BenchModel(
        family="pixart",
        network="PixArtTransformer2DModel",
        options={"sample_size": 128, "caption_channels": 4096},  # the rest are the class's defaults
        tiny_options={
            "sample_size": 8,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 16,
        },
        vae_options=_SD_VAE,
        tiny_vae_options=_TINY_VAE,
        scheduler="DPMSolverMultistepScheduler",
        schedule={},
        embeds={"prompt_embeds": (1, 120, 4096), "prompt_attention_mask": (1, 120)},
        tiny_embeds={"prompt_embeds": (1, 20, 16), "prompt_attention_mask": (1, 20)},
    ),
    BenchModel(
        family="cogvideox",
        network="CogVideoXTransformer3DModel",
        options={},  # the class's defaults are CogVideoX-2B
        tiny_options={
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "time_embed_dim": 8,
            "text_embed_dim": 16,
            "num_layers": 2,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 9,
        },
        vae="AutoencoderKLCogVideoX",
        vae_options={
            "down_block_types": ("CogVideoXDownBlock3D",) * 4,
            "up_block_types": ("CogVideoXUpBlock3D",) * 4,
            "block_out_channels": (128, 256, 256, 512),
            "latent_channels": 16,
        },
        tiny_vae_options=_TINY_VAE,
        scheduler="CogVideoXDDIMScheduler",
        schedule={
            **_SD_BETAS,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "snr_shift_scale": 3.0,
            "timestep_spacing": "trailing",
            "clip_sample": False,
        },
        embeds={"prompt_embeds": (1, 226, 4096)},
        tiny_embeds={"prompt_embeds": (1, 226, 16)},
        size=(720, 480, 49),
        tiny_size=(64, 64, 9),
    ),
)
MODELS = {model.family: model for model in _MODELS}
BUNDLED_PROMPT = "two red stars above a blue moon at night"


def check_steps(name: str, steps: int) -> None:
    """Raise TDMError if a model's stock pipeline, which the student is compared with, cannot make that many steps."""
    if steps == 1 and name in ("bundled", "pixart"):
        raise TDMError(
            f"--steps 1 cannot be measured for {name}: diffusers' PixArt pipeline makes one step with DMD's sampler "
            "alone; take 2 or more"
        )


def build(
    name: str, *, tiny: bool, device: torch.device, dtype: torch.dtype, steps: int
) -> tuple[TDMPipeline, dict[str, Any]]:
    """(pipeline with a student, arguments of its call) of "bundled" or a name of `MODELS`.

    Args:
        tiny: a small variant of the architecture.
        device, dtype: of the networks.
        steps: network calls of the student.
    """
    if name == "bundled":
        pipe = TDMPipeline.from_pretrained(dtype=dtype).to(device)
        return pipe, {"prompt": BUNDLED_PROMPT, "num_inference_steps": steps}
    model = MODELS[name]
    family = family_of_name(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with device:
            components = {family.denoiser: model.denoiser(tiny=tiny), "vae": model.autoencoder(tiny=tiny)}
        shapes = model.tiny_embeds if tiny else model.embeds
        call = {argument: torch.randn(shape).to(device, dtype) for argument, shape in shapes.items()}
    for part in components.values():
        part.to(dtype).eval().requires_grad_(False)
    if "prompt_attention_mask" in call:
        call["prompt_attention_mask"] = torch.ones_like(call["prompt_attention_mask"])
    scheduler = getattr(diffusers, model.scheduler)(**model.schedule)
    nothing: dict[str, Any] = dict.fromkeys(model.components)
    stock: Any = getattr(diffusers, family.pipeline)(**components, scheduler=scheduler, **nothing)
    width, height, frames = model.tiny_size if tiny else model.size
    recipe = StudentRecipe(
        base_model="random weights",
        family=family.name,
        prediction_type=getattr(scheduler.config, "prediction_type", "flow_prediction"),
        trained_timesteps={steps: [float(999 * (steps - i) // steps) for i in range(steps)]},
        guidance_scale=1.0,
        height=height,
        width=width,
        num_frames=frames,
    )
    student = Student(recipe, {family.denoiser: _lora(components[family.denoiser])})
    return TDMPipeline.from_pipe(stock, student=student), call


def _lora(denoiser: nn.Module, rank: int = 16) -> dict[str, Lora]:
    """A LoRA of zeros on the attention projections: what a student's costs, whatever is in it."""
    return {
        name: Lora(torch.zeros(rank, layer.in_features), torch.zeros(layer.out_features, rank))
        for name, layer in denoiser.named_modules()
        if isinstance(layer, nn.Linear) and name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    }
