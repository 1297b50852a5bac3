"""LoRAs of every layout on networks in their original code: the very update that they are on the diffusers layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tdm.errors import TDMError
from tdm.pipelines.families import family_of_name
from tdm.pipelines.loras.file import read_lora_file
from tdm.pipelines.loras.layer_names import LayerShape, layer_shapes, layers_of_native, swapped
from tdm.pipelines.loras.native import place_native
from tdm.pipelines.loras.pairs import Lora, state_dict_of
from tdm.pipelines.loras.released import released
from tdm.tests import tiny
from tdm.tests.pipelines.lora_files import (
    ALPHA,
    LAYOUTS,
    RANK,
    Update,
    diffusers_names,
    layouts_of,
    tensors_of,
    updates,
)
from tdm.tests.pipelines.native_networks import native_network, native_of
from torch import Tensor, nn

FILES = [(family, layout) for family in tiny.FAMILIES for layout in layouts_of(family)]


def delta(lora: Lora) -> Tensor:
    """Return the update of a weight as a matrix."""
    A, B = (half.double().flatten(1) for half in lora)
    return B @ A


def deltas_by_hand(loras: list[Update], pipe: Any, native: nn.Module, scale: float) -> dict[str, Tensor]:
    """The update of each diffusers layer, its halves in the order of the native network."""
    deltas, same = {}, layer_shapes(native).keys()  # Qwen-Image's last modulation is diffusers' own, by name and order
    for update in loras:
        row = 0
        for layer in update.layers:
            rows = getattr(pipe, update.component).get_submodule(layer).weight.shape[0]
            deltas[layer] = delta(Lora(update.A, update.B[row : row + rows])) * scale
            own_name = update.name.replace(".", "_") == layer.replace(".", "_")
            if own_name and layer not in same and layer in swapped(getattr(pipe, update.component)):
                deltas[layer] = deltas[layer].roll(rows // 2, 0)  # scale, shift: native ones are shift, scale
            row += rows
    return deltas


@pytest.mark.parametrize(("family", "layout"), FILES)
def test_the_update_of_each_native_layer_is_that_of_its_parts(family: str, layout: str, tmp_path: Path) -> None:
    pipe = tiny.build(family)
    component = family_of_name(family).denoiser
    network = getattr(pipe, component)
    native, stacks = native_of(network, family)
    loras = updates(pipe, component, LAYOUTS[layout].names(network, family))
    file = tmp_path / "lora.safetensors"
    save_file(tensors_of(LAYOUTS[layout], loras), file)

    placed = place_native(read_lora_file(file), family_of_name(family), {component: native})
    expected = deltas_by_hand(loras, pipe, native, 1.0 if LAYOUTS[layout].alpha is None else ALPHA / RANK)
    touched = {name: layers for name, layers in stacks.items() if expected.keys() & set(layers)}
    assert placed[component].keys() == touched.keys()
    assert sum(len(layers) for layers in touched.values()) == len(expected)
    shapes = layer_shapes(native)
    for name, layers in touched.items():
        lora = placed[component][name]
        inputs, outputs, kernel = shapes[name]
        assert lora.A.shape == (lora.rank, inputs, *kernel)
        assert lora.B.shape == (outputs, lora.rank, *[1] * len(kernel))
        torch.testing.assert_close(delta(lora), torch.cat([expected[layer] for layer in layers]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["pixart", "sd3", "cogvideox", "flux", "zimage"])
def test_parts_without_a_lora_keep_their_rows_as_they_are(family: str, tmp_path: Path) -> None:
    pipe = tiny.build(family)
    component = family_of_name(family).denoiser
    native, stacks = native_of(pipe.transformer, family)
    ends = ("to_v", "add_k_proj", "proj_mlp")
    loras = updates(
        pipe, component, {n: o for n, o in diffusers_names(pipe.transformer, "").items() if n.endswith(ends)}
    )
    save_file(tensors_of(LAYOUTS["diffusers"], loras), tmp_path / "lora.safetensors")
    placed = place_native(read_lora_file(tmp_path / "lora.safetensors"), family_of_name(family), {component: native})
    expected = deltas_by_hand(loras, pipe, native, 1.0)
    for name, lora in placed[component].items():
        zeros = [(pipe.transformer.get_submodule(layer).weight.double() * 0).flatten(1) for layer in stacks[name]]
        whole = torch.cat([expected.get(layer, zero) for layer, zero in zip(stacks[name], zeros, strict=True)])
        torch.testing.assert_close(delta(lora), whole, rtol=0, atol=1e-6)
    assert sum(len(set(stacks[name]) & expected.keys()) for name in placed[component]) == len(loras)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_file_in_the_diffusers_names_of_a_network_stays_as_it_is(family: str, tmp_path: Path) -> None:
    native, _ = native_of(getattr(tiny.build(family), family_of_name(family).denoiser), family)
    layers = {
        name: Lora(torch.randn(2, inputs, *kernel), torch.randn(outputs, 2, *[1] * len(kernel)))
        for name, (inputs, outputs, kernel) in layer_shapes(native).items()
    }
    file = tmp_path / "lora.safetensors"
    save_file({f"diffusion_model.{key}": tensor for key, tensor in state_dict_of(layers).items()}, file)
    placed = place_native(read_lora_file(file), family_of_name(family), {family_of_name(family).denoiser: native})
    (placed_layers,) = placed.values()
    assert placed_layers.keys() == layers.keys()
    assert all(torch.equal(half, mine) for n in layers for half, mine in zip(placed_layers[n], layers[n], strict=True))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_file_for_the_text_encoders_too_finds_them(family: str, layout: str, tmp_path: Path) -> None:
    pipe = tiny.build(family)
    encoders = [name for name in ("text_encoder", "text_encoder_2") if hasattr(pipe, name)]
    loras = [
        u for name in ("unet", *encoders) for u in updates(pipe, name, diffusers_names(getattr(pipe, name), family))
    ]
    save_file(tensors_of(LAYOUTS[layout], loras), tmp_path / "lora.safetensors")
    file = read_lora_file(tmp_path / "lora.safetensors")
    networks = {"unet": native_of(pipe.unet, family)[0]}
    for name in encoders:  # as they are called there, whatever transformers does
        shapes = layer_shapes(getattr(pipe, name))
        there = {n if n.startswith("text_") else f"text_model.{n}": shape for n, shape in shapes.items()}
        networks[name] = native_network(there)
    placed = place_native(file, family_of_name(family), networks)
    scale = 1.0 if LAYOUTS[layout].alpha is None else ALPHA / RANK
    for update in (u for u in loras if u.component != "unet"):
        name = update.name if update.name.startswith("text_") else f"text_model.{update.name}"
        by_hand = delta(Lora(update.A, update.B)) * scale
        torch.testing.assert_close(delta(placed[update.component][name]), by_hand, rtol=0, atol=1e-6)
    with pytest.raises(TDMError, match=r"match, \d+ do not: text_encoder\..*without a CLIP there is no text_encoder"):
        place_native(file, family_of_name(family), {"unet": networks["unet"]})


def written(path: Path, layers: dict[str, tuple[int, int]]) -> Path:
    tensors = {}
    for layer, (inputs, outputs) in layers.items():
        tensors[f"transformer.{layer}.lora_A.weight"] = torch.ones(2, inputs)
        tensors[f"transformer.{layer}.lora_B.weight"] = torch.ones(outputs, 2)
    save_file(tensors, path)
    return path


BLOCK = "transformer_blocks.0"
SD3 = {
    "joint_blocks.0.x_block.attn.qkv": LayerShape(8, 24),
    "joint_blocks.0.context_block.adaLN_modulation.1": LayerShape(8, 48),
    "joint_blocks.1.context_block.adaLN_modulation.1": LayerShape(8, 16),  # of the last block: shift, scale
    "final_layer.adaLN_modulation.1": LayerShape(8, 16),
}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            {f"{BLOCK}.attn.to_q": (8, 8), "other": (8, 8)},
            r"1 of its 2 .* transformer.other \(no such",
        ),
        ({f"{BLOCK}.attn.to_q": (8, 6)}, r"0 of its 1 .*to_q \(\(8, 8\) wide, not \(8, 6\)"),
        ({f"{BLOCK}.attn.to_q": (4, 8)}, r"to_q \(\(8, 8\) wide, not \(4, 8\)"),
        ({f"{BLOCK}.attn.to_k": (8, 8), "joint_blocks.0.x_block.attn.qkv": (8, 24)}, "two LoRAs for the layer"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused(layers: dict[str, tuple[int, int]], message: str, tmp_path: Path) -> None:
    file = read_lora_file(written(tmp_path / "lora.safetensors", layers))
    with pytest.raises(TDMError, match=message):
        place_native(file, family_of_name("sd3"), {"transformer": native_network(SD3)})


@pytest.mark.parametrize(
    ("layer", "native", "swapped"),
    [
        (f"{BLOCK}.norm1_context.linear", "joint_blocks.0.context_block.adaLN_modulation.1", False),
        ("transformer_blocks.1.norm1_context.linear", "joint_blocks.1.context_block.adaLN_modulation.1", True),
        ("norm_out.linear", "final_layer.adaLN_modulation.1", True),
    ],
)
def test_scale_and_shift_of_a_last_modulation_change_places(
    layer: str, native: str, swapped: bool, tmp_path: Path
) -> None:
    outputs = SD3[native].outputs
    lora = Lora(torch.randn(2, 8), torch.randn(outputs, 2))
    tensors = {f"transformer.{key}": tensor for key, tensor in state_dict_of({layer: lora}).items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    file = read_lora_file(tmp_path / "lora.safetensors")
    placed = place_native(file, family_of_name("sd3"), {"transformer": native_network(SD3)})
    (placed_lora,) = placed["transformer"].values()
    expected = delta(lora).roll(outputs // 2, 0) if swapped else delta(lora)
    assert list(placed["transformer"]) == [native]
    torch.testing.assert_close(delta(placed_lora), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_blocks_of_a_native_unet_are_counted_back(family: str) -> None:
    for network in (tiny.build(family).unet, released(family)):
        native, stacks = native_of(network, family)
        assert layers_of_native(layer_shapes(native), family) == stacks
