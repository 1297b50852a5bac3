"""Students that take fresh noise at each step, in ComfyUI: the noise that diffusers takes from the same seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tdm import TDMPipeline, TDMScheduler
from tdm.pipelines.students.file import Student, save_student
from tdm.pipelines.students.recipe import HEADER_KEY, StudentRecipe
from tdm.tests import tiny
from tdm.tests.pipelines.students import lora_for
from torch import Tensor

from .graphs import SEED, node, student_graph
from .networks_pack.network import network
from .server import Graph, PromptError, Server
from .test_bridge import CALLS, FRAMES, GRID, Folder, loaded, size_of
from .test_sampling import GRIDS, SCALE, SHAPE, error, scheduler

ONE = (1, *SHAPE[1:])
KINDS = {"epsilon": "sd15", "v_prediction": "sd15", "flow_prediction": "sd3"}


def recipe(kind: str, grid: list[float], eta: float = 1.0) -> str:
    fields: dict[str, Any] = {"guidance_scale": 1.0, "height": 64, "width": 64, "stochastic_sampling": True, "eta": eta}
    return StudentRecipe("me/test", KINDS[kind], kind, {len(grid): grid}, **fields).to_metadata()[HEADER_KEY]


def fresh_graph(kind: str, grid: list[float], eta: float = 1.0, **options: Any) -> Graph:
    graph = student_graph(kind, **options)
    graph["sigmas"]["inputs"]["recipe"] = recipe(kind, grid, eta)
    return graph


def diffused(
    kind: str,
    grid: list[float],
    first: torch.Generator | None = None,
    after: torch.Generator | None = None,
    shape: tuple[int, ...] = ONE,
    eta: float = 1.0,
) -> Tensor:
    """What diffusers samples: the first latents and then the noise of each step, from one generator or from two."""
    first = first or torch.Generator().manual_seed(SEED)
    stepper = TDMScheduler.from_config(scheduler(kind, grid).config, stochastic_sampling=True, eta=eta)
    stepper.set_timesteps(len(grid))
    x = torch.randn(shape, generator=first)
    for t in stepper.timesteps:
        x = stepper.step(network(x, t), t, x, generator=after or first).prev_sample
    return x


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_nodes_sample_what_diffusers_samples(server: Server, kind: str, grid: list[float]) -> None:
    fresh, plain = fresh_graph(kind, grid), student_graph(kind, timesteps=grid)
    actual, deterministic = (server.latents(graph, ["samples", 0])[0] * SCALE for graph in (fresh, plain))
    expected = diffused(kind, grid)
    assert error(actual[:1], expected) <= 1e-5  # the first of two is what is drawn alone
    assert error(deterministic[:1], expected) > 1e-2
    plain["first"] = fresh["sigmas"]
    plain["sigmas"]["inputs"]["model"] = ["first", 0]  # the last TDM Sigmas says what the run is
    assert torch.equal(server.latents(plain, ["samples", 0])[0] * SCALE, deterministic)


@pytest.mark.parametrize("kind", KINDS)
def test_the_nodes_mix_own_and_fresh_noise_as_diffusers_does(server: Server, kind: str) -> None:
    (drawn,) = server.latents(fresh_graph(kind, GRIDS[0], eta=0.4), ["samples", 0])
    assert error(drawn[:1] * SCALE, diffused(kind, GRIDS[0], eta=0.4)) <= 1e-5
    assert error(drawn[:1] * SCALE, diffused(kind, GRIDS[0])) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_taken_out_of_a_batch_is_the_one_in_it(server: Server, kind: str) -> None:
    graph = fresh_graph(kind, GRIDS[0])
    graph["latent"]["inputs"]["batch_size"] = 3
    (batch,) = server.latents(graph, ["samples", 0])
    graph["out"] = node("LatentFromBatch", samples=["latent", 0], batch_index=1, length=2)
    graph["samples"]["inputs"]["latent_image"] = ["out", 0]
    (latents,) = server.latents(graph, ["samples", 0])
    assert error(latents, batch[1:]) <= 1e-5
    assert error(batch[1], batch[2]) > 1e-2


def two_samplers(graph: Graph, second: str) -> Graph:
    """Split the schedule of a graph over two samplers. The second one adds no noise of its own."""
    graph["parts"] = node("SplitSigmas", sigmas=["sigmas", 1], step=2)
    same = {"guider": ["guider", 0], "sampler": ["sampler", 0]}
    first = {"noise": ["noise", 0], "sigmas": ["parts", 0], "latent_image": ["latent", 0]}
    graph["first"] = node("SamplerCustomAdvanced", **same, **first)
    rest = {"sigmas": ["parts", 1], "latent_image": ["first", 0]}
    if second == "DisableNoise":
        graph["none"] = node("DisableNoise")
        graph["samples"] = node("SamplerCustomAdvanced", **same, **rest, noise=["none", 0])
    else:
        whole = {"model": ["sigmas", 0], "positive": ["model", 1], "negative": ["model", 1], "sampler": ["sampler", 0]}
        noise = {"noise_seed": graph["noise"]["inputs"]["noise_seed"], "cfg": 1.0, "add_noise": False}
        graph["samples"] = node("SamplerCustom", **whole, **noise, **rest)
    return graph


@pytest.mark.parametrize("second", ["DisableNoise", "SamplerCustom"])
@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_in_two_samplers_is_the_schedule(server: Server, kind: str, seed: int, second: str) -> None:
    """No noise comes twice: the second sampler goes on in the seed's noise where the first one stopped."""
    (whole,) = server.latents(fresh_graph(kind, GRIDS[1], seed=seed), ["samples", 0])
    (split,) = server.latents(two_samplers(fresh_graph(kind, GRIDS[1], seed=seed), second), ["samples", 0])
    assert error(split, whole) <= 1e-5
    assert error(whole[:1] * SCALE, diffused(kind, GRIDS[1], torch.Generator().manual_seed(seed))) <= 1e-5


