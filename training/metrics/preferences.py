"""What people prefer, as two published networks learned it: HPSv2 and ImageReward, in the networks of transformers.

Their own packages do not run with transformers 5 (hpsv2 1.2.0 lacks its vocabulary file, image-reward 1.5 imports
what is gone). Their checkpoints do, under other names: HPSv2 is a CLIP in open_clip's layout, ImageReward a BLIP with a
linear head. Sizes are read from the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
import transformers
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor, nn

State = Mapping[str, Tensor]
M = TypeVar("M", bound=nn.Module)
HPS_HEADS = 16  # of ViT-H/14, in pictures (of 80) and in text (of 64)
BLIP_HEAD = 64  # channels of each head
REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072  # of the training data, in ImageReward.py
REWARD_TOKENS = 35
CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


class HpsNetwork(nn.Module):
    """Human Preference Score v2 (Wu et al., 2023): ``100 cos(picture, prompt)`` of a CLIP, as in published tables.

    Args:
        weights: a version, from the hub; or a file of one.

    Raises:
        OSError, RuntimeError, ValueError, KeyError, UnpicklingError: no such weights, or of something else.
    """

    versions: ClassVar = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}

    def __init__(self, weights: str) -> None:
        super().__init__()
        path = _file("xswu/HPSv2", self.versions, weights)
        state = clip_state(_read(path))
        config: Any = clip_config(state)
        self.clip = _loaded(transformers.CLIPModel(config), state)
        self.tokenizer = _tokenizer(transformers.CLIPTokenizer, path, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
        self.size, self.tokens = config.vision_config.image_size, config.text_config.max_position_embeddings

    @torch.no_grad()
    def forward(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """(N,) scores of N pictures, each for its prompt."""
        text = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=self.tokens, return_tensors="pt")
        embeddings = self.clip(**text, pixel_values=_pixels(pictures, self.size))
        return 100 * torch.cosine_similarity(embeddings.image_embeds, embeddings.text_embeds)


class RewardNetwork(nn.Module):
    """ImageReward (Xu et al., 2023): a preference in standard deviations of its training data.

    Args:
        weights: a version, from the hub; or a file of one.

    Raises:
        OSError, RuntimeError, ValueError, KeyError, UnpicklingError: no such weights, or of something else.
    """

    versions: ClassVar = {"v1.0": "ImageReward.pt"}

    def __init__(self, weights: str) -> None:
        super().__init__()
        path = _file("THUDM/ImageReward", self.versions, weights)
        state = _read(path)
        vision, text = blip_vision_state(state), _under(state, "blip.text_encoder.")
        text.pop("embeddings.position_ids", None)
        vision_config: Any
        vision_config, text_config = blip_configs(vision, text)
        self.size: int = vision_config.image_size
        self.vision = _loaded(transformers.BlipVisionModel(vision_config), vision)
        self.text = _loaded(transformers.BlipTextModel(text_config, add_pooling_layer=False), text)
        head = _under(state, "mlp.layers.")
        self.head = _loaded(_linear_head(head), head)
        self.tokenizer = _tokenizer(transformers.BertTokenizer, path, "bert-base-uncased")

    @torch.no_grad()
    def forward(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """(N,) scores of N pictures, each for its prompt."""
        text = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=REWARD_TOKENS, return_tensors="pt"
        )
        states = self.vision(_pixels(pictures, self.size)).last_hidden_state
        read = self.text(
            input_ids=text.input_ids, attention_mask=text.attention_mask, encoder_hidden_states=states, is_decoder=False
        )
        return (self.head(read.last_hidden_state[:, 0])[:, 0] - REWARD_MEAN) / REWARD_STD


CLIP_NAMES = (  # open_clip, transformers
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)

VIT_NAMES = (  # BLIP, transformers
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"^norm\.", "post_layernorm."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
)


def clip_state(state: State) -> dict[str, Tensor]:
    """A CLIP of open_clip, as transformers' `CLIPModel` names and shapes its weights."""
    renamed = {}
    for name, value in state.items():
        if name == "attn_mask":  # a constant
            continue
        new = _renamed(name, CLIP_NAMES)
        if new in ("visual_projection.weight", "text_projection.weight"):
            renamed[new] = value.T
        elif ".in_proj_" in new:  # query, key and value in one
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                renamed[new.replace("in_proj_", f"{part}_proj.")] = piece
        else:
            renamed[new] = value
    return renamed


