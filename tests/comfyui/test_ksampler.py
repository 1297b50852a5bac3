"""Core's own sampling nodes and samplers: where they run a student exactly, against `TDMScheduler` in diffusers."""

from __future__ import annotations

from typing import Any

import pytest
from tdm.pipelines.students.released import PRESETS

from .graphs import SEED, node, student_graph
from .server import Graph, Server
from .test_sampling import GRIDS, SCALE, diffused, error, noise, scheduler

# The kind of model, its shift, a student's grid and order, and what to choose in KSampler. The grid of the released
# TDM-R1 for Z-Image is the third, that of the bundled student the second.
EXACT = [
    ("flow_prediction", 1.0, [1000, 750, 500, 250], 1, "euler"),
    ("flow_prediction", 2.0, [1000, 6000 / 7, 2000 / 3, 400], 1, "euler"),
    ("flow_prediction", 3.0, [1000, 900, 750, 500], 1, "euler"),
    *((kind, 1.0, GRIDS[0], 1, "euler") for kind in ("epsilon", "v_prediction")),
    *((kind, 1.0, GRIDS[0], 2, "dpmpp_2m") for kind in ("epsilon", "v_prediction")),
]


def k_sampler(graph: Graph, sampler: str, scheduler: str = "simple", **options: Any) -> Graph:
    """The same workflow with KSampler, which has no use for our SIGMAS and SAMPLER."""
    prompts = {"positive": ["model", 1], "negative": ["model", 1], "latent_image": ["latent", 0]}
    levels = {"sampler_name": sampler, "scheduler": scheduler, "steps": 4, "cfg": 1.0, "denoise": 1.0, "seed": SEED}
    return {**graph, "samples": node("KSampler", **{"model": ["model", 0], **prompts, **levels, **options})}


@pytest.mark.parametrize(("kind", "shift", "grid", "order", "sampler"), EXACT)
def test_ksampler_is_exact_where_its_steps_are_the_trained_ones(
    server: Server, kind: str, shift: float, grid: list[float], order: int, sampler: str
) -> None:
    graph = k_sampler(student_graph(kind, shift=shift), sampler)
    inputs = graph["samples"]["inputs"]
    options = {"add_noise": True, "noise_seed": SEED, "cfg": 1.0}
    graph["name"] = node("KSamplerSelect", sampler_name=sampler)
    graph["levels"] = node("BasicScheduler", model=["model", 0], scheduler="simple", steps=4, denoise=1.0)
    links = {name: inputs[name] for name in ("model", "positive", "negative", "latent_image")}
    graph["custom"] = node("SamplerCustom", sampler=["name", 0], sigmas=["levels", 0], **options, **links)
    expected, _ = diffused(scheduler(kind, grid, order), noise())
    for actual in server.latents(graph, ["samples", 0], ["custom", 0]):
        assert error(actual * SCALE, expected) <= 1e-5


@pytest.mark.parametrize(("kind", "shift", "grid", "order", "sampler"), [each for each in EXACT if each[3] == 1])
def test_ksampler_advanced_takes_a_part_of_the_steps(
    server: Server, kind: str, shift: float, grid: list[float], order: int, sampler: str
) -> None:
    graph = k_sampler(student_graph(kind, shift=shift), sampler)
    inputs = {k: v for k, v in graph["samples"]["inputs"].items() if k not in ("seed", "denoise")}
    whole = {**inputs, "noise_seed": SEED}
    first = {"add_noise": "enable", "start_at_step": 0, "end_at_step": 3, "return_with_leftover_noise": "enable"}
    last = {"add_noise": "disable", "start_at_step": 3, "end_at_step": 4, "return_with_leftover_noise": "disable"}
    graph["first"] = node("KSamplerAdvanced", **whole, **first)
    graph["samples"] = node("KSamplerAdvanced", **{**whole, "latent_image": ["first", 0]}, **last)
    (actual,) = server.latents(graph, ["samples", 0])
    expected, _ = diffused(scheduler(kind, grid, order), noise())
    assert error(actual * SCALE, expected) <= 1e-5


