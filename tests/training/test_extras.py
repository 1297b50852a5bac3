"""Scores that want weights: CLIP on a tiny real one, the others' refusals."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers
from tdm.errors import TDMError
from tdm.tests import tiny
from tdm.training.metrics.extras import extra


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A tiny CLIP of random weights with its processor."""
    tokenizer, text = tiny._clip(projection=8)
    config = transformers.CLIPConfig(
        text_config=text.config.to_dict(),
        vision_config={
            "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 8, "projection_dim": 8,
        },
        projection_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    size = {"shortest_edge": 16}
    images = transformers.CLIPImageProcessor(size=size, crop_size={"height": 16, "width": 16})
    model.save_pretrained(tmp_path / "clip")
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_clip_score_is_a_hundred_times_the_cosine_that_the_models_own_logits_have(clip: Path) -> None:
    pictures = torch.randint(256, (5, 3, 16, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    prompts = ["a cat", "a red cube", "a cat", "two stars above a tree", "x"]
    found = extra(f"clip={clip}")(pictures, prompts)
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    processor = transformers.CLIPProcessor.from_pretrained(clip)
    scores = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        inputs = processor(text=[prompt], images=[picture], return_tensors="pt")
        with torch.no_grad():
            scores.append(float(model(**inputs).logits_per_image / model.logit_scale.exp()))
    assert min(scores) != max(scores)
    assert found.value == pytest.approx(100 * sum(max(0.0, s) for s in scores) / 5, abs=0.05)
    assert found.low < found.value < found.high


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("clip", "clip wants the name of a CLIP: clip=..."),
        ("clip={tmp}/none", "clip=.*: its weights are not to be had"),
        ("fid", "fid wants a folder of real pictures"),
        ("fid={tmp}", "no folder with .png or .jpg pictures"),
        ("hpsv2=v3", "hpsv2=v3: there are v2.0 and v2.1"),
        ("hpsv2", "the package hpsv2 is not installed"),
        ("image_reward", "the package image-reward is not installed"),
    ],
)
def test_what_is_not_there_is_one_line(text: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("hpsv2", "ImageReward"):
        monkeypatch.setitem(sys.modules, module, None)  # as if not installed
    with pytest.raises(TDMError, match=line) as error:
        extra(text.replace("{tmp}", str(tmp_path)))
    assert "\n" not in str(error.value)


def test_fid_without_its_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(TDMError, match="the package torch-fidelity is not installed"):
        extra(f"fid={tmp_path}")
