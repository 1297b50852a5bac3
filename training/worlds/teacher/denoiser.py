"""Train the bundled text encoder and denoiser: T5 and PixArt transformer, flow matching, on the Stickers world.

    python -m tdm.training.worlds.teacher.denoiser --out runs/teacher

Needs ``runs/teacher/vae`` (see :mod:`.vae`). Stopped at any moment, the same command goes on from the last
checkpoint. The rate is constant and falls to zero over the last 30 % of ``--steps``; until then ``--steps`` may be
changed. Ends with a complete diffusers pipeline in ``runs/teacher/pipeline``. ``--start-from bundled/teacher`` begins
with the weights of a finished pipeline instead of random ones, and with its VAE unless there is a ``runs/teacher/vae``,
which must then have the same latents. A teacher fine-tuned to another style of drawing:

    python -m tdm.training.worlds.teacher.denoiser --out runs/postcard --start-from bundled/teacher --style postcard \\
        --steps 160 --batch 24 --shards 1 --rate 0.01
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from ....files import save_tensors, whole_folder
from ...precision import Precision, autocast
from ..stickers.captions import caption, vocabulary
from ..stickers.draw import STYLES, Style
from ..stickers.scene import Scene
from .data import pictures, to_model

MAX_TOKENS = 24
SHARD = 4096
DROP_CAPTION = 0.1  # share of empty captions, which is what guidance needs
EMA_DECAY = 0.999


def build_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("\u2581", -8.0), (",", -4.0)]
    pieces += [("\u2581" + word, -4.0) for word in vocabulary()]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_TOKENS)


def build_text_encoder(vocab_size: int) -> Any:
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=vocab_size, d_model=128, d_kv=32, d_ff=256, num_layers=3, num_heads=4,
            feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    start_local(encoder)
    return encoder


@torch.no_grad()
def start_local(encoder: Any, strength: float = 4.0) -> None:
    """Start a T5 encoder as the identity on words of unit scale, its heads looking at neighbouring words.

    T5 has no notion of order but its relative bias, which starts near 0, and does not scale its attention logits: with
    larger weights they saturate, whatever the bias says. Both together leave a bag of words: measured, after 2,500
    updates with Muon on its matrices, pictures had the right words on the wrong stickers. Hence small initial
    weights, residual branches that start at 0, AdamW, and heads on the previous word, the next one, the one before the
    previous, and all that follows. In the bias (32, heads), bucket d is the d-th word before, 16 + d the d-th after.
    """
    torch.nn.init.normal_(encoder.shared.weight)
    for block in encoder.encoder.block:
        torch.nn.init.zeros_(block.layer[0].SelfAttention.o.weight)
        torch.nn.init.zeros_(block.layer[1].DenseReluDense.wo.weight)
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    bias[1, 0] += strength
    bias[17, 1] += strength
    bias[2, 2] += strength
    bias[17:, 3] += strength


def build_denoiser(latent_channels: int) -> Any:
    return PixArtTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=6,
        cross_attention_dim=192,
        sample_size=8,
        patch_size=1,
        caption_channels=128,
        norm_num_groups=8,
    )


class Model(nn.Module):
    """Text encoder and denoiser, trained as one; predicts the flow velocity epsilon - x0."""

    def __init__(self, text_encoder: Any, denoiser: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.denoiser = denoiser

    def forward(self, x: Tensor, timestep: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        text = self.text_encoder(tokens, attention_mask=mask)[0]
        return self.denoiser(
            x,
            encoder_hidden_states=text,
            timestep=timestep,
            encoder_attention_mask=mask,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample


class LatentStream:
    """Endless (latents, captions): drawn and encoded shard by shard on the first pass, kept in memory after it."""

    def __init__(self, vae: Any, shards: int, seed: int, style: Style = "sticker") -> None:
        self.vae, self.shards, self.seed, self.style = vae, shards, seed, style
        self.kept: dict[int, tuple[Tensor, list[Scene]]] = {}

    @torch.no_grad()
    def shard(self, index: int) -> tuple[Tensor, list[Scene]]:
        if index not in self.kept:
            drawn, _, scenes = pictures(SHARD, 1000 * self.seed + index, style=self.style)
            latents = []
            for part in drawn.split(128):
                with autocast("bf16"):
                    mean = self.vae.encode(to_model(part)).latent_dist.mean
                latents.append((mean.float() * self.vae.config.scaling_factor).half())
            self.kept[index] = (torch.cat(latents), scenes)
        return self.kept[index]

    def batch(self, step: int, size: int) -> tuple[Tensor, list[str]]:
        """The batch of ``step``: a function of seed and step alone, so that a resumed run sees the same data."""
        steps_per_shard = SHARD // size
        latents, scenes = self.shard((step // steps_per_shard) % self.shards)
        order = torch.randperm(SHARD, generator=torch.Generator().manual_seed(self.seed + step // steps_per_shard))
        index = order[(step % steps_per_shard) * size :][:size]
        rng = random.Random(f"captions-{self.seed}-{step}")
        texts = ["" if rng.random() < DROP_CAPTION else caption(scenes[i], rng) for i in index.tolist()]
        return latents[index].float(), texts


def build_optimisers(model: Model, rate: float) -> list[torch.optim.Optimizer]:
    """Muon on the matrices of the denoiser's blocks (measured far better than AdamW alone at this size), AdamW on the
    rest: a tenth of the rate in the denoiser, a twentieth in the text encoder (see :func:`start_local`).
    """
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in model.denoiser.named_parameters():
        in_block = name.startswith("transformer_blocks.") and name.endswith(".weight") and p.ndim == 2
        (matrices if in_block else rest).append(p)
    text = {"params": list(model.text_encoder.parameters()), "lr": rate / 20}
    return [
        torch.optim.Muon(matrices, lr=rate, momentum=0.95, weight_decay=0.005, adjust_lr_fn="original"),
        torch.optim.AdamW([{"params": rest, "lr": rate / 10}, text], betas=(0.9, 0.99), weight_decay=0.0),
    ]


def rate_factor(step: int, steps: int) -> float:
    """Warm-up over 100 steps, constant, then linearly to zero over the last 30 %."""
    return min(1.0, (step + 1) / 100, max(0.0, (steps - step) / (0.3 * steps)))


def save_pipeline(folder: Path, model: Model, vae: Any, tokenizer: T5Tokenizer, dtype: torch.dtype) -> None:
    """A complete diffusers pipeline: it loads and samples with stock diffusers alone."""
    pipe: Any = PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=copy.deepcopy(model.text_encoder).to(dtype),
        vae=copy.deepcopy(vae).to(dtype),
        transformer=copy.deepcopy(model.denoiser).to(dtype),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, solver_order=2
        ),
    )
    with whole_folder(folder, force=True) as unfinished:
        pipe.save_pretrained(unfinished)


@dataclass(frozen=True)
class TeacherConfig:
    """How a teacher is trained.

    Attributes:
        out: folder of the run, with ``vae``, ``denoiser.pt`` and at the end ``pipeline``.
        steps: updates in all.
        batch: pictures per update.
        rate: learning rate of Muon; AdamW takes a tenth, the text encoder a twentieth.
        shards: pictures to draw, in shards of `SHARD`.
        seed: of all randomness.
        start_from: folder of a finished pipeline to begin with; None begins with random weights.
        style: of the pictures that it learns to draw.
        precision: of the network's own arithmetic.
    """

    out: Path
    steps: int = 7000
    batch: int = 96
    rate: float = 0.02
    shards: int = 30
    seed: int = 0
    start_from: Path | None = None
    style: Style = "sticker"
    precision: Precision = "bf16"


class Trainer:
    """A teacher while it is trained: model, running mean, optimisers and noise; continued from its last checkpoint."""

    def __init__(self, config: TeacherConfig) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        with_vae = config.out if config.start_from is None or (config.out / "vae").exists() else config.start_from
        self.vae: Any = AutoencoderKL.from_pretrained(with_vae / "vae").eval().requires_grad_(False)
        config.out.mkdir(parents=True, exist_ok=True)
        self.tokenizer = build_tokenizer()
        if config.start_from is None:
            text_encoder = build_text_encoder(len(self.tokenizer))
            self.model = Model(text_encoder, build_denoiser(self.vae.config.latent_channels))
        else:
            pipe: Any = PixArtAlphaPipeline.from_pretrained(config.start_from, dtype=torch.float32, vae=None)
            self.model = Model(pipe.text_encoder, pipe.transformer)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimisers = build_optimisers(self.model, config.rate)
        for group in self._groups():
            group["full_lr"] = group["lr"]
        self.noise = torch.Generator().manual_seed(config.seed)
        self.checkpoint, self.step, self.seconds = config.out / "denoiser.pt", 0, 0.0
        if self.checkpoint.exists():
            self._resume()

    def _groups(self) -> Iterator[dict[str, Any]]:
        return (group for optimiser in self.optimisers for group in optimiser.param_groups)

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.noise.set_state(state["noise"])
        self.step, self.seconds = state["step"], state["seconds"]
        print(f"resumed at step {self.step}", flush=True)

    def save(self) -> None:
        """Write the checkpoint and, with the mean weights, the pipeline."""
        state = {"model": self.model.state_dict(), "ema": self.ema.state_dict(), "noise": self.noise.get_state(),
                 "step": self.step, "seconds": self.seconds,
                 "optimisers": [o.state_dict() for o in self.optimisers]}  # fmt: skip
        save_tensors(state, self.checkpoint)
        save_pipeline(self.config.out / "pipeline", self.ema, self.vae, self.tokenizer, torch.float32)

    def update(self, x0: Tensor, texts: list[str]) -> float:
        """One update on latents ``x0`` ``[B, C, H, W]`` and their captions; returns the loss."""
        encoded = self.tokenizer(
            texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        )
        # Logit-normal noise levels leaning to the noisy side, where the composition is decided.
        sigma = torch.sigmoid(0.4 + 1.2 * torch.randn(len(x0), generator=self.noise))
        epsilon = torch.randn(x0.shape, generator=self.noise)
        s = sigma.view(-1, 1, 1, 1)
        with autocast(self.config.precision):
            velocity = self.model((1 - s) * x0 + s * epsilon, 1000 * sigma, encoded.input_ids, encoded.attention_mask)
        loss = (velocity.float() - (epsilon - x0)).square().mean()
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        factor = rate_factor(self.step, self.config.steps)
        for group in self._groups():
            group["lr"] = group["full_lr"] * factor
        for optimiser in self.optimisers:
            optimiser.step()
        with torch.no_grad():
            decay = min(EMA_DECAY, (self.step + 1) / (self.step + 10))
            torch._foreach_lerp_([*self.ema.parameters()], [*self.model.parameters()], 1 - decay)
        self.step += 1
        return loss.item()


def train(config: TeacherConfig) -> None:
    """Train a teacher, from its last checkpoint on if there is one, and write its pipeline and its record."""
    trainer = Trainer(config)
    stream = LatentStream(trainer.vae, config.shards, config.seed, config.style)
    count = sum(p.numel() for p in trainer.model.parameters())
    print(f"{count / 1e6:.2f} M parameters, vocabulary {len(trainer.tokenizer)}, {torch.get_num_threads()} threads",
          flush=True)  # fmt: skip
    running = 0.0
    while trainer.step < config.steps:
        begun = time.time()
        running += trainer.update(*stream.batch(trainer.step, config.batch))
        trainer.seconds += time.time() - begun
        if not running < float("inf"):
            raise SystemExit(f"loss is not finite at step {trainer.step - 1}; lower --rate")
        if trainer.step % 50 == 0:
            _print_progress(trainer, running / 50)
            running = 0.0
        if trainer.step % 250 == 0 or trainer.step == config.steps:
            trainer.save()
    _write_record(config, trainer.seconds)


def _print_progress(trainer: Trainer, loss: float) -> None:
    steps, pace = trainer.config.steps, trainer.seconds / trainer.step
    print(f"step {trainer.step}/{steps} loss {loss:.4f} {1000 * pace:.0f} ms/step {trainer.seconds / 60:.1f} min "
          f"eta {pace * (steps - trainer.step) / 60:.1f} min", flush=True)  # fmt: skip


def _write_record(config: TeacherConfig, seconds: float) -> None:
    """How the teacher was trained, and what it started from, for the bundle."""
    record: dict[str, Any] = {"updates": config.steps, "batch": config.batch, "seed": config.seed}
    record |= {"style": config.style, "minutes": round(seconds / 60, 1)}
    if config.start_from is not None and (before := config.start_from / "training.json").exists():
        record["started_from"] = json.loads(before.read_text(encoding="utf-8"))
    (config.out / "denoiser.json").write_text(json.dumps(record), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, TeacherConfig(Path())
    add("--out", type=Path, required=True)
    add("--steps", type=int, default=default.steps)
    add("--batch", type=int, default=default.batch)
    add("--rate", type=float, default=default.rate, help="of Muon; AdamW takes a tenth")
    add("--shards", type=int, default=default.shards, help="pictures to draw, in shards of 4096")
    add("--seed", type=int, default=default.seed)
    add("--start-from", type=Path, help="folder of a finished pipeline to begin with")
    add("--style", choices=tuple(STYLES), default=default.style, help="of the pictures it learns to draw")
    add("--precision", choices=("fp32", "bf16"), default=default.precision)
    train(TeacherConfig(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
