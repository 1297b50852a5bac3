"""LoRA files of every layout, for each family it occurs in: loaded, they equal their weights merged by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tdm import TDMPipeline
from tdm.pipelines.families import family_of_name
from tdm.pipelines.loras.adapters import lora_of
from tdm.tests import tiny
from tdm.tests.pipelines.lora_files import (
    ALPHA,
    LAYOUTS,
    RANK,
    Update,
    diffusers_names,
    layouts_of,
    merge,
    sd15_lora,
    tensors_of,
    updates,
    write,
)
from tdm.tests.pipelines.students import (
    error,
    latents,
    load,
    lora_for,
    plain,
    recipe_for,
    short_call,
    without_student,
)
from torch import Tensor

SUFFIXES = (".safetensors", ".pt", ".bin", ".ckpt")
FILES = [(family, layout) for family in tiny.FAMILIES for layout in layouts_of(family)]


def merged_call(pipe: TDMPipeline, base: Path, family: str, loras: list[Update], scale: float) -> Tensor:
    """The student pipeline's call with the LoRA in the weights and no adapter."""
    by_hand = plain(base)
    merge(by_hand, loras, scale)
    clean = without_student(pipe)
    for component in {update.component for update in loras} | {pipe.family.denoiser}:
        setattr(clean, component, getattr(by_hand, component))
    return short_call(clean, family)


def loras_for(pipe: TDMPipeline, family: str, layout: str) -> list[Update]:
    components = [family_of_name(family).denoiser]
    if LAYOUTS[layout].text_encoders:
        components += [name for name in pipe._adaptable() if name.startswith("text_encoder")]
    loras = []
    for i, component in enumerate(components):
        names = (LAYOUTS[layout].names if i == 0 else diffusers_names)(getattr(pipe, component), family)
        loras += updates(pipe, component, names, seed=10 * FILES.index((family, layout)) + i)
    return loras


@pytest.mark.parametrize(("family", "layout"), FILES)
def test_a_file_equals_its_weights_merged_by_hand(
    family: str,
    layout: str,
    loaded: Callable[[str], TDMPipeline],
    bases: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    pipe = loaded(family)
    loras = loras_for(pipe, family, layout)
    suffix = SUFFIXES[FILES.index((family, layout)) % len(SUFFIXES)]
    file = write(tmp_path / f"lora{suffix}", tensors_of(LAYOUTS[layout], loras))
    before = short_call(pipe, family)
    pipe.load_student(file, recipe=vars(recipe_for(family, bases(family))))
    scale = 1.0 if LAYOUTS[layout].alpha is None else ALPHA / RANK
    actual, expected = short_call(pipe, family), merged_call(pipe, bases(family), family, loras, scale)
    assert error(actual, expected) <= 1e-5
    assert error(actual, before) > 1e-3  # the LoRA does something


STOCK = [  # what diffusers itself can load, on attention layers
    *((family, "diffusers") for family in tiny.FAMILIES if family != "pixart"),
    *((family, layout) for family in ("sd15", "sdxl") for layout in ("legacy processors", "kohya")),
    *(("sdxl", "kohya native"), ("flux", "kohya native"), ("wan", "native"), ("wan", "native with alpha")),
    *(("zimage", "kohya native"), ("qwenimage", "kohya")),
]


@pytest.mark.parametrize(("family", "layout"), STOCK)
def test_a_file_means_what_it_means_to_diffusers(
    family: str, layout: str, loaded: Callable[[str], TDMPipeline], bases: Callable[[str], Path], tmp_path: Path
) -> None:
    pipe, stock = loaded(family), plain(bases(family))
    denoiser = family_of_name(family).denoiser
    loras = [u for u in loras_for(pipe, family, layout) if u.component == denoiser and "att" in u.name]
    tensors = tensors_of(LAYOUTS[layout], loras)
    pipe.load_student(write(tmp_path / "lora.bin", tensors), recipe=vars(recipe_for(family, bases(family))))
    stock.load_lora_weights(tensors)
    clean = without_student(pipe)
    setattr(clean, denoiser, getattr(stock, denoiser))
    assert error(short_call(pipe, family), short_call(clean, family)) <= 1e-5


# ---------------------------------------------------------------------- scale


def call_with(pipe: TDMPipeline, file: Path, bases: Callable[[str], Path]) -> Tensor:
    pipe.load_student(file, recipe=vars(recipe_for("sd15", bases("sd15"))))
    return short_call(pipe, "sd15")


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"lora_alpha": 6, "r": 2}, 3.0),
        ({"lora_alpha": 4, "r": 2, "use_rslora": True}, 4 / 2**0.5),
        ({"lora_alpha": 2, "r": 2, "alpha_pattern": {"attn.\\.to_[qv]": 8, "to_out.0": 8}}, 4.0),
        ({"r": 2}, 1.0),
    ],
)
def test_alpha_is_read_from_the_settings_of_peft(
    settings: dict[str, Any],
    scale: float,
    loaded: Callable[[str], TDMPipeline],
    bases: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    pipe = loaded("sd15")
    expected = call_with(pipe, write(tmp_path / "scaled.pt", sd15_lora(scale)), bases)
    header = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in settings.items()})}
    actual = call_with(pipe, write(tmp_path / "header.safetensors", sd15_lora(), header), bases)
    assert error(actual, expected) <= 1e-6
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    raw = sd15_lora(key="base_model.model.{}.lora_{}.weight")
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        assert error(call_with(pipe, write(tmp_path / name, raw), bases), expected) <= 1e-6


