"""Train the bundled VAE: 64x64 RGB to 8x8 latents of 16 channels (a diffusers ``AutoencoderKL``).

python -m tdm.training.worlds.teacher.vae --out runs/teacher                    encoder and decoder together
python -m tdm.training.worlds.teacher.vae --out runs/teacher --decoder-only     sharpen the decoder, latents unchanged
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from ....files import whole_folder
from .data import pictures, to_model

WIDTHS = (24, 48, 96, 128)
LATENT_CHANNELS = 16
KL_WEIGHT = 1e-3  # on the mean over latent elements: enough to keep latents smooth, too little to blur pictures
SHARD = 2048


def build_vae() -> Any:
    """An untrained ``AutoencoderKL``."""
    levels = len(WIDTHS)
    vae: Any = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        force_upcast=False,
    )
    with torch.no_grad():  # start almost without posterior noise, or it drowns the first small latents
        vae.quant_conv.bias[LATENT_CHANNELS:] = -5.0
    return vae


class KernelMuon:
    """Muon on convolution kernels seen as matrices (out, in * k * k), AdamW on everything else.

    ``torch.optim.Muon`` takes 2-D parameters only, so it is given views that share the kernels' memory.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rate: float) -> None:
        parameters = list(parameters)
        self.kernels = [p for p in parameters if p.ndim == 4 and min(p.shape[:2]) > 3]
        self.views = [nn.Parameter(p.data.view(p.shape[0], -1)) for p in self.kernels]
        held = {id(p) for p in self.kernels}
        self.rest = [p for p in parameters if id(p) not in held]
        self.muon = torch.optim.Muon(self.views, lr=rate, momentum=0.95, weight_decay=0.0, adjust_lr_fn="original")
        self.adamw = torch.optim.AdamW(self.rest, lr=rate / 10, betas=(0.9, 0.99), weight_decay=0.0)
        self.rate = rate

    def step(self, factor: float) -> None:
        """Apply and clear the gradients, at ``factor`` times the base rate."""
        for view, kernel in zip(self.views, self.kernels, strict=True):
            view.grad = None if kernel.grad is None else kernel.grad.view_as(view)
        for optimiser, rate in ((self.muon, self.rate), (self.adamw, self.rate / 10)):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
            optimiser.step()
        for p in (*self.kernels, *self.rest):
            p.grad = None


def _edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 and squared error on pixels [B, 3, H, W], and L1 on their differences so that edges count, too."""
    edges = torch.stack([F.l1_loss(a, b) for a, b in zip(_edges(output), _edges(target), strict=True)]).sum()
    return F.l1_loss(output, target) + 2 * F.mse_loss(output, target) + edges


@torch.no_grad()
def measure_latents(vae: Any, sample: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the latents of ``sample``, for shift_factor and scaling_factor."""
    z = torch.cat([vae.encode(to_model(part)).latent_dist.mean for part in sample.split(64)])
    return float(z.mean()), float(z.std())


def train(out: Path, steps: int, batch: int, rate: float, shards: int, decoder_only: bool, seed: int) -> None:
    torch.manual_seed(seed)
    folder = out / "vae"
    vae: Any = AutoencoderKL.from_pretrained(folder) if decoder_only else build_vae()
    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()] if decoder_only else [*vae.parameters()]
    optimiser = KernelMuon(trained, rate)
    start = time.time()
    first_seed = 50_000 * (1 + decoder_only) + seed
    data = torch.cat([pictures(SHARD, shard)[0] for shard in range(first_seed, first_seed + shards)])
    print(f"drew {len(data)} pictures in {time.time() - start:.0f} s", flush=True)
    start = time.time()
    for step in range(steps):
        # Most of the run sees crops of a quarter of the picture: four times the steps in the same time.
        side = 64 if step > 0.85 * steps else 32
        top, left = (int(torch.randint(0, 64 - side + 1, ())) for _ in range(2))
        chosen = data[torch.randint(len(data), (batch,))]
        x = to_model(chosen[..., top : top + side, left : left + side])
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(not decoder_only):
                posterior = vae.encode(x).latent_dist
                z = posterior.mean + torch.randn_like(posterior.mean) * (0.05 if decoder_only else posterior.std)
            output = vae.decode(z).sample
        loss = reconstruction_loss(output.float(), x)
        if not decoder_only:
            loss = loss + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        loss.backward()
        optimiser.step(min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps)))
        if step % 100 == 0 or step == steps - 1:
            error = F.mse_loss(output.float(), x).item()
            eta = (time.time() - start) / (step + 1) * (steps - step - 1)
            psnr = 10 * math.log10(4 / error)
            print(f"step {step} loss {loss.item():.4f} psnr {psnr:.2f} eta {eta:.0f} s", flush=True)
        if (step % 250 == 249 or step == steps - 1) and not decoder_only:
            mean, std = measure_latents(vae, data[:1024])
            vae.register_to_config(scaling_factor=1.0 / std, shift_factor=None)
            print(f"latent mean {mean:.3f} std {std:.3f}", flush=True)
        if step % 250 == 249 or step == steps - 1:
            with whole_folder(folder, force=True) as unfinished:
                vae.save_pretrained(unfinished)
    record = {"updates": steps, "batch": batch, "seed": seed, "minutes": round((time.time() - start) / 60, 1)}
    (out / f"vae{'-decoder' if decoder_only else ''}.json").write_text(json.dumps(record), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=0.02, help="of Muon; AdamW takes a tenth")
    parser.add_argument("--shards", type=int, default=14, help="pictures to draw, in shards of 2048")
    parser.add_argument("--decoder-only", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train(args.out, args.steps, args.batch, args.rate, args.shards, args.decoder_only, args.seed)


if __name__ == "__main__":
    main()
