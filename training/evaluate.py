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
TEACHER_STEPS = 50
TEACHER_GUIDANCE = 3.0
SEEDS_PER_PROMPT = 4  # of distance and diversity, which compare pictures of one prompt
SHOWN = 8  # prompts on the sheet


@dataclass(frozen=True)
class Sampler:
    """A name and how to draw."""

    name: str
    steps: int
    guidance_scale: float | None  # None: the student's own
    student: str | None  # whose adapter is on; None: the teacher, which is the base alone
    own_scheduler: bool = False  # the teacher's own scheduler; False: the student's sampler and grid
    strength: float | None = None  # of the student on the base; None: as it is, 1 of a student just loaded
    base_first: bool = False  # the first step is the base's (`TDMPipeline.base_first`)


class Prompts(NamedTuple):
    """What is drawn, and what it must show; None where nobody can tell."""

    texts: list[str]
    wanted: list[Scene] | None = None


@dataclass
class Row:
    """What one sampler reached."""

    name: str
    steps: int
    calls: float  # network calls per picture, guidance counted twice
    seconds: float  # per picture, everything included
    cached: bool  # the pictures, and with them calls and seconds, are from an earlier evaluation
    student: str | None  # None: the teacher
    strength: float | None = None  # of the student; None: none was asked for
    measures: Measures = field(default_factory=Measures)
    base_first: bool = False


def samplers(
    student_steps: Sequence[int],
    students: Sequence[str] = ("student",),
    *,
    teacher_steps: int = TEACHER_STEPS,
    teacher_guidance: float = TEACHER_GUIDANCE,
    strengths: Sequence[float] = (),
    base_first: bool = False,
) -> list[Sampler]:
    """The rows of the table: the teacher as it is meant to be run, undistilled at 4 calls (with its own scheduler, and
    with the first student's sampler and grid), and the students, at each of ``strengths`` if any are given, and with
    ``base_first`` once more so, where they have 2 steps or more.
    """
    at: list[tuple[float | None, str]] = [(s, f" at {s:g}") for s in strengths] or [(None, "")]
    return [
        Sampler(f"teacher, {teacher_steps} steps, guided", teacher_steps, teacher_guidance, None, own_scheduler=True),
        Sampler("teacher, 4 steps", 4, None, None, own_scheduler=True),
        Sampler("teacher, 4 steps of the student's", 4, None, None),
        *(
            Sampler(
                f"{name}{told}, {k} step{'s' * (k > 1)}{', base first' * first}",
                k,
                None,
                name,
                strength=strength,
                base_first=first,
            )
            for name in students
            for strength, told in at
            for k in student_steps
            for first in (False, True)[: 1 + (base_first and k > 1)]
        ),
    ]


def held_out_prompts(count: int, seed: int = SEED) -> tuple[list[str], list[Scene]]:
    """``count`` prompts that name a combination no training picture showed, and their scenes."""
    rng = random.Random(seed)
    wanted = list(islice(scenes(seed, "held_out"), count))
    return [caption(scene, rng) for scene in wanted], wanted


def draw(pipe: Any, sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], **call: Any) -> Tensor:
    """uint8 pictures (N, 3, H, W) on the CPU, one seed a picture, ``BATCH`` at a time."""
    made = []
    scale = pipe.recipe.guidance_scale if sampler.guidance_scale is None else sampler.guidance_scale
    with contextlib.ExitStack() as stack:
        student_scheduler = pipe.scheduler
        if sampler.student is None:
            stack.enter_context(pipe.teacher())
            if not sampler.own_scheduler:
                pipe.scheduler = student_scheduler  # teacher() puts things back at its end
        elif sampler.strength is not None:
            pipe.set_adapters(STUDENT_ADAPTER, sampler.strength)
        if sampler.base_first:
            stack.enter_context(pipe.base_first())
        for start in range(0, len(prompts), BATCH):
            part = slice(start, start + BATCH)
            made.append(
                pipe(
                    prompt=list(prompts[part]),
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                    num_inference_steps=sampler.steps,
                    output_type="pt",
                    **pipe.family.guidance(scale),
                    **call,
                )
                .images.float()
                .cpu()
            )
    return (torch.cat(made) * 255).round().to(torch.uint8)