def test_alpha_may_be_a_plain_number_in_a_pickle(
    loaded: Callable[[str], TDMPipeline], bases: Callable[[str], Path], tmp_path: Path
) -> None:
    pipe = loaded("sd15")
    expected = call_with(pipe, write(tmp_path / "scaled.pt", sd15_lora(2.5)), bases)
    alphas: dict[str, Any] = {key.replace("lora_A.weight", "alpha"): 5.0 for key in sd15_lora() if "lora_A" in key}
    actual = call_with(pipe, write(tmp_path / "alpha.pt", sd15_lora() | alphas), bases)
    assert error(actual, expected) <= 1e-6


def test_kernel_axes_of_length_one_may_be_there_or_not(
    loaded: Callable[[str], TDMPipeline], bases: Callable[[str], Path], tmp_path: Path
) -> None:
    pipe = loaded("sd15")
    loras = [u for u in loras_for(pipe, "sd15", "no prefix") if "attentions" in u.name]
    other = [
        u._replace(A=u.A[..., None, None], B=u.B[..., None, None])
        if u.A.ndim == 2
        else u._replace(A=u.A.flatten(1), B=u.B.flatten(1))
        for u in loras
    ]
    assert {u.A.ndim for u in loras} == {2, 4}
    layout = LAYOUTS["no prefix"]
    expected = call_with(pipe, write(tmp_path / "a.pt", tensors_of(layout, loras)), bases)
    assert torch.equal(call_with(pipe, write(tmp_path / "b.pt", tensors_of(layout, other)), bases), expected)


# ---------------------------------------------------------------------- text encoders


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
def test_layers_of_text_encoders_go_off_in_the_teacher_and_survive_saving(
    family: str, loaded: Callable[[str], TDMPipeline], bases: Callable[[str], Path], tmp_path: Path
) -> None:
    file = write(tmp_path / "lora.pt", tensors_of(LAYOUTS["kohya"], loras_for(loaded(family), family, "kohya")))
    recipe = vars(recipe_for(family, bases(family)))
    pipe = load(bases(family), student=file, recipe=recipe)
    expected = short_call(pipe, family)
    guidance = pipe.family.guidance(3.0)
    with pipe.teacher():
        assert torch.equal(latents(pipe, family, **guidance), latents(plain(bases(family)), family, **guidance))
    assert torch.equal(short_call(pipe, family), expected)

    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(short_call(pipe, family), expected)
    assert torch.equal(short_call(load(tmp_path / "saved"), family), expected)
    assert torch.equal(latents(plain(tmp_path / "saved"), family), latents(plain(bases(family)), family))
    stock = plain(bases(family))
    stock.load_lora_weights(tmp_path / "saved" / "student.safetensors")
    for component in set(pipe._adaptable()) & {"transformer", "unet", "text_encoder", "text_encoder_2"}:
        if (family, component) == ("flux", "text_encoder_2"):
            continue  # T5, which stock pipelines load no LoRA into, as SD3's third encoder
        ours, theirs = lora_of(getattr(pipe, component), "student"), lora_of(getattr(stock, component), "default_0")
        assert ours.keys() == theirs.keys()

    denoiser = family_of_name(family).denoiser
    second = write(tmp_path / "second.pt", lora_for(getattr(tiny.build(family), denoiser)))
    pipe.load_student(second, recipe=recipe)
    assert {name for name, names in pipe.get_list_adapters().items() if names} == {denoiser}
