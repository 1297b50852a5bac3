"""Normalised guidance: its formulas against closed forms, and one name in training, file, card and teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from tdm import TDMPipeline
from tdm.errors import TDMError
from tdm.pipelines.families import family_of_name
from tdm.pipelines.guidance_norm import GuidanceNorm, guided
from tdm.training.card import write_card
from tdm.training.export import export, read_run
from tdm.training.loop import distill
from tdm.training.settings import load_config
from tdm.training.tasks import build_task

Settings = Callable[[str], list[str]]
W = 4.5


@pytest.fixture
def outputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    cond, other = torch.randn(2, 3, 4, 6, 8, generator=generator, dtype=torch.float64).unbind()
    return cond, 0.7 * cond + 0.3 * other


def normalised(text: str, outputs: tuple[torch.Tensor, torch.Tensor], family: str = "sd3") -> torch.Tensor:
    return GuidanceNorm.parse(text)(*outputs, W, family_of_name(family).token_norms)


def test_rescale_is_that_of_diffusers(outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    expected = rescale_noise_cfg(guided(*outputs, W), outputs[0], guidance_rescale=0.7)
    torch.testing.assert_close(normalised("rescale@0.7", outputs), expected)
    full = normalised("rescale@1", outputs)
    torch.testing.assert_close(full.flatten(1).std(1), outputs[0].flatten(1).std(1))


def test_zero_star_scales_the_unconditional_output_as_diffusers_does(
    outputs: tuple[torch.Tensor, torch.Tensor],
) -> None:
    cond, uncond = outputs
    scale = cfg_zero_star_scale(cond.flatten(1), uncond.flatten(1)).view(-1, 1, 1, 1)
    torch.testing.assert_close(normalised("zero_star", outputs), guided(cond, scale * uncond, W))
    rest = cond - scale * uncond  # the best fit leaves a rest at a right angle
    torch.testing.assert_close((rest * uncond).flatten(1).sum(1), torch.zeros(3).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "tokens"), [("qwenimage", 2), ("sd3", 1)])
def test_token_norm_gives_every_token_the_conditional_norm(
    family: str, tokens: int, outputs: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """A token of Qwen-Image is a patch of 2 x 2 latent pixels with all channels."""
    result = normalised("token_norm", outputs, family)

    def norms(x: torch.Tensor) -> torch.Tensor:
        return x.unfold(2, tokens, tokens).unfold(3, tokens, tokens).square().sum((1, 4, 5)).sqrt()

    torch.testing.assert_close(norms(result), norms(outputs[0]))
    plain = guided(*outputs, W)
    torch.testing.assert_close(torch.nn.functional.normalize(result[0, :, 0, 0], dim=0),
                               torch.nn.functional.normalize(plain[0, :, 0, 0], dim=0))  # fmt: skip


def test_norm_limit_shortens_and_never_lengthens(outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    norm = outputs[0].flatten(1).norm(dim=1)
    torch.testing.assert_close(normalised("norm_limit@1.1", outputs).flatten(1).norm(dim=1), 1.1 * norm)
    assert torch.equal(normalised("norm_limit@100", outputs), guided(*outputs, W))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cfgnorm", "guidance_norm must be one of rescale, norm_limit, token_norm, zero_star, not 'cfgnorm'"),
        ("rescale", "guidance_norm rescale needs an amount from 0 to 1, such as rescale@0.7, not 'rescale'"),
        ("rescale@1.5", "needs an amount from 0 to 1"),
        ("norm_limit@-1", "needs an amount above 0"),
        ("norm_limit@nan", "needs an amount above 0"),
        ("zero_star@2", "zero_star has no amount; write zero_star alone"),
    ],
)
def test_a_wrong_name_or_amount_is_one_line(text: str, message: str) -> None:
    with pytest.raises(TDMError, match=message):
        GuidanceNorm.parse(text)


def task_of(settings: list[str]) -> Any:
    config = load_config(None, settings)
    return build_task(config.task, config.memory, "cpu", lambda _: None)


def test_training_previews_file_card_and_teacher_have_one_norm(settings: Settings, tmp_path: Path) -> None:
    own = [*settings("sd15"), "objective.guidance_scale=3", "task.guidance_norm=rescale@0.7", "output.preview_every=0"]
    config = load_config(None, own)
    task: Any = build_task(config.task, config.memory, "cpu", lambda _: None)
    plain = task_of(settings("sd15"))
    assert task._identity != plain._identity  # the teacher's kept pictures are others
    run = distill(task, config, tmp_path / "run", report=lambda _: None)
    generator = torch.Generator().manual_seed(0)
    cond, shape = task.conditions(2, generator)
    noise = torch.randn(2, *shape, generator=generator)
    drawn = run.teacher(noise, cond)
    run.roles.guided_output = None
    assert not torch.allclose(drawn, run.teacher(noise, cond), atol=1e-4)

    trained = read_run(tmp_path / "run")
    assert trained is not None
    file = export(trained, "student", tmp_path / "student.safetensors")
    assert "| teacher's guidance norm | rescale@0.7 |" in write_card(trained, file, "student").read_text()
    pipe = TDMPipeline.from_pretrained(file)
    pipe.set_progress_bar_config(disable=True)

    def by_teacher(**call: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        with pipe.teacher():
            return pipe("a dog", generator=generator, num_inference_steps=3, output_type="latent", **call)[0]

    assert torch.equal(by_teacher(), by_teacher(guidance_rescale=0.7))
    assert not torch.allclose(by_teacher(), by_teacher(guidance_rescale=0.0), atol=1e-4)


def test_zero_star_reaches_the_teacher_of_a_flow_student(settings: Settings, tmp_path: Path) -> None:
    config = load_config(None, [*settings("wan"), "objective.guidance_scale=3", "task.guidance_norm=zero_star",
                                "output.preview_every=0"])  # fmt: skip
    distill(build_task(config.task, config.memory, "cpu", lambda _: None), config, tmp_path, report=lambda _: None)
    trained = read_run(tmp_path)
    assert trained is not None
    pipe = TDMPipeline.from_pretrained(export(trained, "student", tmp_path / "student.safetensors"))
    pipe.set_progress_bar_config(disable=True)

    def by_teacher() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe("a dog", generator=generator, num_inference_steps=3, output_type="latent")[0]

    with pipe.teacher():
        with_norm = by_teacher()
        object.__setattr__(pipe.recipe, "teacher_guidance_norm", None)
        assert not torch.allclose(with_norm, by_teacher(), atol=1e-4)
    assert not pipe.transformer._forward_hooks


def test_a_base_that_always_normalises_needs_no_name(settings: Settings) -> None:
    task = task_of(settings("qwenimage"))
    assert str(task.guidance_norm) == "token_norm"
    assert task.guided_output is not None
    with pytest.raises(TDMError, match="nothing that QwenImagePipeline can be run with; it has token_norm"):
        task_of([*settings("qwenimage"), "task.guidance_norm=zero_star"])
    with pytest.raises(TDMError, match="FluxPipeline can be run with; it has none: leave guidance_norm out"):
        task_of([*settings("flux"), "task.guidance_norm=zero_star"])
