"""Where a student is: a file, a folder, a hub repository, or the one bundled with this package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from ...errors import TDMError, first_line
from ..bases import Source, download, offline
from ..bundled import BUNDLED, INDEX, bundled_path
from .file import MERGED_FILE, Student
from .recipe import STUDENT_FILE
from .released import Preset, preset_of, preset_of_id

_LORA_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".bin")


def locate(
    source: Source | Student, student: Source | Student | None, hub: Mapping[str, Any]
) -> tuple[str | None, Path | Student]:
    """(base, student) of the arguments of `TDMPipeline.from_pretrained`; base None: the student names it.

    For a folder or repository with the student in its weights, the file is its `student.json`.

    Args:
        source: a base, a student, or a folder or repository with both.
        student: the student, if `source` is a base alone.
        hub: options of `hf_hub_download`, such as `cache_dir`.

    Raises:
        TDMError: nothing is there, or there is a base without a student.
    """
    if isinstance(source, Student):
        if student is not None:
            raise TDMError("two students were given; pass the base first and one student: (base, student=...)")
        return None, source
    path = Path(source)
    if student is not None:
        if (path / MERGED_FILE).is_file():
            raise TDMError(f"{path} has a student in its weights already; put this one on a base")
        return str(source), student if isinstance(student, Student) else student_file(student, hub)
    if (path / MERGED_FILE).is_file():
        return str(path), path / MERGED_FILE
    if path.is_dir():
        base = (path / INDEX).is_file()
        if base and not (path / STUDENT_FILE).is_file():
            raise TDMError(f"{path} is a base without a {STUDENT_FILE}; pass student=")
        if not base and not (path / STUDENT_FILE).is_file() and preset_of(path) is None:
            raise TDMError(f"{path} is neither a pipeline ({INDEX}) nor a student ({STUDENT_FILE})")
        return (str(path) if base else None), student_file(source, hub)
    if source == BUNDLED or path.is_file() or path.suffix in _LORA_SUFFIXES or preset_of_id(source) is not None:
        return None, student_file(source, hub)
    index = download(source, INDEX, hub)
    downloaded = download(source, STUDENT_FILE, hub) or (download(source, MERGED_FILE, hub) if index else None)
    if downloaded is None:
        raise TDMError(f"{source} is a base without a {STUDENT_FILE}; pass student=" if index else _absent(source))
    return (str(source) if index else None), downloaded


def student_file(source: Source, hub: Mapping[str, Any]) -> Path:
    """The student file that `source` stands for: itself, or the `student.safetensors` of a folder or hub repository.

    A file in a hub repository is `owner/name/file.safetensors`. For a released student (see `presets.py`) it is the
    LoRA in its repository or folder, whatever that is called.

    Raises:
        TDMError: there is none, or several.
    """
    if source == BUNDLED:
        return bundled_path() / STUDENT_FILE
    path = Path(source)
    if path.is_file():
        return path  # if it is no student, reading it says so
    if path.is_dir():
        if (path / STUDENT_FILE).is_file():
            return path / STUDENT_FILE
        if (preset := preset_of(path)) is None:
            raise TDMError(f"{path} has no {STUDENT_FILE}")
        return _released_lora(path, preset)
    if (preset := preset_of_id(source)) is not None:
        if preset.file is None:
            return _released_lora(_snapshot(preset.repository, hub), preset)
        if (file := download(preset.repository, preset.file, hub)) is None:  # alone: whole models may be next to it
            raise TDMError(
                f"{preset.repository}/{preset.file} is not in the local cache and cannot be downloaded{offline()}"
            )
        return file
    if path.suffix in _LORA_SUFFIXES:
        return _hub_file(source, hub)
    downloaded = download(source, STUDENT_FILE, hub)
    if downloaded is None:
        raise TDMError(_absent(source))
    return downloaded


def _hub_file(source: Source, hub: Mapping[str, Any]) -> Path:
    """The file that `owner/name/path` names on the hub.

    Raises:
        TDMError: there is none, or it is the path of a file that should be here.
    """
    owner, *rest = str(source).split("/")
    remote = len(rest) >= 2 and not Path(owner).exists()
    file = download(f"{owner}/{rest[0]}", "/".join(rest[1:]), hub) if remote else None
    if file is None:
        raise TDMError(
            f"{source}: no such file" + (f", and no hub repository within reach has it{offline()}" if remote else "")
        )
    return file


def _released_lora(folder: Path, preset: Preset) -> Path:
    """The LoRA in a folder of a released student: a file of ours, the name that is known, or the only one there is."""
    for name in filter(None, (STUDENT_FILE, preset.file)):
        if (folder / name).is_file():
            return folder / name
    candidates = sorted(path for path in folder.rglob("*") if path.suffix in _LORA_SUFFIXES and path.is_file())
    if len(candidates) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in candidates)
        what = f"several files that may be the LoRA, pass one of them: {names}" if candidates else "no LoRA file"
        raise TDMError(f"{folder}: {preset.repository} has {what}")
    return candidates[0]


def _snapshot(repository: str, hub: Mapping[str, Any]) -> Path:
    """The LoRA files of a hub repository, through the local cache."""
    try:
        return Path(snapshot_download(repository, allow_patterns=[f"*{end}" for end in _LORA_SUFFIXES], **hub))
    except (EntryNotFoundError, RepositoryNotFoundError) as error:
        raise TDMError(
            f"{repository} is not in the local cache and cannot be downloaded ({first_line(error)}{offline()})"
        ) from None
    except OSError as error:
        raise TDMError(f"cannot reach the hub repository {repository} ({first_line(error)}{offline()})") from None


def _absent(source: Source) -> str:
    return (
        f"{source}: no such file or folder, and no hub repository within reach has a {STUDENT_FILE} under that name"
        f"{offline()}"
    )
