"""The student file: one .safetensors LoRA that carries in its header all that is needed to run it.

- **Tensors**: `<unet|transformer>.<layer>.lora_A.weight` (rank, in, ...) and `.lora_B.weight` (out, rank, ...), the
  layout of diffusers; text encoders' begin with `text_encoder`, `_2` or `_3`. The LoRA scale alpha / rank is
  baked into lora_B, so the file loads at strength 1.0, with or without metadata, wherever these names are known.
- **Header**: the recipe as JSON under `tdm_student` (see `StudentRecipe`), and diffusers' own `lora_adapter_metadata`.
  Stock loaders read the second and ignore the first.

The same LoRA under kohya's names (`layout="kohya"`: `lora_unet_<layer_with_underscores>.lora_down.weight`,
`.lora_up.weight` and `.alpha`, which is the rank) carries the same recipe. A pipeline folder with the student merged
into its weights has the recipe next to `model_index.json`, in `student.json`.

`version` is 1. A change that an older reader would get wrong raises it; a reader refuses a version above its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from ...errors import TDMError
from ...files import replacing
from ..families import family_of_name
from ..loras.file import open_safetensors
from ..loras.pairs import (
    Layers,
    Lora,
    check_layers,
    kohya_state_dict_of,
    pair_layers,
    peft_config,
    state_dict_of,
    stored,
)
from .recipe import HEADER_KEY, StudentRecipe, fields_of

TEXT_ENCODERS = (
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
)  # components that may have a LoRA, as the denoiser has
MERGED_FILE = "student.json"  # the recipe of a student that is part of the weights of the folder it lies in

Layout = Literal["diffusers", "kohya"]


@dataclass(frozen=True)
class Student:
    """A student in memory: how to sample it, and what it adds to its base's weights.

    `TDMPipeline` takes one wherever it takes a file, `save_student` writes one and `read_student` reads one.

    Attributes:
        recipe: how to sample it.
        layers: its LoRA at strength 1.0, by component ("unet", "transformer", "text_encoder", ...) and layer.
    """

    recipe: StudentRecipe
    layers: Layers

    def __post_init__(self) -> None:
        """Check the LoRA as far as that can be done without the base.

        Raises:
            TDMError: there is no layer; a component is not one of the family's; the two halves of a layer do not fit
                together, have rank 0 or hold NaN or infinite values.
        """
        components = (family_of_name(self.recipe.family).denoiser, *TEXT_ENCODERS)
        if not any(self.layers.values()):
            raise TDMError("the student has no LoRA layers")
        for component in self.layers:
            if component not in components:
                raise TDMError(f"{component!r} is no component of a student; use one of {', '.join(components)}")
        check_layers(self.layers)

    @classmethod
    def from_state_dict(
        cls, recipe: StudentRecipe, state_dict: Mapping[str, Tensor], *, alpha: float | None = None
    ) -> Student:
        """A student from LoRA tensors in the names of diffusers.

        Args:
            recipe: how to sample it.
            state_dict: `[<component>.]<layer>.lora_A.weight` (rank, in, ...) and `.lora_B.weight` (out, rank, ...);
                without a component they are the denoiser's.
            alpha: that the LoRA was trained with; ``alpha / rank`` is multiplied into lora_B in float32. None: it is
                the rank.

        Raises:
            TDMError: the tensors are not such a LoRA (see `pair_layers`).

        >>> recipe = StudentRecipe("me/base", "sd15", "epsilon", {2: [999, 500]}, 1.0, height=512, width=512)
        >>> lora = {"mid.to_q.lora_A.weight": torch.ones(4, 32), "mid.to_q.lora_B.weight": torch.ones(32, 4)}
        >>> Student.from_state_dict(recipe, lora, alpha=2).layers["unet"]["mid.to_q"].B[0]
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
        """
        denoiser = family_of_name(recipe.family).denoiser
        layers: dict[str, dict[str, Lora]] = {}
        for name, lora in pair_layers(state_dict, alpha).items():
            component, layer = _component(name, denoiser)
            layers.setdefault(component, {})[layer] = lora
        return cls(recipe, layers)


def read_header(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a .safetensors file; its tensors are not read.

    Raises:
        TDMError: no such file, a folder, a pickle, truncated, or not a safetensors file.
    """
    with open_safetensors(path) as file:
        return file.metadata() or {}


