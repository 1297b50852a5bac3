"""The released students that carry no recipe of their own: how each must be run, by repository id.

TDM students first, then those of other methods, each with the sampler of its authors. A repository with several
students has the file in the id. Sources: the model cards and the official README. Flow grids are theirs in full digits:
4 steps of the named sampler, as 1000 times the shifted sigma. A file with a recipe in its header needs no preset and
gets none.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import TDMError
from ..loras.file import LoraFile
from ..loras.layouts import Positional
from .recipe import fields_of
from .samplers import Sampler


@dataclass(frozen=True)
class Preset:
    """One released student.

    Attributes:
        repository: its id on the hub; a folder whose path ends in it is taken for it.
        base: hub id of the base it was trained on.
        family: a name of `families`.
        recipe: the other fields of `StudentRecipe` that its authors state.
        sampler: what they call the sampler, for humans.
        source: where that is stated.
        file: the name of its LoRA, if known.
        scale: the strength it must run at, on top of the file's own alpha / rank.
        positional: the layers of an EMA list without names.
        alone: whether its repository holds no other student.
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
    alone: bool = True

    @property
    def name(self) -> str:
        """What stands for it: its repository, and the file where that does not tell."""
        return self.repository if self.alone else f"{self.repository}/{self.file}"

    @property
    def fields(self) -> dict[str, Any]:
        """The recipe's fields for `StudentRecipe.from_fields`."""
        notes = {"released as": self.name, "source": self.source}
        return {"base_model": self.base, "family": self.family, "notes": notes, **self.recipe}

    @property
    def placing(self) -> dict[str, Any]:
        """Arguments of `loras.places.place`."""
        return {"scale": self.scale, "positional": self.positional}


_CARD = "model card and official README"
_SQUARE_512 = {"guidance_scale": 1.0, "height": 512, "width": 512}
_SQUARE_1024 = {"guidance_scale": 1.0, "height": 1024, "width": 1024}