class Drawing:
    """Draws for an evaluation: counts calls and seconds, shows how far it is, and keeps the teacher's pictures.

    Args:
        pipe: a ``TDMPipeline``.
        bar: advanced by a network call for one picture.
        cache: folder of teachers' pictures; None keeps none.
    """

    def __init__(self, pipe: Any, bar: tqdm, cache: Path | None) -> None:
        self.pipe, self.bar, self.cache = pipe, bar, cache
        self._base: dict[str, Any] | None = None

    def __call__(self, sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Drawn, bool]:
        """(pictures with their "calls" and "seconds" a picture, whether they are from the cache)."""
        fresh = False

        def now() -> Drawn:
            nonlocal fresh
            fresh = True
            begun, called = time.perf_counter(), self.bar.n
            pictures = draw(self.pipe, sampler, prompts, seeds)
            seconds, calls = time.perf_counter() - begun, self.bar.n - called
            return Drawn(pictures, {"calls": calls / len(prompts), "seconds": seconds / len(prompts)})

        if self.cache is None or sampler.student is not None:
            return now(), False
        drawn = cached(self.cache, self._identity(sampler, prompts, seeds), now)
        if not fresh:
            self.bar.total -= round(drawn.facts["calls"] * len(prompts))  # calls that need not be waited for
        return drawn, not fresh

    def _identity(self, sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
        """All that the teacher's pictures depend on."""
        pipe, recipe = self.pipe, self.pipe.recipe
        if self._base is None:
            self._base = BaseModel.find(pipe.base_model).identity()
        scale = recipe.guidance_scale if sampler.guidance_scale is None else sampler.guidance_scale
        return {
            "base": self._base,
            "dtype": str(pipe.dtype),
            "device": pipe.device.type,
            "size": [recipe.height, recipe.width],
            "scheduler": "its own" if sampler.own_scheduler else _plain(dict(pipe.scheduler.config)),
            "steps": sampler.steps,
            "guidance_scale": scale,
            "prompts": list(prompts),
            "seeds": list(seeds),
        }


def evaluate(
    pipe: Any,
    prompts: Prompts,
    *,
    students: Sequence[str] = (),
    student_steps: Sequence[int] = (1, 2, 4, 8),
    teacher_steps: int = TEACHER_STEPS,
    teacher_guidance: float = TEACHER_GUIDANCE,
    strengths: Sequence[float] = (),
    base_first: bool = False,
    seed: int = SEED,
    cache: Path | None = None,
    extras: Sequence[Extra] = (),
    load: Callable[[Any, str], None] = lambda pipe, student: pipe.load_student(student),
) -> tuple[list[Row], Image.Image]:
    """Measure a teacher and its students; returns the table and a grid of eight prompts drawn by every sampler.

    The teacher's pictures are drawn once, for all students and strengths. Distance and diversity come from
    ``SEEDS_PER_PROMPT`` noises on a quarter of the prompts; the reference of the distance has other noises, so the
    teacher's own row is its floor.

    Args:
        pipe: a ``TDMPipeline``, with the student that is measured if ``students`` names none.
        prompts: at least 2 of them.
        students: files, folders or hub repositories, each loaded in turn.
        strengths: of the students on the base, above 0: a row for each. None given: as they are. The pipeline is left
            at the last of them, and with no other adapter on.
        base_first: a further row for each of a student's of 2 steps or more, with the first step by the base.
        seed: of the noises: ``seed`` to ``seed + N`` of the pictures that are judged.
        cache: folder of teachers' pictures (`pictures.cached`); None draws them each time.
        load: puts one of ``students`` into the pipeline.

    Raises:
        TDMError: a base of videos, too few prompts, students of several sizes, or one that cannot be loaded.
    """
    _check(pipe, prompts)
    pipe.set_progress_bar_config(disable=True)
    texts, n = prompts.texts, len(prompts.texts)
    compared = texts[: max(8, n // 4)]
    several = [text for text in compared for _ in range(SEEDS_PER_PROMPT)]
    labels = names_of(students) if students else ["student"]
    plan = samplers(
        student_steps,
        labels,
        teacher_steps=teacher_steps,
        teacher_guidance=teacher_guidance,
        strengths=strengths,
        base_first=base_first,
    )
    _check_students(pipe, students, load)
    loaded = None
    calls = [s.steps * (1 + (s.guidance_scale not in (None, 1))) for s in plan]
    total = sum(calls) * (n + len(several)) + calls[0] * len(several)  # the teacher once more: the reference
    rows: list[Row] = []
    sheet = []
    reference: Reference | None = None
    with progress(getattr(pipe, pipe.family.denoiser), total) as bar:
        drawing = Drawing(pipe, bar, cache)

        def grouped(sampler: Sampler, first_seed: int) -> Tensor:
            made = drawing(sampler, several, range(first_seed, first_seed + len(several)))[0].pictures
            return made.view(-1, SEEDS_PER_PROMPT, *made.shape[1:])

        for sampler in plan:
            student = sampler.student
            if students and student != loaded and student is not None:
                load(pipe, students[labels.index(student)])
                loaded = student
            (made, facts), found = drawing(sampler, texts, range(seed, seed + n))
            again = grouped(sampler, seed + 2 * APART)
            if reference is None:
                reference = Reference(made, again, grouped(sampler, seed + APART), prompts.wanted)
            measures = reference.measures(made, again)
            measures.values |= {extra.name: extra(made, texts) for extra in extras}
            told = (sampler.name, sampler.steps, facts["calls"], facts["seconds"], found, student, sampler.strength)
            rows.append(Row(*told, measures, sampler.base_first))
            sheet.append([Image.fromarray(p.permute(1, 2, 0).numpy()) for p in made[:SHOWN]])
            bar.write(f"{sampler.name}: {measures.headline}")
    labelled = [f"{row.name.replace(', ', chr(10))}\n{row.calls:g} calls" for row in rows]
    return rows, contact_sheet(sheet, labelled, texts[:SHOWN])


@contextlib.contextmanager
def progress(denoiser: torch.nn.Module, total: int) -> Iterator[Any]:
    """A bar with ETA that counts network calls as they happen: one a picture in the batch, two with guidance."""
    with tqdm(total=total, unit=" calls", mininterval=1.0) as bar:

        def count(_module: Any, _inputs: Any, output: Any) -> None:
            bar.update(len(output[0]))

        handle = denoiser.register_forward_hook(count)
        try:
            yield bar
        finally:
            handle.remove()


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
