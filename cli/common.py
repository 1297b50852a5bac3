"""Helpers that several commands share: which model is meant, how it is loaded, and no progress bars of loading."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import BaseNotFoundError, TDMError
from ..pipelines.bundled import BUNDLED

if TYPE_CHECKING:
    from ..pipelines.tdm_pipeline import TDMPipeline


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model and --student, alike for every command."""
    parser.add_argument("--model", help="base model: folder or hub id (default: the bundled one, or the student's)")
    parser.add_argument("--student", help="student file, folder or hub id (default: the bundled one)")


def load(args: argparse.Namespace, **recipe: Any) -> TDMPipeline:
    """The pipeline that --model and --student name; see `load_pipeline`."""
    return load_pipeline(args.model, args.student, recipe or None)


def load_pipeline(model: str | None, student: str | None, recipe: Mapping[str, Any] | None = None) -> TDMPipeline:
    """The pipeline of a base and a student, with the bundled model as the default.

    Args:
        recipe: fields that replace those of the student's recipe.
    """
    from ..pipelines.tdm_pipeline import TDMPipeline

    quiet()
    source = model or student or BUNDLED
    try:
        pipe = TDMPipeline.from_pretrained(source, student=student if model else None, recipe=recipe)
    except BaseNotFoundError as error:
        raise BaseNotFoundError(error.reason, "name a base with --model FOLDER_OR_HUB_ID") from None
    pipe.set_progress_bar_config(disable=True)
    return pipe


def terminal_line(line: str) -> None:
    """Say in a terminal what starts, before imports and loading take their time. A pipe gets results alone."""
    if sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)


def quiet() -> None:
    """Switch off the progress bars of loading, which would bury the output of a command."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def check_strength(strength: float) -> None:
    """Raise TDMError for a strength at which no student draws."""
    if not 0 < strength <= 2:
        raise TDMError(f"--strength {strength:g} is not above 0 and at most 2; 1 is as the student was trained")


def note_of_kohya(family: str) -> None:
    """Say so if ComfyUI knows none of the kohya names that were written."""
    from ..pipelines.families import family_of_name

    if not family_of_name(family).kohya_in_comfyui:
        print(
            f"note: ComfyUI's own Load LoRA knows no kohya names of {family}; give it the file in diffusers' names, or "
            "use this project's nodes"
        )
