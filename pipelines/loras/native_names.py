"""The layer names of the original checkpoints, family by family, and of ComfyUI where it has names of its own.

The UNet's are counted out in `layer_names.py`. Each table maps a native name to our layers, parted by blanks, with `*`
for a block's number. Where a native layer is several of ours stacked, they are in the order of its rows.
"""

from __future__ import annotations


def _stack(stem: str, *projections: str) -> str:
    """Our patterns of one stacked layer."""
    return " ".join(f"{stem}.{projection}" for projection in projections)


_QKV = ("to_q", "to_k", "to_v")
_ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")

_SD3 = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "joint_blocks.*.x_block.attn.qkv": _stack("transformer_blocks.*.attn", *_QKV),
    "joint_blocks.*.x_block.attn.proj": "transformer_blocks.*.attn.to_out.0",
    "joint_blocks.*.x_block.attn2.qkv": _stack("transformer_blocks.*.attn2", *_QKV),
    "joint_blocks.*.x_block.attn2.proj": "transformer_blocks.*.attn2.to_out.0",
    "joint_blocks.*.x_block.mlp.fc1": "transformer_blocks.*.ff.net.0.proj",
    "joint_blocks.*.x_block.mlp.fc2": "transformer_blocks.*.ff.net.2",
    "joint_blocks.*.x_block.adaLN_modulation.1": "transformer_blocks.*.norm1.linear",
    "joint_blocks.*.context_block.attn.qkv": _stack("transformer_blocks.*.attn", *_ADDED_QKV),
    "joint_blocks.*.context_block.attn.proj": "transformer_blocks.*.attn.to_add_out",
    "joint_blocks.*.context_block.mlp.fc1": "transformer_blocks.*.ff_context.net.0.proj",
    "joint_blocks.*.context_block.mlp.fc2": "transformer_blocks.*.ff_context.net.2",
    "joint_blocks.*.context_block.adaLN_modulation.1": "transformer_blocks.*.norm1_context.linear",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_FLUX = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "double_blocks.*.img_mod.lin": "transformer_blocks.*.norm1.linear",
    "double_blocks.*.txt_mod.lin": "transformer_blocks.*.norm1_context.linear",
    "double_blocks.*.img_attn.qkv": _stack("transformer_blocks.*.attn", *_QKV),
    "double_blocks.*.txt_attn.qkv": _stack("transformer_blocks.*.attn", *_ADDED_QKV),
    "double_blocks.*.img_attn.proj": "transformer_blocks.*.attn.to_out.0",
    "double_blocks.*.txt_attn.proj": "transformer_blocks.*.attn.to_add_out",
    "double_blocks.*.img_mlp.0": "transformer_blocks.*.ff.net.0.proj",
    "double_blocks.*.img_mlp.2": "transformer_blocks.*.ff.net.2",
    "double_blocks.*.txt_mlp.0": "transformer_blocks.*.ff_context.net.0.proj",
    "double_blocks.*.txt_mlp.2": "transformer_blocks.*.ff_context.net.2",
    "single_blocks.*.modulation.lin": "single_transformer_blocks.*.norm.linear",
    "single_blocks.*.linear1": _stack("single_transformer_blocks.*", *(f"attn.{p}" for p in _QKV), "proj_mlp"),
    "single_blocks.*.linear2": "single_transformer_blocks.*.proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
    # XLabs' LoRAs are processors of the attention: 1 of the picture, 2 of the text.
    "double_blocks.*.processor.qkv_lora1": _stack("transformer_blocks.*.attn", *_QKV),
    "double_blocks.*.processor.qkv_lora2": _stack("transformer_blocks.*.attn", *_ADDED_QKV),
    "double_blocks.*.processor.proj_lora1": "transformer_blocks.*.attn.to_out.0",
    "double_blocks.*.processor.proj_lora2": "transformer_blocks.*.attn.to_add_out",
    "single_blocks.*.processor.qkv_lora": _stack("single_transformer_blocks.*.attn", *_QKV),
    "single_blocks.*.processor.proj_lora": "single_transformer_blocks.*.proj_out",
}
_PIXART_BLOCKS = {
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "blocks.*.attn.qkv": _stack("transformer_blocks.*.attn1", *_QKV),
    "blocks.*.attn.proj": "transformer_blocks.*.attn1.to_out.0",
    "blocks.*.cross_attn.q_linear": "transformer_blocks.*.attn2.to_q",
    "blocks.*.cross_attn.kv_linear": _stack("transformer_blocks.*.attn2", "to_k", "to_v"),
    "blocks.*.cross_attn.proj": "transformer_blocks.*.attn2.to_out.0",
    "final_layer.linear": "proj_out",
}
_PIXART = _PIXART_BLOCKS | {
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "blocks.*.mlp.fc1": "transformer_blocks.*.ff.net.0.proj",
    "blocks.*.mlp.fc2": "transformer_blocks.*.ff.net.2",
}
_SANA = {name: ours for name, ours in _PIXART_BLOCKS.items() if name != "x_embedder.proj"} | {
    "x_embedder.proj": "patch_embed.proj",
    "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2",
    "t_block.1": "time_embed.linear",
    "blocks.*.mlp.inverted_conv.conv": "transformer_blocks.*.ff.conv_inverted",
    "blocks.*.mlp.point_conv.conv": "transformer_blocks.*.ff.conv_point",
}
_WAN = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    **{
        f"blocks.*.{native}.{part}": f"blocks.*.{ours}.{ours_part}"
        for native, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, ours_part in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    },
    "blocks.*.cross_attn.k_img": "blocks.*.attn2.add_k_proj",
    "blocks.*.cross_attn.v_img": "blocks.*.attn2.add_v_proj",
    "blocks.*.ffn.0": "blocks.*.ffn.net.0.proj",
    "blocks.*.ffn.2": "blocks.*.ffn.net.2",
    "head.head": "proj_out",
}
_COGVIDEOX = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "mixins.patch_embed.proj": "patch_embed.proj",
    "mixins.patch_embed.text_proj": "patch_embed.text_proj",
    "transformer.layers.*.attention.query_key_value": _stack("transformer_blocks.*.attn1", *_QKV),
    "transformer.layers.*.attention.dense": "transformer_blocks.*.attn1.to_out.0",
    "transformer.layers.*.mlp.dense_h_to_4h": "transformer_blocks.*.ff.net.0.proj",
    "transformer.layers.*.mlp.dense_4h_to_h": "transformer_blocks.*.ff.net.2",
    "mixins.final_layer.linear": "proj_out",
    # ComfyUI's own network has names of its own.
    "time_embedding_linear_1": "time_embedding.linear_1",
    "time_embedding_linear_2": "time_embedding.linear_2",
    "ofs_embedding_linear_1": "ofs_embedding.linear_1",
    "ofs_embedding_linear_2": "ofs_embedding.linear_2",
    **{f"blocks.*.{part}": f"transformer_blocks.*.attn1.to_{part}" for part in "qkv"},
    "blocks.*.attn_out": "transformer_blocks.*.attn1.to_out.0",
    "blocks.*.norm1.linear": "transformer_blocks.*.norm1.linear",
    "blocks.*.norm2.linear": "transformer_blocks.*.norm2.linear",
    "blocks.*.ff_proj": "transformer_blocks.*.ff.net.0.proj",
    "blocks.*.ff_out": "transformer_blocks.*.ff.net.2",
}
_ZIMAGE = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}
for _part in ("noise_refiner", "context_refiner", "layers"):
    _ZIMAGE[f"{_part}.*.attention.qkv"] = _stack(f"{_part}.*.attention", *_QKV)
    _ZIMAGE[f"{_part}.*.attention.out"] = f"{_part}.*.attention.to_out.0"

