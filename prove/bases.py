"""The bases that are proved: folders of real ones, and folders of configs, whose weights are then random."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import TDMError
from ..pipelines.bases import family_of_base, pipeline_without_weights
from ..pipelines.families import FAMILY_NAMES
from ..pipelines.outlines import published_bases

WEIGHTS = (".safetensors", ".bin")
INDEX = "model_index.json"


@dataclass(frozen=True)
class Base:
    """A base and the preset that distils it.

    Attributes:
        family: name of the preset.
        folder: with ``model_index.json``.
        name: for the table: the folder, or the hub id of published configs.
        random: it holds configs alone.
    """

    family: str
    folder: str
    name: str
    random: bool

    @property
    def weights(self) -> str:
        """Where its weights come from, for the table."""
        return f"random, in the shapes of {self.name}" if self.random else self.name


def bases_for(families: Sequence[str], folders: Sequence[Path]) -> list[Base]:
    """The bases of some families: those in ``folders``, and for a family without one the published shapes.

    Raises:
        TDMError: as in `bases_in`.
    """
    real = [base for base in bases_in(folders) if base.family in families]
    lacking = set(families) - {base.family for base in real}
    shapes = [(family, folder) for family, folder in published_bases().items() if family in lacking]
    return [*real, *(Base(family, str(folder), "/".join(folder.parts[-2:]), True) for family, folder in shapes)]


def bases_in(folders: Iterable[Path]) -> list[Base]:
    """The bases of folders, each of which is one or holds some. One that cannot be read is taken by its name, if that
    is a preset's: its rows then say what is wrong with it.

    Raises:
        TDMError: a folder is none and holds none, or its family is not supported.
    """
    bases = []
    for folder in folders:
        paths = [folder] if (folder / INDEX).is_file() else sorted(path.parent for path in folder.glob(f"*/{INDEX}"))
        if not paths:
            raise TDMError(
                f"--bases {folder}: there is no {INDEX} in it or one level below, so it is no base and holds none"
            )
        bases += [_base(path) for path in paths]
    return bases


def by_size(bases: Iterable[Base]) -> dict[Base, int | None]:
    """The weights of each base's denoiser, the smallest base first. None, and at the front, where its configs cannot be
    read.
    """
    sizes = {base: _parameters(base) for base in bases}
    return dict(sorted(sizes.items(), key=lambda item: item[1] or 0))


def _parameters(base: Base) -> int | None:
    try:
        family, pipe = pipeline_without_weights(base.folder)
    except TDMError:
        return None
    return sum(weight.numel() for weight in getattr(pipe, family.denoiser).parameters())


def _base(path: Path) -> Base:
    try:
        family = family_of_base(str(path)).name
    except TDMError:
        if path.name not in FAMILY_NAMES:
            raise
        family = path.name
    return Base(family, str(path), str(path), not any(file.suffix in WEIGHTS for file in path.glob("*/*")))
