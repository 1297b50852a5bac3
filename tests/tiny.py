"""Ten tiny real pipelines, one per model family: the real classes with tiny configs and random weights, built offline.

`build(family)` takes well under a second and is deterministic; the result saves and loads like any pipeline. Each one
carries the stock scheduler of its family's released models, so that a test can start from a true config.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from tokenizers.pre_tokenizers import ByteLevel

PROMPT = "a red cube"  # short: the tiny T5 and Gemma spell it
TEXT_DIM = 16  # width of every T5, Gemma and Qwen encoder

_CALLS: dict[str, dict[str, Any]] = {
    "sd15": {},
    "sdxl": {},
    "pixart": {"max_sequence_length": 16, "use_resolution_binning": False, "clean_caption": False},
    "sd3": {"max_sequence_length": 16},
    "cogvideox": {"max_sequence_length": 16, "num_frames": 9},
    "flux": {"max_sequence_length": 16},
    "sana": {
        "max_sequence_length": 16,
        "use_resolution_binning": False,
        "complex_human_instruction": None,
        "height": 32,
        "width": 32,
    },
    "wan": {"max_sequence_length": 16, "num_frames": 9},
    "zimage": {"max_sequence_length": 64},
    "qwenimage": {"true_cfg_scale": 1.0},
    "krea2": {"max_sequence_length": 256, "guidance_scale": 0.0},
}
FAMILIES = tuple(_CALLS)


def build(family: str) -> DiffusionPipeline:
    """The tiny pipeline of a family (one of `FAMILIES`), the same weights each time, on the CPU in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = _BUILDERS[family]()
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_kwargs(family: str) -> dict[str, Any]:
    """Arguments of a fast, seeded call in 4 steps that returns latents: ``build(family)(**call_kwargs(family))``."""
    return {
        "prompt": PROMPT,
        "num_inference_steps": 4,
        "height": 16,
        "width": 16,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        **_CALLS[family],
    }


# ---------------------------------------------------------------------- tokenizers and text encoders


def _bytes_vocab(endings: tuple[str, ...], special: tuple[str, ...]) -> dict[str, int]:
    pieces = [byte + ending for ending in endings for byte in sorted(ByteLevel.alphabet())]
    return {piece: i for i, piece in enumerate([*pieces, *special])}


def clip_tokenizer(longest: int) -> transformers.CLIPTokenizer:
    """A CLIP tokenizer that spells every prompt in bytes, and reads this many tokens of it."""
    # CLIP finds the end of a prompt by its id: the specials must come last.
    vocab = _bytes_vocab(("", "</w>"), ("<|startoftext|>", "<|endoftext|>"))
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=longest)


def _clip(projection: int | None = None) -> tuple[Any, Any]:
    tokenizer = clip_tokenizer(32)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        projection_dim=projection or 8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return tokenizer, model(config)


def _t5(encoder: str = "T5EncoderModel", config: str = "T5Config") -> tuple[Any, Any]:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = transformers.T5Tokenizer(vocab=[(p, -float(i)) for i, p in enumerate(pieces)], extra_ids=0)
    sizes = {"d_model": TEXT_DIM, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 2}
    return tokenizer, getattr(transformers, encoder)(getattr(transformers, config)(vocab_size=len(tokenizer), **sizes))


_DECODER = {
    "hidden_size": TEXT_DIM,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def _gemma() -> tuple[Any, Any]:
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = transformers.GemmaTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[])
    return tokenizer, transformers.Gemma2Model(transformers.Gemma2Config(vocab_size=len(tokenizer), **_DECODER))


def _qwen_tokenizer() -> Any:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = transformers.Qwen2Tokenizer(vocab=_bytes_vocab(("",), special), merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(special[1:])})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def _qwen3() -> tuple[Any, Any]:
    tokenizer = _qwen_tokenizer()
    return tokenizer, transformers.Qwen3Model(transformers.Qwen3Config(vocab_size=len(tokenizer), **_DECODER))