_KREA2_BLOCKS = {
    f"{native}.*.{part}": f"{ours}.*.{ours_part}"
    for native, ours in (
        ("blocks", "transformer_blocks"),
        ("txtfusion.layerwise_blocks", "text_fusion.layerwise_blocks"),
        ("txtfusion.refiner_blocks", "text_fusion.refiner_blocks"),
    )
    for part, ours_part in (
        *((f"attn.w{part}", f"attn.to_{part}") for part in "qkv"),
        ("attn.gate", "attn.to_gate"),
        ("attn.wo", "attn.to_out.0"),
        *((f"mlp.{part}", f"ff.{part}") for part in ("gate", "up", "down")),
    )
}
_KREA2 = _KREA2_BLOCKS | {
    "first": "img_in",
    "tmlp.0": "time_embed.linear_1",
    "tmlp.2": "time_embed.linear_2",
    "tproj.1": "time_mod_proj",
    "txtmlp.1": "txt_in.linear_1",
    "txtmlp.3": "txt_in.linear_2",
    "txtfusion.projector": "text_fusion.projector",
    "last.linear": "final_layer.linear",
}

NATIVE: dict[str, dict[str, str]] = {  # Qwen-Image: its own names are the native ones
    "sd3": _SD3,
    "flux": _FLUX,
    "pixart": _PIXART,
    "sana": _SANA,
    "wan": _WAN,
    "cogvideox": _COGVIDEOX,
    "zimage": _ZIMAGE,
    "krea2": _KREA2,
}
