"""The released students that carry no recipe of their own: how each must be run, by repository id.

Sources: the model cards and the official README. Flow grids are theirs in full digits: 4 steps of the named sampler, as
1000 times the shifted sigma. A file with a recipe in its header needs no preset and gets none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .lora_file import LoraFile
from .lora_layouts import Positional
from .student import fields_of


@dataclass(frozen=True)
class Preset:
    """One released student.

    Attributes:
        repository: its id on the hub; a folder whose path ends in it is taken for it.
        base: hub id of the base it was trained on.
        family: a name of `families.py`.
        recipe: the other fields of `StudentRecipe` that its authors state.
        sampler: what they call the sampler, for humans.
        source: where that is stated.
        file: the name of its LoRA, if known.
        scale: the strength it must run at, beside the file's own alpha / rank.
        positional: the layers of an EMA list without names.
    """

    repository: str
    base: str
    family: str
    recipe: Mapping[str, Any]
    sampler: str
    source: str
    file: str | None = None
    scale: float = 1.0
    positional: Positional | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The recipe's fields for `StudentRecipe.from_fields`."""
        notes = {"released as": self.repository, "source": self.source}
        return {"base_model": self.base, "family": self.family, "notes": notes, **self.recipe}

    @property
    def placing(self) -> dict[str, Any]:
        """Arguments of `lora_places.place`."""
        return {"scale": self.scale, "positional": self.positional}


_CARD = "model card and official README"
_SQUARE_512 = {"guidance_scale": 1.0, "height": 512, "width": 512}
_SQUARE_1024 = {"guidance_scale": 1.0, "height": 1024, "width": 1024}

_PRESETS = (
    Preset(
        repository="Luo-Yihong/TDM_sd3_lora",
        base="stabilityai/stable-diffusion-3-medium-diffusers",
        family="sd3",
        recipe={
            "prediction_type": "flow_prediction",
            "trained_timesteps": {4: [999.833, 947.169, 856.898, 666.370]},
            "flow_shift": 6.0,
            "solver_order": 2,
            **_SQUARE_1024,
        },
        sampler="DPM-Solver++ 2M on flow sigmas, shift 6",
        source=_CARD,
        scale=0.125,
    ),
    Preset(
        repository="Luo-Yihong/TDM_sd3-5_lora",
        base="stabilityai/stable-diffusion-3.5-medium",
        family="sd3",
        recipe={
            "prediction_type": "flow_prediction",
            "trained_timesteps": {4: [999.667, 899.640, 749.625, 499.667]},
            "flow_shift": 3.0,
            "solver_order": 2,
            **_SQUARE_512,
        },
        sampler="DPM-Solver++ 2M on flow sigmas, shift 3",
        source=_CARD,
        file="tdm_sd3-5_lora.ckpt",
        positional=Positional(
            (
                *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
                *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
            ),
            rank=32,
            scale=64 / 32,
        ),
    ),
    Preset(
        repository="Luo-Yihong/TDM_dreamshaper_LoRA",
        base="lykon/dreamshaper-7",
        family="sd15",
        recipe={
            "prediction_type": "epsilon",
            "trained_timesteps": {4: [999, 749, 500, 250]},
            "solver_order": 2,
            **_SQUARE_512,
        },
        sampler="DPM-Solver++ 2M on the schedule of SD1.5",
        source=_CARD,
        file="tdm_dreamshaper.pt",
    ),
    Preset(
        repository="Luo-Yihong/TDM_CogVideoX-2B_LoRA",
        base="THUDM/CogVideoX-2b",
        family="cogvideox",
        recipe={
            "prediction_type": "v_prediction",
            "trained_timesteps": {4: [999, 856, 665, 399]},
            "guidance_scale": 1.0,
            "height": 480,
            "width": 720,
            "num_frames": 49,
        },
        sampler="DDIM on the base's own schedule (zero terminal SNR, snr_shift_scale 3)",
        source=f"{_CARD}; order 1 is ours, they name none",
    ),
    Preset(
        repository="Luo-Yihong/TDM-R1",
        base="Tongyi-MAI/Z-Image-Turbo",
        family="zimage",
        # 5 steps of the base's scheduler, shift 3, of which the last, at 0, makes no call.
        recipe={
            "prediction_type": "flow_prediction",
            "trained_timesteps": {4: [1000, 900, 750, 500]},
            "flow_shift": 3.0,
            **_SQUARE_1024,
        },
        sampler="flow Euler, 5 steps = 4 network calls; the grid is the base's own, shift 3",
        source=f"{_CARD}; the timesteps are not stated there, they are the base's own schedule",
        file="tdmr1_zimage_ema.ckpt",
        positional=Positional(("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"), rank=32, scale=64 / 32),
    ),
)
PRESETS: Mapping[str, Preset] = {preset.repository: preset for preset in _PRESETS}


def preset_of(source: str | os.PathLike[str]) -> Preset | None:
    """The preset of a repository id, of a folder whose path ends in one, or of a file in such a folder or of that name.

    The hub's own cache counts: there a repository `owner/name` is the folder `models--owner--name`.
    """
    if str(source) in PRESETS:
        return PRESETS[str(source)]
    path = Path(source).absolute()
    folder = path.parent if path.is_file() else path
    for preset in _PRESETS:
        cached = f"models--{preset.repository.replace('/', '--')}"
        if "/".join(folder.parts[-2:]) == preset.repository or cached in folder.parts:
            return preset
        if path.is_file() and path.name == preset.file:
            return preset
    return None


def known_of(file: LoraFile) -> tuple[dict[str, Any], Preset | None]:
    """(recipe fields, preset) of a file: those of its header, or else its preset's; ({}, None) if it has neither.

    Raises:
        TDMError: its header's recipe cannot be read (see `fields_of`).
    """
    own = fields_of(file.metadata)
    preset = None if own else preset_of(file.path)
    return preset.fields if preset else own, preset
