"""Our nodes in ComfyUI's real sampling path against `TDMScheduler` in diffusers: the same network, the same noise."""

from __future__ import annotations

import re

import pytest
import torch
from tdm import TDMScheduler
from torch import Tensor

from .graphs import SEED, node, student_graph
from .networks_pack.network import network
from .server import PromptError, Server

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCALE = 0.18215  # of SD1.5's latents: ComfyUI saves latents as its VAE takes them
GRIDS = ([999, 749, 499, 249], [899, 674, 449, 224], [999, 856, 665, 399])
SHAPE = (2, 4, 8, 8)


def shifted(shift: float) -> list[float]:
    return [1000 * shift * s / (1 + (shift - 1) * s) for s in (1, 0.75, 0.5, 0.25)]


CASES = [
    *((kind, grid, 1.0) for kind in ("epsilon", "v_prediction", "flow_prediction") for grid in GRIDS),
    *(("flow_prediction", shifted(shift), shift) for shift in (1.0, 3.0, 6.0)),
]


def scheduler(kind: str, grid: list[float], order: int = 1) -> TDMScheduler:
    config = {} if kind == "flow_prediction" else SD
    result = TDMScheduler(prediction_type=kind, trained_timesteps=grid, solver_order=order, **config)
    result.set_timesteps(len(grid))
    return result


def noise(shape: tuple[int, ...] = SHAPE, seed: int = SEED) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def diffused(scheduler: TDMScheduler, x: Tensor, context: float = 0.0, first: int = 0) -> tuple[Tensor, list[Tensor]]:
    """What diffusers samples from x, and every clean sample that it predicts on the way."""
    clean = []
    scheduler.set_begin_index(first)
    for t in scheduler.timesteps[first:]:
        x, x0 = scheduler.step(network(x, t, context), t, x, return_dict=False)
        clean.append(x0)
    return x, clean


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("kind", "grid", "shift"), CASES)
def test_the_nodes_sample_what_diffusers_samples(
    server: Server, kind: str, grid: list[float], shift: float, order: int
) -> None:
    expected, _ = diffused(scheduler(kind, grid, order), noise())
    (actual,) = server.latents(student_graph(kind, shift=shift, timesteps=grid, order=order), ["samples", 0])
    assert error(actual * SCALE, expected) <= 1e-5


@pytest.mark.parametrize(
    "text",
    [
        "[999, 749, 499, 249]",
        "999\uff0c749\uff0c499\uff0c249",
        "\uff19\uff19\uff19 749;499\n249",
        "999\u3001749\u3001499\u3001249",
    ],
)
def test_timesteps_are_read_as_people_type_them(server: Server, text: str) -> None:
    graph = student_graph("epsilon", timesteps=GRIDS[0])
    (expected,) = server.latents(graph, ["samples", 0])
    graph["sigmas"]["inputs"]["timesteps"] = text
    (actual,) = server.latents(graph, ["samples", 0])
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_model_that_core_has_patched_is_followed(server: Server, grid: list[float], order: int) -> None:
    """A v-prediction fine-tune whose schedule ends in pure noise, declared as users declare it."""
    graph = student_graph("epsilon", timesteps=grid, order=order)
    graph["v"] = node("ModelSamplingDiscrete", model=["model", 0], sampling="v_prediction", zsnr=True)
    graph["sigmas"]["inputs"]["model"] = ["v", 0]
    (actual,) = server.latents(graph, ["samples", 0])
    reference = TDMScheduler.from_config(scheduler("v_prediction", grid, order).config, rescale_betas_zero_snr=True)
    reference.set_timesteps(4)
    expected, _ = diffused(reference, noise())
    assert error(actual * SCALE, expected) <= 1e-5


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow_prediction"])
def test_a_schedule_in_two_samplers_is_the_schedule(server: Server, kind: str, order: int) -> None:
    """Artists split a schedule to change the model or the prompt. Order 2 begins anew in the second sampler."""
    grid = [999, 899, 749, 499, 249]
    graph = student_graph(kind, timesteps=grid, order=order)
    whole = graph["samples"]["inputs"]
    graph["parts"] = node("SplitSigmas", sigmas=["sigmas", 1], step=3)
    graph["first"] = node("SamplerCustomAdvanced", **{**whole, "sigmas": ["parts", 0]})
    graph["none"] = node("DisableNoise")
    second = {**whole, "sigmas": ["parts", 1], "noise": ["none", 0], "latent_image": ["first", 0]}
    graph["samples"] = node("SamplerCustomAdvanced", **second)
    (actual,) = server.latents(graph, ["samples", 0])

    reference = scheduler(kind, grid, order)
    x = noise()
    for t in reference.timesteps[:3]:
        x = reference.step(network(x, t), t, x).prev_sample
    reference.set_timesteps(5)
    expected, _ = diffused(reference, x, first=3)
    assert error(actual * SCALE, expected) <= 1e-5


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize(("denoise", "first"), [(0.9, 0), (0.8, 1), (0.5, 2), (0.2, 3)])
def test_denoise_begins_at_the_nearest_trained_timestep(server: Server, kind: str, denoise: float, first: int) -> None:
    """Image to image: the picture is noised to that timestep, and only the steps after it are taken."""
    grid = [899, 749, 499, 249]
    picture = student_graph(kind, timesteps=grid, seed=3)
    kept = {f"picture {name}": each for name, each in picture.items() if name != "model"}
    for each in kept.values():
        links = {k: v for k, v in each["inputs"].items() if isinstance(v, list) and v[0] != "model"}
        each["inputs"] |= {k: [f"picture {v[0]}", v[1]] for k, v in links.items()}
    graph = student_graph(kind, timesteps=grid, order=2, denoise=denoise, latent=["picture samples", 0])
    actual, start = server.latents({**kept, **graph}, ["samples", 0], ["picture samples", 0])

    reference = scheduler(kind, grid, 2)
    x = reference.add_noise(start * SCALE, noise(), reference.timesteps[first : first + 1])
    expected, clean = diffused(reference, x, first=first)
    assert len(clean) == 4 - first
    assert error(actual * SCALE, expected) <= 1e-5