def test_a_second_sampler_that_cannot_know_its_noise_says_so(server: Server) -> None:
    """The second sampler gets changed samples, not those that the first one returned."""
    graph = two_samplers(fresh_graph("epsilon", GRIDS[0]), "DisableNoise")
    graph["other"] = node("LatentMultiply", samples=["first", 0], multiplier=0.5)
    graph["samples"]["inputs"]["latent_image"] = ["other", 0]
    with pytest.raises(PromptError, match="neither noise nor a seed for it: use SamplerCustom"):
        server.latents(graph, ["samples", 0])


@pytest.mark.parametrize("kind", KINDS)
def test_cores_lcm_takes_noise_of_the_same_kind_from_another_generator(server: Server, kind: str) -> None:
    """The model card says this about core's own nodes."""
    graph = fresh_graph(kind, GRIDS[0])
    graph["sampler"] = node("KSamplerSelect", sampler_name="lcm")
    (latents,) = server.latents(graph, ["samples", 0])
    first, after = (torch.Generator().manual_seed(seed) for seed in (SEED, SEED + 1))
    assert error(latents * SCALE, diffused(kind, GRIDS[0], first, after, SHAPE)) <= 1e-5


def test_order_2_is_refused(server: Server) -> None:
    with pytest.raises(PromptError, match="set order to 1"):
        server.latents(fresh_graph("flow_prediction", GRIDS[0], order=2), ["samples", 0])


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_student_of_each_family_gives_the_latents_of_diffusers(server: Server, folder: Folder, name: str) -> None:
    """Both sides use the same seed. CogVideoX differs: diffusers draws its noise with frames before channels."""
    folder(name)
    pipe: Any = tiny.build(name)
    size = size_of(name)
    denoiser = "unet" if name in ("sd15", "sdxl") else "transformer"
    predicts = TDMScheduler.from_config(pipe.scheduler.config).config.prediction_type
    frames = {"num_frames": FRAMES} if name in ("cogvideox", "wan") else {}
    fields: dict[str, Any] = {"guidance_scale": 1.0, "height": size.height, "width": size.width, **frames}
    fresh_recipe = StudentRecipe("me/tiny", name, predicts, {3: GRID}, stochastic_sampling=True, **fields)
    (server.models / "loras").mkdir(exist_ok=True)
    file = server.models / "loras" / f"fresh_{name}.safetensors"
    save_student(file, Student.from_state_dict(fresh_recipe, lora_for(getattr(pipe, denoiser)), alpha=2))
    graph = loaded(name, timesteps=None)
    student = {"file": file.name, "released_as": "by its header or name", "strength": 1.0}
    graph["student"] = node("TDMLoadStudent", model=["load", 0], **student)
    graph["sigmas"]["inputs"] |= {"model": ["student", 0], "recipe": ["student", 2]}
    (latents,) = server.latents(graph, ["samples", 0])

    same = {"generator": torch.Generator().manual_seed(SEED), "output_type": "latent", **CALLS.get(name, {})}
    ours = TDMPipeline.from_pipe(pipe, student=file)
    if name == "flux":
        same["guidance_scale"] = 3.5  # what ComfyUI tells its network, if nothing else is connected
    out = ours(tiny.PROMPT, **same)[0]
    if name == "cogvideox":
        assert latents.shape == out.transpose(1, 2).shape
        assert latents.isfinite().all()
    else:
        assert error(latents, ours.family.unpack(ours, out, size)) <= 1e-5


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_batch_of_one_seed_is_that_of_diffusers(server: Server, folder: Folder, name: str) -> None:
    folder(name)
    pipe: Any = tiny.build(name)
    size = size_of(name)
    predicts = TDMScheduler.from_config(pipe.scheduler.config).config.prediction_type
    sizes = {"height": size.height, "width": size.width}
    fresh_recipe = StudentRecipe(
        "me/tiny", name, predicts, {3: GRID}, guidance_scale=3.5, stochastic_sampling=True, **sizes
    )
    graph = loaded(name, timesteps=None, batch=3)
    graph["sigmas"]["inputs"]["recipe"] = fresh_recipe.to_metadata()[HEADER_KEY]
    (latents,) = server.latents(graph, ["samples", 0])
    denoiser = getattr(pipe, "unet" if name == "sd15" else "transformer")
    none = {key: torch.zeros_like(tensor) for key, tensor in lora_for(denoiser).items()}
    ours = TDMPipeline.from_pipe(pipe, student=Student.from_state_dict(fresh_recipe, none))
    same = {"output_type": "latent", **(ours.family.guidance(1.0) if name == "sd15" else {})}
    seeded = torch.Generator().manual_seed(SEED)
    out = ours(tiny.PROMPT, num_images_per_prompt=3, generator=seeded, **same)[0]
    assert error(latents, ours.family.unpack(ours, out, size)) <= 1e-5
