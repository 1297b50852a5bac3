"""LoRA files with more in them than halves in 16 bits: T5 layers, embeddings, 8-bit floats, biases, layers of 0."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tdm import TDMPipeline
from tdm.errors import TDMError
from tdm.pipelines.families import family_of_name
from tdm.pipelines.loras.file import read_lora_file
from tdm.pipelines.loras.layer_names import layer_shapes, names_of
from tdm.pipelines.loras.native import place_native
from tdm.pipelines.loras.pairs import Lora
from tdm.pipelines.students.convert import convert_lora
from tdm.tests import tiny
from tdm.tests.pipelines.lora_files import LAYOUTS, Update, diffusers_names, merge, tensors_of, updates, write
from tdm.tests.pipelines.native_networks import native_of
from tdm.tests.pipelines.students import error, latents, load, lora_for, plain, recipe_for, short_call, without_student
from torch import Tensor

Bases = Callable[[str], Path]
Loaded = Callable[[str], TDMPipeline]


def recipe(family: str, bases: Bases) -> dict[str, Any]:
    return vars(recipe_for(family, bases(family)))


def by_hand(pipe: TDMPipeline, base: Path, family: str, loras: list[Update]) -> Tensor:
    merged, clean = plain(base), without_student(pipe)
    merge(merged, loras, 1.0)
    for component in pipe._adaptable():
        setattr(clean, component, getattr(merged, component))
    return short_call(clean, family)


def attention(pipe: Any, family: str, seed: int = 0) -> list[Update]:
    denoiser = family_of_name(family).denoiser
    return updates(pipe, denoiser, {n: (n,) for n in layer_shapes(getattr(pipe, denoiser)) if "att" in n}, seed=seed)


@pytest.mark.parametrize("prefix", ["lora_te3_", "text_encoders.t5xxl.transformer."])
@pytest.mark.parametrize(("family", "encoder"), [("flux", "text_encoder_2"), ("sd3", "text_encoder_3")])
def test_layers_of_t5_find_it_and_go_where_the_student_goes(
    family: str, encoder: str, prefix: str, bases: Bases, tmp_path: Path
) -> None:
    network = getattr(tiny.build(family), encoder)
    t5 = updates(tiny.build(family), encoder, diffusers_names(network, family), seed=3)
    tensors = tensors_of(LAYOUTS["diffusers"], loras := attention(tiny.build(family), family))
    for update in t5:
        name = update.name.replace(".", "_") if prefix.endswith("_") else update.name
        tensors |= {f"{prefix}{name}.lora_down.weight": update.A, f"{prefix}{name}.lora_up.weight": update.B}
    pipe = load(bases(family), student=write(tmp_path / "lora.safetensors", tensors), recipe=recipe(family, bases))
    expected = by_hand(pipe, bases(family), family, [*loras, *t5])
    actual = short_call(pipe, family)
    assert error(actual, expected) <= 1e-5
    assert error(actual, by_hand(pipe, bases(family), family, loras)) > 1e-4  # T5's do something
    with pipe.teacher():
        base = latents(plain(bases(family)), family, guidance_scale=3.0)
        assert error(latents(pipe, family, guidance_scale=3.0), base) <= 1e-5
    pipe.save_pretrained(tmp_path / "saved")
    assert error(short_call(load(tmp_path / "saved"), family), expected) <= 1e-5
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert error(short_call(pipe, family), expected) <= 1e-5


@pytest.mark.parametrize(
    ("family", "name", "component"), [("flux", "clip_l", "text_encoder"), ("sdxl", "clip_g", "text_encoder_2")]
)
def test_clip_has_the_names_of_comfyui(family: str, name: str, component: str, bases: Bases, tmp_path: Path) -> None:
    pipe = tiny.build(family)
    clip = updates(pipe, component, diffusers_names(getattr(pipe, component), family), seed=3)
    tensors = tensors_of(LAYOUTS["diffusers"], loras := attention(pipe, family))
    for update in clip:
        key = f"text_encoders.{name}.transformer.text_model.{update.name.removeprefix('text_model.')}"
        tensors |= {f"{key}.lora_down.weight": update.A, f"{key}.lora_up.weight": update.B}
    pipe = load(bases(family), student=write(tmp_path / "lora.safetensors", tensors), recipe=recipe(family, bases))
    assert error(short_call(pipe, family), by_hand(pipe, bases(family), family, [*loras, *clip])) <= 1e-5


def test_xlabs_processors_are_the_attention_of_flux(loaded: Loaded, bases: Bases, tmp_path: Path) -> None:
    pipe = loaded("flux")
    names = {n: layers for n, layers in names_of(pipe.transformer, "flux").items() if ".processor." in n}
    assert len(names) == 2 * 4 + 2 * 2
    loras = updates(pipe, "transformer", names)
    tensors = {f"{u.name}.{end}.weight": half for u in loras for end, half in (("down", u.A), ("up", u.B))}
    pipe.load_student(write(tmp_path / "lora.safetensors", tensors), recipe=recipe("flux", bases))
    actual = short_call(pipe, "flux")
    assert error(actual, by_hand(pipe, bases("flux"), "flux", loras)) <= 1e-5
    stock = plain(bases("flux"))
    stock.load_lora_weights(dict(tensors))
    clean = without_student(pipe)
    clean.transformer = stock.transformer
    assert error(actual, short_call(clean, "flux")) <= 1e-5


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_embeddings_beside_a_lora_are_left_out_and_named(
    family: str, loaded: Loaded, bases: Bases, tmp_path: Path
) -> None:
    pipe, tensors = loaded(family), tensors_of(LAYOUTS["diffusers"], loras := attention(tiny.build(family), family))
    tensors["bundle_emb.token.clip_l"] = torch.randn(1, 8)
    with pytest.warns(UserWarning, match=r"1 tensors next to the LoRA are left out: bundle_emb.token.clip_l"):
        pipe.load_student(write(tmp_path / "lora.safetensors", tensors), recipe=recipe(family, bases))
    assert error(short_call(pipe, family), by_hand(pipe, bases(family), family, loras)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_halves_in_8_bits_are_what_they_say(
    family: str, dtype: torch.dtype, loaded: Loaded, bases: Bases, tmp_path: Path
) -> None:
    pipe, loras = (
        loaded(family),
        [u._replace(A=u.A.to(dtype), B=u.B.to(dtype)) for u in attention(tiny.build(family), family)],
    )
    wide = [u._replace(A=u.A.float(), B=u.B.float()) for u in loras]
    file = write(tmp_path / "lora.safetensors", tensors_of(LAYOUTS["diffusers"], loras))
    pipe.load_student(file, recipe=recipe(family, bases))
    assert error(short_call(pipe, family), by_hand(pipe, bases(family), family, wide)) <= 1e-5
    student = convert_lora(file, base=str(bases(family)), recipe=recipe(family, bases))
    assert all(lora.A.dtype == torch.float32 for layers in student.layers.values() for lora in layers.values())


@pytest.mark.parametrize("ending", [".scale_weight", ".weight_scale", ".weight.scale"])
def test_scales_of_8_bit_halves_are_multiplied_in(ending: str, loaded: Loaded, bases: Bases, tmp_path: Path) -> None:
    pipe, loras = loaded("sd15"), attention(tiny.build("sd15"), "sd15")
    tensors: dict[str, Tensor] = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    scaled = []
    for i, update in enumerate(loras):
        halves = []
        for name, half in (("A", update.A), ("B", update.B)):
            rows = half.flatten(1).abs().amax(1)
            scale = (rows if i % 2 else rows.amax()) / 448  # one a row, or one
            stored = (half / scale.reshape(-1, *[1] * (half.ndim - 1))).to(torch.float8_e4m3fn)
            key = f"unet.{update.name}.lora_{name}"
            tensors |= {f"{key}.weight": stored, f"{key}{ending}": scale, f"{key}.input_scale": torch.ones(())}
            halves.append(stored.float() * scale.reshape(-1, *[1] * (half.ndim - 1)))
        scaled.append(update._replace(A=halves[0], B=halves[1]))
    pipe.load_student(write(tmp_path / "lora.safetensors", tensors), recipe=recipe("sd15", bases))
    assert error(short_call(pipe, "sd15"), by_hand(pipe, bases("sd15"), "sd15", scaled)) <= 1e-5


EXTRAS = {
    "diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(24),
    "diffusion_model.blocks.0.norm3.diff": torch.ones(24),
    "diffusion_model.blocks.0.diff_m": torch.ones(1, 6, 24),
}


def test_biases_and_layers_without_a_place_are_left_out_where_the_user_asks(
    loaded: Loaded, bases: Bases, tmp_path: Path
) -> None:
    pipe, loras = loaded("wan"), attention(tiny.build("wan"), "wan")
    tensors = tensors_of(LAYOUTS["diffusers"], loras)
    image = {
        f"diffusion_model.blocks.0.cross_attn.k_img.lora_{e}.weight": torch.ones(s)
        for e, s in (("down", (2, 24)), ("up", (24, 2)))
    }
    right = by_hand(pipe, bases("wan"), "wan", loras)

    with warnings.catch_warnings():  # what is 0 is no part of the update
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        nothing = {key: torch.zeros_like(tensor) for key, tensor in (EXTRAS | image).items()}
        pipe.load_student(write(tmp_path / "a.safetensors", tensors | nothing), recipe=recipe("wan", bases))
    assert error(short_call(pipe, "wan"), right) <= 1e-5

    for name, extra, message in (("b", EXTRAS, "strict=False"), ("c", image, "k_img .no such layer.; strict=F")):
        file = write(tmp_path / f"{name}.safetensors", tensors | extra)
        with pytest.raises(TDMError, match=message):
            pipe.load_student(file, recipe=recipe("wan", bases))
        for strict_off in (
            lambda file=file: pipe.load_student(file, recipe=recipe("wan", bases), strict=False),
            lambda file=file: convert_lora(file, base=str(bases("wan")), recipe=recipe("wan", bases), strict=False),
        ):
            with pytest.warns(UserWarning, match="left out"):
                strict_off()
        assert error(short_call(pipe, "wan"), right) <= 1e-5
    with pytest.raises(TDMError, match="0 of its"):  # nothing fits: another family's
        pipe.load_student(write(tmp_path / "d.safetensors", image), recipe=recipe("wan", bases), strict=False)


def test_a_native_network_takes_them_as_a_pipeline_does(tmp_path: Path) -> None:
    native, _ = native_of(tiny.build("wan").transformer, "wan")
    tensors = {
        f"lora_unet__blocks_0_self_attn_q.lora_{e}.weight": torch.ones(s)
        for e, s in (("down", (2, 24)), ("up", (24, 2)))
    }
    save_file(tensors | EXTRAS, tmp_path / "lora.safetensors")
    file = read_lora_file(tmp_path / "lora.safetensors")
    with pytest.raises(TDMError, match="strict=False"):
        place_native(file, family_of_name("wan"), {"transformer": native})
    with pytest.warns(UserWarning, match="3 tensors next to the LoRA"):
        placed = place_native(file, family_of_name("wan"), {"transformer": native}, strict=False)
    (lora,) = placed["transformer"].values()
    assert torch.equal(lora.A, Lora(torch.ones(2, 24), torch.ones(24, 2)).A)


def test_a_student_of_a_text_encoder_s_mlp_alone_loads(bases: Bases, tmp_path: Path) -> None:
    pipe = tiny.build("sd15")
    clip = updates(
        pipe, "text_encoder", {n: (n,) for n in layer_shapes(pipe.text_encoder) if n.endswith("fc1")}, seed=2
    )
    unet = {f"unet.{key}": half for key, half in lora_for(pipe.unet).items()}
    pipe = load(
        bases("sd15"),
        student=write(tmp_path / "l.pt", unet | tensors_of(LAYOUTS["diffusers"], clip)),
        recipe=recipe("sd15", bases),
    )
    assert pipe.get_list_adapters() == {"unet": ["student"], "text_encoder": ["student"]}
    assert short_call(pipe, "sd15").isfinite().all()