def read_student(path: str | os.PathLike[str]) -> Student:
    """The student of a file that `save_student` wrote in its default layout. Its base is not needed.

    Any other LoRA wants the names of its base's layers: `convert_lora` and `TDMPipeline` read those.

    Raises:
        TDMError: the file cannot be read (see `read_header`), has no recipe, one that is not complete and valid, or
            tensors in another layout.

    >>> from tdm.pipelines.bases import bundled_path
    >>> student = read_student(bundled_path() / "student.safetensors")
    >>> student.recipe.family, student.recipe.default_steps, list(student.layers)
    ('pixart', 4, ['transformer'])
    """
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a file, not a dict)
    try:
        if HEADER_KEY not in metadata:
            raise TDMError("it has no recipe")
        return Student.from_state_dict(StudentRecipe.from_metadata(metadata), tensors)
    except TDMError as error:
        raise TDMError(f"{path} is not in the layout of a student file ({error}); write it with tdm convert") from None


def read_merged(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe's fields in the `student.json` of a folder with the student in its weights.

    Raises:
        TDMError: as `fields_of`.
    """
    return fields_of({HEADER_KEY: Path(path).read_text(encoding="utf-8")})


def save_student(
    path: str | os.PathLike[str],
    student: Student,
    *,
    layout: Layout = "diffusers",
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> Path:
    """Write a student file. It appears whole or not at all.

    Args:
        path: the file to write; missing parent folders are made.
        student: its LoRA and, for the header, its recipe.
        layout: the names of the tensors: diffusers', or kohya's with an `.alpha` that is the rank.
        dtype: the dtype to store; None keeps each tensor's own.
        force: replace an existing file.

    Raises:
        TDMError: `path` exists and `force` is False, or is a folder; values are not finite after the cast; the write
            failed.

    >>> recipe = StudentRecipe("me/base", "sd15", "epsilon", {2: [999, 500]}, guidance_scale=1.0, height=512, width=512)
    >>> layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    >>> student = Student(recipe, {"unet": {layer: Lora(torch.ones(4, 1280), torch.zeros(1280, 4))}})
    >>> read_student(save_student("my_student.safetensors", student)).layers["unet"][layer].rank
    4
    """
    path = Path(path)
    if path.is_dir():
        raise TDMError(f"{path} is a folder; give the name of a file")
    if path.exists() and not force:
        raise TDMError(f"{path} exists; pass force=True to replace it")
    tensors: dict[str, Tensor] = {}
    adapter: dict[str, Any] = {}
    for component, layers in stored(student.layers, dtype).items():
        if layout == "kohya":
            tensors |= kohya_state_dict_of(component, layers)
            continue
        tensors |= {f"{component}.{key}": tensor for key, tensor in state_dict_of(layers).items()}
        adapter |= {f"{component}.{key}": value for key, value in peft_config(layers).items()}
    metadata = {"format": "pt", **student.recipe.to_metadata()}
    if adapter:
        metadata["lora_adapter_metadata"] = json.dumps(adapter, sort_keys=True)
    with replacing(path, shared=True) as file:  # a run and `tdm export` may end at the same time
        # Not `save_file`: safetensors 0.8 makes files that only their owner can read.
        file.write(_in_order(save(tensors, metadata=metadata)))
    return path


def _in_order(file: bytes) -> bytes:
    """The file with its metadata sorted: safetensors writes them in another order each time, and files would differ."""
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + file[8 + size :]


def _component(name: str, denoiser: str) -> tuple[str, str]:
    """(component, layer) of a name with or without a component in front; without, it is the denoiser's."""
    for component in (denoiser, *TEXT_ENCODERS):
        if name.startswith(f"{component}."):
            return component, name.removeprefix(f"{component}.")
    return denoiser, name
