"""A pipeline of diffusers as ComfyUI's MODEL, CLIP and VAE.

The networks stay diffusers': what calls them is `pipelines/families`, as in training. ComfyUI loads and offloads them,
patches their weights, and samples.
"""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import comfy.conds
import comfy.hooks
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import comfy.sd
import comfy.supported_models_base
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..errors import TDMError
from ..pipelines.families import Condition, Family, Size
from .levels import sampling_on
from .prompts import encode

_BRIDGED = "a {} of Load Diffusers Pipeline"
_IN_CONDITIONING = {"pooled": "pooled_output", "mask": "attention_mask"}  # core's names; "mask" is an area's there


class WholePatcher(ModelPatcher):
    """Loads a network whole or not at all: a layer of diffusers cannot fetch a weight that was left behind."""

    def load(
        self,
        device_to: Any = None,
        lowvram_model_memory: float = 0,  # noqa: ARG002
        force_patch_weights: bool = False,
        full_load: bool = False,  # noqa: ARG002
    ) -> None:
        """Load all layers as core's patcher does."""
        super().load(device_to, force_patch_weights=force_patch_weights, full_load=True)

    def partially_unload(self, *_: Any, **__: Any) -> int:
        """Free nothing, so that core unloads the network as a whole."""
        return 0

    def set_model_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Accept None and the dtype that the network has.

        Raises:
            TDMError: the dtype is another one: a layer of diffusers computes in the dtype of its weights.
        """
        if dtype not in (None, self.model_dtype()):
            raise TDMError(
                f"ModelComputeDtype does not fit {_BRIDGED.format('MODEL')}, which computes in {self.model_dtype()}: "
                "start ComfyUI with --bf16-unet, --fp16-unet or --fp32-unet"
            )


# ---------------------------------------------------------------------- MODEL


class NotOurLayoutError(TDMError, AttributeError):
    """A node asks for something that ComfyUI's own networks have. An AttributeError, so that `hasattr` says no."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"this node reads {name} of ComfyUI's own networks: it does not fit {_BRIDGED.format('MODEL')}"
        )


class _Config(dict[str, Any]):
    """The `unet_config` of a MODEL, whose entries core's nodes such as FreeU look up."""

    def __missing__(self, name: str) -> Any:
        raise NotOurLayoutError(name)


