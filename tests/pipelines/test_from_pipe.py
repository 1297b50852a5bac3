"""A student on a pipeline that is loaded already: dtypes stay, missing parts are one line. Pipelines that travel."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    FluxTransformer2DModel,
    GGUFQuantizationConfig,
    PipelineQuantizationConfig,
    TorchAoConfig,
)
from tdm import TDMPipeline
from tdm.errors import TDMError
from tdm.pipelines.families import family_of_name
from tdm.tests import tiny
from tdm.tests.pipelines.students import Make, error, load, lora_for, plain, short_call, state
from torch import nn


def dtypes(pipe: DiffusionPipeline) -> dict[str, torch.dtype]:
    return {name: part.dtype for name, part in pipe.components.items() if isinstance(part, nn.Module)}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_network_keeps_its_dtype_unless_one_is_asked_for(
    family: str, make: Make, bases: Callable[[str], Path]
) -> None:
    for narrow in (family_of_name(family).denoiser, "vae"):
        stock = plain(bases(family))
        getattr(stock, narrow).to(torch.bfloat16)
        before = dtypes(stock)
        assert set(before.values()) == {torch.float32, torch.bfloat16}
        pipe = TDMPipeline.from_pipe(stock, student=make(family))
        assert dtypes(pipe) == dtypes(stock) == before
        assert type(pipe) is type(load(make(family)))
    pipe = TDMPipeline.from_pipe(plain(bases(family)), student=make(family), dtype=torch.bfloat16)
    assert set(dtypes(pipe).values()) == {torch.bfloat16}


def test_a_quantised_pipeline_takes_a_student(make: Make, bases: Callable[[str], Path]) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    int8 = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(torchao.Int8WeightOnlyConfig())})
    stock = DiffusionPipeline.from_pretrained(bases("sd3"), quantization_config=int8, dtype=torch.bfloat16)
    pipe = TDMPipeline.from_pipe(stock, student=make("sd3"))
    assert error(short_call(pipe, "sd3"), short_call(load(make("sd3")), "sd3")) < 0.1


def gguf_transformer(base: Path, dtype: torch.dtype = torch.float32) -> FluxTransformer2DModel:
    """The base's transformer from a .gguf file with its linear layers as Q8_0."""
    gguf = pytest.importorskip("gguf")
    file, kind = base / "flux.gguf", gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(file, "flux")
    for name, weight in tiny.build("flux").transformer.state_dict().items():
        if name.endswith("weight") and weight.ndim == 2 and weight.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    quantised = GGUFQuantizationConfig(compute_dtype=dtype)
    return FluxTransformer2DModel.from_single_file(
        str(file), quantization_config=quantised, config=str(base), subfolder="transformer", dtype=dtype
    )


def test_a_gguf_network_takes_a_student(make: Make, bases: Callable[[str], Path], tmp_path: Path) -> None:
    base, student = bases("flux"), make("flux")
    expected = short_call(load(student), "flux")
    stock = plain(base)
    stock.transformer = gguf_transformer(base)
    packed = [parameter for parameter in stock.transformer.parameters() if parameter.dtype == torch.uint8]
    assert len(packed) > 20
    pipe = TDMPipeline.from_pipe(stock, student=student)
    drawn = short_call(pipe, "flux")
    assert 1e-4 < error(drawn, expected) < 0.01
    reloaded = load(base, student=student, transformer=gguf_transformer(base))
    assert torch.equal(short_call(reloaded, "flux"), drawn)
    narrow = load(base, student=student, transformer=gguf_transformer(base, torch.bfloat16), dtype=torch.bfloat16)
    assert error(short_call(narrow, "flux").float(), expected) < 0.02

    pipe.load_student(make("flux", "second.safetensors", seed=1))
    second = short_call(load(make("flux", "second.safetensors", seed=1)), "flux")
    assert error(short_call(pipe, "flux"), second) < 0.01 < error(second, expected)
    with pipe.teacher():
        teacher = short_call(pipe, "flux", num_inference_steps=4, height=16, width=16)
    assert error(teacher, second) > 0.01
    before = short_call(pipe, "flux")
    style = {f"transformer.{key}": half for key, half in lora_for(tiny.build("flux").transformer, seed=5).items()}
    pipe.load_lora_weights(style, adapter_name="style")
    assert error(short_call(pipe, "flux"), before) > 0.01
    pipe.delete_adapters("style")
    assert torch.equal(short_call(pipe, "flux"), before)

    for refused in (pipe.save_pretrained, pipe.save_merged):
        with pytest.raises(TDMError, match=r"FluxTransformer2DModel has GGUF weights, which cannot be written; keep"):
            refused(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(TDMError, match=r"has GGUF weights, into which nothing can be fused"):
        pipe.fuse_lora()
    assert torch.equal(short_call(pipe, "flux"), before)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_pipeline_pickles_and_copies(family: str, make: Make) -> None:
    pipe = load(make(family))
    expected = short_call(pipe, family)
    for copied in (pickle.loads(pickle.dumps(pipe)), copy.deepcopy(pipe)):
        assert type(copied) is type(pipe)
        assert copied.recipe == pipe.recipe
        assert torch.equal(short_call(copied, family), expected)
        copied.load_student(make(family, "second.safetensors", seed=1))
        with copied.teacher():
            pass
        assert not torch.equal(short_call(copied, family), expected)
    assert torch.equal(short_call(pipe, family), expected)


@pytest.mark.parametrize("scheduler", ["LCMScheduler", "TCDScheduler"])
def test_the_sampler_of_another_method_pickles(scheduler: str, make: Make) -> None:
    sampler = {"scheduler": scheduler, "default_steps": 4}
    pipe = load(make("sd15", sampler=sampler, trained_timesteps={4: [999, 759, 499, 259]}))
    copied = pickle.loads(pickle.dumps(pipe))
    assert torch.equal(short_call(copied, "sd15"), short_call(pipe, "sd15"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_pipeline_without_its_denoiser_is_one_line(family: str, make: Make, bases: Callable[[str], Path]) -> None:
    denoiser = family_of_name(family).denoiser
    with pytest.raises(TDMError, match=f"{denoiser}=None leaves a student no network"):
        TDMPipeline.from_pretrained(bases(family), student=make(family), **{denoiser: None})  # type: ignore[arg-type]


def test_a_base_with_the_scheduler_of_its_training_loads(make: Make, tmp_path: Path) -> None:
    stock = tiny.build("sd15")
    right = load(make("sd15"))
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    stock.scheduler = DDPMScheduler(**betas)
    stock.save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="latents are not clipped"):
        pipe = load(tmp_path / "base", student=make("sd15"))
    assert torch.equal(short_call(pipe, "sd15"), short_call(right, "sd15"))
    assert state(pipe)[3:] == state(right)[3:]
