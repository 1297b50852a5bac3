"""Folders of full-size bases that hold configs only, as published: what `tdm estimate` reads, in a few kilobytes."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import torch
from tdm.bench.models import MODELS
from tdm.pipelines.families import family_of_name
from tdm.pipelines.loras.released import released

FLUX_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 16,
}


def outline_folder(name: str, folder: Path) -> Path:
    """The base of a family at full size, without weights, tokenizers and text encoders."""
    family = family_of_name(name)
    model = MODELS.get(name)
    with torch.device("meta"):
        denoiser = model.denoiser() if model else released(name)
        vae = model.autoencoder() if model else diffusers.AutoencoderKL(**FLUX_VAE)
    stock = model.scheduler if model else "FlowMatchEulerDiscreteScheduler"
    scheduler = getattr(diffusers, stock)(**(model.schedule if model else {"shift": 3.0}))
    components = {family.denoiser: denoiser, "vae": vae, "scheduler": scheduler}
    for part, network in components.items():
        network.save_config(folder / part)
    index = {part: ["diffusers", type(network).__name__] for part, network in components.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": family.pipeline, **index}))
    return folder