class Denoiser(nn.Module):
    """A denoiser of diffusers, called as ComfyUI calls its networks."""

    def __init__(self, family: Family, network: Any) -> None:
        super().__init__()
        self.family, self.network = family, network

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the network computes in."""
        return self.network.dtype

    @property
    def in_channels(self) -> int:
        """The number of latent channels, which core's RenormCFG reads."""
        return self.network.config.in_channels

    def __getattr__(self, name: str) -> Any:
        """Refuse an attribute that core's own networks have and this one lacks.

        Raises:
            NotOurLayoutError: always, except for the module's own attributes.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise NotOurLayoutError(name) from None

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: None = None,  # noqa: ARG002
        control: Any = None,
        transformer_options: Any = None,
        **cond: Tensor,
    ) -> Tensor:
        """The prediction at x, [B, C, h, w] or [B, C, F, h, w], in its shape.

        Raises:
            TDMError: a patch fits only ComfyUI's own networks.
        """
        options = transformer_options or {}
        if control is not None or options.get("patches") or options.get("patches_replace"):
            raise TDMError("ControlNets and patches of attention do not fit a MODEL of Load Diffusers Pipeline")
        if not self.family.frames_first:
            return self.family.denoise(self.network, x, timesteps, cond)
        return self.family.denoise(self.network, x.transpose(1, 2), timesteps, cond).transpose(1, 2)


class DiffusersModel(comfy.model_base.BaseModel):
    """The BaseModel of a denoiser of diffusers.

    Attributes:
        family: of the pipeline.
        pipe: denoiser, VAE and scheduler; no text encoders.
    """

    def __init__(self, family: Family, pipe: Any, schedule: Any, rgb: Any) -> None:
        """Args: schedule is the base's as a `TDMScheduler`, rgb the preview's factors and bias."""
        config = comfy.supported_models_base.BASE({"disable_unet_model_creation": True})
        config.latent_format = _latent_format(family, pipe, rgb)
        config.memory_usage_factor = 2.0 * (spatial_factor(family, pipe) / 8) ** 2  # core counts pixels of the latents
        config.unet_config = _Config(config.unet_config)
        super().__init__(config)
        self.family, self.pipe = family, pipe
        self.diffusion_model = Denoiser(family, getattr(pipe, family.denoiser))
        self.model_sampling = sampling_on(schedule.schedule, schedule.config["prediction_type"], _shift(schedule))
        self._steps = schedule.schedule.num_train_timesteps

    def process_timestep(self, timestep: Tensor, **_: Any) -> Tensor:
        """The scheduler's clock, whatever the clock of the `model_sampling` that the user has put on the model.

        A level was rounded to float32: a timestep within 0.001 of a whole one is that one.
        """
        if isinstance(self.model_sampling, comfy.model_sampling.CONST):
            timestep = timestep * (self._steps / float(self.model_sampling.timestep(torch.ones(1))))
        whole = timestep.round()
        return torch.where((timestep - whole).abs() < 1e-3, whole, timestep)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """The condition of one prompt, as `Family.denoise` takes it.

        Raises:
            TDMError: the latents do not fit, or the prompt is of another CLIP.
        """
        noise = kwargs["noise"]
        text = {"text": kwargs["cross_attn"]}
        for name in ("pooled", "mask", "length"):
            if (value := kwargs.get(_IN_CONDITIONING.get(name, name))) is not None:
                text[name] = value
        size = self._size(noise)
        scale = kwargs.get("guidance")
        options = {} if scale is None else {"guidance_scale": float(scale)}
        missing = sorted(set(self.family.blank(self.pipe, 1, size)) - set(text) - {*_FACTS})
        if missing:
            raise TDMError(
                f"this MODEL needs prompts from the CLIP of its own loader: this one has no {', '.join(missing)}"
            )
        if "mask" in text and text["mask"].shape[1] != text["text"].shape[1]:
            raise TDMError("prompts of this CLIP have a mask and cannot be concatenated; use Conditioning (Combine)")
        cond = text | self.family.facts(self.pipe, text, size, **options)
        # Not CONDCrossAttn: it would repeat the shorter of two prompts, which masked and joint attention can tell.
        return {name: comfy.conds.CONDRegular(value) for name, value in cond.items()}

    def state_dict_for_saving(self, *_: Any, **__: Any) -> Any:
        """Raise TDMError: a checkpoint has the names of ComfyUI's own networks, and these have diffusers'."""
        raise TDMError(f"{_BRIDGED.format('MODEL')} cannot be saved as a checkpoint: its folder is in models/diffusers")

    def _size(self, x: Tensor) -> Size:
        """Return the size of latents x in pixels."""
        channels = self.latent_format.latent_channels
        if x.shape[1] != channels:
            raise TDMError(f"latents of {x.shape[1]} channels; this model's have {channels}: encode with its own VAE")
        size = size_of(self.family, self.pipe, x)
        self.family.check_size(self.pipe, size)
        patch = getattr(self.diffusion_model.network.config, "patch_size_t", None) or 1
        if x.ndim == 5 and x.shape[2] % patch:
            step = patch * self.latent_format.temporal_downscale_ratio
            raise TDMError(f"{size.num_frames} frames do not fit this model: add or take away {step // patch}")
        return size


_FACTS = ("sizes", "resolution", "aspect_ratio", "guidance")  # `Family.facts` tells them, not the prompt


def spatial_factor(family: Family, pipe: Any) -> int:
    """Pixels per latent pixel."""
    side = family.multiple(pipe)
    return side // family.latent_shape(pipe, Size(side, side, 1))[-1]


def frame_factor(family: Family, pipe: Any) -> int:
    """Frames per latent frame, except the first latent frame, which is one frame."""
    return pipe.vae_scale_factor_temporal if family.video else 1


def size_of(family: Family, pipe: Any, latents: Tensor) -> Size:
    """The size of latents in ComfyUI's layout, in pixels."""
    height, width = (side * spatial_factor(family, pipe) for side in latents.shape[-2:])
    frames = (latents.shape[2] - 1) * frame_factor(family, pipe) + 1 if family.video else None
    return Size(height, width, frames)


