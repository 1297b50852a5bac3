"""``tdm eval``: a teacher and its students on prompts that neither was trained on, measured and side by side."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import TDMError
from ..pipelines.calls import count_calls
from ..pipelines.families import TeacherCall
from ..pipelines.students.adapter import STUDENT_ADAPTER
from ..sheet import contact_sheet
from .measure import Measures, Reference
from .metrics.extras import Extra
from .pictures import Drawn, cached
from .tasks.base_model import BaseModel
from .worlds.stickers.captions import caption
from .worlds.stickers.draw import SIZE
from .worlds.stickers.scene import Scene, scenes

SEED = 20_000  # of the prompts and noises: far from those of any training run
APART = 20_000  # between the noises of the pictures that are judged, of the reference, and of those compared with it
BATCH = 32
SEEDS_PER_PROMPT = 4  # of distance and diversity, which compare pictures of one prompt
SHOWN = 8  # prompts on the sheet


@dataclass(frozen=True)
class Variant:
    """A model and how it is sampled: a row of the table before it is measured."""

    name: str
    steps: int
    guidance_scale: float | None  # None: the student's own
    student: str | None  # whose adapter is on; None: the teacher, which is the base alone
    own_scheduler: bool = False  # the teacher's own scheduler; False: the student's sampler and grid
    strength: float | None = None  # of the student on the base; None: as it is, 1 of a student just loaded
    base_first: bool = False  # the first step is the base's (`TDMPipeline.base_first`)


@dataclass(frozen=True)
class Plan:
    """What an evaluation compares.

    Attributes:
        student_steps: step counts of each student.
        teacher_steps, teacher_guidance: of the teacher as it is meant to be run; None: the base's own
            (`TDMPipeline.teacher_call`).
        strengths: of the students on the base, above 0: a row for each. None given: as they are.
        base_first: a further row for each of a student's of 2 steps or more, with the first step by the base.
    """

    student_steps: Sequence[int] = (1, 2, 4, 8)
    teacher_steps: int | None = None
    teacher_guidance: float | None = None
    strengths: Sequence[float] = ()
    base_first: bool = False

    def teacher(self, default: TeacherCall) -> TeacherCall:
        """The teacher's steps and guidance scale, completed with the base's defaults."""
        return TeacherCall(
            default.steps if self.teacher_steps is None else self.teacher_steps,
            default.guidance_scale if self.teacher_guidance is None else self.teacher_guidance,
        )

    def variants(self, default: TeacherCall, students: Sequence[str] = ("student",)) -> list[Variant]:
        """The rows of the table. The teacher is there as it is meant to be run, and undistilled at 4 steps: with its
        own scheduler, and with the first student's sampler and grid. Each student is there with every step count.

        Args:
            default: the base's steps and guidance scale.
            students: their names.
        """
        steps, scale = teacher = self.teacher(default)
        rows = [
            Variant(f"teacher, {steps} steps{', guided' * teacher.guided}", steps, scale, None, own_scheduler=True),
            Variant("teacher, 4 steps", 4, None, None, own_scheduler=True),
            Variant("teacher, 4 steps of the student's", 4, None, None),
        ]
        strengths: list[float | None] = [*self.strengths] or [None]
        for student in students:
            for strength in strengths:
                label = student if strength is None else f"{student} at {strength:g}"
                for k in self.student_steps:
                    name = f"{label}, {k} step{'s' * (k > 1)}"
                    rows.append(Variant(name, k, None, student, strength=strength))
                    if self.base_first and k > 1:
                        first = f"{name}, base first"
                        rows.append(Variant(first, k, None, student, strength=strength, base_first=True))
        return rows


class Prompts(NamedTuple):
    """What is drawn, and what it must show; None where nobody can tell."""

    texts: list[str]
    wanted: list[Scene] | None = None


@dataclass
class Row:
    """What one variant reached."""

    name: str
    steps: int
    calls: float  # samples through the network per picture, as they were counted
    seconds: float  # per picture, everything included
    cached: bool  # the pictures, and with them calls and seconds, are from an earlier evaluation
    student: str | None  # None: the teacher
    strength: float | None = None  # of the student; None: none was asked for
    measures: Measures = field(default_factory=Measures)
    base_first: bool = False


def held_out_prompts(count: int, seed: int = SEED) -> tuple[list[str], list[Scene]]:
    """``count`` prompts that name a combination no training picture showed, and their scenes."""
    rng = random.Random(seed)
    wanted = list(islice(scenes(seed, "held_out"), count))
    return [caption(scene, rng) for scene in wanted], wanted


def draw(
    pipe: Any,
    variant: Variant,
    prompts: Sequence[str],
    seeds: Sequence[int],
    on_step: Callable[[int], Any] = lambda pictures: None,  # noqa: ARG005
    **call: Any,
) -> Tensor:
    """uint8 pictures [N, 3, H, W] on the CPU, one seed a picture, ``BATCH`` at a time.

    Args:
        pipe: a ``TDMPipeline``.
        variant: how to draw.
        prompts, seeds: N of each.
        on_step: called after each step with how many pictures made it.
        call: further arguments of the pipeline's call.
    """
    batches = []
    with _drawing_as(pipe, variant):
        for start in range(0, len(prompts), BATCH):
            batch = list(prompts[start : start + BATCH])

            def on_step_end(*_step: Any, pictures: int = len(batch)) -> dict[str, Any]:
                on_step(pictures)
                return {}

            output = pipe(
                prompt=batch,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[start : start + BATCH]],
                num_inference_steps=variant.steps,
                output_type="pt",
                callback_on_step_end=on_step_end,
                **pipe.family.guidance(_guidance_scale(pipe, variant)),
                **call,
            )
            batches.append(output.images.float().cpu())
    return (torch.cat(batches) * 255).round().to(torch.uint8)


@contextlib.contextmanager
def _drawing_as(pipe: Any, variant: Variant) -> Iterator[None]:
    """The adapters and the scheduler of a variant, for the length of a ``with``; a strength stays."""
    with contextlib.ExitStack() as stack:
        student_scheduler = pipe.scheduler
        if variant.student is None:
            stack.enter_context(pipe.teacher())
            if not variant.own_scheduler:
                pipe.scheduler = student_scheduler  # teacher() puts things back at its end
        elif variant.strength is not None:
            pipe.set_adapters(STUDENT_ADAPTER, variant.strength)
        if variant.base_first:
            stack.enter_context(pipe.base_first())
        yield


def _guidance_scale(pipe: Any, variant: Variant) -> float:
    return pipe.recipe.guidance_scale if variant.guidance_scale is None else variant.guidance_scale


class Drawing:
    """Draws for an evaluation: counts calls and seconds, shows how far it is, and keeps the teacher's pictures.

    Args:
        pipe: a ``TDMPipeline``.
        bar: advanced by a step of one picture.
        cache: folder of teachers' pictures; None keeps none.
    """

    def __init__(self, pipe: Any, bar: tqdm, cache: Path | None) -> None:
        self.pipe, self.bar, self.cache = pipe, bar, cache
        self._base: dict[str, Any] | None = None

    def __call__(self, variant: Variant, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Drawn, bool]:
        """(pictures with their "calls" and "seconds" a picture, whether they are from the cache)."""
        fresh = False

        def now() -> Drawn:
            nonlocal fresh
            fresh = True
            begun = time.perf_counter()
            with count_calls(getattr(self.pipe, self.pipe.family.denoiser)) as calls:
                pictures = draw(self.pipe, variant, prompts, seeds, self.bar.update)
            seconds = time.perf_counter() - begun
            return Drawn(pictures, {"calls": calls.samples / len(prompts), "seconds": seconds / len(prompts)})

        if self.cache is None or variant.student is not None:
            return now(), False
        drawn = cached(self.cache, self._identity(variant, prompts, seeds), now)
        if not fresh:
            self.bar.total -= variant.steps * len(prompts)  # steps that need not be waited for
        return drawn, not fresh

    def several(self, variant: Variant, prompts: Sequence[str], first_seed: int) -> Tensor:
        """uint8 pictures [N, ``SEEDS_PER_PROMPT``, 3, H, W] of N prompts."""
        repeated = [text for text in prompts for _ in range(SEEDS_PER_PROMPT)]
        pictures = self(variant, repeated, range(first_seed, first_seed + len(repeated)))[0].pictures
        return pictures.view(-1, SEEDS_PER_PROMPT, *pictures.shape[1:])

    def _identity(self, variant: Variant, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
        """All that the teacher's pictures depend on."""
        pipe, recipe = self.pipe, self.pipe.recipe
        if self._base is None:
            self._base = BaseModel.find(pipe.base_model).identity()
        scale = _guidance_scale(pipe, variant)
        return {
            "base": self._base,
            "dtype": str(pipe.dtype),
            "device": pipe.device.type,
            "size": [recipe.height, recipe.width],
            "scheduler": "its own" if variant.own_scheduler else _plain(dict(pipe.scheduler.config)),
            "steps": variant.steps,
            "guidance_scale": scale,
            **pipe.family.negative_prompt({"prompt": "", **pipe.family.guidance(scale)}),
            **({"teacher_negative_prompt": text} if (text := recipe.teacher_negative_prompt) else {}),
            **({"teacher_guidance_norm": norm} if (norm := recipe.teacher_guidance_norm) else {}),
            "prompts": list(prompts),
            "seeds": list(seeds),
        }


