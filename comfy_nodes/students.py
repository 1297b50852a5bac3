"""The students of a ComfyUI user: the released ones and the files in `models/loras`, and how each is run."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..errors import TDMError
from ..pipelines.loras.file import LoraFile
from ..pipelines.students.file import read_header
from ..pipelines.students.recipe import HEADER_KEY, StudentRecipe
from ..pipelines.students.released import PRESETS, known_of

BUNDLED = "bundled"  # the model that comes with this pack, and its student
RELEASED = tuple(name for name, preset in PRESETS.items() if "sampler" not in preset.recipe)


def student_names() -> list[str]:
    """The released TDM students, then all files in `models/loras`, whether they are students or not."""
    return [*RELEASED, *folder_paths.get_filename_list("loras")]


def lora_path(name: str) -> Path:
    """The file of a name in `models/loras`, or of the bundled student.

    Raises:
        TDMError: this installation has no bundled student.
        FileNotFoundError: there is no such file.
    """
    if name == BUNDLED:
        try:
            from ..pipelines.students.locate import student_file
        except ImportError as error:
            raise TDMError(
                f"the bundled student needs diffusers and peft (pip install -r requirements.txt): {error}"
            ) from None
        return student_file(BUNDLED, {})
    return Path(folder_paths.get_full_path_or_raise("loras", name))


def file_stamp(name: str) -> str:
    """The state of a student's file, for `fingerprint_inputs`: another one when the file was written again. Empty for
    what is no file.
    """
    if name != BUNDLED and name not in folder_paths.get_filename_list("loras"):
        return ""
    state = lora_path(name).stat()
    return f"{state.st_mtime_ns} {state.st_size} {state.st_ino}"


def recipe_of(name: str) -> StudentRecipe:
    """The recipe of one of `student_names` or of the bundled student: that of its header or of the released student.

    Raises:
        TDMError: it has none, or one that another sampler than TDM's runs.
    """
    if name in RELEASED:
        fields = PRESETS[name].fields
    else:
        path = lora_path(name)
        safetensors = path.suffix in (".safetensors", ".sft")
        file = LoraFile(path, "safetensors", metadata=read_header(path)) if safetensors else LoraFile(path, "pickle")
        fields, _ = known_of(file)
    if not fields:
        raise TDMError(f"{name} says nothing about its timesteps: choose which released student it is, or type them in")
    return _of_tdm(StudentRecipe.from_fields(fields), name)


def recipe_of_text(text: str) -> StudentRecipe:
    """The recipe that `Load TDM Student` gives, as JSON.

    Raises:
        TDMError: it is empty or not valid, or one that another sampler than TDM's runs.
    """
    if not text.strip():
        raise TDMError(
            "the loaded student says nothing about its timesteps: choose released_as in Load TDM Student, or take the "
            "recipe's link away and type the timesteps in"
        )
    recipe = StudentRecipe.from_metadata({HEADER_KEY: text})
    return _of_tdm(recipe, f"the student of {recipe.base_model}")


def _of_tdm(recipe: StudentRecipe, name: str) -> StudentRecipe:
    if recipe.sampler is not None:
        raise TDMError(f"{name} is no TDM student: it is sampled with {recipe.sampler}")
    return recipe
