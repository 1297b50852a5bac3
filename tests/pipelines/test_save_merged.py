"""`TDMPipeline.save_merged`: a pipeline folder with the student in its weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import PipelineQuantizationConfig, TorchAoConfig
from tdm import TDMPipeline, TDMScheduler
from tdm.cli import main
from tdm.errors import TDMError
from tdm.tests import tiny
from tdm.tests.pipelines.students import GRIDS, NO_GUIDANCE, Make, error, latents, load, plain, short_call, state


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_merged_folder_samples_as_the_student_does(
    family: str, make: Make, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(bases(family), tmp_path / "base")
    pipe = load(make(family, base_model=str(tmp_path / "base")))
    expected, before = short_call(pipe, family), state(pipe)
    pipe.save_merged(tmp_path / "merged")
    assert state(pipe) == before
    assert torch.equal(short_call(pipe, family), expected)  # this pipeline still has an adapter, and a teacher
    shutil.rmtree(tmp_path / "base")

    merged = load(tmp_path / "merged")
    assert merged.recipe == pipe.recipe
    assert not any("lora" in name for name, _ in merged.components[merged.family.denoiser].named_modules())
    assert error(short_call(merged, family), expected) < 1e-5  # float32 weights round the sum once

    stock = plain(tmp_path / "merged")
    assert type(stock.scheduler) is TDMScheduler
    assert stock.scheduler.trained_timesteps == GRIDS
    call = {"guidance_scale": 1.0, **NO_GUIDANCE.get(family, {})}
    assert error(latents(stock, family, **call), latents(pipe, family, **call)) < 1e-5


def test_a_merged_student_has_no_teacher_and_takes_no_other_student(make: Make, tmp_path: Path) -> None:
    load(make("sd15")).save_merged(tmp_path / "merged")
    merged = load(tmp_path / "merged", recipe={"solver_order": 2})
    assert merged.scheduler.config.solver_order == 2
    with pytest.raises(TDMError, match="load the base and the student again"), merged.teacher():
        pass
    for act in (
        lambda: merged.load_student(make("sd15")),
        lambda: merged.save_pretrained(tmp_path / "saved"),
        lambda: load(tmp_path / "merged", student=make("sd15")),
    ):
        with pytest.raises(TDMError, match=r"in its weights already|fused into the weights"):
            act()
    with pytest.raises(TDMError, match=r"no student\.safetensors"):
        load(make("sd15")).load_student(tmp_path / "merged")


def test_whole_weights_run_and_are_saved_as_a_student(make: Make, bases: Callable[[str], Path], tmp_path: Path) -> None:
    pipe = load(make("sd3"))
    expected = short_call(pipe, "sd3")
    pipe.save_merged(tmp_path / "merged")
    with pytest.raises(TDMError, match="lacks: trained_timesteps, guidance_scale, height, width"):
        TDMPipeline.from_pipe(plain(bases("sd3")), student=None)

    tuned = plain(bases("sd3"))  # with the base's own scheduler
    tuned.transformer.load_state_dict(plain(tmp_path / "merged").transformer.state_dict())
    whole = TDMPipeline.from_pipe(tuned, student=None, recipe=vars(pipe.recipe))
    whole.set_progress_bar_config(disable=True)
    assert error(short_call(whole, "sd3"), expected) < 1e-5
    whole.save_merged(tmp_path / "again")
    assert torch.equal(short_call(load(tmp_path / "again"), "sd3"), short_call(whole, "sd3"))


def test_a_merged_folder_is_explained(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(make("sd15")).save_merged(tmp_path / "merged")
    assert main(["info", str(tmp_path / "merged")]) == 0
    printed = capsys.readouterr().out
    assert "a pipeline with the student in its weights" in printed
    assert "900, 700, 500, 300" in printed


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(make: Make, tmp_path: Path) -> None:
    pipe = load(make("sd15"))
    pipe.set_adapters("student", 0.5)
    with pytest.raises(TDMError, match=r"strength 0\.5"):
        pipe.save_merged(tmp_path / "merged")
    pipe.set_adapters("student", 1.0)
    pipe.unet.half()
    for name, weight in pipe.unet.named_parameters():
        if "lora_" in name:
            weight.data.fill_(3e2)
    with pytest.raises(TDMError, match=r"too large for torch\.float16"):
        pipe.save_merged(tmp_path / "merged")
    quantization = pytest.importorskip("torchao.quantization")
    int8 = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    quantised = load(make("sd15"), quantization_config=PipelineQuantizationConfig(quant_mapping={"unet": int8}))
    with pytest.raises(TDMError, match="is quantised; load the base without quantisation"):
        quantised.save_merged(tmp_path / "merged")
    other = load(make("sd15", trained_timesteps={4: [999, 749, 499, 249]}, sampler={"scheduler": "LCMScheduler"}))
    with pytest.raises(TDMError, match="merging is for TDMScheduler"):
        other.save_merged(tmp_path / "merged")
    assert sorted(os.listdir(tmp_path)) == ["student.safetensors"]
