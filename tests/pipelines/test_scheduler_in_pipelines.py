"""`TDMScheduler` inside the stock pipelines: what the networks receive, with the stock schedulers as references."""

import json
import warnings

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from tdm import TDMScheduler
from tdm.tests import tiny

VP_GRID = [999, 856, 665, 399]
FLOW_GRID = [999.8, 947.2, 856.9, 666.4]
VP_FAMILIES = ("sd15", "sdxl", "pixart", "cogvideox")
FLOW_FAMILIES = tuple(f for f in tiny.FAMILIES if f not in VP_FAMILIES)
# The networks that take another clock than 0..1000: how to read the timestep back.
CLOCKS = {**dict.fromkeys(("flux", "qwenimage", "krea2"), lambda t: 1000 * t), "zimage": lambda t: 1000 - 1000 * t}


def trained_grid(family):
    return VP_GRID if family in VP_FAMILIES else FLOW_GRID


def student(family, **options):
    pipe = tiny.build(family)
    options = {"trained_timesteps": trained_grid(family), "solver_order": 1, **options}
    pipe.scheduler = TDMScheduler.from_config(pipe.scheduler.config, **options)
    return pipe


def denoiser(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def timesteps_run(pipe, family, **kwargs):
    """The timesteps with which one pipeline call runs its network, on the scheduler's clock, repeats merged."""
    recorded = []

    def record(_, args, kwargs):
        t = kwargs["timestep"] if "timestep" in kwargs else args[1]
        assert len(t.unique()) == 1
        recorded.append(CLOCKS.get(family, lambda t: t)(t.flatten()[0].item()))

    handle = denoiser(pipe).register_forward_pre_hook(record, with_kwargs=True)
    pipe(**{**tiny.call_kwargs(family), **kwargs})
    handle.remove()
    return [t for i, t in enumerate(recorded) if i == 0 or t != recorded[i - 1]]  # Wan guides in two calls


def latents(pipe, family, **kwargs):
    out = pipe(**{**tiny.call_kwargs(family), **kwargs})[0]
    return out if isinstance(out, torch.Tensor) else torch.stack(list(out))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_network_is_called_at_the_trained_timesteps(family, order):
    pipe = student(family, solver_order=order)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        recorded = timesteps_run(pipe, family, num_inference_steps=4)
    assert recorded == pytest.approx(trained_grid(family), abs=2e-4)  # float32 clocks
    assert (order == 1) == torch.equal(latents(pipe, family), latents(student(family), family))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_another_step_count_warns_and_keeps_the_first_timestep(family):
    pipe = student(family)
    with pytest.warns(UserWarning, match="trained for 4 steps"):
        recorded = timesteps_run(pipe, family, num_inference_steps=2)
    grid = trained_grid(family)
    assert recorded == pytest.approx([grid[0], grid[2]], abs=2e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_saved_pipeline_loads_as_plain_diffusers(family, tmp_path):
    pipe = student(family)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == [
        "tdm.pipelines.scheduler",
        "TDMScheduler",
    ]
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipe)
    assert loaded.scheduler.trained_timesteps == {4: trained_grid(family)}
    for a, b in zip(denoiser(pipe).parameters(), denoiser(loaded).parameters(), strict=True):
        assert torch.equal(a, b)
    # Loaded weights lie elsewhere in memory, which may round a CPU product differently: not torch.equal.
    torch.testing.assert_close(latents(loaded, family), latents(pipe, family), rtol=1e-4, atol=1e-4)


def test_the_short_name_in_a_model_index_loads_too(tmp_path):
    student("sd3").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["scheduler"] = ["tdm", "TDMScheduler"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert DiffusionPipeline.from_pretrained(tmp_path).scheduler.trained_timesteps == {4: trained_grid("sd3")}


@pytest.mark.parametrize("family", [f for f in FLOW_FAMILIES if f not in ("sana", "wan")])
def test_without_trained_timesteps_it_is_the_stock_flow_scheduler(family):
    """A teacher has the same shift, dynamic or not, and the same terminal as FlowMatchEuler. SD3 passes no sigmas."""
    stock, ours = tiny.build(family), student(family, trained_timesteps=None)
    sigmas = {"sigmas": [1 - i / 6 for i in range(6)]} if family == "sd3" else {}
    expected = latents(stock, family, num_inference_steps=6, **sigmas)
    torch.testing.assert_close(latents(ours, family, num_inference_steps=6), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["sd15", "cogvideox"])
def test_without_trained_timesteps_it_is_ddim(family):
    stock, ours = tiny.build(family), student(family, trained_timesteps=None)
    if family == "sd15":
        options = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
        stock.scheduler = diffusers.DDIMScheduler.from_config(stock.scheduler.config, **options)
    expected = latents(stock, family, num_inference_steps=5)
    ours = latents(ours, family, num_inference_steps=5)
    assert (ours - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("family", "pipeline", "grid"),
    [
        ("sd15", diffusers.StableDiffusionImg2ImgPipeline, VP_GRID),
        ("sdxl", diffusers.StableDiffusionXLImg2ImgPipeline, VP_GRID),
        ("sd3", diffusers.StableDiffusion3Img2ImgPipeline, FLOW_GRID),
        ("flux", diffusers.FluxImg2ImgPipeline, FLOW_GRID),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_image_to_image_runs_the_end_of_the_grid(family, pipeline, grid):
    pipe = pipeline.from_pipe(student(family, solver_order=2))
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    recorded = timesteps_run(pipe, family, image=image, strength=0.5)
    assert recorded == pytest.approx(grid[2:], abs=2e-4)
    assert pipe.scheduler.step_index == 4  # stepped with the levels of those timesteps, not with the first two


def test_explicit_timesteps_and_sigmas_reach_the_network():
    pipe = student("sd15")
    assert timesteps_run(pipe, "sd15", timesteps=[900, 600, 300]) == [900, 600, 300]
    pipe = student("sd3")
    assert timesteps_run(pipe, "sd3", sigmas=[0.9, 0.5]) == pytest.approx([964.2857, 750], abs=1e-3)  # shift 3
