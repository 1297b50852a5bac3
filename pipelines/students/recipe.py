"""The recipe of a student: all that is needed to sample it as it was trained, checked field by field."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import TDMError
from ..families import check_family_name
from ..guidance_norm import GuidanceNorm
from ..prediction_types import PREDICTION_TYPES
from .samplers import Sampler

HEADER_KEY = "tdm_student"
STUDENT_FILE = "student.safetensors"  # its name inside a saved pipeline, the bundled model and a hub repository
VERSION = 1
MOST_AREA = 4  # times the student's own: a larger picture takes minutes and is no longer one


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
        teacher_negative_prompt: what its teacher's guidance led away from, which `TDMPipeline.teacher` takes; None is
            the empty prompt.
        teacher_guidance_norm: how its guidance was normalised (guidance_norm.py), as in `TDMPipeline.teacher`; None:
            as the base's own pipeline has it.
        eta: how fresh that noise is, above 0 and at most 1: the next state has ``sqrt(1 - eta^2)`` of the student's own
            noise and ``eta`` of fresh noise.
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
    eta: float = 1.0
    teacher_negative_prompt: str | None = None
    teacher_guidance_norm: str | None = None

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            TDMError: a field has the wrong type or a value outside its range.
        """
        for name in ("base_model", "family"):
            self._require(name, isinstance(getattr(self, name), str) and getattr(self, name), "a name")
        check_family_name(self.family)
        known = ", ".join(PREDICTION_TYPES)
        self._require("prediction_type", self.prediction_type in PREDICTION_TYPES, f"one of {known}")
        object.__setattr__(self, "trained_timesteps", _timestep_table(self.trained_timesteps))
        fractions = any(t != int(t) for grid in self.trained_timesteps.values() for t in grid)
        fractions_run = self.prediction_type in (
            "flow_prediction",
            "sample",
        )  # diffusers runs them, ComfyUI rounds them
        self._require("trained_timesteps", fractions_run or not fractions, "whole numbers: this is no flow model")
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
        self._require("eta", _is_number(self.eta) and 0 < self.eta <= 1, "above 0 and at most 1")
        self._require("eta", self.stochastic_sampling or self.eta == 1, "absent without stochastic_sampling")
        negative = self.teacher_negative_prompt
        self._require("teacher_negative_prompt", negative is None or (isinstance(negative, str) and negative), "a text")
        if self.teacher_guidance_norm is not None:
            GuidanceNorm.parse(self.teacher_guidance_norm)
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
        """The header entry: {"tdm_student": JSON}. A reader that does not know `sampler`, `preferred_steps`,
        `stochastic_sampling`, `eta`, `teacher_negative_prompt` or `teacher_guidance_norm` refuses a file with them.
        """
        fields = dataclasses.asdict(self)
        optional = ("sampler", "preferred_steps", "stochastic_sampling")
        for name in (*optional, "teacher_negative_prompt", "teacher_guidance_norm"):
            if not fields[name]:
                del fields[name]
        if self.eta == 1:
            del fields["eta"]
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


def completed(known: Mapping[str, Any], overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """Fields of a recipe, with those that a caller gives in their place. Other trained timesteps than the file's are
    run with their own step counts, so what the file prefers goes with its timesteps.
    """
    overrides = overrides or {}
    stays = dict(known)
    if "trained_timesteps" in overrides:
        stays.pop("preferred_steps", None)
    return {**stays, **overrides}


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
