"""CogVideoX (2B, 5B, 1.5)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...errors import TDMError
from .base import ATTENTION, FEED_FORWARD, Condition, Family, Size, TeacherCall, for_vae, num_frames, zeros


class CogVideoX(Family):
    """A video transformer on latents [F, C, h, w], T5 text in the same sequence."""

    name = "cogvideox"
    teacher_call = TeacherCall(50, 3.5)
    time_embedder = "time_embedding"
    lora_targets = (*ATTENTION, *FEED_FORWARD)
    video = True
    frames_per_second = 8
    frames_first = True
    home = "..fixes.batches"

    def default_size(self, pipe: Any) -> Size:
        config, factor = pipe.transformer.config, pipe.vae_scale_factor_spatial
        return Size(config.sample_height * factor, config.sample_width * factor, config.sample_frames)

    def check_size(self, pipe: Any, size: Size) -> None:
        """Also raise TDMError if the base has learned positions, and they are of another size."""
        super().check_size(pipe, size)
        own = self.default_size(pipe)
        if pipe.transformer.config.use_learned_positional_embeddings and size[:2] != own[:2]:
            raise TDMError(
                f"{size.height}x{size.width}: this base's positions are learned for {own.height}x{own.width} alone"
            )

    def patch_pixels(self, pipe: Any) -> int:
        return pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size

    def latent_shape(self, pipe: Any, size: Size) -> tuple[int, ...]:
        self.check_size(pipe, size)
        factor = pipe.vae_scale_factor_spatial
        frames = self._frames(pipe, size) + self._padding(pipe, size)
        return (frames, self.latent_channels(pipe), size.height // factor, size.width // factor)

    def _frames(self, pipe: Any, size: Size) -> int:
        return (num_frames(size) - 1) // pipe.vae_scale_factor_temporal + 1

    def _padding(self, pipe: Any, size: Size) -> int:
        """Latent frames in front that only fill a patch (CogVideoX 1.5)."""
        patch = pipe.transformer.config.patch_size_t
        return -self._frames(pipe, size) % patch if patch else 0

    def encode_text(self, pipe: Any, prompts: list[str], **options: Any) -> Condition:  # noqa: ARG002
        length = pipe.transformer.config.max_text_seq_length  # text and video share positions: exactly this long
        return {"text": pipe.encode_prompt(prompts, None, False, max_sequence_length=length)[0]}

    def text_limit(self, pipe: Any) -> tuple[Any, int]:
        return pipe.tokenizer, pipe.transformer.config.max_text_seq_length

    def blank(self, pipe: Any, n: int, size: Size) -> Condition:  # noqa: ARG002
        config = pipe.transformer.config
        return {"text": zeros(pipe, self.denoiser, n, config.max_text_seq_length, config.text_embed_dim)}

    def denoise(self, network: nn.Module, x: Tensor, timesteps: Tensor, cond: Condition) -> Tensor:
        return network(
            hidden_states=x,
            encoder_hidden_states=cond["text"],
            timestep=timesteps,
            image_rotary_emb=_rotary_embedding(network.config, x),
            return_dict=False,
        )[0]

    def pixels(self, pipe: Any, latents: Tensor, size: Size) -> Tensor:
        padding = latents.shape[1] - self._frames(pipe, size)
        frames = pipe.decode_latents(for_vae(pipe.vae, latents[:, padding:]))
        return frames.permute(0, 2, 1, 3, 4)

    def first_frame(self, pipe: Any, latents: Tensor, size: Size) -> Tensor:
        padding = self._padding(pipe, size)
        return latents[:, padding : padding + 1]


def _rotary_embedding(config: Any, x: Tensor) -> Any:
    """The 5B models' (cosines, sines) for latents x [B, F, C, h, w], as `CogVideoXPipeline` prepares them."""
    if not config.use_rotary_positional_embeddings:
        return None
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    frames, (height, width) = x.shape[1], (side // config.patch_size for side in x.shape[-2:])
    base = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
    if config.patch_size_t is None:
        crops = get_resize_crop_region_for_grid((height, width), base[1], base[0])
        return get_3d_rotary_pos_embed(config.attention_head_dim, crops, (height, width), frames, device=x.device)
    frames = -(-frames // config.patch_size_t)
    grid: dict[str, Any] = {"grid_type": "slice", "max_size": base, "device": x.device}
    return get_3d_rotary_pos_embed(config.attention_head_dim, None, (height, width), frames, **grid)
