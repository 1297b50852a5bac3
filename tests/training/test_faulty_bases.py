"""Bases whose files are not what they should be: read right or refused in one line, never filled at random."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tdm import TDMPipeline
from tdm.errors import TDMError
from tdm.pipelines.base_weights import check_files, components, variant_of
from tdm.tests import tiny

from .base_tasks import task_of

Bases = Callable[[str], Path]


def copy_of(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    return folder


def weights_of(base: Path, component: str) -> Path:
    (file,) = (base / component).glob("*.safetensors")
    return file


def without(base: Path, component: str, part: str) -> str:
    """Take the first tensor with `part` in its name out of a network's file; returns the name."""
    file = weights_of(base, component)
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if part in name)
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    return name


@pytest.mark.parametrize(
    ("family", "component", "part"),
    [
        ("sdxl", "text_encoder_2", "text_projection"),
        ("sd15", "text_encoder", "fc1.weight"),
        ("wan", "text_encoder", "shared"),
        ("qwenimage", "text_encoder", "layers.1.mlp.up_proj"),
        ("sd15", "unet", "conv_in.weight"),
        ("flux", "transformer", "x_embedder.bias"),
    ],
)
def test_a_network_that_lacks_a_tensor_is_refused(
    family: str, component: str, part: str, bases: Bases, prompts: str, tmp_path: Path
) -> None:
    base = copy_of(bases(family), tmp_path / "base")
    without(base, component, part)
    with pytest.raises(TDMError, match=rf"^{component} of the base .* lacks \d of its tensors"):
        task_of(family, base, prompts, cache=str(tmp_path / "cache"))
    with pytest.raises(TDMError, match=r"lacks \d of its tensors"):
        components(str(base), {}, torch.float32)


def test_inference_refuses_an_incomplete_base_as_training_does(bases: Bases, tmp_path: Path) -> None:
    base = copy_of(bases("sd15"), tmp_path / "base")
    without(base, "vae", "decoder.conv_in.weight")
    recipe = {"trained_timesteps": {2: [999, 500]}, "guidance_scale": 1.0, "height": 16, "width": 16}
    student = tmp_path / "student.safetensors"
    rank = {"r": 2, "target_modules": ["to_q"]}
    pipe = tiny.build("sd15")
    pipe.unet.add_adapter(LoraConfig(**rank))
    layers = {f"unet.{k}".replace(".default", ""): v for k, v in pipe.unet.state_dict().items() if "lora_" in k}
    save_file(layers, student)
    with pytest.raises(TDMError, match=r"vae of the base .* lacks 1 of its tensors"):
        TDMPipeline.from_pretrained(base, student=student, recipe=recipe)


@pytest.mark.parametrize("fused", [False, True])
def test_a_base_saved_with_a_lora_in_it_is_named_so(fused: bool, prompts: str, tmp_path: Path) -> None:
    pipe = tiny.build("sd15")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    if fused:
        pipe.fuse_lora()
    pipe.save_pretrained(tmp_path / "base")
    with pytest.raises(TDMError, match="saved with a LoRA attached; call unload_lora_weights"):
        task_of("sd15", tmp_path / "base", prompts)
    with pytest.raises(TDMError, match="saved with a LoRA attached"):
        check_files(str(tmp_path / "base"))


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale", "weight_scale_2", "comfy_quant"])
def test_a_folder_with_scales_of_quantised_weights_is_refused(
    scale: str, bases: Bases, prompts: str, tmp_path: Path
) -> None:
    base = copy_of(bases("sd15"), tmp_path / "base")
    file = weights_of(base, "unet")
    save_file({**load_file(file), f"time_embedding.linear_1.{scale}": torch.ones(1)}, file, {"format": "pt"})
    with pytest.raises(TDMError, match=f"quantised .*{scale}"):
        task_of("sd15", base, prompts)
    with pytest.raises(TDMError, match="quantised"):
        check_files(str(base))


@pytest.mark.parametrize("family", ["sdxl", "pixart"])
def test_a_base_that_has_its_weights_as_fp16_alone_is_read(family: str, prompts: str, tmp_path: Path) -> None:
    tiny.build(family).to(torch.float16).save_pretrained(tmp_path / "base", variant="fp16")
    task = task_of(family, tmp_path / "base", prompts)
    assert {weight.dtype for weight in task.base.parameters()} == {torch.float32}
    loaded = components(str(tmp_path / "base"), {}, torch.float32)
    stored = tiny.build(family).to(torch.float16).components
    for name, part in loaded.items():
        if part is not None:
            for key, weight in stored[name].state_dict().items():
                assert torch.equal(part.state_dict()[key].float(), weight.float()), (name, key)


@pytest.mark.parametrize(
    ("names", "variant"),
    [
        (["model.safetensors"], None),
        (["model.safetensors", "model.fp16.safetensors"], None),
        (["model.fp16.safetensors", "model.bf16.safetensors"], "fp16"),
        (["diffusion_pytorch_model.bf16.safetensors"], "bf16"),
        (["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"], "fp16"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], None),
        (["config.json", "notes.old.safetensors"], None),
    ],
)
def test_the_variant_is_that_of_the_files(names: list[str], variant: str | None, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    for name in names:
        (tmp_path / "unet" / name).touch()
    assert variant_of(str(tmp_path), "unet") == variant


def test_several_variants_without_fp16_are_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    for name in ("ema", "non_ema"):
        (tmp_path / "unet" / f"diffusion_pytorch_model.{name}.safetensors").touch()
    with pytest.raises(TDMError, match="as ema, non_ema; keep one"):
        variant_of(str(tmp_path), "unet")


def test_a_scheduler_that_cannot_be_followed_is_told_which_file_to_change(
    bases: Bases, prompts: str, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(bases("sdxl"), folder)
    file = folder / "scheduler" / "scheduler_config.json"
    config = {**json.loads(file.read_text()), "_class_name": "DDIMScheduler", "clip_sample": True}
    file.write_text(json.dumps({**config, "thresholding": True}))
    with pytest.raises(TDMError, match=f"cannot follow thresholding=True .*in {file}") as error:
        task_of("sdxl", folder, prompts)
    assert "\n" not in str(error.value)
    file.write_text(json.dumps({**config, "thresholding": False}))  # what the line says
    with pytest.warns(UserWarning, match="clip_sample=True, .* latents are not clipped here"):  # that is followed
        task_of("sdxl", folder, prompts)


def test_sd3_without_t5_is_a_base(bases: Bases, prompts: str, tmp_path: Path) -> None:
    base = copy_of(bases("sd3"), tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text())
    index["text_encoder_3"] = index["tokenizer_3"] = [None, None]
    (base / "model_index.json").write_text(json.dumps(index))
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(base / name)
    lines: list[str] = []
    task = task_of("sd3", base, prompts, report=lines.append)
    assert task.encode(["a cat"])["text"].isfinite().all()
    assert components(str(base), {}, torch.float32)["text_encoder_3"] is None


@pytest.mark.parametrize("missing", ["scheduler", "tokenizer", "unet"])
def test_a_base_without_a_folder_is_one_line(missing: str, bases: Bases, prompts: str, tmp_path: Path) -> None:
    base = copy_of(bases("sd15"), tmp_path / "base")
    shutil.rmtree(base / missing)
    with pytest.raises(TDMError, match=str(base)):
        task_of("sd15", base, prompts, cache=str(tmp_path / "cache"))
