"""Scores by trained networks, for people who have the weights: off unless asked for, imported only then.

    clip=MODEL         CLIP score, 100 times the cosine of picture and prompt: a CLIP of transformers, folder or hub id
    hpsv2, hpsv2=v2.0  Human Preference Score v2.1 or v2.0, weights from the hub
    image_reward       ImageReward v1.0, weights from the hub
    hpsv2=FILE, image_reward=FILE    the same from a file, the tokenizer from the file's folder or from the hub
    fid=FOLDER         FID to the pictures in a folder, of the package torch-fidelity; means little below some thousands

No published weights were available. What was run: CLIP, on tiny random weights, against transformers' own logits; HPSv2
and ImageReward, on tiny random weights in the published layouts, against the published code, HPSv2 once on random
weights at its real size; FID, on random weights in the package's own network (torch-fidelity 0.4.0), against the
distance of its features; and every refusal. A score that cannot be imported, or whose weights cannot be loaded, is
refused in one line.
"""

from __future__ import annotations

import contextlib
import importlib
import pickle
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ...errors import TDMError, first_line
from .bootstrap import Value, measured

BATCH = 32


class Extra(Protocol):
    """A score of pictures."""

    name: str

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Value:
        """The measure of uint8 pictures (N, 3, H, W) and their N prompts."""
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
            output = self.model(**inputs)
            cosine = torch.cosine_similarity(output.image_embeds, output.text_embeds)
            scores.append(100 * cosine.clamp_min(0))
        return measured(torch.cat(scores))


class Preference:
    """HPSv2 or ImageReward (preferences.py), the mean over pictures.

    Args:
        name: "hpsv2" or "image_reward".
        weights: one of its versions, from the hub; or a file of it.
    """

    def __init__(self, name: str, weights: str = "") -> None:
        from . import preferences  # with the networks of transformers

        self.name = name
        networks: dict[str, Any] = {"hpsv2": preferences.HpsNetwork, "image_reward": preferences.RewardNetwork}
        network = networks[name]
        weights = weights or list(network.versions)[-1]
        if weights not in network.versions and not Path(weights).is_file():
            raise TDMError(f"{name}={weights}: no such file, nor a version; there are {', '.join(network.versions)}")
        with _weights(f"{name}={weights}"):
            self.network = network(weights)

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Value:
        batches = [slice(start, start + BATCH) for start in range(0, len(prompts), BATCH)]
        return measured(torch.cat([self.network(_pil(pictures[batch]), prompts[batch]) for batch in batches]))


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
        metrics = self.package.calculate_metrics(
            input1=_Pictures(pictures), input2=self.folder, fid=True, cuda=cuda, verbose=False, cache=False
        )
        return Value(float(metrics["frechet_inception_distance"]))


class _Pictures(Dataset):
    """Pictures as torch-fidelity takes them: uint8 (3, H, W) each."""

    def __init__(self, pictures: Tensor) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> Tensor:
        return self.pictures[i]


EXTRAS: dict[str, tuple[Any, str | None]] = {  # and what must be given with it
    "clip": (ClipScore, "the name of a CLIP"),
    "hpsv2": (partial(Preference, "hpsv2"), None),
    "image_reward": (partial(Preference, "image_reward"), None),
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
        raise TDMError(f"the package {name} is not installed, or not for what is here ({first_line(error)})") from error


@contextlib.contextmanager
def _weights(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise TDMError(f"{name}: its package cannot be used with what is here ({first_line(error)})") from error
    except (OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        # no network, no such model, files of something else
        raise TDMError(f"{name}: its weights cannot be loaded ({first_line(error)})") from error
