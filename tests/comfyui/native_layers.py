"""Run in the server's folder by its Python: what LoRAs see of ComfyUI's own networks at released sizes, as JSON.

For each family {"shapes": {layer: the shape of its weight}, "keys": {LoRA key: [weight, rows or None, swapped]}}.
"""

import json
import logging
import os
import sys

import torch
import torchvision_ops  # noqa: F401 (next to this file)

sys.path.insert(0, os.getcwd())
import comfy.cli_args

comfy.cli_args.args.cpu = True
logging.disable()

import comfy.lora  # noqa: E402
import comfy.supported_models as supported  # noqa: E402

_UNET = {
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
}
CONFIGS = {
    "sd15": (
        supported.SD15,
        {
            **_UNET,
            "num_res_blocks": [2] * 4,
            "channel_mult": [1, 2, 4, 4],
            "transformer_depth": [1] * 6 + [0] * 2,
            "transformer_depth_output": [1] * 9 + [0] * 3,
            "transformer_depth_middle": 1,
            "use_linear_in_transformer": False,
            "context_dim": 768,
            "num_heads": 8,
        },
    ),
    "sdxl": (
        supported.SDXL,
        {
            **_UNET,
            "num_res_blocks": [2] * 3,
            "channel_mult": [1, 2, 4],
            "transformer_depth": [0, 0, 2, 2, 10, 10],
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
            "transformer_depth_middle": 10,
            "use_linear_in_transformer": True,
            "context_dim": 2048,
            "num_head_channels": 64,
            "num_classes": "sequential",
            "adm_in_channels": 2816,
        },
    ),
    "pixart": (
        supported.PixArtAlpha,
        {"depth": 28, "num_heads": 16, "input_size": 64, "pe_interpolation": 1, "micro_condition": True},
    ),
    "sd3": (
        supported.SD3,
        {
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "depth": 24,
            "input_size": None,
            "adm_in_channels": 2048,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 4096, "out_features": 1536},
            },
            "num_patches": 384**2,
            "pos_embed_max_size": 384,
            "pos_embed_scaling_factor": None,
            "qk_norm": "rms",
            "x_block_self_attn_layers": list(range(13)),
        },
    ),
    "cogvideox": (
        supported.CogVideoX_T2V,
        {
            "num_attention_heads": 30,
            "attention_head_dim": 64,
            "num_layers": 30,
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "text_embed_dim": 4096,
            "use_rotary_positional_embeddings": False,
        },
    ),
    "flux": (
        supported.Flux,
        {
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "vec_in_dim": 768,
            "context_in_dim": 4096,
            "hidden_size": 3072,
            "mlp_ratio": 4.0,
            "num_heads": 24,
            "depth": 19,
            "depth_single_blocks": 38,
            "axes_dim": [16, 56, 56],
            "theta": 10000,
            "qkv_bias": True,
            "guidance_embed": True,
            "txt_ids_dims": [],
        },
    ),
    "wan": (
        supported.WAN21_T2V,
        {
            "model_type": "t2v",
            "dim": 1536,
            "num_heads": 12,
            "ffn_dim": 8960,
            "num_layers": 30,
            "in_dim": 16,
            "out_dim": 16,
            "text_dim": 4096,
            "freq_dim": 256,
        },
    ),
    "krea2": (
        supported.Krea2,
        {
            "features": 6144,
            "channels": 16,
            "patch": 2,
            "layers": 28,
            "heads": 48,
            "kvheads": 12,
            "txtlayers": 12,
            "txtdim": 2560,
        },
    ),
    "zimage": (
        supported.ZImage,
        {
            "patch_size": 2,
            "in_channels": 16,
            "dim": 3840,
            "n_layers": 30,
            "n_heads": 30,
            "n_kv_heads": 30,
            "cap_feat_dim": 2560,
            "qk_norm": True,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8 / 3,
            "z_image_modulation": True,
            "time_scale": 1000.0,
        },
    ),
    "qwenimage": (supported.QwenImage, {"num_layers": 60, "in_channels": 64, "joint_attention_dim": 3584}),
}
FRONT, BACK = "diffusion_model.", ".weight"

network_layers = {}
for family, (config_class, unet_config) in CONFIGS.items():
    named = {k: v for k, v in config_class.unet_config.items() if k == "image_model"}
    config = config_class({**unet_config, **named})
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="meta")
    weights = {k: v.shape for k, v in model.state_dict().items() if k.startswith(FRONT) and k.endswith(BACK)}
    keys = comfy.lora.model_lora_keys_unet(model, {})
    network_layers[family] = {
        "shapes": {k[len(FRONT) : -len(BACK)]: list(shape) for k, shape in weights.items() if len(shape) > 1},
        "keys": {k: [v, None, False] if isinstance(v, str) else [v[0], v[1], len(v) > 2] for k, v in keys.items()},
    }
print(json.dumps(network_layers))
