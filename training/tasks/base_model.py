"""A base on disk, of which only what is needed is loaded: text encoders, then the denoiser, for previews the VAE."""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from ...errors import PartialLoraError, TDMError
from ...pipelines.base_weights import (
    Weights,
    component_classes,
    components,
    left_out,
    load_network,
    reading,
    require_tokenizers,
    weight_files,
)
from ...pipelines.bases import base_folder, family_of_base, networks_without_weights
from ...pipelines.families import Family
from ...pipelines.loras.file import read_lora_file
from ...pipelines.loras.merge import merge, merged
from ...pipelines.loras.pairs import Layers, Lora
from ...pipelines.loras.places import place
from ...pipelines.outlines import network_without_weights
from ...pipelines.students.locate import student_file
from ..config import MemoryConfig
from .base_storage import stored
from .prompt_cache import TextEncoders

_TEXT = ("text_encoder", "tokenizer")


class UserLora(NamedTuple):
    """A LoRA that becomes part of the teacher."""

    file: Path
    strength: float

    @classmethod
    def parse(cls, text: str) -> UserLora:
        """``path`` or ``path@strength``; also ``owner/repository/file.safetensors`` of the hub.

        Raises:
            TDMError: there is no such file, or the strength is no number.
        """
        path, at, number = text.rpartition("@")
        if not at or Path(text).is_file():
            return cls(student_file(text, {}), 1.0)
        try:
            strength = float(number)
        except ValueError:
            raise TDMError(f"task.loras: {text!r} is neither a file nor path@strength") from None
        return cls(student_file(path, {}), strength)


class _ConfigOnly(NamedTuple):
    """The configuration of a network that is not loaded, in its place."""

    config: Any