def _latent_format(family: Family, pipe: Any, rgb: tuple[list[list[float]], list[float]]) -> Any:
    form = comfy.latent_formats.LatentFormat()
    form.latent_channels = family.latent_channels(pipe)
    form.latent_dimensions = 3 if family.video else 2
    form.spacial_downscale_ratio = spatial_factor(family, pipe)
    form.temporal_downscale_ratio = frame_factor(family, pipe)
    form.latent_rgb_factors, form.latent_rgb_factors_bias = rgb
    return form


def _shift(scheduler: Any) -> float:
    """Return the shift of a flow model; one that shifts by the picture's size has that of its largest, as in core."""
    config = scheduler.config
    if not config["use_dynamic_shifting"]:
        return config["flow_shift"]
    return math.exp(config["max_shift"]) if config["time_shift_type"] == "exponential" else config["max_shift"]


def model_of(family: Family, pipe: Any, scheduler: Any, vae: Any) -> Any:
    """The MODEL of a pipeline.

    Args:
        family: of the pipeline.
        pipe: with the denoiser and the VAE.
        scheduler: the base's, as a `TDMScheduler`.
        vae: the VAE of the pipeline, which previews need.
    """
    model = DiffusersModel(family, pipe, scheduler, rgb_factors(vae, family.latent_channels(pipe)))
    device = comfy.model_management.get_torch_device()
    return WholePatcher(model, device, comfy.model_management.unet_offload_device())


# ---------------------------------------------------------------------- CLIP


class TextEncoders(nn.Module):
    """The text encoders of a pipeline, by their names in it, called as ComfyUI calls its networks."""

    def __init__(self, family: Family, pipe: Any) -> None:
        super().__init__()
        self.family, self.pipe = family, pipe
        for name, part in pipe.components.items():
            if name.startswith("text_encoder") and part is not None:
                self.add_module(name, part)
        self.dtypes = {parameter.dtype for parameter in self.parameters()}

    def reset_clip_options(self) -> None:
        """Do nothing: no option is kept between prompts."""

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """Raise TDMError for the one option that would change something (CLIP Set Last Layer)."""
        if options.get("layer") is not None:
            raise TDMError("CLIP Set Last Layer does not fit a CLIP of Load Diffusers Pipeline")

    def encode_token_weights(self, tokens: dict[str, str]) -> tuple[Tensor, Tensor | None, Condition]:
        """(text [1, L, D], pooled [1, D] if there is one, the rest). No text at all is the unconditional prompt."""
        cond = encode(self.family, self.pipe, tokens["prompt"])
        device = comfy.model_management.intermediate_device()
        cond = {_IN_CONDITIONING.get(name, name): value.to(device) for name, value in cond.items()}
        return cond.pop("text"), cond.pop("pooled_output", None), cond


class _Tokens(dict[str, str]):
    """A prompt in the place of tokens."""

    def __missing__(self, name: str) -> Any:
        raise TDMError(
            f"this node has a prompt for each text encoder ({name}), and {_BRIDGED.format('CLIP')} has one for all: "
            "use CLIP Text Encode, with FluxGuidance for Flux"
        )


class Prompt:
    """A stand-in for a tokenizer. The pipeline has a tokenizer and does to a prompt what its family does."""

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: Any) -> Any:  # noqa: ARG002
        """The text itself: its weights and embeddings are read when it is encoded."""
        return _Tokens(prompt=text)

    def state_dict(self) -> dict[str, Any]:
        """Raise TDMError: core asks when a CLIP is saved."""
        raise TDMError(f"{_BRIDGED.format('CLIP')} cannot be saved: its folder is in models/diffusers")


def clip_of(family: Family, pipe: Any, denoiser_config: Any) -> Any:
    """The CLIP of a pipeline that has text encoders and tokenizers only.

    Args:
        family: of the pipeline.
        pipe: its text encoders run where ComfyUI puts them.
        denoiser_config: which some pipelines ask for the length of a prompt.
    """
    setattr(pipe, family.denoiser, SimpleNamespace(config=denoiser_config))
    encoders = TextEncoders(family, pipe)
    target = comfy.supported_models_base.ClipTarget(lambda **_: Prompt(), lambda **_: encoders)
    # No initial device, or core would load it with the patcher that is replaced here.
    clip = comfy.sd.CLIP(target, model_options={"dtype": next(iter(encoders.dtypes)), "initial_device": None})
    clip.patcher = WholePatcher(encoders, clip.patcher.load_device, clip.patcher.offload_device)
    clip.patcher.hook_mode, clip.patcher.is_clip = comfy.hooks.EnumHookMode.MinVram, True
    return clip


