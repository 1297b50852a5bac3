"""`TDMPipeline.save_pretrained`: a clean base and its student, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tdm.errors import TDMError
from tdm.tests.pipelines.students import (
    Make,
    load,
    short_call,
    state,
)

# ---------------------------------------------------------------------- save_pretrained


def test_a_saved_folder_needs_no_other_folder(make: Make, bases: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(bases("sd15"), tmp_path / "base")
    pipe = load(make("sd15", base_model=str(tmp_path / "base")))
    pipe.save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "base")
    assert torch.equal(short_call(load(tmp_path / "saved"), "sd15"), short_call(pipe, "sd15"))


def test_a_folder_that_exists_stays_without_force(make: Make, tmp_path: Path) -> None:
    pipe = load(make("sd15"))
    target = tmp_path / "saved"
    target.mkdir()
    pipe.save_pretrained(target)  # an empty folder is no loss
    (target / "mine.txt").write_text("keep")
    with pytest.raises(TDMError, match="force"):
        pipe.save_pretrained(target)
    assert (target / "mine.txt").exists()
    pipe.save_pretrained(target, force=True)
    assert not (target / "mine.txt").exists()
    assert torch.equal(short_call(load(target), "sd15"), short_call(pipe, "sd15"))
    assert sorted(os.listdir(tmp_path)) == ["saved", "student.safetensors"]


def test_a_failed_save_leaves_nothing_behind(make: Make, tmp_path: Path) -> None:
    pipe = load(make("sd15"))
    expected, before = short_call(pipe, "sd15"), state(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    kept = (tmp_path / "saved" / "student.safetensors").read_bytes()
    with pytest.raises(ValueError, match="Unit"):
        pipe.save_pretrained(tmp_path / "saved", force=True, max_shard_size="wrong")
    assert (tmp_path / "saved" / "student.safetensors").read_bytes() == kept
    assert sorted(os.listdir(tmp_path)) == ["saved", "student.safetensors"]
    assert state(pipe) == before
    assert torch.equal(short_call(pipe, "sd15"), expected)
    assert any("lora" in key for key in pipe.unet.state_dict())


def test_a_pipeline_that_a_folder_could_not_hold_is_not_saved(make: Make, tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(TDMError, match=message):
            pipe.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()

    pipe = load(make("sd15"))
    with pytest.raises(TDMError, match="push_to_hub"):
        pipe.save_pretrained(tmp_path / "saved", push_to_hub=True)
    pipe.set_adapters("student", 0.5)
    refused("strength 0.5")
    pipe.set_adapters("student")
    pipe.load_lora_weights(str(make("sd15", "style.safetensors", seed=1)), adapter_name="style")
    refused(r"adapters \['style'\]")
    pipe.delete_adapters("style")
    pipe.set_adapters("student")
    pipe.fuse_lora()
    refused("fused")
    with pytest.raises(TDMError, match="fused"), pipe.teacher():
        pass
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    refused("no longer loaded")
    pipe.load_student(make("sd15"))
    pipe.save_pretrained(tmp_path / "saved")
    with pytest.raises(TDMError, match="a file"):
        pipe.save_pretrained(tmp_path / "student.safetensors", force=True)


def test_a_compiled_denoiser_is_saved_as_the_network_it_wraps(make: Make, tmp_path: Path) -> None:
    pipe = load(make("sd15"))
    expected = short_call(pipe, "sd15")
    pipe.unet = torch.compile(pipe.unet)
    pipe.load_student(make("sd15"))
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(short_call(load(tmp_path / "saved"), "sd15"), expected)
