"""Scores that need weights: CLIP on a tiny real model, and the refusals of the others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tdm.errors import TDMError
from tdm.tests import tiny
from tdm.tests.training.preference_reference import FILE, PROMPTS, WORDS, pictures, weights
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
    actual = extra(f"clip={clip}")(pictures, prompts)
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    processor = transformers.CLIPProcessor.from_pretrained(clip)
    scores = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        inputs = processor(text=[prompt], images=[picture], return_tensors="pt")
        with torch.no_grad():
            scores.append(float(model(**inputs).logits_per_image / model.logit_scale.exp()))
    assert min(scores) != max(scores)
    assert actual.value == pytest.approx(100 * sum(max(0.0, s) for s in scores) / 5, abs=0.05)
    assert actual.low < actual.value < actual.high


def test_image_reward_is_what_its_own_code_says(tmp_path: Path) -> None:
    known = reference("image_reward")
    state = weights(known["shapes"]) | {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    torch.save(state, tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    assert_scores(f"image_reward={tmp_path / 'ImageReward.pt'}", known["scores"])


def test_hpsv2_is_what_its_own_code_says(tmp_path: Path) -> None:
    known = reference("hpsv2")
    torch.save({"epoch": 3, "state_dict": weights(known["shapes"])}, tmp_path / "HPS_v2.1_compressed.pt")
    *pieces, _, _ = known["vocabulary"]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(tmp_path)
    assert_scores(f"hpsv2={tmp_path / 'HPS_v2.1_compressed.pt'}", known["scores"])


def assert_scores(text: str, known: list[float]) -> None:
    score = extra(text)
    alone = [float(score.network([picture], [prompt])) for picture, prompt in zip(pictures(), PROMPTS, strict=True)]
    assert alone == pytest.approx(known, rel=1e-4)
    assert score.network(pictures(), PROMPTS).tolist() == pytest.approx(known, rel=1e-4)
    square = np.asarray(pictures()[0])
    actual = score(torch.from_numpy(square.copy()).permute(2, 0, 1)[None].expand(40, -1, -1, -1), PROMPTS[:1] * 40)
    assert actual.value == pytest.approx(known[0], rel=1e-4)


def test_weights_that_lack_a_part_are_refused(tmp_path: Path) -> None:
    state = weights(reference("image_reward")["shapes"])
    del state["blip.visual_encoder.blocks.1.norm2.bias"]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(TDMError, match=r"image_reward=.*: its weights cannot be loaded"):
        extra(f"image_reward={tmp_path / 'part.pt'}")


def reference(name: str) -> dict:
    """What the published code said of tiny networks; see preference_reference.py."""
    return json.loads(FILE.read_text())[name]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("clip", "clip wants the name of a CLIP: clip=..."),
        ("clip={tmp}/none", "clip=.*: its weights cannot be loaded"),
        ("fid", "fid wants a folder of real pictures"),
        ("fid={tmp}", "no folder with .png or .jpg pictures"),
        ("hpsv2=v3", "hpsv2=v3: no such file, nor a version; there are v2.0, v2.1"),
        ("hpsv2", "hpsv2=v2.1: its weights cannot be loaded"),
        ("image_reward", "image_reward=v1.0: its weights cannot be loaded"),
        ("hpsv2={tmp}/other.pt", "hpsv2=.*other.pt: its weights cannot be loaded"),
        ("image_reward={tmp}/other.pt", "its weights cannot be loaded .the weights have no blip.visual_encoder"),
        ("image_reward={tmp}/code.pt", "code.pt: its weights cannot be loaded"),
    ],
)
def test_what_is_not_there_is_one_line(text: str, line: str, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save({"weight": Path("a")}, tmp_path / "code.pt")  # a pickle that is more than tensors
    with pytest.raises(TDMError, match=line) as error:
        extra(text.replace("{tmp}", str(tmp_path)))
    assert "\n" not in str(error.value)


def test_fid_without_its_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(TDMError, match="the package torch-fidelity is not installed"):
        extra(f"fid={tmp_path}")