def clip_config(state: State) -> transformers.CLIPConfig:
    """The `CLIPModel` whose weights these are, with HPSv2's heads and activation."""
    patch = state["vision_model.embeddings.patch_embedding.weight"]
    tokens, width = state["text_model.embeddings.token_embedding.weight"].shape
    joint = len(state["text_projection.weight"])
    side = round((len(state["vision_model.embeddings.position_embedding.weight"]) - 1) ** 0.5)
    common = {"num_attention_heads": HPS_HEADS, "hidden_act": "gelu", "projection_dim": joint}
    vision = {
        "hidden_size": len(patch),
        "patch_size": patch.shape[-1],
        "image_size": side * patch.shape[-1],
        "num_hidden_layers": _layers(state, "vision_model.encoder.layers."),
        "intermediate_size": len(state["vision_model.encoder.layers.0.mlp.fc1.weight"]),
    }
    text = {
        "hidden_size": width,
        "vocab_size": tokens,
        "max_position_embeddings": len(state["text_model.embeddings.position_embedding.weight"]),
        "num_hidden_layers": _layers(state, "text_model.encoder.layers."),
        "intermediate_size": len(state["text_model.encoder.layers.0.mlp.fc1.weight"]),
        "eos_token_id": tokens - 1,
    }
    return transformers.CLIPConfig(text_config=text | common, vision_config=vision | common, projection_dim=joint)


def blip_vision_state(state: State) -> dict[str, Tensor]:
    """The vision tower of a BLIP, as transformers' `BlipVisionModel` names it."""
    return {_renamed(name, VIT_NAMES): value for name, value in _under(state, "blip.visual_encoder.").items()}


def blip_configs(vision: State, text: State) -> tuple[transformers.BlipVisionConfig, transformers.BlipTextConfig]:
    """The configurations of the two networks that have these weights."""
    patch = vision["embeddings.patch_embedding.weight"]
    side = round((vision["embeddings.position_embedding"].shape[1] - 1) ** 0.5)
    tokens, width = text["embeddings.word_embeddings.weight"].shape
    sees = transformers.BlipVisionConfig(
        hidden_size=len(patch),
        patch_size=patch.shape[-1],
        image_size=side * patch.shape[-1],
        num_hidden_layers=_layers(vision, "encoder.layers."),
        intermediate_size=len(vision["encoder.layers.0.mlp.fc1.weight"]),
        num_attention_heads=len(patch) // BLIP_HEAD,
        layer_norm_eps=1e-6,
    )
    reads = transformers.BlipTextConfig(
        hidden_size=width,
        vocab_size=tokens,
        encoder_hidden_size=len(patch),
        max_position_embeddings=len(text["embeddings.position_embeddings.weight"]),
        num_hidden_layers=_layers(text, "encoder.layer."),
        intermediate_size=len(text["encoder.layer.0.intermediate.dense.weight"]),
        num_attention_heads=width // BLIP_HEAD,
    )
    return sees, reads


def _linear_head(state: State) -> nn.Sequential:
    """Linear layers, with nothing at the places in between, where dropout was in training."""
    weights = {int(name.split(".")[0]): value for name, value in state.items() if name.endswith(".weight")}
    places = range(max(weights) + 1)
    return nn.Sequential(*(nn.Linear(*weights[i].T.shape) if i in weights else nn.Identity() for i in places))


def _file(repository: str, versions: Mapping[str, str], weights: str) -> Path:
    return Path(hf_hub_download(repository, versions[weights]) if weights in versions else weights)


def _read(path: Path) -> dict[str, Tensor]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    if not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no weights")
    return state


def _loaded(model: M, state: State) -> M:
    model.load_state_dict(state)  # strict: each weight has its place, and each place its weight
    return model.eval()


def _under(state: State, prefix: str) -> dict[str, Tensor]:
    weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not weights:
        raise ValueError(f"the weights have no {prefix}*")
    return weights


def _renamed(name: str, names: Sequence[tuple[str, str]]) -> str:
    for old, new in names:
        name = re.sub(old, new, name)
    return name


def _layers(state: State, prefix: str) -> int:
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix))


def _tokenizer(kind: Any, weights: Path, hub: str) -> Any:
    """The tokenizer in the folder of the weights, else the one of the hub."""
    here = any((weights.parent / name).exists() for name in ("vocab.txt", "vocab.json", "tokenizer.json"))
    return kind.from_pretrained(weights.parent if here else hub)


def _pixels(pictures: Sequence[Image.Image], size: int) -> Tensor:
    """Pictures as both networks were trained on: the short side resized, the middle cut out, CLIP's mean and deviation.

    This is done by hand: where the rest is odd, transformers' processor cuts one pixel off torchvision's place.
    """
    crops = []
    for picture in pictures:
        short = min(picture.size)
        width, height = (int(size * side / short) for side in picture.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        resized = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        crops.append(np.asarray(resized.crop((left, top, left + size, top + size))))
    pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2) / 255
    return (pixels - CLIP_MEAN) / CLIP_STD
