"""Names of layers against ComfyUI's own networks, at the sizes they were released in; no weights, no server."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tdm.pipelines.families import family_of_name
from tdm.pipelines.loras.file import read_lora_file
from tdm.pipelines.loras.layer_names import LayerShape, layer_shapes
from tdm.pipelines.loras.native import Rows, place_native, rows_of
from tdm.pipelines.loras.pairs import Lora
from tdm.pipelines.loras.released import released
from tdm.pipelines.students.released import PRESETS
from tdm.tests.pipelines.native_networks import native_network
from torch import Tensor, nn

from . import install

FAMILIES = ("sd15", "sdxl", "pixart", "sd3", "cogvideox", "flux", "wan", "zimage", "qwenimage", "krea2")
# ComfyUI knows diffusers' names of these itself.
MAPPED = ("sd15", "sdxl", "pixart", "sd3", "flux", "zimage", "qwenimage", "krea2")
PINS = {
    "cogvideox": {
        "transformer_blocks.29.attn1.to_k": "blocks.29.k",
        "transformer_blocks.0.attn1.to_out.0": "blocks.0.attn_out",
        "transformer_blocks.0.ff.net.0.proj": "blocks.0.ff_proj",
        "transformer_blocks.0.ff.net.2": "blocks.0.ff_out",
    },
    "wan": {
        "blocks.29.attn1.to_q": "blocks.29.self_attn.q",
        "blocks.0.attn2.to_v": "blocks.0.cross_attn.v",
        "blocks.0.attn2.to_out.0": "blocks.0.cross_attn.o",
        "blocks.0.ffn.net.0.proj": "blocks.0.ffn.0",
    },
}


@pytest.fixture(scope="module")
def comfyui(comfyui_installed: None) -> dict[str, Any]:  # noqa: ARG001
    """The JSON that native_layers.py prints."""
    command = [install.python(), Path(__file__).with_name("native_layers.py")]
    env = {**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=install.server_folder(), env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def network(comfyui: dict[str, Any], family: str) -> nn.Module:
    shapes = comfyui[family]["shapes"].items()
    return native_network({name: LayerShape(inputs, outputs, tuple(k)) for name, (outputs, inputs, *k) in shapes})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_diffusers_has_its_place_in_comfyui(family: str, comfyui: dict[str, Any]) -> None:
    native = network(comfyui, family)
    rows = rows_of(native, family)
    for name, shape in layer_shapes(released(family)).items():
        assert sum(part.shape.outputs for part in rows[name]) == shape.outputs, name
        assert {part.shape.inputs for part in rows[name]} == {shape.inputs}, name
        assert rows[name] == rows[name.replace(".", "_")]
    taken = comfyui[family]["keys"]
    assert all(taken[f"diffusion_model.{name}"][0] == f"diffusion_model.{name}.weight" for name in layer_shapes(native))
    for ours, theirs in PINS.get(family, {}).items():
        assert [part.layer for part in rows[ours]] == [theirs]


@pytest.mark.parametrize("family", MAPPED)
def test_they_are_the_places_where_comfyui_puts_loras_of_diffusers(family: str, comfyui: dict[str, Any]) -> None:
    native = network(comfyui, family)
    rows, shapes, released_shapes = rows_of(native, family), layer_shapes(native), layer_shapes(released(family))
    front = f"{family_of_name(family).denoiser}."
    compared = 0
    for key, (weight, part, swapped) in comfyui[family]["keys"].items():
        name = key.removeprefix(front).replace(".processor.to_", ".to_")
        name += ".0" if name.endswith(".to_out") else ""
        if not key.startswith(front) or name not in released_shapes:
            continue
        layer = weight.removeprefix("diffusion_model.").removesuffix(".weight")
        _, start, outputs = part or (0, 0, shapes[layer].outputs)
        if swapped:
            half = LayerShape(shapes[layer].inputs, outputs // 2)
            assert rows[name] == (Rows(layer, outputs // 2, half), Rows(layer, 0, half))
        else:
            assert [(row.layer, row.start, row.shape.outputs) for row in rows[name]] == [(layer, start, outputs)]
        compared += 1
    assert compared > 0.9 * len(released_shapes)


# ---------------------------------------------------------------------- the released students


def value(i: int) -> Tensor:
    return torch.tensor(1.0 + i / 64)


def list_without_names(targets: tuple[str, ...], rank: int, family: str) -> tuple[list[Tensor], list[str]]:
    """(an EMA list as training wrote it, the layer of each two), each layer known by its number; as good as no memory.

    The order is peft's own.
    """
    model = inject_adapter_in_model(LoraConfig(r=rank, target_modules=list(targets)), released.__wrapped__(family))
    parameters = [(name, p) for name, p in model.named_parameters() if ".lora_" in name]
    assert [".lora_A." in name for name, _ in parameters] == [True, False] * (len(parameters) // 2)
    tensors = [value(i // 2).expand(p.shape) for i, (_, p) in enumerate(parameters)]
    return tensors, [name.split(".lora_")[0] for name, _ in parameters[::2]]


@pytest.mark.parametrize(("student", "layers"), [("Luo-Yihong/TDM_sd3-5_lora", 191), ("Luo-Yihong/TDM-R1", 136)])
def test_a_released_list_without_names_lands_layer_by_layer(
    student: str, layers: int, comfyui: dict[str, Any], tmp_path: Path
) -> None:
    preset = PRESETS[student]
    assert preset.positional is not None
    tensors, names = list_without_names(preset.positional.targets, 32, preset.family)
    assert len(names) == layers
    torch.save({"decay": 0.999, "ema_parameters": tensors}, tmp_path / "list.ckpt")
    file = read_lora_file(tmp_path / "list.ckpt")
    native = network(comfyui, preset.family)
    placed = place_native(file, family_of_name(preset.family), {"transformer": native}, **preset.placing)
    rows = rows_of(native, preset.family)
    matched = 0
    for i, name in enumerate(names):
        (there,) = rows[name]
        A, B = placed["transformer"][there.layer]
        block = B[there.start : there.start + there.shape.outputs]
        (columns,) = block[0].nonzero(as_tuple=True)
        assert len(columns) == 32
        assert bool((A[columns] == value(i)).all())
        assert bool((block[:, columns] == 2.0 * value(i)).all())  # alpha 64 on rank 32
        matched += 1
    assert sum(len(lora.A) for lora in placed["transformer"].values()) == 32 * matched


@pytest.mark.parametrize(
    ("student", "key", "halves", "scale"),
    [
        ("Luo-Yihong/TDM_sd3_lora", "transformer.{}.lora_{}.weight", ("A", "B"), 0.125),
        ("Luo-Yihong/TDM_dreamshaper_LoRA", "lora_unet_{}.lora_{}.weight", ("down", "up"), 1.0),
        ("Luo-Yihong/TDM_CogVideoX-2B_LoRA", "transformer.{}.lora_{}.weight", ("A", "B"), 1.0),
    ],
)
def test_a_released_lora_lands_at_its_own_strength(
    student: str, key: str, halves: tuple[str, str], scale: float, comfyui: dict[str, Any], tmp_path: Path
) -> None:
    preset = PRESETS[student]
    family = family_of_name(preset.family)
    targets = {
        n: s for n, s in layer_shapes(released(preset.family)).items() if n.endswith(("to_q", "to_v", "to_out.0"))
    }
    if preset.family == "sd3":  # 3 medium has no second attention
        targets = {name: shape for name, shape in targets.items() if ".attn2." not in name}
    loras, tensors = {}, {}
    for name, shape in targets.items():
        lora = loras[name] = Lora(torch.randn(1, shape.inputs), torch.randn(shape.outputs, 1))
        written = name.replace(".", "_") if "lora_unet" in key else name
        tensors |= {key.format(written, half): tensor for half, tensor in zip(halves, lora, strict=True)}
    torch.save(tensors, tmp_path / (preset.file or "lora.pt"))
    file = read_lora_file(tmp_path / (preset.file or "lora.pt"))
    native = network(comfyui, preset.family)
    placed = place_native(file, family, {family.denoiser: native}, **preset.placing)[family.denoiser]
    rows = rows_of(native, preset.family)
    assert placed.keys() == {rows[name][0].layer for name in targets}
    assert sum(lora.rank for lora in placed.values()) == len(targets)
    for name, lora in list(loras.items())[::7]:  # each is a product of matrices
        (there,) = rows[name]
        A, B = placed[there.layer]
        part = B[there.start : there.start + there.shape.outputs].double() @ A.double()
        torch.testing.assert_close(part, scale * (lora.B.double() @ lora.A.double()), rtol=0, atol=1e-6)
