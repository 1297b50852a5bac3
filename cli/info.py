"""tdm info: what a student file says about itself."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path

from ..pipelines.lora import Lora, pair_layers
from ..pipelines.student import VERSION, StudentRecipe, fields_of, read_header, read_tensors

HELP = """\
Print what a student file carries: base model, family, trained timesteps per step count, size, and its LoRA.

  tdm info runs/distill/student.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tdm info``."""
    parser.add_argument("file", metavar="FILE", help="a student .safetensors")


def run(args: argparse.Namespace) -> None:
    """``tdm info``."""
    print(describe(args.file))


def describe(path: str | os.PathLike[str]) -> str:
    """The recipe and the LoRA of a student file, as lines of text.

    A LoRA without TDM metadata is described as far as it goes, with the fields that it lacks.

    Raises:
        TDMError: the file cannot be read, it is no LoRA in the layout of diffusers, or its metadata is wrong.
    """
    fields = fields_of(read_header(path))
    layers = pair_layers(read_tensors(path))
    rows = {"student": str(path)}
    if fields:
        rows |= _recipe_rows(StudentRecipe.from_fields(fields))
    else:
        rows["recipe"] = f"none: no TDM metadata; to run it, pass recipe= with {', '.join(StudentRecipe.required())}"
    rows |= _lora_rows(Path(path), layers)
    return "\n".join(f"{name:<17} {text}" for name, text in rows.items())


def _recipe_rows(recipe: StudentRecipe) -> dict[str, str]:
    rows = {
        "format version": str(VERSION),
        "base model": recipe.base_model,
        "family": recipe.family,
        "prediction type": recipe.prediction_type,
    }
    for k, timesteps in recipe.trained_timesteps.items():
        rows[f"{k} step{'s' * (k > 1)}"] = ", ".join(f"{t:g}" for t in timesteps)
    rows |= {
        "guidance scale": f"{recipe.guidance_scale:g}" + (" (none)" if recipe.guidance_scale == 1 else ""),
        "size": f"{recipe.width} x {recipe.height}" + (f" x {recipe.num_frames} frames" if recipe.num_frames else ""),
        "flow shift": "none" if recipe.flow_shift is None else f"{recipe.flow_shift:g}",
        "solver order": str(recipe.solver_order),
    }
    return rows | {f"note: {topic}": text for topic, text in recipe.notes.items()}


def _lora_rows(path: Path, layers: dict[str, Lora]) -> dict[str, str]:
    ranks = Counter(lora.rank for lora in layers.values())
    dtypes = {str(tensor.dtype).removeprefix("torch.") for lora in layers.values() for tensor in lora}
    parameters = sum(tensor.numel() for lora in layers.values() for tensor in lora)
    return {
        "LoRA rank": ", ".join(f"{rank} ({count} layers)" for rank, count in sorted(ranks.items())),
        "LoRA strength": "1.0 (alpha = rank)",
        "LoRA weights": f"{parameters:,} parameters, {', '.join(sorted(dtypes))}, {path.stat().st_size / 1e6:.2f} MB",
    }