def _qwen25_vl() -> tuple[Any, Any]:
    tokenizer = _qwen_tokenizer()
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1000000.0}
    text = {**_DECODER, "vocab_size": len(tokenizer), "rope_parameters": rope, "bos_token_id": 0, "eos_token_id": 0}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_DIM}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return tokenizer, transformers.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl() -> tuple[Any, Any]:
    tokenizer = _qwen_tokenizer()
    rope = {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_type": "default", "rope_theta": 5000000.0}
    text = {**_DECODER, "vocab_size": len(tokenizer), "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_DIM,
              "deepstack_visual_indexes": [0]}  # fmt: skip
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
    return tokenizer, transformers.Qwen3VLModel(config)


# ---------------------------------------------------------------------- autoencoders


def _vae(latent_channels: int = 4, **options: Any) -> diffusers.AutoencoderKL:
    """Spatial factor 2, the SD type."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=2,
        layers_per_block=1,
        **options,
    )


def _video_vae() -> diffusers.AutoencoderKLQwenImage:
    """Spatial factor 4, the type of Wan, of single pictures."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


_FLOW_VAE = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1}

# ---------------------------------------------------------------------- schedulers

_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

# ---------------------------------------------------------------------- pipelines


def _unet(cross_attention_dim: int, **options: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=2,
        **options,
    )


def _sd15() -> DiffusionPipeline:
    tokenizer, text_encoder = _clip()
    return diffusers.StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=_unet(8),
        scheduler=diffusers.PNDMScheduler(**_SD_BETAS, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> DiffusionPipeline:
    tokenizer, text_encoder = _clip()
    tokenizer_2, text_encoder_2 = _clip(projection=8)
    unet = _unet(
        16,  # both encoders side by side
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 8,  # six sizes and the pooled prompt
        use_linear_projection=True,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**_SD_BETAS, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )


def _pixart() -> DiffusionPipeline:
    tokenizer, text_encoder = _t5()
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,  # the noise and a learned variance, as in the released models
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        caption_channels=TEXT_DIM,
    )
    return diffusers.PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=_vae(),
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def _sd3() -> DiffusionPipeline:
    tokenizer, text_encoder = _clip(projection=8)
    tokenizer_2, text_encoder_2 = _clip(projection=8)
    tokenizer_3, text_encoder_3 = _t5()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=16,
        pooled_projection_dim=16,  # both CLIP projections
        pos_embed_max_size=16,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(**_FLOW_VAE),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def _cogvideox() -> DiffusionPipeline:
    tokenizer, text_encoder = _t5()
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,  # inner dim 16: the sincos embedding of 3-D positions needs a multiple of 16
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=TEXT_DIM,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=16,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        **_SD_BETAS,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    return diffusers.CogVideoXPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
    )


def _flux() -> DiffusionPipeline:
    tokenizer, text_encoder = _clip()
    tokenizer_2, text_encoder_2 = _t5()
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,  # 4 latent channels in 2 x 2 patches
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=8,
        guidance_embeds=True,  # as in FLUX.1-dev
        axes_dims_rope=(4, 4, 8),  # sums to the head dim
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(**_FLOW_VAE),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def _sana() -> DiffusionPipeline:
    tokenizer, text_encoder = _gemma()
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=TEXT_DIM,
        sample_size=8,
    )
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
    )
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(**_FLOW),
    )


def _wan() -> DiffusionPipeline:
    tokenizer, text_encoder = _t5("UMT5EncoderModel", "UMT5Config")
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    return diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=diffusers.UniPCMultistepScheduler(**_FLOW),
        transformer=transformer,
    )


def _zimage() -> DiffusionPipeline:
    tokenizer, text_encoder = _qwen3()
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_DIM,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 32, 32],  # a prompt may have 512 tokens
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):  # the class leaves them uninitialised
        torch.nn.init.zeros_(token)
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(**_FLOW_VAE),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def _qwenimage() -> DiffusionPipeline:
    tokenizer, text_encoder = _qwen25_vl()
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,  # 4 latent channels in 2 x 2 patches
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=(8, 4, 4),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    return diffusers.QwenImagePipeline(
        scheduler=scheduler, vae=_video_vae(), text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
    )


def _krea2() -> DiffusionPipeline:
    tokenizer, text_encoder = _qwen3_vl()
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,  # 4 latent channels in 2 x 2 patches
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=TEXT_DIM,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(8, 4, 4),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=6400
    )
    return diffusers.Krea2Pipeline(
        scheduler=scheduler,
        vae=_video_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        text_encoder_select_layers=(1, 2),
    )


_BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd15": _sd15,
    "sdxl": _sdxl,
    "pixart": _pixart,
    "sd3": _sd3,
    "cogvideox": _cogvideox,
    "flux": _flux,
    "sana": _sana,
    "wan": _wan,
    "zimage": _zimage,
    "qwenimage": _qwenimage,
    "krea2": _krea2,
}
