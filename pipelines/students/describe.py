"""What a LoRA file or a released student is and how to run it, in words: ``tdm info``."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import NO_STRICT, PartialLoraError, TDMError
from ..bundled import BUNDLED, bundled_path
from .recipe import HEADER_KEY, STUDENT_FILE, VERSION, StudentRecipe, fields_of

if TYPE_CHECKING:
    from ..loras.file import LoraFile
    from ..loras.layouts import NamedLoras
    from .released import Preset

_LORA_A = re.compile(r"(?P<component>\w+)\.(?P<layer>.+)\.lora_A\.weight")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"}


def about(source: str, *, base: str | None = None) -> str:
    """What a file, a student's folder, "bundled" or the id of a released student is, as lines of text.

    A student file that `save_student` wrote says all in its header: without a base to match, torch is not imported.

    Raises:
        TDMError: there is nothing of this name, or as `describe`.
    """
    if source == BUNDLED:
        source = str(bundled_path() / STUDENT_FILE)
    inside = os.path.join(source, STUDENT_FILE)
    file = inside if os.path.isfile(inside) else source
    if base is None and (rows := _header_rows(file)):
        return _lines(rows)
    from .file import MERGED_FILE, read_merged
    from .released import preset_of_id

    if not os.path.exists(source) and (preset := preset_of_id(source)) is not None:
        return describe_preset(preset)
    path = source
    if os.path.isfile(merged := os.path.join(path, MERGED_FILE)):
        fields = read_merged(merged)
        return _lines({"folder": path, "layout": "a pipeline with the student in its weights", **_recipe_rows(fields)})
    if os.path.isdir(path):
        from .locate import student_file

        path = str(student_file(path, {}))
    return describe(path, base=base)


def describe_preset(preset: Preset) -> str:
    """A released student, as lines of text."""
    return _lines({"released student": preset.name, **_preset_rows(preset), **_recipe_rows(preset.fields)})


def describe(path: str | os.PathLike[str], *, base: str | None = None) -> str:
    """The recipe and the LoRA of a file of any layout, as lines of text.

    A LoRA without a recipe is described as far as it goes, with the fields that it lacks.

    Args:
        path: the file.
        base: what to match its layers to; None: the base that its recipe names, if that is on this machine, or else the
            released network of the family that its names point to.

    Raises:
        TDMError: the file cannot be read, it is no LoRA, its metadata is wrong, or `base` cannot be read; layers
            that do not fit the base are told in the text.
    """
    from ..loras.file import read_lora_file
    from ..loras.layouts import parse
    from .released import known_of

    file = read_lora_file(path)
    fields, preset = known_of(file)
    try:
        named = parse(file, strict=False) if file.positional is None else None
    except TDMError as error:
        raise TDMError(f"{file.path}: {error}") from None
    rows = {"file": str(path), "layout": f"{named.layout if named else _nameless(file)}; {file.container}"}
    if preset is not None:
        rows |= {"released student": preset.name, **_preset_rows(preset)}
    if fields:
        rows["recipe"] = f"in the file, format version {VERSION}" if fields_of(file.metadata) else "of the preset"
        rows |= _recipe_rows(fields)
    else:
        rows["recipe"] = f"none: no TDM metadata; to run it, pass recipe= with {', '.join(StudentRecipe.required())}"
    rows |= _match_rows(file, named, preset, fields, base)
    if named is not None:
        ranks = [lora.rank for lora in named.layers.values()]
        rows |= _lora_rows(ranks, [named.scales[address] for address in named.layers])
        if named.left_out:
            keys = ", ".join(named.left_out[:3]) + (", ..." if len(named.left_out) > 3 else "")
            rows["not a LoRA"] = f"{len(named.left_out)} tensors, which are not loaded: {keys}"
    tensors = [*file.tensors.values(), *(file.positional or [])]
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
    return _lines(rows | _weight_rows(path, sum(tensor.numel() for tensor in tensors), dtypes))


def _header_rows(path: str) -> dict[str, str]:
    """The rows of a student file in the layout of diffusers, from its header alone; {} for anything else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            stored = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (a file, not a dict)
            shapes = {key: tensor.get_shape() for key, tensor in stored.items()}
            dtypes = {_DTYPES.get(tensor.get_dtype(), tensor.get_dtype()) for tensor in stored.values()}
    except (OSError, SafetensorError):
        return {}
    halves = {key: match for key in shapes if (match := _LORA_A.fullmatch(key))}
    if HEADER_KEY not in metadata or {half.replace("lora_A", "lora_B") for half in halves} != shapes.keys() - halves:
        return {}
    components = Counter(match["component"] for match in halves.values())
    ranks = [shapes[key][0] for key in halves]
    layers = " and ".join(f"{count} of the {component}" for component, count in components.items())
    rows = {"file": path, "layout": "a student file, diffusers (lora_A / lora_B); safetensors"}
    rows |= {"recipe": f"in the file, format version {VERSION}", **_recipe_rows(fields_of(metadata))}
    rows |= {"LoRA layers": f"{layers}; tdm info --base BASE matches them to a base"}
    rows |= _lora_rows(ranks, [1.0] * len(ranks))  # the scale is baked into lora_B
    return rows | _weight_rows(path, sum(math.prod(shape) for shape in shapes.values()), dtypes)


