"""What every model family answers: how to load, prompt, call, adapt, size and decode it. One file each.

Sampling goes through the family's stock pipeline; training calls the network itself. Both ask here, so that a student
is trained on the very network calls that later sample it (tests/pipelines/test_families.py compares the two).
Nothing in this package imports diffusers until a pipeline class is asked for.
"""

from __future__ import annotations

import importlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import TDMError

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

Condition = dict[str, Tensor]
"""What a prompt becomes: tensors [B, ...] by name; {} is unconditional."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")


class Size(NamedTuple):
    """The size of a picture or video, in pixels; `num_frames` is None for a picture."""

    height: int
    width: int
    num_frames: int | None = None


class TeacherCall(NamedTuple):
    """How a base is run as a teacher: its steps, and its guidance scale as in a recipe (1.0 is none)."""

    steps: int
    guidance_scale: float

    @property
    def guided(self) -> bool:
        """Whether there is guidance, by a second prediction or as an input of the network."""
        return self.guidance_scale != 1.0


@dataclass(frozen=True, eq=False)
class Family(ABC):
    """One row of the registry: a family on one of its stock pipelines.

    Attributes:
        pipeline: class name of the stock pipeline, as written in `model_index.json`.
        name: the `family` field of a student file.
        denoiser: the component that a student's LoRA belongs to; also the prefix of its keys.
        lora_targets: endings of the layers that training puts a LoRA on, or one regular expression, as in peft.
        time_embedder: the denoiser's module whose output is the time embedding, [B, D].
        guidance_argument: the argument of `__call__` that takes the recipe's guidance scale.
        no_guidance: its value that switches guidance off; a pipeline with 0 counts from the conditional prediction,
            ``cond + w * (cond - uncond)``, and gets the recipe's scale less 1.
        teacher_call: how the family's base is run as a teacher: the stock pipeline's default steps, and the guidance
            scale that the family's training preset distils with (the file says where one differs).
        published_negative_prompt: what the base's authors guide away from, if they publish it; None: the empty prompt.
        own_guidance_norm: the normalisation of guidance that its pipeline always has (see guidance_norm.py).
        guidance_halves: how its pipeline calls a flow model's network under guidance, for CFG-Zero*; None: not at all,
            or its base is no flow model.
        call_kwargs: what this pipeline is called with unless the caller says otherwise, student or teacher.
        binned_sample_sizes: the denoiser's `sample_size`s that resolution binning has tables for; others switch it off.
        kohya_in_comfyui: ComfyUI knows the kohya names that we write for it.
        video: it makes videos.
        frames_per_second: at which the base's videos are shown.
        frames_first: the latents of a video are [F, C, h, w], and not [C, F, h, w].
        pixel_multiple: what the stock pipeline itself asks heights and widths to be multiples of.
        float32_latents: its pipeline keeps latents in float32, whatever the weights are in.
        home: module that defines the class, if the stock one lacks or breaks something (it is then "TDM" + `pipeline`).
    """

    pipeline: str
    name: ClassVar[str]
    denoiser: ClassVar[Literal["unet", "transformer"]] = "transformer"
    lora_targets: ClassVar[Sequence[str] | str]
    time_embedder: ClassVar[str]
    guidance_argument: ClassVar[str] = "guidance_scale"
    no_guidance: ClassVar[float] = 1.0
    teacher_call: ClassVar[TeacherCall]
    published_negative_prompt: ClassVar[str | None] = None
    own_guidance_norm: ClassVar[str | None] = None
    guidance_halves: ClassVar[Literal["negative first", "prompt first", "two calls"] | None] = None
    call_kwargs: ClassVar[Mapping[str, Any]] = {}
    binned_sample_sizes: ClassVar[frozenset[int] | None] = None
    kohya_in_comfyui: ClassVar[bool] = False
    video: ClassVar[bool] = False
    frames_per_second: ClassVar[int | None] = None
    frames_first: ClassVar[bool] = False
    pixel_multiple: ClassVar[int] = 8
    float32_latents: ClassVar[bool] = False
    home: ClassVar[str | None] = None

    # ------------------------------------------------------------------ loading and calling the stock pipeline

    def pipeline_class(self) -> type[DiffusionPipeline]:
        """The class to load a base with: the stock one, or ours where the stock one has a fault."""
        if self.home is None:
            return getattr(importlib.import_module("diffusers"), self.pipeline)
        return getattr(importlib.import_module(self.home, __package__), f"TDM{self.pipeline}")

    def teacher_call_of(self, config: Mapping[str, Any]) -> TeacherCall:  # noqa: ARG002
        """`teacher_call` of one base, by its pipeline's config."""
        return self.teacher_call

    def guidance(self, scale: float) -> dict[str, float]:
        """The argument of `__call__` for a recipe's guidance scale (1.0 is none)."""
        return {self.guidance_argument: scale - (1.0 - self.no_guidance)}

    def negative_prompt(self, call: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """What switches guidance on in a guided call, where its scale alone does not, by argument of `__call__`.

        Args:
            call: the arguments of a call by name, with the scale. {} is returned unless they ask for guidance and
                name no negative prompt.
        """
        return {}

    def token_norms(self, output: Tensor) -> Tensor:
        """The norm of each of the network's tokens in an output like the latents, ``[B, C, ...]``, in a shape that
        broadcasts to it: of a network on single latent pixels, over the channels.
        """
        return output.norm(dim=1, keepdim=True)

    def call_defaults(self, pipe: DiffusionPipeline) -> dict[str, Any]:
        """`call_kwargs` for a loaded pipeline: resolution binning goes off where it has no table for the model."""
        defaults = dict(self.call_kwargs)
        sizes = self.binned_sample_sizes
        if sizes is not None and getattr(pipe, self.denoiser).config.sample_size not in sizes:
            defaults["use_resolution_binning"] = False
        return defaults

    # ------------------------------------------------------------------ sizes

    def default_size(self, pipe: Any) -> Size:
        """The size that the model was made for."""
        side = getattr(pipe, self.denoiser).config.sample_size * pipe.vae_scale_factor
        return Size(side, side)

    def multiple(self, pipe: Any) -> int:
        """Heights and widths are multiples of this, in pixels: for the pipeline, the VAE and the network's patches."""
        return math.lcm(self.pixel_multiple, self.patch_pixels(pipe))

    def patch_pixels(self, pipe: Any) -> int:
        """The side of what one token of the network sees: the VAE's factor times the patch."""
        return pipe.vae_scale_factor * (getattr(pipe, self.denoiser).config.get("patch_size") or 1)

    def latent_shape(self, pipe: Any, size: Size) -> tuple[int, ...]:
        """The shape of one sample's latents, (C, h, w) for pictures; how a pipeline packs them does not matter here.

        Raises:
            TDMError: the height or width is no `multiple`.
        """
        factor = pipe.vae_scale_factor
        self.check_size(pipe, size)
        return (self.latent_channels(pipe), size.height // factor, size.width // factor)

    def latent_channels(self, pipe: Any) -> int:
        """Channels of the latents."""
        return getattr(pipe, self.denoiser).config.in_channels

    def check_size(self, pipe: Any, size: Size) -> None:
        """Raise TDMError unless height and width are multiples of what the model works in."""
        step = self.multiple(pipe)
        if size.height % step or size.width % step or min(size[:2]) < step:
            raise TDMError(f"{size.height}x{size.width} does not fit {self.name}: use multiples of {step} pixels")
        if size.num_frames is not None and size.num_frames < 1:
            raise TDMError(f"num_frames must be at least 1, not {size.num_frames}")

    # ------------------------------------------------------------------ the network, as training calls it

    def encode(self, pipe: Any, prompts: list[str], size: Size, **options: Any) -> Condition:
        """The condition of prompts, as the stock pipeline makes it: `encode_text` and `facts`.

        Args:
            pipe: the pipeline; its text encoders are used.
            prompts: B of them.
            size: of the pictures, which some networks are told.
            options: arguments of `pipe(...)` about the text, such as `max_sequence_length`, and `guidance_scale` where
                the network takes it; its own defaults otherwise.
        """
        text = self.encode_text(pipe, prompts, **options)
        return text | self.facts(pipe, text, size, **options)

    @abstractmethod
    def encode_text(self, pipe: Any, prompts: list[str], **options: Any) -> Condition:
        """What follows from the prompts alone: "text" [B, L, D], and what else the text encoders give.

        Of the denoiser only its config is read: it need not be loaded. "mask" [B, L] or "length" [B] (on the CPU) say
        where a prompt ends, if the family's network leaves out what is behind.
        """

    def encode_null(self, pipe: Any, negative_prompt: str = "", **options: Any) -> Condition:
        """`encode_text` of no prompt or of a negative one, for the unconditional half of guidance, [1, ...]."""
        return self.encode_text(pipe, [negative_prompt], **options)

    def text_limit(self, pipe: Any) -> tuple[Any, int]:
        """(the tokenizer that reads the most of a prompt, how many tokens it passes on, special ones included)."""
        return pipe.tokenizer, longest_text(pipe)

    def text_as_read(self, pipe: Any, prompt: str) -> str:  # noqa: ARG002
        """A prompt as the tokenizer of `text_limit` gets it, in its chat template if it has one."""
        return prompt

    def too_long(self, pipe: Any, prompts: Sequence[str]) -> int:
        """How many of the prompts `encode_text` cuts, since they have more tokens than `text_limit`."""
        tokenizer, limit = self.text_limit(pipe)
        tokens = tokenizer([self.text_as_read(pipe, prompt) for prompt in prompts])["input_ids"]
        return sum(len(ids) > limit for ids in tokens)

    def facts(self, pipe: Any, text: Condition, size: Size, **options: Any) -> Condition:  # noqa: ARG002
        """The network's conditions other than text, such as the size: [B, ...] for the `text` of B prompts."""
        return {}

    def null(self, pipe: Any, like: Condition, **options: Any) -> Condition:
        """The condition of no prompt, or of the ``negative_prompt`` among the options, in the shapes of `like`: the
        unconditional half of guidance.
        """
        return null_like(self.encode_null(pipe, **options), like)

    @abstractmethod
    def blank(self, pipe: Any, n: int, size: Size) -> Condition:
        """Conditions of n prompts as long as the pipeline lets them be, in the shapes and dtypes that `encode` gives
        and with nothing in them: no text encoder is asked. They are on the denoiser's device.
        """

    @abstractmethod
    def denoise(self, network: nn.Module, x: Tensor, timesteps: Tensor, cond: Condition) -> Tensor:
        """The network's prediction at x, in the shape of x.

        Args:
            network: the denoiser, with whatever adapters are on.
            x: latents [B, *latent_shape].
            timesteps: [B] float32 on x's device, on the clock of the scheduler (0 to 1000).
            cond: from `encode`.
        """

    def embeds_guidance(self, pipe: Any) -> bool:  # noqa: ARG002
        """Whether the network itself takes a guidance scale (a guidance-distilled base)."""
        return False

    # ------------------------------------------------------------------ latents and pixels

    def decode(self, pipe: Any, latents: Tensor, size: Size) -> Tensor:
        """Latents [B, *latent_shape] to pixels, uint8 on the CPU: [B, 3, H, W], of a video [B, F, 3, H, W]."""
        return to_uint8(self.pixels(pipe, latents, size))

    def pixels(self, pipe: Any, latents: Tensor, size: Size) -> Tensor:  # noqa: ARG002
        """`decode` without rounding: pixels about in [-1, 1], in the VAE's dtype and on its device."""
        return pipe.vae.decode(self.unscale(pipe.vae, for_vae(pipe.vae, latents)), return_dict=False)[0]

    def first_frame(self, pipe: Any, latents: Tensor, size: Size) -> Tensor:  # noqa: ARG002
        """Latents [B, *latent_shape] of the first frame alone, in the same rank; those of pictures as they are."""
        return latents

    def encode_pictures(self, pipe: Any, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] to latents [B, *latent_shape]: the mean of what the VAE would draw.

        Raises:
            TDMError: the family makes videos.
        """
        self.check_pictures()
        return self.scale(pipe.vae, self._vae_latents(pipe.vae, for_vae(pipe.vae, pictures)))

    def check_pictures(self) -> None:
        """Raise TDMError if the family makes videos."""
        if self.video:
            raise TDMError(f"image to image is for models of pictures; {self.name} makes videos")

    def _vae_latents(self, vae: Any, pictures: Tensor) -> Tensor:
        return vae.encode(pictures).latent_dist.mode()

    def scale(self, vae: Any, latents: Tensor) -> Tensor:
        """The VAE's latents [B, C, ...] as the denoiser knows them, in that shape: shifted and scaled by channel, or
        all alike, as the VAE's config states.
        """
        mean, std, factor = _statistics(vae, latents)
        return (latents - mean) * factor / std

    def unscale(self, vae: Any, latents: Tensor) -> Tensor:
        """The inverse of `scale`: latents [B, C, ...] of the denoiser as the VAE decodes them."""
        mean, std, factor = _statistics(vae, latents)
        return latents * std / factor + mean

    def pack(self, latents: Tensor) -> Tensor:
        """Latents [B, *latent_shape] as the pipeline's `latents=` argument and `output_type="latent"` have them."""
        return latents

    def unpack(self, pipe: Any, latents: Tensor, size: Size) -> Tensor:  # noqa: ARG002
        """The inverse of `pack`: [B, *latent_shape] of latents for a picture or video of this size."""
        return latents


# ---------------------------------------------------------------------- shared by several families


def num_frames(size: Size) -> int:
    """The number of frames of a video's size."""
    assert size.num_frames is not None, "the size of a video names its number of frames"
    return size.num_frames


def text_options(pipe: Any, options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The arguments of `pipe(...)` about the text: those given, or the pipeline's own defaults."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    return {name: options.get(name, parameters[name].default) for name in names}


def zeros(pipe: Any, denoiser: str, *shape: int) -> Tensor:
    """Zeros on the device and in the dtype of a pipeline's denoiser."""
    network = getattr(pipe, denoiser)
    return torch.zeros(shape, device=network.device, dtype=network.dtype)


def clip_tokens(pipe: Any) -> int:
    """The length of every prompt of a CLIP encoder."""
    return pipe.tokenizer.model_max_length if pipe.tokenizer is not None else 77


def longest_text(pipe: Any) -> int:
    """The pipeline's own limit of a prompt's tokens."""
    return text_options(pipe, {}, "max_sequence_length")["max_sequence_length"]


def pad_text(text: Tensor, length: int) -> Tensor:
    """Zeros behind the tokens of a "text" [B, L, ..., D] or "mask" [B, L] up to a length."""
    missing = length - text.shape[1]
    return F.pad(text, (0, 0) * (text.ndim - 2) + (0, missing)) if missing > 0 else text


def for_vae(vae: Any, x: Tensor) -> Tensor:
    """x, of any shape, in the dtype of a VAE, on the device where it runs (an offloaded VAE moves there in a call)."""
    from diffusers.utils.torch_utils import get_module_execution_device

    return x.to(get_module_execution_device(vae), vae.dtype)


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels of any shape in [-1, 1] to uint8 on the CPU, with diffusers' own rounding."""
    return ((pixels.float() * 0.5 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8)


def without_variance(output: Tensor, channels: int) -> Tensor:
    """The first `channels` of a network's output [B, C, ...]: the prediction without the learned variance behind it."""
    return output.chunk(2, dim=1)[0] if output.shape[1] == 2 * channels else output


def _statistics(vae: Any, latents: Tensor) -> tuple[Any, Any, float]:
    """(mean, standard deviation, scaling factor) of a VAE's latents [B, C, ...], as its config states them."""
    config, factor = vae.config, vae.config.get("scaling_factor") or 1.0
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return config.get("shift_factor") or 0.0, 1.0, factor
    shape = (1, -1, *(1,) * (latents.ndim - 2))
    mean, std = (torch.tensor(v).view(shape).to(latents) for v in (config.latents_mean, config.latents_std))
    return mean, std, factor


def on_device(cond: Condition, device: torch.device | str) -> Condition:
    """A condition where the network is. "length" stays on the CPU: it cuts, and a cut must not wait."""
    return {k: v if k == "length" else v.to(device, non_blocking=True) for k, v in cond.items()}


def null_like(one: Condition, like: Condition) -> Condition:
    """`encode_null`'s one condition for a whole batch, padded like it, on its device, with its facts."""
    null = dict(like)
    for key, value in one.items():
        value = pad_text(value, like[key].shape[1]) if key in ("text", "mask") else value
        null[key] = value.to(like[key].device).expand(len(like[key]), *value.shape[1:])
    return null