def evaluate(
    pipe: Any,
    prompts: Prompts,
    plan: Plan = Plan(),
    *,
    students: Sequence[str] = (),
    seed: int = SEED,
    cache: Path | None = None,
    extras: Sequence[Extra] = (),
    load: Callable[[Any, str], None] = lambda pipe, student: pipe.load_student(student),
) -> tuple[list[Row], Image.Image]:
    """Measure a teacher and its students; returns the table and a grid of eight prompts drawn by every variant.

    The teacher's pictures are drawn once, for all students and strengths. Distance and diversity come from
    ``SEEDS_PER_PROMPT`` noises on a quarter of the prompts; the reference of the distance has other noises, so the
    teacher's own row is its floor.

    Args:
        pipe: a ``TDMPipeline``, with the student that is measured if ``students`` names none. It is left at the last
            of the plan's strengths, and with no other adapter on.
        prompts: at least 2 of them.
        plan: what is compared.
        students: files, folders or hub repositories, each loaded in turn.
        seed: of the noises: ``seed`` to ``seed + N`` of the pictures that are judged.
        cache: folder of teachers' pictures (`pictures.cached`); None draws them each time.
        extras: further scores of the pictures that are judged.
        load: puts one of ``students`` into the pipeline.

    Raises:
        TDMError: a base of videos, too few prompts, students of several sizes, or one that cannot be loaded.
    """
    _check(pipe, prompts)
    pipe.set_progress_bar_config(disable=True)
    by_name = dict(zip(names_of(students), students, strict=True))
    variants = plan.variants(pipe.teacher_call, list(by_name) or ["student"])
    _check_students(pipe, students, load)
    loaded = None
    compared = prompts.texts[: max(8, len(prompts.texts) // 4)]
    rows: list[Row] = []
    shown = []
    reference: Reference | None = None
    with tqdm(total=_steps(variants, prompts.texts, compared), unit=" steps", mininterval=1.0) as bar:
        drawing = Drawing(pipe, bar, cache)
        for variant in variants:
            if variant.student in by_name and variant.student != loaded:
                load(pipe, by_name[variant.student])
                loaded = variant.student
            drawn, from_cache = drawing(variant, prompts.texts, range(seed, seed + len(prompts.texts)))
            repeats = drawing.several(variant, compared, seed + 2 * APART)
            if reference is None:
                others = drawing.several(variant, compared, seed + APART)
                reference = Reference(drawn.pictures, repeats, others, prompts.wanted)
            measures = reference.measures(drawn.pictures, repeats)
            measures.values |= {extra.name: extra(drawn.pictures, prompts.texts) for extra in extras}
            rows.append(_row(variant, drawn, from_cache, measures))
            shown.append([Image.fromarray(p.permute(1, 2, 0).numpy()) for p in drawn.pictures[:SHOWN]])
            bar.write(f"{variant.name}: {measures.headline}")
    labels = [f"{row.name.replace(', ', chr(10))}\n{row.calls:g} calls" for row in rows]
    return rows, contact_sheet(shown, labels, prompts.texts[:SHOWN])


def _steps(variants: Sequence[Variant], prompts: Sequence[str], compared: Sequence[str]) -> int:
    """How many steps an evaluation makes, each of one picture; the teacher draws once more, for the reference."""
    repeats = SEEDS_PER_PROMPT * len(compared)
    return sum(v.steps for v in variants) * (len(prompts) + repeats) + variants[0].steps * repeats


def _row(variant: Variant, drawn: Drawn, from_cache: bool, measures: Measures) -> Row:
    return Row(
        name=variant.name,
        steps=variant.steps,
        calls=drawn.facts["calls"],
        seconds=drawn.facts["seconds"],
        cached=from_cache,
        student=variant.student,
        strength=variant.strength,
        measures=measures,
        base_first=variant.base_first,
    )


def names_of(students: Sequence[str]) -> list[str]:
    """A short name for each student: its file's, or that of the run's folder where the file has everybody's name."""
    short = []
    for student in students:
        path = Path(student)
        short.append(path.parent.name if path.stem == "student" and path.parent.name else path.stem)
    names = short if len(set(short)) == len(short) else list(students)
    if len(set(names)) < len(names):
        raise TDMError("a student is given twice")
    return [name.replace(", ", " ") for name in names]


def _check(pipe: Any, prompts: Prompts) -> None:
    recipe = pipe.recipe
    if pipe.family.video:
        raise TDMError(f"an evaluation looks at pictures, and {recipe.family} makes videos")
    if len(prompts.texts) < 2:
        raise TDMError("an evaluation wants at least 2 prompts")
    if prompts.wanted is not None and (recipe.height, recipe.width) != (SIZE, SIZE):
        raise TDMError(
            f"{recipe.base_model} is not of the bundled world, whose pictures are {SIZE}x{SIZE}: what it should show "
            "is not known; give prompts of your own with --prompts-file"
        )


def _check_students(pipe: Any, students: Sequence[str], load: Callable[[Any, str], None]) -> None:
    """Load each once before anything is drawn, the first at last: its grid is the teacher's, too."""
    sizes = set()
    for student in [*students[1:], *students[:1]]:
        load(pipe, student)
        sizes.add((pipe.recipe.height, pipe.recipe.width))
        if len(sizes) > 1:
            raise TDMError(f"{student} draws in another size than other students; evaluate it on its own")


def _plain(value: Any) -> Any:
    """A scheduler's settings as JSON: keys as texts, without what diffusers notes for itself."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if not str(key).startswith("_")}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
