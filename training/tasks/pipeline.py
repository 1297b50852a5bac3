"""The task of distilling a diffusers pipeline: prompts in, latents out, the VAE for previews and measures only."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ...files import user_cache
from ...pipelines.families import Condition, Size
from ...pipelines.families.base import null_like, on_device
from ...pipelines.guidance_norm import norm_of_family
from ...pipelines.prediction_types import PredictionType
from ...pipelines.schedule import NoiseSchedule
from ...pipelines.students.recipe import StudentRecipe
from ...sheet import contact_sheet
from ..best import Metric
from ..config import MemoryConfig
from ..metrics import colour_ratios, diversity, power_ratios
from ..metrics.distances import DIMENSIONS, picture_frechet
from ..pictures import cached_pictures
from ..preview import Preview, picture_ratios
from ..progress import Progress, Report, print_line
from ..roles import GuidedOutput
from ..task import Sample, Teacher
from ..trajectory import Trajectory
from ..worlds.stickers.scene import Scene
from ..worlds.stickers.verify import verify
from .base_model import BaseModel
from .base_storage import storage_on
from .pipeline_settings import PipelineTaskConfig, negative_prompt_of, scheduler_of, sizes_of
from .prompt_cache import PromptCache, build_cache, encoder_dtype
from .prompts import STICKERS, held_out, training_prompts

PREVIEWS = 4  # prompts
SEEDS = 2  # pictures of each, since a student that collapses draws one and the same
REPEATS = 4  # pictures of a prompt whose variety is measured
SHOWN = 8  # pictures in a row
CHUNK = 32  # pictures at a time in previews and evaluation


class PipelineTask:
    """``Task`` of a pipeline of any family (see ``pipelines/families``).

    All prompts of the run are encoded first (``prompt_cache``); then the denoiser is loaded, without text encoders. The
    VAE comes with the first decoding and leaves the device after each. What the teacher draws for previews and
    evaluations is kept on disk (``training/pictures``), since it is the same in every run of one base.

    Args:
        config: which base, which prompts and which sizes.
        memory: how the base is stored.
        device: where it computes.
        report: takes the progress lines.
        base: in the place of the one that ``config`` names.

    Raises:
        TDMError: an unsupported base or storage, a size or LoRA that does not fit it, or a prompt file that is missing
            or empty.
    """

    def __init__(
        self,
        config: PipelineTaskConfig,
        memory: MemoryConfig | None = None,
        device: str | torch.device = "cpu",
        report: Report = print_line,
        base: BaseModel | None = None,
    ) -> None:
        self.config, self.device, self._report = config, torch.device(device), report
        self._memory = memory = memory or MemoryConfig()
        self._storage = storage_on(memory, self.device)  # refused here, before anything is read
        self.base_model = base or BaseModel.find(config.model, config.loras)
        self.family = self.base_model.family
        self.prompts = training_prompts(config.prompts, config.prompt_count)
        measured = config.evaluate if config.prompts == STICKERS else 0
        self._held_out, self._wanted = held_out(measured)
        self._root = user_cache() if config.cache is None else Path(config.cache)
        prompts = [*self.prompts, *self._held_out]
        self.negative_prompt = negative_prompt_of(config, self.family)
        root = self._root / "prompts"
        self.cache = encode_prompts(self.base_model, prompts, root, self.device, report, self.negative_prompt)

        self.pipe, self._dtype = self.base_model.pipeline(memory, self.device)
        self.base: nn.Module = getattr(self.pipe, self.family.denoiser)
        self.targets: Sequence[str] | str = self.family.lora_targets
        self.time_embedder = self.family.time_embedder
        scheduler: Any = scheduler_of(self.pipe, self.base_model.folder)
        self.schedule: NoiseSchedule = scheduler.schedule
        self.prediction_type: PredictionType = scheduler.config.prediction_type
        flow = self.schedule.kind == "flow"
        self.guidance_norm = norm_of_family(self.family, config.guidance_norm, flow=flow)
        self.guided_output: GuidedOutput | None = None
        if self.guidance_norm is not None:
            self.guided_output = functools.partial(self.guidance_norm, token_norms=self.family.token_norms)
        self.sizes = sizes_of(config, self.family, self.pipe)
        self.size = self.sizes[0]
        self.latent_shape = self.family.latent_shape(self.pipe, self.size)
        self._vae: Any = None
        self._teacher_pictures: dict[int, Tensor] = {}

    @property
    def student_guidance(self) -> float:
        """The guidance scale to run the student with: 1.0 is none. A guidance-distilled network gets the same scale."""
        facts = self.family.facts(self.pipe, self.cache.null, self.size, **self._embedded_guidance)
        return float(facts["guidance"][0]) if self.family.embeds_guidance(self.pipe) else 1.0

    def recipe(self, trajectories: Mapping[int, Trajectory]) -> StudentRecipe:
        """See ``Task``."""
        config = next(iter(trajectories.values())).config
        source = (
            "the grammar of the bundled world" if self.config.prompts == STICKERS else Path(self.config.prompts).name
        )
        notes = {"prompts": f"{len(self.prompts)} prompts of {source}"}
        if self.merged_loras:
            notes["load_beside"] = ", ".join(self.merged_loras)
        return StudentRecipe(
            base_model=self.config.model,
            family=self.family.name,
            prediction_type=self.prediction_type,
            trained_timesteps={k: trajectory.timesteps.tolist() for k, trajectory in trajectories.items()},
            guidance_scale=self.student_guidance,
            height=self.size.height,
            width=self.size.width,
            num_frames=self.size.num_frames,
            flow_shift=config.shift if self.schedule.kind == "flow" else None,
            notes=notes,
            preferred_steps=config.steps if len(trajectories) > 1 else None,
            stochastic_sampling=config.sampler == "stochastic",
            eta=config.eta,
            teacher_negative_prompt=self.negative_prompt or None,
            teacher_guidance_norm=self._guidance_norm_of_file,
        )

    @property
    def _guidance_norm_of_file(self) -> str | None:
        """The normalisation that a file names: None is as the base's own pipeline has it."""
        name = None if self.guidance_norm is None else str(self.guidance_norm)
        return None if name == self.family.own_guidance_norm else name

    @property
    def _embedded_guidance(self) -> dict[str, float]:
        scale = self.config.embedded_guidance
        return {} if scale is None else {"guidance_scale": scale}

    @property
    def merged_loras(self) -> list[str]:
        """The LoRAs that are part of the teacher, as ``name@strength``: load them with the student."""
        return [f"{lora.file.name}@{lora.strength:g}" for lora in self.base_model.loras]

    def call(self, base: nn.Module, x: Tensor, timesteps: Tensor, cond: Condition) -> Tensor:
        """See ``Task``. States and conditions enter in the dtype that the network computes in: a copy of the base
        (``full_weights``) has float32 weights, however the base is stored.
        """
        dtype = self._dtype if base is self.base else torch.float32
        cond = {key: value.to(dtype) if value.is_floating_point() else value for key, value in cond.items()}
        return self.family.denoise(base, x.to(dtype), timesteps, cond)

    def encode(self, prompts: Sequence[str], size: Size | None = None) -> Condition:
        """The condition of prompts of this run on the CPU, for pictures of a size (the first if not given).

        Raises:
            TDMError: a prompt is not one of the run's.
        """
        text = self.cache.conditions(prompts)
        return text | self.family.facts(self.pipe, text, size or self.size, **self._embedded_guidance)

    def conditions(self, n: int, generator: torch.Generator) -> tuple[Condition, tuple[int, ...]]:
        """See ``Task``."""
        rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
        size = rng.choice(self.sizes)
        return self.encode(rng.choices(self.prompts, k=n), size), self.family.latent_shape(self.pipe, size)

    def identity(self) -> dict[str, str]:
        """See ``Task``."""
        prompts = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()
        return {"the prompts": prompts, "the base": self.base_model.content()}

    def null(self, cond: Condition) -> Condition:
        """See ``Task``."""
        return null_like(self.cache.null, cond)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, *latent_shape] to uint8 pictures [B, 3, H, W] on the CPU; of a video its middle frame."""
        if self._vae is None:
            self._vae = self.base_model.vae()
        self.pipe.vae = self._vae.to(self.device)
        try:
            pixels = torch.cat([self.family.decode(self.pipe, part, self.size) for part in latents.split(CHUNK)])
        finally:
            self._vae.to("cpu")
            self.pipe.vae = None
        return pixels[:, pixels.shape[1] // 2] if self.family.video else pixels

    def pictures(self, sampler: Sample, prompts: list[str], seed: int) -> Tensor:
        """uint8 pictures [N, 3, H, W] of N ``prompts`` from the noise of ``seed``."""
        noise = torch.randn(len(prompts), *self.latent_shape, generator=torch.Generator().manual_seed(seed))
        latents, progress = [], Progress("drawing pictures", len(prompts), self._report)
        for start in range(0, len(prompts), CHUNK):
            cond = on_device(self.encode(prompts[start : start + CHUNK]), self.device)
            latents.append(sampler(noise[start : start + CHUNK].to(self.device), cond))
            progress.add(len(latents[-1]))
        return self.decode(torch.cat(latents))

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        """What the base's pictures depend on other than their sampler, prompts and noise."""
        return {
            "base": self.base_model.identity(),
            "storage": self._storage,
            "device": self.device.type,
            "size": self.size,
            "told": self._embedded_guidance,
            **({"negative_prompt": self.negative_prompt} if self.negative_prompt else {}),
            **({"guidance_norm": str(self.guidance_norm)} if self.guidance_norm else {}),
        }

    def _by_teacher(self, teacher: Teacher, prompts: list[str], seed: int) -> Tensor:
        """`pictures` of the teacher, from the cache if they are there. The processes of a sharded base draw together or
        not at all, whatever is on each one's disk: theirs are only remembered.
        """

        def draw() -> Tensor:
            return self.pictures(teacher, prompts, seed)

        if seed not in self._teacher_pictures:
            identity = {**self._identity, "teacher": dict(teacher.identity), "prompts": prompts, "seed": seed}
            here = self._root / "pictures"
            self._teacher_pictures[seed] = draw() if self._memory.shard else cached_pictures(here, identity, draw)
        return self._teacher_pictures[seed]

    def preview(self, student: Sample, teacher: Teacher, critic: Sample) -> Preview:
        """Teacher above student above critic's prediction: the same prompts and noise, ``SEEDS`` pictures a prompt."""
        labels = [prompt for prompt in self.prompts[:PREVIEWS] for _ in range(SEEDS)]
        reference = self._by_teacher(teacher, labels, 0)
        pictures, idea = (self.pictures(sampler, labels, 0) for sampler in (student, critic))
        rows = [[Image.fromarray(p.permute(1, 2, 0).numpy()) for p in row] for row in (reference, pictures, idea)]
        sheet = contact_sheet(rows, ["teacher", "student", "critic's\nidea"], labels)
        return Preview(sheet, picture_ratios(*(p.unflatten(0, (-1, SEEDS)) for p in (pictures, reference))))

    def show(self, sampler: Sample) -> Image.Image:
        """The first of the run's prompts in a row, held-out ones where there are some."""
        prompts = (self._held_out or self.prompts)[:SHOWN]
        return Image.fromarray(torch.cat(list(self.pictures(sampler, prompts, 3)), 2).permute(1, 2, 0).numpy())

    @property
    def measure(self) -> Metric | None:
        """Accuracy, which only the bundled world can tell."""
        return Metric("accuracy", higher_is_better=True) if self._wanted else None

    def evaluate(self, student: Sample, teacher: Teacher) -> dict[str, float]:
        """Accuracy on held-out combinations, and colours and sharpness over the teacher's. With more than `DIMENSIONS`
        prompts, the Frechet distance to its pictures, too (`picture_frechet`). Nothing without the bundled world.
        """
        if not self._wanted:
            return {}
        prompts, wanted = self._held_out, self._wanted
        reference = self._by_teacher(teacher, prompts, 1)
        pictures = reference if student is teacher else self.pictures(student, prompts, 1)
        accuracy = {"accuracy": _accuracy(pictures, wanted), "teacher_accuracy": _accuracy(reference, wanted)}
        far = {"frechet": picture_frechet(pictures, reference)} if len(prompts) > DIMENSIONS else {}
        looks = colour_ratios(pictures, reference) | {"sharpness": power_ratios(pictures, reference)["sharpness"]}
        return accuracy | far | looks | self._diversity(student, teacher)

    def _diversity(self, student: Sample, teacher: Teacher) -> dict[str, float]:
        """The variety of pictures of one prompt over the teacher's; nothing if it is not asked for."""
        n = min(self.config.diversity, len(self._held_out))
        if n == 0:
            return {}
        labels = [prompt for prompt in self._held_out[:n] for _ in range(REPEATS)]
        reference = self._by_teacher(teacher, labels, 2)
        pictures = reference if student is teacher else self.pictures(student, labels, 2)
        ratio = diversity(pictures.unflatten(0, (n, REPEATS))) / diversity(reference.unflatten(0, (n, REPEATS)))
        return {"diversity": ratio}


def encode_prompts(
    base: BaseModel, prompts: list[str], root: Path, device: torch.device, report: Report, negative_prompt: str = ""
) -> PromptCache:
    """The cache of these prompts in ``root``, built now if it is not there or not whole."""
    dtype = encoder_dtype(device)
    cache = PromptCache(root, base.encoder_identity(dtype), prompts, negative_prompt)

    build_cache(cache, lambda: base.encoders(device, dtype, negative_prompt), report)
    if cache.cut:
        limit = f"{cache.cut:,} of {len(cache.prompts):,} prompts are longer than the {cache.limit} tokens"
        report(f"note: {limit} that the text encoder reads, and are cut there")
    return cache


def _accuracy(pictures: Tensor, wanted: list[Scene]) -> float:
    return sum(verdict.correct for verdict in verify(pictures, wanted)) / len(wanted)
