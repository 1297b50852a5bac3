"""The published shapes of the presets' bases: complete, the right sizes, and only where the base is not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tdm.errors import BaseNotFoundError, TDMError
from tdm.pipelines.base_weights import component_classes
from tdm.pipelines.bases import outline, pipeline_without_weights
from tdm.pipelines.outlines import network_without_weights, published_bases, published_configs
from tdm.pipelines.scheduler import TDMScheduler
from tdm.tests import tiny
from tdm.tests.pipelines.test_presets import in_cache
from tdm.training.settings import load_config, read_settings

# Denoiser, text encoders: weights as published, in the repositories' own files.
WEIGHTS = {
    "sd15": (859_520_964, (123_060_480,)),
    "sdxl": (2_567_463_684, (123_060_480, 694_659_840)),
    "sd3": (2_243_171_520, (123_650_304, 694_659_840, 4_762_310_656)),
    "flux": (11_901_408_320, (123_060_480, 4_762_310_656)),
    "pixart": (611_349_152, (4_762_310_656,)),
    "sana": (1_604_462_752, (2_614_341_888,)),
    "zimage": (6_154_908_736, (4_022_468_096,)),
    "qwenimage": (20_430_401_088, (8_292_166_656,)),
    "krea2": (12_820_073_036, (4_437_815_808,)),
    "wan": (1_418_996_800, (5_680_910_336,)),
    "cogvideox": (1_693_783_872, (4_762_310_656,)),
}
LATENTS = {
    "sd15": (4, 64, 64),
    "sana": (32, 32, 32),
    "wan": (16, 21, 60, 104),
    "cogvideox": (13, 16, 60, 90),
    **dict.fromkeys(("sdxl", "pixart"), (4, 128, 128)),
    **dict.fromkeys(("sd3", "flux", "zimage", "qwenimage", "krea2"), (16, 128, 128)),
}


def model_of(family: str) -> str:
    return str(load_config(family).task["model"])


def weights(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_base_of_each_preset_is_shipped_with_its_published_weights(family: str) -> None:
    folder = published_configs(model_of(family))
    assert folder == published_bases()[family]
    assert folder is not None
    kind, pipe, shapes = outline(model_of(family))
    assert shapes == f"published configs of {model_of(family)}, shipped with tdm"
    denoiser, encoders = WEIGHTS[family]
    assert weights(getattr(pipe, kind.denoiser)) == denoiser
    index = json.loads((folder / "model_index.json").read_text())
    names = sorted(name for name in component_classes(index) if name.startswith("text_encoder"))
    sizes = tuple(weights(network_without_weights(*index[name], str(folder), name, {})) for name in names)
    assert sizes == encoders
    assert kind.latent_shape(pipe, kind.default_size(pipe)) == LATENTS[family]
    assert TDMScheduler.from_config(pipe.scheduler.config).schedule.kind in ("flow", "vp")


def real_folder(family: str, folder: Path) -> Path:
    """The folder of a base as the hub has it: the published configs, and the tokenizers that are not shipped."""
    shutil.copytree(published_bases()[family], folder)
    index = json.loads((folder / "model_index.json").read_text())
    tokenizers = {n: t for n, t in tiny.build(family).components.items() if n.startswith("tokenizer")}
    for name, tokenizer in tokenizers.items():
        clip = type(tokenizer).__name__.startswith("CLIP")
        tokenizer.model_max_length = 77 if clip else 512
        tokenizer.save_pretrained(folder / name)
        index[name] = ["transformers", type(tokenizer).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_shipped_shapes_are_all_that_an_estimate_takes_from_a_real_base(family: str, tmp_path: Path) -> None:
    from tdm.training.estimate.rehearsal import TaskWithoutWeights, shapes_of

    base = real_folder(family, tmp_path / "base")
    section = load_config(family).task
    shipped, real = (TaskWithoutWeights({**section, "model": m}, torch.bfloat16) for m in (section["model"], str(base)))
    assert real.shapes == f"configs of {base}"
    assert shapes_of(shipped.base) == shapes_of(real.base)
    assert {**shipped.base.config, "_name_or_path": ""} == {**real.base.config, "_name_or_path": ""}
    assert (shipped.size, shipped.latent_shape) == (real.size, real.latent_shape)
    assert shipped.prediction_type == real.prediction_type
    t = torch.tensor([999.0, 500.0, 20.0], dtype=torch.float64)
    for one, other in zip(shipped.schedule.alpha_sigma(t), real.schedule.alpha_sigma(t), strict=True):
        assert torch.equal(one, other)
    one, other = shipped.conditions(2), real.conditions(2)
    assert {k: (v.shape, v.dtype) for k, v in one.items()} == {k: (v.shape, v.dtype) for k, v in other.items()}


def test_a_base_in_the_cache_and_a_folder_of_its_name_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("sd15")
    cached = in_cache(tmp_path / "hub", model)
    smaller = real_folder("sd15", tmp_path / "smaller")
    config = json.loads((smaller / "unet" / "config.json").read_text())
    (smaller / "unet" / "config.json").write_text(json.dumps(config | {"layers_per_block": 1}))
    shutil.copy(smaller / "model_index.json", cached)
    hub = {"cache_dir": tmp_path / "hub"}
    assert outline(model, **hub)[2].endswith("shipped with tdm")  # its other configs are not in the cache
    shutil.copytree(smaller, cached, dirs_exist_ok=True)
    _, pipe, shapes = outline(model, **hub)
    assert shapes == f"configs of {model}"
    assert weights(pipe.unet) < WEIGHTS["sd15"][0]

    monkeypatch.chdir(tmp_path)
    assert published_configs(model) is not None
    shutil.copytree(smaller, tmp_path / model)
    assert published_configs(model) is None
    assert weights(outline(model)[1].unet) == weights(pipe.unet)


def test_no_other_base_is_taken_for_a_published_one(tmp_path: Path) -> None:
    for name in ("stabilityai/sdxl", "../base_configs/Qwen/Qwen-Image", str(tmp_path)):
        with pytest.raises(BaseNotFoundError):
            outline(name)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(TDMError, match="has no unet"):
        outline(str(tmp_path))


def test_a_base_that_is_published_chooses_its_preset_offline() -> None:
    lines: list[str] = []
    config = read_settings([f"task.model={model_of('flux')}", "12gb"], lines.append)
    assert (config.objective.guidance_scale, config.memory.base) == (1.0, "nf4")
    assert len(lines) == 1
    assert lines[0].startswith(f"{model_of('flux')} is a base of flux: the preset flux is taken")


def test_pipelines_that_are_shipped_are_read_as_a_folder_is(tmp_path: Path) -> None:
    for family, folder in published_bases().items():
        kind, _ = pipeline_without_weights(str(shutil.copytree(folder, tmp_path / family)))
        assert kind.name == family