# ---------------------------------------------------------------------- VAE


class Autoencoder(nn.Module):
    """The VAE of a pipeline, its latents as the denoiser knows them, called as ComfyUI calls its networks."""

    def __init__(self, family: Family, pipe: Any) -> None:
        super().__init__()
        self.family, self.pipe, self.vae = family, pipe, pipe.vae

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] or [B, C, F, h, w] to pixels in [-1, 1], [B, 3, H, W] or [B, 3, F, H, W]."""
        size = size_of(self.family, self.pipe, latents)
        if self.family.frames_first:
            latents = latents.transpose(1, 2)
        pixels = self.family.pixels(self.pipe, latents, size)
        return (pixels.transpose(1, 2) if self.family.video else pixels).float()

    def encode(self, pixels: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] to latents [B, C, h, w].

        Raises:
            TDMError: the family makes videos.
        """
        return self.family.encode_pictures(self.pipe, pixels)


class DiffusersVAE(comfy.sd.VAE):
    """Core's VAE around one of diffusers: core splits batches, and tiles where memory runs out."""

    def __init__(self, family: Family, pipe: Any) -> None:
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)  # core says that an empty state dict has no VAE
        try:
            super().__init__(sd={})
        finally:
            logging.disable(before)
        factor, frames = spatial_factor(family, pipe), frame_factor(family, pipe)
        self.first_stage_model = Autoencoder(family, pipe)
        self.latent_channels = family.latent_channels(pipe)
        self.downscale_ratio: Any = factor
        self.upscale_ratio: Any = factor
        if family.video:
            self.latent_dim = 3
            self.downscale_ratio = (lambda n: (n + frames - 1) // frames, factor, factor)
            self.upscale_ratio = (lambda n: max(0, (n - 1) * frames + 1), factor, factor)
            self.downscale_index_formula = self.upscale_index_formula = (frames, factor, factor)
        per_pixel = 7000 if family.video else 2178  # core's own, of Wan and of AutoencoderKL
        self.memory_used_decode = lambda shape, dtype: math.prod(shape[-2:]) * factor**2 * per_pixel * dtype.itemsize
        self.memory_used_encode = lambda shape, dtype: math.prod(shape[-2:]) * per_pixel * dtype.itemsize
        self.device, self.vae_dtype = comfy.model_management.vae_device(), pipe.vae.dtype
        self.output_device = comfy.model_management.intermediate_device()
        self.patcher = WholePatcher(self.first_stage_model, self.device, comfy.model_management.vae_offload_device())

    def get_sd(self) -> Any:
        """Raise TDMError: core asks when a VAE is saved."""
        raise TDMError(f"{_BRIDGED.format('VAE')} cannot be saved: its folder is in models/diffusers")


def rgb_factors(vae: DiffusersVAE, channels: int) -> tuple[list[list[float]], list[float]]:
    """Return what ComfyUI makes quick previews with: (factors [C, 3], bias [3]) from latents to RGB in [-1, 1].

    Least squares on what the VAE makes of random latents without detail.
    """
    generator = torch.Generator().manual_seed(0)
    z = interpolate(torch.randn(8, channels, 4, 4, generator=generator), scale_factor=2)
    images = vae.decode(z.unsqueeze(2) if vae.latent_dim == 3 else z).float().cpu()
    rgb = interpolate(images.reshape(8, *images.shape[-3:]).movedim(-1, 1), size=z.shape[-2:], mode="area")
    inputs = torch.cat([z, torch.ones_like(z[:, :1])], 1).movedim(1, -1).flatten(0, -2)
    *factors, bias = torch.linalg.lstsq(inputs, 2 * rgb.movedim(1, -1).flatten(0, -2) - 1).solution.tolist()
    return factors, bias
