"""The student file: one .safetensors LoRA that carries in its header all that is needed to run it.

- **Tensors**: `<unet|transformer>.<layer>.lora_A.weight` (rank, in, ...) and `.lora_B.weight` (out, rank, ...), the
  layout of diffusers; text encoders' begin with `text_encoder` or `text_encoder_2`. The LoRA scale alpha / rank is
  baked into lora_B, so the file loads at strength 1.0 everywhere, with or without metadata.
- **Header**: the recipe as JSON under `tdm_student` (see `StudentRecipe`), and diffusers' own `lora_adapter_metadata`.
  Stock loaders read the second and ignore the first.

The same LoRA under kohya's names (`layout="kohya"`: `lora_unet_<layer_with_underscores>.lora_down.weight`,
`.lora_up.weight` and `.alpha`, which is the rank) carries the same recipe. A pipeline folder with the student merged
into its weights has the recipe beside `model_index.json`, in `student.json`.

`version` is 1. A change that an older reader would get wrong raises it; a reader refuses a version above its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import TDMError
from .families import family_of_name
from .loras.file import open_safetensors
from .loras.pairs import Lora, kohya_state_dict_of, pair, pair_layers, peft_config, state_dict_of
from .samplers import Sampler
from .schedule import PREDICTION_TYPES

HEADER_KEY = "tdm_student"
VERSION = 1
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")  # components that may have a LoRA beside the denoiser's
STUDENT_FILE = "student.safetensors"  # its name inside a saved pipeline, the bundled model and a hub repository
MERGED_FILE = "student.json"  # the recipe of a student that is part of the weights of the folder it lies in

Layout = Literal["diffusers", "kohya"]


@dataclass(frozen=True)
class StudentRecipe:
    """How to run a student. The first seven fields are required in a file, the others have a neutral default.

    Attributes:
        base_model: hub id or local folder of the base, or "bundled" for the one that ships with this package.
        family: a name of `families`, such as "sd15" or "pixart".
        prediction_type: what the base's network predicts: "epsilon", "v_prediction", "sample" or "flow_prediction".
        trained_timesteps: for each step count K the K timesteps it was trained on, strictly decreasing.
        guidance_scale: what to run the student with; 1.0 is no guidance, on every family (Z-Image's own 0 is 1.0 here).
        height, width: recommended size in pixels.
        flow_shift: the time shift of the grids (flow models only); None where there is none.
        solver_order: 1 (DDIM / Euler) or 2 (DPM-Solver++ 2M on the same grid).
        num_frames: recommended length of a video.
        notes: free text about the training, by topic.
        preferred_steps: the step count to use when none is asked for, one of the trained ones; None: the largest.
        sampler: what a student of another method samples with (a `Sampler` or its fields); None for `TDMScheduler`.
        stochastic_sampling: it was trained with fresh noise at each step but the last, and `TDMScheduler` draws that.
    """

    base_model: str
    family: str
    prediction_type: str
    trained_timesteps: dict[int, list[float]]
    guidance_scale: float
    height: int
    width: int
    flow_shift: float | None = None
    solver_order: int = 1
    num_frames: int | None = None
    notes: dict[str, str] = field(default_factory=dict)
    preferred_steps: int | None = None
    sampler: Sampler | None = None
    stochastic_sampling: bool = False

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            TDMError: a field has the wrong type or a value outside its range.
        """
        for name in ("base_model", "family"):
            self._require(name, isinstance(getattr(self, name), str) and getattr(self, name), "a name")
        family_of_name(self.family)
        known = ", ".join(PREDICTION_TYPES)
        self._require("prediction_type", self.prediction_type in PREDICTION_TYPES, f"one of {known}")
        object.__setattr__(self, "trained_timesteps", _timestep_table(self.trained_timesteps))
        self._require("guidance_scale", _is_number(self.guidance_scale) and self.guidance_scale >= 0, "at least 0")
        for name in ("height", "width"):
            self._require(name, _is_count(getattr(self, name)), "a whole number above 0")
        if self.num_frames is not None:
            self._require("num_frames", _is_count(self.num_frames), "a whole number above 0")
        if self.flow_shift is not None:
            self._require("flow_shift", self.prediction_type in ("flow_prediction", "sample"), "absent: no flow model")
            self._require("flow_shift", _is_number(self.flow_shift) and self.flow_shift > 0, "above 0")
        self._require("solver_order", self.solver_order in (1, 2), "1 or 2")
        self._require("stochastic_sampling", isinstance(self.stochastic_sampling, bool), "true or false")
        if self.stochastic_sampling:
            self._require("solver_order", self.solver_order == 1, "1: order 2 goes on along the student's own noise")
        known_steps = self.preferred_steps in (None, *self.trained_timesteps)
        self._require("preferred_steps", known_steps, f"one of {', '.join(map(str, self.trained_timesteps))}")
        if self.sampler is not None:
            self._check_sampler(self.sampler)
        texts = isinstance(self.notes, Mapping) and all(isinstance(v, str) for kv in self.notes.items() for v in kv)
        self._require("notes", texts, "texts by topic")

    def _require(self, name: str, ok: Any, expected: str) -> None:
        if not ok:
            raise TDMError(f"student metadata: {name} must be {expected}, got {getattr(self, name)!r}")

    def _check_sampler(self, sampler: Any) -> None:
        sampler = sampler if isinstance(sampler, Sampler) else Sampler.from_fields(sampler)
        object.__setattr__(self, "sampler", sampler)
        self._require("sampler", self.prediction_type != "flow_prediction", "absent: its schedulers run no flow model")
        self._require("solver_order", self.solver_order == 1, "absent: the sampler has its own")
        self._require("stochastic_sampling", not self.stochastic_sampling, "absent: the sampler has its own noise")
        ok = sampler.default_steps in (None, *self.trained_timesteps)
        self._require("sampler", ok, "one whose default_steps is a trained step count")

    @property
    def default_steps(self) -> int:
        """The step count to use when none is asked for: the preferred one, or else the largest trained K."""
        preferred = self.sampler.default_steps if self.sampler else self.preferred_steps
        return preferred or max(self.trained_timesteps)

    @classmethod
    def required(cls) -> list[str]:
        """The fields that have no default."""
        return [spec.name for spec in dataclasses.fields(cls) if spec.default is spec.default_factory]  # both MISSING

    def to_metadata(self) -> dict[str, str]:
        """The header entry: {"tdm_student": JSON}. A reader that does not know `sampler`, `preferred_steps` or
        `stochastic_sampling` refuses a file that has them.
        """
        fields = dataclasses.asdict(self)
        for name in ("sampler", "preferred_steps", "stochastic_sampling"):
            if not fields[name]:
                del fields[name]
        return {HEADER_KEY: json.dumps({"version": VERSION, **fields}, sort_keys=True)}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> StudentRecipe:
        """A recipe from the fields of a header, of a caller, or of both merged.

        Raises:
            TDMError: required fields are missing (all are listed), a field is unknown, or a value is wrong.
        """
        if unknown := sorted(set(fields) - {spec.name for spec in dataclasses.fields(cls)}):
            raise TDMError(f"unknown student metadata: {', '.join(unknown)}; is the file from a newer version of tdm?")
        if missing := [name for name in cls.required() if fields.get(name) is None]:
            raise TDMError(f"the student's metadata lacks: {', '.join(missing)}; pass them as recipe={{...}}")
        return cls(**fields)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> StudentRecipe:
        """The recipe in a safetensors header.

        Raises:
            TDMError: there is none, it is from a newer version, or it is not complete and valid.
        """
        return cls.from_fields(fields_of(metadata))


def fields_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The recipe fields in a safetensors header, without checks of their values; {} if it has none.

    Raises:
        TDMError: the entry is not a JSON object, or its version is missing or newer than this code.
    """
    if HEADER_KEY not in metadata:
        return {}
    try:
        fields = json.loads(metadata[HEADER_KEY])
    except json.JSONDecodeError as error:
        raise TDMError(f"the header entry {HEADER_KEY!r} is not valid JSON: {error}") from None
    version = fields.pop("version", None) if isinstance(fields, dict) else None
    if not isinstance(version, int) or version < 1:
        raise TDMError(f"the header entry {HEADER_KEY!r} is not a JSON object with a version")
    if version > VERSION:
        raise TDMError(f"student format version {version} is newer than this tdm reads ({VERSION}); upgrade tdm")
    return fields


def completed(known: Mapping[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Fields of a recipe, with those that a caller gives in their place. Other trained timesteps than the file's are
    run with their own step counts, so what the file prefers goes with its timesteps.
    """
    given = given or {}
    stays = dict(known)
    if "trained_timesteps" in given:
        stays.pop("preferred_steps", None)
    return {**stays, **given}


def read_header(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a .safetensors file; its tensors are not read.

    Raises:
        TDMError: no such file, a folder, a pickle, truncated, or not a safetensors file.
    """
    with open_safetensors(path) as file:
        return file.metadata() or {}


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, by key, on the CPU.

    Raises:
        TDMError: the file cannot be read (see `read_header`).
    """
    with open_safetensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a file, not a dict)


def read_student(path: str | os.PathLike[str]) -> tuple[StudentRecipe | None, dict[str, Tensor]]:
    """(recipe, tensors by key) of a student file; the recipe is None if the header has no `tdm_student` entry.

    Raises:
        TDMError: the file cannot be read (see `read_header`), or its recipe is not complete and valid.

    >>> from tdm.pipelines.locate import bundled_path
    >>> recipe, tensors = read_student(bundled_path() / "student.safetensors")
    >>> recipe.family, recipe.default_steps, recipe.width, len(tensors) > 0
    ('pixart', 4, 64, True)
    """
    metadata = read_header(path)
    return (StudentRecipe.from_metadata(metadata) if HEADER_KEY in metadata else None), read_tensors(path)


def save_student(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    recipe: StudentRecipe,
    *,
    lora_alpha: float | None,
    layout: Layout = "diffusers",
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> Path:
    """Write a student file. It appears whole or not at all.

    Args:
        path: the file to write; missing parent folders are made.
        state_dict: LoRA tensors, `<layer>.lora_A.weight` and `.lora_B.weight`; without a prefix the denoiser's.
        recipe: goes into the header.
        lora_alpha: the alpha of the training; ``alpha / rank`` is multiplied into lora_B, in float32. None if that has
            been done, or if alpha is the rank.
        layout: the names of the tensors: diffusers', or kohya's with an `.alpha` that is the rank.
        dtype: the dtype to store; None keeps each tensor's own.
        force: replace an existing file.

    Raises:
        TDMError: `path` exists and `force` is False, or is a folder; the tensors are not a LoRA (see `pair_layers`);
            values are not finite, before the cast or after it.

    >>> recipe = StudentRecipe("me/base", "sd15", "epsilon", {2: [999, 500]}, guidance_scale=1.0, height=512, width=512)
    >>> layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    >>> lora = {f"{layer}.lora_A.weight": torch.ones(4, 1280), f"{layer}.lora_B.weight": torch.ones(1280, 4)}
    >>> file = save_student("my_student.safetensors", lora, recipe, lora_alpha=2)
    >>> read_student(file)[1][f"unet.{layer}.lora_B.weight"][0]  # times alpha / rank
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    path = Path(path)
    if path.is_dir():
        raise TDMError(f"{path} is a folder; give the name of a file")
    if path.exists() and not force:
        raise TDMError(f"{path} exists; pass force=True to replace it")
    denoiser = family_of_name(recipe.family).denoiser
    components: dict[str, dict[str, Lora]] = {}
    for name, (A, B) in pair_layers(state_dict).items():
        if lora_alpha is not None:
            B = (B.float() * (lora_alpha / A.shape[0])).to(dtype or B.dtype)
        component, layer = _component(name, denoiser)
        stored = {"A": _stored(A, dtype), "B": _stored(B, dtype)}
        components.setdefault(component, {})[layer] = pair(f"{component}.{layer}", stored)  # still finite
    tensors: dict[str, Tensor] = {}
    adapter: dict[str, Any] = {}
    for component, layers in components.items():
        if layout == "kohya":
            tensors |= kohya_state_dict_of(component, layers)
            continue
        tensors |= {f"{component}.{key}": tensor for key, tensor in state_dict_of(layers).items()}
        adapter |= {f"{component}.{key}": value for key, value in peft_config(layers).items()}
    metadata = {"format": "pt", **recipe.to_metadata()}
    if adapter:
        metadata["lora_adapter_metadata"] = json.dumps(adapter, sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # Not `save_file`: safetensors 0.8 makes files that only their owner can read.
        unfinished.write_bytes(_in_order(save(tensors, metadata=metadata)))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
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


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to("cpu", dtype or tensor.dtype).clone(memory_format=torch.contiguous_format)


def _timestep_table(table: Any) -> dict[int, list[float]]:
    """The grids with whole K as keys (JSON makes them texts) and floats as values, K ascending."""
    if not isinstance(table, Mapping) or not table:
        raise TDMError(f"student metadata: trained_timesteps must map step counts to timesteps, got {table!r}")
    grids: dict[int, list[float]] = {}
    for k, grid in table.items():
        numbers = isinstance(grid, list | tuple) and all(_is_number(t) and t >= 0 for t in grid)
        if not numbers or str(k) != str(len(grid)) or any(b >= a for a, b in itertools.pairwise(grid)):
            raise TDMError(
                f"student metadata: trained_timesteps for K = {k} must be K decreasing numbers, got {grid!r}"
            )
        grids[len(grid)] = [float(t) for t in grid]
    if 0 in grids:
        raise TDMError("student metadata: trained_timesteps has a grid of no steps")
    return dict(sorted(grids.items()))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
