"""The guided teacher of every family, and the counter of network calls: what really went through the network."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tdm import TDMPipeline
from tdm.cli import main
from tdm.pipelines.calls import count_calls
from tdm.pipelines.families import family_of_name
from tdm.tests import tiny
from tdm.tests.pipelines.students import Make, latents, load, plain, short_call
from tdm.training.settings import load_config
from torch import Tensor

Loaded = Callable[[str], TDMPipeline]

# Samples through the network in a bare call: guidance makes two a step. SD 1.5's PNDM takes one timestep twice; Flux's
# network takes its guidance as an input; Z-Image-Turbo is distilled and takes none.
BARE = {
    "sd15": 2 * 51, "sdxl": 2 * 50, "pixart": 2 * 20, "sd3": 2 * 28, "cogvideox": 2 * 50, "flux": 28, "sana": 2 * 20,
    "wan": 2 * 50, "zimage": 8, "qwenimage": 2 * 50, "krea2": 2 * 28,
}  # fmt: skip
EMBEDDED = "flux"
UNGUIDED = "zimage"


def counted(pipe: Any, family: str, **call: Any) -> tuple[int, Tensor]:
    """(samples through the network, latents) of a call that names neither steps nor guidance nor size."""
    with count_calls(getattr(pipe, family_of_name(family).denoiser)) as calls:
        out = short_call(pipe, family, **call)
    return calls.samples, out


def seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_bare_call_of_the_teacher_is_the_stock_pipeline_guided_in_the_familys_own_way(
    family: str, loaded: Loaded, bases: Callable[[str], Path]
) -> None:
    pipe = loaded(family)
    with pipe.teacher():
        calls, guided = counted(pipe, family)
        without, unguided = counted(pipe, family, **pipe.family.guidance(1.0))
    assert calls == BARE[family]
    steps, scale = pipe.teacher_call
    stock = {"num_inference_steps": steps, **pipe.family.guidance(scale)}
    stock |= {"negative_prompt": ""} if family == "qwenimage" else {}
    assert torch.equal(guided, latents(plain(bases(family)), family, **stock))
    if family == UNGUIDED:
        assert (without, pipe.teacher_call.guided) == (calls, False)
        assert torch.equal(guided, unguided)
    else:
        assert without == (calls if family == EMBEDDED else calls // 2)
        assert (guided - unguided).abs().max() > 1e-3 * unguided.abs().max()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_each_picture_of_a_batch_counts(family: str, loaded: Loaded) -> None:
    pipe, prompts = loaded(family), ["a red cube", "two blue rings by the sea"]
    with pipe.teacher():
        calls, batch = counted(pipe, family, num_inference_steps=2, prompt=prompts, generator=seeds(2))
        one, single = counted(pipe, family, num_inference_steps=2, prompt=prompts[1], generator=seeds(2)[1])
    assert calls == 2 * one
    assert (batch[1] - single[0]).abs().max() < 1e-4 * batch.abs().max()  # a batch sums in another order


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_student_with_guidance_makes_two_calls_a_step(family: str, make: Make) -> None:
    pipe = load(make(family, guidance_scale=5.0))
    calls, guided = counted(pipe, family)
    assert calls == (4 if family == EMBEDDED else 8)
    without, unguided = counted(pipe, family, **pipe.family.guidance(1.0))
    assert without == 4
    assert (guided - unguided).abs().max() > 1e-3 * unguided.abs().max()


def test_an_argument_of_the_caller_wins(loaded: Loaded) -> None:
    pipe = loaded("qwenimage")
    with pipe.teacher():
        assert counted(pipe, "qwenimage", num_inference_steps=3)[0] == 6
        empty = counted(pipe, "qwenimage", num_inference_steps=3, true_cfg_scale=3.0)[1]
        named = counted(pipe, "qwenimage", num_inference_steps=3, true_cfg_scale=3.0, negative_prompt="blurry")[1]
        text, mask = pipe.encode_prompt(["blurry"])
        tensors = {"negative_prompt_embeds": text, "negative_prompt_embeds_mask": mask}
        by_tensors = counted(pipe, "qwenimage", num_inference_steps=3, true_cfg_scale=3.0, **tensors)[1]
    assert not torch.equal(empty, named)
    assert torch.equal(by_tensors, named)


def test_the_bundled_teacher_has_its_own_steps_and_guidance() -> None:
    pipe = TDMPipeline.from_pretrained()
    assert pipe.teacher_call == (50, 3.0)
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    with pipe.teacher():
        for call in ({}, {"num_inference_steps": 50, "guidance_scale": 3.0}):
            with count_calls(pipe.transformer) as calls:
                pictures.append(pipe("a red star", generator=seeds(1)[0], output_type="pt", **call).images)
            assert calls.samples == 100
    assert torch.equal(*pictures)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_table_of_families_says_where_its_numbers_are_from(family: str) -> None:
    row = family_of_name(family)
    defaults = inspect.signature(row.pipeline_class().__call__).parameters
    if family != UNGUIDED:  # the pipeline's defaults are those of the undistilled Z-Image
        assert row.teacher_call.steps == defaults["num_inference_steps"].default
    if family == EMBEDDED:
        assert row.teacher_call.guidance_scale == defaults["guidance_scale"].default
    else:
        assert row.teacher_call.guidance_scale == load_config(family).objective.guidance_scale


@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile", "module.compile"])
def test_calls_of_a_compiled_network_are_counted_and_nothing_is_compiled_again(in_place: bool) -> None:
    pipe, compiled = tiny.build("sdxl"), []

    def backend(graph: Any, _inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    if in_place:
        pipe.unet.compile(backend=backend)
    else:
        pipe.unet = torch.compile(pipe.unet, backend=backend)
    latents(pipe, "sdxl")
    graphs = len(compiled)
    assert graphs > 0
    for _ in range(2):
        batches: list[int] = []
        with count_calls(pipe.unet, batches.append) as calls:
            latents(pipe, "sdxl", guidance_scale=2.0, num_inference_steps=3)
        assert (calls.samples, batches) == (6, [2, 2, 2])
    latents(pipe, "sdxl")
    assert (calls.samples, len(compiled)) == (6, graphs)


@pytest.mark.parametrize(
    ("family", "student", "teacher"),
    [("flux", "4 network calls", "28 network calls"), ("qwenimage", "8 network calls", "100 network calls")],
)
def test_the_command_prints_the_calls_that_were_made(
    family: str, student: str, teacher: str, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = make(family, guidance_scale=5.0)
    command = ["generate", "a red cube", "--student", str(file)]
    assert main([*command, "--out", str(tmp_path / "one.png")]) == 0
    assert f"16x16  {student}" in capsys.readouterr().out
    assert main([*command, "--compare", "--out", str(tmp_path / "both.png")]) == 0
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert student in " ".join(lines["student"].split())
    assert teacher in " ".join(lines["teacher"].split())


def test_a_distilled_krea_2_is_run_in_its_own_eight_steps_without_guidance(tmp_path: Path, make: Make) -> None:
    """Krea 2 Turbo says in its index that it is distilled."""
    base = tiny.build("krea2")
    base.register_to_config(is_distilled=True)
    base.save_pretrained(tmp_path / "turbo")
    pipe = TDMPipeline.from_pretrained(tmp_path / "turbo", student=make("krea2"))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.teacher_call == (8, 1.0)
    with pipe.teacher():
        calls, _ = counted(pipe, "krea2")
    assert calls == 8