_TDM = (
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

_SD15 = {"base": "stable-diffusion-v1-5/stable-diffusion-v1-5", "family": "sd15"}
_SD21 = {"base": "stabilityai/stable-diffusion-2-1-base", "family": "sd15"}  # of the same pipeline and schedule
_SDXL = {"base": "stabilityai/stable-diffusion-xl-base-1.0", "family": "sdxl"}

_LCM = Sampler("LCMScheduler", default_steps=4)
# With 1000 levels instead of 50 its timesteps are on LCM's own schedule, and diffusers does not warn that they are not.
_DMD2 = Sampler("LCMScheduler", {"original_inference_steps": 1000})
_TCD = Sampler("TCDScheduler", eta=0.3, default_steps=4)
_UNIFIED = Sampler("TCDScheduler", eta=1.0, default_steps=1)
# The released bases have `clip_sample` off, but the class has it on: latents are not clipped, whatever the base says.
_DDIM = Sampler("DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False})
_EULER = Sampler("EulerDiscreteScheduler", {"timestep_spacing": "trailing"})

_LCM_CARD = "model card: LCMScheduler, 2 to 8 steps, 4 in its example, no guidance (or 1 to 2)"
_DMD2_CARD = "model card: LCMScheduler, timesteps 999 749 499 249, no guidance; less strength on fine-tuned bases"
_TCD_CARD = (
    "model card: TCDScheduler, 4 steps, eta 0.3, no guidance; diffusers: any step count, more eta for more steps"
)
_UNIFIED_CARD = "model card: TCDScheduler, 1 to 8 steps, eta 1 (less for more detail at several steps), no guidance"
_HYPER_CARD = "model card: DDIMScheduler, trailing, no guidance"
_HYPER_CFG_CARD = "model card: guidance 5 to 8; DDIMScheduler, trailing, is stated for the files without CFG only"
_LIGHTNING_CARD = "model card: EulerDiscreteScheduler, trailing, no guidance; only with the file's own step count"


def _lcm_grids(steps: range) -> dict[int, list[float]]:
    """What the schedulers of LCM and TCD run by themselves: K of the 50 levels 999, 979, ..., 19."""
    return {k: [999.0 - 20 * (50 * i // k) for i in range(k)] for k in steps}


def _trailing_grid(k: int) -> dict[int, list[float]]:
    """The trailing spacing of diffusers: K parts of 1000, each at its noisiest."""
    return {k: [round(1000 - 1000 * i / k) - 1.0 for i in range(k)]}


def _other(
    repository: str,
    base: Mapping[str, str],
    sampler: Sampler,
    grids: Mapping[int, list[float]],
    source: str,
    *,
    file: str = "pytorch_lora_weights.safetensors",
    alone: bool = True,
    **recipe: float,
) -> Preset:
    """A student of another method than TDM."""
    square = _SQUARE_512 if base["family"] == "sd15" else _SQUARE_1024
    steps = {"prediction_type": "epsilon", "trained_timesteps": grids, "sampler": sampler}
    return Preset(
        repository=repository,
        base=base["base"],
        family=base["family"],
        recipe={**steps, **square, **recipe},
        sampler=str(sampler),
        source=source,
        file=file,
        alone=alone,
    )


def _hyper_sd(model: str, base: Mapping[str, str]) -> Iterator[Preset]:
    """The LoRAs of Hyper-SD for a base; its one-step UNet and its other bases are not among them."""
    one = functools.partial(_other, "ByteDance/Hyper-SD", base, alone=False)
    name = f"Hyper-{model}-{{}}-lora.safetensors"
    yield one(_UNIFIED, _lcm_grids(range(1, 9)), _UNIFIED_CARD, file=name.format("1step"))
    for k in (2, 4, 8):
        yield one(_DDIM, _trailing_grid(k), _HYPER_CARD, file=name.format(f"{k}steps"))
    for k in (8, 12):
        yield one(_DDIM, _trailing_grid(k), _HYPER_CFG_CARD, file=name.format(f"{k}steps-CFG"), guidance_scale=5.0)


def _lightning(k: int) -> Preset:
    file = f"sdxl_lightning_{k}step_lora.safetensors"
    repository = "ByteDance/SDXL-Lightning"
    return _other(repository, _SDXL, _EULER, _trailing_grid(k), _LIGHTNING_CARD, file=file, alone=False)


_DMD2_FILE = "dmd2_sdxl_4step_lora_fp16.safetensors"
_OTHERS = (
    _other("latent-consistency/lcm-lora-sdv1-5", _SD15, _LCM, _lcm_grids(range(2, 9)), _LCM_CARD),
    _other("latent-consistency/lcm-lora-sdxl", _SDXL, _LCM, _lcm_grids(range(2, 9)), _LCM_CARD),
    _other("tianweiy/DMD2", _SDXL, _DMD2, _trailing_grid(4), _DMD2_CARD, file=_DMD2_FILE),
    _other("h1t/TCD-SD15-LoRA", _SD15, _TCD, _lcm_grids(range(2, 9)), _TCD_CARD),
    _other("h1t/TCD-SD21-base-LoRA", _SD21, _TCD, _lcm_grids(range(2, 9)), _TCD_CARD),
    _other("h1t/TCD-SDXL-LoRA", _SDXL, _TCD, _lcm_grids(range(2, 9)), _TCD_CARD),
    *_hyper_sd("SD15", _SD15),
    *_hyper_sd("SDXL", _SDXL),
    *(_lightning(k) for k in (2, 4, 8)),
)
_PRESETS = (*_TDM, *_OTHERS)
PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in _PRESETS}


def preset_of_id(source: str | os.PathLike[str]) -> Preset | None:
    """The preset of a repository id, or of a repository id with a file; None if that is none of a released student.

    Raises:
        TDMError: the repository holds several students, which the message lists, and no file is named.
    """
    return PRESETS.get(str(source)) or _preset_in(str(source))


def preset_of(source: str | os.PathLike[str]) -> Preset | None:
    """The preset of an id, of a folder whose path ends in one, or of a file in such a folder or of a name of its own.

    The hub's own cache counts: there a repository `owner/name` is the folder `models--owner--name`.

    Raises:
        TDMError: as in `preset_of_id`.
    """
    if (preset := preset_of_id(source)) is not None:
        return preset
    path = Path(source).absolute()
    folder, file = (path.parent, path.name) if path.is_file() else (path, None)
    for repository in (preset.repository for preset in _PRESETS):
        if "/".join(folder.parts[-2:]) == repository or f"models--{repository.replace('/', '--')}" in folder.parts:
            return _preset_in(repository, file)
    named = [preset for preset in _PRESETS if file is not None and preset.file == file]
    return named[0] if len(named) == 1 else None


def _preset_in(repository: str, file: str | None = None) -> Preset | None:
    """The preset of a repository's only student, whatever its file is called, or of one file among several."""
    matches = [preset for preset in _PRESETS if preset.repository == repository]
    if matches and not matches[0].alone:
        if file is None:
            raise TDMError(f"{repository} holds several students; pass one: {', '.join(p.name for p in matches)}")
        matches = [preset for preset in matches if preset.file == file]
    return matches[0] if matches else None


def known_of(file: LoraFile) -> tuple[dict[str, Any], Preset | None]:
    """(recipe fields, preset) of a file: those of its header, or else its preset's; ({}, None) if it has neither.

    Raises:
        TDMError: its header's recipe cannot be read (see `fields_of`).
    """
    fields = fields_of(file.metadata)
    preset = None if fields else preset_of(file.path)
    return preset.fields if preset else fields, preset
