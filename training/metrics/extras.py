"""Scores by trained networks, for people who have the weights: off unless asked for, imported only then.

    clip=MODEL         CLIP score, 100 times the cosine of picture and prompt: a CLIP of transformers, folder or hub id
    hpsv2, hpsv2=v2.1  Human Preference Score v2.0 or v2.1, of the package hpsv2
    image_reward       ImageReward-v1.0, of the package image-reward; image_reward=FILE for weights that lie elsewhere
    fid=FOLDER         FID to the pictures in a folder, of the package torch-fidelity; means little below some thousands

What was run: CLIP, on tiny random weights against transformers' own logits; FID, on random weights in the package's
own network (torch-fidelity 0.4.0), against the distance of its features; and every refusal. Of the others no weights
were at hand and nothing was run: their calls follow the packages' code, hpsv2 1.2.0 and image-reward 1.5. As they are
on PyPI these two cannot be imported here: hpsv2's wheel lacks its vocabulary file, and image-reward wants functions
that transformers 5 no longer has. What cannot be imported, or whose weights cannot be had, is refused in one line.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ...errors import TDMError
from .bootstrap import Value, measured

BATCH = 32


class Extra(Protocol):
    """A score of pictures."""

    name: str

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Value:
        """Of uint8 pictures (N, 3, H, W) and their N prompts."""
        ...


class ClipScore:
    """``100 cos(picture, prompt)``, at least 0 (Hessel et al., 2021, in the scale of published tables), the mean.

    Args:
        model: a CLIP of transformers, folder or hub id.
    """

    def __init__(self, model: str) -> None:
        self.name = "clip"
        transformers = _package("transformers", "transformers")
        with _weights(f"clip={model}"):
            self.model = transformers.CLIPModel.from_pretrained(model).eval()
            self.processor = transformers.CLIPProcessor.from_pretrained(model)

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Value:
        scores = []
        for start in range(0, len(prompts), BATCH):
            part = slice(start, start + BATCH)
            inputs = self.processor(
                text=list(prompts[part]),
                images=_pil(pictures[part]),
                return_tensors="pt",
                padding=True,
                truncation=True,
            )
            found = self.model(**inputs)
            cosine = torch.cosine_similarity(found.image_embeds, found.text_embeds)
            scores.append(100 * cosine.clamp_min(0))
        return measured(torch.cat(scores))


class Hpsv2:
    """Human Preference Score v2 (Wu et al., 2023), 100 times the package's number, as in published tables.

    Args:
        version: "v2.0" or "v2.1".
    """

    def __init__(self, version: str = "v2.1") -> None:
        if version not in ("v2.0", "v2.1"):
            raise TDMError(f"hpsv2={version}: there are v2.0 and v2.1")
        self.name, self.version = "hpsv2", version
        self.package = _package("hpsv2", "hpsv2")
        with _weights("hpsv2"):
            self._score([Image.new("RGB", (64, 64))], "a picture")  # fetches or misses them

    def _score(self, pictures: list[Image.Image], prompt: str) -> list[float]:
        return [100 * float(s) for s in self.package.score(pictures, prompt, hps_version=self.version)]

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Value:
        scores = [self._score([image], prompt)[0] for image, prompt in zip(_pil(pictures), prompts, strict=True)]
        return measured(torch.tensor(scores))


class ImageReward:
    """ImageReward (Xu et al., 2023), a preference in standard deviations of its training data.

    Args:
        weights: "ImageReward-v1.0", or a file of them.
    """

    def __init__(self, weights: str = "ImageReward-v1.0") -> None:
        self.name = "image_reward"
        package = _package("ImageReward", "image-reward")
        with _weights("image_reward"):
            self.model = package.load(weights)

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Value:
        pairs = zip(_pil(pictures), prompts, strict=True)
        return measured(torch.tensor([float(self.model.score(prompt, image)) for image, prompt in pairs]))


class Fid:
    """Frechet distance on Inception features (Heusel et al., 2017), in torch-fidelity's port of the original network.

    Args:
        folder: with the real pictures, ``.png`` or ``.jpg``.
    """

    def __init__(self, folder: str) -> None:
        self.name, self.folder = "fid", folder
        if not any(path.suffix.lower() in (".png", ".jpg", ".jpeg") for path in Path(folder).glob("*")):
            raise TDMError(f"fid={folder}: no folder with .png or .jpg pictures")
        self.package = _package("torch_fidelity", "torch-fidelity")
        with _weights("fid"):
            importlib.import_module("torch_fidelity.utils").create_feature_extractor(
                "inception-v3-compat", ["2048"], cuda=False, verbose=False
            )

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Value:  # noqa: ARG002
        cuda = torch.cuda.is_available()
        found = self.package.calculate_metrics(
            input1=_Pictures(pictures), input2=self.folder, fid=True, cuda=cuda, verbose=False, cache=False
        )
        return Value(float(found["frechet_inception_distance"]))


class _Pictures(Dataset):
    """As torch-fidelity takes them: uint8 (3, H, W) each."""

    def __init__(self, pictures: Tensor) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> Tensor:
        return self.pictures[i]


EXTRAS: dict[str, tuple[Any, str | None]] = {  # and what must be given with it
    "clip": (ClipScore, "the name of a CLIP"),
    "hpsv2": (Hpsv2, None),
    "image_reward": (ImageReward, None),
    "fid": (Fid, "a folder of real pictures"),
}


def extra(text: str) -> Extra:
    """The score that ``name`` or ``name=argument`` means, with its weights loaded.

    Raises:
        TDMError: there is none of this name, or its package, its weights or its pictures are not there.
    """
    name, _, argument = text.partition("=")
    if name not in EXTRAS:
        raise TDMError(f"there is no extra score {name!r}; there are {', '.join(EXTRAS)}")
    kind, wanted = EXTRAS[name]
    if wanted is not None and not argument:
        raise TDMError(f"{name} wants {wanted}: {name}=...")
    return kind(argument) if argument else kind()


def _pil(pictures: Tensor) -> list[Image.Image]:
    return [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pictures]


def _package(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:  # the last two: made for another torch
        raise TDMError(f"the package {name} is not installed, or not for what is here ({_line(error)})") from error


@contextlib.contextmanager
def _weights(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise TDMError(f"{name}: its package cannot be used with what is here ({_line(error)})") from error
    except (OSError, RuntimeError, ValueError) as error:  # no network, no such model, files of something else
        raise TDMError(f"{name}: its weights are not to be had ({_line(error)})") from error


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
