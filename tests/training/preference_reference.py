"""What the published code of HPSv2 and ImageReward says of tiny random networks: makes `preference_reference.json`.

The tests read only the file. To make it again, use a separate environment (that code needs transformers 4):

    pip install torch "transformers==4.37.2" open_clip_torch fairscale
    pip install --no-deps image-reward==1.5
    python tests/training/preference_reference.py

ImageReward is its package's own classes, at small sizes. HPSv2 is open_clip, of which its package holds a
copy: score.py of its repository multiplies the features of picture and prompt that open_clip's model returns.
"""

from __future__ import annotations

import gzip
import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from PIL import Image

WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
    "a", "two", "three", "red", "blue", "cat", "star", "stars", "above", "hill", "at", "night", "un", "##seen", ",",
]  # fmt: skip
PROMPTS = ["a red cat", "two stars above a blue hill at night", "Three unseen, red, red cat", "dog " * 50]
FILE = Path(__file__).with_suffix(".json")


def weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The same random weights wherever they are made, near 1 where a norm multiplies."""
    tensors = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        norm = name.endswith("weight") and len(shape) == 1
        tensors[name] = 1 + 0.1 * noise if norm else noise / (shape[-1] if shape else 1) ** 0.5
    return tensors


def pictures() -> list[Image.Image]:
    """Random pictures of several sizes and shapes, smooth enough that resizing keeps some structure."""
    images = []
    for i, (height, width) in enumerate([(32, 32), (48, 48), (40, 64), (80, 50)]):
        noise = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(i))
        smooth = torch.nn.functional.interpolate(noise, (height, width), mode="bilinear")[0]
        images.append(Image.fromarray((255 * smooth).byte().permute(1, 2, 0).numpy()))
    return images


def shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in model.state_dict().items() if value.is_floating_point()}


def image_reward() -> dict[str, object]:
    for other in ("clip", "ImageReward.ReFL"):  # for other scores, and for training: not needed here
        sys.modules[other] = ModuleType(other)
    published = import_module("ImageReward.ImageReward")
    from ImageReward.models.BLIP.med import BertConfig, BertModel
    from ImageReward.models.BLIP.vit import VisionTransformer
    from transformers import BertTokenizer

    model = published.ImageReward.__new__(published.ImageReward)
    torch.nn.Module.__init__(model)
    model.device, model.mean, model.std = "cpu", 0.16717362830052426, 1.0333394966054072
    model.preprocess, model.mlp = published._transform(32), published.MLP(64)
    model.blip = torch.nn.Module()
    model.blip.visual_encoder = VisionTransformer(img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2)
    config = BertConfig(
        vocab_size=len(WORDS) + 2, hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96,
        encoder_width=128, add_cross_attention=True, max_position_embeddings=40,
    )  # fmt: skip
    model.blip.text_encoder = BertModel(config=config, add_pooling_layer=False)
    vocabulary = FILE.with_name("vocab.txt")
    vocabulary.write_text("\n".join(WORDS))
    model.blip.tokenizer = BertTokenizer(vocabulary)
    vocabulary.unlink()
    model.blip.tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    model.blip.tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    weight_shapes = shapes(model)
    model.load_state_dict(weights(weight_shapes), strict=False)
    model.eval()
    scores = [model.score(prompt, picture) for prompt, picture in zip(PROMPTS, pictures(), strict=True)]
    return {"shapes": weight_shapes, "scores": scores}


def hps() -> dict[str, object]:
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    merges = FILE.with_name("merges.gz")
    merges.write_bytes(gzip.compress(b"#version: 0.2"))  # none, so that each byte is a token
    tokenizer = open_clip.SimpleTokenizer(str(merges), context_length=32)
    merges.unlink()
    model = open_clip.CLIP(
        embed_dim=24,
        vision_cfg={"image_size": 32, "layers": 2, "width": 32, "head_width": 2, "patch_size": 8, "mlp_ratio": 2.0},
        text_cfg={"context_length": 32, "vocab_size": len(tokenizer.encoder), "width": 48, "heads": 16, "layers": 2},
    )
    weight_shapes = shapes(model)
    weight_shapes.pop("attn_mask", None)
    model.load_state_dict(weights(weight_shapes), strict=False)
    model.eval()
    see = image_transform_v2(PreprocessCfg(size=32), is_train=False)
    with torch.no_grad():
        image_embeds = model.encode_image(torch.stack([see(picture) for picture in pictures()]), normalize=True)
        read = model.encode_text(tokenizer(PROMPTS), normalize=True)
    return {
        "shapes": weight_shapes,
        "vocabulary": list(tokenizer.encoder),
        "scores": (100 * (image_embeds * read).sum(1)).tolist(),
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps({"image_reward": image_reward(), "hpsv2": hps()}) + "\n")