def _lines(rows: Mapping[str, str]) -> str:
    return "\n".join(f"{name:<17} {text}" for name, text in rows.items())


def _nameless(file: LoraFile) -> str:
    return f"list of {len(file.positional or [])} tensors without names (EMA)"


def _preset_rows(preset: Preset) -> dict[str, str]:
    rows = {"sampler": preset.sampler, "source": preset.source, "preset scale": f"{preset.scale:g}"}
    if preset.positional is not None:
        positional = preset.positional
        rows["preset scale"] = f"{preset.scale * positional.scale:g} (rank {positional.rank}, alpha / rank included)"
        rows["layers"] = ", ".join(positional.targets)
    return rows | ({"released file": preset.file} if preset.file else {})


def _recipe_rows(fields: Mapping[str, Any]) -> dict[str, str]:
    recipe = StudentRecipe.from_fields(fields)
    rows = {
        "base model": recipe.base_model,
        "family": recipe.family,
        "prediction type": recipe.prediction_type,
    }
    for k, timesteps in recipe.trained_timesteps.items():
        rows[f"{k} step{'s' * (k > 1)}"] = ", ".join(f"{t:g}" for t in timesteps)
    if recipe.preferred_steps is not None:
        rows["by default"] = f"{recipe.default_steps} steps"
    rows |= {
        "guidance scale": f"{recipe.guidance_scale:g}" + (" (none)" if recipe.guidance_scale == 1 else ""),
        "size": f"{recipe.width} x {recipe.height}" + (f" x {recipe.num_frames} frames" if recipe.num_frames else ""),
        "flow shift": "none" if recipe.flow_shift is None else f"{recipe.flow_shift:g}",
        "solver order": str(recipe.solver_order),
    }
    if recipe.stochastic_sampling:
        share = "fresh" if recipe.eta == 1 else f"eta {recipe.eta:g}: the student's own and fresh noise mixed"
        rows["noise"] = f"{share} at each step, from the call's generator"
    if recipe.teacher_negative_prompt is not None:
        rows["teacher's negative prompt"] = recipe.teacher_negative_prompt
    if recipe.teacher_guidance_norm is not None:
        rows["teacher's guidance norm"] = recipe.teacher_guidance_norm
    if recipe.sampler is not None:
        rows["scheduler"] = f"{recipe.sampler}; {recipe.default_steps} steps if none are asked for"
    return rows | {f"note: {topic}": text for topic, text in recipe.notes.items()}


def _match_rows(
    file: LoraFile, named: NamedLoras | None, preset: Preset | None, fields: Mapping[str, Any], base: str | None
) -> dict[str, str]:
    """The base that the layers fit, if it is on this machine, or else the family whose released network knows most."""
    from ..bases import networks_without_weights
    from ..loras.places import place
    from ..loras.released import family_by_names, known_layers

    source = base or str(fields.get("base_model", ""))
    try:
        family, networks = networks_without_weights(source, **({} if base else {"local_files_only": True}))
    except TDMError:
        if base:
            raise
    else:
        try:
            placed = place(file, family, networks, **(preset.placing if preset else {}))
        except PartialLoraError as error:
            return {"family": family.name, "matched": f"{error.reason}; {NO_STRICT}"}
        except TDMError as error:
            return {"family": family.name, "matched": str(error)}
        return {
            "family": family.name,
            "matched": f"all of its LoRA layers, {sum(map(len, placed.values()))} modules of {source}",
        }
    if named is None:
        return {}
    name = fields.get("family") or family_by_names(named.layers)
    if name is None:
        return {"family": "unknown: no supported model has layers of these names"}
    known, _ = known_layers(name, named.layers)
    return {"family": name, "matched": f"{known} of its {len(named.layers)} LoRA layers are in a released {name}"}


def _lora_rows(ranks: Sequence[int], scales: Sequence[float]) -> dict[str, str]:
    """Rank, alpha and scale of the layers of a LoRA; scale is alpha / rank."""

    def counted(values: Sequence[float]) -> str:
        return ", ".join(f"{value:g} ({count} layers)" for value, count in sorted(Counter(values).items()))

    alphas = [scale * rank for rank, scale in zip(ranks, scales, strict=True)]
    return {"LoRA rank": counted(ranks), "LoRA alpha": counted(alphas), "LoRA scale": counted(scales)}


def _weight_rows(path: str | os.PathLike[str], parameters: int, dtypes: set[str]) -> dict[str, str]:
    size = Path(path).stat().st_size / 1e6
    return {"LoRA weights": f"{parameters:,} parameters, {', '.join(sorted(dtypes))}, {size:.2f} MB"}
