"""The names of layers: pinned to facts, checked against diffusers' own converters of checkpoints, never ambiguous."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from peft import LoraConfig, inject_adapter_in_model
from tdm.pipelines.families import family_of_name
from tdm.pipelines.loras.layer_names import layer_shapes, names_of, swapped
from tdm.tests import tiny
from torch import Tensor, nn

FIRST, MIDDLE = "down_blocks.1.attentions.0.transformer_blocks.0", "mid_block.attentions.0.transformer_blocks.0"
PINS: dict[str, dict[str, str]] = {  # native name: our layers in the order of its rows
    "sd15": {  # one resnet per block here, so that every block of the original has two or three parts
        "input_blocks.0.0": "conv_in",
        "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
        "input_blocks.2.0.op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks.3.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
        "input_blocks.3.1.transformer_blocks.0.attn1.to_q": f"{FIRST}.attn1.to_q",
        "input_blocks.3.1.proj_in": "down_blocks.1.attentions.0.proj_in",
        "middle_block.0.emb_layers.1": "mid_block.resnets.0.time_emb_proj",
        "middle_block.1.transformer_blocks.0.attn2.to_out.0": f"{MIDDLE}.attn2.to_out.0",
        "middle_block.2.out_layers.3": "mid_block.resnets.1.conv2",
        "output_blocks.1.1.proj_out": "up_blocks.0.attentions.1.proj_out",
        "output_blocks.1.2.conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks.3.0.in_layers.2": "up_blocks.1.resnets.1.conv1",
        "time_embed.2": "time_embedding.linear_2",
        "out.2": "conv_out",
    },
    "sdxl": {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"},
    "pixart": {
        "blocks.1.attn.qkv": "transformer_blocks.1.attn1.{to_q to_k to_v}",
        "blocks.1.attn.proj": "transformer_blocks.1.attn1.to_out.0",
        "blocks.0.cross_attn.q_linear": "transformer_blocks.0.attn2.to_q",
        "blocks.0.cross_attn.kv_linear": "transformer_blocks.0.attn2.{to_k to_v}",
        "blocks.0.cross_attn.proj": "transformer_blocks.0.attn2.to_out.0",
        "blocks.0.mlp.fc2": "transformer_blocks.0.ff.net.2",
        "t_block.1": "adaln_single.linear",
        "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        "final_layer.linear": "proj_out",
    },
    "sd3": {
        "joint_blocks.0.context_block.attn.qkv": "transformer_blocks.0.attn.{add_q_proj add_k_proj add_v_proj}",
        "joint_blocks.0.context_block.adaLN_modulation.1": "transformer_blocks.0.norm1_context.linear",
    },
    "cogvideox": {
        "transformer.layers.1.attention.query_key_value": "transformer_blocks.1.attn1.{to_q to_k to_v}",
        "transformer.layers.1.attention.dense": "transformer_blocks.1.attn1.to_out.0",
        "transformer.layers.0.mlp.dense_4h_to_h": "transformer_blocks.0.ff.net.2",
        "mixins.final_layer.linear": "proj_out",
    },
    "flux": {
        "double_blocks.1.img_attn.qkv": "transformer_blocks.1.attn.{to_q to_k to_v}",
        "double_blocks.1.txt_attn.qkv": "transformer_blocks.1.attn.{add_q_proj add_k_proj add_v_proj}",
        "double_blocks.0.txt_mlp.2": "transformer_blocks.0.ff_context.net.2",
        "single_blocks.1.linear1": "single_transformer_blocks.1.{attn.to_q attn.to_k attn.to_v proj_mlp}",
        "single_blocks.1.linear2": "single_transformer_blocks.1.proj_out",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "double_blocks.1.processor.qkv_lora2": "transformer_blocks.1.attn.{add_q_proj add_k_proj add_v_proj}",
        "single_blocks.0.processor.qkv_lora": "single_transformer_blocks.0.attn.{to_q to_k to_v}",
    },
    "wan": {
        "blocks.1.self_attn.o": "blocks.1.attn1.to_out.0",
        "blocks.1.cross_attn.k": "blocks.1.attn2.to_k",
        "blocks.0.ffn.0": "blocks.0.ffn.net.0.proj",
        "time_projection.1": "condition_embedder.time_proj",
        "head.head": "proj_out",
    },
    "zimage": {
        "layers.1.attention.qkv": "layers.1.attention.{to_q to_k to_v}",
        "context_refiner.0.attention.out": "context_refiner.0.attention.to_out.0",
        "x_embedder": "all_x_embedder.2-1",
    },
}
UNNAMED = {  # layers without a native name: named alike in the original
    "sd3": {"context_embedder"},
    "wan": {"patch_embedding"},
}


def denoiser(family: str) -> Any:
    return getattr(tiny.build(family), family_of_name(family).denoiser)


def layers(text: str) -> tuple[str, ...]:
    stem, _, ends = text.removesuffix("}").partition("{")
    return tuple(stem + part for part in ends.split()) or (text,)


@pytest.mark.parametrize("family", PINS)
def test_native_names_stand_for_these_layers(family: str) -> None:
    names = names_of(denoiser(family), family)
    for native, ours in PINS[family].items():
        assert names[native] == names[native.replace(".", "_")] == layers(ours)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_layer_is_found_under_its_own_name_with_dots_or_underscores(family: str) -> None:
    network = denoiser(family)
    names = names_of(network, family)
    for name in layer_shapes(network):
        assert names[name] == names[name.replace(".", "_")] == (name,)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "pixart", "sd3", "flux", "sana", "wan"])
def test_every_layer_has_a_native_name(family: str) -> None:
    network = denoiser(family)
    layers = layer_shapes(network).keys()
    alike = layers | {name.replace(".", "_") for name in layers}
    native = {layer for name, meaning in names_of(network, family).items() if name not in alike for layer in meaning}
    assert layers - native == UNNAMED.get(family, set())


class Forgiving(dict[str, Tensor]):
    """A checkpoint in which whatever else a converter asks for is zeros."""

    def pop(self, key: str, *_default: Any) -> Tensor:  # type: ignore[override]
        return super().pop(key, torch.zeros(12))

    def __missing__(self, key: str) -> Tensor:
        return torch.zeros(12)


@pytest.mark.parametrize(
    ("family", "converter", "prefix"),
    [
        ("sd15", "convert_ldm_unet_checkpoint", "model.diffusion_model."),
        ("sd3", "convert_sd3_transformer_checkpoint_to_diffusers", ""),
        ("sana", "convert_sana_transformer_to_diffusers", ""),
        ("wan", "convert_wan_transformer_to_diffusers", ""),
        ("zimage", "convert_z_image_transformer_checkpoint_to_diffusers", ""),
    ],
)
def test_a_native_checkpoint_by_these_names_is_converted_back_by_diffusers(
    family: str, converter: str, prefix: str
) -> None:
    network = denoiser(family)
    layers = layer_shapes(network).keys()
    natives = {name: ours for name, ours in names_of(network, family).items() if "." in name and name not in layers}
    weights = {name: network.get_submodule(name).weight for name in layers}
    checkpoint = Forgiving({f"{prefix}context_embedder.weight": torch.zeros(16, 1)})
    for native, ours in natives.items():
        weight = torch.cat([weights[layer] for layer in ours])
        if ours[0] in swapped(network):
            weight = weight.roll(len(weight) // 2, 0)
        checkpoint[f"{prefix}{native}.weight"] = weight
        checkpoint[f"{prefix}{native}.bias"] = torch.zeros(len(weight))
    config = {**network.config, "class_embed_type": None}
    converted = getattr(single_file_utils, converter)(checkpoint, config=config)
    for layer in {layer for ours in natives.values() for layer in ours}:
        assert torch.equal(converted[f"{layer}.weight"], weights[layer]), layer


def test_a_layer_with_an_adapter_has_the_same_names() -> None:
    network = denoiser("sd15")
    before, shapes = names_of(network, "sd15"), layer_shapes(network)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "conv1"]), network)
    assert list(layer_shapes(network).items()) == list(shapes.items())
    assert names_of(network, "sd15") == before


class Ambiguous(nn.Module):
    """Two layers that have one name with underscores."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleDict({"b_c": nn.Linear(1, 1)})
        self.a_b = nn.ModuleDict({"c": nn.Linear(1, 1)})


def test_a_name_of_two_layers_is_no_name() -> None:
    assert names_of(Ambiguous(), "sd15") == {"a.b_c": ("a.b_c",), "a_b.c": ("a_b.c",)}


@pytest.mark.parametrize(("family", "component"), [("sd15", "text_encoder"), ("sdxl", "text_encoder_2")])
def test_a_clip_encoder_is_named_with_and_without_text_model(family: str, component: str) -> None:
    names = names_of(getattr(tiny.build(family), component), family)
    ours = names["text_model.encoder.layers.1.mlp.fc1"]
    assert ours == names["encoder.layers.1.mlp.fc1"] == names["text_model_encoder_layers_1_mlp_fc1"]
    assert len(ours) == 1