@dataclass(frozen=True)
class BaseModel:
    """The parts of a base, loaded one at a time.

    Attributes:
        folder: on this machine; a hub repository is in the hub's cache.
        family: of the base.
        loras: merged into each part that is loaded.
    """

    folder: str
    family: Family
    loras: tuple[UserLora, ...] = ()

    @classmethod
    def find(cls, name: str, loras: Sequence[str] = ()) -> BaseModel:
        """The base of that name: a folder, a hub repository (downloaded if it is not here) or "bundled".

        Raises:
            TDMError: there is none, or it is not supported; or as in `UserLora.parse`.
        """
        folder = base_folder(name)
        family = family_of_base(folder)
        if not Path(folder).is_dir():
            folder = str(DiffusionPipeline.download(folder))
        return cls(folder, family, tuple(UserLora.parse(text) for text in loras))

    @functools.cached_property
    def _index(self) -> Mapping[str, Any]:
        config: Any = DiffusionPipeline.load_config(self.folder)
        return config

    @functools.cached_property
    def _classes(self) -> dict[str, tuple[str, str]]:
        """(library, class) of each part that the base has."""
        return component_classes(self._index)

    # ------------------------------------------------------------------ what it is

    def encoder_identity(self, dtype: torch.dtype) -> dict[str, Any]:
        """What the condition of a prompt depends on, as JSON: the encoders' and tokenizers' files, LoRAs, versions."""
        return {**self._identity(name for name in self._classes if name.startswith(_TEXT)), "dtype": str(dtype)}

    def identity(self) -> dict[str, Any]:
        """What the base's pictures depend on, as JSON: the files of all its parts, LoRAs, versions."""
        return {**self._identity(self._classes), "torch": torch.__version__}

    def content(self) -> str:
        """A hash of the files of all its parts and of the LoRAs in it, whatever the folder's name is."""
        text = json.dumps({"files": self._hashes(self._classes), "loras": self._lora_hashes()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _identity(self, components: Iterable[str]) -> dict[str, Any]:
        return {
            "pipeline": self.family.pipeline,
            "files": self._hashes(components),
            "loras": self._lora_hashes(),
            "versions": [diffusers.__version__, transformers.__version__],
        }

    def _hashes(self, components: Iterable[str]) -> dict[str, str]:
        folders = [Path(self.folder) / name for name in sorted(components)]
        files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
        return {str(path.relative_to(self.folder)): _sha256(path) for path in files}

    def _lora_hashes(self) -> list[tuple[str, float]]:
        return [(_sha256(lora.file), lora.strength) for lora in self.loras]

    # ------------------------------------------------------------------ text encoders

    @contextmanager
    def text_encoders(self, device: torch.device, dtype: torch.dtype) -> Iterator[Any]:
        """The pipeline with text encoders and tokenizers alone, for the length of a `with`; their memory is freed.

        Raises:
            TDMError: an encoder cannot be read or lacks a tensor.
        """
        encoders = [name for name in self._classes if name.startswith("text_encoder")]
        absent = {name: None for name in self._classes if not name.startswith((*_TEXT, "scheduler"))}
        networks = {name: load_network(self._class(name), self.folder, name, dtype) for name in encoders}
        pipe = self._assembled(dtype, **absent, **networks)
        del networks
        setattr(pipe, self.family.denoiser, _ConfigOnly(self._without_weights(self.family.denoiser).config))
        for name in encoders:
            encoder = getattr(pipe, name)
            self._merge_loras(name, encoder)
            encoder.eval().requires_grad_(False).to(device)
        try:
            yield pipe
        finally:
            for name in encoders:
                setattr(pipe, name, None)
            del encoder
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()

    @contextmanager
    def encoders(self, device: torch.device, dtype: torch.dtype, negative_prompt: str = "") -> Iterator[TextEncoders]:
        """What the text encoders make of prompts and of the negative one, for the length of a `with`.

        Raises:
            TDMError: as in `text_encoders`.
        """
        with self.text_encoders(device, dtype) as pipe:
            family = self.family
            yield TextEncoders(
                lambda texts: family.encode_text(pipe, texts),
                lambda: family.encode_null(pipe, negative_prompt),
                lambda texts: family.too_long(pipe, texts),
                family.text_limit(pipe)[1],
            )

    # ------------------------------------------------------------------ denoiser and VAE

    def whole(self, dtype: torch.dtype) -> Any:
        """The whole pipeline, LoRAs merged.

        Raises:
            TDMError: a LoRA does not fit.
        """
        pipe = self._assembled(dtype, **components(self.folder, left_out(self._index), dtype))
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module):
                self._merge_loras(name, part)
        return pipe

    def pipeline(self, memory: MemoryConfig, device: torch.device) -> tuple[Any, torch.dtype]:
        """(the pipeline with the frozen denoiser and nothing else, the dtype that the denoiser computes in).

        What the pipeline takes from the VAE's config, such as the factor between pixels and latents, is there.

        Raises:
            TDMError: the storage does not work here, or a LoRA does not fit.
        """
        name = self.family.denoiser
        merge_loras = functools.partial(self._merge_loras, name) if self.loras else None
        load = functools.partial(load_network, self._class(name), self.folder, name)
        denoiser, dtype = stored(load, memory, device, merge_loras)
        vae = self._without_weights("vae")
        absent = {part: None for part in self._classes if part not in (name, "vae", "scheduler")}
        pipe = self._assembled(dtype, **{**absent, name: denoiser, "vae": vae})
        pipe.vae = None
        pipe.set_progress_bar_config(disable=True)
        return pipe, dtype

    def weights(self, component: str) -> Mapping[str, Tensor]:
        """The weights of a component as its files have them, whatever the run stores the base in, LoRAs merged. Each
        is read when it is asked for.

        Raises:
            TDMError: a file cannot be read, or a LoRA does not fit.
        """
        files = Weights(weight_files(self.folder, component))
        return _WithLoras(files, [placed.get(component, {}) for placed in self._placed])

    def vae(self) -> Any:
        """The VAE in float32, which decodes large pictures in tiles and batches one by one, where it can."""
        vae = load_network(self._class("vae"), self.folder, "vae", torch.float32)
        vae.eval().requires_grad_(False)
        for switch in ("enable_tiling", "enable_slicing"):
            if hasattr(vae, switch):
                getattr(vae, switch)()
        return vae

    def _assembled(self, dtype: torch.dtype, **components: Any) -> Any:
        """The pipeline of these parts; the others, scheduler and tokenizers, are read here."""
        require_tokenizers(self.folder, {name: self._index[name] for name in self._classes if name not in components})
        with reading(f"the base {self.folder}"):
            return self.family.pipeline_class().from_pretrained(
                self.folder, dtype=dtype, **{**left_out(self._index), **components}
            )

    def _class(self, name: str) -> Any:
        library, class_name = self._classes[name]
        return getattr(importlib.import_module(library), class_name)

    def _without_weights(self, name: str) -> Any:
        with reading(f"the config of {name} of the base {self.folder}"):
            return network_without_weights(*self._classes[name], self.folder, name, {})

    # ------------------------------------------------------------------ LoRAs

    @functools.cached_property
    def _placed(self) -> list[Layers]:
        """The layers of each LoRA, on the names of all networks that can take one."""
        if not self.loras:
            return []
        family, networks = networks_without_weights(self.folder)
        placed = []
        for lora in self.loras:
            try:
                placed.append(place(read_lora_file(lora.file), family, networks, scale=lora.strength))
            except PartialLoraError as error:
                raise TDMError(f"task.loras: {lora.file}: {error.reason}; take these tensors out of the file") from None
            except TDMError as error:
                raise TDMError(f"task.loras: {lora.file}: {error}") from None
        return placed

    def _merge_loras(self, component: str, network: nn.Module) -> None:
        for placed in self._placed:
            merge(network, placed.get(component, {}))


class _WithLoras(Mapping[str, Tensor]):
    """Weights by name, with LoRAs merged into each when it is asked for."""

    def __init__(self, weights: Mapping[str, Tensor], loras: Sequence[Mapping[str, Lora]]) -> None:
        self._weights, self._loras = weights, loras

    def __getitem__(self, name: str) -> Tensor:
        weight, layer = self._weights[name], name.removesuffix(".weight")
        for placed in self._loras if layer != name else ():
            if layer in placed:
                weight = merged(weight, placed[layer])
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _sha256(path: Path) -> str:
    """The SHA-256 of a file's content. The hub's cache has it as the name of the file that a link points to."""
    blob = path.resolve().name
    if path.is_symlink() and len(blob) == 64:
        return blob
    state = path.stat()
    return _sha256_of(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _sha256_of(path: Path, _size: int, _changed: int) -> str:
    """The hash of a file with this size and time of change: gigabytes are read once in a process."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
