"""Diffusers' own ways to save memory and time work on a `TDMPipeline`, and the student in it stays right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PipelineQuantizationConfig, TorchAoConfig
from tdm import TDMPipeline
from tdm.errors import TDMError
from tdm.tests.pipelines.students import MAIN, Make, latents, load, short_call, state
from torch import Tensor

FP8 = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}


def denoiser(pipe: TDMPipeline) -> Any:
    return getattr(pipe, pipe.family.denoiser)


def teacher(pipe: TDMPipeline, family: str) -> Tensor:
    with pipe.teacher():
        return latents(pipe, family)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Check that the latents agree, with an error relative to the largest latent."""
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def assert_same_models(pipe: TDMPipeline, plain: TDMPipeline, family: str, second: Path, tolerance: float) -> None:
    """Student, teacher, student again and a second student: like those of the pipeline without the machinery."""
    assert_close(short_call(pipe, family), short_call(plain, family), tolerance)
    assert_close(teacher(pipe, family), teacher(plain, family), tolerance)
    assert_close(short_call(pipe, family), short_call(plain, family), tolerance)
    for each in (pipe, plain):
        each.load_student(second)
    assert_close(short_call(pipe, family), short_call(plain, family), tolerance)


@pytest.mark.parametrize("family", MAIN)
def test_a_student_on_int8_weights(family: str, make: Make, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    file, second = make(family), make(family, "second.safetensors", seed=1)
    plain = load(file)
    component = plain.family.denoiser
    int8 = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    pipe = load(file, quantization_config=PipelineQuantizationConfig(quant_mapping={component: int8}))
    attention = next(module for name, module in denoiser(pipe).named_modules() if name.endswith("to_q"))
    assert type(attention.base_layer.weight).__name__ == "Int8Tensor"
    assert attention.lora_A["student"].weight.dtype == torch.float32
    assert not torch.equal(short_call(pipe, family), short_call(plain, family))
    assert_same_models(pipe, plain, family, second, tolerance=0.02)
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(short_call(load(tmp_path / "saved"), family), short_call(pipe, family))


@pytest.mark.parametrize("family", MAIN)
def test_layerwise_casting_keeps_the_student_and_refuses_another(family: str, make: Make, tmp_path: Path) -> None:
    file = make(family)
    plain, pipe = load(file), load(file)
    denoiser(pipe).enable_layerwise_casting(**FP8)
    assert torch.float8_e4m3fn in {parameter.dtype for parameter in denoiser(pipe).parameters()}
    cast, before = short_call(pipe, family), state(pipe)
    assert not torch.equal(cast, short_call(plain, family))
    assert_close(cast, short_call(plain, family), 0.05)
    assert_close(teacher(pipe, family), teacher(plain, family), 0.05)
    with pytest.raises(TDMError, match=r"float8_e4m3fn .*; call enable_layerwise_casting after load_student"):
        pipe.load_student(make(family, "second.safetensors", seed=1))
    with pytest.raises(TDMError, match="call save_pretrained before enable_layerwise_casting"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert state(pipe) == before
    assert torch.equal(short_call(pipe, family), cast)


@pytest.mark.parametrize("family", MAIN)
@pytest.mark.parametrize(
    "options", [{"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}], ids=["leaf", "block"]
)
def test_group_offload(family: str, options: dict[str, Any], make: Make) -> None:
    file, second = make(family), make(family, "second.safetensors", seed=1)
    pipe = load(file)
    denoiser(pipe).enable_group_offload(onload_device=torch.device("cpu"), **options)
    assert_same_models(pipe, load(file), family, second, tolerance=0)


def test_model_offload(make: Make) -> None:
    """Loading another student then needs an accelerator, because diffusers offloads again to the default one."""
    plain, pipe = load(make("sd15")), load(make("sd15"))
    pipe.enable_model_cpu_offload(device="cpu")
    assert_close(short_call(pipe, "sd15"), short_call(plain, "sd15"), 1e-5)
    assert_close(teacher(pipe, "sd15"), teacher(plain, "sd15"), 1e-5)


def test_a_compiled_denoiser_is_the_student_the_teacher_and_the_next_student_in_turn(make: Make) -> None:
    file, second = make("pixart"), make("pixart", "second.safetensors", seed=1)
    pipe = load(file)
    pipe.transformer.compile(backend="eager")  # what differs between the backends is not what may go wrong here
    assert_same_models(pipe, load(file), "pixart", second, tolerance=0)


def test_a_load_without_a_second_copy_in_memory(make: Make) -> None:
    file = make("sd15")
    expected = short_call(load(file), "sd15")
    pipe = load(file, low_cpu_mem_usage=True, device_map="cpu")
    assert torch.equal(short_call(pipe, "sd15"), expected)
