"""``tdm eval``: the teacher and its student on held-out prompts of the bundled world, as a table and a picture grid."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..pipelines.sheet import contact_sheet
from .metrics import colour_ratios, distance, diversity
from .world.captions import caption
from .world.scene import Scene, scenes
from .world.verify import Verdict, verify

SEED = 20_000  # of the prompts and noises: far from those of any training run
BATCH = 32
TEACHER_STEPS = 50
TEACHER_GUIDANCE = 3.0
SEEDS_PER_PROMPT = 4  # of distance and diversity, which compare pictures of one prompt


@dataclass(frozen=True)
class Sampler:
    """One row of the table: a name and how to draw."""

    name: str
    steps: int
    guidance_scale: float
    teacher: bool  # the base alone; False: with the student's adapter
    own_scheduler: bool = False  # the teacher's own scheduler; False: the student's sampler and grid

    @property
    def calls(self) -> int:
        """Network calls per picture."""
        return self.steps * (1 + (self.guidance_scale != 1))


@dataclass
class Row:
    """What one sampler reached; see ``training/metrics.py`` for the measures."""

    name: str
    calls: float  # network calls per picture, guidance counted twice
    seconds: float  # per picture, everything included
    accuracy: float  # every attribute of the prompt right
    accuracy_error: float  # its standard error
    attributes: dict[str, float]  # accuracy of each attribute
    distance: float  # to other pictures of the teacher at 50 guided steps, prompt by prompt
    distance_error: float  # its standard error
    diversity: float  # over that of the teacher at 50 guided steps
    colours: dict[str, float] = field(default_factory=dict)  # over the teacher's


def samplers(student_steps: Sequence[int]) -> list[Sampler]:
    """The rows of the table: the teacher as it is meant to be run, undistilled at 4 calls (with its own scheduler, and
    with the student's sampler and grid), and the student.
    """
    return [
        Sampler(f"teacher, {TEACHER_STEPS} steps, guided", TEACHER_STEPS, TEACHER_GUIDANCE, True, own_scheduler=True),
        Sampler("teacher, 4 steps", 4, 1.0, True, own_scheduler=True),
        Sampler("teacher, 4 steps of the student's", 4, 1.0, True),
        *(Sampler(f"student, {k} step{'s' * (k > 1)}", k, 1.0, False) for k in student_steps),
    ]


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


def draw(pipe: Any, sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], **call: Any) -> Tensor:
    """uint8 pictures (N, 3, H, W) on the CPU, one seed a picture, ``BATCH`` at a time."""
    made = []
    with contextlib.ExitStack() as stack:
        student_scheduler = pipe.scheduler
        if sampler.teacher:
            stack.enter_context(pipe.teacher())
            if not sampler.own_scheduler:
                pipe.scheduler = student_scheduler  # teacher() puts things back at its end
        for start in range(0, len(prompts), BATCH):
            part = slice(start, start + BATCH)
            made.append(
                pipe(
                    prompt=list(prompts[part]),
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                    num_inference_steps=sampler.steps,
                    guidance_scale=sampler.guidance_scale,
                    output_type="pt",
                    **call,
                )
                .images.float()
                .cpu()
            )
    return (torch.cat(made) * 255).round().to(torch.uint8)


def held_out_prompts(count: int) -> tuple[list[str], list[Scene]]:
    """``count`` prompts that name a combination no training picture showed, and their scenes."""
    rng = random.Random(SEED)
    wanted = list(islice(scenes(SEED, "held_out"), count))
    return [caption(scene, rng) for scene in wanted], wanted


def _shares(verdicts: list[Verdict]) -> dict[str, float]:
    shares = {}
    for name in ("background", "count", "colour", "kind", "relation"):
        values = [getattr(v, name) for v in verdicts if getattr(v, name) is not None]
        shares[name] = sum(values) / len(values)
    return shares


def evaluate(
    pipe: Any,
    *,
    prompts: int = 256,
    student_steps: Sequence[int] = (1, 2, 4, 8),
) -> tuple[list[Row], Image.Image]:
    """Measure teacher and student; returns the table and a grid of eight prompts drawn by every sampler.

    ``pipe`` is a ``TDMPipeline`` of the bundled world. Distance and diversity come from ``SEEDS_PER_PROMPT`` noises on
    a quarter of the prompts; the reference of the distance has other noises, so the teacher's own row is its floor.
    """
    pipe.set_progress_bar_config(disable=True)
    texts, wanted = held_out_prompts(prompts)
    several = [text for text in texts[: max(8, prompts // 4)] for _ in range(SEEDS_PER_PROMPT)]

    teacher, *others = samplers(student_steps)
    pictures = prompts + len(several)
    total = teacher.calls * len(several) + sum(s.calls * pictures for s in (teacher, *others))

    def draw_several(sampler: Sampler, first_seed: int) -> Tensor:
        made = draw(pipe, sampler, several, range(first_seed, first_seed + len(several)))
        return made.view(-1, SEEDS_PER_PROMPT, *made.shape[1:])

    rows: list[Row] = []
    sheet = []
    with progress(pipe.transformer, total) as bar:
        reference = draw_several(teacher, 2 * SEED)
        base_colours = base_diversity = None
        for sampler in (teacher, *others):
            begun, called = time.perf_counter(), bar.n
            made = draw(pipe, sampler, texts, range(SEED, SEED + prompts))
            seconds, calls = time.perf_counter() - begun, bar.n - called
            again = draw_several(sampler, 3 * SEED)
            apart, distance_error = distance(again, reference)
            base_colours = made if base_colours is None else base_colours
            base_diversity = base_diversity or diversity(again)
            verdicts = verify(made, wanted)
            accuracy = sum(v.correct for v in verdicts) / prompts
            rows.append(
                Row(
                    name=sampler.name,
                    calls=calls / prompts,
                    seconds=seconds / prompts,
                    accuracy=accuracy,
                    accuracy_error=(accuracy * (1 - accuracy) / prompts) ** 0.5,
                    attributes=_shares(verdicts),
                    distance=apart,
                    distance_error=distance_error,
                    diversity=diversity(again) / base_diversity,
                    colours=colour_ratios(made, base_colours),
                )
            )
            sheet.append([Image.fromarray(p.permute(1, 2, 0).numpy()) for p in made[:8]])
            bar.write(f"{sampler.name}: accuracy {accuracy:.3f}")
    labels = [f"{row.name.replace(', ', chr(10))}\n{row.calls:g} calls" for row in rows]
    return rows, contact_sheet(sheet, labels, texts[:8])


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    head = ("sampler", "calls", "s / picture", "accuracy", "distance", "diversity", "bright", "contrast", "saturation")
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for r in rows:
        c = r.colours
        cells = (
            r.name, f"{r.calls:g}", f"{r.seconds:.3f}", f"{r.accuracy:.3f} ± {r.accuracy_error:.3f}",
            f"{r.distance:.3f} ± {r.distance_error:.3f}", f"{r.diversity:.2f}",
            f"{c['brightness']:.3f}", f"{c['contrast']:.3f}", f"{c['saturation']:.3f}",
        )  # fmt: skip
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def write(rows: Sequence[Row], sheet: Image.Image, folder: Path) -> None:
    """``eval.json``, ``eval.md`` and ``grid.png`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    (folder / "eval.md").write_text(table(rows) + "\n")
    sheet.save(folder / "grid.png")