@pytest.mark.parametrize(("kind", "shift", "grid", "order", "sampler"), [each for each in EXACT if each[3] == 1])
def test_ksampler_redraws_from_a_trained_timestep(
    server: Server, kind: str, shift: float, grid: list[float], order: int, sampler: str
) -> None:
    """`denoise` 0.5 with 2 steps takes the last two of four steps."""
    graph = k_sampler(student_graph(kind, shift=shift), sampler)
    graph["picture"] = graph["samples"]
    halved = {"latent_image": ["picture", 0], "steps": 2, "denoise": 0.5, "seed": 3}
    graph["samples"] = node("KSampler", **{**graph["picture"]["inputs"], **halved})
    actual, start = server.latents(graph, ["samples", 0], ["picture", 0])
    reference = scheduler(kind, grid, order)
    x = reference.add_noise(start * SCALE, noise(seed=3), reference.timesteps[2:3])
    expected, _ = diffused(reference, x, first=2)
    assert error(actual * SCALE, expected) <= 1e-5


def test_ksampler_on_the_model_of_tdm_sigmas_begins_at_the_first_trained_timestep(server: Server) -> None:
    """A uniform grid below the last timestep is then 'simple' as well."""
    graph = student_graph("epsilon", timesteps=GRIDS[1])
    (actual,) = server.latents(k_sampler(graph, "euler", model=["sigmas", 0]), ["samples", 0])
    expected, _ = diffused(scheduler("epsilon", GRIDS[1]), noise())
    assert error(actual * SCALE, expected) <= 1e-5


@pytest.mark.parametrize("levels", ["simple", "sgm_uniform"])
def test_the_dreamshaper_student_is_only_near_in_ksampler(server: Server, levels: str) -> None:
    """Both schedulers miss its timesteps 999, 749, 500, 250 by one, or by a quarter of one."""
    student = PRESETS["Luo-Yihong/TDM_dreamshaper_LoRA"]
    expected, _ = diffused(scheduler("epsilon", student.recipe["trained_timesteps"][4], 2), noise())
    graph = student_graph("epsilon", student=student.name, order=["sigmas", 2])
    (near,) = server.latents(k_sampler(graph, "dpmpp_2m", levels), ["samples", 0])
    (exact,) = server.latents(graph, ["samples", 0])
    assert error(exact * SCALE, expected) <= 1e-5 < error(near * SCALE, expected) < 1e-3


STOCK = {
    "euler": node("KSamplerSelect", sampler_name="euler"),
    "dpmpp_2m": node("KSamplerSelect", sampler_name="dpmpp_2m"),
    "dpmpp_2m_sde, eta 0": node(
        "SamplerDPMPP_2M_SDE", solver_type="midpoint", eta=0.0, s_noise=1.0, noise_device="cpu"
    ),
}


@pytest.mark.parametrize(
    ("kind", "order", "sampler"),
    [
        *((kind, 1, "euler") for kind in ("epsilon", "v_prediction", "flow_prediction")),
        *((kind, 2, "dpmpp_2m") for kind in ("epsilon", "v_prediction")),
        ("flow_prediction", 2, "dpmpp_2m_sde, eta 0"),
    ],
)
def test_stock_samplers_on_our_model_and_sigmas_are_exact(server: Server, kind: str, order: int, sampler: str) -> None:
    """This holds on any grid, also on one that begins below the last timestep. The grid for flow is that of SD3."""
    flow = kind == "flow_prediction"
    grid = PRESETS["Luo-Yihong/TDM_sd3_lora"].recipe["trained_timesteps"][4] if flow else GRIDS[1]
    graph = {**student_graph(kind, shift=6.0, timesteps=grid), "sampler": STOCK[sampler]}
    expected, _ = diffused(scheduler(kind, grid, order), noise())
    (actual,) = server.latents(graph, ["samples", 0])
    assert error(actual * SCALE, expected) <= 1e-5
