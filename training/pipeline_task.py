"""The task of distilling a diffusers pipeline: prompts in, latents out, the VAE for previews and measures only."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import TDMError
from ..pipelines.families import Condition, Size
from ..pipelines.locate import BUNDLED, base_folder, family_of_base
from ..pipelines.schedule import NoiseSchedule, PredictionType
from ..pipelines.scheduler import TDMScheduler
from ..pipelines.sheet import contact_sheet
from ..pipelines.student import StudentRecipe
from .loop import Sampler
from .metrics import colour_ratios
from .trajectory import Trajectory
from .world.captions import caption
from .world.scene import Scene, random_scene, scenes
from .world.verify import verify

STICKERS = "stickers"
PREVIEWS = 8


@dataclass(frozen=True)
class PipelineTaskConfig:
    """The ``task`` section of a configuration that distils a pipeline."""

    name: str = "pipeline"
    model: str = BUNDLED  # folder or hub id of the base, or the bundled one
    prompts: str = STICKERS  # a text file with one prompt a line, or the grammar of the bundled world
    height: int | None = None  # in pixels; None is the size that the model was made for
    width: int | None = None
    num_frames: int | None = None  # of a video
    embedded_guidance: float | None = None  # what a guidance-distilled network (FLUX.1-dev) is told; None: its default
    evaluate: int = 64  # held-out prompts per evaluation (the bundled world only)


class PipelineTask:
    """``loop.Task`` of a pipeline of any family (see ``pipelines/families``).

    Args:
        config: which base, which prompts and which size.
        device, dtype: of the frozen base.

    Raises:
        TDMError: an unsupported base, a size that does not fit it, or a prompt file that is missing or empty.
    """

    def __init__(self, config: PipelineTaskConfig, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.config = config
        folder = base_folder(config.model)
        self.family = family_of_base(folder)
        self.pipe: Any = self.family.pipeline_class().from_pretrained(folder, dtype=dtype)
        self.pipe.to(device).set_progress_bar_config(disable=True)
        for part in self.pipe.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)
        self.base: nn.Module = getattr(self.pipe, self.family.denoiser)
        self.targets: Sequence[str] | str = self.family.lora_targets
        scheduler = TDMScheduler.from_config(self.pipe.scheduler.config)
        self.schedule: NoiseSchedule = scheduler.schedule
        self.prediction_type: PredictionType = scheduler.config.prediction_type
        own = self.family.default_size(self.pipe)
        self.size = Size(config.height or own.height, config.width or own.width, config.num_frames or own.num_frames)
        if self.size.num_frames is not None and not self.family.video:
            raise TDMError(
                f"task.num_frames is {config.num_frames}, but {self.family.name} makes pictures; leave it out"
            )
        self.latent_shape: tuple[int, ...] = self.family.latent_shape(self.pipe, self.size)
        if config.embedded_guidance is not None and not self.family.embeds_guidance(self.pipe):
            raise TDMError(
                "task.embedded_guidance is for guidance-distilled networks; this base takes none: leave it out"
            )
        self.draw_prompts = _prompt_source(config.prompts)
        self._teacher_pictures: dict[str, Tensor] = {}

    @property
    def student_guidance(self) -> float:
        """The guidance scale to run the student with: 1.0 is none; a guidance-distilled network is told the same."""
        return float(self.encode([""])["guidance"][0]) if self.family.embeds_guidance(self.pipe) else 1.0

    def recipe(self, trajectory: Trajectory) -> StudentRecipe:
        """See ``loop.Task``."""
        source = self.config.prompts
        lines = "" if source == STICKERS else f"{len(_prompt_lines(source))} prompts of {Path(source).name}"
        return StudentRecipe(
            base_model=self.config.model,
            family=self.family.name,
            prediction_type=self.prediction_type,
            trained_timesteps={len(trajectory): trajectory.timesteps.tolist()},
            guidance_scale=self.student_guidance,
            height=self.size.height,
            width=self.size.width,
            num_frames=self.size.num_frames,
            flow_shift=trajectory.config.shift if self.schedule.kind == "flow" else None,
            notes={
                "method": "Trajectory Distribution Matching (arXiv 2503.06674)",
                "prompts": lines or "the grammar of the bundled world",
            },
        )

    def call(self, base: nn.Module, x: Tensor, timesteps: Tensor, cond: Condition) -> Tensor:
        """See ``loop.Task``."""
        return self.family.denoise(base, x, timesteps, cond)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Condition:
        """The condition of prompts, as the pipeline itself makes it."""
        return self.family.encode(self.pipe, prompts, self.size, **self._told)

    @property
    def _told(self) -> dict[str, float]:
        scale = self.config.embedded_guidance
        return {} if scale is None else {"guidance_scale": scale}

    @property
    def device(self) -> torch.device:
        """Where the base runs."""
        return self.pipe.device

    def conditions(self, n: int, generator: torch.Generator) -> tuple[Condition, tuple[int, ...]]:
        """See ``loop.Task``."""
        seed = int(torch.randint(2**62, (), generator=generator))
        return self.encode(list(islice(self.draw_prompts(random.Random(seed)), n))), self.latent_shape

    @torch.no_grad()
    def null(self, cond: Condition) -> Condition:
        """No prompt, in the shapes of ``cond``."""
        return self.family.null(self.pipe, cond, self.size, **self._told)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, *latent_shape] to uint8 pictures [B, 3, H, W] on the CPU; of a video its middle frame."""
        pixels = torch.cat([self.family.decode(self.pipe, part, self.size) for part in latents.split(32)])
        return pixels[:, pixels.shape[1] // 2] if self.family.video else pixels

    def pictures(self, sampler: Sampler, prompts: list[str], seed: int) -> Tensor:
        """uint8 pictures of ``prompts`` from fixed noise."""
        noise = torch.randn(len(prompts), *self.latent_shape, generator=torch.Generator().manual_seed(seed))
        chunks = zip(noise.split(32), _chunks(prompts, 32), strict=True)
        return self.decode(torch.cat([sampler(n.to(self.pipe.device), self.encode(p)) for n, p in chunks]))

    def preview(self, student: Sampler, teacher: Sampler) -> Image.Image:
        """Teacher above student, the same prompts and noise."""
        prompts = list(islice(self.draw_prompts(random.Random(0)), PREVIEWS))
        if "preview" not in self._teacher_pictures:
            self._teacher_pictures["preview"] = self.pictures(teacher, prompts, 0)
        rows = (self._teacher_pictures["preview"], self.pictures(student, prompts, 0))
        images = [[Image.fromarray(p.permute(1, 2, 0).numpy()) for p in row] for row in rows]
        return contact_sheet(images, ["teacher", "student"], prompts)

    def evaluate(self, student: Sampler, teacher: Sampler) -> dict[str, float]:
        """Accuracy on held-out combinations, and colours over the teacher's; nothing without the bundled world."""
        if self.config.prompts != STICKERS or self.config.evaluate == 0:
            return {}
        wanted = list(islice(scenes(1, "held_out"), self.config.evaluate))
        rng = random.Random(1)
        prompts = [caption(scene, rng) for scene in wanted]
        if "evaluate" not in self._teacher_pictures:
            self._teacher_pictures["evaluate"] = self.pictures(teacher, prompts, 1)
        reference = self._teacher_pictures["evaluate"]
        made = self.pictures(student, prompts, 1)
        accuracy = {"accuracy": _accuracy(made, wanted), "teacher_accuracy": _accuracy(reference, wanted)}
        return accuracy | colour_ratios(made, reference)


def _accuracy(pictures: Tensor, wanted: list[Scene]) -> float:
    return sum(verdict.correct for verdict in verify(pictures, wanted)) / len(wanted)


def _chunks(items: list[str], size: int) -> list[list[str]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _prompt_source(name: str) -> Callable[[random.Random], Iterator[str]]:
    """An endless stream of prompts for a random state: the bundled grammar (training split), or lines of a file."""
    if name == STICKERS:

        def grammar(rng: random.Random) -> Iterator[str]:
            while True:
                yield caption(random_scene(rng, "train"), rng)

        return grammar
    lines = _prompt_lines(name)

    def from_file(rng: random.Random) -> Iterator[str]:
        while True:
            yield rng.choice(lines)

    return from_file


def _prompt_lines(name: str) -> list[str]:
    path = Path(name)
    if not path.is_file():
        raise TDMError(f"no prompt file {name}; give a text file with one prompt a line, or {STICKERS!r}")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise TDMError(f"{name} holds no prompts")
    return lines
