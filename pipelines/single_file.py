"""A model in one file, such as a fine-tune, as the folder of a pipeline."""

from __future__ import annotations

import inspect
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import SingleFileComponentError

from ..errors import TDMError, first_line
from ..files import whole_folder
from .base_weights import components, refuse_scales
from .bases import base_folder, family_of_base
from .loras.file import open_safetensors, read_lora_file

_LORA_MARKS = ("lora", "lokr", "hada_")


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a .safetensors file holds a network's own weights, and no LoRA.

    Raises:
        TDMError: it cannot be read, or it is a whole model in a container that is not read here (.gguf, a pickle).
    """
    path = Path(path)
    if not path.is_file():
        return False
    if why := unread(path):
        raise TDMError(why)
    if path.suffix != ".safetensors":
        return False
    with open_safetensors(path) as file:
        return not _lora_among(file.keys())


def unread(path: Path) -> str | None:
    """Why a file is a whole model that cannot be converted, and what to do; None if it may be converted."""
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"GGUF":
        return f"{path} is a .gguf file, whose weights are quantised; get the model as .safetensors in bf16 or fp16"
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        content = read_lora_file(path)
        if content.positional is None and content.tensors and not _lora_among(content.tensors):
            return f"{path} is a whole model in a pickle, which is not read here; get it as a .safetensors file"
    return None


def _lora_among(names: Any) -> bool:
    return any(mark in name.lower() for name in names for mark in _LORA_MARKS)


def convert_checkpoint(source: Path, out: Path, *, base: str, force: bool = False) -> Path:
    """Write a model that is a single .safetensors file, such as a fine-tune, as the folder of a pipeline.

    The folder is a base for everything here: `task.model` of a distillation, `TDMPipeline`, `tdm generate --model`.

    Args:
        source: the file, in the names of diffusers or of the original checkpoints, as far as diffusers reads them. What
            it says of its prediction type and of zero terminal SNR (see `stated_scheduler`) goes into the scheduler.
        out: the folder to write; the weights keep the dtype that most of the file has.
        base: folder (or hub id) of what the model was tuned from: its configs are taken, and the parts that the file
            lacks, such as text encoders and VAE.
        force: replace a folder that is there.

    Raises:
        TDMError: diffusers reads no single files of this family; the file is for another network, quantised with
            scales, or of an EDM model; parts are in neither.
    """
    folder = base_folder(base)
    family = family_of_base(folder)
    stock: Any = getattr(diffusers, family.pipeline)
    if not hasattr(stock, "from_single_file"):
        raise TDMError(f"diffusers reads no single files of {family.name}; get this model as a folder")
    with open_safetensors(source) as file:
        names = list(file.keys())
        stored = Counter(file.get_slice(key).get_dtype() for key in names)
        stated = stated_scheduler(source, set(names), file.metadata() or {})
    refuse_scales(str(source), names)
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(stored.most_common(1)[0][0], torch.float32)

    with whole_folder(out, force=force) as unfinished:
        try:
            pipe = _from_file(stock, source, folder, family.denoiser, dtype)
        except Exception as error:  # diffusers reads the keys of another network in any way, and fails in any
            line = first_line(error)
            raise TDMError(f"{source} cannot be read as a {family.name} model on {base}: {line}") from None
        pipe.scheduler = _with(pipe.scheduler, stated, source)
        pipe.save_pretrained(str(unfinished))
    return out


def stated_scheduler(source: Path, names: set[str], metadata: dict[str, str]) -> dict[str, Any]:
    """What a file says of its noise schedule, as settings of a scheduler; {} if it says nothing.

    Marker tensors (`v_pred`, `ztsnr`), as ComfyUI reads them; the headers of SAI's model spec
    (`modelspec.prediction_type`) and of kohya's trainer (`ss_v_parameterization`, `ss_zero_terminal_snr`).

    Args:
        source: the file, for errors.
        names: of its tensors.
        metadata: its header.

    Raises:
        TDMError: the file is of an EDM model, or its prediction type is not known.
    """
    if edm := sorted(name for name in names if name in ("edm_mean", "edm_std") or name.startswith("edm_vpred.")):
        raise TDMError(f"{source} is of an EDM model (it has {edm[0]}), which is not supported")
    stated: dict[str, Any] = {}
    if text := metadata.get("modelspec.prediction_type", "").strip().lower():
        known = {"v": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
        if (kind := known.get(text.removesuffix("_prediction").removesuffix("-prediction"))) is None:
            raise TDMError(f"{source} states the prediction type {text!r}; only v and epsilon are known")
        stated["prediction_type"] = kind
    if "v_pred" in names or metadata.get("ss_v_parameterization", "").lower() == "true":
        stated["prediction_type"] = "v_prediction"
    if "ztsnr" in names or metadata.get("ss_zero_terminal_snr", "").lower() == "true":
        # Without "trailing" the first step of a sampler is not the one of pure noise.
        stated |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return stated


def _with(scheduler: Any, stated: dict[str, Any], source: Path) -> Any:
    """The scheduler with what the file states; DDIM where its class cannot have zero terminal SNR (PNDM)."""
    if not stated:
        return scheduler
    takes = inspect.signature(type(scheduler).__init__).parameters
    if "beta_schedule" not in takes:
        raise TDMError(f"{source} states {', '.join(stated)}, which the scheduler {type(scheduler).__name__} cannot be")
    if all(name in takes for name in stated):
        return type(scheduler).from_config(scheduler.config, **stated)
    return diffusers.DDIMScheduler.from_config(scheduler.config, clip_sample=False, **stated)


def _from_file(stock: Any, source: Path, folder: str, denoiser: str, dtype: torch.dtype) -> Any:
    """diffusers' `from_single_file`; each part but the denoiser that it does not find in the file is the base's."""
    base: Any = None
    passed: dict[str, Any] = {}
    while True:
        try:
            return stock.from_single_file(str(source), config=folder, dtype=dtype, **passed)
        except SingleFileComponentError as error:
            missing = re.search(r"^(\w+) = ", str(error), re.MULTILINE)
            if missing is None or missing[1] == denoiser or missing[1] in passed:
                raise
            base = base or stock.from_pretrained(folder, dtype=dtype, **components(folder, {denoiser: None}, dtype))
            passed[missing[1]] = base.components[missing[1]]
