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
from ..pipelines.locate import BUNDLED, base_folder, family_of_base
from ..pipelines.schedule import NoiseSchedule, PredictionType
from ..pipelines.scheduler import TDMScheduler
from ..pipelines.sheet import contact_sheet
from .loop import Sampler
from .metrics import colour_ratios
from .trajectory import Condition
from .world.captions import caption
from .world.scene import Scene, random_scene, scenes
from .world.verify import verify

STICKERS = "stickers"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
PREVIEWS = 8


@dataclass(frozen=True)
class PipelineTaskConfig:
    """The ``task`` section of a configuration that distils a pipeline."""

    name: str = "pipeline"
    model: str = BUNDLED  # folder or hub id of the base, or the bundled one
    prompts: str = STICKERS  # a text file with one prompt a line, or the grammar of the bundled world
    evaluate: int = 64  # held-out prompts per evaluation (the bundled world only)


class PipelineTask:
    """``loop.Task`` of a PixArt-layout pipeline (T5 text encoder, PixArt transformer, VAE).

    Args:
        config: which base and which prompts.
        device, dtype: of the frozen base.

    Raises:
        TDMError: an unsupported base, or a prompt file that is missing or empty.
    """

    targets: Sequence[str] | str = TARGETS
    latent_shape: tuple[int, ...]

    def __init__(self, config: PipelineTaskConfig, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.config = config
        folder = base_folder(config.model)
        self.family = family_of_base(folder)
        if self.family.name != "pixart":
            raise TDMError(f"a {self.family.name} base cannot be distilled yet; supported: pixart")
        self.pipe: Any = self.family.pipeline_class().from_pretrained(folder, dtype=dtype)
        self.pipe.to(device).set_progress_bar_config(disable=True)
        self.base: nn.Module = self.pipe.transformer
        for part in (self.pipe.vae, self.pipe.text_encoder):
            part.eval().requires_grad_(False)
        scheduler = TDMScheduler.from_config(self.pipe.scheduler.config)
        self.schedule: NoiseSchedule = scheduler.schedule
        self.prediction_type: PredictionType = scheduler.config.prediction_type
        sizes = self.pipe.transformer.config
        self.latent_shape = (sizes.in_channels, sizes.sample_size, sizes.sample_size)
        self.size = sizes.sample_size * self.pipe.vae_scale_factor
        self.draw_prompts = _prompt_source(config.prompts)
        self._teacher_pictures: dict[str, Tensor] = {}

    def call(self, base: nn.Module, x: Tensor, timesteps: Tensor, cond: Condition) -> Tensor:
        """See ``loop.Task``. A learned-variance head's second half is dropped, as in sampling."""
        output = base(
            x,
            encoder_hidden_states=cond["text"],
            encoder_attention_mask=cond["mask"],
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        return output.chunk(2, dim=1)[0] if output.shape[1] == 2 * x.shape[1] else output

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Condition:
        """Prompt embeddings ``text`` [B, L, D] and ``mask`` [B, L], as the pipeline itself makes them."""
        text, mask, _, _ = self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            clean_caption=False,
            max_sequence_length=self.pipe.tokenizer.model_max_length,
        )
        return {"text": text, "mask": mask}

    def conditions(self, n: int, generator: torch.Generator) -> Condition:
        """See ``loop.Task``."""
        seed = int(torch.randint(2**62, (), generator=generator))
        return self.encode(list(islice(self.draw_prompts(random.Random(seed)), n)))

    def null(self, cond: Condition) -> Condition:
        """The empty prompt."""
        empty = self.encode([""])
        return {key: value.expand(len(cond[key]), *value.shape[1:]) for key, value in empty.items()}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to uint8 pictures [B, 3, H, W] on the CPU."""
        vae = self.pipe.vae
        parts = [
            vae.decode((part / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0].float().cpu()
            for part in latents.split(32)
        ]
        return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

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
    path = Path(name)
    if not path.is_file():
        raise TDMError(f"no prompt file {name}; give a text file with one prompt a line, or {STICKERS!r}")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise TDMError(f"{name} holds no prompts")

    def from_file(rng: random.Random) -> Iterator[str]:
        while True:
            yield rng.choice(lines)

    return from_file
