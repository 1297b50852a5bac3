"""Prompts for the server, in the API's format."""

from __future__ import annotations

from typing import Any

from .server import Graph

SEED = 7


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def student_graph(
    kind: str, *, shift: float = 1.0, context: float = 0.0, seconds: float = 0.0, **options: Any
) -> Graph:
    """`sampling` of a test model."""
    model = node("TestModel", kind=kind, shift=shift, context=context, seconds=seconds)
    return {"model": model, **sampling(["model", 0], ["model", 1], **options)}


def sampling(
    model: list[Any],
    conditioning: list[Any],
    *,
    timesteps: list[float] | None = None,
    student: str = "timesteps below",
    latent: list[Any] | None = None,
    order: Any = 1,
    steps: int = 0,
    denoise: float = 1.0,
    seed: int = SEED,
) -> Graph:
    """TDM Sigmas and TDM Sampler in SamplerCustomAdvanced, which is node "samples", on an empty 64 x 64 latent."""
    text = ", ".join(map(str, timesteps or []))
    return {
        "sigmas": node("TDMSigmas", model=model, student=student, timesteps=text, steps=steps, denoise=denoise),
        "sampler": node("TDMSampler", order=order),
        "noise": node("RandomNoise", noise_seed=seed),
        "guider": node("BasicGuider", model=["sigmas", 0], conditioning=conditioning),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=2),
        "samples": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["sampler", 0],
            sigmas=["sigmas", 1],
            latent_image=latent or ["latent", 0],
        ),
    }
