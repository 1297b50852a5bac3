"""Timesteps from students: the released ones by name, and files in `models/loras`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tdm.pipelines.students.file import Student, save_student
from tdm.pipelines.students.recipe import StudentRecipe
from tdm.pipelines.students.released import PRESETS

from .conftest import Checkpoint
from .graphs import node, sampling, student_graph
from .server import PromptError, Server
from .test_sampling import SCALE, diffused, error, noise, scheduler

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
LORA = {f"{LAYER}.lora_A.weight": torch.ones(4, 1280), f"{LAYER}.lora_B.weight": torch.ones(1280, 4)}
GRIDS = {1: [799.0], 4: [899.0, 674.0, 449.0, 224.0]}


@pytest.fixture
def student(server: Server) -> Callable[..., str]:
    """Writes a student file into `models/loras`, and returns its name there."""

    def write(name: str, **changes: Any) -> str:
        fields = {"base_model": "me/base", "family": "sd15", "prediction_type": "epsilon", "trained_timesteps": GRIDS}
        sizes = {"guidance_scale": 1.0, "height": 512, "width": 512}
        recipe = StudentRecipe.from_fields({**fields, **sizes, **changes})
        save_student(server.models / "loras" / name, Student.from_state_dict(recipe, LORA), force=True)
        return name

    return write


RELEASED = [name for name, preset in PRESETS.items() if "sampler" not in preset.recipe and preset.family != "cogvideox"]


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_student_runs_by_its_name(server: Server, name: str) -> None:
    """The name gives its timesteps, and the output `order` its sampler order."""
    recipe = StudentRecipe.from_fields(PRESETS[name].fields)
    grid = recipe.trained_timesteps[4]
    kind, shift = recipe.prediction_type, recipe.flow_shift or 1.0
    (actual,) = server.latents(student_graph(kind, shift=shift, student=name, order=["sigmas", 2]), ["samples", 0])
    expected, _ = diffused(scheduler(kind, grid, recipe.solver_order), noise())
    assert error(actual * SCALE, expected) <= 1e-5


@pytest.mark.parametrize(("steps", "grid"), [(0, GRIDS[4]), (4, GRIDS[4]), (1, GRIDS[1]), (3, [899, 599, 299])])
@pytest.mark.parametrize("order", [1, 2])
def test_a_student_file_brings_its_recipe(
    server: Server, student: Callable[..., str], steps: int, grid: list[float], order: int
) -> None:
    name = student(f"folder/order_{order}.safetensors", solver_order=order)
    graph = student_graph("epsilon", student=name, steps=steps, order=["sigmas", 2])
    (actual,) = server.latents(graph, ["samples", 0])
    expected, _ = diffused(scheduler("epsilon", grid, order), noise())
    assert error(actual * SCALE, expected) <= 1e-5


def test_a_file_that_is_no_student_is_refused(server: Server, student: Callable[..., str]) -> None:
    (server.models / "loras" / "broken.safetensors").write_bytes(b"no")
    torch.save({"a": torch.ones(1)}, server.models / "loras" / "style.pt")
    other = student("other.safetensors", sampler={"scheduler": "TCDScheduler"})
    flow = student("flow.safetensors", prediction_type="flow_prediction", family="sd3")
    for name, message in {
        "broken.safetensors": "broken.safetensors",
        "style.pt": "says nothing about its timesteps: choose which released student it is",
        other: "is no TDM student: it is sampled with TCDScheduler",
        flow: "which predicts flow_prediction; this model predicts epsilon",
    }.items():
        with pytest.raises(PromptError, match=message):
            server.latents(student_graph("epsilon", student=name), ["samples", 0])


def test_a_file_that_was_written_again_is_read_again(server: Server, student: Callable[..., str]) -> None:
    """TDM Sigmas itself reads it, without a loader in front of it."""
    name = student("again.safetensors")
    graph = student_graph("epsilon", student=name) | {"show": node("TestSigmas", sigmas=["sigmas", 1])}
    first = server.run(graph).outputs["show"]["sigmas"]
    student(name, trained_timesteps={2: [899.0, 449.0]})
    second = server.run(graph).outputs["show"]["sigmas"]
    assert (len(first), len(second)) == (5, 3)
    assert server.run(graph).outputs["show"]["sigmas"] == second


def test_a_student_of_another_family_is_refused(
    server: Server, checkpoint: Checkpoint, student: Callable[..., str]
) -> None:
    """Both families have the same prediction type, so only the family tells them apart."""
    graph = {
        "base": node("CheckpointLoaderSimple", ckpt_name=checkpoint.file),
        "prompt": node("TestPrompt", width=768),
        **sampling(["base", 0], ["prompt", 0], student=student("sdxl.safetensors", family="sdxl")),
    }
    with pytest.raises(PromptError, match=r"student of me/base \(sdxl\); this MODEL is sd15"):
        server.latents(graph, ["samples", 0])
    graph["sigmas"]["inputs"]["student"] = student("sd15.safetensors")
    assert server.latents(graph, ["samples", 0])


def test_a_guided_student_without_guidance_is_a_warning(server: Server, student: Callable[..., str]) -> None:
    name = student("guided.safetensors", guidance_scale=2.5)
    graph = student_graph("epsilon", student=name, seed=41)
    graph["end"] = node("SaveLatent", samples=["samples", 0], filename_prefix="guided")

    def warned() -> int:
        return server.log.read_text().count("made for guidance 2.5 and runs without: use CFGGuider with cfg 2.5")

    before = warned()
    run = server.run(graph)
    assert warned() == before + 1
    assert run.outputs["sigmas"]["text"][0].splitlines()[1] == "CFGGuider with 2.5"
    prompts = {"positive": ["model", 1], "negative": ["model", 1]}
    graph["guider"] = node("CFGGuider", model=["sigmas", 0], cfg=2.5, **prompts)
    server.run(graph)
    assert warned() == before + 1