def test_the_simple_custom_sampler_gives_the_same(server: Server) -> None:
    graph = student_graph("epsilon", timesteps=GRIDS[1], order=2)
    inputs = {"model": ["sigmas", 0], "positive": ["model", 1], "negative": ["model", 1], "latent_image": ["latent", 0]}
    levels = {"sampler": ["sampler", 0], "sigmas": ["sigmas", 1]}
    graph["simple"] = node("SamplerCustom", add_noise=True, noise_seed=SEED, cfg=1.0, **inputs, **levels)
    advanced, simple = server.latents(graph, ["samples", 0], ["simple", 0])
    assert torch.equal(advanced, simple)


@pytest.mark.parametrize("kind", ["epsilon", "flow_prediction"])
def test_what_a_mask_leaves_out_stays_as_it_was(server: Server, kind: str) -> None:
    """Inpaint the left half only."""
    picture = student_graph(kind, timesteps=GRIDS[0])
    (before,) = server.latents(picture, ["samples", 0])
    graph = student_graph(kind, timesteps=GRIDS[1], order=2, latent=["masked", 0], seed=3)
    graph["first"] = {**picture["samples"], "inputs": {**picture["samples"]["inputs"], "noise": ["first noise", 0]}}
    graph["first noise"], graph["first sigmas"] = picture["noise"], picture["sigmas"]
    graph["first guider"] = node("BasicGuider", model=["first sigmas", 0], conditioning=["model", 1])
    graph["first sampler"] = picture["sampler"]
    firsts = {"sigmas": ["first sigmas", 1], "guider": ["first guider", 0], "sampler": ["first sampler", 0]}
    graph["first"]["inputs"] |= firsts
    graph["left"] = node("SolidMask", value=1.0, width=32, height=64)
    graph["all"] = node("SolidMask", value=0.0, width=64, height=64)
    graph["mask"] = node("MaskComposite", destination=["all", 0], source=["left", 0], x=0, y=0, operation="add")
    graph["masked"] = node("SetLatentNoiseMask", samples=["first", 0], mask=["mask", 0])
    (after,) = server.latents(graph, ["samples", 0])
    torch.testing.assert_close(after[..., 4:], before[..., 4:])
    assert error(after[..., :4], before[..., :4]) > 0.1


@pytest.mark.parametrize("kind", ["epsilon", "flow_prediction"])
def test_guidance_is_applied_to_what_the_sampler_sees(server: Server, kind: str) -> None:
    graph = student_graph(kind, timesteps=GRIDS[0], order=2, context=0.3)
    graph["other"] = node("TestModel", kind=kind, shift=1.0, context=-0.2, seconds=0.0)
    prompts = {"positive": ["model", 1], "negative": ["other", 1]}
    graph["guider"] = node("CFGGuider", model=["sigmas", 0], cfg=2.5, **prompts)
    (latents,) = server.latents(graph, ["samples", 0])

    reference, x = scheduler(kind, GRIDS[0], 2), noise()
    for t in reference.timesteps:
        with_prompt, without = network(x, t, 0.3), network(x, t, -0.2)
        x = reference.step(without + 2.5 * (with_prompt - without), t, x).prev_sample
    assert error(latents * SCALE, x) <= 1e-5


def test_the_levels_are_those_of_the_timesteps(server: Server) -> None:
    """Read the timesteps from the sigmas, as a user does. `steps` takes every second one, `denoise` the end."""

    def sigmas(**options: object) -> list[float]:
        graph = student_graph("flow_prediction", timesteps=[950, 700, 450, 200], **options)  # type: ignore[arg-type]
        graph["show"] = node("TestSigmas", sigmas=["sigmas", 1])
        return server.run(graph).outputs["show"]["sigmas"]

    assert sigmas() == pytest.approx([0.95, 0.7, 0.45, 0.2, 0], abs=1e-7)
    assert sigmas(steps=2) == pytest.approx([0.95, 0.45, 0], abs=1e-7)
    assert sigmas(denoise=0.5) == pytest.approx([0.45, 0.2, 0], abs=1e-7)


