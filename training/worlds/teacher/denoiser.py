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


def train(
    out: Path,
    steps: int,
    batch: int,
    rate: float,
    shards: int,
    seed: int,
    precision: Precision,
    start_from: Path | None,
    style: Style,
) -> None:
    torch.manual_seed(seed)
    parts = out if start_from is None or (out / "vae").exists() else start_from
    vae: Any = AutoencoderKL.from_pretrained(parts / "vae").eval().requires_grad_(False)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    if start_from is None:
        model = Model(build_text_encoder(len(tokenizer)), build_denoiser(vae.config.latent_channels))
    else:
        pipe: Any = PixArtAlphaPipeline.from_pretrained(start_from, dtype=torch.float32, vae=None)
        model = Model(pipe.text_encoder, pipe.transformer)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimisers = build_optimisers(model, rate)
    for group in (group for optimiser in optimisers for group in optimiser.param_groups):
        group["full_lr"] = group["lr"]
    noise = torch.Generator().manual_seed(seed)
    checkpoint, first, seconds = out / "denoiser.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        noise.set_state(state["noise"])
        first, seconds = state["step"], state["seconds"]
        print(f"resumed at step {first}", flush=True)
    stream = LatentStream(vae, shards, seed, style)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.2f} M parameters, vocabulary {len(tokenizer)}, {torch.get_num_threads()} threads", flush=True)

    def save(step: int) -> None:
        state = {"model": model.state_dict(), "ema": ema.state_dict(), "noise": noise.get_state(), "step": step,
                 "seconds": seconds, "optimisers": [o.state_dict() for o in optimisers]}  # fmt: skip
        save_tensors(state, checkpoint)
        save_pipeline(out / "pipeline", ema, vae, tokenizer, torch.float32)

    running = 0.0
    for step in range(first, steps):
        begun = time.time()
        x0, texts = stream.batch(step, batch)
        encoded = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
        # Logit-normal noise levels leaning to the noisy side, where the composition is decided.
        sigma = torch.sigmoid(0.4 + 1.2 * torch.randn(batch, generator=noise))
        epsilon = torch.randn(x0.shape, generator=noise)
        s = sigma.view(-1, 1, 1, 1)
        with autocast(precision):
            velocity = model((1 - s) * x0 + s * epsilon, 1000 * sigma, encoded.input_ids, encoded.attention_mask)
        loss = (velocity.float() - (epsilon - x0)).square().mean()
        for optimiser in optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        factor = rate_factor(step, steps)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["full_lr"] * factor
            optimiser.step()
        with torch.no_grad():
            decay = min(EMA_DECAY, (step + 1) / (step + 10))
            torch._foreach_lerp_([*ema.parameters()], [*model.parameters()], 1 - decay)
        seconds += time.time() - begun
        running += loss.item()
        if not running < float("inf"):
            raise SystemExit(f"loss is not finite at step {step}; lower --rate")
        if (step + 1) % 50 == 0:
            pace = seconds / (step + 1)
            print(f"step {step + 1}/{steps} loss {running / 50:.4f} {1000 * pace:.0f} ms/step "
                  f"{seconds / 60:.1f} min eta {pace * (steps - step - 1) / 60:.1f} min", flush=True)  # fmt: skip
            running = 0.0
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save(step + 1)
    record: dict[str, Any] = {"updates": steps, "batch": batch, "seed": seed, "style": style}
    record["minutes"] = round(seconds / 60, 1)
    if start_from is not None and (before := start_from / "training.json").exists():
        record["started_from"] = json.loads(before.read_text())
    (out / "denoiser.json").write_text(json.dumps(record))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--rate", type=float, default=0.02, help="of Muon; AdamW takes a tenth")
    parser.add_argument("--shards", type=int, default=30, help="pictures to draw, in shards of 4096")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start-from", type=Path, help="folder of a finished pipeline to begin with")
    parser.add_argument("--style", choices=tuple(STYLES), default="sticker", help="of the pictures it learns to draw")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    args = parser.parse_args()
    train(
        args.out, args.steps, args.batch, args.rate, args.shards, args.seed, args.precision, args.start_from, args.style
    )


if __name__ == "__main__":
    main()