def test_the_callback_gets_the_clean_sample(server: Server) -> None:
    """Previews show the clean sample. The second output of SamplerCustomAdvanced is the last one of them."""
    graph = student_graph("epsilon", timesteps=GRIDS[0])
    graph["part"] = node("SplitSigmas", sigmas=["sigmas", 1], step=2)
    graph["samples"]["inputs"]["sigmas"] = ["part", 0]
    (denoised,) = server.latents(graph, ["samples", 1])
    _, clean = diffused(scheduler("epsilon", GRIDS[0]), noise())
    assert error(denoised * SCALE, clean[1]) <= 1e-5


def test_each_step_sends_its_progress_and_a_preview(server: Server) -> None:
    graph = student_graph("epsilon", timesteps=GRIDS[0], seed=100)  # or the server would have it already
    graph["end"] = node("SaveLatent", samples=["samples", 0], filename_prefix="steps")
    run = server.run(graph)
    assert [e["data"]["value"] for e in run.events if e["type"] == "progress"] == [1, 2, 3, 4]
    assert run.previews >= 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": [249, 499]}, "must strictly decrease"),
        ({"timesteps": [1000, 500]}, "timesteps must lie in [0, 999]"),
        ({"timesteps": []}, "at least one entry"),
        ({"timesteps": [981.5, 733.25]}, "are whole numbers"),  # core would round them, and diffusers would not
        ({"timesteps": ["many"]}, "must be numbers with commas"),
        ({"student": "Luo-Yihong/TDM_sd3_lora"}, "which predicts flow_prediction; this model predicts epsilon"),
    ],
)
def test_a_wrong_input_says_what_to_do(server: Server, options: dict[str, object], message: str) -> None:
    graph = student_graph("epsilon", **options)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match=re.escape(message)):
        server.latents(graph, ["samples", 0])
    assert server.latents(student_graph("epsilon", timesteps=GRIDS[0]), ["samples", 0])  # the server goes on


@pytest.mark.parametrize(
    ("kind", "message"),
    [("edm", "this model samples with ModelSamplingContinuousEDM"), ("cogvideox", "TDM CogVideoX Sampling")],
)
def test_a_model_that_no_student_can_have_is_refused(server: Server, kind: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        server.latents(student_graph(kind, timesteps=GRIDS[0]), ["samples", 0])


def test_a_schedule_of_lcm_is_refused(server: Server) -> None:
    graph = student_graph("epsilon", timesteps=[40, 30, 20, 10])
    graph["lcm"] = node("ModelSamplingDiscrete", model=["model", 0], sampling="lcm", zsnr=False)
    graph["sigmas"]["inputs"]["model"] = ["lcm", 0]
    with pytest.raises(PromptError, match=r"ModelSamplingDiscrete is set to lcm.*remove it before TDM Sigmas"):
        server.latents(graph, ["samples", 0])


def test_an_epsilon_model_that_would_begin_in_pure_noise_is_refused(server: Server) -> None:
    graph = student_graph("epsilon", timesteps=GRIDS[0])
    graph["zero"] = node("ModelSamplingDiscrete", model=["model", 0], sampling="eps", zsnr=True)
    graph["sigmas"]["inputs"]["model"] = ["zero", 0]
    with pytest.raises(PromptError, match="set zsnr only for v_prediction"):
        server.latents(graph, ["samples", 0])


@pytest.mark.parametrize("kind", ["epsilon", "flow_prediction"])
def test_a_schedule_that_lost_its_cut_is_an_error(server: Server, kind: str) -> None:
    """With a sampling patch after TDM Sigmas, or the MODEL from before it, the first noise would be too small."""
    patch = {"epsilon": "ModelSamplingDiscrete", "flow_prediction": "ModelSamplingSD3"}[kind]
    options = {"epsilon": {"sampling": "eps", "zsnr": False}, "flow_prediction": {"shift": 3.0}}[kind]
    graph = student_graph(kind, timesteps=GRIDS[1])
    graph["patch"] = node(patch, model=["sigmas", 0], **options)
    for link in (["patch", 0], ["model", 0]):
        graph["guider"]["inputs"]["model"] = link
        with pytest.raises(PromptError, match="sample the MODEL that TDM Sigmas gives, with no ModelSampling"):
            server.latents(graph, ["samples", 0])
    graph["guider"]["inputs"]["model"] = ["sigmas", 0]
    graph["sigmas"]["inputs"]["model"] = ["patch", 0]
    graph["patch"]["inputs"]["model"] = ["model", 0]
    (actual,) = server.latents(graph, ["samples", 0])  # the right order
    expected, _ = diffused(scheduler(kind, GRIDS[1]), noise())
    assert error(actual * SCALE, expected) <= 1e-5
